"""vstar.parquet, the contract between the stages: one row per prompt, with everything stage 2 needs from stage 1."""

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import AbstractContextManager
from pathlib import Path

import polars as pl
import pyarrow as pa

from common.contract import Constant, Contract, Rule, Unique
from common.errors import UserError
from common.grading import OUTCOMES, Outcome
from common.provenance import MIGRATIONS, SCHEMA_VERSION, VSTAR_COMMAND, Provenance, read_provenance

VSTAR = pa.schema(
    [
        pa.field("prompt_id", pa.string(), nullable=False),
        pa.field("prompt", pa.string(), nullable=False),
        pa.field("answer", pa.string(), nullable=False),
        pa.field("prompt_token_hash", pa.string()),
        pa.field("num_samples", pa.int32(), nullable=False),
        pa.field("rewards", pa.list_(pa.float64()), nullable=False),
        pa.field("outcomes", pa.list_(pa.string()), nullable=False),
        pa.field("completion_tokens", pa.list_(pa.int32()), nullable=False),
        pa.field("pass_rate", pa.float64(), nullable=False),
        pa.field("pass_at_n", pa.bool_(), nullable=False),
        pa.field("beta1", pa.float64(), nullable=False),
        pa.field("vstar", pa.float64(), nullable=False),
        pa.field("vstar_se", pa.float64()),
        pa.field("keep", pa.bool_(), nullable=False),
        pa.field("dropped_by", pa.string()),
    ]
)
"""`dropped_by` names the first rule that dropped a prompt; missing if none did, and in files of versions 1 and 2."""

_TOLERANCE = 1e-9


_is_known = pl.any_horizontal(*(pl.element() == outcome for outcome in OUTCOMES))

_solved = pl.col("outcomes").list.count_matches(Outcome.CORRECT.value)

_rounding = _TOLERANCE * (1 + pl.col("rewards").list.eval(pl.element().abs()).list.max())

_mean, _best = pl.col("rewards").list.mean(), pl.col("rewards").list.max()

_MEAN_TO_BEST = (
    "vstar lies between the mean and the best reward",
    pl.col("vstar").is_between(_mean - _rounding, _best + _rounding),
)

VSTAR_RANGES: dict[str, tuple[str, pl.Expr]] = {
    "plugin": _MEAN_TO_BEST,
    "jackknife": _MEAN_TO_BEST,
    "beta_binomial": (
        "vstar lies between 0 and 1",
        pl.col("vstar").is_between(-_TOLERANCE, 1 + _TOLERANCE),
    ),
}
"""The estimators of V*, and the rules that their values satisfy."""

ESTIMATORS = tuple(VSTAR_RANGES)


def _contract(range_name: str, in_range: pl.Expr) -> Contract:
    invariants: dict[str, Rule] = {
        "a prompt appears once": Unique(["prompt_id"]),
        "num_samples counts the rewards": pl.col("rewards").list.len() == pl.col("num_samples"),
        "num_samples counts the outcomes": pl.col("outcomes").list.len() == pl.col("num_samples"),
        "num_samples counts the lengths": pl.col("completion_tokens").list.len() == pl.col("num_samples"),
        "there is at least one sample": pl.col("num_samples") >= 1,
        "rewards are finite": pl.col("rewards")
        .list.eval(pl.element().is_finite().fill_null(False))
        .list.all(),
        "outcomes are known": pl.col("outcomes").list.eval(_is_known.fill_null(False)).list.all(),
        "pass_rate is the share of correct outcomes": (
            (pl.col("pass_rate") - _solved / pl.col("num_samples")).abs() < _TOLERANCE
        ),
        "pass_at_n says whether any sample is correct": pl.col("pass_at_n") == (_solved > 0),
        "beta1 is a number and not negative": (pl.col("beta1") >= 0) & pl.col("beta1").is_not_nan(),
        "beta1 is the same for every prompt": Constant("beta1"),
        range_name: in_range,
        "vstar_se is missing or not negative": (
            pl.col("vstar_se").is_null() | ((pl.col("vstar_se") >= 0) & pl.col("vstar_se").is_not_nan())
        ),
        "no rule dropped a prompt that is kept": ~pl.col("keep") | pl.col("dropped_by").is_null(),
    }
    return Contract(
        schema=VSTAR,
        invariants=invariants,
        version=SCHEMA_VERSION,
        migrations=MIGRATIONS,
        remedy=VSTAR_COMMAND,
    )


_CONTRACTS = {estimator: _contract(*promise) for estimator, promise in VSTAR_RANGES.items()}


def estimator_of(provenance: Provenance) -> str:
    """The estimator that computed a table's V̂*; the paper's if its context names none."""
    return str(provenance.context.get("estimator", "plugin"))


def known_estimator(name: str) -> str:
    """The name, if there is such an estimator. Raises UserError otherwise."""
    if name not in ESTIMATORS:
        raise UserError(f"there is no estimator {name}; choose one of {', '.join(ESTIMATORS)}")
    return name


def _contract_of(provenance: Provenance) -> Contract:
    return _CONTRACTS[known_estimator(estimator_of(provenance))]


def write_vstar(frame: pl.DataFrame, provenance: Provenance, path: Path) -> None:
    """Write vstar.parquet, see `Contract.write`."""
    _contract_of(provenance).write(frame, provenance, path)


def read_vstar(path: Path) -> tuple[pl.DataFrame, Provenance]:
    """Read vstar.parquet of any format version, see `Contract.read`."""
    return _contract_of(read_provenance(path)).read(path)


def rows_to_train_on(rows: pl.DataFrame, path: Path) -> pl.DataFrame:
    """The rows that a table keeps. Raises UserError if there are none."""
    kept = rows.filter("keep")
    if kept.is_empty():
        raise UserError(
            f"{path}: no prompt is left to train on; run `python cli.py filter --vstar {path}` with milder rules"
        )
    return kept


def scan_vstar(path: Path, columns: Sequence[str] = VSTAR.names) -> Iterator[pl.DataFrame]:
    """The rows of vstar.parquet as `read_vstar` gives them, in bounded memory, see `Contract.scan`."""
    return _contract_of(read_provenance(path)).scan(path, columns)


def vstar_writer(
    path: Path, provenance: Provenance, *, changed: Collection[str]
) -> AbstractContextManager[Callable[[pl.DataFrame], None]]:
    """Write vstar.parquet in parts, see `Contract.writer`."""
    return _contract_of(provenance).writer(path, provenance, changed=changed)
