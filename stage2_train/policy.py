"""The policy under training: a learner whose weights have the names of a Hugging Face checkpoint."""

import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from torch import Tensor, nn

from common.files import writing_to
from stage2_train.batch import TokenBatch, TokenLogprobs
from stage2_train.config import Config
from stage2_train.learner import Learner
from stage2_train.logprobs import VocabularyHead, load_model, token_logprobs
from stage2_train.lora import Adapter, LowRankUpdate, keep_trained_weights
from stage2_train.ranks import Ranks

GATHERED_ELEMENTS = 2**26
"""Weights that are gathered or merged at a time for the rollout engine: about a layer of a model of 7B parameters."""
TOKENIZER_FILES = (
    "tokenizer*",
    "vocab*",
    "merges.txt",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template*",
)


class Policy:
    """π: log-probs of completions, and the weights behind them."""

    def __init__(self, folder: Path, config: Config, ranks: Ranks) -> None:
        """Start from the reference model in `folder`."""
        self._folder = folder
        self._ranks = ranks
        module = load_model(folder, config)
        self._adapter = Adapter(module.model, config) if config.train.lora is not None else None
        if self._adapter:
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
        """Meanwhile log-probs are those of the model that training began with: without adapter and dropout."""
        assert self._adapter is not None, "only LoRA leaves the model as it was"
        with self.learner.evaluating(), self._adapter.disabled():
            yield

    def named_weights(self) -> Iterator[tuple[str, Tensor]]:
        """Each weight under its name in the Hugging Face checkpoint, an adapter merged into it.

        ZeRO-3's are gathered a bucket at a time, so every rank has to take them all.
        """
        for bucket in _buckets(self._base_parameters()):
            updates = [update for _, _, update in bucket if update]
            parts = [parameter for _, parameter, _ in bucket]
            parts += [part for update in updates for part in (update.down_RI, update.up_OR)]
            with self.learner.gathered(parts):
                weights = [(name, self._whole(parameter, update)) for name, parameter, update in bucket]
            yield from weights

    def _whole(self, parameter: nn.Parameter, update: LowRankUpdate | None) -> Tensor:
        if update:
            return update.added_to(parameter)
        return parameter.detach().clone() if self.learner.is_partitioned else parameter.detach()

    def _base_parameters(self) -> Iterator[tuple[str, nn.Parameter, LowRankUpdate | None]]:
        parameters = self.learner.module.model.named_parameters()
        if self._adapter:
            return self._adapter.merged_weights(parameters)
        return ((name, parameter, None) for name, parameter in parameters)

    def _adapter_weights(self) -> Iterator[tuple[str, Tensor]]:
        for name, parameter in self.learner.module.model.named_parameters():
            if parameter.requires_grad:
                with self.learner.gathered([parameter]):
                    weight = parameter.detach().clone()
                yield name, weight

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
            with writing_to(temporary):
                self.learner.module.model.save_pretrained(temporary, state_dict=state)
                if self._adapter:
                    self._adapter.save(temporary / "adapter", adapter_state)
                for pattern in TOKENIZER_FILES:
                    for file in self._folder.glob(pattern):
                        shutil.copy2(file, temporary)
            shutil.rmtree(folder, ignore_errors=True)
            temporary.rename(folder)
        self._ranks.wait()

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
