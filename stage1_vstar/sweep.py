"""Which N and which β1: the result of each choice, from the rewards of one run with many samples.

A run with N samples is a subset of the larger run, drawn without replacement from each prompt's samples. Over such
subsets this module computes V̂*, its bias and spread, the prompts that the filter drops, and the loss that stage 2
starts from. For rewards of 0 and 1 only the number of correct samples in a subset matters: all subsets are weighted
exactly (by the hypergeometric distribution), and prompts with the same counts are computed together. Other rewards
take random subsets of each prompt: SUBSETS, or fewer if there are many prompts. V̂* is the paper's plug-in.
sweep_view.py prints and draws the results.

Shapes: _U unit (one prompt, or prompts with the same counts), _O its possible subsets, _N samples of a subset,
_M all samples of a prompt, _H bins.
"""

import json
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from functools import cache

import numpy as np
import polars as pl
from numpy.typing import NDArray

from common.errors import UserError
from common.grading import Outcome
from common.value import Floats, estimate_vstar

BETAS = (math.inf, 2.0, 1.0, 0.5, 0.25, 0.125, 0.0)

SUBSETS = 100
"""Number of random subsets of each prompt, if rewards are not 0 or 1."""

MOST_SUBSETS = 2_000_000
"""Number of random subsets of all prompts, above which each prompt has fewer than SUBSETS, but at least two."""

SEED = 0

QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)

BINS = 40

_FINE = 100
"""Parts of a bin, for the quantiles."""

_CHUNK = 2**22
"""Numbers in an array of subsets."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MeanAndSd:
    """A mean over prompts, and its standard deviation over subsets."""

    mean: float
    sd: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Loss:
    """The loss that stage 2 starts from; the mean is None if V̂* was made of all samples, so that none is left."""

    mean: float | None
    sd: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Column:
    """The figures that depend on N only."""

    num_samples: int
    left_out: int
    dropped: MeanAndSd
    dropped_solvable: MeanAndSd
    time_saved: MeanAndSd


@dataclass(frozen=True, slots=True, kw_only=True)
class Cell:
    """The figures that depend on N and β1."""

    beta1: float
    num_samples: int
    vstar: MeanAndSd
    spread: float
    quantiles: dict[str, float]
    histogram: list[float]
    bias: float
    prompt_sd: float
    rmse: float
    loss: Loss


@dataclass(frozen=True, slots=True, kw_only=True)
class Sweep:
    """Every figure of a sweep."""

    prompts: int
    max_num_samples: int
    by_num_samples: list[Column]
    histogram_edges: list[float]
    cells: list[Cell]

    @property
    def betas(self) -> list[float]:
        """From large to small."""
        return list(dict.fromkeys(cell.beta1 for cell in self.cells))

    @property
    def sizes(self) -> list[int]:
        """From small to large."""
        return [column.num_samples for column in self.by_num_samples]

    def column(self, num_samples: int) -> Column:
        (found,) = (column for column in self.by_num_samples if column.num_samples == num_samples)
        return found

    def cell(self, beta1: float, num_samples: int) -> Cell:
        (found,) = (cell for cell in self.cells if (cell.beta1, cell.num_samples) == (beta1, num_samples))
        return found


@dataclass(frozen=True, slots=True, kw_only=True)
class SweepFile:
    """sweep.json: the figures, the artifact, and the digests of its samples and of the drawings."""

    path: str
    samples: str
    drawings: dict[str, str]
    figures: Sweep

    def to_json(self) -> str:
        """The document, one level flat. JSON has no infinity: an infinite β1 becomes the text "inf"."""
        document = asdict(self)
        document |= document.pop("figures")
        for cell in document["cells"]:
            cell["beta1"] = cell["beta1"] if math.isfinite(cell["beta1"]) else "inf"
        return json.dumps(document, indent=1, ensure_ascii=False, allow_nan=False)


def parse_betas(lists: Sequence[str]) -> tuple[float, ...]:
    """β1 from the largest to the smallest, each once. Raises UserError for anything that is not in [0, inf]."""
    betas = set(BETAS if not lists else ())
    for text in _items(lists):
        try:
            betas.add(float(text))
        except ValueError:
            betas.add(math.nan)
        if not all(beta >= 0 for beta in betas):
            raise UserError(
                f"--beta1 {text}: β1 is a number from 0 (best reward) to inf (mean), such as inf,1,0.5,0"
            )
    return tuple(sorted(betas, reverse=True))


def parse_sizes(lists: Sequence[str], available: Sequence[int]) -> tuple[int, ...]:
    """N from the smallest to the largest. Raises UserError for one below 1 or above the most that is `available`."""
    most = max(available)
    if not lists:
        return tuple(sorted({most, *(2**power for power in range(most.bit_length()))}))
    sizes = set()
    for text in _items(lists):
        if not text.isdecimal() or not 1 <= int(text) <= most:
            raise UserError(
                f"--num-samples {text}: this artifact has at most {most} samples per prompt, so N is a whole number "
                f"from 1 to {most}; `vstar --set vstar.num_samples=…` draws more"
            )
        sizes.add(int(text))
    return tuple(sorted(sizes))


def _items(lists: Sequence[str]) -> Iterator[str]:
    return (item.strip() for text in lists for item in text.split(","))


@dataclass(frozen=True, slots=True, kw_only=True)
class Subsets:
    """The subsets of N samples that each unit's prompts can have, with their statistics.

    `rest_*` are the mean reward and the mean squared reward of the samples outside the subset. V̂* does not depend on
    these, so they count as fresh draws; nan if no sample is outside.
    """

    probability_UO: Floats
    spread: float
    """The factor from the variance over these subsets to that over all possible ones: above 1 if they are a sample."""
    unsolved_UO: Floats
    rest_mean_UO: Floats
    rest_square_UO: Floats
    vstar: Callable[[float], Floats]
    """V̂*_UO under a β1."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Counted:
    """Prompts with 0/1 rewards and the same number of samples; a unit is those with the same number correct."""

    size: int
    prompts_U: Floats
    tokens_U: Floats
    solved_U: Floats
    correct_U: NDArray[np.int64]

    def subsets(self, num_samples: int) -> Subsets:
        """Subset O holds O correct samples; there are num_samples + 1 kinds of subsets."""
        from scipy.stats import hypergeom

        correct_U1, correct_O = self.correct_U[:, None], np.arange(num_samples + 1)
        rest = self.size - num_samples
        probability_UO = hypergeom.pmf(correct_O, self.size, correct_U1, num_samples)
        samples_ON = (np.arange(num_samples) < correct_O[:, None]).astype(np.float64)
        rest_mean_UO = (correct_U1 - correct_O) / rest if rest else np.full(probability_UO.shape, np.nan)

        def vstar(beta1: float) -> Floats:
            return np.broadcast_to(_vstar(samples_ON, beta1), probability_UO.shape)

        return Subsets(
            probability_UO=probability_UO / probability_UO.sum(axis=1, keepdims=True),
            spread=1.0,
            unsolved_UO=np.broadcast_to(1.0 * (correct_O == 0), probability_UO.shape),
            rest_mean_UO=rest_mean_UO,
            rest_square_UO=rest_mean_UO,
            vstar=vstar,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Listed:
    """Prompts with any rewards and the same number of samples; a unit is a prompt."""

    size: int
    prompts_U: Floats
    tokens_U: Floats
    solved_U: Floats
    rewards_UM: Floats
    correct_UM: Floats
    order_UOM: NDArray[np.int64]
    """Random orders of the samples: the first N of one are a subset of N."""

    def subsets(self, num_samples: int) -> Subsets:
        """As many random subsets as there are orders; only one if N is all samples."""
        whole = num_samples == self.size
        order_UOM = np.arange(self.size)[None, None, :] if whole else self.order_UOM
        rewards_UOM = np.take_along_axis(self.rewards_UM[:, None, :], order_UOM, axis=2)
        correct_UOM = np.take_along_axis(self.correct_UM[:, None, :], order_UOM, axis=2)
        samples_UON, rest_UOR = np.split(rewards_UOM, [num_samples], axis=2)
        shape = samples_UON.shape[:2]
        return Subsets(
            probability_UO=np.full(shape, 1 / shape[1]),
            spread=1.0 if whole else shape[1] / (shape[1] - 1),
            unsolved_UO=1.0 - correct_UOM[:, :, :num_samples].max(axis=2),
            rest_mean_UO=np.full(shape, np.nan) if whole else rest_UOR.mean(axis=2),
            rest_square_UO=np.full(shape, np.nan) if whole else (rest_UOR**2).mean(axis=2),
            vstar=cache(lambda beta1: _vstar(samples_UON, beta1)),
        )


def _vstar(samples_N: Floats, beta1: float) -> Floats:
    """V̂* over the last axis."""
    shape = samples_N.shape[:-1]
    counts = np.full(math.prod(shape), samples_N.shape[-1])
    return estimate_vstar(samples_N.ravel(), counts, beta1).vstar_P.reshape(shape)


def units(rows: pl.DataFrame) -> Iterator[Counted | Listed]:
    """The prompts of an artifact in blocks of equal numbers of samples."""
    correct = pl.col("outcomes").list.eval((pl.element() == Outcome.CORRECT.value).cast(pl.Float64))
    rows = rows.select(
        "num_samples",
        "rewards",
        correct.alias("correct"),
        pl.col("completion_tokens").list.mean().alias("tokens"),
    )
    binary = bool((rows["rewards"].explode() == rows["correct"].explode()).all())
    random = np.random.default_rng(SEED)
    subsets = max(2, min(SUBSETS, MOST_SUBSETS // rows.height))
    for (size,), group in rows.sort("num_samples", maintain_order=True).group_by(
        "num_samples", maintain_order=True
    ):
        assert isinstance(size, int)
        if binary:
            cells = (
                group.group_by(pl.col("correct").list.sum().cast(pl.Int64))
                .agg(pl.len().cast(pl.Float64).alias("prompts"), pl.col("tokens").mean())
                .sort("correct")
            )
            yield Counted(
                size=size,
                prompts_U=cells["prompts"].to_numpy(),
                tokens_U=cells["tokens"].to_numpy(),
                solved_U=(cells["correct"] > 0).cast(pl.Float64).to_numpy(),
                correct_U=cells["correct"].to_numpy(),
            )
            continue
        for part in group.iter_slices(max(1, _CHUNK // (subsets * size))):
            shape = (part.height, size)
            correct_UM = part["correct"].explode().to_numpy().reshape(shape)
            yield Listed(
                size=size,
                prompts_U=np.ones(part.height),
                tokens_U=part["tokens"].to_numpy(),
                solved_U=correct_UM.max(axis=1),
                rewards_UM=part["rewards"].explode().to_numpy().reshape(shape),
                correct_UM=correct_UM,
                order_UOM=random.random((part.height, subsets, size)).argsort(axis=2),
            )


@dataclass(slots=True)
class Mean:
    """A figure's mean over prompts, and its standard deviations over the subsets."""

    weight: float = 0.0
    total: float = 0.0
    variance: float = 0.0

    def add(
        self, values_UO: Floats, subsets: Subsets, prompts_U: Floats, weight_U: Floats | float = 1.0
    ) -> None:
        """Add the prompts of some units, each weighing `weight_U`."""
        mean_U = (values_UO * subsets.probability_UO).sum(axis=1)
        squares_U = ((values_UO - mean_U[:, None]) ** 2 * subsets.probability_UO).sum(axis=1)
        variance_U = squares_U * subsets.spread
        self.weight += float((prompts_U * weight_U).sum())
        self.total += float((prompts_U * weight_U * mean_U).sum())
        self.variance += float((prompts_U * np.square(weight_U) * variance_U).sum())

    @property
    def mean(self) -> float:
        return self.total / self.weight

    @property
    def sd(self) -> float:
        """The standard deviation of the mean over prompts."""
        return math.sqrt(self.variance) / self.weight

    @property
    def prompt_sd(self) -> float:
        """The standard deviation of one prompt's figure, root mean square over prompts of equal weight."""
        return math.sqrt(self.variance / self.weight)

    def result(self) -> MeanAndSd:
        return MeanAndSd(mean=self.mean, sd=self.sd)


@dataclass(slots=True)
class ColumnSums:
    """Accumulates a column."""

    dropped: Mean = field(default_factory=Mean)
    dropped_solvable: Mean = field(default_factory=Mean)
    saved: Mean = field(default_factory=Mean)

    def add(self, unit: Counted | Listed, subsets: Subsets) -> None:
        by = (subsets, unit.prompts_U)
        self.dropped.add(subsets.unsolved_UO, *by)
        self.dropped_solvable.add(subsets.unsolved_UO * unit.solved_U[:, None], *by)
        self.saved.add(subsets.unsolved_UO, *by, unit.tokens_U)

    def result(self, num_samples: int, prompts: int) -> Column:
        return Column(
            num_samples=num_samples,
            left_out=prompts - round(self.dropped.weight),
            dropped=self.dropped.result(),
            dropped_solvable=self.dropped_solvable.result(),
            time_saved=self.saved.result(),
        )


@dataclass(slots=True)
class CellSums:
    """Accumulates a cell. The distribution is over prompts and subsets."""

    lowest: float
    highest: float
    vstar: Mean = field(default_factory=Mean)
    vstar_squared: Mean = field(default_factory=Mean)
    error: Mean = field(default_factory=Mean)
    squared_error: Mean = field(default_factory=Mean)
    loss: Mean = field(default_factory=Mean)
    loss_spread: Mean = field(default_factory=Mean)
    mass_H: Floats = field(default_factory=lambda: np.zeros(BINS * _FINE))
    sum_H: Floats = field(default_factory=lambda: np.zeros(BINS * _FINE))

    def add(
        self, unit: Counted | Listed, subsets: Subsets, beta1: float, *, full_U: Floats, reward_U: Floats
    ) -> None:
        """`full_U` is V̂* of all samples, `reward_U` their mean reward."""
        vstar_UO = subsets.vstar(beta1)
        error_UO = vstar_UO - full_U[:, None]
        by = (subsets, unit.prompts_U)
        self.vstar.add(vstar_UO, *by)
        self.vstar_squared.add((vstar_UO - self.lowest) ** 2, *by)
        self.error.add(error_UO, *by)
        self.squared_error.add(error_UO**2, *by)
        # How far V̂* moves the loss E r² − 2 V̂* E r + V̂*²; `loss` itself also moves with the few samples left over.
        self.loss_spread.add(vstar_UO**2 - 2 * vstar_UO * reward_U[:, None], *by)
        place_UO = (vstar_UO - self.lowest) / ((self.highest - self.lowest) or 1.0) * len(self.mass_H)
        bin_UO = np.clip(place_UO.astype(np.int64), 0, len(self.mass_H) - 1)
        mass_UO = subsets.probability_UO * unit.prompts_U[:, None]
        self.mass_H += np.bincount(bin_UO.ravel(), mass_UO.ravel(), len(self.mass_H))
        self.sum_H += np.bincount(bin_UO.ravel(), (mass_UO * vstar_UO).ravel(), len(self.mass_H))

    def add_loss(self, unit: Counted | Listed, subsets: Subsets, beta1: float) -> None:
        """E (r − V̂*)² with r from outside the subset: V̂* was not made of it, as in training."""
        vstar_UO = subsets.vstar(beta1)
        loss_UO = subsets.rest_square_UO - 2 * vstar_UO * subsets.rest_mean_UO + vstar_UO**2
        self.loss.add(loss_UO, subsets, unit.prompts_U)

    def quantile(self, share: float) -> float:
        """The mean of V̂* in the narrow bin where this share of the mass is reached; exact if V̂* has few values."""
        reached_H = np.cumsum(self.mass_H)
        place = int(np.searchsorted(reached_H, share * reached_H[-1]))
        return float(self.sum_H[place] / self.mass_H[place])

    def result(self, beta1: float, num_samples: int) -> Cell:
        variance = self.vstar_squared.mean - (self.vstar.mean - self.lowest) ** 2
        return Cell(
            beta1=beta1,
            num_samples=num_samples,
            vstar=self.vstar.result(),
            spread=math.sqrt(max(0.0, variance)),
            quantiles={f"{share:g}": self.quantile(share) for share in QUANTILES},
            histogram=(self.mass_H.reshape(BINS, _FINE).sum(axis=1) / self.mass_H.sum()).tolist(),
            bias=self.error.mean,
            prompt_sd=self.error.prompt_sd,
            rmse=math.sqrt(self.squared_error.mean),
            loss=Loss(mean=self.loss.mean if self.loss.weight else None, sd=self.loss_spread.sd),
        )


def sweep(rows: pl.DataFrame, betas: Sequence[float], sizes: Sequence[int]) -> Sweep:
    """Every figure of the sweep, for the rows of an artifact.

    Bias and errors are against V̂* of all the prompt's samples, itself an estimate. A prompt with fewer than N samples
    is left out of that N. If N is the number of a prompt's samples, V̂* uses all of them and none is left for the loss:
    the loss is then that of N − 1.
    """
    rewards = rows["rewards"].explode().to_numpy()
    lowest, highest = float(rewards.min()), float(rewards.max())
    columns = {size: ColumnSums() for size in sizes}
    cells = {(beta, size): CellSums(lowest, highest) for beta in betas for size in sizes}
    for unit in units(rows):
        whole = unit.subsets(unit.size)
        full_U = {beta: (whole.vstar(beta) * whole.probability_UO).sum(axis=1) for beta in {*betas, math.inf}}
        for size in (size for size in sizes if size <= unit.size):
            subsets = unit.subsets(size)
            outside = subsets if size < unit.size else unit.subsets(size - 1) if size > 1 else None
            columns[size].add(unit, subsets)
            for beta in betas:
                cells[beta, size].add(unit, subsets, beta, full_U=full_U[beta], reward_U=full_U[math.inf])
                if outside:
                    cells[beta, size].add_loss(unit, outside, beta)
    return Sweep(
        prompts=rows.height,
        max_num_samples=max(rows["num_samples"]),
        by_num_samples=[column.result(size, rows.height) for size, column in columns.items()],
        histogram_edges=np.linspace(lowest, highest, BINS + 1).tolist(),
        cells=[cell.result(beta, size) for (beta, size), cell in cells.items()],
    )
