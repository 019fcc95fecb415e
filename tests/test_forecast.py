"""The forecast of training: the first batch's figures against simulated stages, memory against DeepSpeed's own.

Shapes: _P prompt, _N stage-1 sample, _A possible answer.
"""

import json
import math
import os
import struct
import subprocess
import sys
from collections.abc import Callable
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
from numpy.typing import NDArray

from common.demo.base_model import build_tokenizer
from common.errors import UserError
from common.terminal.console import Terminal
from common.value import estimate_vstar
from common.vstar_file import read_vstar, write_vstar
from stage2_train.config import Config
from stage2_train.first_batch import LEVEL, Expectation, batch_mean, first_batch, fresh_rewards
from stage2_train.forecast import completion_tokens, forecast
from stage2_train.memory import (
    Shape,
    host_memory,
    layer_activations,
    memory_per_gpu,
    model_states,
    read_shape,
)
from stage2_train.watchers import FirstBatchCheck, Turn
from tests import warm
from tests.conftest import RunCli
from tests.stage2_runs import as_toml, tiny_config, write_tiny_vstar

Floats = NDArray[np.float64]

ROOT = Path(__file__).parents[1]
PROMPTS, SAMPLES, BATCH = 1000, 8, 256
HAVE_DEFAULTS = ("num_key_value_heads", "intermediate_size")
QWEN = {
    "hidden_size": 1536,
    "num_hidden_layers": 28,
    "intermediate_size": 8960,
    "num_attention_heads": 12,
    "num_key_value_heads": 2,
    "vocab_size": 151936,
    "tie_word_embeddings": True,
    "model_type": "qwen2",
}


def artifact_rows(rewards_PN: Floats, *, beta1: float = 0.5, drop_unsolved: bool = False) -> pl.DataFrame:
    """The columns of vstar.parquet that a forecast of the first batch reads."""
    prompts, samples = rewards_PN.shape
    counts_P = np.full(prompts, samples)
    return pl.DataFrame(
        {
            "rewards": rewards_PN.tolist(),
            "vstar": estimate_vstar(rewards_PN.ravel(), counts_P, beta1).vstar_P,
            "keep": rewards_PN.any(axis=1) if drop_unsolved else np.full(prompts, True),
        }
    )


def batch_figures(rows: pl.DataFrame, rewards_P: Floats, rng: np.random.Generator) -> tuple[float, float]:
    """Loss and reward of a first batch: distinct kept prompts, a reward each of those given."""
    kept = rng.permutation(np.flatnonzero(rows["keep"].to_numpy()))[:BATCH]
    chosen_P = rewards_P[kept]
    return float(((chosen_P - rows["vstar"].to_numpy()[kept]) ** 2).mean()), float(chosen_P.mean())


def test_the_mean_of_a_batch_has_the_variance_of_drawing_without_replacement() -> None:
    # Means 0.2 and 0.4, variances 0.1 and 0.3, half of which two visits share: 0.05 and 0.15. The samples behind each
    # mean are so many that they leave no more than that unknown.
    moments_P = np.array([[0.2, 0.4], [0.1 + 0.04, 0.3 + 0.16], [0.0, 0.0]])
    correlation_P, counts_P = np.array([0.5, 0.5]), np.array([1000, 1000])

    def figure(size: int, shared_error: float) -> Expectation:
        return batch_mean(moments_P, correlation_P, counts_P, shared_error, size, 0.0, 1.0)

    # One prompt of two: 0.2 within, and the variance of the two means, 0.01. Both prompts: 0.2 / 2. Three places:
    # both, and one of them once more, a pair each way. Four: a pair each way for both prompts.
    for size, variance in {
        1: 0.2 + 0.01,
        2: 0.1,
        3: (3 * 0.2 + 2 * 0.1 + 0.01) / 9,
        4: 0.8 / 16 + 4 * 0.1 / 16,
    }.items():
        assert (figure(size, 0.0).mean, figure(size, 0.0).sd ** 2) == pytest.approx((0.3, variance))
        assert figure(size, 0.02).sd ** 2 == pytest.approx(variance + 0.02)


def test_a_mean_is_not_known_better_than_from_its_samples() -> None:
    """Two prompts of one probability, 10 samples each: p (1 − p) (1/B + 1/20), and the beta-binomial's skewness."""
    p, size = 0.1, 40
    same_P = np.full((3, 2), p)
    figure = batch_mean(same_P, np.zeros(2), np.array([10, 10]), 0.0, size, 0.0, 1.0)
    assert figure.sd**2 == pytest.approx(p * (1 - p) * (1 / size + 1 / 20))
    # Where the rate has a Beta distribution worth many samples; here 20 and a batch of 40, whose ratio is 2.
    assert figure.skewness * figure.sd**3 == pytest.approx(
        p * (1 - p) * (1 - 2 * p) * (1 + 2) * (1 + 4) / size**2
    )


def test_an_interval_is_normal_and_stays_within_what_is_possible() -> None:
    figure = Expectation(mean=0.9, sd=0.1, lowest=0.0, highest=1.0)
    assert figure.interval(0.95) == pytest.approx((0.9 - 0.196, 1.0), abs=1e-4)
    assert figure.excludes(0.9 - 0.34)
    assert not figure.excludes(0.9 - 0.32)


@pytest.mark.parametrize("sign", [1, -1])
def test_an_interval_of_a_skewed_figure_is_that_of_a_gamma_distribution(sign: int) -> None:
    """An exponential distribution, or its mirror image: mean 1, standard deviation 1, skewness 2."""
    figure = Expectation(mean=sign, sd=1.0, lowest=-9.0, highest=9.0, skewness=2.0 * sign)
    bounds = (-np.log(0.975), -np.log(0.025))
    assert figure.interval(0.95) == pytest.approx(sorted(sign * bound for bound in bounds))
    nearly = Expectation(mean=0.0, sd=1.0, lowest=-9.0, highest=9.0, skewness=0.0011 * sign)
    assert nearly.interval(0.95) == pytest.approx((-1.96, 1.96), abs=1e-3)


def test_rewards_that_are_all_alike_leave_other_rewards_possible() -> None:
    """256 prompts × 8, all right: the mean is (2,048 + ½) / 2,049, and a wrong completion in 128 is no surprise.

    Within 1e-4: EM nears the point 1 slowly.
    """
    expected = first_batch(artifact_rows(np.ones((256, 8))), 128)
    assert expected is not None
    assert expected.reward.mean == pytest.approx(2048.5 / 2049, abs=1e-4)
    assert expected.reward.mean < 2048.6 / 2049
    assert (expected.reward.lowest, expected.reward.highest) == (0.0, 1.0)
    assert expected.warning(1 / 128, 127 / 128) is None
    warning = expected.warning(6 / 128, 122 / 128)
    assert warning is not None
    assert "reward 0.9531 is outside" in warning


def test_rewards_between_the_two_extremes_are_weighted_by_credibility() -> None:
    # Within variance 2, between variance 7: Z = 2 · 7 / (2 · 7 + 2) = 0.875. Four samples, and half a sample of each
    # end of the range of 0 to 6.
    fresh = fresh_rewards(np.array([0.0, 2.0, 4.0, 6.0]), np.array([2, 2]))
    first_P = np.array([0.875 * 1 + 0.125 * 3, 0.875 * 5 + 0.125 * 3])
    second_P = np.array([0.875 * 2 + 0.125 * 14, 0.875 * 26 + 0.125 * 14])
    assert fresh.moments_P[1] == pytest.approx((4 * first_P + 3) / 5)
    assert fresh.moments_P[2] == pytest.approx((4 * second_P + 18) / 5)
    # Posterior variance of the mean 7 (1 − Z), of that and 2 within.
    assert fresh.correlation_P == pytest.approx(0.875 / (2 + 0.875))


def test_the_loss_counts_that_vstar_was_made_of_the_same_rewards() -> None:
    """Prompts of probability 1/2, two samples each, V̂* their mean: σ² (1 + 1/N) = 0.375, not σ² (1 − 1/N) = 0.125.

    Within 3 %: EM nears a distribution that is one point slowly.
    """
    rewards_PN = np.array([[0.0, 0.0], [0.0, 1.0], [1.0, 0.0], [1.0, 1.0]] * 50)
    rows = artifact_rows(rewards_PN, beta1=np.inf)
    assert ((rewards_PN - rewards_PN.mean(axis=1, keepdims=True)) ** 2).mean() == 0.125
    expected = first_batch(rows, 20)
    assert expected is not None
    assert expected.loss.mean == pytest.approx(0.375, rel=0.03)
    assert expected.reward.mean == pytest.approx(0.5, rel=1e-3)
    # The batch is 20 rewards, and what is known of the one probability comes from 400.
    assert expected.reward.sd == pytest.approx((0.25 / 20 + 0.25 / 400) ** 0.5, rel=0.02)


PRIORS: dict[str, Callable[[np.random.Generator], Floats]] = {
    "all probabilities alike": lambda rng: rng.random(PROMPTS),
    "never or now and then": lambda rng: rng.choice([0.0, 0.1, 0.5], PROMPTS),
    "half always": lambda rng: np.where(rng.random(PROMPTS) < 0.5, 1.0, rng.beta(1, 3, PROMPTS)),
}


def share_covered(
    draw: Callable[[np.random.Generator], tuple[Floats, Callable[[], Floats]]],
    *,
    beta1: float,
    drop_unsolved: bool,
) -> tuple[Floats, float]:
    """How often the two intervals hold, and how often training would warn: 40 first stages, eight first batches each.

    `draw` gives a first stage's rewards, and what draws a further reward of each prompt.
    """
    rng, stages, batches = np.random.default_rng(0), 40, 8
    covered, alarms = np.zeros(2), 0
    for _ in range(stages):
        rewards_PN, fresh_rewards = draw(rng)
        rows = artifact_rows(rewards_PN, beta1=beta1, drop_unsolved=drop_unsolved)
        expected = first_batch(rows, BATCH)
        assert expected is not None
        for _ in range(batches):
            found = batch_figures(rows, fresh_rewards(), rng)
            bounds = (expected.loss.interval(LEVEL), expected.reward.interval(LEVEL))
            covered += [low <= value <= high for (low, high), value in zip(bounds, found, strict=True)]
            alarms += expected.warning(*found) is not None
    return covered / (stages * batches), alarms / (stages * batches)


@pytest.mark.parametrize("drop_unsolved", [False, True], ids=["all prompts", "solved prompts"])
@pytest.mark.parametrize("prior", PRIORS)
def test_the_intervals_cover_simulated_first_batches(prior: str, drop_unsolved: bool) -> None:
    def draw(rng: np.random.Generator) -> tuple[Floats, Callable[[], Floats]]:
        solved_P = PRIORS[prior](rng)
        rewards_PN = np.where(rng.random((PROMPTS, SAMPLES)) < solved_P[:, None], 1.0, 0.0)
        return rewards_PN, lambda: np.where(rng.random(PROMPTS) < solved_P, 1.0, 0.0)

    covered, alarms = share_covered(draw, beta1=0.5, drop_unsolved=drop_unsolved)
    assert covered == pytest.approx(0.95, abs=0.035)
    assert alarms <= 0.01


HONEST: dict[str, tuple[Callable[[np.random.Generator, int], Floats], int, int, int, bool]] = {
    "16 prompts, batch 256, N 8": (lambda rng, count: rng.random(count), 16, 256, 8, False),
    "128 prompts, batch 512, N 2": (lambda rng, count: rng.random(count), 128, 512, 2, False),
    "64 prompts, batch 1024, N 4": (lambda rng, count: rng.random(count), 64, 1024, 4, False),
    "alike, 64 prompts, batch 1024, N 4": (lambda _, count: np.full(count, 0.3), 64, 1024, 4, False),
    "solved, 300 prompts, batch 1024, N 4": (
        lambda rng, count: rng.choice([0.0, 0.1, 0.5], count),
        300,
        1024,
        4,
        True,
    ),
    "p 0.999, 256 prompts, batch 128, N 8": (lambda _, count: np.full(count, 0.999), 256, 128, 8, False),
    "p 0.01, 1024 prompts, batch 256, N 8": (lambda _, count: np.full(count, 0.01), 1024, 256, 8, False),
}


def honest_first_batches(case: str, stages: int, batches: int) -> tuple[Floats, Floats]:
    """How often loss and reward are within their 95 % intervals, and outside those where training warns."""
    draw, prompts, size, samples, drop_unsolved = HONEST[case]
    rng, covered, alarms = np.random.default_rng(0), np.zeros(2), np.zeros(2)
    for _ in range(stages):
        solved_P = draw(rng, prompts)
        rewards_PN = np.where(rng.random((prompts, samples)) < solved_P[:, None], 1.0, 0.0)
        rows = artifact_rows(rewards_PN, drop_unsolved=drop_unsolved)
        expected = first_batch(rows, size)
        assert expected is not None
        kept, vstar_P = np.flatnonzero(rows["keep"].to_numpy()), rows["vstar"].to_numpy()
        passes, rest = divmod(size, len(kept))
        for _ in range(batches):
            visited_B = np.concatenate([np.tile(kept, passes), rng.permutation(kept)[:rest]])
            rewards_B = np.where(rng.random(size) < solved_P[visited_B], 1.0, 0.0)
            found = (float(((rewards_B - vstar_P[visited_B]) ** 2).mean()), float(rewards_B.mean()))
            for which, figure in enumerate((expected.loss, expected.reward)):
                low, high = figure.interval(LEVEL)
                covered[which] += low <= found[which] <= high
                alarms[which] += figure.excludes(found[which])
    return covered / (stages * batches), alarms / (stages * batches)


@pytest.mark.parametrize("case", HONEST)
def test_honest_runs_are_warned_of_about_once_in_a_thousand(case: str) -> None:
    """More visits than prompts, and rates near 0 or 1. docs/forecast.md has the shares over 500 stages."""
    covered, alarms = honest_first_batches(case, stages=100, batches=50)
    assert all(covered >= 0.925)
    assert all(alarms <= 0.004)


def test_the_intervals_of_real_valued_rewards_hold_where_prompts_are_visited_again() -> None:
    rng, outside, alarms, stages = np.random.default_rng(0), np.zeros(2), 0, 300
    for _ in range(stages):
        mean_P = rng.normal(0, 1, 64)
        rows = artifact_rows(mean_P[:, None] + rng.normal(0, 1, (64, 4)), beta1=2.0)
        expected = first_batch(rows, 1024)
        assert expected is not None
        rewards_B = np.tile(mean_P, 16) + rng.normal(0, 1, 1024)
        found = (
            float(((rewards_B - np.tile(rows["vstar"].to_numpy(), 16)) ** 2).mean()),
            float(rewards_B.mean()),
        )
        alarms += expected.warning(*found) is not None
        for which, figure in enumerate((expected.loss, expected.reward)):
            low, high = figure.interval(LEVEL)
            outside[which] += not low <= found[which] <= high
    assert all(outside / stages <= 0.08)
    assert alarms <= 3


def test_the_intervals_of_real_valued_rewards_are_not_too_narrow() -> None:
    def draw(rng: np.random.Generator) -> tuple[Floats, Callable[[], Floats]]:
        mean_P = rng.normal(0, 1, PROMPTS)
        return mean_P[:, None] + rng.normal(
            0, 1, (PROMPTS, SAMPLES)
        ), lambda: mean_P + rng.normal(0, 1, PROMPTS)

    covered, alarms = share_covered(draw, beta1=2.0, drop_unsolved=False)
    assert all(covered >= 0.915)
    assert alarms <= 0.01


def simulated_training(
    *, temperature: float = 1.0, also_accepts: int = 0, seed: int = 0
) -> tuple[str, dict[str, Any]]:
    """Two iterations of a simulated policy; returns what it printed and the first one's metrics.

    Completions are one of five answers, the first one right. Stage 1 sampled at temperature 1; stage 2 may sample at
    another, and its grader may take wrong answers for right ones.
    """
    rng = np.random.default_rng(seed)
    logits_PA = rng.normal(0, 2, (PROMPTS, 5))

    def rewards(temperature: float, right: int) -> Floats:
        gumbel_PA = rng.gumbel(size=(PROMPTS, 5))
        answer_P = (logits_PA / temperature + gumbel_PA).argmax(axis=1)
        return np.where(answer_P < right, 1.0, 0.0)

    rows = artifact_rows(np.stack([rewards(1.0, 1) for _ in range(SAMPLES)], axis=1), drop_unsolved=True)

    expected = first_batch(rows, BATCH)
    assert expected is not None
    printed = StringIO()
    check = FirstBatchCheck(expected, Terminal(file=printed, width=80))
    turns = []
    for number in (1, 2):
        loss, reward = batch_figures(rows, rewards(temperature, 1 + also_accepts), rng)
        metrics = {"loss/regression": loss, "reward/mean": reward}
        turns.append(Turn(number=number, metrics=metrics, rollouts=[], is_last=number == 2))
        check.after(turns[-1])
    first, second = turns
    assert not any(name.startswith("forecast/") for name in second.metrics)
    return printed.getvalue(), first.metrics


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_training_warns_of_a_first_iteration_that_stage_1_does_not_explain() -> None:
    for seed in range(5):
        printed, metrics = simulated_training(seed=seed)
        assert "warning" not in printed
        assert metrics["forecast/loss_low"] < metrics["loss/regression"] < metrics["forecast/loss_high"]
        assert metrics["forecast/reward_low"] < metrics["reward/mean"] < metrics["forecast/reward_high"]
    for fault in ({"temperature": 3.0}, {"also_accepts": 1}):
        printed, metrics = simulated_training(**fault)
        warnings = [line for line in printed.splitlines() if line.startswith("warning:")]
        assert len(warnings) == 1
        assert (
            f"reward {metrics['reward/mean']:.4g} is outside {metrics['forecast/reward_low']:.4g} to"
            in warnings[0]
        )


def test_one_sample_a_prompt_tells_nothing_of_the_first_batch() -> None:
    assert first_batch(artifact_rows(np.ones((4, 1))), 2) is None


def test_tokens_are_those_of_the_kept_prompts_completions() -> None:
    kept = pl.DataFrame({"completion_tokens": [[10, 20], [40, 50]]})
    figure = completion_tokens(kept, 100)
    assert figure.mean == 100 * 30
    # Variance 50 within a prompt, of the completions to come and of the mean of the two prompts' means.
    assert figure.sd**2 == pytest.approx(100 * 50 + 100**2 * 50 * (1 / 2 + 1 / 2) / 4)


def qwen_folder(folder: Path) -> Path:
    """Qwen2.5-1.5B without its weights: the config, and a weight file that has a hole after its header."""
    hidden, keys, wide = 1536, 256, 8960
    shapes = {"model.embed_tokens.weight": [151936, hidden], "model.norm.weight": [hidden]}
    for layer in range(28):
        parts = {
            "q.weight": [hidden, hidden],
            "q.bias": [hidden],
            "k.weight": [keys, hidden],
            "k.bias": [keys],
            "v.weight": [keys, hidden],
            "v.bias": [keys],
            "o.weight": [hidden, hidden],
            "gate": [wide, hidden],
            "up": [wide, hidden],
            "down": [hidden, wide],
            "norm_1": [hidden],
            "norm_2": [hidden],
        }
        shapes |= {f"model.layers.{layer}.{name}": shape for name, shape in parts.items()}
    shapes["lm_head.weight"] = [151936, hidden]  # some checkpoints store the tied matrix twice
    ends = np.cumsum([2 * math.prod(shape) for shape in shapes.values()]).tolist()
    tensors = {
        name: {"dtype": "BF16", "shape": shape, "data_offsets": [start, end]}
        for (name, shape), start, end in zip(shapes.items(), [0, *ends], ends, strict=False)
    }
    header = json.dumps({"__metadata__": {}, **tensors})
    with (folder / "model.safetensors").open("wb") as file:
        file.write(struct.pack("<Q", len(header)) + header.encode())
        file.truncate(file.tell() + ends[-1])
    (folder / "config.json").write_text(json.dumps(QWEN), encoding="utf-8")
    return folder


def with_dtype(config: Config, dtype: str) -> Config:
    return config.model_copy(update={"model": config.model.model_copy(update={"dtype": dtype})})


def bfloat16_config(folder: Path, **train: Any) -> Config:
    config = tiny_config(folder, folder, train=train, sampling={"max_completion_tokens": 1024})
    return with_dtype(config, "bfloat16")


def test_memory_of_qwen2_5_1_5b_by_hand(tmp_path: Path) -> None:
    shape = read_shape(qwen_folder(tmp_path))
    assert shape.parameters == 1_543_714_304
    config = bfloat16_config(tmp_path, zero_stage=2, tokens_per_micro_batch=16384)
    memory = memory_per_gpu(shape, config, gpus=4, gpu_bytes=80 * 2**30)
    share = 1_543_714_304 // 4
    assert memory["held"] == {
        "parameters": 8 * share,
        "gradients": 2 * share,
        "float32 copy of the parameters": 4 * share,
        "AdamW's moments": 8 * share,
        "reference model": 8 * share,
        "vLLM's share": 32 * 2**30,
    }
    # A layer: 4 × 8,960, and 2 × 1,536 for queries and output, 2 × 256 for keys and values, two bytes each; two norms
    # of 8 × 1,536; 14 statistics of four bytes. Each layer's input is kept, and one layer computed again.
    layer = 2 * (4 * 8960 + 2 * 1536 + 2 * 256) + 2 * 8 * 1536 + 4 * 14
    assert layer_activations(shape, config) == layer == 103_480
    assert memory["backward"] == {
        "activations": 16384 * (28 * 2 * 1536 + layer + 6 * 1536),
        "logits": 2 * 2**26 + 2 * 4 * 2**22,
        "output layer's gradient": (2 * 151936 + 4 * 16384) * 1536,
        "DeepSpeed's bucket": 2 * 500_000_000,
    }
    assert memory["step"] == {"gradients in float32": 4 * share}
    assert memory["total"] == sum(memory["held"].values()) + sum(memory["backward"].values())
    assert memory["fits"]
    assert not memory_per_gpu(shape, config, gpus=1, gpu_bytes=40 * 2**30)["fits"]
    kept_whole = bfloat16_config(tmp_path, gradient_checkpointing=False, tokens_per_micro_batch=16384)
    activations = memory_per_gpu(shape, kept_whole, gpus=4, gpu_bytes=80 * 2**30)["backward"]["activations"]
    assert activations == 16384 * (28 * layer + 6 * 1536)


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_each_zero_stage_shares_out_what_it_says(stage: int, tmp_path: Path) -> None:
    shape = Shape(
        parameters=1000, hidden=8, layers=1, intermediate=8, heads=1, queries=8, keys=8, vocabulary=8
    )
    states = model_states(shape, bfloat16_config(tmp_path, zero_stage=stage), gpus=4)
    shared = {"float32 copy of the parameters": 1, "AdamW's moments": 1, "gradients": 2, "parameters": 3}
    alone = model_states(shape, bfloat16_config(tmp_path, zero_stage=stage), gpus=1)
    assert states == {name: size // 4 if stage >= shared[name] else size for name, size in alone.items()}


def test_under_zero_3_several_gpus_share_the_reference_model(tmp_path: Path) -> None:
    shape = read_shape(qwen_folder(tmp_path))
    weights = 2 * shape.parameters

    def memory(gpus: int, **train: Any) -> dict[str, Any]:
        config = bfloat16_config(tmp_path, zero_stage=3, **train)
        return memory_per_gpu(shape, config, gpus=gpus, gpu_bytes=80 * 2**30)

    assert memory(4)["held"]["reference model"] == weights // 4
    assert memory(1)["held"]["reference model"] == weights
    offloaded, alone = (memory(gpus, offload_reference=True) for gpus in (4, 1))
    assert "reference model" not in offloaded["held"]
    assert offloaded["host"] == {"reference model": weights // 4}
    assert offloaded["reference"] == {"gathered parameters": 2 * 1_000_000_000}
    assert (alone["host"], alone["reference"]) == ({"reference model": weights},) * 2


def test_an_adapter_and_offloading_leave_a_gpu_little_to_hold(tmp_path: Path) -> None:
    """Qwen2.5-1.5B: rank 16 beside 2 × (1,536 + 1,536), 2 × (1,536 + 256) and 3 × (1,536 + 8,960) of 28 layers."""
    qwen_folder(tmp_path)
    shape = read_shape(tmp_path)
    weights = 2 * shape.parameters
    engine = {"vLLM's share": 32 * 2**30}

    def memory(**train: Any) -> dict[str, Any]:
        return memory_per_gpu(shape, bfloat16_config(tmp_path, **train), gpus=1, gpu_bytes=80 * 2**30)

    adapter = memory(lora={"rank": 16})
    trained = 28 * 16 * (2 * 3072 + 2 * 1792 + 3 * 10496)
    assert adapter["trained_parameters"] == trained == 18_464_768
    assert adapter["held"] == {
        "parameters": weights,
        "adapter": 2 * trained,
        "gradients": 2 * trained,
        "float32 copy of the parameters": 4 * trained,
        "AdamW's moments": 8 * trained,
        **engine,
    }
    assert adapter["backward"]["output layer's gradient"] == 4 * adapter["micro_batch_tokens"] * 1536
    assert adapter["host"] == {}
    offloaded = memory(offload_optimizer=True, offload_reference=True)
    largest = 2 * 151936 * 1536
    assert offloaded["held"] == {
        "parameters": weights,
        "gradients": 0,
        "a gradient on its way to the host": largest,
        **engine,
    }
    assert offloaded["reference"] == {"reference model": weights}
    assert offloaded["step"] == {}
    assert offloaded["host"] == {
        "reference model": weights,
        "float32 copy of the parameters": 2 * weights,
        "AdamW's moments": 4 * weights,
        "gradients in float32": 2 * weights,
        "gradients of earlier micro-batches": weights,
        "parameters on their way back": weights + largest,
    }
    config = bfloat16_config(tmp_path)
    section = config.engine.model_copy(update={"sleep_while_training": True})
    config = config.model_copy(update={"engine": section})
    asleep = memory_per_gpu(shape, config, gpus=1, gpu_bytes=80 * 2**30)
    assert asleep["rollout"] == engine
    assert asleep["held"] == {name: size for name, size in memory()["held"].items() if name not in engine}
    assert asleep["total"] == sum(asleep["held"].values()) + max(
        sum(asleep[moment].values()) for moment in ("rollout", "backward", "step")
    )
    with pytest.raises(UserError, match="no linear layers called lm_head before its output layer"):
        memory(lora={"target_modules": ["q_proj", "lm_head"]})


HELD: dict[str, tuple[str, dict[str, Any]]] = {
    **{
        f"ZeRO-{stage} in {dtype}": (dtype, {"zero_stage": stage})
        for dtype in ("float32", "bfloat16")
        for stage in range(int(dtype == "bfloat16"), 4)
    },
    **{
        f"ZeRO-{stage}, offloaded": ("bfloat16", {"zero_stage": stage, "offload_optimizer": True})
        for stage in (1, 2, 3)
    },
    "LoRA": ("bfloat16", {"lora": {"rank": 8}}),
    "LoRA, offloaded": ("float32", {"lora": {"rank": 8}, "offload_optimizer": True}),
}
"""The model's dtype and changes of [train]."""


def test_deepspeed_holds_the_bytes_that_are_forecast(tiny_model: Path, tmp_path: Path) -> None:
    job, output = tmp_path / "job.json", tmp_path / "bytes.json"
    job.write_text(json.dumps({"model": str(tiny_model), "cases": HELD, "output": str(output)}))
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = warm.run(["-m", "tests.train_memory", job], cwd=ROOT, env=environment, timeout=120)
    assert process.returncode == 0, process.stderr[-4000:]
    found = json.loads(output.read_text(encoding="utf-8"))
    shape = read_shape(tiny_model)
    for name, held in found["bytes"].items():
        dtype, change = HELD[name]
        config = with_dtype(bfloat16_config(tmp_path, **change), dtype)
        states = sum(model_states(shape, config, gpus=1).values())
        host = host_memory(shape, config, gpus=1)
        assert held == pytest.approx(states + sum(host.values()), rel=0.02), name
    from stage2_train import memory

    assert found["reduce_bucket_size"] == memory.BUCKET
    assert found["max_live_parameters"] == memory.LIVE_PARAMETERS
    assert found["sub_group_size"] == memory.STEP_GROUP
    assert found["logits_per_chunk"] == memory.LOGITS_PER_CHUNK
    assert found["logits_per_block"] == memory.LOGITS_PER_BLOCK


@pytest.mark.parametrize("lora", [None, {"rank": 8}])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_layer_keeps_the_bytes_that_are_forecast(
    dtype: str, lora: dict[str, int] | None, tmp_path: Path
) -> None:
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import Qwen2Config, Qwen2Model

    def kept(layers: int) -> int:
        settings: dict[str, Any] = {**QWEN, "vocab_size": 32, "hidden_size": 192, "intermediate_size": 320}
        model = Qwen2Model(Qwen2Config(**(settings | {"num_hidden_layers": layers}))).to(
            getattr(torch, dtype)
        )
        if lora:
            chosen = LoraConfig(r=lora["rank"], target_modules="all-linear")
            get_peft_model(model, chosen, autocast_adapter_dtype=False)
        weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
        storages: dict[int, torch.UntypedStorage] = {}

        def keep(tensor: torch.Tensor) -> torch.Tensor:
            storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            model.train()(torch.arange(24).reshape(2, 12), use_cache=False)
        return sum(storage.nbytes() for place, storage in storages.items() if place not in weights)

    config = with_dtype(bfloat16_config(tmp_path, lora=lora), dtype)
    shape = Shape(
        parameters=0, hidden=192, layers=0, intermediate=320, heads=12, queries=192, keys=32, vocabulary=32
    )
    assert (kept(3) - kept(2)) / 24 == pytest.approx(layer_activations(shape, config), rel=0.01)


@pytest.mark.filterwarnings("ignore:TF32 acceleration")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_output_layer_takes_the_bytes_that_are_forecast(
    dtype: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch
    from torch.profiler import ProfilerActivity, profile

    from stage2_train import logprobs, memory

    vocabulary, hidden, positions = 5000, 16, 800
    for module in (logprobs, memory):
        monkeypatch.setattr(module, "LOGITS_PER_CHUNK", 100 * vocabulary)
        monkeypatch.setattr(module, "LOGITS_PER_BLOCK", 2 * vocabulary)
    layer = torch.nn.Linear(hidden, vocabulary, bias=False).to(getattr(torch, dtype))
    head = logprobs.VocabularyHead(layer, 1.0)
    hidden_KH = torch.randn(positions, hidden, dtype=getattr(torch, dtype), requires_grad=True)
    without_scratch = torch.backends.mkldnn.flags(enabled=False)  # its own for products in bfloat16
    with without_scratch, profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        for _micro_batch in range(2):
            logprobs_K, _ = head(hidden_KH, torch.arange(positions))
            logprobs_K.sum().backward()
            hidden_KH.grad = None
    profiler.export_chrome_trace(str(tmp_path / "trace.json"))
    trace = json.loads((tmp_path / "trace.json").read_text(encoding="utf-8"))["traceEvents"]
    events = sorted((event for event in trace if event["name"] == "[memory]"), key=lambda event: event["ts"])
    peak = max(np.cumsum([event["args"]["Bytes"] for event in events]))
    shape = Shape(
        parameters=layer.weight.numel(),
        hidden=hidden,
        layers=0,
        intermediate=0,
        heads=0,
        queries=0,
        keys=0,
        vocabulary=vocabulary,
    )
    config = with_dtype(bfloat16_config(tmp_path, zero_stage=1), dtype)
    figures = memory_per_gpu(shape, config, gpus=1, gpu_bytes=0)
    parts = figures["backward"]
    forecast = parts["logits"] + parts["output layer's gradient"]
    assert peak == pytest.approx(forecast + figures["held"]["gradients"], rel=0.05)


def test_the_command_prints_what_training_will_do(tiny_model: Path, tmp_path: Path, run_cli: RunCli) -> None:
    config = tiny_config(tmp_path, tiny_model, train={"iterations": None, "epochs": 5})
    (tmp_path / "run.toml").write_text(as_toml(config), encoding="utf-8")
    vstar = tmp_path / "vstar.parquet"
    write_tiny_vstar(config, vstar)
    rows, provenance = read_vstar(vstar)
    write_vstar(rows.with_columns(pl.col("pass_at_n").alias("keep")), provenance, vstar)
    arguments = ("forecast", "--config", tmp_path / "run.toml", "--vstar", vstar, "--gpus", "2")
    printed = run_cli(*arguments, "--json")
    assert printed.returncode == 0, printed.stderr
    figures = json.loads(printed.stdout)
    # 24 of 32 prompts five times each are 120 completions, 7 batches of 16 in two steps.
    assert (figures["prompts"], figures["kept"]) == (32, 24)
    assert (figures["iterations"], figures["optimizer_steps"]) == (7, 14)
    assert figures["visits_a_prompt"] == {"least": 4, "most": 5}
    assert figures["saved_by_filter"] == {"prompts": 0.25, "completion_tokens": 0.25}
    assert figures["tokens"]["sampled"] == {"mean": 560, "interval_95": [560, 560]}
    # By the tokenizer that the folder holds: for a Qwen2 of other make transformers would put its own in its place.
    texts = rows.filter("pass_at_n")["prompt"].to_list()
    prompt_tokens = sum(len(ids) for ids in build_tokenizer()(texts).input_ids) / 24
    assert figures["tokens"]["trained"]["mean"] == pytest.approx(112 * (prompt_tokens + 5))
    expected = first_batch(read_vstar(vstar)[0], 16)
    assert expected is not None
    assert figures["first_iteration"]["loss"]["mean"] == pytest.approx(expected.loss.mean)
    assert figures["first_iteration"]["reward"]["interval_95"] == pytest.approx(expected.reward.interval())
    table = run_cli(*arguments)
    assert table.returncode == 0, table.stderr
    for text in (
        "24 kept of 32",
        "7, 14 optimizer steps",
        "4 or 5 times",
        "DeepSpeed's bucket",
        "fits in 80 GiB",
    ):
        assert text in table.stdout
    script = "import sys; from stage2_train.forecast import forecast; print('torch' in sys.modules)"
    loaded = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert loaded.stdout == "False\n"


def test_what_cannot_be_trained_is_said_before_anything_is_forecast(tiny_model: Path, tmp_path: Path) -> None:
    config = tiny_config(tmp_path, tiny_model)
    vstar = tmp_path / "vstar.parquet"
    write_tiny_vstar(config, vstar)
    with pytest.raises(UserError, match=r"train\.mini_batch_size 8 cannot be split evenly over 3 processes"):
        forecast(config, vstar, gpus=3, gpu_gib=80)
    for size in (float("inf"), float("nan"), 0.0, -1.0):
        with pytest.raises(UserError, match=r"--gpu-memory .* is not an amount of memory"):
            forecast(config, vstar, gpus=1, gpu_gib=size)
    hollow = config.model_copy(update={"model": config.model.model_copy(update={"path": str(tmp_path)})})
    qwen_folder(tmp_path)
    for document in (
        {},
        [],
        *({**QWEN, name: value} for name in list(QWEN)[:6] for value in (0, -1, "1536", True)),
        # transformers takes null for the default of the number of key heads and of two widths.
        *({**QWEN, name: None} for name in list(QWEN)[:6] if name not in HAVE_DEFAULTS),
        {**QWEN, "head_dim": 0},
    ):
        (tmp_path / "config.json").write_text(json.dumps(document), encoding="utf-8")
        with pytest.raises(
            UserError, match=r"config\.json.*(or use another one|no JSON object|has no model_type)"
        ):
            forecast(hollow, vstar, gpus=1, gpu_gib=80)
    (tmp_path / "config.json").write_text(json.dumps(QWEN), encoding="utf-8")
    (tmp_path / "model.safetensors").write_bytes(b"half a header")
    with pytest.raises(
        UserError, match=r"model\.safetensors is not a complete safetensors file.*download the model again"
    ):
        forecast(hollow, vstar, gpus=1, gpu_gib=80)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(UserError, match=r"holds no \*\.safetensors weights"):
        forecast(hollow, vstar, gpus=1, gpu_gib=80)
    rows, provenance = read_vstar(vstar)
    write_vstar(rows.with_columns(pl.lit(False).alias("keep")), provenance, vstar)
    with pytest.raises(UserError, match="no prompt is left to train on"):
        forecast(config, vstar, gpus=1, gpu_gib=80)
