"""Results of `evaluate` in the file layout of EleutherAI's lm-evaluation-harness, for dashboards that read it.

One file per model, <folder>/<model>/results_<time>.json, with one task per benchmark. `exact_match` is the greedy
accuracy, `pass@k` is of samples. Keys of the harness that have no meaning here are left out.
"""

import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from common.files import write_text
from common.provenance import commit, versions

FILTER = "none"
"""The harness's name for answers as they were extracted, without further filters."""
UNKNOWN = "N/A"
"""The harness's text for an error that is not known."""
NORMAL_95 = 1.959964
"""The half-width of a 95 % interval in standard errors."""


class Result(BaseModel):
    """The figures of one model on one benchmark; a row of results.json."""

    model_config = ConfigDict(extra="ignore")

    model: str
    path: str
    benchmark: str
    prompts: int
    greedy_accuracy: float
    greedy_accuracy_interval_95: tuple[float, float] | None = None
    samples_per_prompt: int
    pass_at_1: float
    pass_at_1_interval_95: tuple[float, float] | None = None
    pass_at_k: dict[str, float] = Field(default_factory=dict)
    sampling: dict[str, Any] = Field(default_factory=dict)
    grader: str
    few_shot: int = 0

    def metrics(self) -> dict[str, float | str]:
        """The figures and their standard errors, by the harness's keys."""
        greedy = _standard_error(self.greedy_accuracy_interval_95)
        if greedy is None and self.prompts > 1:
            variance = self.greedy_accuracy * (1 - self.greedy_accuracy)
            greedy = math.sqrt(variance / (self.prompts - 1))
        others = {f"pass@{k}": (value, None) for k, value in self.pass_at_k.items() if k != "1"}
        found = {
            "exact_match": (self.greedy_accuracy, greedy),
            "pass@1": (self.pass_at_1, _standard_error(self.pass_at_1_interval_95)),
            **others,
        }
        return {key: value for name, pair in found.items() for key, value in _keyed(name, *pair)}

    def task(self) -> dict[str, Any]:
        """The task as the harness describes one."""
        greedy = {
            "do_sample": False,
            "temperature": 0.0,
            "max_gen_toks": self.sampling.get("max_completion_tokens"),
            "until": list(self.sampling.get("stop", [])),
        }
        names = dict.fromkeys(key.partition(",")[0].removesuffix("_stderr") for key in self.metrics())
        return {
            "task": self.benchmark,
            "output_type": "generate_until",
            "generation_kwargs": greedy,
            "num_fewshot": self.few_shot,
            "repeats": self.samples_per_prompt,
            "metric_list": [
                {"metric": name, "aggregation": "mean", "higher_is_better": True} for name in names
            ],
            "metadata": {"version": self.grader, "sampling": self.sampling},
        }


def write_results(rows: Sequence[Mapping[str, Any]], folder: Path, now: datetime) -> list[Path]:
    """Write the rows of results.json, one file per model; returns the files."""
    results = [Result.model_validate(row) for row in rows]
    files = []
    for path in dict.fromkeys(result.path for result in results):
        document = _document([result for result in results if result.path == path], now)
        file = folder / document["model_name_sanitized"] / f"results_{now:%Y-%m-%dT%H-%M-%S.%f}.json"
        write_text(file, json.dumps(document, indent=2, ensure_ascii=False) + "\n")
        files.append(file)
    return files


def _document(results: Sequence[Result], now: datetime) -> dict[str, Any]:
    """The content of a model's file."""
    path = results[0].path
    by_task = {result.benchmark: result for result in results}
    tasks = {name: result.task() for name, result in by_task.items()}
    return {
        "results": {name: {"alias": name, **result.metrics()} for name, result in by_task.items()},
        "group_subtasks": {name: [] for name in by_task},
        "configs": tasks,
        "versions": {name: result.grader for name, result in by_task.items()},
        "n-shot": {name: result.few_shot for name, result in by_task.items()},
        "higher_is_better": {
            name: {metric["metric"]: True for metric in task["metric_list"]} for name, task in tasks.items()
        },
        "n-samples": {
            name: {"original": result.prompts, "effective": result.prompts}
            for name, result in by_task.items()
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


def _keyed(name: str, value: float, error: float | None) -> Iterator[tuple[str, float | str]]:
    yield f"{name},{FILTER}", value
    yield f"{name}_stderr,{FILTER}", UNKNOWN if error is None else error


def _standard_error(interval: tuple[float, float] | None) -> float | None:
    return None if interval is None else (interval[1] - interval[0]) / 2 / NORMAL_95
