"""Optimizer steps of TRL's GRPO, in TRL's environment: python -m benchmarks.peers.trl_grpo STEPS MODEL ANSWERED.

Each is an update of `GRPOTrainer.train`. The completions, their rewards, and the log-probs of the policy, the old
policy and the reference are given from outside, in place of a model's. Everything between is TRL's own: advantages,
the cut into micro-batches, the loss and its division, the backward pass.
"""

import sys
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
import trl  # type: ignore[import-not-found]
from datasets import Dataset
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
from transformers.utils import logging
from trl import GRPOConfig, GRPOTrainer

from benchmarks.peers.job import GRPOSteps


def main() -> None:
    steps, model = GRPOSteps.read(Path(sys.argv[1])), sys.argv[2]
    logging.disable_progress_bar()
    torch.set_default_dtype(torch.float64)
    with TemporaryDirectory() as folder:
        found = [update(steps, options, model, folder) for options in steps.options]
    advantages, losses, gradients = map(list, zip(*found, strict=True))
    answered = replace(steps, trl=trl.__version__, advantages=advantages, losses=losses, gradients=gradients)
    answered.write(Path(sys.argv[3]))


def update(
    steps: GRPOSteps, options: dict[str, Any], model_path: str, folder: str
) -> tuple[list[float], float, list[float]]:
    """One update: the advantages, the loss, and the gradient by each token's log-prob."""
    model: Any = AutoModelForCausalLM.from_pretrained(model_path)
    model.logprobs = nn.Parameter(torch.tensor(steps.logprobs))
    gradient = Gradient()
    trainer = ToldTrainer(
        model=model,
        reward_funcs=lambda **_: steps.rewards,
        args=GRPOConfig(
            **options,
            output_dir=folder,
            num_generations=steps.group_size,
            max_steps=1,
            max_grad_norm=0.0,
            gradient_checkpointing=False,
            bf16=False,
            use_cpu=True,
            report_to="none",
            save_strategy="no",
            logging_strategy="no",
            disable_tqdm=True,
        ),
        train_dataset=Dataset.from_list([{"prompt": ""}] * (len(steps.lengths) // steps.group_size)),
        processing_class=AutoTokenizer.from_pretrained(model_path, padding_side="left"),
        callbacks=[gradient],
    )
    trainer.told = steps
    loss = trainer.train().training_loss
    return list(trainer._logs["advantages"]), loss, gradient.by_token


class ToldTrainer(GRPOTrainer):  # type: ignore[misc]
    """TRL's trainer with given completions and log-probs. The single token of a prompt is its row's number."""

    told: GRPOSteps

    def _generate(self, prompts: list[str]) -> tuple[Any, ...]:
        prompt_ids = [[row] for row in range(len(prompts))]
        completion_ids = [[0] * length for length in self.told.lengths]
        return prompt_ids, completion_ids, None, [""] * len(prompts), None, {}, None, None

    def _get_per_token_logps_and_entropies(
        self,
        model: Any,
        input_ids: Tensor,
        attention_mask: Tensor,
        logits_to_keep: int,
        *_: Any,
        compute_entropy: bool = False,
        **__: Any,
    ) -> tuple[Tensor, Tensor, None]:
        """Given log-probs: the reference's, the policy's in its loss, else the old policy's; −ln π is the entropy."""
        if model is self.ref_model:
            logprobs_K = torch.tensor(self.told.reference)
        elif compute_entropy:
            logprobs_K = self.model.logprobs
        else:
            logprobs_K = torch.tensor(self.told.old)
        logprobs_BT = pad_sequence(list(logprobs_K.split(self.told.lengths)), batch_first=True)
        taken_BT = logprobs_BT[input_ids[:, 0], :logits_to_keep]
        return taken_BT, -taken_BT, None


class Gradient(TrainerCallback):
    """Records the sums over an update's micro-batches."""

    def __init__(self) -> None:
        self.by_token: list[float] = []

    def on_pre_optimizer_step(self, *_: Any, **more: Any) -> None:
        self.by_token = more["model"].logprobs.grad.tolist()


if __name__ == "__main__":
    main()
