"""Log-probs of completions under a causal language model; the only source of the policy's and the reference's.

Logits are computed only at positions that predict a completion token, and for one slice of the vocabulary at a time.
With Qwen2.5's vocabulary of 151,936 the logits of a single completion of 1,280 tokens take 778 MB in float32, and
autograd keeps several tensors of that size. `LinearLogprobs` holds the logits of one slice, in the parameters' dtype.

Shapes: _B sequence, _T position, _K completion token of the batch, _R of a block of these, _H hidden, _V vocabulary,
_C column of a slice of it, _S slice.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from common.model.output_layer import LogitTransform, logit_transform, output_layer, text_trunk
from common.model.pretrained import load_causal_lm
from stage2_train.batch import TokenBatch, TokenLogprobs
from stage2_train.config import Config

LOGITS_PER_CHUNK = 2**26
"""Elements of the largest logits tensor: 256 MiB in float32, 128 MiB in bfloat16."""
LOGITS_PER_BLOCK = 2**22
"""Elements of it whose softmax is computed at a time, in float32: temporaries of 16 MiB, about a processor's cache."""


class VocabularyHead(nn.Module):
    """The last layer, from hidden states to the log-probs of given tokens.

    It reads the layer's weights instead of calling it, so that any number of slices counts as one step of the network:
    under ZeRO-3 each call of a layer is a collective operation, and ranks differ in their number of slices.
    """

    def __init__(
        self, lm_head: nn.Linear, temperature: float, transform: LogitTransform | None = None
    ) -> None:
        """`transform` is the model's function of the layer's logits, element by element."""
        super().__init__()
        self.lm_head = lm_head
        self.temperature = temperature
        self.transform = transform

    def forward(self, hidden_KH: Tensor, target_K: Tensor) -> tuple[Tensor, Tensor]:
        """Log-probs of the targets and the entropy at each position, shape (K,) each, in float32."""
        log_probs: tuple[Tensor, Tensor] = LinearLogprobs.apply(  # type: ignore[no-untyped-call]
            hidden_KH, self.lm_head.weight, self.lm_head.bias, target_K, self.temperature, self.transform
        )
        return log_probs


class LinearLogprobs(torch.autograd.Function):
    """ln softmax(f(hidden Wᵀ) / temperature) at given tokens, and the softmax's entropy, by slices of the vocabulary.

    f is the model's elementwise function of its logits, such as a soft cap; mostly the identity.

    Only the backward pass knows g and h, the loss's derivatives with respect to each log-prob and each entropy H. It
    recomputes a slice's logits and overwrites them with the loss's gradient with respect to them, [g (onehot −
    softmax) − h softmax (ln softmax + H)] / temperature. If no loss uses the entropy, h is None and its term is
    skipped. The last slice's logits are still in the buffer from the forward pass, so a single slice is not computed
    twice. Each slice of the weight gets its gradient in one piece, in its own dtype; the gradient of the hidden states
    is summed in float32.

    torch's `linear_cross_entropy` and Liger's `LigerFusedLinearPPO` recompute in the same way, but give no entropy. The
    first also rounds log-probs to a bfloat16 model's dtype; the second holds a float32 gradient of the whole weight.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden_KH: Tensor,
        weight_VH: Tensor,
        bias_V: Tensor | None,
        target_K: Tensor,
        temperature: float,
        transform: LogitTransform | None,
    ) -> tuple[Tensor, Tensor]:
        count = len(target_K)
        slices = _even_slices(len(weight_VH), LOGITS_PER_CHUNK // max(1, count))
        buffer = hidden_KH.new_empty(count * slices[0].stop)
        target_logit_K = torch.zeros(count, dtype=torch.float32, device=hidden_KH.device)
        normaliser_SK = target_logit_K.new_empty(len(slices), count)
        entropy_SK = torch.empty_like(normaliser_SK)
        for number, columns in enumerate(slices):
            logits_KC = _logits(hidden_KH, weight_VH, bias_V, columns, buffer)
            target_K1, is_inside_K1 = _targets_inside(target_K, columns)
            for rows in _row_blocks(logits_KC):
                linear_RC = logits_KC[rows].to(torch.float32, copy=True)
                logits_RC = _transformed(linear_RC, transform).div_(temperature)
                target_logit_K[rows] += (logits_RC.gather(-1, target_K1[rows]) * is_inside_K1[rows])[:, 0]
                normaliser_R = logits_RC.logsumexp(-1)
                log_softmax_RC = logits_RC.sub_(normaliser_R[:, None])
                normaliser_SK[number, rows] = normaliser_R
                entropy_SK[number, rows] = -log_softmax_RC.exp().mul_(log_softmax_RC).sum(-1)
        normaliser_K = normaliser_SK.logsumexp(0)
        # A token is drawn by drawing its slice, then the token within it.
        log_share_SK = normaliser_SK - normaliser_K
        entropy_K = (log_share_SK.exp() * (entropy_SK - log_share_SK)).sum(0)
        ctx.slices, ctx.temperature, ctx.transform = slices, temperature, transform
        ctx.save_for_backward(hidden_KH, weight_VH, bias_V, target_K, normaliser_K, entropy_K, buffer)
        ctx.set_materialize_grads(False)
        return target_logit_K - normaliser_K, entropy_K

    @staticmethod
    def backward(
        ctx: Any, gradient_K: Tensor | None, entropy_gradient_K: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        hidden_KH, weight_VH, bias_V, target_K, normaliser_K, entropy_K, buffer = ctx.saved_tensors
        needs_hidden, needs_weight, needs_bias, *_constants = ctx.needs_input_grad
        sum_dtype = torch.promote_types(hidden_KH.dtype, torch.float32)
        hidden_gradient_KH = torch.zeros_like(hidden_KH, dtype=sum_dtype) if needs_hidden else None
        weight_gradient_VH = torch.empty_like(weight_VH) if needs_weight else None
        bias_gradient_V = torch.empty_like(bias_V) if needs_bias else None
        scaled_K1 = _scaled(
            torch.zeros_like(entropy_K) if gradient_K is None else gradient_K, ctx.temperature
        )
        scaled_entropy_K1 = (
            None if entropy_gradient_K is None else _scaled(entropy_gradient_K, ctx.temperature)
        )
        *_earlier, last = ctx.slices
        for columns in reversed(ctx.slices):
            if columns is last:
                logits_KC = _view(buffer, len(hidden_KH), columns)
            else:
                logits_KC = _logits(hidden_KH, weight_VH, bias_V, columns, buffer)
            target_K1, is_inside_K1 = _targets_inside(target_K, columns)
            for rows in _row_blocks(logits_KC):
                linear_RC = logits_KC[rows].to(torch.float32, copy=True)
                with torch.enable_grad():
                    transformed_RC = _transformed(
                        linear_RC.requires_grad_(bool(ctx.transform)), ctx.transform
                    )
                logits_RC = transformed_RC.detach()
                logits_RC = logits_RC / ctx.temperature if ctx.transform else logits_RC.div_(ctx.temperature)
                log_softmax_RC = logits_RC.sub_(normaliser_K[rows, None])
                factor = scaled_K1[rows]
                if scaled_entropy_K1 is not None:
                    from_entropy_RC = (log_softmax_RC + entropy_K[rows, None]).mul_(scaled_entropy_K1[rows])
                    factor = from_entropy_RC.add_(factor)
                gradient_RC = log_softmax_RC.exp_().mul_(-factor)
                gradient_RC.scatter_add_(-1, target_K1[rows], scaled_K1[rows] * is_inside_K1[rows])
                if ctx.transform:
                    (gradient_RC,) = torch.autograd.grad(transformed_RC, linear_RC, gradient_RC)
                logits_KC[rows] = gradient_RC
            if hidden_gradient_KH is not None:
                hidden_gradient_KH += logits_KC @ weight_VH[columns]
            if weight_gradient_VH is not None:
                torch.mm(logits_KC.T, hidden_KH, out=weight_gradient_VH[columns])
            if bias_gradient_V is not None:
                torch.sum(logits_KC, 0, out=bias_gradient_V[columns])
        if hidden_gradient_KH is not None:
            hidden_gradient_KH = hidden_gradient_KH.to(hidden_KH.dtype)
        return hidden_gradient_KH, weight_gradient_VH, bias_gradient_V, None, None, None


def _scaled(gradient_K: Tensor, temperature: float) -> Tensor:
    return (gradient_K / temperature)[:, None]


def _logits(
    hidden_KH: Tensor, weight_VH: Tensor, bias_V: Tensor | None, columns: slice, buffer: Tensor
) -> Tensor:
    """The logits of a slice of the vocabulary, in the buffer."""
    logits_KC = torch.mm(hidden_KH, weight_VH[columns].T, out=_view(buffer, len(hidden_KH), columns))
    return logits_KC if bias_V is None else logits_KC.add_(bias_V[columns])


def _view(buffer: Tensor, count: int, columns: slice) -> Tensor:
    width = columns.stop - columns.start
    return buffer[: count * width].view(count, width)


def _targets_inside(target_K: Tensor, columns: slice) -> tuple[Tensor, Tensor]:
    """Each target's column in a slice of the vocabulary, 0 if it is in another, and which are inside; (K, 1) each."""
    is_inside_K1 = ((target_K >= columns.start) & (target_K < columns.stop))[:, None]
    return (target_K[:, None] - columns.start) * is_inside_K1, is_inside_K1


def _transformed(linear_RC: Tensor, transform: LogitTransform | None) -> Tensor:
    return linear_RC if transform is None else transform(linear_RC)


def _row_blocks(logits_KC: Tensor) -> list[slice]:
    return _even_slices(len(logits_KC), LOGITS_PER_BLOCK // logits_KC.shape[1])


def _even_slices(count: int, most: int) -> list[slice]:
    """Cut `count` into the fewest slices of at most `most` (or 1), all but the last of one size."""
    pieces = -(-count // max(1, most))
    size = -(-count // max(1, pieces))
    return [slice(start, min(start + size, count)) for start in range(0, count, max(1, size))]


class LogprobModel(nn.Module):
    """A causal language model whose forward pass gives the log-probs of a batch's completions."""

    def __init__(self, model: PreTrainedModel, temperature: float) -> None:
        """`temperature` is the sampling temperature: the policy is the distribution that completions come from.

        Raises UserError if the logits do not come from an output layer.
        """
        super().__init__()
        self.model = model
        self.head = VocabularyHead(output_layer(model), temperature, logit_transform(model))

    def forward(self, input_ids_BT: Tensor, is_completion_BT: Tensor) -> tuple[Tensor, Tensor]:
        """Log-probs and entropies of the completion tokens in row order, shape (K,) each, in float32."""
        hidden_BTH = text_trunk(self.model)(input_ids=input_ids_BT, use_cache=False).last_hidden_state
        predicts_BT = is_completion_BT[:, 1:]
        log_probs: tuple[Tensor, Tensor] = self.head(
            hidden_BTH[:, :-1][predicts_BT], input_ids_BT[:, 1:][predicts_BT]
        )
        return log_probs


def load_model(folder: Path, config: Config) -> LogprobModel:
    """The model in `folder`, ready to give log-probs at the sampling temperature. Raises UserError."""
    return LogprobModel(load_causal_lm(folder, config.model.dtype), config.sampling.temperature or 1.0)


def token_logprobs(module: Callable[..., Any], batch: TokenBatch) -> TokenLogprobs:
    """The log-probs of a batch under a LogprobModel, or under a learner of one."""
    return TokenLogprobs(*module(batch.input_ids_BT, batch.is_completion_BT))
