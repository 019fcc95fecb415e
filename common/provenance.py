"""The origin of an artifact, its format version, and the refusal to mix work of different origin.

Provenance has two halves. `identity` must be equal for two pieces of work to be mixed: stage 1's samples among
themselves, stage 1's result with stage 2's training. `context` is recorded for the reader and never compared. A
difference is refused by name; `--allow-mismatch NAME` accepts it, and the accepted difference is recorded in the
result.
"""

import importlib.metadata
import json
import platform
import subprocess
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.parquet as pq

from common.config import LATER, DataConfig, RunConfig
from common.errors import DamagedFile, UserError
from common.files import obstacle_at
from common.runs import REPOSITORY

if TYPE_CHECKING:
    from common.data.rendering import PromptRenderer

SCHEMA_VERSION = 5
"""Format version of stage 1's files: samples, grades, vstar.parquet."""

VSTAR_COMMAND = "python cli.py vstar"
"""The command that makes them."""

Migrations = Mapping[int, Callable[[dict[str, Any]], dict[str, Any]]]
"""By format version, the function that migrates a file's metadata to the next version."""

METADATA_KEY = b"astar_po"

ACCEPTED = "accepted_mismatches"
"""Key in a file's context: the differences that were accepted when it was made."""

UNRECORDED = "unrecorded"
"""Value in an identity that its version did not record, so that it cannot be compared."""


def differences(expected: dict[str, Any], found: dict[str, Any], prefix: str = "") -> dict[str, str]:
    """The fields in which two identities differ, each with a text that gives both values."""
    lines: dict[str, str] = {}
    for key in sorted(expected.keys() | found.keys()):
        here, there = expected.get(key), found.get(key)
        name = f"{prefix}{key}"
        if isinstance(here, dict) and isinstance(there, dict):
            lines |= differences(here, there, f"{name}.")
        elif here != there and UNRECORDED not in (here, there):
            lines[name] = f"{name} is {json.dumps(there)} there and {json.dumps(here)} here"
    return lines


def covers(allowed: str, field_name: str) -> bool:
    """Whether `allowed` covers this field, by its own name or by that of a group (`versions`)."""
    return field_name == allowed or field_name.startswith(f"{allowed}.")


@dataclass(frozen=True, slots=True)
class Allowance:
    """The differences that the user accepts: fields by name, and previously accepted differences word for word."""

    fields: Collection[str] = ()
    known: Collection[str] = ()
    used: dict[str, None] = field(default_factory=dict)
    """The differences that have been let through, in order."""

    def permits(self, name: str, line: str) -> bool:
        """Whether this difference may pass; remembers it if so."""
        permitted = line in self.known or any(covers(allowed, name) for allowed in self.fields)
        if permitted:
            self.used[line] = None
        return permitted

    def refuse_unknown(self, names: Collection[str]) -> None:
        """Raise UserError for an allowed field that is not one of `names`."""
        for allowed in self.fields:
            if not any(covers(allowed, name) for name in names):
                raise UserError(
                    f"--allow-mismatch {allowed}: there is no such field; use one of {', '.join(sorted(names))}"
                )


STRICT = Allowance()


@dataclass(frozen=True, slots=True, kw_only=True)
class Provenance:
    """The origin of a file: `identity` is compared before anything is mixed, `context` is for the reader."""

    identity: dict[str, Any]
    context: dict[str, Any]

    @property
    def is_whole(self) -> bool:
        """Whether its version recorded everything that this version compares."""
        return UNRECORDED not in json.dumps(self.identity["model"])

    def refused(self, found: dict[str, Any], allowance: Allowance) -> dict[str, str]:
        """The fields in which another identity differs without permission, each with a text that gives both values."""
        lines = differences(self.identity, found)
        return {name: line for name, line in lines.items() if not allowance.permits(name, line)}

    def refuse_unless_same(
        self, found: "Provenance", *, what: str, advice: str, allowance: Allowance = STRICT
    ) -> None:
        """Raise UserError, spelling out each difference that is not allowed, unless both have the same identity."""
        if refused := self.refused(found.identity, allowance):
            accept = " ".join(f"--allow-mismatch {name}" for name in refused)
            raise UserError(
                f"{what} does not belong to this run: {'; '.join(refused.values())}; {advice}, "
                f"or accept it with {accept}"
            )

    def accepting(self, allowance: Allowance) -> "Provenance":
        """The same, with the differences that were let through in its context."""
        if not allowance.used:
            return self
        return replace(self, context={**self.context, ACCEPTED: list(allowance.used)})

    def fields(self) -> Iterator[str]:
        """The names of the identity's fields, as differences name them, with those that another file may have."""
        optional = (*(f"prompt.{key}" for key in DataConfig.shown), *(f"sampling.{key}" for key in LATER))
        yield from dict.fromkeys([*_field_names(self.identity), *optional])

    def metadata(self, version: int) -> dict[bytes, bytes]:
        """The provenance as Parquet metadata of a file of this format version."""
        document = {"schema_version": version, "identity": self.identity, "context": self.context}
        return {METADATA_KEY: json.dumps(document).encode()}


def _field_names(document: dict[str, Any], prefix: str = "") -> Iterator[str]:
    for key, value in document.items():
        if isinstance(value, dict):
            yield from _field_names(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}"


def sampler_identity(backend: str, dtype: str, versions: Mapping[str, str | None]) -> dict[str, Any]:
    """How the samples were computed: engine, number format, and libraries' versions without their builds (`+cpu`)."""
    libraries = ["torch", "transformers", *(["vllm"] if backend == "vllm" else [])]
    return {
        "engine": {"backend": backend, "dtype": dtype},
        "versions": {name: (versions.get(name) or "").partition("+")[0] for name in libraries},
    }


def _from_1(document: dict[str, Any]) -> dict[str, Any]:
    """Version 1 recorded revision, engine, dtype and versions in the context only."""
    identity, context = document["identity"], document["context"]
    if "model_revision" not in context:
        return document
    sampler = sampler_identity(context["engine"], context["dtype"], context["versions"])
    return {**document, "identity": {**identity, "revision": context["model_revision"], **sampler}}


def _from_2(document: dict[str, Any]) -> dict[str, Any]:
    """Version 3 added the column `dropped_by` and, where V̂* is not the paper's, `estimator` to the context."""
    return document


def _from_3(document: dict[str, Any]) -> dict[str, Any]:
    """Version 4 added a hash of the model's config.json to its identity."""
    identity = document["identity"]
    return {**document, "identity": {**identity, "model": {**identity["model"], "config": UNRECORDED}}}


def _from_4(document: dict[str, Any]) -> dict[str, Any]:
    """Version 5 added the column `completion_ids` to samples."""
    return document


MIGRATIONS: Migrations = {1: _from_1, 2: _from_2, 3: _from_3, 4: _from_4}
"""Migrations of stage 1's files. Columns that a version lacks are read as missing values."""


def read_provenance(
    path: Path,
    newest: int = SCHEMA_VERSION,
    migrations: Migrations = MIGRATIONS,
    made_by: str = VSTAR_COMMAND,
    columns: Sequence[str] = (),
) -> Provenance:
    """The provenance of a file of any version up to the newest, without reading its rows; by default of stage 1's.

    Raises UserError if it has none, if it lacks any of these columns, as a table of another kind does, and for a path
    at which no regular file can be.
    """
    if (obstacle := obstacle_at(path)) is not None:
        raise UserError(f"cannot read {path}: {obstacle}")
    try:
        schema = pq.read_schema(path)
    except FileNotFoundError as error:
        raise UserError(f"there is no {path}; make it with `{made_by}`") from error
    except (pa.ArrowInvalid, OSError) as error:
        reason = str(error).splitlines()[0].rstrip(".")
        raise DamagedFile(
            f"{path} is not a readable Parquet file: {reason}; make it again with `{made_by}`"
        ) from error
    metadata = schema.metadata or {}
    if METADATA_KEY not in metadata:
        raise UserError(f"{path} carries no provenance; make it again with `{made_by}`")
    if missing := [name for name in columns if name not in schema.names]:
        raise UserError(f"{path} lacks the columns {', '.join(missing)}; make it again with `{made_by}`")
    document = json.loads(metadata[METADATA_KEY])
    version = document["schema_version"]
    if version > newest:
        raise UserError(
            f"{path} has format version {version}, made by a newer checkout; "
            f"this one reads 1 to {newest}: update it"
        )
    for step in range(version, newest):
        document = migrations[step](document)
    return Provenance(identity=document["identity"], context=document["context"])


def context(config: RunConfig) -> dict[str, Any]:
    """Where and how an artifact was made, for the reader."""
    return {
        "model_path": config.model.path,
        "model_revision": config.model.revision,
        "data": config.data.model_dump(exclude_none=True),
        "engine": config.engine.backend,
        "dtype": config.model.dtype,
        "versions": versions(("torch", "transformers", "vllm", "math-verify", "pyarrow")),
        "python": platform.python_version(),
        "commit": commit(),
    }


def versions(packages: Collection[str]) -> dict[str, str | None]:
    """The versions of these packages, None for one that is not installed."""
    return {name: _version(name) for name in packages}


def _version(package: str) -> str | None:
    for name in (package, f"{package}-cpu"):
        try:
            return importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return None


@cache
def commit() -> str | None:
    """The commit of this checkout, None if git does not know."""
    try:
        result = subprocess.run(
            ["git", "-C", str(REPOSITORY), "rev-parse", "HEAD"], capture_output=True, text=True, timeout=5
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return result.stdout.strip() or None


def sampling_identity(
    config: RunConfig, renderer: "PromptRenderer", model: dict[str, Any], grader: str
) -> dict[str, Any]:
    """Everything that V̂* depends on besides the prompts: stage 1 records it, stage 2 refuses a different one."""
    return {
        "model": model,
        "prompt": renderer.identity(),
        "sampling": config.sampling.identity(),
        "grader": grader,
    }
