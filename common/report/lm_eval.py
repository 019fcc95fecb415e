"""Results of `evaluate` in the file layout of EleutherAI's lm-evaluation-harness, for dashboards that read it.

One file per model, <folder>/<model>/results_<time>.json, with one task per benchmark. `exact_match` is the greedy
accuracy, `pass@k` is of samples. Standard errors follow from the 95 % intervals. Keys of the harness that have no
meaning here are left out.
"""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
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
    by_task = {each.benchmark: each for each in results}
    metrics = {name: dict(_metrics(each)) for name, each in by_task.items()}
    return {
        "results": {name: {"alias": name, **_with_errors(found)} for name, found in metrics.items()},
        "group_subtasks": {name: [] for name in by_task},
        "configs": {
            name: _task(each, list(metrics[name]), shots.get(name, 0)) for name, each in by_task.items()
        },
        "versions": {name: each.grader for name, each in by_task.items()},
        "n-shot": {name: shots.get(name, 0) for name in by_task},
        "higher_is_better": {name: dict.fromkeys(found, True) for name, found in metrics.items()},
        "n-samples": {
            name: {"original": each.prompts, "effective": each.prompts} for name, each in by_task.items()
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


def _metrics(figures: Figures) -> Iterator[tuple[str, tuple[float, float | None]]]:
    """Each figure and its standard error, if that is known, by the harness's name."""
    if figures.greedy_accuracy is not None:
        yield "exact_match", (figures.greedy_accuracy, _error(figures.greedy_accuracy_interval_95))
    if figures.pass_at_1 is not None:
        yield "pass@1", (figures.pass_at_1, _error(figures.pass_at_1_interval_95))
        yield from ((f"pass@{k}", (value, None)) for k, value in figures.pass_at_k.items() if k != "1")


def _with_errors(metrics: Mapping[str, tuple[float, float | None]]) -> dict[str, float | str]:
    found: dict[str, float | str] = {}
    for name, (value, error) in metrics.items():
        found[f"{name},{FILTER}"] = value
        found[f"{name}_stderr,{FILTER}"] = UNKNOWN if error is None else error
    return found


def _task(figures: Figures, metrics: Sequence[str], shots: int) -> dict[str, Any]:
    """A benchmark as the harness describes a task."""
    sampling = figures.sampling
    return {
        "task": figures.benchmark,
        "output_type": "generate_until",
        "generation_kwargs": {
            "do_sample": bool(figures.samples_per_prompt),
            "temperature": sampling.get("temperature"),
            "top_p": sampling.get("top_p"),
            "max_gen_toks": sampling.get("max_completion_tokens"),
            "until": sampling.get("stop", []),
        },
        "num_fewshot": shots,
        "repeats": max(figures.samples_per_prompt, 1),
        "metric_list": [
            {"metric": name, "aggregation": "mean", "higher_is_better": True} for name in metrics
        ],
        "metadata": {"version": figures.grader},
    }


def _error(interval: tuple[float, float] | None) -> float | None:
    """The standard error, from a 95 % interval."""
    return None if interval is None else (interval[1] - interval[0]) / 2 / NORMAL_95
