"""How a completion ended, by the engine's own word."""

from collections.abc import Collection, Sequence

from common.errors import UserError


def is_truncated(
    reason: str | None, token_ids: Sequence[int], limit: int, eos_token_ids: Collection[int]
) -> bool:
    """Whether a completion was cut off at `limit` tokens ("length") instead of ending by itself ("stop").

    Raises UserError where the engine's word contradicts the tokens: every reward would depend on who is right.
    """
    if reason == "stop" and token_ids and token_ids[-1] in eos_token_ids:
        return False
    if reason == "length" and len(token_ids) == limit:
        return True
    last = f"ends with token {token_ids[-1]}" if token_ids else "is empty"
    raise UserError(
        f'the engine says of a completion of {len(token_ids)} tokens that it ended by "{reason}", but it {last}, where '
        f"completions end at {sorted(eos_token_ids)} or after sampling.max_completion_tokens = {limit}; correct "
        "eos_token_id in the model's generation_config.json, or try the other engine.backend"
    )
