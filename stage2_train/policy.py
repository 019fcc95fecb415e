"""The policy under training: a DeepSpeed engine around the model. The only importer of deepspeed."""

import math
import os
import shutil
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from common.errors import UserError
from stage2_train.checkpoint import finish, unfinished
from stage2_train.config import Config
from stage2_train.logprobs import VocabularyHead, load_model
from stage2_train.lora import Adapter, LowRankUpdate, keep_adapter_alone

os.environ.setdefault("DS_ACCELERATOR", "cuda" if torch.cuda.is_available() else "cpu")
import deepspeed

DEEPSPEED_TAG = "state"
"""The folder within a checkpoint that DeepSpeed writes to."""
GATHERED_ELEMENTS = 2**26
"""Weights that are gathered or merged at a time for the rollout engine: about a layer of a model of 7B parameters."""
MAX_SKIPPED_STEPS = 5
"""Steps in a row that a non-finite gradient may cost."""
PROBE_BYTES = 2**20
"""Written after a failure to write, to see whether the disk is full."""
TOKENIZER_FILES = (
    "tokenizer*",
    "vocab*",
    "merges.txt",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template*",
)


T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Ranks:
    """This process among those of the job."""

    rank: int
    world_size: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def largest(self, count: int) -> int:
        """The largest of the ranks' counts."""
        if self.world_size == 1:
            return count
        most = torch.tensor(count, device=self.device)
        dist.all_reduce(most, dist.ReduceOp.MAX)
        return int(most.item())

    def total(self, count: int) -> int:
        """The sum of the ranks' counts."""
        if self.world_size == 1:
            return count
        everywhere = torch.tensor(count, device=self.device)
        dist.all_reduce(everywhere, dist.ReduceOp.SUM)
        return int(everywhere.item())

    def from_main(self, item: T) -> T:
        """The main rank's item."""
        if self.world_size == 1:
            return item
        items = [item]
        dist.broadcast_object_list(items, src=0)
        return items[0]

    def gather(self, items: list[T]) -> list[T]:
        """All ranks' items."""
        if self.world_size == 1:
            return items
        parts: list[list[T]] = [[] for _ in range(self.world_size)]
        dist.all_gather_object(parts, items)
        return [item for part in parts for item in part]


def join_ranks(seed: int) -> Ranks:
    """Initialise torch.distributed, before any vLLM engine: one that came first would be taken for the job's group.

    Under torchrun the launcher's environment says who we are; without it the job is this process alone.
    """
    launcher = {
        "RANK": "0",
        "LOCAL_RANK": "0",
        "WORLD_SIZE": "1",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": "0",
    }
    for name, value in launcher.items():
        os.environ.setdefault(name, value)
    on_gpu = torch.cuda.is_available()
    local_rank = int(os.environ["LOCAL_RANK"])
    device = torch.device("cuda", local_rank) if on_gpu else torch.device("cpu")
    if on_gpu:
        torch.cuda.set_device(device)
    # On a CPU it would compile collectives of its own for a minute, under a lock file that outlives a killed process:
    # every later start would wait for it for ever.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed(
        dist_backend="nccl" if on_gpu else "gloo", auto_mpi_discovery=False, verbose=False
    )
    expected = int(os.environ["WORLD_SIZE"])
    assert dist.get_world_size() == expected, (
        f"{dist.get_world_size()} ranks joined, the launcher started {expected}"
    )
    torch.manual_seed(seed)
    return Ranks(dist.get_rank(), expected, device)


class Policy:
    """π: forward, backward, step, weights. Loss shares of all slices and ranks add up to the step's loss."""

    def __init__(self, folder: Path, config: Config, ranks: Ranks) -> None:
        """Start from the reference model in `folder`."""
        self._folder = folder
        self._ranks = ranks
        module = load_model(folder, config)
        self._adapter = Adapter(module.model, config) if config.train.lora is not None else None
        if self._adapter:
            # DeepSpeed leaves frozen weights out of a checkpoint by one name; an output layer has two or three.
            module.register_state_dict_post_hook(keep_adapter_alone)  # type: ignore[no-untyped-call]
        if config.train.gradient_checkpointing:
            module.model.gradient_checkpointing_enable({"use_reentrant": False})
        module.train()
        if config.train.zero_stage == 3:
            deepspeed.utils.set_z3_leaf_modules(module, [VocabularyHead])
        train = config.train
        optimizer = torch.optim.AdamW(
            [parameter for parameter in module.parameters() if parameter.requires_grad],
            lr=train.learning_rate,
            betas=train.adam_betas,
            weight_decay=train.weight_decay,
            fused=True,  # the other implementations hold temporaries as large as the parameters
        )
        warmup = max(train.warmup_steps, 1)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / warmup))
        self.engine, *_ = deepspeed.initialize(
            model=module, optimizer=optimizer, lr_scheduler=schedule, config=_deepspeed_config(config)
        )
        self._zero_stage = train.zero_stage
        self._skipped_in_a_row = 0

    def backward(self, loss_share: Tensor, *, last: bool) -> None:
        """Accumulate the gradients of a slice; `last` closes the step.

        DeepSpeed averages gradients over ranks where shares of one loss have to be summed, hence the factor.
        """
        self.engine.set_gradient_accumulation_boundary(last)
        self.engine.backward(loss_share * self._ranks.world_size, scale_wrt_gas=False)

    def step(self) -> float:
        """Clip, update, advance the schedule; returns the gradient norm before clipping.

        Where it is not finite, so on every rank, the step is skipped: weights, optimizer and schedule stay as they
        are and NaN is returned. Raises UserError after MAX_SKIPPED_STEPS of these in a row.
        """
        norm = self._take_step()
        if math.isfinite(norm):
            self._skipped_in_a_row = 0
            return norm
        self._skipped_in_a_row += 1
        if self._skipped_in_a_row == MAX_SKIPPED_STEPS:
            raise UserError(
                f"{MAX_SKIPPED_STEPS} optimizer steps in a row had a loss or gradient that is not finite; "
                'lower train.learning_rate, or set model.dtype = "float32" for both stages, and start again under '
                "another --run"
            )
        return math.nan

    def _take_step(self) -> float:
        if self._zero_stage > 0:
            self.engine.step()  # skips on its own
            return float(self.engine.get_global_grad_norm()) if self.engine.was_step_applied() else math.nan
        # Without ZeRO, DeepSpeed neither checks float32 gradients nor tells the norm that it clips by.
        gradients = [parameter.grad for parameter in self.engine.module.parameters()]
        norm = float(torch.nn.utils.get_total_norm([grad for grad in gradients if grad is not None]))
        if math.isfinite(norm):
            self.engine.step()
        else:
            self.engine.zero_grad()
        return norm

    @property
    def learning_rate(self) -> float:
        """The learning rate of the next step."""
        return float(self.engine.get_lr()[0])

    @contextmanager
    def without_adapter(self) -> Iterator[nn.Module]:
        """The engine, giving log-probs of the model that training began with: without adapter and dropout."""
        assert self._adapter is not None, "only LoRA leaves the model as it was"
        self.engine.eval()
        try:
            with self._adapter.disabled():
                yield self.engine
        finally:
            self.engine.train()

    def named_weights(self) -> Iterator[tuple[str, Tensor]]:
        """Each weight under its name in the Hugging Face checkpoint, an adapter merged into it.

        ZeRO-3's are gathered a bucket at a time, so every rank has to take them all.
        """
        for bucket in _buckets(self._base_parameters()):
            updates = [update for _, _, update in bucket if update]
            parts = [parameter for _, parameter, _ in bucket]
            parts += [part for update in updates for part in (update.down_RI, update.up_OR)]
            with self._gathered(parts):
                weights = [(name, self._whole(parameter, update)) for name, parameter, update in bucket]
            yield from weights

    def _whole(self, parameter: nn.Parameter, update: LowRankUpdate | None) -> Tensor:
        if update:
            return update.added_to(parameter)
        return parameter.detach().clone() if self._zero_stage == 3 else parameter.detach()

    def _base_parameters(self) -> Iterator[tuple[str, nn.Parameter, LowRankUpdate | None]]:
        parameters = self.engine.module.model.named_parameters()
        if self._adapter:
            return self._adapter.merged_weights(parameters)
        return ((name, parameter, None) for name, parameter in parameters)

    def _adapter_weights(self) -> Iterator[tuple[str, Tensor]]:
        for name, parameter in self.engine.module.model.named_parameters():
            if parameter.requires_grad:
                with self._gathered([parameter]):
                    weight = parameter.detach().clone()
                yield name, weight

    @contextmanager
    def _gathered(self, parameters: list[nn.Parameter]) -> Iterator[None]:
        with deepspeed.zero.GatheredParameters(parameters, enabled=self._zero_stage == 3):
            yield

    def save_checkpoint(
        self,
        folder: Path,
        state: dict[str, Any],
        keep: int,
        rollouts: Sequence[Sequence[dict[str, Any]]] = (),
    ) -> None:
        """Write folder/iteration-<n>, whole or not at all, and drop all but the newest `keep` and the best."""
        temporary = self._ranks.from_main(
            unfinished(folder, state["iteration"]) if self._ranks.is_main else folder
        )
        with self._writing_to(temporary):
            self.engine.save_checkpoint(
                str(temporary),
                tag=DEEPSPEED_TAG,
                save_latest=False,
                exclude_frozen_parameters=self._adapter is not None,
            )
            dist.barrier()
            if self._ranks.is_main:
                finish(temporary, state, keep, rollouts)
        dist.barrier()

    @contextmanager
    def _writing_to(self, folder: Path) -> Iterator[None]:
        """Raise UserError where writing fails because nothing more can be written to the folder.

        torch and safetensors report a full disk without its number: whether it was one shows in writing a little more.
        """
        try:
            yield
        except Exception as error:
            probe = folder / "probe"
            try:
                probe.write_bytes(bytes(PROBE_BYTES))
            except OSError as cause:
                message = (
                    f"cannot write {folder}: {cause.strerror}; the checkpoints made before are whole. Make room and "
                    "start the same command again: it continues from the last of them"
                )
                if not self._ranks.is_main:  # whose message nobody would see
                    print(f"rank {self._ranks.rank}: {message}", file=sys.stderr)
                raise UserError(message) from error
            finally:
                probe.unlink(missing_ok=True)
            raise

    def load_checkpoint(self, checkpoint: Path) -> None:
        """Take over weights, optimizer and schedule."""
        path, _ = self.engine.load_checkpoint(
            str(checkpoint), tag=DEEPSPEED_TAG, load_module_strict=self._adapter is None
        )
        assert path is not None, f"{checkpoint} was found intact"

    def export(self, folder: Path) -> None:
        """Write the policy in Hugging Face format with the reference model's tokenizer, whole or not at all.

        An adapter is merged into the weights, and also written to folder/adapter in peft's format.
        """
        state = self._in_main_memory(self.named_weights())
        adapter_state = self._in_main_memory(self._adapter_weights()) if self._adapter else {}
        if self._ranks.is_main:
            temporary = folder.with_name(f".{folder.name}.tmp")
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir(parents=True)
            with self._writing_to(temporary):
                self.engine.module.model.save_pretrained(temporary, state_dict=state)
                if self._adapter:
                    self._adapter.save(temporary / "adapter", adapter_state)
                for pattern in TOKENIZER_FILES:
                    for file in self._folder.glob(pattern):
                        shutil.copy2(file, temporary)
            shutil.rmtree(folder, ignore_errors=True)
            temporary.rename(folder)
        dist.barrier()

    def _in_main_memory(self, weights: Iterable[tuple[str, Tensor]]) -> dict[str, Tensor]:
        """Copies of the weights in the main process's memory; the others only help to gather them."""
        return {name: weight.to("cpu", copy=True) for name, weight in weights if self._ranks.is_main}


def _buckets(
    parameters: Iterable[tuple[str, nn.Parameter, LowRankUpdate | None]],
) -> Iterator[list[tuple[str, nn.Parameter, LowRankUpdate | None]]]:
    """Cut into runs of about GATHERED_ELEMENTS."""
    bucket, elements = [], 0
    for item in parameters:
        bucket.append(item)
        elements += getattr(item[1], "ds_numel", item[1].numel())
        if elements >= GATHERED_ELEMENTS:
            yield bucket
            bucket, elements = [], 0
    if bucket:
        yield bucket


def _deepspeed_config(config: Config) -> dict[str, Any]:
    zero: dict[str, Any] = {"stage": config.train.zero_stage}
    if config.train.offload_optimizer:
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": torch.cuda.is_available()}
    return {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": config.train.max_grad_norm,
        "bf16": {"enabled": config.model.dtype == "bfloat16"},
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,  # DeepSpeed's own would have to be compiled on the user's machine
        "steps_per_print": 10**9,
    }
