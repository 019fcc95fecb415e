"""The policy under training: a learner whose weights have the names of a Hugging Face checkpoint."""

import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from torch import Tensor, nn

from common.files import writing_to
from common.model.checkpoint_names import CheckpointNames, named_state, refuse_other_names
from common.model.output_layer import freeze_all_but_text
from stage2_train.batch import TokenBatch, TokenLogprobs
from stage2_train.config import Config
from stage2_train.exported import broken_weight, refuse_broken, write_model
from stage2_train.learner import Learner
from stage2_train.logprobs import VocabularyHead, load_model, token_logprobs
from stage2_train.lora import Adapter, LowRankUpdate, keep_trained_weights
from stage2_train.ranks import Ranks

GATHERED_ELEMENTS = 2**26
"""Weights that are gathered or merged at a time for the rollout engine: about a layer of a model of 7B parameters."""


class Policy:
    """π: log-probs of completions, and the weights behind them."""

    def __init__(self, folder: Path, config: Config, ranks: Ranks) -> None:
        """Start from the reference model in `folder`."""
        self._folder = folder
        self._dtype = config.model.dtype
        self._ranks = ranks
        module = load_model(folder, config)
        self._names = CheckpointNames(module.model)
        refuse_other_names(self._names, folder)
        freeze_all_but_text(module.model)
        self._adapter = Adapter(module.model, config) if config.train.lora is not None else None
        if not all(parameter.requires_grad for parameter in module.parameters()):
            # DeepSpeed leaves frozen weights out of a checkpoint by one name; an output layer has two or three.
            module.register_state_dict_post_hook(keep_trained_weights)  # type: ignore[no-untyped-call]
        if config.train.gradient_checkpointing:
            module.model.gradient_checkpointing_enable({"use_reentrant": False})
        self.learner = Learner(
            module,
            config,
            ranks,
            learning_rate=config.train.learning_rate,
            setting="train.learning_rate",
            whole=[VocabularyHead],
        )

    def logprobs(self, tokens: TokenBatch) -> TokenLogprobs:
        """Log-probs and entropies of the completion tokens, with gradients."""
        return token_logprobs(self.learner, tokens)

    @contextmanager
    def without_adapter(self) -> Iterator[None]:
        """A context in which log-probs are those of the initial model: without adapter and dropout."""
        assert self._adapter is not None, "only LoRA leaves the model as it was"
        with self.learner.evaluating(), self._adapter.disabled():
            yield

    def named_weights(self) -> Iterator[tuple[str, Tensor]]:
        """Each weight under its name and in its shape in the reference's checkpoint, an adapter merged into it.

        Under ZeRO-3 they are gathered one bucket at a time, so every rank must iterate over all of them.
        """
        weights = self._base_weights()
        for bucket in _buckets(self._names.groups, weights):
            items = {name: weights[name] for group in bucket for name in group}
            with self.learner.gathered([part for item in items.values() for part in _parts(*item)]):
                whole = {name: self._whole(*item) for name, item in items.items()}
            for group in bucket:
                yield from self._names.to_checkpoint({name: whole.pop(name) for name in group}).items()

    def _whole(self, weight: Tensor, update: LowRankUpdate | None) -> Tensor:
        if update:
            return update.added_to(weight)
        return weight.detach().clone() if self.learner.is_partitioned else weight.detach()

    def _base_weights(self) -> dict[str, tuple[Tensor, LowRankUpdate | None]]:
        """The model's own weights under its own names, each with the update to add to it."""
        weights = named_state(self.learner.module.model)
        if self._adapter:
            return self._adapter.merged_weights(weights)
        return {name: (weight, None) for name, weight in weights.items()}

    def _adapter_weights(self) -> Iterator[tuple[str, Tensor]]:
        for name, parameter in self.learner.module.model.named_parameters():
            if parameter.requires_grad:
                with self.learner.gathered([parameter]):
                    weight = parameter.detach().clone()
                yield name, weight

    def export(self, folder: Path) -> None:
        """Write the policy as the reference's folder with the trained weights, whole or not at all.

        An adapter is merged into the weights, and also written to folder/adapter in peft's format. Raises UserError
        if a weight is not finite.
        """
        state = self._in_main_memory(self.named_weights())
        adapter_state = self._in_main_memory(self._adapter_weights()) if self._adapter else {}
        refuse_broken(self._ranks.from_main(broken_weight(state) if self._ranks.is_main else None))
        if self._ranks.is_main:
            temporary = folder.with_name(f".{folder.name}.tmp")
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir(parents=True)
            with writing_to(temporary):
                write_model(temporary, state, self._names, self._folder, self._dtype)
                if self._adapter:
                    self._adapter.save(temporary / "adapter", adapter_state)
            shutil.rmtree(folder, ignore_errors=True)
            temporary.rename(folder)
        self._ranks.wait()

    def _in_main_memory(self, weights: Iterable[tuple[str, Tensor]]) -> dict[str, Tensor]:
        """Copies of the weights in the main process's memory; the others only help to gather them."""
        return {name: weight.to("cpu", copy=True) for name, weight in weights if self._ranks.is_main}


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
