"""Decides how a completion ended: searches for stop strings and checks the engine's report against the tokens."""

from collections.abc import Callable, Collection, Sequence

from common.config import SamplingParams
from common.data.rendering import PromptRenderer
from common.errors import UserError
from common.rollout import Completion, SampleRequest
from common.token_texts import TokenTexts

SPARE = 4
"""Tokens to decode besides those of a stop string: its first character may begin in an earlier token."""


class StopStrings:
    """Texts that end a completion, searched for after each sampled token."""

    def __init__(self, texts: Sequence[str], decode: Callable[[Sequence[int]], str]) -> None:
        self._texts = texts
        self._decode = decode
        self._tokens = TokenTexts(texts, decode)
        self._window = max((len(text.encode()) for text in texts), default=0) + SPARE

    def __bool__(self) -> bool:
        return bool(self._texts)

    def may_complete(self, token: int) -> bool:
        """Whether the token can be the last of a stop string: only after such a token is the text searched."""
        return self._tokens.may_complete(token)

    def end(self, token_ids: Sequence[int]) -> bool:
        """Whether the last token of a completion has completed a stop string."""
        return (
            bool(token_ids)
            and self.may_complete(token_ids[-1])
            and self.before(self._decode(self._latest(token_ids))) is not None
            and self.before(self._decode(token_ids)) is not None
        )

    def _latest(self, token_ids: Sequence[int]) -> Sequence[int]:
        """The last tokens, as many as a stop string can be of and those between them that have no text."""
        start, rest = len(token_ids), self._window
        while start and rest:
            start -= 1
            rest -= bool(self._tokens.of(token_ids[start]))
        return token_ids[start:]

    def before(self, text: str) -> str | None:
        """The text before the stop string that is complete first; None if it contains no stop string."""
        ends = [(place + len(each), place) for each in self._texts if (place := text.find(each)) >= 0]
        return text[: min(ends)[1]] if ends else None


class Endings:
    """Makes completions from the tokens and the report of an engine, for one model and one `[sampling]`."""

    def __init__(self, renderer: PromptRenderer, sampling: SamplingParams) -> None:
        self.stop = StopStrings(sampling.stop, renderer.decode)
        self._decode = renderer.decode
        self._eos_token_ids = frozenset(renderer.eos_token_ids)
        self.limit = sampling.max_completion_tokens

    def completion(
        self,
        request: SampleRequest,
        token_ids: Sequence[int],
        reason: str | None,
        sampled_logprobs: Sequence[float] | None,
    ) -> Completion:
        """A completion from its tokens, its prefix included, and the engine's finish reason, "stop" or "length".

        Raises UserError.
        """
        text = self._decode(token_ids)
        before = self.stop.before(text)
        return Completion(
            key=request.key,
            token_ids=tuple(token_ids),
            text=text if before is None else before,
            truncated=is_truncated(
                reason, token_ids, self.limit, self._eos_token_ids, holds_stop_string=before is not None
            ),
            sampled_logprobs=None if sampled_logprobs is None else tuple(sampled_logprobs),
        )


def is_truncated(
    reason: str | None,
    token_ids: Sequence[int],
    limit: int,
    eos_token_ids: Collection[int],
    *,
    holds_stop_string: bool = False,
) -> bool:
    """Whether a completion was cut off at `limit` tokens ("length") instead of ending by itself ("stop").

    Raises UserError if the engine's report contradicts the tokens, since its reward depends on which of them is right.
    """
    if reason == "stop" and token_ids and (token_ids[-1] in eos_token_ids or holds_stop_string):
        return False
    if reason == "length" and len(token_ids) == limit and not holds_stop_string:
        return True
    last = f"ends with token {token_ids[-1]}" if token_ids else "is empty"
    raise UserError(
        f'the engine says of a completion of {len(token_ids)} tokens that it ended by "{reason}", but it {last}'
        f"{' and holds a stop string' if holds_stop_string else ''}, where completions end at "
        f"{sorted(eos_token_ids)}, at a text of sampling.stop or after sampling.max_completion_tokens = {limit}; "
        "correct eos_token_id in the model's generation_config.json, or try the other engine.backend"
    )
