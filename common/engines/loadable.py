"""A model's folder as vLLM shall see it."""

import hashlib
import json
from contextlib import suppress
from pathlib import Path

from common.model.weights import read_weights


def loadable_folder(folder: Path, run: Path) -> Path:
    """The folder; where it holds weights that are not the model's, one of links to the others within the run's.

    vLLM loads every safetensors file that no index leaves out, and prefers those that are called consolidated. The
    links' place depends on nothing but where they lead, so that what vLLM has compiled for a model is found again.
    """
    unread = {file.name for file in read_weights(folder).unread}
    if not unread:
        return folder
    targets = {file.name: str(file.resolve()) for file in sorted(folder.iterdir()) if file.name not in unread}
    digest = hashlib.sha256(json.dumps(targets).encode()).hexdigest()[:16]
    links = run / "loadable_model" / digest
    links.mkdir(parents=True, exist_ok=True)
    for name, target in targets.items():
        with suppress(FileExistsError):  # of an earlier start, or another rank's
            (links / name).symlink_to(target)
    return links
