"""Stage 1 whole: from a config to vstar.parquet. Needs no training library; a re-run continues or does nothing."""

import json
from collections.abc import Collection
from dataclasses import replace
from pathlib import Path

import polars as pl
from rich.console import Console

from common.artifacts import (
    WHOLE,
    Shard,
    context,
    exclusive_run,
    model_identity,
    reference_model,
    run_paths,
    write_text,
)
from common.config import Config
from common.engine import build_engine
from common.errors import DamagedFile, UserError
from common.grading import GraderPool, fingerprint
from common.prompts import (
    PromptRenderer,
    check_context,
    prompt_id,
    prompts_from_pairs,
    read_pairs,
    sampling_identity,
    usable_prompts,
)
from common.provenance import ACCEPTED, Allowance, Provenance, sampler_identity
from common.rollout import Prompt
from common.schema import read_vstar, write_vstar
from common.store import SampleStore, set_aside_damaged
from stage1_vstar.generate import Missing, generate_samples
from stage1_vstar.table import prompt_table, vstar_rows, with_keep


def run_stage1(
    config: Config, console: Console, *, shard: Shard = WHOLE, allow_mismatch: Collection[str] = ()
) -> None:
    """Draw the samples that are missing, estimate V̂* and write vstar.parquet.

    A shard draws its prompts' samples only; the run without one, once all are there, finds nothing to draw and writes
    the file. Everything a user can get wrong is checked before the model loads. Raises UserError.
    """
    paths = run_paths(config.run)
    folder = reference_model(config)
    prompts, renderer = read_prompts(config, folder, shard, console)
    if renderer is None:
        console.print(f"shard {shard} holds no prompt: nothing to do")
        return
    with exclusive_run(paths, "vstar", shard):
        provenance = stage1_provenance(config, renderer, model_identity(folder))
        old = read_old(paths.vstar, console)
        accepted_before = old[1].context.get(ACCEPTED, []) if old else []
        allowance = Allowance(allow_mismatch, accepted_before)
        allowance.refuse_unknown([*provenance.fields(), "prompt.tokens"])
        if old:
            provenance.refuse_unless_same(
                old[1],
                what=str(paths.vstar),
                advice="remove it or choose another --run (to grade its samples anew: `python cli.py regrade`)",
                allowance=allowance,
            )
        for line in set_aside_damaged(paths.samples):
            console.print(f"{line}; its samples will be drawn anew", soft_wrap=True)
        store = SampleStore(paths.samples, provenance, allowance)
        if surplus := store.surplus():
            console.print(
                f"{surplus:,} samples in {paths.samples} are there more than once; the first of each counts"
            )
        if (ungraded := store.ungraded_count()) and not store.accept_other_grades():
            raise UserError(
                f"{ungraded:,} samples in {paths.samples} were graded by another grader than this run's "
                f"({provenance.identity['grader']}); "
                "grade them anew with `python cli.py regrade`, choose another --run, or accept their grades with "
                "--allow-mismatch grader"
            )
        table = prompt_table(prompts)
        missing = Missing(prompts, ~store.present(table, config.vstar.num_samples))
        store.provenance = provenance = provenance.accepting(allowance)
        write_text(paths.config, config.to_json())
        if missing:
            draw(missing, config, folder, renderer, store, shard, console)
        if shard != WHOLE:
            console.print(
                f"shard {shard} of {paths.samples} is complete; "
                f"when all are, `vstar` without --shard writes {paths.vstar}"
            )
            return
        rows = vstar_rows(
            table,
            store.grades(table, config.vstar.num_samples),
            num_samples=config.vstar.num_samples,
            beta1=config.vstar.beta1,
            drop_unsolved=config.vstar.drop_unsolved,
        )
        if old:
            rows, provenance = carry_over_filter(rows, provenance, *old)
            if is_same(rows, provenance, *old):
                console.print(f"nothing to do: {paths.vstar} is complete ({rows.height:,} prompts)")
                return
            if (before := old[0]["beta1"][0]) != config.vstar.beta1:
                console.print(f"re-scored as the config says: β1 {before:g} → {config.vstar.beta1:g}")
        write_vstar(rows, provenance, paths.vstar)
    console.print(f"{paths.vstar}: {summary(rows)}")


def read_prompts(
    config: Config, folder: Path, shard: Shard, console: Console
) -> tuple[list[Prompt], PromptRenderer | None]:
    """The shard's prompts, rendered and checked against the model's context; a shard may hold none."""
    pairs = [pair for pair in read_pairs(config.data, config) if shard.holds(prompt_id(*pair))]
    if not pairs:
        return [], None
    renderer = PromptRenderer(folder, config.data)
    prompts = prompts_from_pairs(pairs, config.data, renderer)
    check_context(prompts, config, folder)
    if left_out := len(pairs) - len(prompts):
        limit = config.data.max_prompt_tokens
        console.print(
            f"{left_out:,} of {len(pairs):,} rows left out: longer than {limit} tokens, or there twice"
        )
    return prompts, renderer


def read_old(path: Path, console: Console) -> tuple[pl.DataFrame, Provenance] | None:
    """The file that an earlier run has written; a damaged one is set aside, since it can be computed anew."""
    if not path.exists():
        return None
    try:
        return read_vstar(path)
    except DamagedFile as error:
        aside = path.with_name(f"{path.name}.damaged")
        path.replace(aside)
        console.print(
            f"{error}; moved to {aside}, written anew without the flags of `filter`", soft_wrap=True
        )
        return None


def summary(rows: pl.DataFrame) -> str:
    """The means of a table in a line."""
    means = rows.select(pl.col("pass_rate", "pass_at_n", "vstar").mean()).row(0)
    return (
        f"{rows.height:,} prompts, pass rate {means[0]:.3f}, pass@N {means[1]:.3f}, "
        f"β1 = {rows['beta1'][0]:g}, mean V̂* {means[2]:.3f}"
    )


def draw(
    missing: Missing,
    config: Config,
    folder: Path,
    renderer: PromptRenderer,
    store: SampleStore,
    shard: Shard,
    console: Console,
) -> None:
    """Draw the missing samples of the prompts that can be graded. Raises UserError before the model loads."""
    with GraderPool(config.grader) as pool:
        missing = only_gradable(missing, config, pool, console)
        if not missing:
            if store.fragments() or shard != WHOLE:
                return
            raise UserError("no prompt is left: the grader can use none of the reference answers")
        console.print(
            f"{len(missing.prompts):,} prompts × {config.vstar.num_samples} samples: {len(missing):,} to draw; "
            "loading the model"
        )
        engine = build_engine(config, folder, renderer, beside_trainer=False)
        try:
            generate_samples(missing, engine, pool, store, config.sampling, config.seed, console)
        finally:
            engine.close()


def only_gradable(missing: Missing, config: Config, pool: GraderPool, console: Console) -> Missing:
    """The incomplete prompts whose reference answer the grader can use, with their missing samples."""
    incomplete = missing.incomplete()
    usable = {prompt.id for prompt in usable_prompts(incomplete.prompts, config.data, pool)}
    if dropped := len(incomplete.prompts) - len(usable):
        console.print(f"{dropped:,} prompts dropped: the grader cannot use their reference answers")
    return incomplete.of(usable)


def carry_over_filter(
    rows: pl.DataFrame, provenance: Provenance, old_rows: pl.DataFrame, old_provenance: Provenance
) -> tuple[pl.DataFrame, Provenance]:
    """Keep the flags that `filter` has set on the file that these rows will replace."""
    if not (filters := old_provenance.context.get("filters")):
        return rows, provenance
    kept = pl.col("prompt_id").replace_strict(old_rows["prompt_id"], old_rows["keep"], default=pl.col("keep"))
    return with_keep(rows, kept), replace(provenance, context={**provenance.context, "filters": filters})


def is_same(
    rows: pl.DataFrame, provenance: Provenance, old_rows: pl.DataFrame, old_provenance: Provenance
) -> bool:
    """Whether a file already says what would be written."""
    accepted = (each.context.get(ACCEPTED) for each in (provenance, old_provenance))
    return (
        provenance.identity == old_provenance.identity
        and len({json.dumps(lines) for lines in accepted}) == 1
        and rows.select(old_rows.columns).equals(old_rows)
    )


def stage1_provenance(config: Config, renderer: PromptRenderer, model: dict[str, str]) -> Provenance:
    """What a sample belongs to."""
    made = context(config)
    identity = {
        **sampling_identity(config, renderer, model, fingerprint(config.grader)),
        "seed": config.seed,
        "revision": config.model.revision,
        **sampler_identity(config.engine.backend, config.model.dtype, made["versions"]),
    }
    return Provenance(identity=identity, context=made)
