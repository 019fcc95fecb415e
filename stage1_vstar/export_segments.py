"""export-segments: a run's solutions with a label for each step, in TRL's format for stepwise supervision. No model."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq

from common.data.messages import turns_of
from common.errors import UserError
from common.files import atomic_path
from common.grading.reference import reference_of
from common.provenance import Provenance
from common.segments.files import SEGMENTS_COMMAND, SEGMENTS_TABLE

COLUMNS = ("prompt_id", "prompt", "answer", "prefix", "step", "solutions", "value")
SUFFIXES = (".jsonl", ".parquet")
LINE_BREAK = "\n"
"""TRL's default for `step_separator`."""

Label = Callable[[float], float | bool]


def export_segments(
    source: Path, output: Path, *, at_least: float | None = None, soft: bool = False
) -> list[str]:
    """Write one row per chosen solution, atomically; returns what was written and is to be known, in lines.

    A step's label says whether the value of the state after it is above 0, or `at_least` so much; if `soft`, it is the
    value. Raises UserError, and writes nothing, where the format cannot hold the solutions.
    """
    if soft and at_least is not None:
        raise UserError(
            "--soft writes the values themselves, --at-least turns them into labels; leave one out"
        )
    if at_least is not None and not 0 < at_least <= 1:
        raise UserError(f"--at-least {at_least:g}: give a value above 0, up to 1")
    if output.suffix not in SUFFIXES:
        raise UserError(f"--output {output}: give a file whose name ends in {' or '.join(SUFFIXES)}")
    table = pl.concat(list(SEGMENTS_TABLE.scan(source, COLUMNS)))
    if output.exists() and output.samefile(source):
        raise UserError(f"--output {output} is the table itself; give another file")

    def label(value: float) -> float | bool:
        if soft:
            return value
        return value > 0 if at_least is None else value >= at_least

    provenance = SEGMENTS_TABLE.provenance(source)
    rows = [
        row for _, states in table.group_by("prompt_id", maintain_order=True) for row in _rows(states, label)
    ]
    if not rows:
        raise UserError(f"{source} holds no solution with steps; make it again with `{SEGMENTS_COMMAND}`")
    if output.suffix == ".jsonl":
        _write_lines(rows, output)
    else:
        _write_table(rows, output, pa.float64() if soft else pa.bool_(), provenance)
    return [*_remarks(rows, output, provenance, soft)]


def _rows(states: pl.DataFrame, label: Label) -> Iterator[dict[str, Any]]:
    """The solutions of a prompt."""
    prompt, answer = states["prompt"][0], states["answer"][0]
    if len(turns := turns_of(prompt)) > 1:
        raise UserError(
            f"the prompt {prompt[:80]}… has {len(turns)} messages, and TRL's stepwise rows hold texts alone"
        )
    # Solutions that share a state may count its steps differently: by length they are in order for each.
    states = states.sort(pl.col("prefix").str.len_bytes(), "step")
    for solution in states["solutions"].explode().unique().sort():
        along = states.filter(pl.col("solutions").list.contains(solution))
        texts, labels, before = [], [], ""
        for prefix, value in along.select("prefix", "value").iter_rows():
            if not prefix.startswith(before):
                raise UserError(
                    f"a state of the prompt {prompt[:80]}… does not begin as the one before it; make the table again "
                    f"with `{SEGMENTS_COMMAND}`"
                )
            # Of the prompt itself there is no step, and one that only ends the solution has no text.
            if text := prefix[len(before) :].strip():
                texts.append(text)
                labels.append(label(value))
            before = prefix
        if texts:
            yield {
                "prompt": prompt,
                "completions": texts,
                "labels": labels,
                "answer": reference_of(answer).answer,
            }


def _write_lines(rows: list[dict[str, Any]], output: Path) -> None:
    with atomic_path(output) as temporary, temporary.open("w", encoding="utf-8") as file:
        for row in rows:
            file.write(f"{json.dumps(row, ensure_ascii=False)}\n")


def _write_table(
    rows: list[dict[str, Any]], output: Path, labels: pa.DataType, provenance: Provenance
) -> None:
    schema = pa.schema(
        [
            ("prompt", pa.string()),
            ("completions", pa.list_(pa.string())),
            ("labels", pa.list_(labels)),
            ("answer", pa.string()),
        ]
    ).with_metadata(provenance.metadata(SEGMENTS_TABLE.version))
    with atomic_path(output) as temporary:
        pq.write_table(pa.Table.from_pylist(rows, schema), temporary, compression="zstd")


def _remarks(rows: list[dict[str, Any]], output: Path, provenance: Provenance, soft: bool) -> Iterator[str]:
    labels = [float(label) for row in rows for label in row["labels"]]
    what = "labels are values, their mean" if soft else "share of true labels"
    yield f"{output}: {len(rows):,} solutions for TRL, {len(labels):,} steps; {what} {sum(labels) / len(labels):.3f}"
    if soft:
        yield (
            "TRL's PRMTrainer rounds each label down to 0 or 1, so that only the value 1 counts as correct there; "
            "leave out --soft for it"
        )
    separators = provenance.identity.get("segments", {}).get("separators", [LINE_BREAK])
    if LINE_BREAK not in separators:
        ends = ", ".join(json.dumps(each, ensure_ascii=False) for each in separators)
        yield (
            f"steps end with {ends}, and are written without the white space around them: set step_separator of TRL's "
            "PRMConfig"
        )
