"""The results of `evaluate`: one row per prompt as Parquet, figures per model and benchmark as JSON and Markdown."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import polars as pl
import pyarrow as pa
from pydantic import BaseModel

from common.config import HELD_OUT
from common.contract import Contract, Unique
from common.documents import read_document
from common.files import write_text
from common.grading import OUTCOMES
from common.provenance import Provenance
from common.remote.copies import modified
from common.runs import RunPaths

EVALUATE_COMMAND = "python cli.py evaluate"
REFERENCE, TRAINED = "reference", "trained"
"""The names by which `evaluate` knows the models of a run."""

PROMPTS = Contract(
    schema=pa.schema(
        [
            pa.field("model", pa.string(), nullable=False),
            pa.field("benchmark", pa.string(), nullable=False),
            pa.field("prompt_id", pa.string(), nullable=False),
            pa.field("prompt", pa.string(), nullable=False),
            pa.field("answer", pa.string(), nullable=False),
            pa.field("greedy_outcome", pa.string()),
            pa.field("greedy_reward", pa.float64()),
            pa.field("greedy_tokens", pa.int32()),
            pa.field("outcomes", pa.list_(pa.field("item", pa.string(), nullable=False)), nullable=False),
            pa.field("rewards", pa.list_(pa.field("item", pa.float64(), nullable=False)), nullable=False),
            pa.field(
                "completion_tokens", pa.list_(pa.field("item", pa.int32(), nullable=False)), nullable=False
            ),
            pa.field("log_ratio", pa.float64()),
        ]
    ),
    invariants={
        "a prompt appears once per model and benchmark": Unique(["model", "benchmark", "prompt_id"]),
        "outcomes are known": pl.col("outcomes").list.eval(pl.element().is_in(OUTCOMES)).list.all(),
        "greedy outcomes are known": pl.col("greedy_outcome").is_null()
        | pl.col("greedy_outcome").is_in(OUTCOMES),
        "there is a reward for each outcome": pl.col("outcomes").list.len() == pl.col("rewards").list.len(),
    },
    version=1,
    migrations={},
    remedy=EVALUATE_COMMAND,
)
"""results.parquet. `log_ratio` is ln π/π_ref of a completion drawn as in training, the mean over a prompt's."""


class Figures(BaseModel):
    """A model's figures on a benchmark; None for completions that were not drawn."""

    model: str
    path: str
    benchmark: str
    grader: str
    prompts: int
    greedy_accuracy: float | None = None
    greedy_accuracy_interval_95: tuple[float, float] | None = None
    samples_per_prompt: int = 0
    pass_at_1: float | None = None
    """Mean accuracy of the sampled completions: avg@k with k = samples_per_prompt."""
    pass_at_1_interval_95: tuple[float, float] | None = None
    pass_at_k: dict[str, float] = {}
    reward_mean: float
    completion_tokens_mean: float
    truncated: float
    outcomes: dict[str, int]
    kl_sequence: float | None = None
    kl_sequence_se: float | None = None
    kl_token: float | None = None
    sampling: dict[str, object]

    @property
    def accuracy(self) -> float:
        """The benchmark's headline figure: sampled accuracy if there are samples, greedy accuracy otherwise."""
        found = self.pass_at_1 if self.pass_at_1 is not None else self.greedy_accuracy
        assert found is not None, "something is drawn"
        return found

    @property
    def interval(self) -> tuple[float, float]:
        """That of `accuracy`."""
        found = self.pass_at_1_interval_95 or self.greedy_accuracy_interval_95
        assert found is not None, "something is drawn"
        return found


class Comparison(BaseModel):
    """Two models on the prompts of a benchmark that both answered: accuracy of `second` minus that of `first`."""

    benchmark: str
    first: str
    second: str
    prompts: int
    difference: float
    interval_95: tuple[float, float]
    p_value: float


class Results(BaseModel):
    """results.json."""

    results: list[Figures]
    comparisons: list[Comparison] = []


def read_results(paths: RunPaths) -> Results | None:
    """The results of a run; None if it has none. Raises UserError for a damaged file."""
    if not paths.results("json").exists():
        return None
    return read_document(
        paths.results("json"), Results, f"remove it, or make it again with `{EVALUATE_COMMAND}`"
    )


def is_evaluated(paths: RunPaths, model: Path) -> bool:
    """Whether the results are not older than a model, and so not those of another in its place."""
    try:
        return modified(paths.results("json")) >= modified(model / RunPaths.TRAINED_WITH)
    except OSError:
        return False


def write_results(paths: RunPaths, results: Results, rows: pl.DataFrame, provenance: Provenance) -> None:
    """Write results.parquet, results.json and results.md."""
    PROMPTS.write(rows, provenance, paths.results("parquet"))
    document = results.model_dump(mode="json", exclude_none=True)
    write_text(paths.results("json"), json.dumps(document, indent=2, ensure_ascii=False) + "\n")
    write_text(paths.results("md"), markdown(results))


def markdown(results: Results) -> str:
    """A table with one row per model and one column per benchmark, and one of the comparisons.

    KL is of one benchmark: of held-out prompts if it was measured on them.
    """
    benchmarks = list(dict.fromkeys(each.benchmark for each in results.results))
    models = list(dict.fromkeys(each.model for each in results.results))
    cells = {(each.model, each.benchmark): _cell(each) for each in results.results}
    with_kl = {each.benchmark for each in results.results if each.kl_sequence is not None}
    ranked = sorted(benchmarks, key=HELD_OUT.__ne__)
    kl_on = next((name for name in ranked if name in with_kl), None)
    kl = {
        each.model: each.kl_sequence
        for each in results.results
        if each.benchmark == kl_on and each.kl_sequence is not None
    }
    lines = _table(
        ["model", *benchmarks, f"KL, nats per completion{f', {kl_on}' if kl_on else ''}"],
        [
            [
                model,
                *(cells.get((model, benchmark), "–") for benchmark in benchmarks),
                f"{kl[model]:.3f}" if model in kl else "–",
            ]
            for model in models
        ],
    )
    if results.comparisons:
        lines += [
            "",
            *_table(
                ["benchmark", "models", "prompts", "difference (95 % interval)", "p"],
                [
                    [
                        each.benchmark,
                        f"{each.second} − {each.first}",
                        f"{each.prompts:,}",
                        f"{each.difference:+.3f} ({each.interval_95[0]:+.3f} to {each.interval_95[1]:+.3f})",
                        f"{each.p_value:.4f}",
                    ]
                    for each in results.comparisons
                ],
            ),
        ]
    return "\n".join(lines) + "\n"


def _cell(figures: Figures) -> str:
    """Accuracy with its interval, and what it is of."""
    kind = f"avg@{figures.samples_per_prompt}" if figures.samples_per_prompt else "greedy"
    low, high = figures.interval
    return f"{figures.accuracy:.3f} ({low:.3f}–{high:.3f}), {kind}"


def _table(head: Sequence[str], rows: Sequence[Sequence[Any]]) -> list[str]:
    return [f"| {' | '.join(map(str, row))} |" for row in (head, ["---"] * len(head), *rows)]
