"""One run of a TRL trainer, in TRL's environment: python -m benchmarks.peers.trl_run JOB REPORT.

TRL's classes are used unchanged. They get from outside: the reward function (this project's GSM8K rule), the settings
of the job, and, if lengths are forced, a model whose `generate` takes one more logits processor.
"""

import sys
import time
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from safetensors.torch import save_file
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LogitsProcessor,
    LogitsProcessorList,
    TrainerCallback,
    set_seed,
)
from transformers.utils import logging
from trl import GRPOConfig, GRPOTrainer  # type: ignore[import-not-found]
from trl.experimental.a2po import A2POConfig, A2POTrainer  # type: ignore[import-not-found]

from benchmarks.peers.job import Job, Report
from benchmarks.processes import resident_mib
from common.grading import rule_gsm8k

IMPORTED = time.time()
IMPORTS_MIB = resident_mib()


def main() -> None:
    job = Job.read(Path(sys.argv[1]))
    logging.disable_progress_bar()
    set_seed(job.seed)
    tokenizer = AutoTokenizer.from_pretrained(job.model, padding_side="left")
    model: Any = AutoModelForCausalLM.from_pretrained(job.model, dtype=torch.float32)
    clock = Clock(model, job)
    lengths = None
    if job.completion_lengths is not None:
        prompts = tokenizer([row["prompt"] for row in job.prompts], add_special_tokens=False).input_ids
        lengths = dict(zip(map(tuple, prompts), job.completion_lengths, strict=True))
    trainer_class = {"a2po": A2POTrainer, "grpo": GRPOTrainer}[job.trainer]
    trainer = trainer_class(
        model=model,
        reward_funcs=reward,
        args=settings(job),
        train_dataset=Dataset.from_list(job.prompts),
        processing_class=tokenizer,
        callbacks=[clock],
    )
    model.generate = Generate(model, clock, lengths)
    if job.vstar is not None and job.trainer == "a2po":
        trainer._optimal_values = {row["prompt"]: job.vstar for row in job.prompts}
    trainer.train()
    Report(
        imported=IMPORTED,
        began=clock.began,
        updates=clock.updates,
        generate_seconds=clock.generate_seconds,
        imports_mib=IMPORTS_MIB,
    ).write(Path(sys.argv[2]))


def settings(job: Job) -> Any:
    """The job in TRL's words; everything else is TRL's default."""
    common = {
        "output_dir": job.weights,
        "seed": job.seed,
        "max_steps": job.updates,
        "per_device_train_batch_size": job.micro_batch_size,
        "gradient_accumulation_steps": job.mini_batch_size // job.micro_batch_size,
        "learning_rate": job.learning_rate,
        "lr_scheduler_type": "constant_with_warmup" if job.warmup_steps else "constant",
        "warmup_steps": job.warmup_steps,
        "adam_beta1": job.adam_betas[0],
        "adam_beta2": job.adam_betas[1],
        "weight_decay": job.weight_decay,
        "max_grad_norm": job.max_grad_norm,
        "gradient_checkpointing": job.gradient_checkpointing,
        "max_completion_length": job.max_completion_tokens,
        "temperature": 1.0,
        "top_p": 1.0,
        "top_k": 0,
        "bf16": False,
        "use_cpu": True,
        "report_to": "none",
        "save_strategy": "no",
        "disable_tqdm": True,
    }
    if job.trainer == "grpo":
        steps_per_generation = job.batch_size // job.micro_batch_size
        return GRPOConfig(**common, num_generations=2, steps_per_generation=steps_per_generation)
    return A2POConfig(
        **common,
        max_prompt_length=job.max_prompt_tokens,
        num_value_samples=job.num_samples,
        beta1=job.beta1,
        beta2=job.beta2,
        filter_all_incorrect=False,
    )


def reward(prompts: list[str], completions: list[str], answer: list[str], **_: Any) -> list[float]:
    rows = zip(prompts, completions, answer, strict=True)
    return [rule_gsm8k.grade(*row).reward for row in rows]


class Clock(TrainerCallback):
    """Notes when each update ends, and saves weights off the clock."""

    def __init__(self, model: Any, job: Job) -> None:
        self._model = model
        self._job = job
        self._saving_seconds = 0.0
        self.began = 0.0
        self.updates: list[float] = []
        self.generate_seconds = 0.0

    def now(self) -> float:
        return time.time() - self._saving_seconds

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        self.began = self.now()
        self.generate_seconds = 0.0

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.updates.append(self.now())
        if self._job.save_every and len(self.updates) % self._job.save_every == 0:
            started = time.time()
            weights = {name: tensor.detach() for name, tensor in self._model.named_parameters()}
            save_file(weights, Path(self._job.weights) / f"{len(self.updates)}.safetensors")
            self._saving_seconds += time.time() - started


class Generate:
    """The model's `generate`, timed; where `lengths` says so, each row ends at its prompt's length."""

    def __init__(self, model: Any, clock: Clock, lengths: dict[tuple[int, ...], int] | None) -> None:
        self._generate = model.generate
        self._eos_token_id = model.generation_config.eos_token_id
        self._clock = clock
        self._lengths = lengths

    def __call__(self, *, input_ids: torch.Tensor, attention_mask: torch.Tensor, **options: Any) -> Any:
        started = time.time()
        if self._lengths is not None:
            rows = zip(input_ids, attention_mask.bool(), strict=True)
            ends = torch.tensor([self._lengths[tuple(row[mask].tolist())] for row, mask in rows])
            forced = ForcedEnd(input_ids.shape[1] + ends, self._eos_token_id)
            options["logits_processor"] = LogitsProcessorList([forced])
        output = self._generate(input_ids=input_ids, attention_mask=attention_mask, **options)
        self._clock.generate_seconds += time.time() - started
        return output


class ForcedEnd(LogitsProcessor):
    """Lets each row's last token, and no other, be the end token."""

    def __init__(self, total_lengths_B: torch.Tensor, eos_token_id: int) -> None:
        self._total_lengths_B = total_lengths_B
        self._eos_token_id = eos_token_id

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        ends_B = self._total_lengths_B == input_ids.shape[1] + 1
        scores[:, self._eos_token_id] = float("-inf")
        scores[ends_B] = float("-inf")
        scores[ends_B, self._eos_token_id] = 0.0
        return scores


if __name__ == "__main__":
    main()
