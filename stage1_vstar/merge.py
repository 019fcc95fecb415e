"""Merge the samples of several runs into one, such as shards from other machines; each sample once."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq

from common.errors import UserError
from common.provenance import Allowance, read_provenance
from common.remote.copies import given
from common.runs import RunPaths, exclusive_run, is_run_name, run_paths
from common.store import (
    ADDRESS,
    GRADE_FILES,
    SAMPLE_FILES,
    SampleStore,
    add_bytes,
    addresses,
    damage,
    mixed_tokens,
    sample_files,
    set_aside_damaged,
)
from common.terminal.console import Terminal


@dataclass(frozen=True, slots=True, kw_only=True)
class Joining:
    """Files that belong together, and are to be added to a store."""

    into: Path
    files: dict[Path, list[Path]]
    """The undamaged ones, by the folder that they come from."""
    graders: set[str]


def merge_runs(
    sources: Sequence[str], run: str, console: Terminal, allow_mismatch: Collection[str] = ()
) -> None:
    """Add the samples of the sources, runs by name or folders, that `run` lacks. The sources are only read.

    The completions of states that `segments` has drawn are added too. Raises UserError before anything is written if
    two of them do not belong together.
    """
    target = run_paths(run)
    folders = [samples_folder(source) for source in sources]
    of_states = [
        states for folder in folders if sample_files(states := RunPaths(folder.parent).continuations)
    ]
    with exclusive_run(target, "vstar"):
        samples = checked(folders, target.samples, allow_mismatch, console)
        if samples is None:
            raise UserError(f"every file of {', '.join(sources)} is damaged: there is nothing to add")
        continuations = checked(of_states, target.continuations, allow_mismatch, console)
        there = add(samples, console)
        completions = add(continuations, console) if continuations else None
    graders = samples.graders | (continuations.graders if continuations else set())
    if len(graders) > 1:
        console.print(
            f"the samples were graded by {', '.join(sorted(graders))}: `python cli.py regrade --config CONFIG.toml "
            f"--run {run}` has one grader judge all",
        )
    console.print(
        f"{target.samples}: {there.height:,} samples of {there['prompt_id'].n_unique():,} prompts; "
        f"`python cli.py vstar --config CONFIG.toml --run {run}` estimates V̂* from them",
    )
    if completions is not None:
        console.print(
            f"{target.continuations}: {completions.height:,} completions of {completions['prompt_id'].n_unique():,} "
            f"states; `python cli.py segments --config CONFIG.toml --run {run}` estimates their values"
        )


def checked(
    folders: Sequence[Path], into: Path, allow_mismatch: Collection[str], console: Terminal
) -> Joining | None:
    """The files that are to be joined with those of a store; None if no undamaged file is there.

    Raises UserError if they do not belong together.
    """
    for line in set_aside_damaged(into):
        console.print(line)
    whole = {folder: whole_files(folder, console) for folder in folders}
    every = [*sample_files(into), *(file for files in whole.values() for file in files)]
    if not every:
        return None
    whole_ones = (found for found in map(read_provenance, every) if found.is_whole)
    provenance = next(whole_ones, None) or read_provenance(every[0])
    allowance = Allowance(allow_mismatch)
    allowance.refuse_unknown([*provenance.fields(), "prompt.tokens"])
    store = SampleStore(into, provenance, allowance)
    graders = {str(store.check(file).identity["grader"]) for file in every}
    store.refuse_other_tokens(mixed_tokens(every))
    return Joining(into=into, files=whole, graders=graders)


def add(joining: Joining, console: Terminal) -> pl.DataFrame:
    """Add what is missing; returns the addresses of all samples that are there then."""
    there = addresses(sample_files(joining.into))
    for folder, files in joining.files.items():
        before = there.height
        samples = [file for file in files if file.name.startswith(SAMPLE_FILES)]
        for file in samples:
            there = pl.concat([there, add_missing(file, there, joining.into)])
        for file in set(files).difference(samples):
            add_bytes(joining.into, GRADE_FILES, file.read_bytes())
        found = addresses(samples).height
        added = there.height - before
        console.print(f"{folder}: {added:,} samples added, {found - added:,} were there")
    return there


def samples_folder(source: str) -> Path:
    """The folder of a source's samples. Raises UserError if it has none."""
    folder = given(source)
    candidates = [folder / "samples", folder]
    if is_run_name(source):
        candidates.insert(0, run_paths(source).samples)
    for folder in candidates:
        if sample_files(folder):
            return folder
    raise UserError(
        f"{source}: no samples found in {', '.join(map(str, candidates))}; give a run's name or folder"
    )


def whole_files(folder: Path, console: Terminal) -> list[Path]:
    """A source's undamaged files. Damaged ones are reported; their samples must be drawn again."""
    files = []
    for file in [*sample_files(folder), *sorted(folder.glob(f"{GRADE_FILES}-*.parquet"))]:
        if (problem := damage(file)) is None:
            files.append(file)
        else:
            console.print(f"{file} is damaged ({problem}) and was left out")
    return files


def add_missing(file: Path, there: pl.DataFrame, into: Path) -> pl.DataFrame:
    """Add a file's samples that are not there yet; returns their addresses."""
    found = addresses([file])
    missing = found.join(there, on=ADDRESS, how="anti", maintain_order="left")
    if missing.height == found.height:
        add_bytes(into, SAMPLE_FILES, file.read_bytes())
    elif missing.height:
        table = pq.read_table(file)
        rows = found.with_row_index("row").join(missing, on=ADDRESS, how="semi", maintain_order="left")["row"]
        buffer = pa.BufferOutputStream()
        pq.write_table(table.take(rows.to_arrow()), buffer, compression="zstd")
        add_bytes(into, SAMPLE_FILES, buffer.getvalue())
    return missing
