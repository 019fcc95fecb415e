"""Read JSON files that commands of this project have written, and validate their contents."""

from pathlib import Path
from typing import TypeVar

from pydantic import BaseModel, FiniteFloat, TypeAdapter, ValidationError

from common.errors import DamagedFile
from common.files import whole_lines

Document = TypeVar("Document", bound=BaseModel)

_LINE = TypeAdapter(dict[str, FiniteFloat | None])


def read_document(path: Path, kind: type[Document], remedy: str) -> Document:
    """The content of a JSON file. Raises DamagedFile, with advice, if it cannot be read or lacks something."""
    try:
        return kind.model_validate_json(path.read_bytes())
    except OSError as error:
        raise _unreadable(path, error) from error
    except ValidationError as error:
        raise DamagedFile(f"{path} is damaged: {_problem(error)}; {remedy}") from error


def read_metrics(path: Path) -> list[tuple[str, dict[str, float]]]:
    """The numbers of each complete line of metrics.jsonl.

    Raises DamagedFile for a line that holds something else.
    """
    try:
        lines = whole_lines(path)
    except OSError as error:
        raise _unreadable(path, error) from error
    found = []
    for number, line in enumerate(lines, start=1):
        try:
            values = {
                name: value for name, value in _LINE.validate_json(line.rstrip()).items() if value is not None
            }
        except ValidationError as error:
            raise _damaged_line(path, number, _problem(error).replace(" line 1 column", " column")) from error
        if "iteration" not in values:
            raise _damaged_line(path, number, "it names no iteration")
        found.append((line.decode(), values))
    return found


def _damaged_line(path: Path, number: int, problem: str) -> DamagedFile:
    return DamagedFile(
        f"{path}, line {number} is damaged: {problem}; remove the line: nothing but its point in the curves is lost"
    )


def _unreadable(path: Path, error: OSError) -> DamagedFile:
    return DamagedFile(f"cannot read {path}: {error.strerror}; correct its permissions, or remove it")


def _problem(error: ValidationError) -> str:
    """The first error, and where it is."""
    first = error.errors(include_input=False, include_url=False)[0]
    return ": ".join([*([".".join(map(str, first["loc"]))] if first["loc"] else []), first["msg"]])
