"""Grades per second on one core: this project's graders against math-verify called as its README says.

    python -m benchmarks.grading

Real labelled outputs from ../shared/data: 800 of MATH, 5,276 of GSM8K. Each measurement runs in a fresh process, pinned
to one core: cold is its first pass over the data, warm its second. Repetitions interleave the methods. The verdicts are
compared as well. math-verify reads whole completions or, as `naive, box`, only the last box.
"""

import json
import logging
import os
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.processes import alone, rotations
from benchmarks.tables import markdown, spread
from common.grading import GraderConfig, GraderPool, GradingTask, Outcome
from common.grading.graders import find_grader
from common.grading.rule_math import last_box

DATA = Path(__file__).parents[2] / "shared" / "data"
REPETITIONS = 5
METHODS = {"gsm8k": ("ours", "pool", "naive"), "math": ("ours", "pool", "naive", "naive, box")}

Pair = tuple[str, str]  # completion, reference answer


@dataclass(frozen=True, slots=True, kw_only=True)
class Measurement:
    """Verdicts in the order of the data, and the seconds of two passes."""

    verdicts: list[bool]
    cold: float
    warm: float


def pairs_of(grader: str) -> list[Pair]:
    if grader == "math":
        rows = _rows("qwen_math_cot_100/math_cot_100.jsonl")
        return [(completion, row["gt"]) for row in rows for completion in row["code"]]
    models = ("6b_finetuning", "6b_verification", "175b_finetuning", "175b_verification")
    return [
        ("#### ".join(row[model]["solution"].rsplit("A: ", 1)), row["ground_truth"].rpartition("A: ")[2])
        for row in _rows("gsm8k/example_model_solutions.jsonl")
        for model in models
    ]


def measure(grader: str, method: str) -> Measurement:
    """Runs in a process of its own."""
    os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    pairs = pairs_of(grader)
    if method == "pool":
        tasks = [GradingTask(prompt="", completion=completion, answer=answer) for completion, answer in pairs]
        with GraderPool(GraderConfig(name=grader)) as pool:
            return _timed(lambda: [grade.outcome is Outcome.CORRECT for grade in pool.grade_all(tasks)])
    judge = _judge(grader, method)
    judge(r"so \boxed{x+1}", r"\frac{1}{2}")
    return _timed(lambda: [judge(completion, answer) for completion, answer in pairs])


def _judge(grader: str, method: str) -> Callable[[str, str], bool]:
    if method == "ours":
        rule = find_grader(grader)
        rule.load()
        return lambda completion, answer: rule.grade("", completion, answer).outcome is Outcome.CORRECT
    from math_verify import parse, verify

    logging.disable(logging.CRITICAL)
    if method == "naive":
        return lambda completion, answer: bool(verify(parse(f"${answer}$"), parse(completion)))
    return lambda completion, answer: bool(
        verify(parse(f"${answer}$"), parse(rf"\boxed{{{last_box(completion) or ''}}}"))
    )


def _timed(grade_all: Callable[[], list[bool]]) -> Measurement:
    began = time.perf_counter()
    verdicts = grade_all()
    between = time.perf_counter()
    grade_all()
    return Measurement(verdicts=verdicts, cold=between - began, warm=time.perf_counter() - between)


def report(grader: str) -> None:
    pairs = pairs_of(grader)
    methods = METHODS[grader]
    measured: dict[str, list[Measurement]] = {method: [] for method in methods}
    for _, method in rotations(methods, REPETITIONS):
        measured[method].append(alone(measure, grader, method))
    print(
        f"\n{grader}: {len(pairs):,} completions, {REPETITIONS} repetitions, grades per second; median (range)\n"
    )
    rows = []
    for method in methods:
        rates = [
            [len(pairs) / getattr(each, state) for each in measured[method]] for state in ("cold", "warm")
        ]
        ratios = [
            [b.cold / a.cold for a, b in zip(measured[faster], measured[method], strict=True)]
            for faster in ("ours", "pool")
        ]
        rows.append([method, *(spread(each, 0) for each in rates), *(spread(each, 1) for each in ratios)])
    print(markdown(["method", "cold", "warm", "times as fast, cold: ours", "pool"], rows))
    print()
    reference = measured["ours"][0].verdicts
    for method in methods[1:]:
        verdicts = measured[method][0].verdicts
        print(f"  verdicts that differ, ours against {method}: {_differences(pairs, reference, verdicts)}")


def _differences(pairs: Sequence[Pair], ours: Sequence[bool], theirs: Sequence[bool]) -> str:
    different = [
        f"\n    {answer!r} for {completion[-60:]!r}: {'ours' if mine else 'theirs'} says correct"
        for (completion, answer), mine, other in zip(pairs, ours, theirs, strict=True)
        if mine != other
    ]
    shown = different[:10] + ["\n    …"] * (len(different) > 10)
    return f"{len(different)}{''.join(shown)}"


def _rows(path: str) -> list[dict[str, Any]]:
    with (DATA / path).open(encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]


def main() -> int:
    try:
        for grader in METHODS:
            report(grader)
    except FileNotFoundError as missing:
        print(
            f"{missing.filename} is not on this machine: the benchmark grades real outputs", file=sys.stderr
        )
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
