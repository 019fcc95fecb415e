"""A model's folder as vLLM shall see it."""

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from common.model.weights import read_weights


@contextmanager
def loadable_folder(folder: Path) -> Iterator[Path]:
    """The folder; meanwhile one of links to its files where it holds weights that are not the model's.

    vLLM loads every safetensors file that no index leaves out, and prefers those that are called consolidated.
    """
    unread = {file.name for file in read_weights(folder).unread}
    if not unread:
        yield folder
        return
    with tempfile.TemporaryDirectory(prefix="astar-po-model-") as temporary:
        for file in folder.iterdir():
            if file.name not in unread:
                Path(temporary, file.name).symlink_to(file.resolve())
        yield Path(temporary)
