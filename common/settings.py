"""A run's settings: by dotted key, as TOML, and for the reader."""

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from pydantic import BaseModel

from common.config import RunConfig
from common.runs import OWN


def own_models(config: RunConfig) -> dict[str, str]:
    """The paths of models that are in the run's own folder, by key."""
    paths = {"model.path": config.model.path, "segments.completer": config.segments.completer}
    return {key: path for key, path in paths.items() if path is not None and OWN in path}


def makes_base_model(config: RunConfig) -> bool:
    """Whether the run's reference is the demo's, which `base-model` makes in the run's folder."""
    return config.model.path == f"{OWN}/base_model"


class Loader(Protocol):
    """Loads a run's config from a TOML file and overrides; also says which commands make what its training reads."""

    def __call__(
        self, path: Path, overrides: Sequence[str] = (), run: str | None = None
    ) -> tuple[RunConfig, Sequence[str]]:
        """Raises UserError for an invalid config."""
        ...


def flat(table: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """The values of a nested table by dotted key."""
    values: dict[str, Any] = {}
    for key, value in table.items():
        values |= flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return values


def as_toml(value: Any) -> str:
    """A value as TOML writes it."""
    if isinstance(value, bool | str):
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")  # TOML is stricter than JSON
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(as_toml, value))}]"
    if isinstance(value, dict):
        return f"{{{', '.join(f'{as_toml(key)} = {as_toml(inner)}' for key, inner in value.items())}}}"
    return str(value)


def shown(value: Any) -> str:
    """A value for the reader."""
    if isinstance(value, float):
        return "∞" if math.isinf(value) else f"{value:g}"
    return value if isinstance(value, str) else as_toml(value)


def as_document(config: BaseModel) -> str:
    """A config as a TOML file that gives the same config: the values that were set, without the defaults."""
    values = config.model_dump(exclude_unset=True, exclude_none=True)
    lines = [f"{key} = {as_toml(value)}" for key, value in values.items() if not isinstance(value, dict)]
    for name, table in values.items():
        if isinstance(table, dict):
            lines += ["", f"[{name}]", *(f"{key} = {as_toml(value)}" for key, value in table.items())]
    return "\n".join(lines) + "\n"
