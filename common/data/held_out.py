"""Compares held-out and training prompts: are they shown in the same way, and do they share questions?"""

from collections.abc import Iterable

from common.config import DataConfig, RunConfig
from common.data.datasets import format_of, read_rows, recognised_as
from common.data.framing import framing_identity
from common.data.messages import turns_of
from common.data.rendering import prompt_template
from common.errors import UserError
from common.provenance import differences


def remarks(config: RunConfig, held_out: Iterable[str], training: Iterable[str]) -> list[str]:
    """Lines for readers of held-out figures: the format found, other templates, questions that are also trained on."""
    data = config.held_out
    assert data is not None, "there are held-out prompts"
    seen = [recognised_as(data, format_of(data))] if data.format == "auto" else []
    return [*seen, *_asked_otherwise(config.data, data), *_shared(list(held_out), training)]


def remarks_beside_data(config: RunConfig, held_out: Iterable[str]) -> list[str]:
    """The same, reading the training prompts from [data]; a line says so if they cannot be read."""
    try:
        training = [row.question for row in read_rows(config.data, config)]
    except UserError as error:
        is_template_known = config.data.template is not None or config.data.format != "auto"
        return [
            *(remarks(config, held_out, ()) if is_template_known else []),
            f"whether held-out prompts are also training prompts cannot be told: {error}",
        ]
    return remarks(config, held_out, training)


def _asked_otherwise(training: DataConfig, held_out: DataConfig) -> list[str]:
    ours, theirs = prompt_template(training), prompt_template(held_out)
    found = []
    if ours != theirs:
        found.append(
            f"held-out prompts are asked in another template, {theirs!r}, than training prompts, {ours!r}: "
            "set evaluate.data.template to that of [data] if this is not meant"
        )
    lines = differences(framing_identity(training), framing_identity(held_out))
    if lines and ours == theirs:
        found.append(
            f"held-out prompts are shown with another {', '.join(lines)} than training prompts: set it under "
            "[evaluate.data] as under [data] if this is not meant"
        )
    return found


def _shared(held_out: list[str], training: Iterable[str]) -> list[str]:
    known = {_normalised(question) for question in training}
    shared = sum(_normalised(question) in known for question in held_out)
    if not shared:
        return []
    return [
        f"{shared:,} of {len(held_out):,} held-out prompts are also training prompts: their accuracy says little about "
        "new questions; take other rows for evaluate.data"
    ]


def _normalised(question: str) -> str:
    return " ".join(turns_of(question)[-1]["content"].split())
