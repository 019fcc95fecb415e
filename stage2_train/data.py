"""Training's inputs, read and checked before any model loads: prompts, held-out prompts, and stage 1's results.

Prompts are those that stage 1's file keeps. An objective that needs nothing from stage 1 may take them from [data]. An
objective with known advantages reads the states of advantages.parquet. With `train.rollouts = "stage1"` stage 1's
samples are read too.
"""

import hashlib
import json
import random
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import polars as pl

from common.config import DataConfig
from common.data.prompts import (
    check_fit,
    load_prompts,
    refuse_none_usable,
    usable_prompts,
)
from common.data.rendering import PromptRenderer
from common.doubts import doubts, equal_reward
from common.errors import UserError
from common.grading import GraderPool, fingerprint, negative_rewards_warning
from common.model.files import model_identity, reference_model
from common.model.trainable import read_trainable
from common.parity import PARITY
from common.provenance import Allowance, Provenance, differences, sampling_identity
from common.remote.copies import fetched
from common.rollout import Prompt
from common.runs import run_paths
from common.seeds import derive_seed
from common.table_origin import prompts_of, refuse_other_identity
from common.vstar_file import read_vstar, rows_to_train_on
from stage2_train.advantages import Advantages, read_advantages
from stage2_train.config import Config, TrainConfig
from stage2_train.evaluation.plan import benchmarks_of, roomy
from stage2_train.first_batch import FirstBatch, expected_first_batch
from stage2_train.preflight import refuse_first
from stage2_train.ranks import ALONE, Ranks
from stage2_train.samples import Samples, read_samples
from stage2_train.sources.batches import Units

EQUAL_REWARDS = "rewards.equal"
"""The name by which --allow-mismatch accepts a result of stage 1 whose rewards are all equal."""
CHOICE = ("format", "path", "name", "split", "prompt_field", "answer_field", "limit", "seed")
"""The keys of [data] that select the prompts."""

LARGEST_TIED_SHARE = 0.5
"""The largest share of prompts with only two reward values, for an objective that uses quantiles of rewards."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Stage1:
    """The data of vstar.parquet on the training prompts; its columns by prompt id."""

    file: Path
    vstar: Mapping[str, float]
    pass_rate: Mapping[str, float]
    rewards: Mapping[str, Sequence[float]]
    beta1: float
    """β1 of the artifact, which may have been rescored since the config was written."""
    num_samples: str
    """N of the artifact, or its range over prompts."""
    first_batch: FirstBatch | None
    """The forecast of the first iteration from stage 1's samples."""
    accepted_mismatches: tuple[str, ...] = ()
    """Differences between the artifact's identity and this run's that the user allowed."""
    remarks: tuple[str, ...] = ()
    """Lines to tell the user about the artifact."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingData:
    """Training's inputs."""

    folder: Path
    """The reference model's."""
    renderer: PromptRenderer
    prompts: list[Prompt]
    held_out: list[Prompt]
    benchmarks: Mapping[str, list[Prompt]] = field(default_factory=dict)
    """Of the benchmarks that training evaluates, by name."""
    stage1: Stage1 | None
    advantages: Advantages | None = None
    """The states to train on; their prompts are `prompts`, and nothing is drawn."""
    samples: Samples | None = None
    """Stage 1's samples, if they are what is trained on."""
    identity: Mapping[str, Any]
    """The identity of model, prompt template, sampling and grader."""

    def iterations(self, config: Config) -> int:
        """The number of iterations of this run."""
        return config.train.iterations_over(len(self.prompts if self.units is None else self.units))

    @property
    def units(self) -> Units | None:
        """What is trained on, if it is read and not drawn."""
        return self.samples if self.advantages is None else self.advantages

    @property
    def accepted_mismatches(self) -> list[str]:
        """Differences between the identity of the table that was read and this run's that the user allowed."""
        table = self.advantages or self.stage1
        return [] if table is None else list(table.accepted_mismatches)

    def usable(self, config: Config, pool: GraderPool, ranks: Ranks) -> "TrainingData":
        """Without the prompts whose reference answer the grader cannot use, if that has not been checked yet.

        A collective operation: only the main rank checks, since a slow grader must not leave ranks with different
        prompts.
        """
        prompts, held_out = self.prompts, self.held_out
        if self.stage1 is None:
            prompts = usable(prompts, config.data, pool, ranks)
        if config.held_out is not None:
            held_out = usable(held_out, config.held_out, pool, ranks)
        return replace(self, prompts=prompts, held_out=held_out)

    def digest(self) -> dict[str, Any]:
        """Identifies the data, and without stage 1's file the settings behind them: a continued run must match."""
        if self.advantages is not None:
            return {"advantages": self.advantages.digest()}
        if self.stage1 is None:
            return {"prompts": _digest([prompt.id for prompt in self.prompts]), "identity": self.identity}
        samples = {} if self.samples is None else {"samples": self.samples.digest()}
        return {"vstar": _digest(sorted(self.stage1.vstar.items())), **samples}


def usable(prompts: list[Prompt], data: DataConfig, pool: GraderPool, ranks: Ranks) -> list[Prompt]:
    """The prompts whose reference answer the grader can use; a collective operation."""
    chosen = ranks.once(lambda: {prompt.id for prompt in usable_prompts(prompts, data, pool)})
    found = [prompt for prompt in prompts if prompt.id in chosen]
    refuse_none_usable(found, data)
    return found


def _digest(document: Any) -> str:
    return hashlib.sha256(json.dumps(document).encode()).hexdigest()[:32]


def prepare(
    config: Config,
    table_file: Path | None,
    allow_mismatch: Collection[str] = (),
    ranks: Ranks = ALONE,
) -> TrainingData:
    """Read and check everything that needs no model. Raises UserError.

    The file is a table of V̂*, or of advantages if the objective reads one; without it the prompts are those of [data].
    A collective operation: a node's main rank hashes the model for all of its ranks.
    """
    reads_advantages = config.train.reads_advantages
    table = None
    if table_file is not None and not reads_advantages:
        table = (table_file, *read_vstar(table_file))
    folder = reference_model(config)
    read_trainable(folder, config)
    refuse_first(config, folder)
    renderer = PromptRenderer(folder, config.data)
    known = run_paths(config.run).known_weights
    model = ranks.once_a_node(lambda: model_identity(folder, known))
    identity = sampling_identity(config, renderer, model, fingerprint(config.grader))
    if reads_advantages:
        assert table_file is not None, "the objective needs a table"
        states = read_advantages(config, renderer, identity, table_file, Allowance(allow_mismatch), folder)
        return TrainingData(
            folder=folder,
            renderer=renderer,
            prompts=list(states.prompts.values()),
            held_out=[],
            stage1=None,
            advantages=states,
            identity=identity,
        )
    samples = None
    if table is None:
        if others := [name for name in allow_mismatch if name != PARITY]:
            raise UserError(
                f"--allow-mismatch {' '.join(others)}: there is nothing to mismatch without --vstar"
            )
        prompts, stage1 = load_prompts(config.data, config, renderer), None
    else:
        prompts, stage1 = _from_stage1(config, renderer, identity, *table, Allowance(allow_mismatch))
        if config.train.rollouts == "stage1":
            file, rows, provenance = table
            samples = read_samples(_samples_of(file, config), rows, provenance, prompts, config.train)
    check_fit(prompts, config, folder)
    benchmarks = {}
    for benchmark in (each for each in benchmarks_of(config, must_exist=False) if each.every):
        own = config.model_copy(update={"grader": benchmark.grader})
        found = load_prompts(benchmark.data, own, PromptRenderer(folder, benchmark.data))
        check_fit(found, roomy(config, [benchmark]), folder, benchmark.data)
        benchmarks[benchmark.name] = found
    held_out = []
    if config.held_out is not None:
        held_out = load_prompts(config.held_out, config, PromptRenderer(folder, config.held_out))
        held_out = held_out[: config.evaluate.training_prompts]
        check_fit(held_out, config, folder, config.held_out)
    return TrainingData(
        folder=folder,
        renderer=renderer,
        prompts=prompts,
        held_out=held_out,
        benchmarks=benchmarks,
        stage1=stage1,
        samples=samples,
        identity=identity,
    )


def _samples_of(table: Path, config: Config) -> Path:
    """The samples behind a table: beside it, in the folder above, or in the run's."""
    run = run_paths(config.run).samples
    near = [folder / run.name for folder in table.absolute().parents[:2]]
    return next((folder for folder in near if fetched(folder, whole=True).is_dir()), run)


def _from_stage1(
    config: Config,
    renderer: PromptRenderer,
    identity: dict[str, Any],
    file: Path,
    rows: pl.DataFrame,
    provenance: Provenance,
    allowance: Allowance,
) -> tuple[list[Prompt], Stage1]:
    """The prompts that a table keeps. Raises UserError unless it was made as this run's config says."""
    refuse_other_identity(
        identity,
        provenance,
        file,
        allowance,
        besides=[EQUAL_REWARDS, PARITY],
        advice="V̂* holds for its own model, template, sampling and grader only: use those, make it again "
        "with another --run",
    )
    kept = rows_to_train_on(rows, file)
    _refuse_nothing_to_learn(kept, file, allowance)
    _refuse_unfit_rewards(kept["rewards"], config.train, file)
    prompts = prompts_of(kept, config.data, renderer, file, allowance)
    return prompts, Stage1(
        file=file,
        vstar=_by_prompt(kept, "vstar"),
        pass_rate=_by_prompt(kept, "pass_rate"),
        rewards=_by_prompt(kept, "rewards"),
        beta1=rows["beta1"][0],
        num_samples=_range(rows["num_samples"]),
        first_batch=expected_first_batch(rows, config.train),
        accepted_mismatches=tuple(allowance.used),
        remarks=tuple(_remarks(config.data, kept, provenance)),
    )


def _refuse_nothing_to_learn(kept: pl.DataFrame, file: Path, allowance: Allowance) -> None:
    if (reward := equal_reward(kept)) is None:
        return
    samples = int(kept["num_samples"].sum())
    line = f"{EQUAL_REWARDS}: each of the {samples:,} samples of stage 1 has the reward {reward:g}"
    if not allowance.permits(EQUAL_REWARDS, line):
        raise UserError(
            f"{file}: {line}, so there is nothing to learn from: {'; '.join(doubts(kept))}. To train anyway: "
            f"--allow-mismatch {EQUAL_REWARDS}"
        )


def _remarks(data: DataConfig, kept: pl.DataFrame, provenance: Provenance) -> Iterator[str]:
    """Lines on differing prompts in [data], and on rewards below 0, which make a truncated completion the best."""
    if theirs := provenance.context.get("data"):
        ours = data.model_dump(include=set(CHOICE), exclude_none=True)
        if other := differences(ours, {key: theirs[key] for key in CHOICE if key in theirs}, "data."):
            yield f"these prompts are not those of [data] now: {'; '.join(other.values())}"
    if warning := negative_rewards_warning(*(kept[name].explode() for name in ("outcomes", "rewards"))):
        yield warning


def _refuse_unfit_rewards(rewards: pl.Series, train: TrainConfig, file: Path) -> None:
    """Raise UserError if the objective cannot use stage 1's rewards, which are one list per prompt."""
    name = train.objective.name
    tied = int((rewards.list.n_unique() <= 2).sum())
    if "quantile" in train.columns and tied > LARGEST_TIED_SHARE * len(rewards):
        raise UserError(
            f"{file}: most prompts have no more than two different rewards, whose quantiles tie, so {name} would push "
            "wrong completions up too; give it a graded reward, or train with astar_po"
        )
    each = rewards.explode()
    if "expected" in train.columns and not each.is_between(0, 1).all():
        raise UserError(
            f"{file}: rewards go from {each.min()!s} to {each.max()!s}, {name} expects rewards from 0 to 1; "
            "scale them, or train with another objective"
        )


def _by_prompt(rows: pl.DataFrame, column: str) -> dict[str, Any]:
    return dict(zip(rows["prompt_id"], rows[column].to_list(), strict=True))


def _range(numbers: pl.Series) -> str:
    low, high = str(numbers.min()), str(numbers.max())
    return low if low == high else f"{low} to {high}"


def prompt_batch(prompts: int, batch_size: int, seed: int, iteration: int) -> list[int]:
    """The prompts of an iteration (from 1 on): an endless row of shuffled epochs, cut into batches.

    A function of its arguments alone, so that a resumed run sees the data in the same order.
    """
    start = (iteration - 1) * batch_size
    batch: list[int] = []
    while len(batch) < batch_size:
        epoch, offset = divmod(start + len(batch), prompts)
        batch += _epoch(prompts, seed, epoch)[offset : offset + batch_size - len(batch)]
    return batch


@lru_cache(maxsize=2)
def _epoch(prompts: int, seed: int, number: int) -> list[int]:
    """The order of an epoch."""
    order = list(range(prompts))
    random.Random(derive_seed(seed, "epoch", number)).shuffle(order)
    return order
