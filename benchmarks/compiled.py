"""Stage 2's networks with each layer compiled by torch, to measure what that would gain. The product does not do it."""

from collections.abc import Iterator
from contextlib import contextmanager
from unittest.mock import patch

from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from stage2_train.logprobs import LogprobModel


@contextmanager
def compiled_layers() -> Iterator[None]:
    """The layers of each policy and reference that is loaded inside are compiled at their first use, for all shapes."""
    plain = LogprobModel.__init__

    def compiled(self: LogprobModel, model: PreTrainedModel, temperature: float) -> None:
        plain(self, model, temperature)
        for part in model.modules():
            if isinstance(part, GradientCheckpointingLayer):
                part.compile(dynamic=True)

    with patch.object(LogprobModel, "__init__", compiled):
        yield
