"""Results in lm-evaluation-harness's layout, read as its own code reads them (lm_eval/utils.py, make_table; zeno)."""

import json
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from common.evaluations import Figures
from common.report.lm_eval import write_lm_eval

NOW = datetime(2026, 1, 2, 3, 4, 5, 678901, tzinfo=UTC)


def figures(**values: Any) -> Figures:
    return Figures.model_validate(
        {
            "model": "trained",
            "path": "artifacts/mine/model",
            "benchmark": "held_out",
            "greedy_accuracy": 0.25,
            "greedy_accuracy_interval_95": [0.2, 0.3],
            "samples_per_prompt": 4,
            "pass_at_1": 0.5,
            "pass_at_1_interval_95": [0.4, 0.6],
            "pass_at_k": {"1": 0.5, "2": 0.625, "4": 0.75},
            "reward_mean": 0.5,
            "prompts": 101,
            "sampling": {"temperature": 1.0, "max_completion_tokens": 512, "stop": ["\n"]},
            "grader": "math/3",
            "outcomes": {"correct": 202},
            "completion_tokens_mean": 20.0,
            "truncated": 0.0,
            **values,
        }
    )


def table_of(document: dict[str, Any]) -> list[tuple[str, str, str, str, float, str]]:
    """Task, version, filter, metric, value and error of each figure, found as the harness's table finds them."""
    lines = []
    for task, figures in document["results"].items():
        version, shots = document["versions"][task], document["n-shot"][task]
        assert isinstance(shots, int)
        alias = figures.pop("alias")
        for key, value in sorted(figures.items()):
            metric, _, kind = key.partition(",")
            if metric.endswith("_stderr"):
                continue
            error = figures[f"{metric}_stderr,{kind}"]
            lines.append((alias, version, kind, metric, value, error if error == "N/A" else f"{error:.4f}"))
    return lines


def test_each_model_has_a_file_of_its_own_with_its_benchmarks_as_tasks(tmp_path: Path) -> None:
    rows = [
        figures(),
        figures(benchmark="math500", prompts=500),
        figures(model="reference", path="Qwen/Qwen2.5-1.5B"),
    ]
    ours, reference = write_lm_eval(rows, tmp_path, NOW, {"held_out": 3})
    assert reference == tmp_path / "Qwen__Qwen2.5-1.5B" / "results_2026-01-02T03-04-05.678901.json"
    # The harness finds files and their time by name: "/results_", and what follows the last underscore.
    assert "/results_" in str(ours)
    document = json.loads(ours.read_text(encoding="utf-8"))
    assert document["model_name"] == "artifacts/mine/model"
    assert document["config"]["model_args"] == "pretrained=artifacts/mine/model"
    assert document["date"] == NOW.timestamp()
    tasks = {"held_out", "held_out@4", "math500", "math500@4"}
    for key in ("results", "configs", "versions", "n-shot", "higher_is_better", "n-samples"):
        assert document[key].keys() == tasks, key
    assert document["n-samples"]["math500@4"] == {"original": 500, "effective": 500}
    assert document["n-shot"] == {"held_out": 3, "held_out@4": 3, "math500": 0, "math500@4": 0}
    greedy, sampled = (document["configs"][task] for task in ("held_out", "held_out@4"))
    drawn = {"max_gen_toks": 512, "until": ["\n"]}
    assert greedy["generation_kwargs"] == {"do_sample": False, "temperature": 0.0, **drawn}
    assert sampled["generation_kwargs"] == {"do_sample": True, "temperature": 1.0, "top_p": None, **drawn}
    assert (greedy["repeats"], sampled["repeats"]) == (1, 4)
    metrics = [[metric["metric"] for metric in config["metric_list"]] for config in (greedy, sampled)]
    assert metrics == [["exact_match"], ["pass@1", "pass@2", "pass@4"]]
    for config in (greedy, sampled):
        assert config["output_type"] == "generate_until"
        assert all(metric["aggregation"] == "mean" for metric in config["metric_list"])
    assert document["higher_is_better"]["held_out"]["exact_match"] is True
    assert table_of(document)[:4] == [
        ("held_out", "math/3", "none", "exact_match", 0.25, f"{0.05 / 1.959964:.4f}"),
        ("held_out@4", "math/3", "none", "pass@1", 0.5, f"{0.1 / 1.959964:.4f}"),
        ("held_out@4", "math/3", "none", "pass@2", 0.625, "N/A"),
        ("held_out@4", "math/3", "none", "pass@4", 0.75, "N/A"),
    ]


def test_a_benchmark_without_samples_has_no_figures_of_samples(tmp_path: Path) -> None:
    greedy = figures(samples_per_prompt=0, pass_at_1=None, pass_at_1_interval_95=None, pass_at_k={})
    (file,) = write_lm_eval([greedy], tmp_path, NOW, {})
    document = json.loads(file.read_text(encoding="utf-8"))
    assert document["results"]["held_out"].keys() == {"alias", "exact_match,none", "exact_match_stderr,none"}
    assert document["configs"]["held_out"]["generation_kwargs"]["do_sample"] is False


def test_a_benchmark_that_is_sampled_only_keeps_its_name(tmp_path: Path) -> None:
    sampled = figures(greedy_accuracy=None, greedy_accuracy_interval_95=None)
    (file,) = write_lm_eval([sampled], tmp_path, NOW, {})
    document = json.loads(file.read_text(encoding="utf-8"))
    assert document["configs"].keys() == {"held_out"}
    assert document["configs"]["held_out"]["repeats"] == 4
    assert "exact_match,none" not in document["results"]["held_out"]
