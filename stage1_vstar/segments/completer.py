"""The model that completes states: the reference, or another one that reads the same tokens."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from common.config import RunConfig
from common.data.prompts import check_fit
from common.data.rendering import PromptRenderer
from common.errors import UserError
from common.model.files import resolve_model
from common.model.trainable import read_trainable
from common.rollout import Prompt
from common.runs import run_paths


def completer_model(
    config: RunConfig, reference: Path, renderer: PromptRenderer, prompts: Sequence[Prompt]
) -> Path:
    """The folder of the completer, by default the reference's; {run} in its path stands for the run's own folder.

    Raises UserError, as for a reference, if it cannot complete these prompts.
    """
    if (path := config.segments.completer) is None:
        return reference
    with _named():
        folder = resolve_model(path.replace("{run}", str(run_paths(config.run).root)), None)
        if folder == reference:
            return folder
        read_trainable(folder, config)
        check_fit(prompts, config, folder)
        theirs = PromptRenderer(folder, config.data)
    _refuse_other_tokens(renderer, theirs, config)
    return folder


@contextmanager
def _named() -> Iterator[None]:
    """Say of a UserError that it is about the completer."""
    try:
        yield
    except UserError as error:
        raise UserError(f"segments.completer: {error}") from error


def _refuse_other_tokens(ours: PromptRenderer, theirs: PromptRenderer, config: RunConfig) -> None:
    """Raise UserError unless a completer reads the same token ids, and ends with the same ones."""
    if ours.tokenizer.get_vocab() != theirs.tokenizer.get_vocab():
        raise UserError(
            f"segments.completer {config.segments.completer} has another tokenizer than {config.model.path}, so it "
            "would read another text than the solution's; choose a completer with the same tokenizer"
        )
    if ours.eos_token_ids != theirs.eos_token_ids:
        raise UserError(
            f"segments.completer {config.segments.completer} ends completions with the tokens "
            f"{list(theirs.eos_token_ids)}, {config.model.path} with {list(ours.eos_token_ids)}; correct eos_token_id "
            "in generation_config.json of one of them"
        )
