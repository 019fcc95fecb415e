"""The job `segments`: from a config to segments.parquet. (Liu et al., 2024, arXiv:2412.18279, sections 3.2 and 4.1)

The reference draws solutions of each prompt. Some are chosen, as many correct as wrong ones, and cut into steps. From
each state, the prompt with the first steps of a solution, the completer goes on several times, and what it ends with is
graded as a whole. A state's value is the mean reward.

All that is drawn is kept in two stores: solutions with stage 1's samples, and the completions of states. A re-run draws
what is missing, and writes the table from what is stored.
"""

import hashlib
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import polars as pl

from common.config import RunConfig
from common.contract import polars_schema
from common.data.rendering import PromptRenderer
from common.engines import LOCAL, EngineSource
from common.errors import DamagedFile, UserError
from common.files import write_text
from common.model.files import model_identity, reference_model
from common.model.trainable import read_trainable
from common.provenance import ACCEPTED, Allowance, Provenance, differences
from common.rollout import Prompt
from common.runs import WHOLE, exclusive_run, run_paths
from common.sampling.executor import Executor
from common.sampling.missing import Missing, prompt_table
from common.segments.files import SEGMENTS, SEGMENTS_TABLE
from common.segments.split import StepCutter
from common.store import SampleStore, set_aside_damaged
from common.terminal.console import Terminal
from stage1_vstar.run import checked_store, introduction, read_prompts, stage1_provenance
from stage1_vstar.segments.completer import completer_model
from stage1_vstar.segments.rows import rows_of
from stage1_vstar.segments.states import Sample, State, choose, states_of
from stage1_vstar.segments.stored import read_samples, refuse_unusable
from stage1_vstar.segments.summary import Summary

PROMPTS_AT_A_TIME = 64
"""The prompts whose states are in memory together."""


def run_segments(
    config: RunConfig,
    console: Terminal,
    *,
    allow_mismatch: Collection[str] = (),
    engines: EngineSource = LOCAL,
) -> None:
    """Draw the missing solutions and completions, and write segments.parquet.

    All user mistakes are found before a model loads. Raises UserError.
    """
    paths, folder = run_paths(config.run), reference_model(config)
    model = read_trainable(folder, config)
    prompts, renderer = read_prompts(config, folder, WHOLE, console)
    assert renderer is not None, "a whole data set has prompts"
    completer = completer_model(config, folder, renderer, prompts)
    console.print(introduction(model, renderer))
    with exclusive_run(paths, "vstar"):  # which writes to the same store
        before = _table_that_is_there(paths.segments, console)
        known = paths.known_weights
        provenance = stage1_provenance(config, renderer, model_identity(folder, known))
        of_completer = provenance
        if completer != folder:
            identity = {**provenance.identity, "model": model_identity(completer, known)}
            of_completer = replace(provenance, identity=identity)
        allowance = Allowance(allow_mismatch, before.context.get(ACCEPTED, []) if before else [])
        allowance.refuse_unknown([*provenance.fields(), "prompt.tokens"])
        states = States(
            config,
            prompts,
            renderer,
            solutions=_opened(paths.samples, provenance, allowance, console),
            continuations=_opened(paths.continuations, of_completer, allowance, console),
            allowance=allowance,
            is_own=completer == folder,
        )
        missing = states.missing_solutions()
        write_text(paths.config, config.to_json())
        executor = partial(
            Executor,
            config,
            shard=WHOLE,
            console=console,
            engines=engines,
            check=None,
            keep_token_ids=True,
        )
        with executor(folder=folder, renderer=renderer, store=states.solutions) as generator:
            generator.draw(missing)
            if completer == folder:
                states.complete(generator)
            has_drawn = generator.has_drawn
        if completer != folder:
            with executor(folder=completer, renderer=renderer, store=states.continuations) as other:
                states.complete(other)
                has_drawn |= other.has_drawn
        made = _provenance(config, states, provenance.accepting(allowance), of_completer)
        if before and not has_drawn and _is_same(before, made):
            console.print(f"nothing to do: {paths.segments} is complete")
            return
        _write(states, paths.segments, made, console)


def _table_that_is_there(path: Path, console: Terminal) -> Provenance | None:
    """The provenance of an earlier run's table; None for none, or a damaged one, which is written again.

    Raises UserError if the table was imported.
    """
    if not path.exists():
        return None
    try:
        found = SEGMENTS_TABLE.provenance(path)
    except DamagedFile as error:
        console.print(f"{error}; it is written again")
        return None
    if imported := found.identity.get("segments", {}).get("imported"):
        raise UserError(
            f"{path} was imported (from {imported}); choose another --run, or remove it to have states of drawn "
            "solutions in its place"
        )
    return found


def _opened(folder: Path, provenance: Provenance, allowance: Allowance, console: Terminal) -> SampleStore:
    for line in set_aside_damaged(folder):
        console.print(f"{line}; its samples will be drawn again")
    return checked_store(folder, provenance, allowance, console)


class States:
    """The states of a run's solutions, and their completions."""

    def __init__(
        self,
        config: RunConfig,
        prompts: Sequence[Prompt],
        renderer: PromptRenderer,
        *,
        solutions: SampleStore,
        continuations: SampleStore,
        allowance: Allowance,
        is_own: bool,
    ) -> None:
        """`is_own`: the completer is the reference, so that its solutions complete the prompt itself."""
        self.prompts = prompts
        self.solutions = solutions
        self.continuations = continuations
        self._settings = config.segments
        self._decode = renderer.decode
        self._cutter = StepCutter(config.segments.separators, renderer.decode)
        self._allowance = allowance
        self._is_own = is_own

    def missing_solutions(self) -> Missing:
        """The solutions that are still to be drawn. Raises UserError if stored ones cannot be used."""
        count = self._settings.solutions
        missing = self._missing(self.prompts, self.solutions, count)
        for prompts in self._parts():
            refuse_unusable(self.solutions, [prompt.id for prompt in prompts], count)
        return missing

    def complete(self, executor: Executor) -> None:
        """Draw the missing completions of all states, a part of the prompts at a time."""
        parts = self._parts()
        for number, prompts in enumerate(parts, start=1):
            states = [
                state.as_prompt()
                for of_prompt in self._of(prompts)
                for state in of_prompt.states
                if self._is_completed(state)
            ]
            executor.sample(
                self._missing(states, self.continuations, self._settings.completions).incomplete(),
                self.continuations,
                grader_proven=True,
                prompts="states" if len(parts) == 1 else f"states (part {number:,} of {len(parts):,})",
            )

    def rows(self, summary: Summary) -> Iterator[pl.DataFrame]:
        """The rows of segments.parquet, in parts, which are counted."""
        for prompts in self._parts():
            rows = self._rows_of(prompts, summary)
            if rows.height:
                yield rows

    def _missing(self, prompts: Sequence[Prompt], store: SampleStore, count: int) -> Missing:
        """The missing ones of the first `count` samples; new ones will say what was accepted of the stored ones."""
        missing = Missing(prompts, ~store.present(prompt_table(prompts), count))
        store.provenance = store.provenance.accepting(self._allowance)
        return missing

    def _rows_of(self, prompts: Sequence[Prompt], summary: Summary) -> pl.DataFrame:
        part, limit = self._of(prompts), self._settings.completions
        drawn_from = [
            state.id for of_prompt in part for state in of_prompt.states if self._is_completed(state)
        ]
        completions = read_samples(self.continuations, drawn_from, limit)
        rows = []
        for of_prompt in part:
            if self._is_own and of_prompt.states:
                completions[of_prompt.states[0].id] = of_prompt.solutions[:limit]
            found = rows_of(of_prompt.states, completions, self._cutter, self._decode)
            summary.count(of_prompt.solutions, of_prompt.states, found)
            rows += found
        return pl.DataFrame(rows, schema=polars_schema(SEGMENTS))

    def _is_completed(self, state: State) -> bool:
        """Whether completions are drawn from it: not from a whole solution, nor where the solutions are completions."""
        return not state.is_terminal and (state.step > 0 or not self._is_own)

    def _parts(self) -> list[Sequence[Prompt]]:
        return [
            self.prompts[start : start + PROMPTS_AT_A_TIME]
            for start in range(0, len(self.prompts), PROMPTS_AT_A_TIME)
        ]

    def _of(self, prompts: Sequence[Prompt]) -> "list[OfPrompt]":
        drawn = read_samples(self.solutions, [prompt.id for prompt in prompts], self._settings.solutions)
        return [
            OfPrompt(
                solutions=(solutions := drawn.get(prompt.id, [])),
                states=states_of(prompt, choose(solutions, self._settings.chosen), self._cutter),
            )
            for prompt in prompts
        ]


@dataclass(frozen=True, slots=True, kw_only=True)
class OfPrompt:
    """A prompt's solutions, and the states of the chosen ones; none if the grader could judge no solution."""

    solutions: list[Sample]
    states: list[State]


def _provenance(
    config: RunConfig, states: States, provenance: Provenance, of_completer: Provenance
) -> Provenance:
    """That of segments.parquet: the samples', and of which prompts' solutions states were made, and how."""
    settings = config.segments
    identity = {
        **provenance.identity,
        "segments": {
            **settings.model_dump(include={"solutions", "chosen", "completions"}),
            "separators": list(settings.separators),
            "completer": of_completer.identity["model"],
            "prompts": _digest(states.prompts),
        },
    }
    stores = (states.solutions, states.continuations)
    cost = {
        "seconds": sum(store.seconds() or 0.0 for store in stores),
        "devices": max(store.devices() for store in stores),
    }
    return Provenance(identity=identity, context={**provenance.context, "cost": cost})


def _digest(prompts: Sequence[Prompt]) -> str:
    """A hash of the prompts and their tokens."""
    digest = hashlib.sha256()
    for prompt in prompts:
        digest.update(f"{prompt.id} {prompt.token_hash}\n".encode())
    return digest.hexdigest()[:32]


def _is_same(before: Provenance, made: Provenance) -> bool:
    accepted = [each.context.get(ACCEPTED) for each in (before, made)]
    return not differences(before.identity, made.identity) and accepted[0] == accepted[1]


def _write(states: States, path: Path, provenance: Provenance, console: Terminal) -> None:
    summary = Summary()
    with SEGMENTS_TABLE.writer(path, provenance) as write:
        for rows in states.rows(summary):
            write(rows)
        if not summary.states:
            raise UserError(f"{path} would be empty: the grader could judge no solution of any prompt")
    for line in summary.lines(path):
        console.print(line)
