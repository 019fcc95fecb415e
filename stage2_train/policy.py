"""The policy under training: a learner whose weights have the names of a Hugging Face checkpoint."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from torch import Tensor

from common.files import new_folder
from stage2_train.batch import TokenBatch, TokenLogprobs
from stage2_train.config import Config
from stage2_train.exported import broken_weight, refuse_broken
from stage2_train.learner import Learner
from stage2_train.logprobs import VocabularyHead, token_logprobs
from stage2_train.network import Gather, Network, in_main_memory
from stage2_train.ranks import Ranks


class Policy:
    """π: log-probs of completions, and the weights behind them."""

    def __init__(self, folder: Path, config: Config, ranks: Ranks) -> None:
        """Start from the reference model in `folder`."""
        self._ranks = ranks
        self._engine_takes_adapter = config.engine_takes_adapter
        self._network = Network(folder, config)
        module = self._network.module
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
        assert self._network.adapter is not None, "only LoRA leaves the model as it was"
        with self.learner.evaluating(), self._network.adapter.disabled():
            yield

    def named_weights(self) -> Iterator[tuple[str, Tensor]]:
        """Each weight under its name and in its shape in the reference's checkpoint, an adapter merged into it.

        Under ZeRO-3 they are gathered one bucket at a time, so every rank must iterate over all of them.
        """
        return self._network.named_weights(self._gather)

    def weights_for_engine(self) -> Iterable[tuple[str, Tensor]]:
        """What the engine takes: all weights, or those of the adapter by the names of peft. A collective operation."""
        if not self._engine_takes_adapter:
            return self.named_weights()
        assert self._network.adapter is not None, "there is an adapter to take"
        return self._network.adapter.state(dict(self._network.adapter_weights(self._gather))).items()

    @property
    def _gather(self) -> Gather | None:
        return self.learner.gathered if self.learner.is_partitioned else None

    def export(self, folder: Path) -> None:
        """Write the policy as the reference's folder with the trained weights, whole or not at all.

        An adapter is merged into the weights, and also written to folder/adapter in peft's format. Raises UserError
        if a weight is not finite.
        """
        state = in_main_memory(self.named_weights(), self._ranks)
        adapter_state = in_main_memory(self._network.adapter_weights(self._gather), self._ranks)
        refuse_broken(self._ranks.from_main(broken_weight(state)), "train.learning_rate")
        if self._ranks.is_main:
            with new_folder(folder) as temporary:
                self._network.write(temporary, state, adapter_state)
        self._ranks.wait()
