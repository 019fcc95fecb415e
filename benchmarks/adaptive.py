"""Adaptive N against a fixed N of equal budget, on a run with many samples a prompt: how far V̂* is from V*.

    .venv/bin/python -m benchmarks.adaptive --run demo-n128

A prompt's cached rewards stand for its distribution, V̂* of all of them for its V*. A simulated run draws from them with
replacement: without it a prompt that gets them all would have no error. Every prompt is simulated REPETITIONS times.
`least possible` is the RMSE of a fixed allocation that knows every prompt's distribution (Neyman: N in proportion to
the standard deviation of exp(r/β1) over its mean), to the order of 1/N.
"""

import argparse
from itertools import pairwise
from pathlib import Path

import numpy as np

from benchmarks.tables import markdown
from common.runs import run_paths
from common.value import Floats, estimate_vstar
from common.vstar_file import read_vstar
from stage1_vstar.adaptive import WAYS, Comparison, Counts, Rule, Z, compare, from_rewards

REPETITIONS = 20
UNLIMITED = 10**12
RULES = [(0.15, None), (0.10, None), (0.07, None), (0.05, None), (0.03, 16), (0.03, 32)]
"""Targets, and budgets in samples a prompt."""
BY_PASS_RATE = 0.1
"""The target whose errors are shown by pass rate."""
BINS = [0.0, 0.1, 0.3, 0.5, 0.7, 0.9]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--run", default="demo-n128")
    parser.add_argument("--vstar", type=Path)
    parser.add_argument("--beta1", type=float, default=0.5)
    parser.add_argument("--num-samples", type=int, default=8, help="of each prompt in the first round")
    arguments = parser.parse_args()
    rows, _ = read_vstar(arguments.vstar or run_paths(arguments.run).vstar)
    cached = (rows["rewards"].explode().to_numpy(), rows["num_samples"].to_numpy().astype(np.int64))
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
    """Who gains and who loses: the errors by pass rate (the mean reward)."""
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


def _rmse(errors_P: Floats) -> float:
    return float(np.sqrt((errors_P**2).mean()))


if __name__ == "__main__":
    main()
