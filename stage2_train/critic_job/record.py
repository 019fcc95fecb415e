"""What a critic was trained with: decides whether a run's critic is finished, and refuses another one's place."""

from pathlib import Path
from typing import Any

from pydantic import BaseModel

from common.documents import read_document
from common.errors import UserError
from common.files import file_digest
from common.provenance import differences
from common.runs import RunPaths
from common.segments.config import CRITIC_TRAIN_KEYS
from stage2_train.config import Config


class Record(BaseModel):
    """The content of a critic's astar_po.json."""

    trained_with: dict[str, Any]
    context: dict[str, Any]
    """For the reader: versions and the commit."""


def trained_with(config: Config, segments: Path, model: dict[str, Any]) -> dict[str, Any]:
    """Everything that a critic depends on; `model` is the identity of the model that it starts from."""
    return {
        "critic": config.critic.model_dump(mode="json", exclude={"model"}),
        "train": config.train.model_dump(mode="json", include=set(CRITIC_TRAIN_KEYS)),
        "dtype": config.model.dtype,
        "seed": config.seed,
        "model": model,
        "segments": file_digest(segments),
    }


def is_finished(folder: Path, ours: dict[str, Any]) -> bool:
    """Whether the critic in `folder` is the one that would be trained. Raises UserError if it is another one."""
    file = folder / RunPaths.TRAINED_WITH
    if not file.is_file():
        return False
    found = read_document(file, Record, f"remove {folder}, and the critic is trained again")
    if lines := differences(ours, found.trained_with):
        raise UserError(
            f"{folder} was trained with other settings or another table: {'; '.join(lines.values())}; choose another "
            "--run, or delete that folder"
        )
    return True
