"""The job `segments`: from a config to segments.parquet. (Liu et al., 2024, arXiv:2412.18279, sections 3.2 and 4.1)

The reference draws solutions of each prompt. Some are chosen, as many correct as wrong ones, and cut into steps. From
each state, the prompt with the first steps of a solution, the completer goes on several times, and what it ends with is
graded as a whole. A state's value is the mean reward.

All that is drawn is kept in two stores: solutions with stage 1's samples, and the completions of states. A re-run draws
what is missing, and writes the table from what is stored.
"""

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import polars as pl

from common.config import RunConfig
from common.contract import polars_schema
from common.data.rendering import PromptRenderer
from common.engines import EngineBuilder, build_engine
from common.errors import UserError
from common.files import write_text
from common.model.files import model_identity, reference_model, resolve_model
from common.model.trainable import read_trainable
from common.provenance import Allowance, Provenance, differences
from common.rollout import Prompt
from common.runs import WHOLE, exclusive_run, run_paths
from common.sampling.executor import LocalExecutor
from common.sampling.missing import Missing, prompt_table
from common.segments.files import SEGMENTS, SEGMENTS_TABLE
from common.segments.split import StepCutter
from common.store import SampleStore, set_aside_damaged
from common.terminal.console import Terminal
from stage1_vstar.run import checked_store, introduction, read_prompts, stage1_provenance
from stage1_vstar.segments.rows import rows_of
from stage1_vstar.segments.states import Sample, State, choose, states_of
from stage1_vstar.segments.summary import Summary

PROMPTS_AT_A_TIME = 1024
"""The prompts whose states are in memory together."""


def run_segments(
    config: RunConfig,
    console: Terminal,
    *,
    allow_mismatch: Collection[str] = (),
    build_engine: EngineBuilder = build_engine,
) -> None:
    """Draw the missing solutions and completions, and write segments.parquet.

    All user mistakes are found before a model loads. Raises UserError.
    """
    paths, folder = run_paths(config.run), reference_model(config)
    model = read_trainable(folder, config)
    completer = _completer(config, folder)
    prompts, renderer = read_prompts(config, folder, WHOLE, console)
    assert renderer is not None, "a whole data set has prompts"
    if completer != folder:
        refuse_other_tokenizer(renderer, PromptRenderer(completer, config.data), config)
    console.print(introduction(model, renderer))
    with exclusive_run(paths, "vstar"):  # which writes to the same store
        known = paths.known_weights
        provenance = stage1_provenance(config, renderer, model_identity(folder, known))
        of_completer = provenance
        if completer != folder:
            identity = {**provenance.identity, "model": model_identity(completer, known)}
            of_completer = replace(provenance, identity=identity)
        allowance = Allowance(allow_mismatch)
        allowance.refuse_unknown([*provenance.fields(), "prompt.tokens"])
        states = States(
            config,
            prompts,
            renderer,
            solutions=_opened(paths.samples, provenance, allowance, console),
            continuations=_opened(paths.continuations, of_completer, allowance, console),
            is_own=completer == folder,
        )
        write_text(paths.config, config.to_json())
        executor = partial(
            LocalExecutor,
            config,
            shard=WHOLE,
            console=console,
            build_engine=build_engine,
            check=None,
            keep_token_ids=True,
        )
        with executor(folder=folder, renderer=renderer, store=states.solutions) as generator:
            generator.draw(states.missing_solutions())
            if completer == folder:
                states.complete(generator)
            has_drawn = generator.has_drawn
        if completer != folder:
            with executor(folder=completer, renderer=renderer, store=states.continuations) as other:
                states.complete(other)
                has_drawn |= other.has_drawn
        made = _provenance(config, states, provenance, of_completer)
        if not has_drawn and _is_there(paths.segments, made):
            console.print(f"nothing to do: {paths.segments} is complete")
            return
        _write(states, paths.segments, made, console)


def _completer(config: RunConfig, folder: Path) -> Path:
    if config.segments.completer is None:
        return folder
    return resolve_model(config.segments.completer.replace("{run}", str(run_paths(config.run).root)), None)


def refuse_other_tokenizer(ours: PromptRenderer, theirs: PromptRenderer, config: RunConfig) -> None:
    """Raise UserError unless a completer reads the same token ids, and ends with the same ones."""
    if ours.tokenizer.get_vocab() != theirs.tokenizer.get_vocab():
        raise UserError(
            f"segments.completer {config.segments.completer} has another tokenizer than {config.model.path}, so it "
            "would read another text than the solution's; choose a completer with the same tokenizer"
        )
    if ours.eos_token_ids != theirs.eos_token_ids:
        raise UserError(
            f"segments.completer {config.segments.completer} ends completions with the tokens "
            f"{list(theirs.eos_token_ids)}, {config.model.path} with {list(ours.eos_token_ids)}; correct eos_token_id "
            "in generation_config.json of one of them"
        )


def _opened(folder: Path, provenance: Provenance, allowance: Allowance, console: Terminal) -> SampleStore:
    for line in set_aside_damaged(folder):
        console.print(f"{line}; its samples will be drawn again")
    store = checked_store(folder, provenance, allowance, console)
    store.provenance = provenance.accepting(allowance)
    return store


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
        is_own: bool,
    ) -> None:
        """`is_own`: the completer is the reference, so that its solutions complete the prompt itself."""
        self.solutions = solutions
        self.continuations = continuations
        self._settings = config.segments
        self._prompts = prompts
        self._decode = renderer.decode
        self._cutter = StepCutter(config.segments.separators, renderer.decode)
        self._is_own = is_own

    def missing_solutions(self) -> Missing:
        """The solutions that are still to be drawn."""
        present = self.solutions.present(prompt_table(self._prompts), self._settings.solutions)
        return Missing(self._prompts, ~present)

    def complete(self, executor: LocalExecutor) -> None:
        """Draw the missing completions of all states."""
        for part in self._parts():
            prompts = [
                state.as_prompt()
                for of_prompt in part
                for state in of_prompt.states
                if self._is_completed(state)
            ]
            present = self.continuations.present(prompt_table(prompts), self._settings.completions)
            executor.sample(Missing(prompts, ~present), self.continuations, grader_proven=True)

    def rows(self, summary: Summary) -> Iterator[pl.DataFrame]:
        """The rows of segments.parquet, in parts, which are counted."""
        limit = self._settings.completions
        for part in self._parts():
            drawn_from = [
                state.id for of_prompt in part for state in of_prompt.states if self._is_completed(state)
            ]
            completions = _samples(self.continuations, drawn_from, limit)
            rows = []
            for of_prompt in part:
                if self._is_own and of_prompt.states:
                    completions[of_prompt.states[0].id] = of_prompt.solutions[:limit]
                found = rows_of(of_prompt.states, completions, self._cutter, self._decode)
                summary.count(of_prompt.solutions, of_prompt.states, found)
                rows += found
            if rows:
                yield pl.DataFrame(rows, schema=polars_schema(SEGMENTS))

    def _is_completed(self, state: State) -> bool:
        """Whether completions are drawn from it: not from a whole solution, nor where the solutions are completions."""
        return not state.is_terminal and (state.step > 0 or not self._is_own)

    def _parts(self) -> "Iterator[list[OfPrompt]]":
        for start in range(0, len(self._prompts), PROMPTS_AT_A_TIME):
            prompts = self._prompts[start : start + PROMPTS_AT_A_TIME]
            drawn = _samples(self.solutions, [prompt.id for prompt in prompts], self._settings.solutions)
            yield [
                OfPrompt(
                    solutions=drawn.get(prompt.id, []),
                    states=states_of(
                        prompt, choose(drawn.get(prompt.id, []), self._settings.chosen), self._cutter
                    ),
                )
                for prompt in prompts
            ]


@dataclass(frozen=True, slots=True, kw_only=True)
class OfPrompt:
    """A prompt's solutions, and the states of the chosen ones; none if the grader could judge no solution."""

    solutions: list[Sample]
    states: list[State]


_COLUMNS = ("prompt_id", "sample_index", "completion_ids", "outcome", "reward")


def _samples(store: SampleStore, ids: Collection[str], count: int) -> dict[str, list[Sample]]:
    """The first `count` samples of each of these prompts or states, in order. Raises UserError without token ids."""
    frame = (
        store.samples_of(ids, [pl.col(name) for name in _COLUMNS])
        .filter(pl.col("sample_index") < count)
        .unique(["prompt_id", "sample_index"], keep="first")
        .sort("prompt_id", "sample_index")
    )
    if frame["completion_ids"].null_count():
        raise UserError(
            f"{store.folder} holds samples without their tokens, which `vstar` does not keep; run `segments` under "
            "another --run, or before `vstar`"
        )
    if not frame["reward"].is_between(0, 1).all():
        low, high = frame.select(low=pl.col("reward").min(), high=pl.col("reward").max()).row(0)
        raise UserError(
            f"{store.folder} holds rewards from {low} to {high}, but values of states are shares of the best reward: "
            "scale the rewards to 0 to 1"
        )
    found: dict[str, list[Sample]] = {}
    for name, index, token_ids, outcome, reward in frame.iter_rows():
        sample = Sample(index=index, token_ids=tuple(token_ids), outcome=outcome, reward=reward)
        found.setdefault(name, []).append(sample)
    return found


def _provenance(
    config: RunConfig, states: States, provenance: Provenance, of_completer: Provenance
) -> Provenance:
    """That of segments.parquet: the samples', and how states were made of them."""
    settings = config.segments
    identity = {
        **provenance.identity,
        "segments": {
            **settings.model_dump(include={"solutions", "chosen", "completions"}),
            "separators": list(settings.separators),
            "completer": of_completer.identity["model"],
        },
    }
    seconds = [store.seconds() or 0.0 for store in (states.solutions, states.continuations)]
    cost = {"seconds": sum(seconds), "devices": config.engine.tensor_parallel_size}
    return Provenance(identity=identity, context={**states.solutions.provenance.context, "cost": cost})


def _is_there(path: Path, provenance: Provenance) -> bool:
    """Whether the file of an earlier run is there, whole and with this identity."""
    if not path.exists():
        return False
    try:
        _, found = SEGMENTS_TABLE.read(path)
    except UserError:  # of any kind: it can be written again
        return False
    return not differences(found.identity, provenance.identity)


def _write(states: States, path: Path, provenance: Provenance, console: Terminal) -> None:
    summary = Summary()
    with SEGMENTS_TABLE.writer(path, provenance) as write:
        for rows in states.rows(summary):
            write(rows)
    if not summary.states:
        raise UserError(f"{path} would be empty: the grader could judge no solution of any prompt")
    for line in summary.lines(path):
        console.print(line)
