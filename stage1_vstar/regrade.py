"""Grade cached completions with another grader: keep the old grades beside the new ones, and show what changes."""

import json
from collections import Counter
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import polars as pl
import pyarrow as pa
from rich.table import Table

from common.config import RunConfig
from common.contract import Contract, Unique
from common.data.rendering import quoted
from common.errors import UserError
from common.files import write_text
from common.grading import GraderConfig, GraderPool, fingerprint
from common.provenance import ACCEPTED, MIGRATIONS, SCHEMA_VERSION, Allowance, Provenance, read_provenance
from common.runs import exclusive_run, run_paths
from common.sampling.regrading import grade_missing
from common.store import SampleStore, sample_files, set_aside_damaged
from common.terminal.console import Terminal
from common.terminal.messages import print_json
from common.vstar_file import VSTAR, read_vstar, write_vstar
from stage1_vstar.table import vstar_rows

SHOWN_PROMPTS = 5
_CHANGES = pa.schema(
    [
        VSTAR.field("prompt_id"),
        VSTAR.field("prompt"),
        VSTAR.field("answer"),
        *(
            VSTAR.field(name).with_name(f"{name}_{side}")
            for name in ("outcomes", "rewards", "vstar")
            for side in ("before", "after")
        ),
        pa.field("delta_vstar", pa.float64(), nullable=False),
    ]
)

CHANGES = Contract(
    schema=_CHANGES,
    invariants={"a prompt appears once": Unique(["prompt_id"])},
    version=SCHEMA_VERSION,
    migrations=MIGRATIONS,
    remedy="python cli.py regrade",
    may_be_empty=True,
)
"""changes.parquet: one row per prompt with a changed outcome or reward, the largest |ΔV̂*| first."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BeforeAfter:
    """A figure under the old grades and under the new ones."""

    before: float
    after: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Summary:
    """The agreement of two graders, in the order of summary.json."""

    before: str
    after: str
    beta1: str
    prompts: int
    samples: int
    changed_prompts: int
    changed_outcomes: dict[str, int]
    pass_rate: BeforeAfter
    mean_vstar: BeforeAfter
    mean_absolute_delta_vstar: float
    largest_delta_vstar: float

    def to_json(self) -> str:
        return json.dumps(asdict(self), indent=2, ensure_ascii=False)


def run_regrade(config: RunConfig, console: Terminal, *, as_json: bool = False) -> None:
    """Grade every cached completion with the config's grader, and compare with the grades of vstar.parquet.

    Completions of states are graded too, for `segments`. Text is never rewritten and nothing is generated. The new
    table, the changed prompts and a summary appear in artifacts/<run>/regraded/<grader>/; the old table stays. A re-run
    continues. Raises UserError.
    """
    notices = Terminal(stderr=True) if as_json else console
    paths = run_paths(config.run)
    grader = fingerprint(config.grader)
    if not sample_files(paths.samples):
        raise UserError(f"there are no samples in {paths.samples}; draw them with `python cli.py vstar`")
    with exclusive_run(paths, "vstar"):
        table = read_vstar(paths.vstar) if paths.vstar.exists() else None
        if table is not None:
            old, provenance = table
            accepted = [line for line in provenance.context.get(ACCEPTED, []) if line.startswith("grader is")]
            is_ours = provenance.identity["grader"] == grader and not accepted
            if not is_ours:
                old = usable_rows(old, config, notices)
        store = graded_store(paths.samples, "vstar", config.grader, notices)
        if sample_files(paths.continuations):
            graded_store(paths.continuations, "segments", config.grader, notices)
            notices.print(
                f"completions of states are graded by {grader} too; `python cli.py segments` with this grader makes "
                f"{paths.segments} of them"
            )
        if table is None:
            notices.print(
                f"graded by {grader}; there is no {paths.vstar} to compare with: run `python cli.py vstar`"
            )
            return
        if is_ours:
            notices.print(f"nothing to do: {paths.vstar} was graded by {grader}")
            return
        new = regraded_rows(old, store, drop_unsolved=config.vstar.drop_unsolved)
        if lost := int(old["num_samples"].sum()) - int(new["num_samples"].sum()):
            raise UserError(
                f"{lost:,} samples of {paths.vstar} are no longer in {paths.samples}; `python cli.py vstar` with the "
                "old grader draws them again. The others are graded: the same command then compares"
            )
        changes = changed_prompts(old, new)
        before = "; ".join(accepted) or provenance.identity["grader"]
        summary = summarise(old, new, changes, before=before, after=grader)
        regraded, made_of = paths.regraded_by(grader), regraded_provenance(provenance, grader)
        write_vstar(new, made_of, regraded.vstar)
        CHANGES.write(changes, made_of, regraded.changes)
        write_text(regraded.summary, summary.to_json() + "\n")
    if as_json:
        print_json(summary.to_json())
    else:
        show(summary, changes, regraded.root, console)


def graded_store(folder: Path, job: str, grader: GraderConfig, notices: Terminal) -> SampleStore:
    """The samples of a folder, all graded by this grader; `job` is the command that draws them."""
    for line in set_aside_damaged(folder):
        notices.print(f"{line}; `{job}` draws its samples again")
    store = open_store(folder, job, fingerprint(grader))
    if ungraded := store.ungraded_count():
        notices.print(f"{ungraded:,} completions to grade by {fingerprint(grader)}")
        grade_missing(store, grader, notices)
    return store


def open_store(folder: Path, job: str, grader: str) -> SampleStore:
    """The store as this grader sees it. The rest of its samples' identity does not affect their text."""
    if not (files := sample_files(folder)):
        raise UserError(f"no whole file is left in {folder}; draw the samples again: `python cli.py {job}`")
    found = read_provenance(files[0])
    ours = replace(found, identity={**found.identity, "grader": grader})
    return SampleStore(folder, ours, Allowance([name for name in ours.identity if name != "grader"]))


def regraded_provenance(provenance: Provenance, grader: str) -> Provenance:
    """A table's provenance under another grader, without the records of `filter` and `rescore` on the old grades."""
    about_old = ("filters", "estimator", "prior")
    context = {name: value for name, value in provenance.context.items() if name not in about_old}
    return Provenance(
        identity={**provenance.identity, "grader": grader},
        context={**context, "regraded_from": provenance.identity["grader"]},
    )


def regraded_rows(old: pl.DataFrame, store: SampleStore, *, drop_unsolved: bool) -> pl.DataFrame:
    """The table of the same prompts and samples under the store's grader and the same β1."""
    counts = old.select("prompt_id", "num_samples")
    most = int(counts["num_samples"].max())  # type: ignore[arg-type]
    grades = (
        store.grades(counts, most)
        .join(counts, on="prompt_id")
        .filter(pl.col("sample_index") < pl.col("num_samples"))
    )
    prompts = old.select("prompt_id", "prompt", "answer", "prompt_token_hash")
    return vstar_rows(prompts, grades, num_samples=most, beta1=old["beta1"][0], drop_unsolved=drop_unsolved)


def usable_rows(rows: pl.DataFrame, config: RunConfig, notices: Terminal) -> pl.DataFrame:
    """The prompts whose reference answer the grader can use, as `vstar` would keep them; a line names the others.

    Raises UserError if data.bad_golds does not say to drop them, or if none is left.
    """
    with GraderPool(config.grader) as pool:
        problems = pl.Series(pool.validate_golds(rows["answer"].to_list()), dtype=pl.String)
    bad = rows.filter(problems.is_not_null())
    if bad.is_empty():
        return rows
    named = "; ".join(
        f"{quoted(text)}: {problem}"
        for text, problem in zip(bad["prompt"][:3], problems.drop_nulls(), strict=False)
    )
    found = f"{bad.height:,} of {rows.height:,} reference answers of these samples: {named}"
    if config.data.bad_golds == "error":
        raise UserError(
            f"the grader {config.grader.title} cannot use {found}; draw samples for it under another --run, or set "
            'data.bad_golds = "drop" to leave these prompts out'
        )
    if bad.height == rows.height:
        raise UserError(
            f"no prompt is left: the grader {config.grader.title} cannot use {found}; draw samples for it under "
            "another --run"
        )
    notices.print(f"prompts left out, since the grader cannot use {found}")
    return rows.filter(problems.is_null())


def changed_prompts(old: pl.DataFrame, new: pl.DataFrame) -> pl.DataFrame:
    """The prompts with a changed outcome or reward, in the columns of CHANGES."""
    columns = ["outcomes", "rewards", "vstar"]
    both = old.select("prompt_id", "prompt", "answer", pl.col(columns).name.suffix("_before")).join(
        new.select("prompt_id", pl.col(columns).name.suffix("_after")), on="prompt_id", maintain_order="left"
    )
    differs = (pl.col("outcomes_before") != pl.col("outcomes_after")) | (
        pl.col("rewards_before") != pl.col("rewards_after")
    )
    delta = (pl.col("vstar_after") - pl.col("vstar_before")).alias("delta_vstar")
    return (
        both.filter(differs)
        .with_columns(delta)
        .sort(pl.col("delta_vstar").abs(), descending=True, maintain_order=True)
        .select(_CHANGES.names)
    )


def summarise(
    old: pl.DataFrame, new: pl.DataFrame, changes: pl.DataFrame, *, before: str, after: str
) -> Summary:
    """How far two graders agree."""
    pairs = changes.select("outcomes_before", "outcomes_after").explode("outcomes_before", "outcomes_after")
    moved = Counter(pairs.filter(pl.col("outcomes_before") != pl.col("outcomes_after")).iter_rows())
    delta = changes["delta_vstar"]
    (old_rate, old_vstar), (new_rate, new_vstar) = (
        table.select(pl.col("pass_rate", "vstar").mean()).row(0) for table in (old, new)
    )
    return Summary(
        before=before,
        after=after,
        beta1=str(old["beta1"][0]),
        prompts=new.height,
        samples=int(new["num_samples"].sum()),
        changed_prompts=changes.height,
        changed_outcomes={f"{was} → {becomes}": count for (was, becomes), count in moved.most_common()},
        pass_rate=BeforeAfter(before=old_rate, after=new_rate),
        mean_vstar=BeforeAfter(before=old_vstar, after=new_vstar),
        mean_absolute_delta_vstar=float(delta.abs().sum()) / new.height,
        largest_delta_vstar=float(delta[0]) if changes.height else 0.0,
    )


def show(summary: Summary, changes: pl.DataFrame, folder: Path, console: Terminal) -> None:
    """The summary, and the prompts that change most."""
    rate, vstar = summary.pass_rate, summary.mean_vstar
    console.print(
        f"{summary.before} → {summary.after}: {summary.changed_prompts:,} of {summary.prompts:,} prompts "
        f"change, pass rate {rate.before:.4f} → {rate.after:.4f}, mean V̂* {vstar.before:.4f} → {vstar.after:.4f}, "
        f"mean |ΔV̂*| {summary.mean_absolute_delta_vstar:.4f}",
    )
    for move, count in summary.changed_outcomes.items():
        console.print(f"  {move}: {count:,} samples")
    if changes.height:
        table = Table(box=None, pad_edge=False)
        for name in ("prompt_id", "V̂* before", "after", "Δ", "prompt"):
            table.add_column(name, no_wrap=True, overflow="ellipsis")
        for row in changes.head(SHOWN_PROMPTS).iter_rows(named=True):
            figures = (row["vstar_before"], row["vstar_after"], row["delta_vstar"])
            table.add_row(
                row["prompt_id"], *(f"{figure:.4f}" for figure in figures), repr(row["prompt"][:200])
            )
        console.print(table)
    console.print(
        f"{folder}: vstar.parquet (train on it with `--vstar`), changes.parquet, summary.json; "
        "flags set by `filter` are not carried over",
    )
