"""What takes the findings of several parts: the objectives beside each other, as in the paper's Table 1."""

import math
from collections.abc import Mapping
from typing import Any

from benchmarks.gpu.findings import Findings

OURS, BASELINE = "method-astar_po", "method-ppo"
FASTER, LEANER = 1.8, 0.3
"""The aims: an iteration of PPO takes so many times as long as A*-PO's, whose training memory is so much lower."""


def compare(found: Mapping[str, Findings]) -> Findings | None:
    """Objectives against A*-PO; None unless A*-PO and another one were measured on the same machine."""
    methods = {name: one for name, one in found.items() if name.startswith("method-") and iteration_of(one)}
    ours = methods.get(OURS)
    if ours is None or len(methods) < 2:
        return None
    same = {
        name: one
        for name, one in methods.items()
        if (one.machine["card"], one.is_tiny) == (ours.machine["card"], ours.is_tiny)
    }
    compared = Findings(
        part="methods", device=ours.device, is_tiny=ours.is_tiny, machine=ours.machine, status="finished"
    )
    base = iteration_of(ours)
    for name, one in same.items():
        figures = iteration_of(one)
        compared.row(
            "Objectives, each in a process of its own with the same engine, model and prompts",
            objective=name.removeprefix("method-"),
            iteration_s=figures["iteration"],
            over_ours=ratio(figures, base, "iteration"),
            rollouts_s=figures["rollout"],
            training_s=figures["training"],
            training_peak_GiB=figures["peak GiB"],
            peak_over_ours=ratio(figures, base, "peak GiB"),
        )
    if BASELINE in same:
        theirs = iteration_of(same[BASELINE])
        compared.at_least(
            "PPO's time an iteration over A*-PO's",
            ratio(theirs, base, "iteration"),
            FASTER,
            of_the_hardware=True,
        )
        compared.at_least(
            "A*-PO's training memory, share below PPO's",
            1 - ratio(base, theirs, "peak GiB"),
            LEANER,
            of_the_hardware=True,
        )
    return compared


def ratio(one: Mapping[str, Any], other: Mapping[str, Any], figure: str) -> float:
    """Of one iteration's figure to another's; nan where there is none, such as the memory of a GPU on a CPU."""
    return float(one[figure] / other[figure]) if other[figure] else math.nan


SUMMARY = "One iteration"
"""The title of the table of `iteration` that is compared."""


def iteration_of(findings: Findings) -> dict[str, Any]:
    """The row that `iteration` writes last; empty if it did not get there."""
    rows = findings.tables.get(SUMMARY)
    return dict(rows[-1]) if rows else {}
