"""A tiny model through both stages, as a program: `python -m tests.model_pipeline NAME BACKEND DTYPE FOLDER`."""

import json
import sys
from pathlib import Path

from benchmarks.models import measured

if __name__ == "__main__":
    name, backend, dtype, folder = sys.argv[1:]
    (Path(folder) / "row.json").write_text(json.dumps(measured(name, backend, dtype, Path(folder))))
