"""A run's samples: Parquet fragments that appear whole under the hash of their content, and never change.

A sample is addressed by (prompt_id, sample_index) and belongs to the identity in its fragment's metadata. Resuming,
more samples per prompt, more prompts and other machines' shards all ask the same question: which samples are missing?
A file whose content does not match its name is set aside, and its samples count as missing again.
"""

import hashlib
import time
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from common.contract import Contract, Unique, polars_schema
from common.errors import UserError
from common.files import atomic_path, file_digest, remove_leftovers
from common.grading import OUTCOMES
from common.provenance import (
    ACCEPTED,
    MIGRATIONS,
    SCHEMA_VERSION,
    STRICT,
    VSTAR_COMMAND,
    Allowance,
    Provenance,
    read_provenance,
)
from common.remote.copies import fetched, fetched_anew, renamed

ADDRESS = ["prompt_id", "sample_index"]

JUDGED = [*ADDRESS, "completion_hash"]
"""The key of a later grade: a sample, and the text that was graded."""

_SAMPLES = pa.schema(
    [
        pa.field("prompt_id", pa.string(), nullable=False),
        pa.field("sample_index", pa.int32(), nullable=False),
        pa.field("prompt", pa.string(), nullable=False),
        pa.field("answer", pa.string(), nullable=False),
        pa.field("prompt_token_hash", pa.string()),
        pa.field("completion", pa.string(), nullable=False),
        pa.field("completion_raw", pa.binary()),
        pa.field("completion_tokens", pa.int32(), nullable=False),
        pa.field("completion_ids", pa.list_(pa.field("item", pa.int32(), nullable=False))),
        pa.field("outcome", pa.string(), nullable=False),
        pa.field("extracted", pa.string()),
        pa.field("reward", pa.float64(), nullable=False),
        pa.field("reason", pa.string()),
    ]
)
"""`completion_raw` holds the completion, lone surrogates included, where `completion` (UTF-8) has no place for them.

`completion_ids` holds the token ids if log-probs may be computed later: in evaluations, and of samples that training
reads (vstar.keep_token_ids).
"""

_GRADES = pa.schema(
    [
        _SAMPLES.field("prompt_id"),
        _SAMPLES.field("sample_index"),
        pa.field("completion_hash", pa.string(), nullable=False),
        *(_SAMPLES.field(name) for name in ("outcome", "extracted", "reward", "reason")),
    ]
)

SAMPLES = Contract(
    schema=_SAMPLES,
    invariants={
        "a sample appears once": Unique(ADDRESS),
        "sample_index is not negative": pl.col("sample_index") >= 0,
        "rewards are finite": pl.col("reward").is_finite(),
        "outcomes are known": pl.col("outcome").is_in(OUTCOMES),
    },
    version=SCHEMA_VERSION,
    migrations=MIGRATIONS,
    remedy=VSTAR_COMMAND,
)

GRADES = replace(SAMPLES, schema=_GRADES, remedy="python cli.py regrade")
"""Another grader's verdicts on stored samples; each is valid only for the text with that hash."""

SAMPLE_FILES = "part"

GRADE_FILES = "grades"

DAMAGED = "damaged"
"""The folder inside the store's to which damaged files are moved."""

SECONDS = "seconds"
"""Key in a file's context: how long its samples took, since the file before it or the opening of the store."""

LOADING = "loading"
"""Key in a file's context: the part of these seconds in which models were loaded."""

DEVICES = "devices"
"""Key in a file's context: the GPUs that drew its samples at the same time, or 1 for a machine without."""

JUDGE = "judge"
"""Key in a file's context: the number of a judge model's replies for its grades, and their tokens."""

_HASH_DIGITS = 64


class SampleStore:
    """The samples of a run, and the grades that other graders gave them later."""

    def __init__(self, folder: Path, provenance: Provenance, allowance: Allowance = STRICT) -> None:
        """Open the store; `provenance` is that of its samples and of new ones.

        Raises UserError if it holds samples of another identity, unless `allowance` permits the difference. It may hold
        samples judged by another grader; these have no grade until `add_grades` adds this grader's.
        """
        self.folder = folder
        self.provenance = provenance
        self._allowance = allowance
        self._graded: list[Path] = []
        self._graded_otherwise: list[Path] = []
        self._other_grades_count = False
        self._since = time.monotonic()
        self._loading = 0.0
        self._devices = 1
        accepted: dict[str, None] = {}
        for fragment in self.fragments():
            found = self.check(fragment)
            accepted |= dict.fromkeys(found.context.get(ACCEPTED, []))
            ours = found.identity["grader"] == self._grader
            (self._graded if ours else self._graded_otherwise).append(fragment)
        self.accepted = list(accepted)
        """The differences that were accepted when the samples were drawn."""

    @property
    def _grader(self) -> str:
        return str(self.provenance.identity["grader"])

    def check(self, fragment: Path) -> Provenance:
        """A file's provenance. Raises UserError unless its samples belong here, whoever has graded them."""
        found = read_provenance(fragment)
        self.provenance.refuse_unless_same(
            replace(found, identity={**found.identity, "grader": self._grader}),
            what=str(fragment),
            advice="choose another --run for this configuration",
            allowance=self._allowance,
        )
        return found

    def accept_other_grades(self) -> bool:
        """Use the grades that samples were stored with if this grader's are missing, if that is allowed."""
        here = Provenance(identity={"grader": self._grader}, context={})
        graders = (read_provenance(fragment).identity["grader"] for fragment in self._graded_otherwise)
        self._other_grades_count = not any(
            here.refused({"grader": grader}, self._allowance) for grader in graders
        )
        return self._other_grades_count

    def fragments(self) -> list[Path]:
        """The files with samples, in a fixed order."""
        return sample_files(self.folder)

    def grade_fragments(self) -> list[Path]:
        """The files with this grader's later grades, in a fixed order."""
        return [
            path
            for path in sorted(self.folder.glob(f"{GRADE_FILES}-*.parquet"))
            if read_provenance(path).identity["grader"] == self._grader
        ]

    def present(self, prompts: pl.DataFrame, num_samples: int) -> NDArray[np.bool_]:
        """Which of the first `num_samples` samples of each prompt are stored, shape (P, num_samples).

        `prompts` has the columns prompt_id and prompt_token_hash. Raises UserError if a sample was drawn from other
        prompt tokens.
        """
        places = prompts.select("prompt_id", pl.col("prompt_token_hash").alias("expected")).with_row_index(
            "place"
        )
        found = _collect(
            _scan(self.fragments(), SAMPLES)
            .filter(pl.col("sample_index") < num_samples)
            .select(*ADDRESS, "prompt_token_hash")
            .join(places.lazy(), on="prompt_id")
        )
        self.refuse_other_tokens(found.filter(pl.col("prompt_token_hash") != pl.col("expected")))
        there = np.zeros((prompts.height, num_samples), dtype=np.bool_)
        there[found["place"].to_numpy(), found["sample_index"].to_numpy()] = True
        return there

    def refuse_other_tokens(self, different: pl.DataFrame) -> None:
        """Raise UserError if samples are of prompts that were rendered differently, unless that is allowed."""
        if different.is_empty():
            return
        name = different.row(0, named=True)["prompt_id"]
        line = f"prompt.tokens differ for {different['prompt_id'].n_unique():,} prompts, such as {name}"
        if not self._allowance.permits("prompt.tokens", line):
            raise UserError(
                f"{self.folder} holds samples of prompts that the tokenizer rendered otherwise then: {line}; use the "
                "library versions that drew them, choose another --run, or accept it with "
                "--allow-mismatch prompt.tokens"
            )

    def grades(self, prompts: pl.DataFrame, num_samples: int) -> pl.DataFrame:
        """This grader's verdict on each of these samples, without their text, which V̂* does not need.

        Raises UserError naming a broken rule and row.
        """
        verdict = ["outcome", "reward"]
        columns = [*ADDRESS, "completion_tokens", *verdict]
        parts = [_scan(self._graded, SAMPLES).select(columns)]
        later = self._later_grades().lazy()
        for fragment in self._graded_otherwise:
            others = _hashed(_collect(_scan([fragment], SAMPLES))).select(*columns, "completion_hash").lazy()
            parts.append(others.drop(verdict).join(later, on=JUDGED).select(columns))
            if self._other_grades_count:
                parts.append(others.join(later, on=JUDGED, how="anti").select(columns))
        frame = _collect(
            pl.concat(parts)
            .filter(pl.col("sample_index") < num_samples)
            .join(prompts.lazy().select("prompt_id"), on="prompt_id", how="semi", maintain_order="left")
            .unique(ADDRESS, keep="first", maintain_order=True)
        )
        if frame.height:
            without_text = replace(SAMPLES, schema=pa.schema([_SAMPLES.field(name) for name in columns]))
            without_text.validate(frame, self.folder)
        return frame

    def token_ids(self, prompts: pl.DataFrame) -> pl.DataFrame:
        """The completion_ids of each prompt's first `num_samples` samples, in order; null if they were not kept.

        `prompts` has the columns prompt_id and num_samples.
        """
        found = _collect(
            _scan(self.fragments(), SAMPLES)
            .select(*ADDRESS, "completion_ids")
            .join(prompts.lazy().select("prompt_id", "num_samples"), on="prompt_id", maintain_order="left")
            .filter(pl.col("sample_index") < pl.col("num_samples"))
            .unique(ADDRESS, keep="first", maintain_order=True)
        )
        return found.sort(ADDRESS).select(*ADDRESS, "completion_ids")

    def samples_of(self, prompt_ids: Collection[str], columns: Sequence[pl.Expr]) -> pl.DataFrame:
        """These prompts' samples with this grader's verdict, as expressions over SAMPLES; other rows are not kept.

        A sample that this grader has not judged keeps the verdict that it was stored with.
        """
        chosen = pl.col("prompt_id").is_in(list(prompt_ids))
        verdict = _GRADES.names[len(JUDGED) :]
        later = (
            _scan(self.grade_fragments(), GRADES)
            .filter(chosen)
            .unique(JUDGED, keep="first", maintain_order=True)
            .select(*JUDGED, pl.struct(verdict).alias("later"))
        )
        now = pl.coalesce("later", pl.struct(verdict))
        others = (
            _hashed(_collect(_scan(_holding(self._graded_otherwise, chosen), SAMPLES).filter(chosen)))
            .lazy()
            .join(later, on=JUDGED, how="left")
            .with_columns(now.struct.field(name).alias(name) for name in verdict)
        )
        ours = _scan(_holding(self._graded, chosen), SAMPLES).filter(chosen)
        return _collect(pl.concat([part.select(columns) for part in (ours, others)]))

    def ungraded(self, prompts: pl.DataFrame | None = None) -> Iterator[pl.DataFrame]:
        """The samples that this grader has not judged yet, with text and completion_hash, one fragment at a time.

        With `prompts`, which has the column prompt_id, only theirs.
        """
        there = self._later_grades()
        for fragment in self._graded_otherwise:
            rows = _scan([fragment], SAMPLES)
            if prompts is not None:
                rows = rows.join(
                    prompts.lazy().select("prompt_id"), on="prompt_id", how="semi", maintain_order="left"
                )
            missing = _hashed(_collect(rows)).join(there, on=JUDGED, how="anti")
            if missing.height:
                yield missing

    def ungraded_count(self, prompts: pl.DataFrame | None = None) -> int:
        """How many samples this grader has not judged yet, see `ungraded`."""
        return sum(frame.height for frame in self.ungraded(prompts))

    def _later_grades(self) -> pl.DataFrame:
        grades = _scan(self.grade_fragments(), GRADES).select(*JUDGED, "outcome", "reward")
        return _collect(grades.unique(JUDGED, keep="first", maintain_order=True))

    def surplus(self) -> int:
        """How many samples are stored more than once, from files copied by hand; the first copy counts."""
        found = addresses(self.fragments())
        return found.height - found.n_unique()

    def read(self) -> pl.DataFrame:
        """Every sample with its text and the grade that it was stored with."""
        frame = _collect(_scan(self.fragments(), SAMPLES).unique(ADDRESS, keep="first", maintain_order=True))
        SAMPLES.validate(frame, self.folder)
        return frame

    def append(self, rows: Sequence[dict[str, Any]], judge: Mapping[str, int] | None = None) -> Path:
        """Add samples, as rows of SAMPLES, in one fragment; `judge` is a judge model's usage for them."""
        now = time.monotonic()
        seconds, self._since = round(now - self._since, 3), now
        loading, self._loading = round(self._loading, 3), 0.0
        context = {
            **self.provenance.context,
            SECONDS: seconds,
            LOADING: loading,
            DEVICES: self._devices,
            **({JUDGE: dict(judge)} if judge else {}),
        }
        path = add_fragment(
            self.folder, SAMPLE_FILES, rows, SAMPLES, replace(self.provenance, context=context)
        )
        self._graded.append(path)
        return path

    def seconds(self) -> float | None:
        """The time that drawing these samples took, including loading of models; None if a file does not say."""
        recorded = [read_provenance(fragment).context.get(SECONDS) for fragment in self.fragments()]
        known = [float(seconds) for seconds in recorded if seconds is not None]
        return sum(known) if len(known) == len(recorded) else None

    def loaded(self, devices: int) -> None:
        """Note that the models have been loaded: the time since the opening of the store was not for sampling."""
        self._loading = time.monotonic() - self._since
        self._devices = devices

    def devices(self) -> int:
        """The most devices that drew samples at the same time, as far as the files say."""
        known = [read_provenance(fragment).context.get(DEVICES, 1) for fragment in self.fragments()]
        return max(known, default=1)

    def loading_seconds(self) -> float:
        """The part of `seconds` in which models were loaded, as far as the files say."""
        return sum(
            float(read_provenance(fragment).context.get(LOADING, 0.0)) for fragment in self.fragments()
        )

    def judge_usage(self) -> dict[str, int]:
        """A judge model's usage for these samples, by name; empty if there was none."""
        total: Counter[str] = Counter()
        for fragment in self.fragments():
            total.update(read_provenance(fragment).context.get(JUDGE, {}))
        return dict(total)

    def add_grades(self, rows: Sequence[dict[str, Any]]) -> Path:
        """Add this grader's verdicts on samples of other graders, as rows of GRADES."""
        return add_fragment(self.folder, GRADE_FILES, rows, GRADES, self.provenance)


def sample_files(folder: Path) -> list[Path]:
    """The files with samples in a store's folder, in a fixed order."""
    return sorted(fetched(folder, whole=True).glob(f"{SAMPLE_FILES}-*.parquet"))


def stored_tokens(folder: Path) -> int:
    """The completion tokens of all samples in a store's folder."""
    columns = ["completion_tokens"]
    return sum(int(pl.read_parquet(file, columns=columns).sum().item()) for file in sample_files(folder))


def addresses(files: Sequence[Path]) -> pl.DataFrame:
    """The addresses of the samples in these files, in their order."""
    return _collect(_scan(files, SAMPLES).select(ADDRESS))


def add_fragment(
    folder: Path, kind: str, rows: Sequence[dict[str, Any]], contract: Contract, provenance: Provenance
) -> Path:
    """Write rows as a new file of a store, whole or not at all. Raises UserError if the disk is full."""
    table = pa.Table.from_pylist(list(rows), schema=contract.stamped(provenance))
    buffer = pa.BufferOutputStream()
    pq.write_table(table, buffer, compression="zstd")
    return add_bytes(folder, kind, buffer.getvalue())


def add_bytes(folder: Path, kind: str, content: bytes | pa.Buffer) -> Path:
    """Write a whole file of a store under the hash of its content."""
    path = folder / f"{kind}-{hashlib.sha256(content).hexdigest()}.parquet"
    with atomic_path(path) as temporary:
        temporary.write_bytes(content)
    return path


def set_aside_damaged(folder: Path) -> list[str]:
    """Move damaged files to the folder DAMAGED, and remove temporary files of killed writers.

    Returns one line for each damaged file, with its problem. Only for jobs that write to the store.
    """
    remove_leftovers(folder)
    lines = []
    for path in sorted([*sample_files(folder), *folder.glob(f"{GRADE_FILES}-*.parquet")]):
        if damage(path) is not None and (problem := damage(fetched_anew(path))) is not None:
            (folder / DAMAGED).mkdir(exist_ok=True)
            try:
                path.rename(folder / DAMAGED / path.name)
            except FileNotFoundError:
                continue  # another shard's job was faster
            renamed(path, folder / DAMAGED / path.name)
            lines.append(f"{path.name} is damaged ({problem}) and was moved to {folder / DAMAGED}")
    return lines


def damage(path: Path) -> str | None:
    """The problem of a file of a store; None if it is whole. Raises UserError if reading is not permitted."""
    digest = path.stem.rpartition("-")[2]
    try:
        if len(digest) == _HASH_DIGITS:
            return None if file_digest(path) == digest else "its content does not match the hash in its name"
        pq.read_table(path)  # format version 1 named its files at random
        read_provenance(path)
    except PermissionError as error:
        raise UserError(f"cannot read {path}: {error.strerror}; correct its permissions") from error
    except FileNotFoundError:
        return None
    except (pa.ArrowException, OSError, UserError) as error:
        return str(error).splitlines()[0]
    return None


def stored_text(text: str) -> tuple[str, bytes | None]:
    """A completion as its two columns, completion and completion_raw, so that `original_text` gives it back exactly."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        raw = text.encode("utf-8", "surrogatepass")
        return raw.decode("utf-8", "replace"), raw
    return text, None


def original_text(completion: str, raw: bytes | None) -> str:
    """A completion as the engine gave it."""
    return completion if raw is None else raw.decode("utf-8", "surrogatepass")


def mixed_tokens(files: Sequence[Path]) -> pl.DataFrame:
    """The prompt ids whose samples in these files were drawn from different tokens."""
    tokens = _scan(files, SAMPLES).select("prompt_id", "prompt_token_hash").drop_nulls().unique()
    return _collect(tokens.group_by("prompt_id").len().filter(pl.col("len") > 1).select("prompt_id"))


def _hashed(frame: pl.DataFrame) -> pl.DataFrame:
    """Samples with a hash of each one's text."""
    hashes = [completion_hash(*text) for text in frame.select("completion", "completion_raw").iter_rows()]
    return frame.with_columns(pl.Series("completion_hash", hashes, dtype=pl.String))


def completion_hash(completion: str, raw: bytes | None) -> str:
    """The hash of a completion, by which a later grade refers to the graded text; 32 hexadecimal digits."""
    return hashlib.sha256(completion.encode() if raw is None else raw).hexdigest()[:32]


def _scan(paths: Sequence[Path], contract: Contract) -> pl.LazyFrame:
    """Files of any format version; columns that a version lacks are missing values."""
    columns = polars_schema(contract.schema)
    if not paths:
        return pl.LazyFrame(schema=columns)
    return pl.scan_parquet(
        list(paths), schema=columns, missing_columns="insert", extra_columns="ignore", glob=False
    )


def _holding(paths: Sequence[Path], rows: pl.Expr) -> list[Path]:
    """The files of samples that hold such rows: the texts and tokens of all others need not be read."""
    return [path for path in paths if _collect(_scan([path], SAMPLES).select(rows.any())).item()]


def _collect(frame: pl.LazyFrame) -> pl.DataFrame:
    try:
        return frame.collect()
    except (pl.exceptions.PolarsError, OSError) as error:
        raise UserError(
            f"cannot read the samples: {str(error).splitlines()[0]}; `python cli.py vstar` sets damaged files aside "
            "and draws their samples again"
        ) from error
