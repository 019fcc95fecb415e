"""A model's weights under the names and in the shapes of its checkpoint.

transformers stores some weights differently from checkpoints: all experts of a layer in one tensor, or under changed
names. It converts them when it loads and saves a whole model. This module converts a few weights at a time, by the same
rules, for engines that share a machine with the model.
"""

import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    PrefixChange,
    WeightConverter,
    WeightRenaming,
    WeightTransform,
    dot_natural_key,
    rename_source_key,
    revert_weight_conversion,
)

from common.errors import UserError
from common.model.weights import read_weights

NUMBER = re.compile(r"\.\d+\.")
"""A layer's number within a name."""


class CheckpointNames:
    """Converts a model's weights to the tensors of its checkpoint, and back."""

    def __init__(self, model: PreTrainedModel) -> None:
        """Record the names of a model whose parameters are whole, before LoRA adds its own."""
        self._model = model
        self._state = {name: tensor.shape for name, tensor in model.state_dict().items()}
        self._transforms = _transforms(model)
        shapes = {
            name: torch.empty(tensor.shape, device="meta") for name, tensor in named_state(model).items()
        }
        self._names = list(shapes)
        self.groups = self._together()
        """Weights that make up tensors of the checkpoint together, mostly a single one, in the model's order."""
        self.shapes = {
            name: tuple(tensor.shape)
            for group in self.groups
            for name, tensor in self.to_checkpoint({name: shapes[name] for name in group}).items()
        }
        """The shapes of the checkpoint's tensors, by name."""
        self._targets = {name: self._target(name) for name in self.shapes}

    def to_checkpoint(self, weights: dict[str, Tensor]) -> dict[str, Tensor]:
        """The checkpoint's tensors that the weights of a group make up; some may be views of them."""
        converted: dict[str, Tensor] = revert_weight_conversion(self._model, weights)
        return converted

    def covers(self, name: str) -> bool:
        """Whether a tensor of the checkpoint is loaded into the model, perhaps as a copy of a tied weight."""
        return self._target(name)[0] in self._state

    def load(self, tensors: Iterable[tuple[str, Tensor]]) -> None:
        """Copy a checkpoint's tensors into the model, holding no more than the tensors of one parameter of each kind.

        Raises UserError if they are not all of the model's weights.
        """
        state = self._model.state_dict()
        sizes: dict[str, int] = defaultdict(int)
        for target, _ in self._targets.values():
            sizes[target] += 1
        waiting: dict[str, dict[str, Tensor]] = defaultdict(dict)
        missing = set(self._names)
        for name, tensor in tensors:
            target, _ = self._targets.get(name) or self._target(name)
            if target in state:
                waiting[target][name] = tensor
                if len(waiting[target]) == sizes[target]:
                    missing -= self._copy(waiting.pop(target), state)
        for parts in waiting.values():
            missing -= self._copy(parts, state)
        if missing:
            raise UserError(
                f"the new weights are not those of a {type(self._model).__name__} with this config.json: "
                f"{len(missing)} are missing, such as {min(missing)}; evaluate models of one architecture together"
            )

    @torch.no_grad()
    def _copy(self, tensors: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> set[str]:
        """Copy the tensors that one of the model's weights, or a few, are made of; returns their names."""
        found: dict[str, Any] = {}
        for name in sorted(tensors, key=dot_natural_key):
            target, pattern = self._targets.get(name) or self._target(name)
            transform = found.setdefault(target, self._transform(name, target, pattern))
            transform.add_tensor(target, name, pattern or name, tensors[name])
        copied = set()
        for target, transform in found.items():
            for name, tensor in transform.convert(
                target, model=self._model, config=self._model.config
            ).items():
                state[name].copy_(tensor[0] if isinstance(tensor, list) else tensor)
                copied.add(name)
        return copied

    def _transform(self, name: str, target: str, pattern: str | None) -> WeightTransform:
        if pattern is None:
            return WeightRenaming(name, target)
        return deepcopy(next(each for each in self._transforms if pattern in each.source_patterns))

    def _target(self, name: str) -> tuple[str, str | None]:
        """The weight, or the first of them, that a checkpoint's tensor goes into, and the rule that converts it."""
        target, pattern = rename_source_key(
            name, *_split(self._transforms), self._model.base_model_prefix, self._state
        )
        if target not in self._state and name in self._state:
            return name, None
        return target, pattern

    def _together(self) -> list[tuple[str, ...]]:
        rules = _split([transform.reverse_transform() for transform in self._transforms[::-1]])
        groups: dict[str, list[str]] = defaultdict(list)
        for name in self._names:
            target, _ = rename_source_key(name, *rules, reverse=True)
            groups[target].append(name)
        return [tuple(group) for group in groups.values()]


def named_state(model: PreTrainedModel) -> dict[str, Tensor]:
    """A model's parameters and the buffers that its checkpoint has, each once and under the model's own name."""
    first: dict[int, str] = {}
    state = model.state_dict(keep_vars=True)
    return {name: tensor for name, tensor in state.items() if first.setdefault(id(tensor), name) == name}


def refuse_other_names(names: CheckpointNames, folder: Path) -> None:
    """Raise UserError unless converted weights have the names and shapes of the files in `folder`."""
    stored = read_weights(folder).shapes
    wrong = [name for name, shape in names.shapes.items() if stored.get(name) != shape]
    if wrong:
        raise UserError(
            f"{folder}: transformers gives its weights back in another form than the checkpoint's: {len(wrong)} of "
            f"{len(names.shapes)}, such as {wrong[0]}, which engines could not load; save it again with save_pretrained"
        )


def note_conversions(model: PreTrainedModel, stored: Iterable[str]) -> list[str]:
    """Record on a model without weights the rules by which a checkpoint with these names is read, as loading would.

    Returns the names of the model's weights that the checkpoint lacks. Raises UserError for weights of the model's own
    layers that the network has no place for, see `refuse_left_out`.
    """
    rules = get_model_conversion_mapping(model)
    renamings, converters = _split(rules)
    state = {name: tensor.shape for name, tensor in model.state_dict().items()}
    renamed = {
        name: rename_source_key(name, renamings, converters, model.base_model_prefix, state)[0]
        for name in sorted(stored, key=dot_natural_key)
    }
    targets = {
        name: name if target not in state and name in state else target for name, target in renamed.items()
    }
    found = set(targets.values())
    used = [rule for rule in rules if rule.was_used()]
    model._weight_conversions = used  # type: ignore[assignment]
    others = {name for rule in used for name in _further_targets(rule, found)}
    refuse_left_out(model, [name for name, target in targets.items() if target not in state], targets)
    return sorted(named_state(model).keys() - found - others)


def refuse_left_out(model: PreTrainedModel, unplaced: Iterable[str], targets: Mapping[str, str]) -> None:
    """Raise UserError if tensors without a place in the network look like weights of its layers.

    They do if the network has such a layer under another number, or has that layer with other weights. Then config.json
    describes a different network from the weights, and every library drops these silently. Tensors that the class
    ignores by design, and other extras of a checkpoint, such as a value head, are accepted.
    """
    ignored = [
        *(model._keys_to_ignore_on_load_unexpected or ()),
        r"rotary_emb\.inv_freq",
        r"(^|\.)position_ids$",
    ]
    numbered = {NUMBER.sub(".#.", name) for name in model.state_dict()}
    layers = {name.rpartition(".")[0] for name, _ in model.named_parameters()}
    left_out = [
        name
        for name in unplaced
        if (NUMBER.sub(".#.", targets[name]) in numbered or targets[name].rpartition(".")[0] in layers)
        and not any(re.search(pattern, targets[name]) for pattern in ignored)
    ]
    if left_out:
        raise UserError(
            f"the network that config.json describes ({type(model).__name__}) has no place for {len(left_out)} of the "
            f"checkpoint's weights, such as {left_out[0]}: they belong to different models; download the model again"
        )


def _further_targets(rule: WeightTransform, found: Iterable[str]) -> Iterator[str]:
    """The targets of a rule after its first one: it cuts a tensor into several."""
    first, *further = rule.target_patterns
    for name in found:
        yield from (name.replace(first, other) for other in further if first in name)


def _transforms(model: PreTrainedModel) -> list[WeightTransform]:
    """The rules by which a model's checkpoint was read; of a model without one, those of its class."""
    used: list[WeightTransform] | None = getattr(model, "_weight_conversions", None)
    if used is not None:
        return used
    rules = get_model_conversion_mapping(model, add_legacy=False)
    return [rule for rule in rules if not isinstance(rule, PrefixChange)]


def _split(transforms: list[WeightTransform]) -> tuple[list[WeightRenaming], list[WeightConverter]]:
    return (
        [each for each in transforms if isinstance(each, WeightRenaming)],
        [each for each in transforms if isinstance(each, WeightConverter)],
    )
