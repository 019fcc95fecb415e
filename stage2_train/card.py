"""The model card of a trained model, README.md: its origin, training and figures, from the run's own records.

It names no folder of the machine, so that it can be published as it is.
"""

import json
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCardData

from common.config import HELD_OUT, LOCAL_FILES, DataConfig
from common.documents import read_metrics
from common.evaluations import REFERENCE, TRAINED, Figures, Results, is_evaluated, markdown, read_results
from common.provenance import context, versions
from common.remote.places import here
from common.runs import RunPaths
from stage2_train.config import Config
from stage2_train.data import TrainingData

CARD = "README.md"
TAGS = ["astar-po", "reinforcement-learning", "reasoning"]
LIBRARIES = ("deepspeed", "peft")
"""Libraries of stage 2, beside those that stage 1 records too."""
UNKNOWN = "not recorded"

TRAINING_FIGURES = {
    "reward/mean": "mean reward of the completions drawn",
    "kl/sequence": "KL(π‖π_ref), nats per completion",
    "policy/log_ratio": "mean ln π/π_ref of a step, nats",
    "completion/tokens_mean": "tokens per completion",
    "completion/truncated": "share of truncated completions",
}
TOKENS_PER_STEP = "tokens per step"
"""The label of `completion/tokens_mean` where steps of solutions are trained on."""
_BENCHMARK = re.compile("evaluate/(?:pass_at_1|(.+)/accuracy)")
"""The metrics of evaluations during training; the first is of the held-out prompts."""

Cell = tuple[str, object]


def made_with(config: Config, data: TrainingData, processes: int) -> dict[str, Any]:
    """The facts of a run's training that its config does not contain; a checkpoint keeps them for its card."""
    stage1, here = data.stage1, context(config)
    return {
        **{key: data.identity[key] for key in ("model", "grader")},
        "prompts": len(data.prompts),
        "held_out": None
        if config.held_out is None or not data.held_out
        else {"data": config.held_out.model_dump(exclude_none=True), "prompts": len(data.held_out)},
        "iterations": data.iterations(config),
        "processes": processes,
        "vstar": None if stage1 is None else {"num_samples": stage1.num_samples, "beta1": stage1.beta1},
        "advantages": None
        if (table := data.advantages) is None
        else {"states": table.rows.height, "pairs": table.pairs, "values_from": table.values_from},
        "accepted_mismatches": data.accepted_mismatches,
        **{key: here[key] for key in ("python", "commit")},
        "versions": here["versions"] | versions(LIBRARIES),
    }


@dataclass(frozen=True, slots=True, kw_only=True)
class Trained:
    """A model that was trained: the settings, the iteration, and its run's records."""

    config: Config
    iteration: int
    made_with: Mapping[str, Any]
    """As the function of that name gives it; empty for a checkpoint of an earlier version."""
    metrics: Sequence[Mapping[str, float]]
    evaluations: Sequence[Figures] = ()
    """The figures of `evaluate`, beside those of the reference."""

    @classmethod
    def of(
        cls,
        paths: RunPaths,
        config: Config,
        iteration: int,
        made_with: Mapping[str, Any],
        evaluations: Sequence[Figures] = (),
    ) -> "Trained":
        """With the figures of a run up to that iteration."""
        metrics = [values for _, values in read_metrics(paths.metrics) if values["iteration"] <= iteration]
        return cls(
            config=config,
            iteration=iteration,
            made_with=made_with,
            metrics=metrics,
            evaluations=evaluations,
        )

    def card(self) -> str:
        """The text of README.md."""
        metadata = ModelCardData(
            base_model=_hub_name(self.config.model.path),
            datasets=[name for name in [_hub_name(self.config.data.path)] if name] or None,
            library_name="transformers",
            pipeline_tag="text-generation",
            tags=TAGS,
        )
        planned = self.made_with.get("iterations")
        of_them = f" of {planned:,}" if planned and planned != self.iteration else ""
        sections = [
            f"---\n{metadata.to_yaml()}\n---",
            f"# {self.config.run}, iteration {self.iteration:,}",
            f"`{title_of(self.config.model.path)}` after {self.iteration:,}{of_them} iterations of training with the "
            f"objective `{self.config.train.objective.name}`. This page was written by the training program from the "
            "run's records.",
            *("## Origin", _table(self._origin())),
            *("## Data and reward", _table(self._data())),
            *("## Objective and settings", _table(self._settings())),
            *("## Figures", *self._figures()),
            *("## Software", _table(self._software())),
            "The licences of the original model and of the data apply. Nothing is known about the model beyond these "
            "figures: it was not tested for other tasks, for languages, or for harmful output.",
        ]
        return "\n\n".join(sections) + "\n"

    def _origin(self) -> Iterable[Cell]:
        model, identity = self.config.model, self.made_with.get("model") or {}
        yield "trained from", f"`{title_of(model.path)}`"
        if model.revision is not None:
            yield "its revision", f"`{model.revision}`"
        yield "hash of its weights", _code(identity.get("weights"))
        yield "number format", model.dtype
        if (lora := self.config.train.lora) is not None:
            yield "LoRA", f"rank {lora.rank}, alpha {lora.alpha}; merged here, and alone in `adapter/`"

    def _data(self) -> Iterable[Cell]:
        yield from _data_rows("prompts", self.config.data, self.made_with.get("prompts"))
        if held_out := self.made_with.get("held_out"):
            data = DataConfig.model_validate(held_out["data"])
            yield from _data_rows("held-out prompts", data, held_out["prompts"])
        yield "reward", f"`{json.dumps(self.config.grader.name)}`"
        yield "graders and versions", _code(self.made_with.get("grader"))
        if vstar := self.made_with.get("vstar"):
            yield "V̂*", f"from {vstar['num_samples']} samples per prompt, β1 = {vstar['beta1']:g}"
        if table := self.made_with.get("advantages"):
            yield (
                "advantages",
                f"of {table['pairs']:,} next steps of {table['states']:,} states, values from `{table['values_from']}`",
            )
        for mismatch in self.made_with.get("accepted_mismatches", ()):
            yield "accepted difference", mismatch

    def _settings(self) -> Iterable[Cell]:
        train = self.config.train.model_dump(mode="json", exclude_none=True)
        objective = train.pop("objective")
        yield "objective", f"`{objective.pop('name')}`"
        yield from ((f"its {key}", _plain(value)) for key, value in objective.items())
        for key in ("learning_rate", "batch_size", "mini_batch_size", "warmup_steps", "adam_betas"):
            yield key, _plain(train[key])
        if self.config.train.rollouts == "stage1":
            yield "completions", "stage 1's samples, which the original model drew"
        for key in ("weight_decay", "max_grad_norm", "staleness", "zero_stage"):
            yield key, _plain(train[key])
        yield "processes", self.made_with.get("processes", UNKNOWN)
        sampling = self.config.sampling.model_dump(mode="json", exclude_none=True)
        yield from ((f"sampling.{key}", _plain(value)) for key, value in sampling.items())
        yield "seed", self.config.seed

    def _figures(self) -> Iterable[str]:
        drawn = [row for row in self.metrics if "completion/tokens_mean" in row]
        if drawn:
            first, last = drawn[0], drawn[-1]
            heads = tuple(f"iteration {row['iteration']:.0f}" for row in (first, last))
            labels = TRAINING_FIGURES
            if self.config.train.reads_advantages:
                labels = labels | {"completion/tokens_mean": TOKENS_PER_STEP}
            rows: list[tuple[str, ...]] = [
                (label, _figure(first.get(name)), _figure(last.get(name)))
                for name, label in labels.items()
                if name in last
            ]
            yield "During training, on training prompts:"
            yield _table(rows, heads)
        measured = self._measured()
        for name, ((start, before), (end, after)) in measured.items():
            yield (
                f"Accuracy on `{name}`, measured during training: {_figure(before)} at iteration {start:.0f}, "
                f"{_figure(after)} at iteration {end:.0f}."
            )
        if self.evaluations:
            yield "Accuracy by `evaluate`, with 95 % intervals:"
            yield markdown(Results(results=list(self.evaluations))).strip()
            graders = {each.benchmark: each.grader for each in self.evaluations}
            prompts = {each.benchmark: each.prompts for each in self.evaluations}
            rows = [(name, f"{prompts[name]:,}", f"`{graders[name]}`") for name in graders]
            yield _table(rows, ("prompts", "grader"))
        if not (drawn or measured or self.evaluations):
            yield "None are recorded."

    def _measured(self) -> dict[str, tuple[tuple[float, float], tuple[float, float]]]:
        """Iteration and accuracy of the first and the last evaluation during training, by benchmark."""
        found: dict[str, list[tuple[float, float]]] = {}
        for row in self.metrics:
            for key, value in row.items():
                if name := _BENCHMARK.fullmatch(key):
                    found.setdefault(name[1] or HELD_OUT, []).append((row["iteration"], value))
        return {name: (values[0], values[-1]) for name, values in found.items()}

    def _software(self) -> Iterable[Cell]:
        yield "astar-po, commit", _code(self.made_with.get("commit"))
        yield "Python", self.made_with.get("python", UNKNOWN)
        for name, version in self.made_with.get("versions", {}).items():
            if version:
                yield name, version


def evaluations_of(paths: RunPaths, iteration: int, *, is_exported: bool) -> list[Figures]:
    """The figures of `evaluate` for the reference and the model after that iteration.

    `is_exported`: the folder to which `evaluate` exports checkpoints has this one.
    """
    results = read_results(paths)
    if results is None:
        return []
    names = {}
    exported = paths.exported(iteration)
    if is_exported and is_evaluated(paths, exported):
        names[os.path.realpath(exported)] = f"iteration {iteration}"
    if _trained_iterations(paths) == iteration:
        names[os.path.realpath(paths.model)] = TRAINED
    theirs = [
        each.model_copy(update={"model": names[os.path.realpath(here(each.path))]})
        for each in results.results
        if os.path.realpath(here(each.path)) in names
    ]
    return [*(each for each in results.results if each.model == REFERENCE), *theirs] if theirs else []


def _trained_iterations(paths: RunPaths) -> int | None:
    """The iterations of the run's model, if its results are not older."""
    if not is_evaluated(paths, paths.model):
        return None
    try:
        found: int = json.loads(paths.trained_with.read_bytes())["iterations"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return found


def _data_rows(what: str, data: DataConfig, count: int | None) -> Iterable[Cell]:
    parts = [f"`{title}`" for title in _titles(data)]
    if _hub_name(data.path):
        parts.append(f"`{data.split}`")
    yield what, f"{', '.join(parts)}{'' if count is None else f': {count:,}'}"
    for key in data.shown:
        if (value := getattr(data, key)) is not None:
            text = [each.model_dump() for each in value] if key == "few_shot" else value
            yield f"their {key}", f"`{json.dumps(text, ensure_ascii=False)}`"


def _titles(data: DataConfig) -> list[str]:
    paths = data.path if isinstance(data.path, list) else [data.path or data.format]
    return [title_of(str(path)) + (f" ({data.name})" if data.name else "") for path in paths]


def _hub_name(path: object) -> str | None:
    """The path of a model or data set, if it is a name on the hub."""
    is_name = isinstance(path, str) and re.fullmatch(r"[A-Za-z0-9][\w.-]*/[\w.-]+", path)
    if not is_name or str(path).endswith(tuple(LOCAL_FILES)) or Path(str(path)).exists():
        return None
    return str(path)


def title_of(path: str) -> str:
    """A name on the hub, or the last part of a path."""
    return _hub_name(path) or Path(path).name


def _table(rows: Iterable[Sequence[object]], heads: Sequence[str] = ("",)) -> str:
    cells = [("", *heads), ("---",) * (len(heads) + 1), *rows]
    return "\n".join(
        f"| {' | '.join(str(cell).replace('|', chr(92) + '|') for cell in row)} |" for row in cells
    )


def _code(text: str | None) -> str:
    return f"`{text}`" if text else UNKNOWN


def _plain(value: object) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def _figure(value: object) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    return "–" if value is None else str(value)
