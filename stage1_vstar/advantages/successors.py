"""The states that next steps lead to, as tokens; checks of a table of states before a model loads."""

from array import array
from collections.abc import Iterator, Mapping
from pathlib import Path

import polars as pl

from common.config import RunConfig
from common.data.rendering import PromptRenderer
from common.grading import fingerprint
from common.model.files import model_identity, reference_model
from common.provenance import Allowance, Provenance, sampling_identity
from common.runs import run_paths
from common.segments.critic import refuse_longer
from common.segments.files import SEGMENTS_TABLE
from common.table_origin import PROMPT, prompt_rows, prompts_of, refuse_other_steps

COLUMNS = (*PROMPT, "prefix_token_ids", "action_token_ids", "action_ends")

PromptTokens = Mapping[str, "array[int]"]
"""The tokens of each prompt, by its id."""


def renderer_of(
    config: RunConfig, segments: Path, provenance: Provenance, allowance: Allowance
) -> PromptRenderer:
    """The run's renderer. Raises UserError if the table of states was not made as the run's config says."""
    folder = reference_model(config)
    renderer = PromptRenderer(folder, config.data)
    model = model_identity(folder, run_paths(config.run).known_weights)
    identity = sampling_identity(config, renderer, model, fingerprint(config.grader))
    refuse_other_steps(identity, provenance, segments, allowance)
    return renderer


def checked_prompts(
    config: RunConfig, segments: Path, renderer: PromptRenderer, allowance: Allowance, critic: Path | None
) -> PromptTokens:
    """The prompts of a table of states, which is read whole, in bounded memory.

    Raises UserError if they have other tokens now, or if a state that the critic is asked for is beyond its context.
    """
    theirs, lengths = [], []
    for rows in SEGMENTS_TABLE.scan(segments, COLUMNS):
        theirs.append(prompt_rows(rows))
        lengths.append(_lengths(rows))
    known = prompt_rows(pl.concat(theirs))
    prompts = {
        prompt.id: prompt.token_ids
        for prompt in prompts_of(known, config.data, renderer, segments, allowance)
    }
    if critic is not None:
        found = (
            len(prompts[prompt]) + length
            for prompt, length in pl.concat(lengths).iter_rows()
            if prompt in prompts
        )
        refuse_longer(max(found, default=0), critic)
    return prompts


def _lengths(rows: pl.DataFrame) -> pl.DataFrame:
    """The tokens of the longest successor of each prompt, without those of the prompt."""
    steps = rows.select(
        "prompt_id", "action_token_ids", "action_ends", before=pl.col("prefix_token_ids").list.len()
    ).explode("action_token_ids", "action_ends")
    length = pl.col("before") + pl.col("action_token_ids").list.len()
    return steps.filter(~pl.col("action_ends")).group_by("prompt_id").agg(length.max())


def successors(rows: pl.DataFrame, prompts: PromptTokens) -> Iterator["array[int]"]:
    """The tokens of prompt, prefix and next step, for each step that does not end the solution."""
    columns = ("prompt_id", "prefix_token_ids", "action_token_ids", "action_ends")
    for prompt, prefix, actions, ends in rows.select(columns).iter_rows():
        for action, is_last in zip(actions, ends, strict=True):
            if not is_last:
                yield prompts[prompt] + array("i", prefix) + array("i", action)
