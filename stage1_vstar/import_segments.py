"""import-segments: step-level data of others as a run's segments.parquet, for `critic`. No model is loaded."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import polars as pl

from common.config import LOCAL_FILES, RunConfig, data_suffix
from common.contract import BATCH_ROWS, polars_schema
from common.data.files import rows_in
from common.data.prompts import check_fit, prompts_from_pairs
from common.data.rendering import PromptRenderer
from common.errors import UserError
from common.files import file_digest, obstacle_at, write_text
from common.grading import Outcome
from common.model.files import model_identity, reference_model
from common.provenance import Provenance
from common.rollout import Prompt
from common.runs import exclusive_run, run_paths
from common.segments.files import SEGMENTS, SEGMENTS_TABLE, standard_error, state_id
from common.segments.formats import Labelled, LabelledSolution, LabelledStep, read_labelled
from common.segments.labelled import StepTokeniser
from common.terminal.console import Terminal
from stage1_vstar.run import stage1_provenance

TokenIds = tuple[int, ...]
SHOWN_REASONS = 3


@dataclass(slots=True, kw_only=True)
class _State:
    """The first steps of one or more solutions, and the labels of the last of them."""

    text: str
    step: int
    is_terminal: bool = False
    solutions: list[int] = field(default_factory=list)
    rewards: list[float] = field(default_factory=list)


def import_segments(config: RunConfig, file: Path, console: Terminal) -> None:
    """Write segments.parquet from a file of labelled steps; one row per state, whose value is the mean of its labels.

    A step's text is tokenised by itself with the separator after it, so that states begin as their solutions do, and a
    whole solution ends with the end token. Raises UserError, and writes nothing, if most rows are wrong, or if the run
    has a table of states already.
    """
    paths = run_paths(config.run)
    _refuse_unreadable(file)
    folder = reference_model(config)
    labelled = read_labelled(rows_in(file))
    _refuse_mostly_wrong(labelled, file)
    renderer = PromptRenderer(folder, config.data)
    solutions = _by_question(labelled.solutions)
    prompts = prompts_from_pairs(solutions, config.data, renderer)
    check_fit(prompts, config, folder)
    with exclusive_run(paths, "vstar"):
        if paths.segments.exists():
            raise UserError(
                f"{paths.segments} exists; import into another --run, or remove it to have these states in its place"
            )
        made = stage1_provenance(config, renderer, model_identity(folder, paths.known_weights))
        tokenise = StepTokeniser(renderer, config.segments.separators)
        origin = {
            "imported": file.name,
            "sha256": file_digest(file),
            "separators": [tokenise.separator],
        }
        provenance = Provenance(identity={**made.identity, "segments": origin}, context=made.context)
        states = _States(config, tokenise)
        write_text(paths.config, config.to_json())
        with SEGMENTS_TABLE.writer(paths.segments, provenance) as write:
            for rows in states.rows(prompts, solutions):
                write(rows)
            if not states.count:
                raise UserError(
                    f"{file}: no state is left, as all are longer than sampling.max_completion_tokens = "
                    f"{config.sampling.max_completion_tokens}; raise it"
                )
    for line in (*_left_out(labelled), *states.left_out()):
        console.print(line)
    if short := len(solutions) - len(prompts):
        console.print(f"{short:,} prompts left out: longer than {config.data.max_prompt_tokens} tokens")
    console.print(
        f"{paths.segments}: {states.count:,} states of {states.solutions:,} solutions of {len(prompts):,} prompts, "
        f"mean value {states.total / states.count:.3f}; for `critic`: they have no next steps, which advantages need"
    )


class _States:
    """Makes rows of labelled solutions, and counts."""

    def __init__(self, config: RunConfig, tokenise: StepTokeniser) -> None:
        self._limit = config.sampling.max_completion_tokens
        self._tokenise = tokenise
        self.count = self.solutions = self.long = self.without_token = 0
        self.total = 0.0

    def rows(
        self,
        prompts: Sequence[Prompt],
        solutions: dict[tuple[str, str], list[LabelledSolution]],
    ) -> Iterator[pl.DataFrame]:
        """The rows of all prompts, in parts."""
        rows: list[dict[str, Any]] = []
        for prompt in prompts:
            rows += self._of_prompt(prompt, solutions[prompt.text, prompt.answer])
            if len(rows) >= BATCH_ROWS:
                yield pl.DataFrame(rows, schema=polars_schema(SEGMENTS))
                rows = []
        if rows:
            yield pl.DataFrame(rows, schema=polars_schema(SEGMENTS))

    def _of_prompt(self, prompt: Prompt, solutions: Sequence[LabelledSolution]) -> list[dict[str, Any]]:
        states: dict[TokenIds, _State] = {}
        for number, solution in enumerate(solutions):
            self._add(states, number, solution)
        found = [_row(prompt, prefix, state) for prefix, state in states.items() if state.rewards]
        self.solutions += len(solutions)
        self.count += len(found)
        self.total += sum(row["value"] for row in found)
        return found

    def _add(self, states: dict[TokenIds, _State], number: int, solution: LabelledSolution) -> None:
        """Add the states of a solution, up to the limit of its length."""
        texts = self._tokenise.texts([step.text for step in solution.steps], is_whole=solution.is_whole)
        token_ids = self._tokenise.token_ids(texts, is_whole=solution.is_whole)
        prefix: TokenIds = ()
        text = ""
        for place, (step, its_text, tokens) in enumerate(
            zip(solution.steps, texts, token_ids, strict=True), start=1
        ):
            if not tokens:
                self.without_token += 1
                return
            prefix, text = (*prefix, *tokens), text + its_text
            if len(prefix) > self._limit:
                self.long += 1
                return
            state = states.setdefault(prefix, _State(text=text, step=place))
            state.solutions.append(number)
            state.is_terminal |= solution.is_whole and place == len(texts)
            state.rewards += _value(step)

    def left_out(self) -> Iterator[str]:
        if self.long:
            yield (
                f"{self.long:,} solutions are cut off at sampling.max_completion_tokens = {self._limit}: later states "
                "are left out"
            )
        if self.without_token:
            yield f"{self.without_token:,} solutions are cut off at a step that the tokenizer makes no token of"


def _value(step: LabelledStep) -> list[float]:
    return [] if step.value is None else [step.value]


def _row(prompt: Prompt, prefix: TokenIds, state: _State) -> dict[str, Any]:
    """A state without next steps. An outcome is correct if its label is at least ½."""
    total, count = sum(state.rewards), len(state.rewards)
    outcomes = [Outcome.CORRECT if reward >= 0.5 else Outcome.WRONG for reward in state.rewards]
    return {
        "state_id": state_id(prompt.id, prefix),
        "prompt_id": prompt.id,
        "prompt": prompt.text,
        "answer": prompt.answer,
        "prompt_token_hash": prompt.token_hash,
        "prefix": state.text,
        "prefix_token_ids": list(prefix),
        "step": state.step,
        "solutions": state.solutions,
        "is_terminal": state.is_terminal,
        "num_completions": count,
        "rewards": state.rewards,
        "outcomes": [outcome.value for outcome in outcomes],
        "completion_tokens": [0] * len(outcomes),
        "value": total / count,
        "value_se": standard_error(total, count),
        **{field.name: [] for field in SEGMENTS if field.name.startswith("action_")},
    }


def _by_question(solutions: Sequence[LabelledSolution]) -> dict[tuple[str, str], list[LabelledSolution]]:
    """The solutions of each question and answer, in file order."""
    found: dict[tuple[str, str], list[LabelledSolution]] = {}
    for solution in solutions:
        found.setdefault((solution.question, solution.answer), []).append(solution)
    return found


def _refuse_unreadable(file: Path) -> None:
    if (obstacle := obstacle_at(file)) is not None:
        raise UserError(f"cannot read {file}: {obstacle}")
    if not file.exists():
        raise UserError(f"there is no {file}; correct the path")
    if data_suffix(file.name) not in LOCAL_FILES:
        raise UserError(
            f"{file} is of no kind of data file that is known ({', '.join(LOCAL_FILES)}); rename it"
        )


def _refuse_mostly_wrong(labelled: Labelled, file: Path) -> None:
    wrong = labelled.wrong.total()
    if not labelled.rows:
        raise UserError(f"{file} has no rows; give a file with labelled steps")
    if 2 * wrong > labelled.rows:
        raise UserError(
            f"{file}: {wrong:,} of {labelled.rows:,} rows are not labelled steps that can be read; "
            f"{labelled.first_wrong}. See docs/export.md for the formats"
        )


def _left_out(labelled: Labelled) -> Iterator[str]:
    if wrong := labelled.wrong.total():
        yield f"{wrong:,} of {labelled.rows:,} rows left out, the first of them {labelled.first_wrong}"
        for reason, count in labelled.wrong.most_common(SHOWN_REASONS):
            yield f"    {count:,}: {reason}"
