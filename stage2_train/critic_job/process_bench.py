"""First wrong steps in a file in ProcessBench's format (arXiv:2412.06559), found by a trained critic.

A row has `id`, `problem`, `steps` (texts), `final_answer_correct` and `label`, the index of the first wrong step or −1.
The texts are tokenised as those of `import-segments` are, see `StepTokeniser`. The problem is rendered as a prompt of
[data] is.
"""

from collections.abc import Sequence
from pathlib import Path

from pydantic import BaseModel, StrictInt, ValidationError, model_validator
from scipy.special import expit

from common.config import LOCAL_FILES, data_suffix
from common.data.files import rows_in
from common.data.rendering import PromptRenderer
from common.documents import read_document
from common.errors import UserError
from common.files import write_text
from common.model.files import reference_model
from common.runs import run_paths
from common.segments.critic import refuse_missing_critic
from common.segments.labelled import StepTokeniser
from common.terminal.console import Terminal
from stage2_train.config import Config
from stage2_train.critic_job.figures import (
    DEFAULT_THRESHOLD,
    NONE_WRONG,
    FirstWrongStep,
    first_wrong_step,
)
from stage2_train.critic_job.results import FIGURES, CriticFigures, first_wrong_lines
from stage2_train.critic_job.states import Trajectory
from stage2_train.critic_job.values import TrainedCritic
from stage2_train.ranks import launched_processes


class ProcessBenchSolution(BaseModel):
    """A solution whose first wrong step is known."""

    problem: str
    steps: list[str]
    label: StrictInt

    @model_validator(mode="after")
    def _label_names_a_step(self) -> "ProcessBenchSolution":
        if not NONE_WRONG <= self.label < len(self.steps) or not self.steps:
            raise ValueError(f"label is {self.label}, and there are {len(self.steps)} steps")
        return self


class ProcessBenchFigures(BaseModel, frozen=True):
    """F1 on a file, at the default threshold and at the one chosen on the critic's own training prompts."""

    file: str
    too_long: int
    """Solutions beyond the critic's context, which are left out."""
    default: FirstWrongStep
    chosen: FirstWrongStep


def read_process_bench(file: Path) -> list[ProcessBenchSolution]:
    """The solutions of a file. Raises UserError for one that is not in ProcessBench's format."""
    if not file.is_file() or data_suffix(file.name) not in LOCAL_FILES:
        raise UserError(
            f"there is no data file {file}; give a file in ProcessBench's format, .jsonl or .parquet"
        )
    found = []
    for number, row in enumerate(rows_in(file), start=1):
        try:
            found.append(ProcessBenchSolution.model_validate(row))
        except ValidationError as error:
            raise UserError(
                f"{file}, row {number} is not in ProcessBench's format (problem, steps, label): {_problem(error)}"
            ) from error
    if not found:
        raise UserError(f"{file} has no rows; give a file in ProcessBench's format, .jsonl or .parquet")
    return found


def _problem(error: ValidationError) -> str:
    first = error.errors(include_input=False, include_url=False)[0]
    return ": ".join([*map(str, first["loc"]), first["msg"]])


def trajectories_of(
    solutions: Sequence[ProcessBenchSolution], renderer: PromptRenderer, separators: Sequence[str]
) -> list[Trajectory]:
    """The trajectories of some solutions; a solution's states are those after each step, numbered over all."""
    tokenise = StepTokeniser(renderer, separators)
    prompts = renderer.render_all(each.problem for each in solutions)
    found: list[Trajectory] = []
    states = 0
    for solution, prompt in zip(solutions, prompts, strict=True):
        assert prompt is not None, "there is no limit"
        texts = tokenise.texts(solution.steps, is_whole=True)
        token_ids, ends = list(prompt), []
        for step in tokenise.token_ids(texts, is_whole=True):
            token_ids += step
            ends.append(len(token_ids))
        numbers = tuple(range(states, states + len(ends)))
        found.append(Trajectory(token_ids=token_ids, ends=tuple(ends), states=numbers))
        states += len(ends)
    return found


def evaluate_solutions(
    critic: TrainedCritic,
    solutions: Sequence[ProcessBenchSolution],
    trajectories: Sequence[Trajectory],
    *,
    file: Path,
    thresholds: tuple[float, float],
) -> ProcessBenchFigures:
    """The figures at the default and the chosen threshold. Raises UserError if every solution is too long."""
    limit = critic.context
    everything = zip(trajectories, solutions, strict=True)
    fitting = [(each, solution) for each, solution in everything if limit is None or len(each) <= limit]
    if not fitting:
        raise UserError(f"{file}: every solution is longer than the critic's context of {limit} tokens")
    logits = critic.logits(each for each, _ in fitting)
    values = [[float(expit(logits[state])) for state in each.states] for each, _ in fitting]
    labels = [solution.label for _, solution in fitting]
    default, chosen = (first_wrong_step(values, labels, threshold) for threshold in thresholds)
    return ProcessBenchFigures(
        file=file.name, too_long=len(solutions) - len(fitting), default=default, chosen=chosen
    )


def run_process_bench(config: Config, console: Terminal, file: Path) -> None:
    """Print a trained critic's F1 on a file, and write it beside the critic. Raises UserError."""
    folder = run_paths(config.run).critic
    if launched_processes() > 1:
        raise UserError("--process-bench evaluates in one process; start it without torchrun")
    refuse_missing_critic(folder)
    solutions = read_process_bench(file)
    known = read_document(folder / FIGURES, CriticFigures, f"remove {folder}, and train the critic again")
    renderer = PromptRenderer(reference_model(config), config.data)
    trajectories = trajectories_of(solutions, renderer, config.segments.separators)
    found = evaluate_solutions(
        TrainedCritic(folder, config),
        solutions,
        trajectories,
        file=file,
        thresholds=(DEFAULT_THRESHOLD, known.threshold),
    )
    output = folder / f"process_bench-{file.name.partition('.')[0]}.json"
    write_text(output, found.model_dump_json(indent=2))
    if found.too_long:
        console.print(
            f"warning: {found.too_long:,} solutions are longer than the critic's context and are left out"
        )
    for line in first_wrong_lines([found.default, found.chosen]):
        console.print(line)
    console.print(f"{output}: the same figures")
