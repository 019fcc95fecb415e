"""A study's plan: from its TOML file to runs, one for each arm and seed, and to the tables of stage 1 they share."""

import hashlib
import json
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field

from common.config import RunConfig, Seed, read_config
from common.errors import UserError
from common.runs import RUN_NAME, is_run_name
from common.section import Section
from common.segments.config import CRITIC_TRAIN_KEYS
from common.settings import Loader, as_toml, flat, own_models, shown

OF_THE_STUDY = {
    "run": "the study names its runs",
    "seed": "give the study's `seeds`",
}
"""Keys of a config that no setting may change."""

_LETTERS = str.maketrans({"*": "star", "β": "beta", "₁": "1", "₂": "2", "∞": "inf"})
"""Characters of arms' names that file names spell out."""


class ArmSection(Section):
    """An arm of a study, or with `vary` one arm for each value of a key."""

    name: str
    settings: dict[str, Any] = Field(default_factory=dict)
    vary: dict[str, Any] = Field(default_factory=dict)
    """One key and the list of its values."""


class StudyFile(Section):
    """A study's TOML file."""

    study: Annotated[str, Field(pattern=RUN_NAME)]
    """Its folder is artifacts/<study>."""
    config: str
    """The TOML file of the runs, relative to the study's."""
    seeds: Annotated[tuple[Seed, ...], Field(min_length=1)]
    processes: Annotated[int, Field(ge=1)] = 1
    """Processes that train, one a GPU."""
    times: bool = True
    """Whether times are compared: false where the machine does other work meanwhile."""
    targets: tuple[Annotated[float, Field(gt=0, le=1)], ...] = ()
    """Held-out accuracies; the tables have the time and the iterations until each."""
    settings: dict[str, Any] = Field(default_factory=dict)
    """For all arms, as `--set` takes them."""
    arms: Annotated[tuple[ArmSection, ...], Field(min_length=1)]


@dataclass(frozen=True, slots=True, kw_only=True)
class Arm:
    """A contestant: settings under a name."""

    name: str
    settings: Mapping[str, Any]
    """The study's and its own, by dotted key."""
    grid: str | None = None
    """The name of the section whose values it is one of."""
    key: str | None = None
    """The key that the grid varies."""

    @property
    def slug(self) -> str:
        """Its name in names of files."""
        return re.sub(r"[^A-Za-z0-9.]+", "-", self.name.translate(_LETTERS)).strip("-.")

    @property
    def value(self) -> Any:
        """The value of the grid's key."""
        return self.settings[self.key] if self.key is not None else None

    def overrides(self, seed: int) -> list[str]:
        """Its settings as `--set` takes them."""
        return [f"{key}={as_toml(value)}" for key, value in {**self.settings, "seed": seed}.items()]


@dataclass(frozen=True, slots=True, kw_only=True)
class VstarTable:
    """A vstar.parquet that runs share; tables of one `samples` run are computed from the same completions."""

    samples: str
    """The run whose folder holds the completions."""
    num_samples: int
    beta1: float
    drop_unsolved: bool
    keep_token_ids: bool

    @property
    def name(self) -> str:
        return f"n{self.num_samples}-beta{self.beta1:g}{'-solved' if self.drop_unsolved else ''}"


@dataclass(frozen=True, slots=True, kw_only=True)
class AdvantagesTable:
    """An advantages.parquet that runs share; so they do its states and its critic."""

    states: str
    """The run whose folder holds segments.parquet."""
    values: str
    """The run whose folder holds the critic; the same if there is none."""
    has_critic: bool
    min_gap: float
    name: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """An arm with a seed."""

    arm: Arm
    seed: int
    config: RunConfig
    processes: int
    """Processes that train."""
    digest: str
    """A hash of its whole config, and of the processes if there are several."""
    reference: str
    """The run whose folder holds the results of the reference model."""
    base: str | None
    """The run whose folder holds the base model, where that is the demo's."""
    table: VstarTable | AdvantagesTable | None
    """The table that it trains on, if its objective reads one."""

    @property
    def settings(self) -> dict[str, Any]:
        """The values of its config by dotted key, as JSON has them, and the study's `processes`."""
        return {**flat(json.loads(self.config.to_json())), "processes": self.processes}

    @property
    def chosen(self) -> Collection[str]:
        """The keys whose values are not the defaults."""
        keys = flat(json.loads(self.config.model_dump_json(exclude_defaults=True))).keys()
        return keys | ({"processes"} if self.processes > 1 else set())

    @property
    def title(self) -> str:
        return f"{self.arm.name}, seed {self.seed}"

    @property
    def record_name(self) -> str:
        """The name of the file of its results."""
        return f"{self.arm.slug}-seed{self.seed}.json"

    @property
    def name(self) -> str:
        """Its folder's: another config has another folder."""
        return f"{self.arm.slug}-seed{self.seed}-{self.digest[:8]}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """A study's runs, seed by seed, so that a stopped study has compared all arms on some seeds."""

    study: str
    config: Path
    processes: int
    times: bool
    """Whether times are compared."""
    targets: Sequence[float]
    arms: Sequence[Arm]
    seeds: Sequence[int]
    runs: Sequence[Run]
    source: str
    """The study's file."""

    def largest(self, table: VstarTable) -> VstarTable:
        """The table with the most samples of those that share its completions: it is drawn first."""
        others = [
            run.table
            for run in self.runs
            if isinstance(run.table, VstarTable) and run.table.samples == table.samples
        ]
        return max(others, key=lambda other: other.num_samples)

    def widest(self, table: AdvantagesTable) -> AdvantagesTable:
        """The table with the most states to train on, of those with its values: it is made first."""
        others = [
            run.table
            for run in self.runs
            if isinstance(run.table, AdvantagesTable) and run.table.values == table.values
        ]
        return min(others, key=lambda other: other.min_gap)


def read_plan(path: Path, load: Loader) -> Plan:
    """Read a study and every config that it leads to. Raises UserError for any mistake in them."""
    file = read_config(StudyFile, path)
    config = path.parent / file.config
    arms = list(_arms(file, path))
    if repeated := _repeated([arm.slug for arm in arms]):
        names = " and ".join(f'"{arm.name}"' for arm in arms if arm.slug == repeated)
        raise UserError(f"{path}: the arms {names} have the same name, or one in files; rename one of them")
    if (repeated_seed := _repeated([str(seed) for seed in file.seeds])) is not None:
        raise UserError(f"{path}: seed {repeated_seed} is there twice; list each seed once")
    runs = [_run(arm, seed, file, path, load) for seed in file.seeds for arm in arms]
    if same := _repeated([run.digest for run in runs]):
        names = " and ".join(f'"{run.arm.name}"' for run in runs if run.digest == same)
        raise UserError(f"{path}: the arms {names} have the same settings; remove one of them")
    return Plan(
        study=file.study,
        config=config,
        processes=file.processes,
        times=file.times,
        targets=file.targets,
        arms=arms,
        seeds=file.seeds,
        runs=runs,
        source=path.read_text(encoding="utf-8-sig"),
    )


def _repeated(names: Sequence[str]) -> str | None:
    return next((name for place, name in enumerate(names) if name in names[:place]), None)


def _by_key(settings: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Settings by dotted key, from tables or dotted keys. A table under a dotted key replaces the config's own."""
    found: dict[str, Any] = {}
    for key, value in settings.items():
        is_part = isinstance(value, dict) and "." not in key
        found |= _by_key(value, f"{prefix}{key}.") if is_part else {f"{prefix}{key}": value}
    return found


def _arms(file: StudyFile, path: Path) -> Iterator[Arm]:
    common = _by_key(file.settings)
    for section in file.arms:
        varied = _by_key(section.vary)
        settings = {**common, **_by_key(section.settings)}
        if refused := next((key for key in (*settings, *varied) if key in OF_THE_STUDY), None):
            raise UserError(f'{path}: the arm "{section.name}" cannot set {refused}; {OF_THE_STUDY[refused]}')
        if not section.vary:
            yield Arm(name=section.name, settings=settings)
            continue
        key, values = next(iter(varied.items()))
        if len(varied) != 1 or not isinstance(values, list) or not values:
            raise UserError(
                f'{path}: vary of the arm "{section.name}" takes one key and a list of its values, for example '
                f'vary = {{ "vstar.num_samples" = [1, 2, 4] }}, found {section.vary!r}'
            )
        for value in values:
            name = f"{section.name} = {shown(value)}"
            yield Arm(name=name, settings={**settings, key: value}, grid=section.name, key=key)
    for section in file.arms:
        if not is_run_name(Arm(name=section.name, settings={}).slug):
            raise UserError(
                f'{path}: the arm "{section.name}" needs a letter or digit in its name, which names its files'
            )


def _run(arm: Arm, seed: int, file: StudyFile, path: Path, load: Loader) -> Run:
    config = path.parent / file.config
    try:
        loaded, inputs = load(config, arm.overrides(seed), "study")
    except UserError as error:
        raise UserError(f'{path}, arm "{arm.name}": {error}') from error
    if loaded.held_out is None:
        raise UserError(
            f"{config} has no [evaluate.data] section: say on which held-out prompts the arms are compared"
        )
    document = json.loads(loaded.to_json())
    evaluated = {
        key: value for key, value in document.items() if key not in ("run", "train", *_BEFORE_TRAINING)
    }
    several = {"processes": file.processes} if file.processes > 1 else {}
    return Run(
        arm=arm,
        seed=seed,
        config=loaded,
        processes=file.processes,
        digest=_digest(document | several),
        reference=f"reference-seed{seed}-{_digest(evaluated)[:8]}",
        base=f"base-seed{seed}" if own_models(loaded) else None,
        table=_table(loaded, document, inputs, several),
    )


_BEFORE_TRAINING = ("vstar", "segments", "critic", "advantages")
"""The sections about tables that training reads."""
_SAMPLES = ("model", "data", "sampling", "grader", "engine", "seed")
"""The sections that samples depend on."""


def _table(
    config: RunConfig, document: Mapping[str, Any], inputs: Sequence[str], several: Mapping[str, int]
) -> VstarTable | AdvantagesTable | None:
    """The table that training reads, which the commands `inputs` make; `several` are the processes, if not one."""

    def shared(name: str, **others: Any) -> str:
        return f"{name}-seed{config.seed}-{_digest({key: document[key] for key in _SAMPLES} | others)[:8]}"

    if "vstar" in inputs:
        return VstarTable(
            samples=shared("stage1", **({"keep_token_ids": True} if config.vstar.keep_token_ids else {})),
            num_samples=config.vstar.num_samples,
            beta1=config.vstar.beta1,
            drop_unsolved=config.vstar.drop_unsolved,
            keep_token_ids=config.vstar.keep_token_ids,
        )
    if "advantages" in inputs:
        own = {"segments": document["segments"]}
        states = shared("states", **own)
        has_critic = "critic" in inputs
        train = {key: document["train"].get(key) for key in sorted(CRITIC_TRAIN_KEYS)}
        critic = shared("critic", **own, critic=document["critic"], train=train, **several)
        return AdvantagesTable(
            states=states,
            values=critic if has_critic else states,
            has_critic=has_critic,
            min_gap=config.advantages.min_gap,
            name=f"advantages-{_digest(document['advantages'])[:8]}",
        )
    return None


def _digest(document: Any) -> str:
    return hashlib.sha256(json.dumps(document, sort_keys=True).encode()).hexdigest()[:32]
