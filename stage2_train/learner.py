"""A network under training: DeepSpeed around a module and its AdamW. The only importer of deepspeed.

The policy is one learner, a critic another. Loss shares of all slices and ranks add up to a step's loss.
"""

import math
import os
from argparse import Namespace
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor, nn

from common.errors import UserError
from stage2_train.config import Config
from stage2_train.ranks import Ranks
from stage2_train.split import Split

os.environ.setdefault("DS_ACCELERATOR", "cuda" if torch.cuda.is_available() else "cpu")
import deepspeed

# On a CPU it would compile its own collectives for a minute, under a lock file that outlives a killed process:
# every later start would then wait forever.
deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False

MAX_SKIPPED_STEPS = 5
"""Training ends after this many skipped steps in a row."""


class Learner:
    """Forward, backward, step. Called like its module, with the weights as they are."""

    def __init__(
        self,
        module: nn.Module,
        config: Config,
        ranks: Ranks,
        *,
        learning_rate: float,
        setting: str,
        whole: Sequence[type[nn.Module]] = (),
    ) -> None:
        """Take over a module; `setting` is the key of its learning rate.

        Under ZeRO-3 the weights of each of its `whole` parts are gathered together.
        """
        train = config.train
        self._ranks = ranks
        self._setting = setting
        self._zero_stage = train.zero_stage
        self.split = Split(processes=ranks.world_size, zero_stage=train.zero_stage)
        self._skipped_in_a_row = 0
        module.train()
        if whole and train.zero_stage == 3:
            deepspeed.utils.set_z3_leaf_modules(module, list(whole))
        optimizer = torch.optim.AdamW(
            [parameter for parameter in module.parameters() if parameter.requires_grad],
            lr=learning_rate,
            betas=train.adam_betas,
            weight_decay=train.weight_decay,
            fused=True,  # the other implementations hold temporaries as large as the parameters
        )
        warmup = max(train.warmup_steps, 1)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / warmup))
        self._engine, *_ = deepspeed.initialize(
            model=module, optimizer=optimizer, lr_scheduler=schedule, config=_deepspeed_config(config)
        )

    def __call__(self, *inputs: Tensor) -> Any:
        """The module's output. Under ZeRO-3 a collective operation, like all methods below."""
        return self._engine(*inputs)

    @property
    def module(self) -> Any:
        """The module itself, whose parameters ZeRO-3 has partitioned."""
        return self._engine.module

    def backward(self, loss_share: Tensor, *, last: bool) -> None:
        """Accumulate the gradients of a slice; `last` closes the step.

        DeepSpeed averages gradients over ranks, but shares of one loss have to be summed; hence the factor.
        """
        self._engine.set_gradient_accumulation_boundary(last)
        self._engine.backward(loss_share * self._ranks.world_size, scale_wrt_gas=False)

    def step(self) -> float:
        """Clip, update, advance the schedule; returns the gradient norm before clipping.

        If the norm is not finite, on every rank then, the step is skipped: weights, optimizer and schedule do not
        change and NaN is returned. Raises UserError after MAX_SKIPPED_STEPS skipped steps in a row.
        """
        norm = self._take_step()
        if math.isfinite(norm):
            self._skipped_in_a_row = 0
            return norm
        self._skipped_in_a_row += 1
        if self._skipped_in_a_row == MAX_SKIPPED_STEPS:
            raise UserError(
                f"{MAX_SKIPPED_STEPS} optimizer steps in a row had a loss or gradient that is not finite; "
                f'lower {self._setting}, or set model.dtype = "float32" for both stages, and start again under '
                "another --run"
            )
        return math.nan

    def _take_step(self) -> float:
        if self._zero_stage > 0:
            self._engine.step()  # skips on its own
            return float(self._engine.get_global_grad_norm()) if self._engine.was_step_applied() else math.nan
        # Without ZeRO, DeepSpeed neither checks float32 gradients nor reports the norm that it clips by.
        gradients = [parameter.grad for parameter in self.module.parameters()]
        norm = float(torch.nn.utils.get_total_norm([grad for grad in gradients if grad is not None]))
        if math.isfinite(norm):
            self._engine.step()
        else:
            self._engine.zero_grad()
        return norm

    @property
    def learning_rate(self) -> float:
        """The learning rate of the next step."""
        return float(self._engine.get_lr()[0])

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        """A context without randomness in the network, such as dropout."""
        self._engine.eval()
        try:
            yield
        finally:
            self._engine.train()

    @property
    def is_partitioned(self) -> bool:
        """Whether each rank holds a part of the weights only."""
        return self._zero_stage == 3

    @contextmanager
    def gathered(self, parameters: list[nn.Parameter]) -> Iterator[None]:
        """A context in which these parameters are whole on every rank."""
        with deepspeed.zero.GatheredParameters(parameters, enabled=self.is_partitioned):
            yield

    def save(self, folder: Path, name: str) -> None:
        """Write weights, optimizer and schedule to folder/name; frozen weights are left out."""
        is_whole = all(parameter.requires_grad for parameter in self.module.parameters())
        self._engine.save_checkpoint(
            str(folder), tag=name, save_latest=False, exclude_frozen_parameters=not is_whole
        )

    def load(self, folder: Path, name: str, *, is_converted: bool = False) -> None:
        """Load what `save` wrote with the same split, or `convert` made of another's."""
        is_whole = all(parameter.requires_grad for parameter in self.module.parameters())
        # The engine is built before it is known which of the two it will load.
        self._engine._config.load_universal_checkpoint = is_converted
        path, _ = self._engine.load_checkpoint(str(folder), tag=name, load_module_strict=is_whole)
        assert path is not None, f"{folder} was found intact"
        if is_converted:
            # DeepSpeed shares one counter in main memory, which each partition's step would advance.
            for parameter, state in self._engine.optimizer.optimizer.state.items():
                state["step"] = state["step"].to(parameter.device, copy=True)

    @staticmethod
    def convert(folder: Path, name: str, target: Path) -> None:
        """Make target/name of what `save` wrote to folder/name under ZeRO, for `load` with any split under ZeRO.

        One rank's work; it needs the memory for the optimizer's states of one of the ranks that saved.
        """
        from deepspeed.checkpoint import ds_to_universal

        with TemporaryDirectory() as links:
            # DeepSpeed takes paths for patterns, so characters such as + must not be in them.
            source, result = Path(links, "saved"), Path(links, "converted")
            source.symlink_to((folder / name).absolute())
            result.symlink_to(target.absolute())
            ds_to_universal.main(
                Namespace(
                    input_folder=str(source),
                    output_folder=str(result / name),
                    num_extract_workers=1,
                    num_merge_workers=1,
                    keep_temp_folder=False,
                    strict=True,
                    inject_missing_state=True,
                )
            )
        _unify(target / name)


class Partitioned:
    """A network that is not trained, of which each rank holds a part, as under ZeRO-3.

    With `train.offload_reference` the parts are in the host's memory.
    """

    def __init__(self, module: nn.Module, config: Config, *, whole: Sequence[type[nn.Module]]) -> None:
        """Take over a module; the weights of each of its `whole` parts are gathered together."""
        deepspeed.utils.set_z3_leaf_modules(module, list(whole))
        document = _deepspeed_config(config)
        zero = document["zero_optimization"]
        zero.pop("offload_optimizer", None)
        if config.train.offload_reference:
            zero["offload_param"] = {"device": "cpu", "pin_memory": torch.cuda.is_available()}
        module.eval().requires_grad_(False)
        self._engine, *_ = deepspeed.initialize(model=module, config=document)
        self._engine.eval()

    def __call__(self, *inputs: Tensor) -> Any:
        """The module's output; a collective operation."""
        return self._engine(*inputs)


WEIGHTS = "mp_rank_00_model_states.pt"
"""DeepSpeed's file with the whole weights, and the schedule."""
PARTITION = f"zero_pp_rank_0_{WEIGHTS}"
"""The file of the first rank under ZeRO-3, where each has its part."""


def _unify(folder: Path) -> None:
    """Make DeepSpeed's universal checkpoint one that every stage reads: below ZeRO-3 it has one form, there another.

    zero/<parameter>/ has the weights and moments as tensors in dictionaries; files that every process reads whole keep
    nothing else of them.
    """
    universal = folder / "zero"
    is_partitioned = (folder / PARTITION).exists()
    common_file, states_file = (
        universal / "optimizer_state.pt",
        folder / (PARTITION if is_partitioned else WEIGHTS),
    )
    common, states = (
        torch.load(file, map_location="cpu", mmap=True, weights_only=False)
        for file in (common_file, states_file)
    )
    if is_partitioned:
        step = common["optimizer_state_dict"]["state"][0]["step"].clone()
        for parameter in filter(Path.is_dir, universal.iterdir()):
            for file in parameter.iterdir():
                torch.save({"param": torch.load(file)}, file)
            torch.save(step, parameter / "step.pt")
    else:
        step = torch.load(next(universal.glob("*/step.pt")))
    groups = common["param_groups"]
    optimizer = {"state": {0: {"step": step}}, "param_groups": groups}
    kept = {"ds_version": deepspeed.__version__, "param_groups": groups, "optimizer_state_dict": optimizer}
    for file in (common_file, *folder.glob("*_model_states.pt")):
        file.unlink()  # not overwritten, since it is still mapped
    torch.save(kept, common_file)
    for name in (WEIGHTS, PARTITION):
        torch.save(states | {"module": {}}, folder / name)


def saved_weights(folder: Path, name: str) -> dict[str, Tensor]:
    """The trained weights that `save` wrote to folder/name, by the module's names; under ZeRO-3 in float32.

    Needs neither a GPU nor the processes that trained. The files are pickles: check first that they are ours.
    """
    from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

    weights: dict[str, Tensor]
    if (folder / name / WEIGHTS).exists():
        states = torch.load(folder / name / WEIGHTS, map_location="cpu", mmap=True, weights_only=False)
        weights = states["module"]
    else:
        # Frozen weights are not in the files.
        weights = get_fp32_state_dict_from_zero_checkpoint(str(folder), name, exclude_frozen_parameters=True)
    return weights


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
