"""What training starts from, read and checked before any model loads: stage 1's file, prompts, held-out prompts."""

import hashlib
import json
import random
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import polars as pl

from common.data.prompts import PromptRenderer, check_context, load_prompts, prompts_from_pairs
from common.errors import UserError
from common.grading import fingerprint
from common.model_files import model_identity, reference_model
from common.provenance import Allowance, Provenance, sampling_identity
from common.rollout import Prompt
from common.seeds import derive_seed
from common.vstar_file import read_vstar
from stage2_train.config import Config, TrainConfig
from stage2_train.first_batch import FirstBatch, first_batch

MAY_DIFFER: Mapping[str, Any] = {
    "run": True,
    "vstar": True,
    "evaluate": True,
    "engine": True,
    "grader": {"workers", "timeout_seconds", "memory_gib"},
    "train": {
        *("epochs", "iterations", "checkpoint_every", "keep_checkpoints", "evaluate_every", "wandb_project"),
        *("tokens_per_micro_batch", "gradient_checkpointing", "offload_reference"),
    },
}
"""What may differ between a run and its continuation: its length, how it is watched, the resources it takes."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Inputs:
    """What training starts from."""

    folder: Path
    renderer: PromptRenderer
    prompts: list[Prompt]
    vstar: dict[str, float]
    pass_rate: dict[str, float]
    """p̂ of each prompt in stage 1."""
    held_out: list[Prompt]
    beta1: float
    """Of the artifact, which may have been re-scored since the config was written."""
    num_samples: str
    """N of the artifact, or its range over prompts."""
    first_batch: FirstBatch | None
    """What stage 1's samples say of the first iteration."""
    accepted_mismatches: tuple[str, ...] = ()
    """In which the artifact's identity differs from this run's, as the user allowed."""

    def iterations(self, config: Config) -> int:
        """How many iterations this run has."""
        return iterations(config.train, len(self.prompts))


def iterations(train: TrainConfig, prompts: int) -> int:
    """Batches until each of so many prompts has been seen `epochs` times, or the configured number."""
    return train.iterations or max(1, train.epochs * prompts // train.batch_size)


def prepare(config: Config, vstar_file: Path, allow_mismatch: Collection[str] = ()) -> Inputs:
    """Read and check everything that needs no model. Raises UserError."""
    if config.sampling.temperature == 0:
        raise UserError("sampling.temperature is 0: training needs a policy that samples; set it above 0")
    if config.sampling.top_p < 1:
        raise UserError(
            f"sampling.top_p is {config.sampling.top_p:g}: completions would not come from the policy whose log-ratio "
            "is regressed; set it to 1 to train"
        )
    rows, provenance = read_vstar(vstar_file)
    folder = reference_model(config)
    renderer = PromptRenderer(folder, config.data)
    if config.train.lora is not None:
        from stage2_train.lora import refuse_unknown_layers

        refuse_unknown_layers(folder, config.train.lora)
    ours = sampling_identity(config, renderer, model_identity(folder), fingerprint(config.grader))
    theirs = {key: value for key, value in provenance.identity.items() if key in ours}
    expected, allowance = Provenance(identity=ours, context={}), Allowance(allow_mismatch)
    allowance.refuse_unknown([*expected.fields(), "prompt.tokens"])
    expected.refuse_unless_same(
        Provenance(identity=theirs, context={}),
        what=str(vstar_file),
        advice="V̂* holds for its own model, template, sampling and grader only: use those, make it anew "
        "with another --run",
        allowance=allowance,
    )
    kept = rows.filter("keep")
    if kept.is_empty():
        raise UserError(
            f"{vstar_file}: no prompt is left to train on; run `python cli.py filter` with milder rules"
        )
    prompts = prompts_from_pairs(zip(kept["prompt"], kept["answer"], strict=True), config.data, renderer)
    _refuse_other_tokens(prompts, kept, vstar_file, allowance)
    held_out = []
    if config.evaluate.data is not None:
        held_out = load_prompts(config.evaluate.data, config, PromptRenderer(folder, config.evaluate.data))
        held_out = held_out[: config.evaluate.training_prompts]
    check_context([*prompts, *held_out], config, folder)
    return Inputs(
        folder=folder,
        renderer=renderer,
        prompts=prompts,
        vstar=dict(zip(kept["prompt_id"], kept["vstar"], strict=True)),
        pass_rate=dict(zip(kept["prompt_id"], kept["pass_rate"], strict=True)),
        held_out=held_out,
        beta1=rows["beta1"][0],
        num_samples=_range(rows["num_samples"]),
        first_batch=first_batch(rows, config.train.batch_size),
        accepted_mismatches=tuple(allowance.used),
    )


def _range(numbers: pl.Series) -> str:
    low, high = str(numbers.min()), str(numbers.max())
    return low if low == high else f"{low} to {high}"


def _refuse_other_tokens(prompts: list[Prompt], kept: pl.DataFrame, file: Path, allowance: Allowance) -> None:
    stage1 = dict(zip(kept["prompt_id"], kept["prompt_token_hash"], strict=True))
    different = [prompt.id for prompt in prompts if stage1[prompt.id] not in (None, prompt.token_hash)]
    if not different:
        return
    line = f"prompt.tokens differ for {len(different):,} prompts, such as {different[0]}"
    if not allowance.permits("prompt.tokens", line):
        raise UserError(
            f"{file}: stage 1 rendered its prompts to other token ids: {line}; use the library versions that "
            "it names (`python cli.py inspect`), make it anew with another --run, "
            "or accept it with --allow-mismatch prompt.tokens"
        )


def origin(config: Config, inputs: Inputs) -> dict[str, Any]:
    """What two runs must share for one to continue the other: all that shapes the trajectory, and V̂*."""
    vstar = json.dumps(sorted(inputs.vstar.items())).encode()
    return {
        "config": config.model_dump(mode="json", exclude=MAY_DIFFER),
        "vstar": hashlib.sha256(vstar).hexdigest()[:32],
    }


def prompt_batch(prompts: int, batch_size: int, seed: int, iteration: int) -> list[int]:
    """The prompts of an iteration (from 1 on): an endless row of shuffled epochs, cut into batches.

    A function of its arguments alone, so that a resumed run sees the data in the same order.
    """
    start = (iteration - 1) * batch_size
    batch: list[int] = []
    while len(batch) < batch_size:
        epoch, offset = divmod(start + len(batch), prompts)
        order = list(range(prompts))
        random.Random(derive_seed(seed, "epoch", epoch)).shuffle(order)
        batch += order[offset : offset + batch_size - len(batch)]
    return batch
