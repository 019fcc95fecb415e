"""Forecast the loss and reward of stage 2's first batch from stage 1's rewards.

`forecast` prints the result, and `train` compares its first iteration with it.

In the first iteration π = π_ref, so the regression loss is the mean of (r − V̂*)² over a batch, with a fresh r from
the distribution that stage 1 sampled. The cached rewards cannot stand for fresh ones, for two reasons: V̂* was
computed from them, and a filter may have kept a prompt because of them. Their plain average is therefore biased.
Neither affects the distribution of a *further* reward given a prompt's N own, which is used instead:

- rewards of 0 and 1: the posterior mean of the success probability. The prior is the distribution over prompts under
  which all cached rewards are most likely (nonparametric maximum likelihood: Kiefer and Wolfowitz 1956, by EM on a
  grid). It assumes no shape: the grid includes prompts that are never or always solved;
- other rewards: credibility (Bühlmann 1967), the mixture Z · own samples + (1 − Z) · all prompts' samples with
  Z = N / (N + within/between variance), the best linear predictor.

Even if all samples of a file are 1, other rewards may be possible. So half a sample of the least and half a sample of
the greatest possible reward are added to the whole file (for 0/1 rewards Jeffreys' prior of the mean rate).

Shapes: _P prompt, _S sample (all prompts' samples, one after the other), _G group of prompts with the same successes
and trials, _Q grid point, _R resample of the prompts.
"""

from dataclasses import dataclass
from math import comb

import numpy as np
import polars as pl
from numpy.typing import NDArray

from common.value import Floats, reward_range
from stage2_train.config import TrainConfig

LEVEL = 0.95
"""Coverage of the intervals that are shown."""
ALARM_LEVEL = 0.999
"""Coverage of the intervals outside which training warns: an honest run is warned once in 1,000, for each figure."""

GRID_POINTS = 201
EM_STEPS = 1000
RESAMPLES = 50
"""Number of resamples of the prompts; they show how well the prompts determine the estimated distribution."""
_ROUNDING = 1e-5
"""Training computes in float32."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Expectation:
    """The distribution of a figure before it is known: mean, standard deviation, skewness, and possible range."""

    mean: float
    sd: float
    lowest: float
    highest: float
    skewness: float = 0.0

    def interval(self, level: float = LEVEL) -> tuple[float, float]:
        """The central interval of the gamma distribution with these three moments, cut to the possible range.

        It is shifted, and mirrored for a negative skewness (Pearson's type III); for a skewness of 0 it is the normal
        distribution. Counts of rare events are skewed: with a mean of 0.1 a normal interval would end at 1.1, although
        2 events occur once in 200.
        """
        from scipy.stats import pearson3

        below, above = pearson3.ppf([(1 - level) / 2, (1 + level) / 2], self.skewness).tolist()
        return max(self.lowest, self.mean + below * self.sd), min(self.highest, self.mean + above * self.sd)

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
        """One line for the user if the first iteration is unlikely given stage 1's samples."""
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


def expected_first_batch(rows: pl.DataFrame, train: TrainConfig) -> FirstBatch | None:
    """`first_batch` of a run whose loss starts as (r − V̂*)² and whose completions are of different prompts."""
    if "vstar" not in train.columns or train.objective.group_size > 1:
        return None
    return first_batch(rows, train.batch_size)


def first_batch(rows: pl.DataFrame, batch_size: int) -> FirstBatch | None:
    """The forecast for a batch of `batch_size` kept prompts with one fresh completion each, from vstar.parquet's rows.

    Dropped prompts take part in the estimate of how prompts differ. None if no prompt has two samples, since the
    variance within a prompt is then unknown.
    """
    counts_P = rows["rewards"].list.len().to_numpy().astype(np.int64)
    if counts_P.max() < 2:
        return None
    rewards_S = rows["rewards"].explode().to_numpy()
    kept_P = rows["keep"].to_numpy()
    fresh = fresh_rewards(rewards_S, counts_P).of(kept_P)
    vstar_P = rows.filter("keep")["vstar"].to_numpy()
    losses_P = np.stack([_moment_about(vstar_P, fresh.moments_P, power) for power in (2, 4, 6)])
    lowest, highest = reward_range(rewards_S)
    counts_P = counts_P[kept_P]
    # For a reward r of 0 or 1 the loss is V̂*² + r (1 − 2 V̂*).
    loss_error = fresh.shared_error(1 - 2 * vstar_P)
    reward_error = fresh.shared_error(np.ones(len(vstar_P)))
    return FirstBatch(
        loss=batch_mean(losses_P, fresh.correlation_P, counts_P, loss_error, batch_size, 0.0, float("inf")),
        reward=batch_mean(
            fresh.moments_P[1:4], fresh.correlation_P, counts_P, reward_error, batch_size, lowest, highest
        ),
    )


def batch_mean(
    moments_P: Floats,
    correlation_P: Floats,
    counts_P: NDArray[np.int64],
    shared_error: float,
    batch_size: int,
    lowest: float,
    highest: float,
) -> Expectation:
    """The mean over a batch of a figure with these moments E[xᵏ], k = 1 … 3, in each prompt; shape (3, P).

    As in training, a batch consists of whole passes over the prompts and a rest that is drawn without replacement.
    Every batch holds the whole passes; the variance of the rest over the prompts shrinks by the share of prompts that
    it holds.

    A prompt's mean is known from its `counts_P` samples only, with the same error at each visit. `correlation_P` is
    that part of the figure's variance, so v visits have v + v (v − 1) · correlation times the variance of one. All
    prompts' means can also be wrong together, since the distribution over prompts is an estimate: `shared_error` is
    the variance of the mean over the prompts for that reason. It is raised if the mean would otherwise be known better
    than its own samples allow, which is to (variance given the prompt) / (N · prompts).
    """
    prompts = len(correlation_P)
    passes, rest = divmod(batch_size, prompts)
    mean_P, second_P, third_P = moments_P
    variance_P = np.maximum(second_P - mean_P**2, 0.0)
    skew_P = third_P - 3 * second_P * mean_P + 2 * mean_P**3
    shared_P = correlation_P * variance_P
    within, shared = float(variance_P.mean()), float(shared_P.mean())
    pairs = passes * (passes - 1) * prompts + 2 * passes * rest
    together = max(shared_error, (float(((variance_P - shared_P) / counts_P).mean()) - shared) / prompts)
    visits = batch_size * within + pairs * shared + batch_size**2 * together

    left_out = 1 - rest / prompts
    deviation_P = mean_P - mean_P.mean()
    between = float(mean_P.var(ddof=1)) if prompts > 1 else 0.0
    variance = visits + rest * left_out * between
    # Errors shared by visits make a sum more skewed, as in a negative binomial or beta-binomial: `excess` is their
    # variance over that of independent visits.
    excess = visits / (batch_size * within) if within > 0 else 1.0
    third = batch_size * float(skew_P.mean()) * excess * (2 * excess - 1) + rest * left_out * float(
        ((2 * left_out - 1) * deviation_P**3 + 3 * deviation_P * variance_P).mean()
    )
    return Expectation(
        mean=float(mean_P.mean()),
        sd=variance**0.5 / batch_size,
        lowest=lowest,
        highest=highest,
        skewness=third / variance**1.5 if variance > 0 else 0.0,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class FreshRewards:
    """The distribution of further rewards of each prompt, given its own and all prompts' rewards.

    `moments_P` is E[rᵏ], k = 0 … 6, shape (7, P). `correlation_P` is the correlation of two further rewards of a
    prompt, which are drawn from the same unknown distribution. For rewards of 0 and 1 the loss has the same
    correlation, and it is used for other rewards too. `rates_RG` are the groups' success probabilities from resampled
    prompts; `group_P` is a prompt's group.
    """

    moments_P: Floats
    correlation_P: Floats
    rates_RG: Floats
    group_P: NDArray[np.int64]

    def of(self, kept_P: NDArray[np.bool_]) -> "FreshRewards":
        """Some of the prompts."""
        return FreshRewards(
            moments_P=self.moments_P[:, kept_P],
            correlation_P=self.correlation_P[kept_P],
            rates_RG=self.rates_RG,
            group_P=self.group_P[kept_P],
        )

    def shared_error(self, slope_P: Floats) -> float:
        """The variance over the resamples of the prompts' mean of slope · success probability."""
        slope_G = np.bincount(self.group_P, slope_P, self.rates_RG.shape[1]) / len(slope_P)
        return float((self.rates_RG @ slope_G).var(ddof=1))


def fresh_rewards(rewards_S: Floats, counts_P: NDArray[np.int64]) -> FreshRewards:
    """Predict further rewards of each prompt from the rewards of all prompts."""
    starts_P = np.concatenate([[0], np.cumsum(counts_P)[:-1]])
    powers_K = np.arange(7)[:, None]
    if np.isin(rewards_S, (0.0, 1.0)).all():
        successes_P = np.add.reduceat(rewards_S, starts_P).astype(np.int64)
        rate_P, variance_P, rates_RG, group_P = _success_probability(successes_P, counts_P)
        moments_P = np.where(powers_K == 0, 1.0, rate_P)
        correlation_P = variance_P / np.maximum(rate_P * (1 - rate_P), np.finfo(np.float64).tiny)
    else:
        own_P = np.add.reduceat(rewards_S, starts_P) / counts_P
        weight_P = _credibility(rewards_S, own_P, counts_P)
        moments_P = np.stack(
            [
                weight_P * np.add.reduceat(rewards_S**power, starts_P) / counts_P
                + (1 - weight_P) * (rewards_S**power).mean()
                for power in range(7)
            ]
        )
        # The mean's posterior variance is Z / N times the variance within the prompt.
        correlation_P = weight_P / (counts_P + weight_P)
        rates_RG, group_P = np.zeros((RESAMPLES, 1)), np.zeros(len(counts_P), np.int64)
    ends_K = np.mean(np.array(reward_range(rewards_S)) ** powers_K, axis=1, keepdims=True)
    samples = len(rewards_S)
    return FreshRewards(
        moments_P=(samples * moments_P + ends_K) / (samples + 1),
        correlation_P=correlation_P,
        rates_RG=rates_RG,
        group_P=group_P,
    )


def _moment_about(centre_P: Floats, moments_P: Floats, power: int) -> Floats:
    """E[(r − centre)^power] from E[rᵏ], k = 0 … power."""
    terms_P = [comb(power, k) * moments_P[k] * (-centre_P) ** (power - k) for k in range(power + 1)]
    return np.asarray(np.sum(terms_P, axis=0), dtype=np.float64)


def _success_probability(
    successes_P: NDArray[np.int64], trials_P: NDArray[np.int64]
) -> tuple[Floats, Floats, Floats, NDArray[np.int64]]:
    """Each prompt's posterior mean and variance under the maximum-likelihood prior on the grid.

    Also returns the posterior means of the groups under the priors from resampled prompts, and each prompt's group.
    """
    width = int(trials_P.max()) + 1
    codes_G, group_P, prompts_G = np.unique(
        successes_P * width + trials_P, return_inverse=True, return_counts=True
    )
    successes_G, trials_G = codes_G // width, codes_G % width
    # The grid is densest at 0 and 1, where the binomial distribution is narrowest.
    grid_Q = np.sin(np.linspace(0, np.pi / 2, GRID_POINTS)) ** 2
    from scipy.special import xlog1py, xlogy

    log_likelihood_GQ = xlogy(successes_G[:, None], grid_Q) + xlog1py(
        (trials_G - successes_G)[:, None], -grid_Q
    )
    likelihood_GQ = np.exp(log_likelihood_GQ - log_likelihood_GQ.max(axis=1, keepdims=True))
    share_G = prompts_G / prompts_G.sum()
    shares_RG = np.random.default_rng(0).multinomial(len(trials_P), share_G, RESAMPLES) / len(trials_P)
    # The prompts themselves come first, then the resamples.
    shares_RG = np.concatenate([share_G[None], shares_RG])
    priors_RQ = np.full((len(shares_RG), GRID_POINTS), 1 / GRID_POINTS)
    for _ in range(EM_STEPS):
        priors_RQ *= (shares_RG / (priors_RQ @ likelihood_GQ.T)) @ likelihood_GQ
    totals_RG = priors_RQ @ likelihood_GQ.T
    rates_RG = (priors_RQ * grid_Q) @ likelihood_GQ.T / totals_RG
    mean_G, prior_Q = rates_RG[0], priors_RQ[0]
    variance_G = ((likelihood_GQ * (grid_Q - mean_G[:, None]) ** 2) @ prior_Q) / totals_RG[0]
    return mean_G[group_P], variance_G[group_P], rates_RG[1:], group_P


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
