"""The layout of a run's folder artifacts/<run>, which only this module defines; shards, and locks on a run."""

import hashlib
import math
import os
import platform
import re
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from filelock import FileLock, Timeout

from common.errors import UserError
from common.files import meaning, writing_to
from common.remote.copies import fetched
from common.remote.leases import leased
from common.remote.places import here, url_of

REPOSITORY = Path(__file__).resolve().parent.parent

OWN = "{run}"
"""The run's own folder in the path of a model."""

LONGEST_NAME = 120
"""Of a folder that a grader gives its name; longer ones are cut off."""


@dataclass(frozen=True, slots=True)
class RunPaths:
    """The paths of a run's files."""

    root: Path

    TRAINED_WITH: ClassVar[str] = "astar_po.json"
    """In a model's folder: the record of its training."""

    @property
    def config(self) -> Path:
        return self.root / "config.json"

    @property
    def base_model(self) -> Path:
        """The demo's reference model; other runs bring their own."""
        return self.root / "base_model"

    @property
    def known_weights(self) -> Path:
        """Hashes and findings of the model's files, so that they are not read whole again."""
        return self.root / ".weights.json"

    @property
    def samples(self) -> Path:
        return self.root / "samples"

    @property
    def vstar(self) -> Path:
        return self.root / "vstar.parquet"

    @property
    def continuations(self) -> Path:
        """Completions from the states of solutions, a store like that of samples."""
        return self.root / "continuations"

    @property
    def segments(self) -> Path:
        return self.root / "segments.parquet"

    @property
    def critic(self) -> Path:
        """The critic in Hugging Face format."""
        return self.root / "critic"

    @property
    def critic_values(self) -> Path:
        """What the critic has valued so far, while `advantages` runs."""
        return self.root / "critic_values"

    @property
    def advantages(self) -> Path:
        return self.root / "advantages.parquet"

    @property
    def metrics(self) -> Path:
        return self.root / "metrics.jsonl"

    @property
    def completions(self) -> Path:
        """A few of training's completions, one file per evaluation."""
        return self.root / "completions"

    @property
    def tensorboard(self) -> Path:
        return self.root / "tensorboard"

    @property
    def libraries_log(self) -> Path:
        """Messages of libraries while commands worked on the run."""
        return self.root / "libraries.log"

    @property
    def checkpoints(self) -> Path:
        return self.root / "checkpoints"

    @property
    def model(self) -> Path:
        """The trained policy in Hugging Face format."""
        return self.root / "model"

    @property
    def trained_with(self) -> Path:
        """How the policy was trained; written last."""
        return self.model / self.TRAINED_WITH

    def exported(self, iteration: int) -> Path:
        """A checkpoint in Hugging Face format, exported for `evaluate`."""
        return self.root / "exported" / f"{iteration:06d}"

    @property
    def evaluations(self) -> Path:
        return self.root / "evaluations"

    def results(self, suffix: str) -> Path:
        """The results of `evaluate`, as parquet, json or md."""
        return self.evaluations / f"results.{suffix}"

    @property
    def regraded(self) -> Path:
        return self.root / "regraded"

    def regraded_by(self, grader: str) -> "Regraded":
        """The results of `regrade` with a grader."""
        name = re.sub(r"[^A-Za-z0-9.]+", "-", grader)
        if (
            " + " in grader or " after " in grader or len(name) > LONGEST_NAME
        ):  # a weight's sign, a mark's brackets
            name = f"{name[:LONGEST_NAME]}-{hashlib.sha256(grader.encode()).hexdigest()[:8]}"
        return Regraded(self.regraded / name)

    @property
    def regrades(self) -> "list[Regraded]":
        """One for each grader, in a fixed order."""
        return [Regraded(folder) for folder in sorted(self.regraded.glob("*"))]

    @property
    def report(self) -> Path:
        return self.root / "report"

    @property
    def page(self) -> Path:
        return self.report / "report.html"

    @property
    def settings(self) -> Path:
        """The config of a run of `rounds`, as a TOML file that every command takes."""
        return self.root / "config.toml"

    @property
    def pointer(self) -> Path:
        """The place of a run in a run of rounds."""
        return self.root / "round.json"

    def step(self, name: str, suffix: str) -> Path:
        """The output of a step of `rounds` (log), or its cost, which is written once it is done (json)."""
        return self.root / "steps" / f"{name}.{suffix}"

    def rounds(self, suffix: str) -> Path:
        """The rounds side by side, as html or md."""
        return self.root / f"rounds.{suffix}"

    def curves(self, suffix: str) -> Path:
        """The training curves, as png or svg."""
        return self.report / f"training.{suffix}"

    def sweep(self, table: Path, suffix: str) -> Path:
        """The sweep of a table in this folder, as json, png or svg; `report` shows that of the run's own table."""
        name = "sweep" if table.name == self.vstar.name else f"sweep-{table.stem}"
        return self.report / f"{name}.{suffix}"


@dataclass(frozen=True, slots=True)
class Regraded:
    """The paths of a run's results under another grader."""

    root: Path

    @property
    def vstar(self) -> Path:
        return self.root / "vstar.parquet"

    @property
    def changes(self) -> Path:
        """The prompts whose grades differ from those in the run's own table."""
        return self.root / "changes.parquet"

    @property
    def summary(self) -> Path:
        return self.root / "summary.json"


RUN_NAME = r"^[A-Za-z0-9][A-Za-z0-9._-]*$"
"""The pattern of a run's name, which is the name of a folder in artifacts/."""

NAME_RULE = 'should be of letters, digits, ".", "_" and "-", and begin with a letter or digit'
"""The same in words."""


def run_paths(run: str) -> RunPaths:
    """artifacts/<run> of this checkout, or below $ASTAR_PO_ARTIFACTS if that is set: a folder, or the URL of one.

    Of a run at a URL these are the paths of its copy. Raises UserError for an invalid name, such as a path that leads
    out of artifacts/.
    """
    if not is_run_name(run):
        raise UserError(f"run {NAME_RULE}, found {run!r}; give the name of a run")
    artifacts = os.environ.get("ASTAR_PO_ARTIFACTS") or str(REPOSITORY / "artifacts")
    return RunPaths(fetched(here(artifacts) / run))


def existing_run(run: str) -> RunPaths:
    """The paths of a run that is named without its config. Raises UserError if there is none of that name."""
    paths = run_paths(run)
    if not paths.root.is_dir():
        folder = paths.root.parent
        others = [] if url_of(folder) else [each.name for each in sorted(folder.glob("*")) if _is_run(each)]
        use = f"use one of {', '.join(others)}, or " if others else ""
        raise UserError(f"there is no run {run} in {folder}; {use}make it with `python cli.py vstar`")
    return paths


def _is_run(folder: Path) -> bool:
    paths = RunPaths(folder)
    return any(each.exists() for each in (paths.config, paths.samples, paths.vstar, paths.segments))


def is_run_name(text: str) -> bool:
    """Whether this is a valid name of a run."""
    return re.fullmatch(RUN_NAME, text) is not None


@dataclass(frozen=True, slots=True)
class Shard:
    """Part `index` (from 1) of `count` of a run's prompts, which are assigned by their content hash."""

    index: int = 1
    count: int = 1

    @classmethod
    def parse(cls, text: str) -> "Shard":
        """Read `2/8`. Raises UserError for anything else."""
        index, _, count = text.partition("/")
        if index.isdecimal() and count.isdecimal() and 1 <= int(index) <= int(count):
            return cls(int(index), int(count))
        raise UserError(f"--shard {text}: write it as i/n with 1 ≤ i ≤ n, for example 2/8")

    def holds(self, prompt_id: str) -> bool:
        """Whether this shard draws the samples of that prompt."""
        return int(prompt_id[:12], 16) % self.count == self.index - 1

    def overlaps(self, other: "Shard") -> bool:
        """Whether the two can hold the same prompt."""
        return (self.index - other.index) % math.gcd(self.count, other.count) == 0

    def __str__(self) -> str:
        return f"{self.index}/{self.count}"


WHOLE = Shard()


@contextmanager
def exclusive_run(paths: RunPaths, job: str, shard: Shard = WHOLE) -> Iterator[None]:
    """Hold a run, or a shard of it, so that two jobs of one kind never do the same work in the same run.

    A job holds a locked file, which the kernel unlocks when the process ends in any way, and a lease of a run at a URL,
    whose copy is then brought up to date. Raises UserError if another job holds an overlapping shard.
    """
    try:
        paths.root.mkdir(parents=True, exist_ok=True)
        (paths.root / f".{job}.lock").touch()
    except OSError as error:
        raise UserError(
            f"cannot write to {paths.root}: {meaning(error.errno)}; correct its permissions, or choose another folder "
            "with ASTAR_PO_ARTIFACTS"
        ) from error

    def is_rival(part: str) -> bool:
        found = re.fullmatch(rf"{job}-(\d+)-of-(\d+)", part)
        return found is not None and shard.overlaps(Shard(int(found[1]), int(found[2])))

    part = f"{job}-{shard.index}-of-{shard.count}"
    with ExitStack() as claim:
        with _locked(paths.root / f".{job}.lock", job, wait=True):
            for path in paths.root.glob(f".{job}-*-of-*.lock"):
                if is_rival(path.stem[1:]):
                    with _locked(path, job):
                        pass
            ours = paths.root / f".{part}.lock"
            claim.enter_context(_locked(ours, job))
            with writing_to(ours):
                ours.write_text(f"{os.getpid()} on {platform.node()}", encoding="utf-8")
        claim.enter_context(leased(paths.root, job, part, is_rival))
        fetched(paths.root, again=True)
        yield


def _locked(path: Path, job: str, *, wait: bool = False) -> AbstractContextManager[object]:
    """Lock a file until the context ends. Raises UserError if another job holds it and this one must not wait."""
    try:
        # A lock without the kernel would outlive a process that is killed.
        return FileLock(path, fallback_to_soft=False).acquire(blocking=wait)
    except Timeout as error:
        holder = path.read_text(encoding="utf-8").strip() or "unknown"
        raise UserError(
            f"another {job} job (process {holder}) is writing to {path.parent}; "
            "wait for it or choose another --run"
        ) from error
    except OSError as error:
        raise UserError(
            f"cannot lock {path}: {error.strerror}; two jobs could write to one run. Choose a file system with "
            "locks for it, with ASTAR_PO_ARTIFACTS"
        ) from error
