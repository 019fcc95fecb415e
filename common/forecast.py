"""What stage 2's first batch will show, from stage 1's rewards: `forecast` prints it, `train` checks itself by it.

In the first iteration π = π_ref, so that the regression loss is the mean of (r − V̂*)² over a batch, with a fresh r
from the very distribution that stage 1 sampled. The cached rewards are not fresh in that formula, for two reasons:
V̂* was computed from them, and a filter may have kept a prompt for them. Both make the plain average over them wrong.
What is right is the distribution of a *further* reward given a prompt's N own, which neither can disturb:

- rewards of 0 and 1: the posterior mean of the success probability, under the distribution of these probabilities
  over the prompts that makes all cached rewards likeliest (nonparametric maximum likelihood: Kiefer and Wolfowitz
  1956, by EM on a grid). No shape is assumed of it: prompts never solved, or always, are points of the grid;
- any other rewards: credibility (Bühlmann 1967), the mixture Z · own samples + (1 − Z) · all prompts' samples with
  Z = N / (N + within/between variance), the best linear predictor.

Shapes: _P prompt, _S sample (all prompts' samples, one after the other), _G group of prompts with the same successes
and trials, _Q grid point.
"""

from dataclasses import dataclass
from statistics import NormalDist

import numpy as np
import polars as pl
from numpy.typing import NDArray

Floats = NDArray[np.float64]

LEVEL = 0.95
"""Of the intervals that are shown."""
ALARM_LEVEL = 0.999
"""Of the intervals outside which training warns: an honest run does so once in a thousand."""

GRID_POINTS = 201
EM_STEPS = 1000
_ROUNDING = 1e-5
"""Training computes in float32."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Expectation:
    """A figure before it is known: its mean and standard deviation, and the range that it cannot leave."""

    mean: float
    sd: float
    lowest: float
    highest: float

    def interval(self, level: float = LEVEL) -> tuple[float, float]:
        """The central interval of a normal distribution, cut to the possible range."""
        half = NormalDist().inv_cdf((1 + level) / 2) * self.sd
        return max(self.lowest, self.mean - half), min(self.highest, self.mean + half)

    def excludes(self, value: float) -> bool:
        """Whether a value lies outside the interval of ALARM_LEVEL, by more than rounding."""
        low, high = self.interval(ALARM_LEVEL)
        slack = _ROUNDING * (1 + abs(self.mean))
        return not low - slack <= value <= high + slack


@dataclass(frozen=True, slots=True, kw_only=True)
class FirstBatch:
    """The mean loss and the mean reward of the first iteration's batch."""

    loss: Expectation
    reward: Expectation

    def bounds(self) -> dict[str, float]:
        """The limits outside which training warns, as its metrics name them."""
        (loss_low, loss_high), (reward_low, reward_high) = (
            figure.interval(ALARM_LEVEL) for figure in (self.loss, self.reward)
        )
        return {
            "forecast/loss_low": loss_low,
            "forecast/loss_high": loss_high,
            "forecast/reward_low": reward_low,
            "forecast/reward_high": reward_high,
        }

    def warning(self, loss: float, reward: float) -> str | None:
        """What to tell the user of a first iteration that came out as stage 1's samples make unlikely, in one line."""
        found = {"loss": (self.loss, loss), "reward": (self.reward, reward)}
        outside = [
            "{} {:.4g} is outside {:.4g} to {:.4g}".format(name, value, *expected.interval(ALARM_LEVEL))
            for name, (expected, value) in found.items()
            if expected.excludes(value)
        ]
        if not outside:
            return None
        return (
            f"warning: the first iteration's {', its '.join(outside)}, where stage 1's samples put it 999 times in "
            "1,000: does stage 2 sample and grade as stage 1 did (model, prompt template, temperature, grader), and "
            "is the learning rate small enough for one batch?"
        )


def first_batch(rows: pl.DataFrame, batch_size: int) -> FirstBatch | None:
    """What the rows of vstar.parquet say of a batch of `batch_size` kept prompts with a fresh completion each.

    Dropped prompts take part in the estimate of how prompts differ. None where no prompt has two samples: nothing then
    tells how much of the rewards' variance lies within a prompt.
    """
    counts_P = rows["rewards"].list.len().to_numpy().astype(np.int64)
    if counts_P.max() < 2:
        return None
    rewards_S = rows["rewards"].explode().to_numpy()
    first_P, second_P, third_P, fourth_P = (
        moment_P[rows["keep"].to_numpy()] for moment_P in fresh_reward_moments(rewards_S, counts_P)
    )
    vstar_P = rows.filter("keep")["vstar"].to_numpy()
    loss_P = second_P - 2 * vstar_P * first_P + vstar_P**2
    squared_loss_P = (
        fourth_P - 4 * vstar_P * third_P + 6 * vstar_P**2 * second_P - 4 * vstar_P**3 * first_P + vstar_P**4
    )
    lowest, highest = float(rewards_S.min()), float(rewards_S.max())
    return FirstBatch(
        loss=batch_mean(loss_P, squared_loss_P - loss_P**2, batch_size, 0.0, float("inf")),
        reward=batch_mean(first_P, second_P - first_P**2, batch_size, lowest, highest),
    )


def batch_mean(
    mean_P: Floats, variance_P: Floats, batch_size: int, lowest: float, highest: float
) -> Expectation:
    """The mean over a batch of something that has this mean and variance in each prompt.

    The batch is what training takes: so many whole passes over the prompts, which all are in every batch, and the rest
    drawn without replacement, whose variance over the prompts shrinks by the share of prompts that it holds.
    """
    prompts = len(mean_P)
    rest = batch_size % prompts
    between = float(mean_P.var(ddof=1)) if prompts > 1 else 0.0
    within = float(np.maximum(variance_P, 0.0).mean())
    variance = (batch_size * within + rest * (1 - rest / prompts) * between) / batch_size**2
    return Expectation(mean=float(mean_P.mean()), sd=variance**0.5, lowest=lowest, highest=highest)


def fresh_reward_moments(rewards_S: Floats, counts_P: NDArray[np.int64]) -> Floats:
    """E[rᵏ], k = 1 … 4, of a further reward of each prompt given its own and all prompts' rewards; shape (4, P)."""
    starts_P = np.concatenate([[0], np.cumsum(counts_P)[:-1]])
    if np.isin(rewards_S, (0.0, 1.0)).all():
        successes_P = np.add.reduceat(rewards_S, starts_P).astype(np.int64)
        return np.broadcast_to(_success_probability(successes_P, counts_P), (4, len(counts_P)))
    own_P = np.add.reduceat(rewards_S, starts_P) / counts_P
    weight_P = _credibility(rewards_S, own_P, counts_P)
    return np.stack(
        [
            weight_P * np.add.reduceat(rewards_S**power, starts_P) / counts_P
            + (1 - weight_P) * (rewards_S**power).mean()
            for power in (1, 2, 3, 4)
        ]
    )


def _success_probability(successes_P: NDArray[np.int64], trials_P: NDArray[np.int64]) -> Floats:
    """Each prompt's posterior mean under the prior on the grid that is likeliest for all prompts together."""
    width = int(trials_P.max()) + 1
    codes_G, group_P, prompts_G = np.unique(
        successes_P * width + trials_P, return_inverse=True, return_counts=True
    )
    successes_G, trials_G = codes_G // width, codes_G % width
    # Closest together at 0 and 1, where the binomial distribution is narrowest.
    grid_Q = np.sin(np.linspace(0, np.pi / 2, GRID_POINTS)) ** 2
    from scipy.special import xlog1py, xlogy

    log_likelihood_GQ = xlogy(successes_G[:, None], grid_Q) + xlog1py(
        (trials_G - successes_G)[:, None], -grid_Q
    )
    likelihood_GQ = np.exp(log_likelihood_GQ - log_likelihood_GQ.max(axis=1, keepdims=True))
    prior_Q = np.full(GRID_POINTS, 1 / GRID_POINTS)
    share_G = prompts_G / prompts_G.sum()
    for _ in range(EM_STEPS):
        prior_Q = prior_Q * ((share_G / (likelihood_GQ @ prior_Q)) @ likelihood_GQ)
    mean_G: Floats = (likelihood_GQ @ (prior_Q * grid_Q)) / (likelihood_GQ @ prior_Q)
    return mean_G[group_P]


def _credibility(rewards_S: Floats, own_P: Floats, counts_P: NDArray[np.int64]) -> Floats:
    """Z = N / (N + within/between), with both variances from the analysis of variance over all prompts."""
    samples, prompts = len(rewards_S), len(counts_P)
    within = float(((rewards_S - np.repeat(own_P, counts_P)) ** 2).sum()) / (samples - prompts)
    scatter = float((counts_P * (own_P - rewards_S.mean()) ** 2).sum()) - (prompts - 1) * within
    spread = samples - float((counts_P.astype(np.float64) ** 2).sum()) / samples
    between = max(scatter / spread, 0.0) if spread > 0 else 0.0
    if within == 0:
        return np.ones(prompts)
    return np.asarray(counts_P * between / (counts_P * between + within), dtype=np.float64)
