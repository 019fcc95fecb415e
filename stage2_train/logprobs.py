"""Log-probs of completions under a causal language model. The policy's and the reference's come from here alone.

Only the positions that predict a completion token reach the vocabulary, a chunk of them at a time, and in training
each chunk's logits are computed again in the backward pass instead of being kept: with Qwen2.5's vocabulary of 151,936
the logits of a single completion of 1,280 tokens take 778 MB, and several copies of them would live at once.

Shapes: _B sequence, _T position, _K completion token of the batch, _H hidden, _V vocabulary.
"""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.functional import linear
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from common.config import Config
from common.errors import UserError
from stage2_train.batch import TokenBatch

LOGITS_PER_CHUNK = 2**26
"""Elements of the largest logits tensor: 256 MiB in float32."""


LOGIT_TRANSFORMS = ("final_logit_softcapping", "logit_scale", "logits_scaling")
"""Settings with which some models change the logits after the output layer; the log-probs here do not."""


@dataclass(frozen=True, slots=True)
class TokenLogprobs:
    """ln π(y_t | x, y_<t) of each completion token, and the entropy of π there (detached), both of shape (K,)."""

    logprobs_K: Tensor
    entropy_K: Tensor


class VocabularyHead(nn.Module):
    """The last layer, from hidden states to the log-probs of given tokens, a chunk of positions at a time.

    It reads the layer's weights instead of calling it, so that it is one step of the network however many chunks there
    are: under ZeRO-3 each call of a layer is a collective operation, and ranks differ in their number of chunks.
    """

    def __init__(self, lm_head: nn.Linear, temperature: float) -> None:
        super().__init__()
        self.lm_head = lm_head
        self.temperature = temperature

    def forward(self, hidden_KH: Tensor, target_K: Tensor) -> tuple[Tensor, Tensor]:
        """Log-probs of the targets and the entropy at each position, shape (K,) each, in float32."""
        size = max(1, LOGITS_PER_CHUNK // self.lm_head.out_features)
        chunks = list(zip(torch.split(hidden_KH, size), torch.split(target_K, size), strict=True))
        recompute = torch.is_grad_enabled() and len(chunks) > 1
        parts = [
            checkpoint(self._chunk, hidden, target, use_reentrant=False)
            if recompute
            else self._chunk(hidden, target)
            for hidden, target in chunks
        ]
        return torch.cat([part[0] for part in parts]), torch.cat([part[1] for part in parts])

    def _chunk(self, hidden_KH: Tensor, target_K: Tensor) -> tuple[Tensor, Tensor]:
        logits_KV = linear(hidden_KH, self.lm_head.weight, self.lm_head.bias).float() / self.temperature
        normaliser_K = logits_KV.logsumexp(-1)
        logprobs_K = logits_KV.gather(-1, target_K[:, None])[:, 0] - normaliser_K
        with torch.no_grad():
            probabilities_KV = (logits_KV - normaliser_K[:, None]).exp()
            entropy_K = normaliser_K - (probabilities_KV * logits_KV).sum(-1)
        return logprobs_K, entropy_K


class LogprobModel(nn.Module):
    """A causal language model whose forward pass gives the log-probs of a batch's completions."""

    def __init__(self, model: PreTrainedModel, temperature: float) -> None:
        """`temperature` is the sampling temperature: the policy is the distribution that completions come from."""
        super().__init__()
        self.model = model
        self.head = VocabularyHead(model.lm_head, temperature)

    def forward(self, input_ids_BT: Tensor, is_completion_BT: Tensor) -> tuple[Tensor, Tensor]:
        """Log-probs and entropies of the completion tokens in row order, shape (K,) each, in float32."""
        hidden_BTH = self.model.model(input_ids=input_ids_BT, use_cache=False).last_hidden_state
        predicts_BT = is_completion_BT[:, 1:]
        log_probs: tuple[Tensor, Tensor] = self.head(
            hidden_BTH[:, :-1][predicts_BT], input_ids_BT[:, 1:][predicts_BT]
        )
        return log_probs


def load_model(folder: Path, config: Config) -> LogprobModel:
    """The model in `folder`, ready to give log-probs at the sampling temperature."""
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, config.model.dtype))
    reshapes_logits = [name for name in LOGIT_TRANSFORMS if getattr(model.config, name, None)]
    if reshapes_logits or not (hasattr(model, "model") and hasattr(model, "lm_head")):
        raise UserError(
            f"{folder}: models of type {model.config.model_type} cannot be trained, "
            f"{'for their ' + ', '.join(reshapes_logits) if reshapes_logits else 'for want of a plain output layer'}; "
            "use a model of the Qwen, Llama or Mistral kind"
        )
    return LogprobModel(model, config.sampling.temperature or 1.0)


def token_logprobs(module: nn.Module, batch: TokenBatch) -> TokenLogprobs:
    """The log-probs of a batch under a LogprobModel, or under an engine that wraps one."""
    return TokenLogprobs(*module(batch.input_ids_BT, batch.is_completion_BT))
