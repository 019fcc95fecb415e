"""Results of `evaluate` in the file layout of EleutherAI's lm-evaluation-harness, for dashboards that read it.

One file per model, <folder>/<model>/results_<time>.json, with a task for each benchmark. A task of the harness draws
in one way, so the n samples of a benchmark that also has greedy completions are a second task, `<benchmark>@n`.
`exact_match` is the greedy accuracy, `pass@k` is of samples. Standard errors follow from the 95 % intervals. Keys of
the harness that have no meaning here are left out.
"""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from common.evaluations import Figures
from common.files import write_text
from common.provenance import commit, versions

FILTER = "none"
"""The harness's name for answers as they were extracted, without further filters."""
UNKNOWN = "N/A"
"""The harness's text for an error that is not known."""
NORMAL_95 = 1.959964
"""The half-width of a 95 % interval in standard errors."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Task:
    """What the harness calls a task: completions of a benchmark's prompts, drawn in one way."""

    name: str
    figures: Figures
    shots: int
    metrics: Mapping[str, tuple[float, float | None]]
    """Each figure and its standard error, if that is known, by the harness's name."""
    samples: int
    """Per prompt; 0 for one greedy completion."""


def write_lm_eval(
    results: Sequence[Figures], folder: Path, now: datetime, shots: Mapping[str, int]
) -> list[Path]:
    """Write the figures, one file per model; `shots` are the examples in a benchmark's prompts. Returns the files."""
    files = []
    for path in dict.fromkeys(each.path for each in results):
        document = _document([each for each in results if each.path == path], now, shots)
        file = folder / document["model_name_sanitized"] / f"results_{now:%Y-%m-%dT%H-%M-%S.%f}.json"
        write_text(file, json.dumps(document, indent=2, ensure_ascii=False) + "\n")
        files.append(file)
    return files


def _document(results: Sequence[Figures], now: datetime, shots: Mapping[str, int]) -> dict[str, Any]:
    """The content of a model's file."""
    path = results[0].path
    tasks = [task for each in results for task in _tasks(each, shots.get(each.benchmark, 0))]
    return {
        "results": {task.name: {"alias": task.name, **_with_errors(task.metrics)} for task in tasks},
        "group_subtasks": {task.name: [] for task in tasks},
        "configs": {task.name: _config(task) for task in tasks},
        "versions": {task.name: task.figures.grader for task in tasks},
        "n-shot": {task.name: task.shots for task in tasks},
        "higher_is_better": {task.name: dict.fromkeys(task.metrics, True) for task in tasks},
        "n-samples": {
            task.name: {"original": task.figures.prompts, "effective": task.figures.prompts} for task in tasks
        },
        "config": {
            "model": "astar-po",
            "model_args": f"pretrained={path}",
            "batch_size": None,
            "device": None,
            "limit": None,
            "bootstrap_iters": 0,
            "gen_kwargs": None,
        },
        "git_hash": commit(),
        "date": now.timestamp(),
        "transformers_version": versions(["transformers"])["transformers"],
        "lm_eval_version": None,
        "task_hashes": {},
        "model_source": "astar-po",
        "model_name": path,
        "model_name_sanitized": re.sub(r'["<>:/|\\?*\[\]]+', "__", path),
    }


def _tasks(figures: Figures, shots: int) -> Iterator[_Task]:
    """The greedy completions of a benchmark and its samples, as far as there are."""
    name = figures.benchmark
    if figures.greedy_accuracy is not None:
        error = _error(figures.greedy_accuracy_interval_95)
        metrics = {"exact_match": (figures.greedy_accuracy, error)}
        yield _Task(name=name, figures=figures, shots=shots, metrics=metrics, samples=0)
        name = f"{name}@{figures.samples_per_prompt}"
    if figures.pass_at_1 is not None:
        error = _error(figures.pass_at_1_interval_95)
        more = {f"pass@{k}": (value, None) for k, value in figures.pass_at_k.items() if k != "1"}
        metrics = {"pass@1": (figures.pass_at_1, error), **more}
        yield _Task(
            name=name, figures=figures, shots=shots, metrics=metrics, samples=figures.samples_per_prompt
        )


def _with_errors(metrics: Mapping[str, tuple[float, float | None]]) -> dict[str, float | str]:
    found: dict[str, float | str] = {}
    for name, (value, error) in metrics.items():
        found[f"{name},{FILTER}"] = value
        found[f"{name}_stderr,{FILTER}"] = UNKNOWN if error is None else error
    return found


def _config(task: _Task) -> dict[str, Any]:
    """A task as the harness describes it."""
    sampling = task.figures.sampling
    drawn = {"temperature": sampling.get("temperature"), "top_p": sampling.get("top_p")}
    return {
        "task": task.name,
        "output_type": "generate_until",
        "generation_kwargs": {
            "do_sample": bool(task.samples),
            **(drawn if task.samples else {"temperature": 0.0}),
            "max_gen_toks": sampling.get("max_completion_tokens"),
            "until": sampling.get("stop", []),
        },
        "num_fewshot": task.shots,
        "repeats": max(task.samples, 1),
        "metric_list": [
            {"metric": name, "aggregation": "mean", "higher_is_better": True} for name in task.metrics
        ],
        "metadata": {"version": task.figures.grader},
    }


def _error(interval: tuple[float, float] | None) -> float | None:
    """The standard error, from a 95 % interval."""
    return None if interval is None else (interval[1] - interval[0]) / 2 / NORMAL_95
