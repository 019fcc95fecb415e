"""The policy's network: the reference's, with an adapter in it under LoRA; its weights as those of a checkpoint.

Training wraps a learner around it (policy.py); `export` fills it from a checkpoint.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

from torch import Tensor, nn
from transformers import PreTrainedModel

from common.errors import UserError
from common.model.checkpoint_names import CheckpointNames, named_state, refuse_other_names
from common.model.output_layer import freeze_all_but_text
from stage2_train.config import Config
from stage2_train.exported import write_model
from stage2_train.logprobs import load_model
from stage2_train.lora import Adapter, LowRankUpdate, keep_trained_weights
from stage2_train.ranks import Ranks

Gather = Callable[[list[nn.Parameter]], AbstractContextManager[object]]
"""Makes a context in which partitioned parameters are whole."""

GATHERED_ELEMENTS = 2**26
"""Weights that are gathered or merged at a time for the rollout engine: about a layer of a model of 7B parameters."""


class Network:
    """A module that gives log-probs, and its weights as those of the reference's checkpoint: names and shapes."""

    def __init__(self, folder: Path, config: Config) -> None:
        """Start from the reference model in `folder`."""
        self._folder = folder
        self._dtype = config.model.dtype
        self.module = load_model(folder, config)
        self._names = CheckpointNames(self.module.model)
        refuse_other_names(self._names, folder)
        freeze_all_but_text(self.module.model)
        self.adapter = Adapter(self.module.model, config) if config.train.lora is not None else None
        if not all(parameter.requires_grad for parameter in self.module.parameters()):
            # DeepSpeed leaves frozen weights out of a checkpoint by one name; an output layer has two or three.
            self.module.register_state_dict_post_hook(keep_trained_weights)  # type: ignore[no-untyped-call]

    def load(self, weights: Mapping[str, Tensor]) -> None:
        """Take over all trained weights, by the module's names. Raises UserError unless they are of this network."""
        names = self.module.named_parameters(remove_duplicate=False)  # a tied one has several
        places = {name: parameter for name, parameter in names if parameter.requires_grad}
        fitting = {name for name in weights if name in places and weights[name].shape == places[name].shape}
        loaded = {id(places[name]) for name in fitting}
        wrong = [name for name, parameter in places.items() if id(parameter) not in loaded]
        if not wrong:
            wrong = self.module.load_state_dict(weights, strict=False).unexpected_keys
        if wrong:
            raise UserError(
                f"its weights are not those of the network in {self._folder}: {len(wrong)} do not fit, such as "
                f"{wrong[0]}; bring back the model that the run was trained from"
            )

    def named_weights(self, gather: Gather | None = None) -> Iterator[tuple[str, Tensor]]:
        """Each weight as in the reference's checkpoint, an adapter merged into it.

        With `gather`, one bucket at a time is whole, and the weights that are given are copies.
        """
        return named_weights(self.module.model, self._names, self.adapter, gather)

    def adapter_weights(self, gather: Gather | None = None) -> Iterator[tuple[str, Tensor]]:
        """Copies of the adapter's weights, by the model's names; none without an adapter."""
        for name, parameter in self.module.model.named_parameters() if self.adapter else ():
            if parameter.requires_grad:
                with (gather or nullcontext)([parameter]):
                    weight = parameter.detach().clone()
                yield name, weight

    def write(self, folder: Path, weights: dict[str, Tensor], adapter_weights: dict[str, Tensor]) -> None:
        """Write the reference's folder with these weights in place of its own, and an adapter in peft's format."""
        write_model(folder, weights, self._names, self._folder, self._dtype)
        if self.adapter:
            self.adapter.save(folder / "adapter", adapter_weights)


def named_weights(
    model: PreTrainedModel, names: CheckpointNames, adapter: Adapter | None, gather: Gather | None
) -> Iterator[tuple[str, Tensor]]:
    """A model's weights as those of a checkpoint, an adapter merged into them; see `Network.named_weights`."""
    weights = _base_weights(model, adapter)
    for bucket in _buckets(names.groups, weights):
        items = {name: weights[name] for group in bucket for name in group}
        with (gather or nullcontext)([part for item in items.values() for part in _parts(*item)]):
            whole = {name: _whole(*item, copy=gather is not None) for name, item in items.items()}
        for group in bucket:
            yield from names.to_checkpoint({name: whole.pop(name) for name in group}).items()


def in_main_memory(weights: Iterable[tuple[str, Tensor]], ranks: Ranks) -> dict[str, Tensor]:
    """Copies of the weights in the main process's memory; the others only help to gather them."""
    return {name: weight.to("cpu", copy=True) for name, weight in weights if ranks.is_main}


def _base_weights(
    model: PreTrainedModel, adapter: Adapter | None
) -> dict[str, tuple[Tensor, LowRankUpdate | None]]:
    """The model's own weights under its own names, each with the update to add to it."""
    weights = named_state(model)
    if adapter:
        return adapter.merged_weights(weights)
    return {name: (weight, None) for name, weight in weights.items()}


def _whole(weight: Tensor, update: LowRankUpdate | None, *, copy: bool) -> Tensor:
    if update:
        return update.added_to(weight)
    return weight.detach().clone() if copy else weight.detach()


def _parts(weight: Tensor, update: LowRankUpdate | None) -> list[nn.Parameter]:
    """The parameters of a weight that may be partitioned."""
    own = [weight] if isinstance(weight, nn.Parameter) else []
    return own if update is None else [*own, update.down_RI, update.up_OR]


def _buckets(
    groups: Iterable[tuple[str, ...]], weights: Mapping[str, tuple[Tensor, LowRankUpdate | None]]
) -> Iterator[list[tuple[str, ...]]]:
    """Cut groups of weights into runs of about GATHERED_ELEMENTS."""
    bucket, elements = [], 0
    for group in groups:
        bucket.append(group)
        elements += sum(getattr(weights[name][0], "ds_numel", weights[name][0].numel()) for name in group)
        if elements >= GATHERED_ELEMENTS:
            yield bucket
            bucket, elements = [], 0
    if bucket:
        yield bucket
