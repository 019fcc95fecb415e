"""Describe an artifact, its contents and its origin: for the terminal, and as JSON."""

import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from common.doubts import doubts
from common.model.reading import describe_model
from common.provenance import ACCEPTED
from common.remote.places import shown
from common.terminal.console import Terminal
from common.value import estimate_vstar
from common.vstar_file import estimator_of, read_vstar
from stage1_vstar.beta_binomial import dropped_share, fit_prior
from stage1_vstar.table import success_groups
from stage1_vstar.uncertainty import approximate_bias, interval, plugin_bias

BINS = 10


@dataclass(frozen=True, slots=True, kw_only=True)
class Extent:
    """The least and the greatest of some numbers."""

    min: int
    max: int


@dataclass(frozen=True, slots=True, kw_only=True)
class VstarFigures:
    """V̂* over the prompts."""

    mean: float
    min: float
    max: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Description:
    """The figures of an artifact, in the order of its JSON; means are over prompts, that of tokens over samples."""

    path: str
    prompts: int
    kept: int
    samples: int
    num_samples: Extent
    dropped_by: dict[str, int]
    beta1: float
    estimator: str
    pass_rate: float
    pass_at_n: float
    vstar: VstarFigures
    mean_vstar_se: float | None
    mean_interval_width: float
    mean_bias: float | None
    solvable_dropped: float | None
    mean_completion_tokens: float
    outcomes: dict[str, int]
    pass_rate_histogram: list[int]
    doubts: list[str]
    identity: dict[str, Any]
    context: dict[str, Any]


def describe(path: Path) -> Description:
    """The figures that `show` prints. Raises UserError if the file breaks the contract."""
    rows, provenance = read_vstar(path)
    pass_rate, pass_at_n, vstar_se, beta1 = rows.select(
        pl.col("pass_rate", "pass_at_n", "vstar_se").mean(), pl.col("beta1").first()
    ).row(0)
    vstar, sizes = pl.col("vstar"), pl.col("num_samples")
    mean, least, greatest = rows.select(vstar.mean(), vstar.min().alias("min"), vstar.max().alias("max")).row(
        0
    )
    few, many, samples = rows.select(sizes.min(), sizes.max().alias("max"), sizes.sum().alias("sum")).row(0)
    width, bias, solvable_dropped = _uncertainty(rows)
    return Description(
        path=shown(str(path)),
        prompts=rows.height,
        kept=int(rows["keep"].sum()),
        samples=samples,
        num_samples=Extent(min=few, max=many),
        dropped_by=dict(rows["dropped_by"].drop_nulls().value_counts(sort=True).iter_rows()),
        beta1=beta1,
        estimator=estimator_of(provenance),
        pass_rate=pass_rate,
        pass_at_n=pass_at_n,
        vstar=VstarFigures(mean=mean, min=least, max=greatest),
        mean_vstar_se=vstar_se,
        mean_interval_width=width,
        mean_bias=bias,
        solvable_dropped=solvable_dropped,
        mean_completion_tokens=rows.select(pl.col("completion_tokens").explode().mean()).item(),
        outcomes=dict(rows["outcomes"].explode().value_counts(sort=True).iter_rows()),
        pass_rate_histogram=_histogram(rows["pass_rate"]),
        doubts=doubts(rows),
        identity=provenance.identity,
        context=provenance.context,
    )


SOLVABLE = 0.05
"""The least pass rate at which a prompt is worth keeping."""
PRIOR_POINTS = 400


def _uncertainty(rows: pl.DataFrame) -> tuple[float, float | None, float | None]:
    """How far V̂* may be off: the width of its interval, the plug-in's bias, and the solvable prompts that are dropped.

    The last is the share of the prompts with a pass rate of SOLVABLE or more that have no correct sample. For rewards
    of 0 and 1 this share and the bias are averages over the Beta distribution of pass rates that fits these counts. For
    other rewards, or N = 1, the share is None and the bias is `approximate_bias`. It is also None if there are no such
    prompts.
    """
    rewards_S = rows["rewards"].explode().to_numpy()
    counts_P = rows["num_samples"].to_numpy().astype(np.int64)
    beta1: float = rows["beta1"][0]
    found = interval(rewards_S, counts_P, beta1)
    width = float((found.high_P - found.low_P).mean())
    if counts_P.max() == 1 or not np.isin(rewards_S, (0.0, 1.0)).all():
        bias_P = approximate_bias(estimate_vstar(rewards_S, counts_P, beta1).se_P, beta1)
        bias = None if np.isnan(bias_P).all() else float(np.nanmean(bias_P))
        return width, bias, None
    prior = fit_prior(*success_groups(rows).to_numpy().T)
    sizes_N, prompts_N = np.unique(counts_P, return_counts=True)
    biases_N = [plugin_bias(prior.quantiles(PRIOR_POINTS), size, beta1).mean() for size in sizes_N.tolist()]
    dropped_N = [dropped_share(prior, size, solvable_from=SOLVABLE) for size in sizes_N.tolist()]
    bias, dropped = (float(np.average(each_N, weights=prompts_N)) for each_N in (biases_N, dropped_N))
    return width, bias, None if np.isnan(dropped) else dropped


def _histogram(rate: pl.Series) -> list[int]:
    """Prompts with a pass rate of 0, in each of BINS equal parts of (0, 1), and of 1."""
    inside = rate.filter((rate > 0) & (rate < 1))
    parts = (inside * BINS).floor().cast(pl.Int64)
    return [
        int((rate == 0).sum()),
        *(int((parts == part).sum()) for part in range(BINS)),
        int((rate == 1).sum()),
    ]


def to_json(figures: Description) -> str:
    """The figures as JSON, which has no infinity: an infinite β1 becomes the text "inf"."""
    beta1 = figures.beta1 if math.isfinite(figures.beta1) else "inf"
    return json.dumps({**asdict(figures), "beta1": beta1}, indent=2, ensure_ascii=False, allow_nan=False)


def show(figures: Description, console: Terminal) -> None:
    """Print the figures: provenance, summary, histogram of pass rates."""
    console.print(
        Group(_summary(figures), Text(), Text("pass rate, prompts"), _bars(figures.pass_rate_histogram))
    )


def _summary(figures: Description) -> RenderableType:
    table = Table.grid(padding=(0, 2))
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    samples = figures.num_samples
    count = f"{samples.min}" if samples.min == samples.max else f"{samples.min} to {samples.max}"
    vstar, identity, context = figures.vstar, figures.identity, figures.context
    error = figures.mean_vstar_se
    rows = {
        "file": figures.path,
        "prompts": f"{figures.prompts:,}, of which {figures.kept:,} kept for training",
        "filters": ", ".join(context.get("filters", [])) or "none",
        "dropped by": ", ".join(f"{name} {count:,}" for name, count in figures.dropped_by.items()) or "none",
        "accepted mismatches": "; ".join(context.get(ACCEPTED, [])) or "none",
        "samples per prompt (N)": count,
        "adaptive N": _adaptive(context.get("adaptive")),
        "β1": f"{figures.beta1:g}",
        "pass rate": f"{figures.pass_rate:.4f}",
        "pass@N": f"{figures.pass_at_n:.4f}",
        "V̂*": f"mean {vstar.mean:.4f}, from {vstar.min:.4f} to {vstar.max:.4f}"
        + ("" if figures.estimator == "plugin" else f", {figures.estimator}"),
        "standard error of V̂*": "–" if error is None else f"{error:.4f} on average",
        "95 % interval of V*": f"{figures.mean_interval_width:.4f} wide on average",
        "bias of V̂*": "–"
        if figures.mean_bias is None
        else f"about {round(figures.mean_bias, 4) + 0.0:.4f} for the plug-in",
        "pass@N = 0 would drop": "–"
        if figures.solvable_dropped is None
        else f"{figures.solvable_dropped:.2%} of the prompts of pass rate {SOLVABLE:g} or more (estimated)",
        "tokens a completion": f"{figures.mean_completion_tokens:.1f}",
        "doubts": " ".join(figures.doubts) or "none",
        "outcomes": ", ".join(f"{name} {count:,}" for name, count in figures.outcomes.items()),
        "model": f"{context['model_path']} (weights {identity['model']['weights'][:12]})",
        "which is a": "–"
        if "model" not in context
        else describe_model(
            context["model"], [str(number) for number in identity["prompt"]["eos_token_ids"]]
        ),
        "foreseen by vstar": _foreseen(context.get("model")),
        "prompt template": repr(identity["prompt"]["template"]),
        **{
            key.replace("_", " "): repr(value)
            for key, value in identity["prompt"].items()
            if key not in ("template", "eos_token_ids")
        },
        "sampling": ", ".join(f"{name} {value}" for name, value in identity["sampling"].items()),
        "grader": identity["grader"]
        + (f", regraded from {context['regraded_from']}" if "regraded_from" in context else ""),
        "made with": ", ".join(
            f"{name} {version}" for name, version in context["versions"].items() if version
        ),
        "commit": context["commit"] or "unknown",
    }
    for name, value in rows.items():
        table.add_row(Text(name, style="bold"), Text(value))
    return table


def _foreseen(model: dict[str, Any] | None) -> str:
    """What training would refuse, as noted by the job that made the file."""
    if model is None:
        return "–"
    return "; ".join(model["foreseen"]) or "nothing that `train` would refuse"


def _adaptive(rule: dict[str, Any] | None) -> str:
    if rule is None:
        return "no"
    return f"until the standard error is {rule['target_se']:g} or {rule['budget']:,} samples are drawn"


def _bars(counts: list[int]) -> RenderableType:
    labels = ["0", *(f"{part / BINS:.1f}–{(part + 1) / BINS:.1f}" for part in range(BINS)), "1"]
    table = Table.grid(padding=(0, 1))
    table.add_column(justify="right", no_wrap=True)
    table.add_column(justify="right", no_wrap=True)
    table.add_column(no_wrap=True)
    for label, count in zip(labels, counts, strict=True):
        table.add_row(label, f"{count:,}", "█" * round(30 * count / max(max(counts), 1)))
    return table
