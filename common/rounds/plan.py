"""The plan of a run of rounds: the runs that it is made of, their settings, and the steps of each.

Round k of a run is the run `<run>-round<k>`. It samples from its reference and starts at it: the model of round k − 1,
in round 1 the config's. Each round has random streams of its own.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from common.config import RunConfig
from common.evaluations import REFERENCE, TRAINED
from common.remote.places import named
from common.runs import OWN, RunPaths, run_paths
from common.seeds import derive_seed
from common.settings import makes_base_model, own_models
from common.steps import BY_SEVERAL


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """A command on a run."""

    name: str
    """Of its log and its record."""
    paths: RunPaths
    """The run's that keeps these two."""
    arguments: Sequence[str]
    processes: int = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Round:
    """One round, numbered from 1."""

    number: int
    config: RunConfig
    """The config of its run."""
    steps: Sequence[Step]

    @property
    def paths(self) -> RunPaths:
        return run_paths(self.config.run)

    @property
    def model(self) -> Path:
        """The absolute path of its trained model, by which the first run's evaluation names it."""
        return self.paths.model.absolute()


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """All rounds of a run, as many as are asked for."""

    config: RunConfig
    """The first run's, which holds the demo's base model, the evaluation of all rounds and the page."""
    inputs: Sequence[str]
    """The commands that make what training reads, in their order."""
    where: Sequence[str] = ()
    """The conditions on the prompts that each round trains on, as `filter` takes them."""
    processes: int = 1
    """Processes that train."""

    @property
    def paths(self) -> RunPaths:
        return run_paths(self.config.run)

    @property
    def base_model(self) -> Step | None:
        """The step that makes the demo's reference; None for a run with another one."""
        if not makes_base_model(self.config):
            return None
        return Step(
            name="base-model", paths=self.paths, arguments=_with_config("base-model", self.paths.settings)
        )

    def round(self, number: int) -> Round:
        """The round of this number, whether it has begun or not."""
        config = self._config(number)
        return Round(number=number, config=config, steps=self._steps(number, run_paths(config.run)))

    def begun(self) -> list[Round]:
        """The rounds that have begun, from the first on."""
        found: list[Round] = []
        while (round := self.round(len(found) + 1)).paths.pointer.exists():
            found.append(round)
        return found

    def _config(self, number: int) -> RunConfig:
        own = named(self.paths.root)
        paths = {key: path.replace(OWN, own) for key, path in own_models(self.config).items()}
        model, segments = self.config.model, self.config.segments
        if "model.path" in paths:
            model = model.model_copy(update={"path": paths["model.path"]})
        if "segments.completer" in paths:
            segments = segments.model_copy(update={"completer": paths["segments.completer"]})
        if number > 1:
            before = run_paths(_name(self.config.run, number - 1)).model
            model = model.model_copy(update={"path": named(before), "revision": None})
        changed = {"run": _name(self.config.run, number), "seed": _seed(self.config.seed, number)}
        return self.config.model_copy(update={**changed, "model": model, "segments": segments})

    def _steps(self, number: int, paths: RunPaths) -> list[Step]:
        """The steps of a round, in their order."""

        def step(command: str, *options: str) -> Step:
            arguments = [*_with_config(command, paths.settings), *options]
            processes = self.processes if command in BY_SEVERAL else 1
            return Step(name=command, paths=paths, arguments=arguments, processes=processes)

        steps = [step(command) for command in self.inputs]
        if self.where:
            steps.append(self._filter(paths))
        steps.append(step("train"))
        if self.config.is_evaluated:
            # With one seed, all rounds answer the same questions, and no completion is drawn a second time.
            steps.append(step("evaluate", "--set", f"seed={self.config.seed}", "--model", TRAINED))
            steps.append(self._evaluation_of_all(number, paths))
        return steps

    def _filter(self, paths: RunPaths) -> Step:
        unsolved = "--drop-unsolved" if self.config.vstar.drop_unsolved else "--no-drop-unsolved"
        conditions = [part for text in self.where for part in ("--where", text)]
        return Step(
            name="filter", paths=paths, arguments=["filter", "--run", paths.root.name, unsolved, *conditions]
        )

    def _evaluation_of_all(self, number: int, paths: RunPaths) -> Step:
        """Adds a round's model, and before the first one's the reference, to the evaluations of the first run.

        Its record is the round's: a round that is done again is evaluated again.
        """
        models = [*([REFERENCE] if number == 1 else []), named(paths.model)]
        return Step(
            name="evaluate-all",
            paths=paths,
            arguments=[
                *_with_config("evaluate", self.paths.settings),
                *(part for model in models for part in ("--model", model)),
            ],
        )


def _name(run: str, number: int) -> str:
    return f"{run}-round{number}"


def _seed(seed: int, number: int) -> int:
    """The seed of a round: equal prompts with an equal seed would be answered from equal random streams."""
    return seed if number == 1 else derive_seed(seed, "round", number)


def _with_config(command: str, config: Path) -> list[str]:
    return [command, "--config", str(config.absolute())]
