"""A run's prompts, pass rates and V̂* as files of other trainers: SPO, TRL, verl. Bounded memory, no model."""

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq

from common.config import DataConfig
from common.data.framing import chat_turns, framing_identity, recorded_framing, text_prompt
from common.data.messages import Turns
from common.errors import UserError
from common.files import atomic_path
from common.grading.reference import reference_of
from common.provenance import SCHEMA_VERSION, Provenance, read_provenance
from common.vstar_file import scan_vstar

MESSAGES = pa.list_(pa.struct([("role", pa.string()), ("content", pa.string())]))
FIGURES = [
    ("pass_rate", pa.float64()),
    ("vstar", pa.float64()),
    ("num_samples", pa.int32()),
    ("prompt_id", pa.string()),
]
"""What both Parquet formats tell of a prompt beside its answer, named as in vstar.parquet."""

EXTRA_INFO = pa.struct([("index", pa.int64()), ("split", pa.string()), *FIGURES])
VERL = pa.schema(
    [
        ("data_source", pa.string()),
        ("prompt", MESSAGES),
        ("ability", pa.string()),
        ("reward_model", pa.struct([("style", pa.string()), ("ground_truth", pa.string())])),
        ("extra_info", EXTRA_INFO),
    ]
)
VERL_RULES = {"gsm8k": ("openai/gsm8k", "math"), "math": ("lighteval/MATH", "math")}
"""By our grader: verl's data_source, by which it finds its own rule for such answers, and its ability."""

SUFFIXES = {"spo": ".json", "trl": ".parquet", "verl": ".parquet"}
"""By the names of the formats, how their files end."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Prompts:
    """The prompts of an artifact that are exported, as others are shown them."""

    source: Path
    provenance: Provenance
    framing: DataConfig
    dropped_too: bool
    in_template: bool

    @property
    def template(self) -> str:
        return str(self.provenance.identity["prompt"]["template"])

    @property
    def is_chat(self) -> bool:
        """Whether they were read through a chat template, which only lists of messages need."""
        return "{prompt}" not in self.template

    @property
    def grader(self) -> str:
        """Its name and version."""
        return str(self.provenance.identity["grader"])

    def parts(self, *columns: str) -> Iterator[pl.DataFrame]:
        """Their rows, some at a time. Raises UserError in the end if there are none."""
        found = False
        for rows in scan_vstar(self.source, [*columns, "keep"]):
            chosen = rows if self.dropped_too else rows.filter("keep")
            found = found or not chosen.is_empty()
            yield chosen
        if not found:
            raise UserError(
                f"{self.source}: no prompt is kept, so there is nothing to export; loosen the rules with "
                "`python cli.py filter`, or give --all"
            )

    def text(self, prompt: str) -> str:
        return text_prompt(self.template, prompt, self.framing) if self.in_template else prompt

    def turns(self, prompt: str) -> Turns:
        if self.is_chat:
            return chat_turns(prompt, self.framing)
        return [{"role": "user", "content": self.text(prompt)}]

    def remarks(self) -> Iterator[str]:
        framing = framing_identity(self.framing)
        if not self.is_chat and not self.in_template and (self.template != "{prompt}" or framing):
            around = f" with {', '.join(framing)}" if framing else ""
            yield (
                f"the figures are of prompts in the template {json.dumps(self.template, ensure_ascii=False)}{around}, "
                "the file has the questions alone: --in-template writes them in it"
            )
        first = next((rows["answer"][0] for rows in scan_vstar(self.source, ["answer"]) if rows.height), "")
        if columns := reference_of(first).columns:
            yield (
                f"the reward function read the columns {', '.join(columns)}, which the file leaves out: join them by "
                "prompt; read back, the prompts have other ids"
            )
        for key in ("chat_template_kwargs", "prefill") if self.is_chat else ():
            if key in framing:
                value = json.dumps(getattr(self.framing, key), ensure_ascii=False)
                yield (
                    f"the figures are of prompts with {key} {value}, which messages cannot hold: set it in the other "
                    "trainer"
                )


def export_data(
    source: Path, output: Path, format_name: str, *, dropped_too: bool = False, in_template: bool = False
) -> list[str]:
    """Write a file in another trainer's format, atomically; returns what was written and is to be known, in lines.

    Prompts that are not kept are left out unless `dropped_too`; with `in_template` prompts are texts in the run's
    template. Raises UserError, and writes nothing, where the format cannot hold them.
    """
    if format_name not in SUFFIXES:
        raise UserError(f"there is no format {format_name}; choose one of {', '.join(SUFFIXES)}")
    if output.suffix != SUFFIXES[format_name]:
        raise UserError(
            f"--output {output}: a file in the format {format_name} ends in {SUFFIXES[format_name]}; rename it"
        )
    provenance = read_provenance(source)
    prompts = _Prompts(
        source=source,
        provenance=provenance,
        framing=recorded_framing(provenance.identity["prompt"]),
        dropped_too=dropped_too,
        in_template=in_template,
    )
    if output.exists() and output.samefile(source):
        raise UserError(f"--output {output} is the artifact itself; give another file")
    if in_template and prompts.is_chat:
        raise UserError(
            f"{source}: its prompts were read through the model's chat template, which other trainers apply "
            "themselves; leave out --in-template"
        )
    write = {"spo": _write_spo, "trl": _write_trl, "verl": _write_verl}[format_name]
    return [*write(prompts, output), *prompts.remarks()]


def _write_trl(prompts: _Prompts, output: Path) -> Iterator[str]:
    """One row per prompt: `prompt`, messages or a text, `answer`, and the figures."""
    shown: Callable[[str], Any] = prompts.turns if prompts.is_chat else prompts.text
    schema = pa.schema(
        [("prompt", MESSAGES if prompts.is_chat else pa.string()), ("answer", pa.string()), *FIGURES]
    )
    names = [name for name, _ in FIGURES]

    def tables() -> Iterator[dict[str, Any]]:
        for rows in prompts.parts("prompt", "answer", *names):
            yield {
                **rows.select(names).to_dict(as_series=False),
                "answer": _answers(rows),
                "prompt": [shown(prompt) for prompt in rows["prompt"]],
            }

    yield f"{output}: {_write_tables(tables(), schema, prompts, output):,} prompts for TRL"


def _write_verl(prompts: _Prompts, output: Path) -> Iterator[str]:
    """One row per prompt: messages, the answer as ground truth, the figures in `extra_info`."""
    known = VERL_RULES.get(prompts.grader.partition("/")[0])
    source, ability = known or (prompts.grader, "other")
    split = prompts.provenance.context.get("data", {}).get("split", "train")
    lists = 0

    def tables() -> Iterator[dict[str, Any]]:
        nonlocal lists
        place = 0
        for rows in prompts.parts("prompt", "answer", *(name for name, _ in FIGURES)):
            figures = rows.select(name for name, _ in FIGURES).to_dicts()
            answers = _answers(rows)
            yield {
                "data_source": [source] * rows.height,
                "prompt": [prompts.turns(prompt) for prompt in rows["prompt"]],
                "ability": [ability] * rows.height,
                "reward_model": [{"style": "rule", "ground_truth": answer} for answer in answers],
                "extra_info": [
                    {"index": index, "split": split, **each} for index, each in enumerate(figures, place)
                ],
            }
            place += rows.height
            lists += sum(answer.lstrip().startswith('["') for answer in answers)

    yield f"{output}: {_write_tables(tables(), VERL, prompts, output):,} prompts for verl, data_source {source}"
    if known is None:
        yield f"verl has no rule of its own for the grader {source}: set its custom_reward_function"
    if lists:
        yield (
            f'{lists:,} answers look like JSON lists, of which data.format = "auto" would take the element: to read '
            'this file back set data.prompt_field = "prompt" and data.answer_field = "reward_model.ground_truth"'
        )


def _answers(rows: pl.DataFrame) -> list[str]:
    """The answers alone, without the columns that reward functions read."""
    return [reference_of(answer).answer for answer in rows["answer"]]


def _write_tables(
    tables: Iterator[dict[str, Any]], schema: pa.Schema, prompts: _Prompts, output: Path
) -> int:
    """Write a Parquet file with the artifact's provenance; returns its number of rows."""
    schema = schema.with_metadata(prompts.provenance.metadata(SCHEMA_VERSION))
    count = 0
    with atomic_path(output) as temporary, pq.ParquetWriter(temporary, schema, compression="zstd") as writer:
        for columns in tables:
            table = pa.Table.from_pydict(columns, schema)
            count += table.num_rows
            writer.write_table(table)
    return count


def _write_spo(prompts: _Prompts, output: Path) -> Iterator[str]:
    """A JSON object: under the text of each prompt, without blanks around it, the list of its rewards.

    Where prompts differ in their answer alone, their rewards are joined: SPO cannot tell them apart.
    """
    repeated = _repeated(_spo_keys(prompts, rows["prompt"]) for rows in prompts.parts("prompt"))
    joined: dict[str, list[float]] = {}

    def entries() -> Iterator[tuple[str, list[float]]]:
        for rows in prompts.parts("prompt", "rewards"):
            for key, rewards in zip(
                _spo_keys(prompts, rows["prompt"]), rows["rewards"].to_list(), strict=True
            ):
                if hash(key) in repeated:
                    joined.setdefault(key, []).extend(rewards)
                else:
                    yield key, rewards
        yield from joined.items()

    counts: set[int] = set()
    written, are_marks = 0, True
    with atomic_path(output) as temporary, temporary.open("w", encoding="ascii") as file:
        for key, rewards in entries():
            file.write(f"{',' if written else '{'}\n{json.dumps(key)}: {json.dumps(rewards)}")
            counts.add(len(rewards))
            written += 1
            are_marks = are_marks and {0.0, 1.0}.issuperset(rewards)
        file.write("\n}\n")
    yield (
        f"{output}: {written:,} prompts for SPO: trainer.spo.offline_values={output} "
        f"trainer.spo.offline_N={min(counts)}"
    )
    if len(counts) > 1:
        yield (
            f"prompts have {min(counts)} to {max(counts)} scores: SPO draws offline_N of them at random, and takes "
            "those that a prompt lacks for failures"
        )
    if not are_marks:
        yield "not all scores are 0 or 1: SPO counts each that is above 0 as a success"


def _spo_keys(prompts: _Prompts, texts: pl.Series) -> list[str]:
    """What SPO will look prompts up by: the content of their first message, without blanks around it."""
    keys = []
    for text in texts:
        turns = prompts.turns(text)
        if len(turns) > 1:
            raise UserError(
                f"{prompts.source}: the prompt {text[:80]}… has {len(turns)} messages, and SPO tells prompts apart by "
                "the first alone; export it to verl or TRL, or leave such prompts out with `python cli.py filter`"
            )
        keys.append(turns[0]["content"].strip())
    return keys


def _repeated(parts: Iterator[list[str]]) -> set[int]:
    """The hashes that come more than once. Holds 8 bytes for each text."""
    hashes = np.concatenate([np.fromiter(map(hash, texts), np.int64, len(texts)) for texts in parts])
    hashes.sort()
    return set(hashes[1:][hashes[1:] == hashes[:-1]].tolist())
