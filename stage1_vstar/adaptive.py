"""Adaptive N: more samples, in rounds, of prompts with a wide interval of V*, until none is wide or the budget is used.

The rewards of each prompt's first samples alone determine which samples are drawn. A restarted run replays its rounds
from the first one and finds the samples of a killed round in the store. A prompt stops on the width of its interval,
never on a success. The samples that stop it still enter its V̂*, which biases it; benchmarks/adaptive.py measures by
how much. The aim is the same precision for every prompt, not the least error for a given budget.

Shapes: _P prompt, _W wide prompt, _S sample (all prompts' samples, one after the other).
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from common.errors import UserError
from common.value import Floats, reward_range
from stage1_vstar.uncertainty import interval

Counts = NDArray[np.int64]
Places = NDArray[np.intp]
Draw = Callable[[Places, Counts], Floats]
"""The rewards of the first sizes_W samples of the prompts at places_W, prompt after prompt."""

ADAPTIVE = "adaptive"
"""Key in the context of vstar.parquet: the rule, and the number of samples that it drew."""
Z = 1.96
"""Half the width of a 95 % interval, in standard errors."""
SMALLEST_STEP = 1 / 4
LARGEST_STEP = 1
WIDTH_DIGITS = 9
"""Widths are rounded to this many digits before they are compared, because their last bits differ between machines."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Rule:
    """A prompt has enough samples when its 95 % interval is at most as wide as that of a standard error of `target_se`.

    `budget` is the number of samples of all prompts and rounds together.
    """

    target_se: float
    budget: int

    @property
    def half_width(self) -> float:
        return Z * self.target_se

    @property
    def widest(self) -> float:
        """The largest width that does not count as wide."""
        return round(2 * self.half_width, WIDTH_DIGITS)

    def refuse_impossible(self, num_prompts: int, num_samples: int, beta1: float) -> None:
        """Raise UserError for a rule that cannot be followed."""
        if not 0 < self.widest < math.inf:
            raise UserError(
                f"--adaptive {self.target_se:g}: the target is a standard error of V̂* and must be more than 0, in "
                f"{WIDTH_DIGITS} decimal places, for example 0.05"
            )
        if num_samples < 2:
            raise UserError(
                "--adaptive with vstar.num_samples = 1: the first round must show how much a prompt's rewards differ; "
                "give it at least 2, better 8"
            )
        if beta1 == 0:
            raise UserError(
                "--adaptive with vstar.beta1 = 0: V̂* is the best reward there, and a single success would end the "
                "sampling; draw under a β1 above 0, then `rescore` to 0"
            )
        if self.budget < num_prompts * num_samples:
            raise UserError(
                f"--budget {self.budget:,}: the first round alone needs {num_prompts * num_samples:,} samples "
                f"({num_prompts:,} prompts × {num_samples}); raise the budget or lower vstar.num_samples or data.limit"
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class Round:
    """One round: the number of wide prompts before it, and the samples that it adds."""

    wide: int
    prompts: int
    samples: int
    left: int
    """The budget that is left after it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Allocation:
    """How many samples each prompt has in the end."""

    sizes_P: Counts
    rounds: Sequence[Round]
    still_wide: int

    def record(self) -> dict[str, Any]:
        """For the context of vstar.parquet."""
        return {
            "samples": int(self.sizes_P.sum()),
            "still_wide": self.still_wide,
            "rounds": [asdict(each) for each in self.rounds],
        }


def allocate(
    rule: Rule,
    num_samples: int,
    beta1: float,
    draw: Draw,
    num_prompts: int,
    announce: Callable[[int, Round], None] = lambda number, each: None,
) -> Allocation:
    """Give every prompt `num_samples` samples, then more to the wide ones, widest first, in rounds.

    Widths shrink as 1/√n, which gives the number of samples that a round adds to a prompt. It is at most the number
    that the prompt has, because the width at a small n is itself uncertain, and at least a quarter of that, so that
    there are few rounds. The last prompt that the budget reaches gets the rest of it. Among equally wide prompts the
    earlier one comes first. `announce` is called with each round before it is drawn.
    """
    everyone = np.arange(num_prompts)
    sizes_P = np.full(num_prompts, num_samples, dtype=np.int64)
    left = rule.budget - int(sizes_P.sum())
    rounds = [Round(wide=num_prompts, prompts=num_prompts, samples=int(sizes_P.sum()), left=left)]
    announce(0, rounds[0])
    limits = (0.0, 1.0)

    def widths(places_W: Places, sizes_W: Counts) -> Floats:
        nonlocal limits
        rewards_S = draw(places_W, sizes_W)
        low, high = reward_range(rewards_S)
        limits = (min(low, limits[0]), max(high, limits[1]))
        found = interval(rewards_S, sizes_W, beta1, limits=limits)
        widths_W: Floats = np.round(found.high_P - found.low_P, WIDTH_DIGITS)
        return widths_W

    widths_P = widths(everyone, sizes_P)
    while True:
        wide_W = np.flatnonzero(widths_P > rule.widest)
        wide_W = wide_W[np.argsort(-widths_P[wide_W], kind="stable")]
        if left == 0 or len(wide_W) == 0:
            return Allocation(sizes_P=sizes_P, rounds=rounds, still_wide=len(wide_W))
        steps_W = _steps(sizes_P[wide_W], widths_P[wide_W] / rule.widest)
        steps_W = np.diff(np.minimum(np.cumsum(steps_W), left), prepend=0)
        chosen_W, steps_W = wide_W[steps_W > 0], steps_W[steps_W > 0]
        drawn = int(steps_W.sum())
        left -= drawn
        rounds.append(Round(wide=len(wide_W), prompts=len(chosen_W), samples=drawn, left=left))
        announce(len(rounds) - 1, rounds[-1])
        sizes_P[chosen_W] += steps_W
        widths_P[chosen_W] = widths(chosen_W, sizes_P[chosen_W])


def _steps(sizes_W: Counts, excess_W: Floats) -> Counts:
    called_for_W = sizes_W * (excess_W**2 - 1)
    return np.ceil(np.clip(called_for_W, SMALLEST_STEP * sizes_W, LARGEST_STEP * sizes_W)).astype(np.int64)
