"""Compare adaptive N with a fixed N of equal budget: the error of V̂* under a run's own rule, or under several rules.

    .venv/bin/python -m benchmarks.adaptive --run mine
    .venv/bin/python -m benchmarks.adaptive --run demo-n128

For a run that was drawn with --adaptive, the whole run is simulated on similar prompts, to show the effect of its rule.

For any other run, which should have many samples per prompt, several rules are compared. A prompt's cached rewards
stand for its distribution, V̂* of all of them for its V*. Simulated runs draw from them with replacement, since
otherwise a prompt that gets all of them would have no error. Every prompt is simulated REPETITIONS times. `least
possible` is the RMSE of a fixed allocation that knows every prompt's distribution (Neyman: N in proportion to the
standard deviation of exp(r/β1) over its mean), to the order of 1/N.

Shapes: _P prompt, _W wide prompt, _S sample (all prompts' samples, one after the other).
"""

import argparse
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np

from benchmarks.tables import markdown
from common.runs import run_paths
from common.value import Floats, estimate_vstar
from common.vstar_file import read_vstar
from stage1_vstar.adaptive import ADAPTIVE, Allocation, Counts, Draw, Places, Rule, Z, allocate
from stage1_vstar.beta_binomial import fit_prior_to_rewards
from stage1_vstar.uncertainty import two_valued_vstar

REPETITIONS = 20
UNLIMITED = 10**12
RULES = [(0.15, None), (0.10, None), (0.07, None), (0.05, None), (0.03, 16), (0.03, 32)]
"""Targets, and budgets in samples per prompt."""
BY_PASS_RATE = 0.1
"""The target whose errors are shown by pass rate."""
SIMULATED_PROMPTS = 20_000
SIMULATED_SAMPLES = 4_000_000
WAYS = ("adaptive", "same sizes, fresh samples", "fixed N")
"""Adaptive N and its comparisons: the same sizes with fresh samples, and the same budget spread evenly."""
BINS = [0.0, 0.1, 0.3, 0.5, 0.7, 0.9]


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """V̂* − V* of each prompt under each of WAYS."""

    allocation: Allocation
    errors: dict[str, Floats]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--run", default="demo-n128")
    parser.add_argument("--vstar", type=Path)
    parser.add_argument("--beta1", type=float, default=0.5)
    parser.add_argument("--num-samples", type=int, default=8, help="of each prompt in the first round")
    arguments = parser.parse_args()
    rows, provenance = read_vstar(arguments.vstar or run_paths(arguments.run).vstar)
    cached = (rows["rewards"].explode().to_numpy(), rows["num_samples"].to_numpy().astype(np.int64))
    if found := provenance.context.get(ADAPTIVE):
        rule = Rule(target_se=found["target_se"], budget=found["budget"])
        first = found["rounds"][0]["samples"] // found["rounds"][0]["prompts"]
        print(bias_line(stopping_bias(rule, first, rows["beta1"][0], *cached)))
        return
    print(f"β1 = {arguments.beta1:g}, first round {arguments.num_samples}")
    for title, (rewards_S, counts_P) in (
        (arguments.run, cached),
        ("simulated: a quarter never solved, a quarter always, the others evenly between", _mixed()),
    ):
        print(f"\n{title}: {len(counts_P):,} prompts × {counts_P.min()} to {counts_P.max()} cached samples\n")
        _show(rewards_S, counts_P, arguments.beta1, arguments.num_samples)


def _mixed(prompts: int = 1024, samples: int = 128) -> tuple[Floats, Counts]:
    part = prompts // 4
    between = np.linspace(0, samples, 2 * part).round().astype(np.int64)
    successes_P = np.concatenate([np.zeros(part, np.int64), np.full(part, samples), between])
    halves = np.stack([successes_P, samples - successes_P], axis=1).ravel()
    return np.repeat(np.tile([1.0, 0.0], prompts), halves), np.full(prompts, samples)


def _show(rewards_S: Floats, counts_P: Counts, beta1: float, num_samples: int) -> None:
    """The tables of one population."""
    places_P = np.tile(np.arange(len(counts_P)), REPETITIONS)
    deviation_P = np.nan_to_num(estimate_vstar(rewards_S, counts_P, beta1).se_P) * np.sqrt(counts_P)
    rows = []
    shown: Comparison | None = None
    for target, budget in RULES:
        random = np.random.default_rng(0)
        fresh, truth_P = from_rewards(rewards_S, counts_P, places_P, beta1, random)
        rule = Rule(target_se=target, budget=UNLIMITED if budget is None else budget * len(places_P))
        found = compare(rule, num_samples, beta1, fresh, truth_P)
        if target == BY_PASS_RATE:
            shown = found
        sizes_P = found.allocation.sizes_P
        rmse = {way: _rmse(errors_P) for way, errors_P in found.errors.items()}
        least = deviation_P.mean() / np.sqrt(sizes_P.mean())
        sizes = [f"{len(found.allocation.rounds) - 1}", f"{sizes_P.mean():.1f}", f"{sizes_P.max()}"]
        errors = [cell for way in WAYS for cell in (f"{found.errors[way].mean():+.4f}", f"{rmse[way]:.4f}")]
        ratios = [f"{rmse[WAYS[0]] / rmse[WAYS[2]]:.3f}", f"{least / rmse[WAYS[2]]:.3f}"]
        rows.append([f"{target:g}", str(budget or "–"), *sizes, *errors, *ratios])
    ways = [name for way in WAYS for name in (f"{way}: bias", "RMSE")]
    header = ["target SE", "budget a prompt", "rounds", "N, mean", "N, most", *ways, "adaptive over fixed"]
    print(markdown([*header, "least possible over fixed"], rows))
    assert shown is not None, "RULES has BY_PASS_RATE"
    pass_rate_P = (np.add.reduceat(rewards_S, np.cumsum(counts_P) - counts_P) / counts_P)[places_P]
    _show_bins(pass_rate_P, shown)


def _show_bins(pass_rate_P: Floats, found: Comparison) -> None:
    """The errors by pass rate (the mean reward)."""
    print(f"\ntarget SE {BY_PASS_RATE:g}; beyond: |V̂* − V*| > {Z:g} × {BY_PASS_RATE:g}\n")
    rows = []
    bin_P = np.searchsorted(BINS, pass_rate_P, side="right") - 1
    inside = [
        (f"{low:g} to {high:g}", bin_P == place) for place, (low, high) in enumerate(pairwise([*BINS, 1]))
    ]
    for label, inside_P in [*inside, ("all", bin_P >= 0)]:
        if not inside_P.any():
            continue
        cells = []
        for way in (WAYS[0], WAYS[2]):
            errors_P = found.errors[way][inside_P]
            beyond = (abs(errors_P) > Z * BY_PASS_RATE).mean()
            cells += [f"{errors_P.mean():+.4f}", f"{_rmse(errors_P):.4f}", f"{beyond:.1%}"]
        mean = found.allocation.sizes_P[inside_P].mean()
        rows.append([label, f"{inside_P.sum() // REPETITIONS:,}", f"{mean:.1f}", *cells])
    ways = [name for way in ("adaptive", "fixed N") for name in (f"{way}: bias", "RMSE", "beyond")]
    print(markdown(["pass rate", "prompts", "N, mean", *ways], rows))


def bias_line(found: Comparison) -> str:
    """One line on the effect of a rule on V̂*."""
    ways = (
        f"{way} {errors_P.mean():+.4f} ± {Z * errors_P.std() / len(errors_P) ** 0.5:.4f} (RMSE {_rmse(errors_P):.4f})"
        for way, errors_P in found.errors.items()
    )
    return f"bias of V̂* by simulation: {', '.join(ways)}"


def _rmse(errors_P: Floats) -> float:
    return float(np.sqrt((errors_P**2).mean()))


def prompts_like(
    rewards_S: Floats, counts_P: Counts, beta1: float, many: int, random: np.random.Generator
) -> tuple[Draw, Floats]:
    """Simulated prompts like those of a run, and their V*.

    For 0/1 rewards, each has a pass rate from the posterior of a prompt of the run, under a prior fitted to all of
    them. (A prompt's N depends on its rewards, but this does not change its likelihood.) For other rewards, it draws
    from a prompt's own rewards with replacement.
    """
    # In random order, since rows may be sorted; every prompt is drawn about equally often.
    places_P = np.resize(random.permutation(len(counts_P)), many)
    source = _from_posterior if np.isin(rewards_S, (0.0, 1.0)).all() else from_rewards
    return source(rewards_S, counts_P, places_P, beta1, random)


def stopping_bias(
    rule: Rule, num_samples: int, beta1: float, rewards_S: Floats, counts_P: Counts
) -> Comparison:
    """Measure the effect of stopping on the width on V̂*, by simulating the whole run on prompts like these."""
    many = max(1, min(SIMULATED_PROMPTS, int(SIMULATED_SAMPLES / counts_P.mean())))
    fresh, truth_P = prompts_like(rewards_S, counts_P, beta1, many, np.random.default_rng(0))
    scaled = Rule(target_se=rule.target_se, budget=round(rule.budget * many / len(counts_P)))
    return compare(scaled, num_samples, beta1, fresh, truth_P)


def compare(rule: Rule, num_samples: int, beta1: float, fresh: Draw, truth_P: Floats) -> Comparison:
    """Follow the rule on prompts whose V* is known; `fresh` draws new samples each time."""
    prompts = len(truth_P)
    everyone = np.arange(prompts)
    samples = _Samples(fresh, prompts)
    allocation = allocate(rule, num_samples, beta1, samples.first, prompts)
    sizes_P = allocation.sizes_P
    even_P = np.diff(np.linspace(0, sizes_P.sum(), prompts + 1).round().astype(np.int64))
    drawn = {
        WAYS[0]: (samples.first(everyone, sizes_P), sizes_P),
        WAYS[1]: (fresh(everyone, sizes_P), sizes_P),
        WAYS[2]: (fresh(everyone, even_P), even_P),
    }
    errors = {
        way: estimate_vstar(rewards_S, counts_P, beta1).vstar_P - truth_P
        for way, (rewards_S, counts_P) in drawn.items()
    }
    return Comparison(allocation=allocation, errors=errors)


class _Samples:
    """A simulated run's samples: once drawn, a prompt's first samples stay the same."""

    def __init__(self, fresh: Draw, num_prompts: int) -> None:
        self._fresh = fresh
        self._drawn: list[Floats] = [np.empty(0)] * num_prompts

    def first(self, places_W: Places, sizes_W: Counts) -> Floats:
        held_W = np.array([len(self._drawn[place]) for place in places_W], dtype=np.int64)
        missing_W = sizes_W - held_W
        parts = np.split(self._fresh(places_W, missing_W), np.cumsum(missing_W)[:-1])
        for place, part in zip(places_W.tolist(), parts, strict=True):
            self._drawn[place] = np.concatenate([self._drawn[place], part])
        return np.concatenate([self._drawn[place] for place in places_W.tolist()])


def from_rewards(
    rewards_S: Floats, counts_P: Counts, places_P: Places, beta1: float, random: np.random.Generator
) -> tuple[Draw, Floats]:
    """Simulated prompts that draw, with replacement, from the rewards of the prompts at `places_P`; and their V*."""
    starts_P = (np.cumsum(counts_P) - counts_P)[places_P]
    many_P = counts_P[places_P]

    def fresh(places_W: Places, sizes_W: Counts) -> Floats:
        which_S = np.repeat(places_W, sizes_W)
        drawn_S: Floats = rewards_S[starts_P[which_S] + random.integers(many_P[which_S])]
        return drawn_S

    return fresh, estimate_vstar(rewards_S, counts_P, beta1).vstar_P[places_P]


def _from_posterior(
    rewards_S: Floats, counts_P: Counts, places_P: Places, beta1: float, random: np.random.Generator
) -> tuple[Draw, Floats]:
    """Simulated prompts whose pass rates come from the posteriors of the prompts at `places_P`; and their V*."""
    successes_P = np.add.reduceat(rewards_S, np.cumsum(counts_P) - counts_P)
    prior = fit_prior_to_rewards(rewards_S, counts_P)
    pass_rate_P = random.beta(prior.a + successes_P[places_P], prior.b + (counts_P - successes_P)[places_P])

    def fresh(places_W: Places, sizes_W: Counts) -> Floats:
        rates_S = np.repeat(pass_rate_P[places_W], sizes_W)
        return (random.random(len(rates_S)) < rates_S).astype(np.float64)

    return fresh, two_valued_vstar(pass_rate_P, beta1)


if __name__ == "__main__":
    main()
