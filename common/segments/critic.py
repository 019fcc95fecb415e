"""A trained critic's folder, as other jobs see it: whether it is there, its states, its context."""

from pathlib import Path

from pydantic import BaseModel

from common.documents import read_document
from common.errors import UserError
from common.model.files import model_numbers
from common.remote.copies import fetched
from common.runs import RunPaths

CRITIC_COMMAND = "python cli.py critic"


class _TrainedWith(BaseModel):
    segments: str | None = None


class _Record(BaseModel):
    trained_with: _TrainedWith


def refuse_missing_critic(critic: Path, otherwise: str = "") -> None:
    """Raise UserError unless a finished critic is in this folder; `otherwise` is what else the user may do."""
    if not (fetched(critic, whole=True) / RunPaths.TRAINED_WITH).is_file():
        raise UserError(f"there is no critic {critic}; train it with `{CRITIC_COMMAND}`{otherwise}")


def trained_on(critic: Path) -> str | None:
    """The hash of the table of states that a critic was trained on; None if that is not recorded."""
    file = critic / RunPaths.TRAINED_WITH
    return read_document(file, _Record, f"remove {critic}, and train the critic again").trained_with.segments


def refuse_longer(longest: int, model: Path) -> None:
    """Raise UserError if a state of `longest` tokens, prompt included, is beyond the context of a critic's model."""
    context = model_numbers(model).get("max_position_embeddings")
    if context is not None and longest > context:
        raise UserError(
            f"the longest solution has {longest} tokens with its prompt, more than the context of {context} of the "
            f"critic's model {model}; choose another critic.model"
        )
