"""What stage 2's first batch will show, from stage 1's rewards: `forecast` prints it, `train` checks itself by it.

In the first iteration π = π_ref, so that the regression loss is the mean of (r − V̂*)² over a batch, with a fresh r
from the very distribution that stage 1 sampled. The cached rewards are not fresh in that formula, for two reasons:
V̂* was computed from them, and a filter may have kept a prompt for them. Both make the plain average over them wrong.
What is right is the distribution of a *further* reward given a prompt's N own, which neither can disturb. It is the
mixture Z · own rewards + (1 − Z) · all prompts' rewards, with Z = N / (N + concentration):

- rewards of 0 and 1: the posterior under the beta prior of pass rates that makes all cached rewards likeliest, whose
  concentration is a + b (common/beta_binomial.py);
- any other rewards: credibility (Bühlmann 1967), the best linear predictor; the concentration is the variance within
  prompts over that between them.

A file of M samples that all are 1 does not prove that no other reward is possible: half a sample of the least and half
of the greatest possible reward are added to the whole file (for 0/1 rewards Jeffreys' prior of the mean rate).

Shapes: _P prompt, _S sample (all prompts' samples, one after the other), _K power, from 0 on.
"""

from dataclasses import dataclass
from math import comb

import numpy as np
import polars as pl

from common.beta_binomial import fit_prior_to_rewards
from common.value import Counts, Floats, Ragged, reward_range
from stage2_train.config import TrainConfig

LEVEL = 0.95
"""Of the intervals that are shown."""
ALARM_LEVEL = 0.999
"""Of the intervals outside which training warns: of each figure, an honest run does so about once in a thousand."""

MISFIT = 0.015
"""The correlation of what two prompts' means are off by, because means need not be distributed as is assumed.
docs/forecast.md has how often honest runs are warned of with it."""
PARAMETERS = 2
"""Of the distribution of the prompts' means: estimates from few prompts are off for all of them together."""
_ROUNDING = 1e-5
"""Training computes in float32."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Expectation:
    """A figure before it is known: mean, standard deviation, skewness, and the range that it cannot leave."""

    mean: float
    sd: float
    lowest: float
    highest: float
    skewness: float = 0.0

    def interval(self, level: float = LEVEL) -> tuple[float, float]:
        """The central interval of the gamma distribution with these three moments, cut to the possible range.

        Shifted, and mirrored for a negative skewness (Pearson's type III); the normal one for a skewness of 0. A count
        of rare events is skewed: a normal interval of the mean 0.1 would end at 1.1, and 2 of them come once in 200.
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


def expected_first_batch(rows: pl.DataFrame, train: TrainConfig) -> FirstBatch | None:
    """`first_batch` of a run, where its loss is (r − V̂*)² at first and each completion is of another prompt."""
    if "vstar" not in train.columns or train.objective.group_size > 1:
        return None
    return first_batch(rows, train.batch_size)


def first_batch(rows: pl.DataFrame, batch_size: int) -> FirstBatch | None:
    """What the rows of vstar.parquet say of a batch of `batch_size` kept prompts with a fresh completion each.

    Dropped prompts take part in the estimate of how prompts differ. None where no prompt has two samples: nothing then
    tells how much of the rewards' variance lies within a prompt.
    """
    counts_P = rows["rewards"].list.len().to_numpy().astype(np.int64)
    if counts_P.max() < 2:
        return None
    rewards_S = rows["rewards"].explode().to_numpy()
    kept_P, vstar_P = rows["keep"].to_numpy(), rows.filter("keep")["vstar"].to_numpy()
    moments_KP, correlation_P = further_rewards(rewards_S, counts_P)
    moments_KP, correlation_P, counts_P = moments_KP[:, kept_P], correlation_P[kept_P], counts_P[kept_P]
    losses_KP = np.stack([_moment_about(vstar_P, moments_KP, power) for power in (2, 4, 6)])
    lowest, highest = reward_range(rewards_S)

    def expected(moments_KP: Floats, lowest: float, highest: float) -> Expectation:
        return batch_mean(moments_KP, correlation_P, counts_P, batch_size, lowest, highest)

    return FirstBatch(
        loss=expected(losses_KP, 0.0, float("inf")), reward=expected(moments_KP[1:4], lowest, highest)
    )


def batch_mean(
    moments_KP: Floats,
    correlation_P: Floats,
    counts_P: Counts,
    batch_size: int,
    lowest: float,
    highest: float,
) -> Expectation:
    """The mean over a batch of a figure with these moments E[xᵏ], k = 1 … 3, in each prompt.

    The batch is what training takes: so many whole passes over the prompts, which all are in every batch, and the rest
    drawn without replacement, whose variance over the prompts shrinks by the share of prompts that it holds.

    A prompt's mean is known from its `counts_P` samples only, and what it is off by is the same at each visit:
    `correlation_P` is that part of the figure's variance, so that v visits have v + v (v − 1) · correlation times the
    variance of one. All prompts' means can be off together too, by MISFIT and PARAMETERS of that part, or by more where
    the mean over the prompts would else be known better than from its own samples, which give it to (variance given
    the prompt) / (N · prompts).
    """
    prompts = len(correlation_P)
    passes, rest = divmod(batch_size, prompts)
    mean_P, second_P, third_P = moments_KP
    variance_P = np.maximum(second_P - mean_P**2, 0.0)
    skew_P = third_P - 3 * second_P * mean_P + 2 * mean_P**3
    shared_P = correlation_P * variance_P
    within, shared = float(variance_P.mean()), float(shared_P.mean())
    pairs = passes * (passes - 1) * prompts + 2 * passes * rest
    from_samples = (float(((variance_P - shared_P) / counts_P).mean()) - shared) / prompts
    together = max(shared * (MISFIT + PARAMETERS / prompts), from_samples)
    visits = batch_size * within + pairs * shared + batch_size**2 * together

    left_out = 1 - rest / prompts
    deviation_P = mean_P - mean_P.mean()
    between = float(mean_P.var(ddof=1)) if prompts > 1 else 0.0
    variance = visits + rest * left_out * between
    # Errors that visits share make a sum more skewed as they do a negative binomial's or beta-binomial's: `excess` is
    # their variance over that of independent visits.
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


def further_rewards(rewards_S: Floats, counts_P: Counts) -> tuple[Floats, Floats]:
    """What the rewards of all prompts tell of further ones of each: E[rᵏ], k = 0 … 6, and their correlation.

    Two further rewards of a prompt are drawn from the same unknown distribution, which correlates them. The loss has
    the same correlation where the reward is 0 or 1, and it is taken for any.
    """
    samples, powers_K = Ragged(counts_P), np.arange(7)[:, None]
    own_KP = np.stack([samples.mean(rewards_S**power) for power in range(7)])
    if np.isin(rewards_S, (0.0, 1.0)).all():
        prior = fit_prior_to_rewards(rewards_S, counts_P)
        everyone_K, concentration = np.where(powers_K == 0, 1.0, prior.mean), prior.a + prior.b
    else:
        everyone_K = np.array([[(rewards_S**power).mean()] for power in range(7)])
        concentration = _concentration(rewards_S, own_KP[1], counts_P)
    weight_P = counts_P / (counts_P + concentration)
    moments_KP = weight_P * own_KP + (1 - weight_P) * everyone_K
    ends_K = np.mean(np.array(reward_range(rewards_S)) ** powers_K, axis=1, keepdims=True)
    return (len(rewards_S) * moments_KP + ends_K) / (len(rewards_S) + 1), 1 / (counts_P + concentration + 1)


def _moment_about(centre_P: Floats, moments_KP: Floats, power: int) -> Floats:
    """E[(r − centre)^power] from E[rᵏ], k = 0 … power."""
    terms_P = [comb(power, k) * moments_KP[k] * (-centre_P) ** (power - k) for k in range(power + 1)]
    return np.asarray(np.sum(terms_P, axis=0), dtype=np.float64)


def _concentration(rewards_S: Floats, own_P: Floats, counts_P: Counts) -> float:
    """The variance within prompts over that between them, both from the analysis of variance over all prompts."""
    samples, prompts = len(rewards_S), len(counts_P)
    within = float(((rewards_S - np.repeat(own_P, counts_P)) ** 2).sum()) / (samples - prompts)
    scatter = float((counts_P * (own_P - rewards_S.mean()) ** 2).sum()) - (prompts - 1) * within
    spread = samples - float((counts_P.astype(np.float64) ** 2).sum()) / samples
    if within == 0:
        return 0.0
    return within * spread / scatter if scatter > 0 else float("inf")
