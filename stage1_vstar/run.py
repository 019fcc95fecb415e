"""Stage 1 whole: from a config to vstar.parquet. Needs no training library; a re-run continues or does nothing."""

import json
from collections.abc import Callable, Collection, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

import polars as pl

from common.config import RunConfig
from common.data.datasets import read_data_set, recognised_as
from common.data.prompts import check_fit, prompt_id, prompts_from_pairs
from common.data.rendering import END_OF_THINKING, PromptRenderer
from common.doubts import doubts, equal_reward
from common.engines import LOCAL, EngineSource
from common.errors import DamagedFile, UserError
from common.files import write_text
from common.grading import fingerprint, negative_rewards_warning
from common.grading.reference import reference_of
from common.model.files import model_identity, reference_model
from common.model.reading import ModelReading, describe_model
from common.model.trainable import read_trainable
from common.parity import PARITY, accepted_gaps
from common.provenance import (
    ACCEPTED,
    Allowance,
    Provenance,
    context,
    differences,
    sampler_identity,
    sampling_identity,
)
from common.remote.copies import renamed
from common.rollout import Prompt
from common.runs import WHOLE, Shard, exclusive_run, run_paths
from common.sampling.executor import Executor
from common.sampling.missing import Missing, prompt_table
from common.store import SampleStore, set_aside_damaged
from common.terminal.console import Terminal
from common.vstar_file import estimator_of, read_vstar, write_vstar
from stage1_vstar.adaptive import ADAPTIVE, Allocation, Rule
from stage1_vstar.adaptive_drawing import draw_adaptively, recorded_rule
from stage1_vstar.engine_check import SMALL_MODEL, check_engine
from stage1_vstar.table import UNSOLVED, vstar_rows

EXCERPT = 300
"""Characters of a text that messages show."""

Foresight = Callable[[Path], Sequence[str]]


def nothing_foreseen(folder: Path) -> Sequence[str]:
    """Foresees nothing: the default of `run_stage1`."""
    return ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Written:
    """The vstar.parquet of an earlier run."""

    rows: pl.DataFrame
    provenance: Provenance


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """An opened run: its samples, the missing ones, and the rule for further samples under `--adaptive`."""

    prompts: list[Prompt]
    table: pl.DataFrame
    """`prompt_table` of the prompts."""
    store: SampleStore
    missing: Missing
    allowance: Allowance
    old: Written | None
    rule: Rule | None

    @property
    def provenance(self) -> Provenance:
        """The identity of the samples, with the accepted differences."""
        return self.store.provenance


@dataclass(frozen=True, slots=True, kw_only=True)
class Drawn:
    """The grades of the samples that V̂* is made of, at most `num_samples` of a prompt."""

    grades: pl.DataFrame
    num_samples: int
    allocation: Allocation | None = None


def run_stage1(
    config: RunConfig,
    console: Terminal,
    *,
    shard: Shard = WHOLE,
    adaptive: Rule | None = None,
    allow_mismatch: Collection[str] = (),
    check: bool | None = None,
    foresee: Foresight = nothing_foreseen,
    engines: EngineSource = LOCAL,
) -> None:
    """Draw the samples that are missing, estimate V̂* and write vstar.parquet.

    A shard draws only its own prompts' samples. Once all shards are complete, a run without `shard` draws nothing and
    writes the file. `adaptive` draws further samples for the prompts that need them, and the file records it. `check`
    compares the engine's log-probs with a plain forward pass; by default small models only. `foresee` returns lines on
    what training will refuse or not change about the model. All user mistakes are found before the model loads. Raises
    UserError.
    """
    if adaptive is not None and shard != WHOLE:
        raise UserError(
            f"--adaptive with --shard {shard}: the budget and the widest intervals are those of all prompts together; "
            f"draw the first {config.vstar.num_samples} samples of each with --shard, then run --adaptive without it"
        )
    paths, folder = run_paths(config.run), reference_model(config)
    model = read_trainable(folder, config)
    prompts, renderer = read_prompts(config, folder, shard, console)
    if renderer is None:
        console.print(f"shard {shard} holds no prompt: nothing to do")
        return
    foreseen = foresee(folder)
    for line in (introduction(model, renderer), *foreseen):
        console.print(line)
    with exclusive_run(paths, "vstar", shard):
        provenance = stage1_provenance(config, renderer, model_identity(folder, paths.known_weights))
        provenance.context["model"] = {**model.document(), "foreseen": list(foreseen)}
        work = open_work(config, prompts, provenance, shard, adaptive, allow_mismatch, console)
        is_checked = model.parameters <= SMALL_MODEL if check is None else check
        engine_check = partial(check_engine, config, folder, work.store, work.allowance, console)
        with Executor(
            config,
            folder,
            renderer,
            work.store,
            shard,
            console,
            engines,
            engine_check if is_checked else None,
            keep_token_ids=config.vstar.keep_token_ids,
        ) as executor:
            executor.draw(work.missing)
            drawn = draw_the_rest(work, executor, config, console) if shard == WHOLE else None
            if check and not executor.has_drawn:
                console.print(
                    "--check compared nothing: no sample is missing, so none was drawn; it compares before new ones "
                    "are, of another --run or of a higher vstar.num_samples"
                )
            if drawn is None:
                console.print(
                    f"shard {shard} of {paths.samples} is complete; "
                    f"when all are, `vstar` without --shard writes {paths.vstar}"
                )
                return
        rows, provenance = estimate(work, drawn, config)
        for line in overruled(work.old, config):
            console.print(line)
        record(rows, provenance, work.old, config, console)
        for line in doubtful(rows, work.store):
            console.print(line)


def introduction(model: ModelReading, renderer: PromptRenderer) -> str:
    """A line that describes the model."""
    tokens = renderer.tokenizer.convert_ids_to_tokens(list(renderer.eos_token_ids))
    ends = [f"{number} ({token})" for number, token in zip(renderer.eos_token_ids, tokens, strict=True)]
    return describe_model(model.document(), ends)


def open_work(
    config: RunConfig,
    prompts: list[Prompt],
    provenance: Provenance,
    shard: Shard,
    rule: Rule | None,
    allow_mismatch: Collection[str],
    console: Terminal,
) -> Work:
    """Open the run's samples and old file, refuse those of another run, and find the missing samples."""
    paths = run_paths(config.run)
    old = read_old(paths.vstar, console)
    known = old.provenance.context.get(ACCEPTED, []) if old else []
    allowance = Allowance(allow_mismatch, known)
    allowance.refuse_unknown([*provenance.fields(), "prompt.tokens", PARITY])
    if old:
        provenance.refuse_unless_same(
            old.provenance,
            what=str(paths.vstar),
            advice="remove it or choose another --run (to grade its samples again: `python cli.py regrade`)",
            allowance=allowance,
        )
    for line in set_aside_damaged(paths.samples):
        console.print(f"{line}; its samples will be drawn again")
    if old and rule is None and shard == WHOLE:
        rule = recorded_rule(old.provenance, paths.vstar, config, console)
    if rule is not None:
        rule.refuse_impossible(len(prompts), config.vstar.num_samples, config.vstar.beta1)
    store = checked_store(paths.samples, provenance, allowance, console)
    allowance.used.update(dict.fromkeys(accepted_gaps([*known, *store.accepted])))
    table = prompt_table(prompts)
    missing = Missing(prompts, ~store.present(table, config.vstar.num_samples))
    store.provenance = provenance.accepting(allowance)
    write_text(paths.config, config.to_json())
    return Work(
        prompts=prompts,
        table=table,
        store=store,
        missing=missing,
        allowance=allowance,
        old=old,
        rule=rule,
    )


def checked_store(
    samples: Path, provenance: Provenance, allowance: Allowance, console: Terminal
) -> SampleStore:
    """The run's samples. Raises UserError for grades of another grader that are not accepted."""
    store = SampleStore(samples, provenance, allowance)
    if surplus := store.surplus():
        console.print(f"{surplus:,} samples in {samples} are there more than once; the first of each counts")
    if (ungraded := store.ungraded_count()) and not store.accept_other_grades():
        raise UserError(
            f"{ungraded:,} samples in {samples} were graded by another grader than this run's "
            f"({provenance.identity['grader']}); "
            "grade them again with `python cli.py regrade`, choose another --run, or accept their grades with "
            "--allow-mismatch grader"
        )
    return store


def draw_the_rest(work: Work, executor: Executor, config: RunConfig, console: Terminal) -> Drawn:
    """The grades of all samples, after further ones have been drawn if there is a rule."""
    num_samples = config.vstar.num_samples
    if work.rule is None:
        return Drawn(grades=work.store.grades(work.table, num_samples), num_samples=num_samples)
    draw = partial(executor.draw, grader_proven=True)
    grades, allocation = draw_adaptively(work.rule, work.prompts, work.store, draw, config, console)
    return Drawn(grades=grades, num_samples=int(allocation.sizes_P.max()), allocation=allocation)


def estimate(work: Work, drawn: Drawn, config: RunConfig) -> tuple[pl.DataFrame, Provenance]:
    """The rows of vstar.parquet with their provenance; flags that `filter` has set are kept."""
    rows = vstar_rows(
        work.table,
        drawn.grades,
        num_samples=drawn.num_samples,
        beta1=config.vstar.beta1,
        drop_unsolved=config.vstar.drop_unsolved,
    )
    context = dict(work.provenance.context)
    if work.rule and drawn.allocation:
        context[ADAPTIVE] = {**asdict(work.rule), **drawn.allocation.record()}
    judge = work.store.judge_usage()
    context["cost"] = {
        "seconds": work.store.seconds(),
        "loading_seconds": work.store.loading_seconds(),
        "devices": work.store.devices(),
        **({"judge": judge} if judge else {}),
    }
    provenance = replace(work.provenance, context=context)
    return carry_over_filter(rows, provenance, work.old) if work.old else (rows, provenance)


def record(
    rows: pl.DataFrame, provenance: Provenance, old: Written | None, config: RunConfig, console: Terminal
) -> None:
    """Write vstar.parquet unless the old one is equal, and say what changed."""
    path = run_paths(config.run).vstar
    if old:
        if is_same(rows, provenance, old):
            console.print(f"nothing to do: {path} is complete ({rows.height:,} prompts)")
            return
        if (before := old.rows["beta1"][0]) != config.vstar.beta1:
            console.print(f"re-scored as the config says: β1 {before:g} → {config.vstar.beta1:g}")
        if (estimator := estimator_of(old.provenance)) != "plugin":
            console.print(f"re-scored by the plugin estimator: V̂* was by {estimator}, see `rescore`")
    write_vstar(rows, provenance, path)
    console.print(f"{path}: {summary(rows)}")


def doubtful(rows: pl.DataFrame, store: SampleStore) -> list[str]:
    """Lines on results that make no sense as a whole, with an example completion."""
    lines = doubts(rows)
    negative = negative_rewards_warning(*(rows[name].explode() for name in ("outcomes", "rewards")))
    warnings = [*(f"warning: {line}" for line in lines), *([negative] if negative else [])]
    if not lines:
        return warnings
    columns = [pl.col(name) for name in ("prompt", "answer", "completion", "completion_tokens", "outcome")]
    example = store.samples_of([rows["prompt_id"][0]], columns).row(0, named=True)
    example["answer"] = reference_of(example["answer"]).answer
    return [
        *warnings,
        "for example: " + ", ".join(f"{name} {excerpt(value)}" for name, value in example.items()),
        *(
            ["`train` will not start on this; fix the cause and run `vstar` under another --run"]
            if equal_reward(rows) is not None
            else []
        ),
    ]


def excerpt(value: object) -> str:
    """A cell for messages; a long text is shortened to its ends."""
    if not isinstance(value, str):
        return str(value)
    return repr(value if len(value) <= EXCERPT else f"{value[: EXCERPT // 2]} … {value[-EXCERPT // 2 :]}")


def read_prompts(
    config: RunConfig, folder: Path, shard: Shard, console: Terminal
) -> tuple[list[Prompt], PromptRenderer | None]:
    """The shard's prompts, rendered and checked against the model's context; a shard may hold none."""
    found = read_data_set(config.data, config)
    if config.data.format == "auto":
        console.print(recognised_as(config.data, found.format))
    if found.dropped:
        console.print(
            f"rows left out for want of a prompt or of an answer that the grader can use: {found.dropped:,}"
        )
    pairs = [pair for pair in found.pairs if shard.holds(prompt_id(*pair))]
    if not pairs:
        return [], None
    renderer = PromptRenderer(folder, config.data)
    prompts = prompts_from_pairs(pairs, config.data, renderer)
    check_fit(prompts, config, folder)
    console.print(f"first prompt: {excerpt(renderer.in_template(prompts[0].text))}")
    for hint in hints(config, renderer):
        console.print(hint)
    if left_out := len(pairs) - len(prompts):
        limit = config.data.max_prompt_tokens
        long = f"longer than {limit} tokens, or " if config.data.long_prompts == "drop" else ""
        console.print(f"{left_out:,} of {len(pairs):,} rows left out: {long}there twice")
    return prompts, renderer


def hints(config: RunConfig, renderer: PromptRenderer) -> list[str]:
    """Lines for the user on settings that a chat or reasoning model probably wants."""
    found = [hint] if (hint := renderer.hint()) is not None else []
    if renderer.lets_think and config.grader.answer_after is None and config.grader.reads_answer:
        found.append(
            f"hint: the chat template lets the model think, up to {END_OF_THINKING}, which is graded too; set "
            f'grader.answer_after = "{END_OF_THINKING}" to grade only the text after it'
        )
    return found


def read_old(path: Path, console: Terminal) -> Written | None:
    """The file of an earlier run; a damaged one is moved aside, since it can be computed again."""
    if not path.exists():
        return None
    try:
        rows, provenance = read_vstar(path)
    except DamagedFile as error:
        aside = path.with_name(f"{path.name}.damaged")
        path.replace(aside)
        renamed(path, aside)
        console.print(
            f"{error}; moved to {aside}, written again without the changes of `filter` and `--adaptive`",
        )
        return None
    return Written(rows=rows, provenance=provenance)


def summary(rows: pl.DataFrame) -> str:
    """A line with the means of a table."""
    means = rows.select(pl.col("pass_rate", "pass_at_n", "vstar").mean()).row(0)
    return (
        f"{rows.height:,} prompts, pass rate {means[0]:.3f}, pass@N {means[1]:.3f}, "
        f"β1 = {rows['beta1'][0]:g}, mean V̂* {means[2]:.3f}"
    )


def carry_over_filter(
    rows: pl.DataFrame, provenance: Provenance, old: Written
) -> tuple[pl.DataFrame, Provenance]:
    """Copy the flags that `filter` set in the old file to these rows."""
    if not (filters := old.provenance.context.get("filters")):
        return rows, provenance
    flags = [
        pl.col("prompt_id")
        .replace_strict(old.rows["prompt_id"], old.rows[name], default=pl.col(name))
        .alias(name)
        for name in ("keep", "dropped_by")
    ]
    return rows.with_columns(flags), replace(provenance, context={**provenance.context, "filters": filters})


def overruled(old: Written | None, config: RunConfig) -> list[str]:
    """A line if flags of `filter` are kept although `drop_unsolved` would set others."""
    filters = old.provenance.context.get("filters", []) if old else []
    if not filters or not config.vstar.drop_unsolved or UNSOLVED in filters:
        return []
    return [
        f"vstar.drop_unsolved changes nothing: the flags stay as `filter` has set them ({', '.join(filters)}); to drop "
        f"unsolved prompts too: `python cli.py filter --run {config.run}` with all the rules that you want"
    ]


def is_same(rows: pl.DataFrame, provenance: Provenance, old: Written) -> bool:
    """Whether the old file is equal to the one to be written."""
    kept = (ACCEPTED, ADAPTIVE, *(["model"] if "model" in old.provenance.context else []))
    said = ({name: each.context.get(name) for name in kept} for each in (provenance, old.provenance))
    return (
        not differences(provenance.identity, old.provenance.identity)
        and len({json.dumps(lines) for lines in said}) == 1
        and rows.select(old.rows.columns).equals(old.rows)
    )


def stage1_provenance(config: RunConfig, renderer: PromptRenderer, model: dict[str, str]) -> Provenance:
    """The provenance of this run's samples."""
    made = context(config)
    identity = {
        **sampling_identity(config, renderer, model, fingerprint(config.grader)),
        "seed": config.seed,
        "revision": config.model.revision,
        **sampler_identity(config.engine.backend, config.model.dtype, made["versions"]),
    }
    return Provenance(identity=identity, context=made)
