"""Gives vLLM a folder that holds only the weights of the model."""

import hashlib
import json
from contextlib import suppress
from pathlib import Path

from common.model.weights import read_weights


def loadable_folder(folder: Path, run: Path) -> Path:
    """The model's folder. If it holds other weights too, a folder of the run with links to all files but those.

    vLLM would load the other weights: it loads every safetensors file that no index excludes, and prefers consolidated
    files. The path of the links depends only on their targets, so that vLLM finds its compilation cache again.
    """
    unread = {file.name for file in read_weights(folder).unread}
    if not unread:
        return folder
    targets = {file.name: str(file.resolve()) for file in sorted(folder.iterdir()) if file.name not in unread}
    digest = hashlib.sha256(json.dumps(targets).encode()).hexdigest()[:16]
    links = run / "loadable_model" / digest
    links.mkdir(parents=True, exist_ok=True)
    for name, target in targets.items():
        with suppress(FileExistsError):  # made by an earlier start or another rank
            (links / name).symlink_to(target)
    return links
