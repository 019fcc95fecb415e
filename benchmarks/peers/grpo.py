"""Compare GRPO's advantages, loss and gradient with TRL's, on the same log-probs and rewards, in float64.

The numbers and TRL's answers are one file, tests/golden/trl_grpo.json, with which tests/test_peers.py compares ours.

Shapes: _B sequence, _K completion token.
"""

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.peers.environment import TRL_VARIABLES, trl_python
from benchmarks.peers.job import GRPOSteps
from benchmarks.processes import run
from benchmarks.tables import markdown
from benchmarks.training import save_random_model
from stage2_train.batch import Batch, TokenLogprobs, Totals
from stage2_train.objectives.grpo import GRPO

GOLDEN = Path("tests/golden/trl_grpo.json")
TOLERANCE = 1e-12
"""The largest difference, relative to the largest magnitude among TRL's figures."""
GROUP_SIZE = 3
REWARDS = [1.0, 0.0, 0.0, 1.0, 1.0, 1.0, 0.5, -2.0, 0.125, 0.0, 1.0, 1.0]
"""Ties, equal ones, and ones that are no 0 or 1; TRL takes them in float32, which these are exact in."""
LENGTHS = [1, 4, 2, 3, 1, 2, 5, 2, 3, 1, 4, 2]
AVERAGES = {"grpo": "sequence", "dapo": "token", "bnpo": "token"}
"""Our name for each `loss_type` of TRL's; bnpo, a mean over each micro-batch's tokens, with a single micro-batch."""
MODEL = {
    "model_type": "qwen2",
    "vocab_size": 64,
    "hidden_size": 8,
    "intermediate_size": 8,
    "num_hidden_layers": 1,
    "num_attention_heads": 1,
    "num_key_value_heads": 1,
}
"""The model that TRL's trainer is built around and never runs."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """A trainer's result for a step."""

    advantages_B: Tensor
    loss: Tensor
    gradient_K: Tensor
    """The gradient with respect to each token's log-prob."""


def compare(folder: Path, *, write: bool) -> bool:
    """Run TRL, print a table, keep its answers if asked; returns whether all of ours are within the tolerance."""
    given, answered = folder / "steps.json", folder / "answered.json"
    made_up().write(given)
    save_random_model(folder / "model", MODEL)
    program = [trl_python(), "-m", "benchmarks.peers.trl_grpo", given, folder / "model", answered]
    run(program, folder / "trl.log", TRL_VARIABLES)
    steps = GRPOSteps.read(answered)
    table, worst = report(steps)
    print(
        f"{table}\n\nTRL {steps.trl}, float64; rel: divided by the largest magnitude among TRL's figures, "
        f"at most {worst:.1e} here, allowed is {TOLERANCE:.0e}"
    )
    if write:
        shutil.copyfile(answered, GOLDEN)
    return worst <= TOLERANCE


def made_up() -> GRPOSteps:
    """Ratios π/π_old from ½ to 1½, so that advantages of either sign meet the clip."""
    generator = torch.Generator().manual_seed(0)

    def like(draw: Callable[..., Tensor]) -> Tensor:
        return draw(sum(LENGTHS), dtype=torch.float64, generator=generator)

    logprobs_K = -1 - 2 * like(torch.rand)
    return GRPOSteps(
        group_size=GROUP_SIZE,
        lengths=LENGTHS,
        rewards=REWARDS,
        logprobs=logprobs_K.tolist(),
        old=(logprobs_K - (0.5 + like(torch.rand)).log()).tolist(),
        reference=(logprobs_K - (0.5 + like(torch.rand)).log()).tolist(),
        options=[*combinations()],
    )


def combinations() -> list[dict[str, Any]]:
    """All of our settings in one micro-batch, and some of them in two, in a first step, and as bnpo.

    No entropy bonus in two micro-batches: TRL averages over each micro-batch's tokens, ours over the step's.
    """
    types, scales = ("grpo", "dapo"), ("group", "batch", "none")
    return [
        *(
            trl_options(*chosen, kl=kl, clip_high=clip_high, entropy=entropy)
            for *chosen, kl, clip_high, entropy in product(
                types, scales, (0.0, 0.04), (0.2, 0.28), (0.0, 0.01)
            )
        ),
        *(trl_options(*chosen, micro_batches=2) for chosen in product(types, scales)),
        *(trl_options(*chosen, passes=1) for chosen in product(types, ("group",))),
        trl_options("bnpo", "group", entropy=0.01),
    ]


def trl_options(
    loss_type: str,
    scale: str,
    *,
    kl: float = 0.04,
    clip_high: float = 0.28,
    entropy: float = 0.0,
    micro_batches: int = 1,
    passes: int = 2,
) -> dict[str, Any]:
    """A step in the words of TRL's GRPOConfig. With a single pass over a batch TRL's old policy is the policy itself.

    The penalty is that of Shao et al.; by default TRL multiplies it by π/π_old, which this project does not offer.
    """
    return {
        "loss_type": loss_type,
        "scale_rewards": scale,
        "beta": kl,
        "use_bias_correction_kl": False,
        "epsilon": 0.2,
        "epsilon_high": clip_high,
        "entropy_coef": entropy,
        "per_device_train_batch_size": len(LENGTHS) // micro_batches,
        "gradient_accumulation_steps": micro_batches,
        "num_iterations": passes,
    }


def ours(steps: GRPOSteps, options: dict[str, Any]) -> Answer:
    """This project's answer."""
    objective = GRPO.model_validate(
        {
            "name": "grpo",
            "group_size": steps.group_size,
            "passes": options["num_iterations"],
            "clip_low": options["epsilon"],
            "clip_high": options["epsilon_high"],
            "kl": options["beta"],
            "entropy": options["entropy_coef"],
            "scale": options["scale_rewards"],
            "average": AVERAGES[options["loss_type"]],
        }
    )
    rows = len(steps.lengths)
    batch = Batch(
        group_of_B=torch.arange(rows) // steps.group_size,
        lengths_B=torch.tensor(steps.lengths),
        rewards_B=tensor(steps.rewards),
        totals=Totals(sequences=rows, groups=rows // steps.group_size, tokens=sum(steps.lengths)),
    )
    columns = {f"{name}_K": tensor(getattr(steps, name)) for name in objective.needs(objective.passes)}
    batch = objective.credit(batch.with_columns(**columns))
    logprobs_K = tensor(steps.logprobs).requires_grad_()
    shares = []
    for slice_B in torch.arange(rows).split(options["per_device_train_batch_size"]):
        slice_K = logprobs_K[batch.places_of(slice_B)]
        policy = TokenLogprobs(slice_K, -slice_K)
        shares.append(objective.loss(policy, batch.at(slice_B.tolist(), batch.totals)).share)
    loss = torch.stack(shares).sum()
    (gradient_K,) = torch.autograd.grad(loss, logprobs_K)
    return Answer(advantages_B=batch.advantages_B, loss=loss.detach(), gradient_K=gradient_K)


def trls(steps: GRPOSteps, number: int) -> Answer:
    """TRL's answer to a step."""
    return Answer(
        advantages_B=tensor(steps.advantages[number]),
        loss=tensor(steps.losses[number]),
        gradient_K=tensor(steps.gradients[number]),
    )


def differences(own: Answer, other: Answer) -> list[tuple[float, float]]:
    """The largest, and it in relation to the other's largest magnitude: of advantages, loss and gradient."""
    pairs = [
        (own.advantages_B, other.advantages_B),
        (own.loss, other.loss),
        (own.gradient_K, other.gradient_K),
    ]
    largest = [(float((a - b).abs().max()), float(b.abs().max())) for a, b in pairs]
    return [(difference, difference / magnitude) for difference, magnitude in largest]


def report(steps: GRPOSteps) -> tuple[str, float]:
    """One row per step, and the largest relative difference of all."""
    found = [
        differences(ours(steps, options), trls(steps, number)) for number, options in enumerate(steps.options)
    ]
    rows = [
        [name_of(options), *(f"{value:.1e}" for pair in pairs for value in pair)]
        for options, pairs in zip(steps.options, found, strict=True)
    ]
    figures = [f"{name}, {kind}" for name in ("advantages", "loss", "gradient") for kind in ("abs", "rel")]
    return markdown(["TRL's options", *figures], rows), float(tensor(found)[..., 1].max())


def name_of(options: dict[str, Any]) -> str:
    """The settings that distinguish a step, in TRL's words."""
    name = f"{options['loss_type']}, scale {options['scale_rewards']}, beta {options['beta']:g}"
    name += f", epsilon_high {options['epsilon_high']:g}, entropy_coef {options['entropy_coef']:g}"
    if options["gradient_accumulation_steps"] > 1:
        name += f", {options['gradient_accumulation_steps']} micro-batches"
    return name if options["num_iterations"] > 1 else f"{name}, first step"


def tensor(values: Any) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)
