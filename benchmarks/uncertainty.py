"""The coverage of intervals of V*, and the errors of its estimators: simulated, and by sub-sampling a real run.

    python -m benchmarks.uncertainty                      simulated prompts, whose V* is known
    python -m benchmarks.uncertainty --run NAME           N of a run's many samples per prompt, against all of them
    python -m benchmarks.uncertainty --vstar FILE         the same for a vstar.parquet anywhere

Prints Markdown tables. Shapes: _P prompt, _S sample, _K number of successes, _PN sample n of prompt p.
"""

import argparse
import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from scipy.special import betaincinv, gammaln, xlog1py, xlogy

from benchmarks.comparisons import bootstrap_interval, delta_interval, drop_probability
from benchmarks.tables import markdown
from common.errors import UserError
from common.runs import run_paths
from common.value import estimate_vstar
from common.vstar_file import ESTIMATORS, read_vstar
from stage1_vstar.beta_binomial import BetaPrior, dropped_share, fit_prior
from stage1_vstar.estimator import estimate
from stage1_vstar.uncertainty import (
    Interval,
    approximate_bias,
    binomial_interval,
    interval,
    plugin_bias,
    two_valued_vstar,
)

Floats = NDArray[np.float64]
Bounds = tuple[Floats, Floats]

BETA1 = 0.5
LEVEL = 0.95
NOMINAL = (0.93, 0.97)
PROMPTS = 2000
RATES = np.linspace(0.05, 0.95, 19)
SAMPLES = (8, 32)


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    print(markdown(header, rows))


# Intervals of p from k of N successes, for every k at once


def ours(trials: int) -> Bounds:
    return binomial_interval(np.arange(trials + 1), np.full(trials + 1, trials), LEVEL)


def wilson(trials: int) -> Bounds:
    successes_K, square = np.arange(trials + 1), 1.959964**2
    centre_K = successes_K + square / 2
    half_K = np.sqrt(square * (successes_K * (1 - successes_K / trials) + square / 4))
    return np.clip((centre_K - half_K) / (trials + square), 0, 1), np.clip(
        (centre_K + half_K) / (trials + square), 0, 1
    )


def beta_quantiles(trials: int, low: tuple[float, float], high: tuple[float, float]) -> Bounds:
    """Quantiles of Beta(k + low[0], N − k + low[1]) and Beta(k + high[0], N − k + high[1]); 0 and 1 at the ends."""
    k, tail = np.arange(trials + 1), (1 - LEVEL) / 2
    with np.errstate(invalid="ignore"):
        low_K = betaincinv(k + low[0], trials - k + low[1], tail)
        high_K = betaincinv(k + high[0], trials - k + high[1], 1 - tail)
    return np.where(k == 0, 0.0, low_K), np.where(k == trials, 1.0, high_K)


def clopper_pearson(trials: int) -> Bounds:
    return beta_quantiles(trials, (0, 1), (1, 0))


def jeffreys(trials: int) -> Bounds:
    return beta_quantiles(trials, (0.5, 0.5), (0.5, 0.5))


def accepted(trials: int, accepts: Callable[[Floats], NDArray[np.bool_]]) -> Bounds:
    """The p, on a fine grid, at which a test with the binomial probabilities of k accepts k."""
    rates = np.linspace(0, 1, 4001)
    accepts_PK = np.array([accepts(pmf(trials, rate)) for rate in rates])
    return rates[accepts_PK.argmax(axis=0)], rates[len(rates) - 1 - accepts_PK[::-1].argmax(axis=0)]


def mid_p(trials: int) -> Bounds:
    def accepts(pmf_K: Floats) -> NDArray[np.bool_]:
        below_K = pmf_K.cumsum() - pmf_K / 2
        return np.minimum(below_K, 1 - below_K) >= (1 - LEVEL) / 2

    return accepted(trials, accepts)


def blaker(trials: int) -> Bounds:
    def accepts(pmf_K: Floats) -> NDArray[np.bool_]:
        tail_K = np.minimum(pmf_K.cumsum(), pmf_K[::-1].cumsum()[::-1])
        at_most_KK = tail_K[None, :] <= tail_K[:, None] * (1 + 1e-9)
        probability_K: Floats = (at_most_KK * pmf_K).sum(axis=1)
        return probability_K > 1 - LEVEL

    return accepted(trials, accepts)


def fitted_prior(trials: int) -> Bounds:
    """The posterior's quantiles under the beta-binomial fitted to the simulated prompts."""
    successes_P = simulate(trials)[1]
    values, weights = np.unique(successes_P, return_counts=True)
    prior = fit_prior(values, np.full(len(values), trials), weights)
    k, tail = np.arange(trials + 1), (1 - LEVEL) / 2
    a, b = prior.a + k, prior.b + trials - k
    return betaincinv(a, b, tail), betaincinv(a, b, 1 - tail)


METHODS: dict[str, Callable[[int], Bounds]] = {
    "Wilson, exact for one success (`interval`)": ours,
    "Wilson": wilson,
    "Jeffreys": jeffreys,
    "mid-P": mid_p,
    "Blaker": blaker,
    "Clopper–Pearson": clopper_pearson,
    "fitted beta-binomial": fitted_prior,
}


def pmf(trials: int, rate: float) -> Floats:
    k = np.arange(trials + 1)
    ways = gammaln(trials + 1) - gammaln(k + 1) - gammaln(trials - k + 1)
    probability: Floats = np.exp(ways + xlogy(k, rate) + xlog1py(trials - k, -rate))
    return probability


def simulate(trials: int) -> tuple[Floats, NDArray[np.int64]]:
    """Pass rates and numbers of successes of PROMPTS prompts, p uniform over RATES."""
    rng = np.random.default_rng(trials)
    rate_P = rng.choice(RATES, PROMPTS)
    return rate_P, rng.binomial(trials, rate_P)


def exact_coverage(bounds: Bounds, trials: int, rates: Floats) -> Floats:
    low_K, high_K = bounds
    return np.array([pmf(trials, rate)[(low_K <= rate) & (rate <= high_K)].sum() for rate in rates])


def reachable(trials: int, rate: float) -> bool:
    """Whether some run of neighbouring success counts has a probability within NOMINAL, as an interval would need."""
    upto = np.concatenate([[0.0], pmf(trials, rate).cumsum()])
    between = upto[None, :] - upto[:, None]
    return bool(((between >= NOMINAL[0]) & (between <= NOMINAL[1])).any())


def nominal(coverage: Floats) -> int:
    return int(((coverage >= NOMINAL[0]) & (coverage <= NOMINAL[1])).sum())


def binomial_tables() -> None:
    for trials in SAMPLES:
        print(f"\n### Rewards of 0 and 1: coverage of 95 % intervals, N = {trials}\n")
        rows = []
        rate_P, successes_P = simulate(trials)
        fine = np.linspace(0.001, 0.999, 999)
        for name, method in METHODS.items():
            low_K, high_K = bounds = method(trials)
            held_P = (low_K[successes_P] <= rate_P) & (rate_P <= high_K[successes_P])
            exact = exact_coverage(bounds, trials, RATES)
            width = two_valued_vstar(high_K, BETA1) - two_valued_vstar(low_K, BETA1)
            rows.append(
                [
                    name,
                    f"{held_P.mean():.1%}",
                    f"{exact.mean():.1%}",
                    f"{exact.min():.1%}–{exact.max():.1%}",
                    f"{nominal(exact)} of {len(RATES)}",
                    f"{np.abs(exact - LEVEL).mean():.1%}",
                    f"{exact_coverage(bounds, trials, fine).min():.1%}",
                    f"{width[successes_P].mean():.3f}",
                ]
            )
        possible = sum(reachable(trials, rate) for rate in RATES)
        rows.append(
            ["the best that any interval can do", "", "", "", f"{possible} of {len(RATES)}", "", "", ""]
        )
        table(
            [
                "interval",
                f"{PROMPTS:,} simulated prompts",
                "exact, mean over p",
                "least–most over p",
                "p with 93–97 %",
                "mean distance from 95 %",
                "least over 0.001 … 0.999",
                "mean width (β1 = ½)",
            ],
            rows,
        )
    print("\n### Rewards of 0 and 1: exact coverage of `interval` by p, the same for 1 − p\n")
    coverage = {trials: exact_coverage(ours(trials), trials, RATES) for trials in SAMPLES}

    def cell(trials: int, place: int) -> str:
        note = "" if reachable(trials, RATES[place]) else " †"
        return f"{coverage[trials][place]:.2%}{note}"

    table(
        ["p", *(f"N = {trials}" for trials in SAMPLES)],
        [
            [f"{rate:.2f}", *(cell(trials, place) for trials in SAMPLES)]
            for place, rate in enumerate(RATES[:10])
        ],
    )
    print(
        "\n† no interval can have 93–97 % here: the probabilities of the success counts do not add up to it."
    )


REWARDS: dict[str, Callable[[np.random.Generator, tuple[int, int]], Floats]] = {
    "0, ½, 1 with 60, 35, 5 %": lambda rng, size: rng.choice([0, 0.5, 1], p=[0.6, 0.35, 0.05], size=size),
    "0, ½, 1 with 5, 15, 80 %": lambda rng, size: rng.choice([0, 0.5, 1], p=[0.05, 0.15, 0.8], size=size),
    "Beta(0.3, 0.6)": lambda rng, size: rng.beta(0.3, 0.6, size),
    "30 % correct, less a length penalty": lambda rng, size: (
        (rng.random(size) < 0.3) - 0.3 * rng.beta(2, 5, size)
    ),
    "normal, unbounded": lambda rng, size: rng.normal(size=size),
}
INTERVALS: dict[str, Callable[[Floats, NDArray[np.int64], float], Interval]] = {
    "`interval`": interval,
    "delta": delta_interval,
    "bootstrap": bootstrap_interval,
}


def general_table() -> None:
    print(
        f"\n### Other rewards: coverage (and mean width) of 95 % intervals, {PROMPTS:,} simulated prompts\n"
    )
    rows = []
    for name, draw in REWARDS.items():
        for beta1 in (math.inf, 0.5, 0.125):
            rng = np.random.default_rng(0)
            many = draw(rng, (1, 4_000_000)).ravel()
            truth = estimate_vstar(many, np.array([len(many)]), beta1).vstar_P[0]
            row = [name, "∞" if math.isinf(beta1) else f"{beta1:g}"]
            for trials in SAMPLES:
                rewards_S, counts_P = draw(rng, (PROMPTS, trials)).ravel(), np.full(PROMPTS, trials)
                for method in INTERVALS.values():
                    found = method(rewards_S, counts_P, beta1)
                    held_P = (found.low_P <= truth) & (truth <= found.high_P)
                    row.append(f"{held_P.mean():.1%} ({(found.high_P - found.low_P).mean():.2f})")
            rows.append(row)
    table(["rewards", "β1", *(f"{name}, N = {trials}" for trials in SAMPLES for name in INTERVALS)], rows)


def bias_table() -> None:
    print("\n### The plug-in's bias for rewards of 0 and 1, and how often the pass@N filter drops a prompt\n")
    rows = []
    for beta1 in (0.5, 0.125):
        for trials in SAMPLES:
            for rate in (0.05, 0.2, 0.5, 0.8):
                gain = math.expm1(1 / beta1)
                se = beta1 * math.sqrt(rate * (1 - rate) / trials) * gain / (1 + rate * gain)
                exact = float(plugin_bias(rate, trials, beta1))
                second = approximate_bias(np.array([se]), beta1)[0]
                dropped = float(drop_probability(rate, trials))
                rows.append(
                    [
                        f"{beta1:g}",
                        f"{trials}",
                        f"{rate:g}",
                        f"{float(two_valued_vstar(rate, beta1)):.3f}",
                        f"{exact:.4f}",
                        f"{second:.4f}",
                        f"{dropped:.2%}",
                    ]
                )
    table(["β1", "N", "p", "V*", "bias", "−se²/2β1", "P(all N wrong)"], rows)


DISTRIBUTIONS: dict[str, Callable[[np.random.Generator, int], Floats]] = {
    "uniform": lambda rng, size: rng.random(size),
    "U-shaped, Beta(0.3, 0.3)": lambda rng, size: rng.beta(0.3, 0.3, size),
    "all easy, Beta(8, 1)": lambda rng, size: rng.beta(8, 1, size),
    "mostly hard, Beta(0.3, 2)": lambda rng, size: rng.beta(0.3, 2, size),
    "not a Beta: half 0.02, half 0.7": lambda rng, size: rng.choice([0.02, 0.7], size),
}


def estimators_table() -> None:
    trials, prompts = 8, 20_000
    print(
        f"\n### Estimators at N = {trials}: bias / RMSE against the true V*, {prompts:,} simulated prompts\n"
    )
    rows = []
    for name, draw in DISTRIBUTIONS.items():
        for beta1 in (1.0, 0.5, 0.125):
            rng = np.random.default_rng(0)
            rate_P = draw(rng, prompts)
            rewards_PN = (rng.random((prompts, trials)) < rate_P[:, None]).astype(np.float64)
            truth_P = two_valued_vstar(rate_P, beta1)
            prior = prior_of(rewards_PN)
            guesses = {
                each: estimate(rewards_PN.ravel(), np.full(prompts, trials), beta1, estimator=each).vstar_P
                for each in ESTIMATORS
            }
            posterior_rate_P = (prior.a + rewards_PN.sum(axis=1)) / (prior.a + prior.b + trials)
            guesses["V*(E[p])"] = two_valued_vstar(posterior_rate_P, beta1)
            rows.append(
                [name, f"{beta1:g}", *marked({each: guess - truth_P for each, guess in guesses.items()})]
            )
    table(["pass rates", "β1", *ESTIMATORS, "V* at the posterior's mean p"], rows)

    print(
        f"\n### Solvable prompts that pass@N = 0 drops: by the fitted prior / in truth, p ≥ q, N = {trials}\n"
    )
    rows = []
    for name, draw in DISTRIBUTIONS.items():
        rng = np.random.default_rng(0)
        rate_P = draw(rng, prompts)
        prior = prior_of((rng.random((prompts, trials)) < rate_P[:, None]).astype(np.float64))
        row = [name, f"Beta({prior.a:.2f}, {prior.b:.2f})"]
        for least in (0.0, 0.05, 0.2):
            truth = drop_probability(rate_P[rate_P >= least], trials).mean()
            row.append(f"{dropped_share(prior, trials, solvable_from=least):.1%} / {truth:.1%}")
        rows.append(row)
    table(["pass rates", "fitted prior", "q = 0", "q = 0.05", "q = 0.2"], rows)


def prior_of(rewards_PN: Floats) -> BetaPrior:
    values, weights = np.unique(rewards_PN.sum(axis=1).astype(np.int64), return_counts=True)
    return fit_prior(values, np.full(len(values), rewards_PN.shape[1]), weights)


def marked(errors: dict[str, Floats]) -> Iterator[str]:
    """Bias / RMSE of each, the smallest RMSE in bold."""
    rmse = {name: float(np.sqrt((error_P**2).mean())) for name, error_P in errors.items()}
    for name, error_P in errors.items():
        text = f"{error_P.mean():+.3f} / {rmse[name]:.3f}"
        yield f"**{text}**" if rmse[name] == min(rmse.values()) else text


REPEATS = 20


def subsampling_table(path: Path) -> None:
    """Errors of the estimators on N samples, drawn without replacement from a prompt's many, against all of them."""
    rows, _ = read_vstar(path)
    most = int(rows["num_samples"].to_numpy().max())
    if most < 16:
        raise UserError(
            f"{path} has {most} samples a prompt, too few to stand for the truth; "
            "give a run with many more, for example --set vstar.num_samples=256"
        )
    whole = rows.filter(rows["num_samples"] == most)
    rewards_PN = np.array(whole["rewards"].to_list())
    prompts, beta1 = whole.height, float(whole["beta1"][0])
    truth_P = estimate_vstar(rewards_PN.ravel(), np.full(prompts, most), beta1).vstar_P
    binary = bool(((rewards_PN == 0) | (rewards_PN == 1)).all())
    names = [each for each in ESTIMATORS if (binary and beta1 > 0) or each != "beta_binomial"]
    print(
        f"\n### Sub-sampling {path.parent.name}/{path.name}: bias / RMSE against the plug-in of all {most} samples, "
        f"β1 = {beta1:g}\n\n{prompts:,} prompts of {rows.height:,}, {REPEATS} subsets each, without replacement.\n"
    )
    rng = np.random.default_rng(0)
    lines = []
    for trials in (each for each in (2, 4, 8, 16) if each <= most // 2):
        errors: dict[str, list[Floats]] = {name: [] for name in names}
        for _ in range(REPEATS):
            chosen_PN = rng.permuted(rewards_PN, axis=1)[:, :trials]
            for name in names:
                guess = estimate(chosen_PN.ravel(), np.full(prompts, trials), beta1, estimator=name)
                errors[name].append(guess.vstar_P - truth_P)
        lines.append([f"{trials}", *marked({name: np.concatenate(parts) for name, parts in errors.items()})])
    table(["N", *names], lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    source = parser.add_mutually_exclusive_group()
    source.add_argument("--run", help="artifacts/RUN/vstar.parquet")
    source.add_argument("--vstar", type=Path, help="a vstar.parquet")
    options = parser.parse_args()
    if options.run or options.vstar:
        try:
            subsampling_table(options.vstar or run_paths(options.run).vstar)
        except UserError as error:
            parser.error(str(error))
        return
    binomial_tables()
    general_table()
    bias_table()
    estimators_table()


if __name__ == "__main__":
    main()
