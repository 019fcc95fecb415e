"""Refuse a table, of V̂*, of states or of advantages, that was not made as this run's config says."""

from collections.abc import Collection
from pathlib import Path
from typing import Any

import polars as pl

from common.config import DataConfig
from common.data.prompts import prompts_from_pairs
from common.data.rendering import PromptRenderer
from common.errors import UserError
from common.provenance import Allowance, Provenance
from common.rollout import Prompt

PROMPT = ("prompt_id", "prompt", "answer", "prompt_token_hash")
"""The columns of a row's prompt."""
PROMPT_TOKENS = "prompt.tokens"
"""The name by which --allow-mismatch accepts prompts with other tokens."""


def refuse_other_identity(
    identity: dict[str, Any],
    provenance: Provenance,
    file: Path,
    allowance: Allowance,
    *,
    besides: Collection[str] = (),
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


def refuse_other_steps(
    identity: dict[str, Any], provenance: Provenance, file: Path, allowance: Allowance
) -> None:
    """The same for a table of states, or of advantages."""
    refuse_other_identity(
        identity,
        provenance,
        file,
        allowance,
        advice="values of steps are those of one model, template, sampling and grader: use those, make the table "
        "again with another --run",
    )


def prompt_rows(rows: pl.DataFrame) -> pl.DataFrame:
    """The prompts of a table's rows, each once."""
    return rows.select(PROMPT).unique("prompt_id", maintain_order=True)


def prompts_of(
    rows: pl.DataFrame, data: DataConfig, renderer: PromptRenderer, file: Path, allowance: Allowance
) -> list[Prompt]:
    """The prompts of a table's rows, each once, without those that `data` leaves out for their length.

    Raises UserError unless they have the tokens that the rows were made with, and see `prompts_from_pairs`.
    """
    prompts = prompts_from_pairs(
        rows.select("prompt", "answer").unique(maintain_order=True).iter_rows(), data, renderer
    )
    theirs = dict(zip(rows["prompt_id"], rows["prompt_token_hash"], strict=True))
    different = [prompt.id for prompt in prompts if theirs[prompt.id] not in (None, prompt.token_hash)]
    if different:
        line = f"{PROMPT_TOKENS} differ for {len(different):,} prompts, such as {different[0]}"
        if not allowance.permits(PROMPT_TOKENS, line):
            raise UserError(
                f"{file}: its prompts were rendered to other token ids: {line}; use the tokenizer and the library "
                "versions that it was made with, make it again with another --run, or accept it with "
                f"--allow-mismatch {PROMPT_TOKENS}"
            )
    return prompts
