"""Refuse a table, of V̂* or of advantages, that was not made as this run's config says."""

from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

import polars as pl

from common.errors import UserError
from common.provenance import Allowance, Provenance
from common.rollout import Prompt

PROMPT_TOKENS = "prompt.tokens"
"""The name by which --allow-mismatch accepts prompts with other tokens."""


def refuse_other_origin(
    identity: dict[str, Any],
    provenance: Provenance,
    file: Path,
    allowance: Allowance,
    *,
    besides: Collection[str],
    advice: str,
) -> None:
    """Raise UserError unless a table has this identity, as far as training depends on it.

    `besides` are the names of other differences that the user may accept.
    """
    expected = Provenance(identity=identity, context={})
    allowance.refuse_unknown([*expected.fields(), PROMPT_TOKENS, *besides])
    theirs = {key: value for key, value in provenance.identity.items() if key in identity}
    expected.refuse_unless_same(
        Provenance(identity=theirs, context={}), what=str(file), advice=advice, allowance=allowance
    )


def refuse_other_tokens(
    prompts: Sequence[Prompt], rows: pl.DataFrame, file: Path, allowance: Allowance
) -> None:
    """Raise UserError unless the prompts have the tokens that the table's rows were made with."""
    theirs = dict(zip(rows["prompt_id"], rows["prompt_token_hash"], strict=True))
    different = [prompt.id for prompt in prompts if theirs[prompt.id] not in (None, prompt.token_hash)]
    if not different:
        return
    line = f"{PROMPT_TOKENS} differ for {len(different):,} prompts, such as {different[0]}"
    if not allowance.permits(PROMPT_TOKENS, line):
        raise UserError(
            f"{file}: stage 1 rendered its prompts to other token ids: {line}; use the library versions that "
            "it names (`python cli.py inspect`), make it again with another --run, "
            f"or accept it with --allow-mismatch {PROMPT_TOKENS}"
        )
