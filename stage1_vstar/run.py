"""Stage 1 whole: from a config to vstar.parquet. Needs no training library; a re-run continues or does nothing."""

import json
from collections.abc import Collection
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import polars as pl
from rich.console import Console

from common.config import RunConfig
from common.data.datasets import read_pairs
from common.data.prompts import PromptRenderer, check_context, prompt_id, prompts_from_pairs
from common.engines import EngineBuilder, build_engine
from common.errors import DamagedFile, UserError
from common.files import write_text
from common.grading import fingerprint
from common.model_files import model_identity, reference_model
from common.provenance import ACCEPTED, Allowance, Provenance, context, sampler_identity, sampling_identity
from common.rollout import Prompt
from common.runs import WHOLE, Shard, exclusive_run, run_paths
from common.sampling.executor import LocalExecutor
from common.sampling.missing import Missing
from common.store import SampleStore, set_aside_damaged
from common.vstar_file import estimator_of, read_vstar, write_vstar
from stage1_vstar.adaptive import ADAPTIVE, ADAPTIVE_BIAS, Rule, stopping_bias
from stage1_vstar.rounds import bias_line, draw_adaptively, recorded_rule
from stage1_vstar.table import prompt_table, vstar_rows


def run_stage1(
    config: RunConfig,
    console: Console,
    *,
    shard: Shard = WHOLE,
    adaptive: Rule | None = None,
    allow_mismatch: Collection[str] = (),
    build_engine: EngineBuilder = build_engine,
) -> None:
    """Draw the samples that are missing, estimate V̂* and write vstar.parquet.

    A shard draws its prompts' samples only; the run without one, once all are there, finds nothing to draw and writes
    the file. `adaptive` goes on with more samples for the prompts that need them; a file that was written so remembers
    it. Everything a user can get wrong is checked before the model loads. Raises UserError.
    """
    if adaptive is not None and shard != WHOLE:
        raise UserError(
            f"--adaptive with --shard {shard}: the budget and the widest intervals are those of all prompts together; "
            f"draw the first {config.vstar.num_samples} samples of each with --shard, then run --adaptive without it"
        )
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
        if old and adaptive is None and shard == WHOLE:
            adaptive = recorded_rule(old[1], paths.vstar, config, console)
        if adaptive is not None:
            adaptive.refuse_impossible(len(prompts), config.vstar.num_samples, config.vstar.beta1)
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
        with LocalExecutor(config, folder, renderer, store, shard, console, build_engine) as executor:
            executor.draw(missing)
            if shard != WHOLE:
                console.print(
                    f"shard {shard} of {paths.samples} is complete; "
                    f"when all are, `vstar` without --shard writes {paths.vstar}"
                )
                return
            num_samples = config.vstar.num_samples
            if adaptive is None:
                grades = store.grades(table, num_samples)
            else:
                draw = partial(executor.draw, grader_proven=True)
                grades, allocation = draw_adaptively(adaptive, prompts, store, draw, config, console)
                num_samples = int(allocation.sizes_P.max())
                record = {"target_se": adaptive.target_se, "budget": adaptive.budget, **allocation.record()}
                provenance = replace(provenance, context={**provenance.context, ADAPTIVE: record})
        rows = vstar_rows(
            table,
            grades,
            num_samples=num_samples,
            beta1=config.vstar.beta1,
            drop_unsolved=config.vstar.drop_unsolved,
        )
        cost = {"seconds": store.seconds(), "devices": config.engine.tensor_parallel_size}
        provenance = replace(provenance, context={**provenance.context, "cost": cost})
        if old:
            rows, provenance = carry_over_filter(rows, provenance, *old)
            if is_same(rows, provenance, *old):
                console.print(f"nothing to do: {paths.vstar} is complete ({rows.height:,} prompts)")
                return
            if (before := old[0]["beta1"][0]) != config.vstar.beta1:
                console.print(f"re-scored as the config says: β1 {before:g} → {config.vstar.beta1:g}")
            if (estimator := estimator_of(old[1])) != "plugin":
                console.print(f"re-scored by the plugin estimator: V̂* was by {estimator}, see `rescore`")
        if adaptive is not None:
            bias = stopping_bias(
                adaptive,
                config.vstar.num_samples,
                config.vstar.beta1,
                rows["rewards"].explode().to_numpy(),
                rows["num_samples"].to_numpy().astype(np.int64),
            )
            console.print(bias_line(bias))
            provenance = replace(provenance, context={**provenance.context, ADAPTIVE_BIAS: bias})
        write_vstar(rows, provenance, paths.vstar)
    console.print(f"{paths.vstar}: {summary(rows)}")


def read_prompts(
    config: RunConfig, folder: Path, shard: Shard, console: Console
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
            f"{error}; moved to {aside}, written anew without what `filter` and `--adaptive` did",
            soft_wrap=True,
        )
        return None


def summary(rows: pl.DataFrame) -> str:
    """The means of a table in a line."""
    means = rows.select(pl.col("pass_rate", "pass_at_n", "vstar").mean()).row(0)
    return (
        f"{rows.height:,} prompts, pass rate {means[0]:.3f}, pass@N {means[1]:.3f}, "
        f"β1 = {rows['beta1'][0]:g}, mean V̂* {means[2]:.3f}"
    )


def carry_over_filter(
    rows: pl.DataFrame, provenance: Provenance, old_rows: pl.DataFrame, old_provenance: Provenance
) -> tuple[pl.DataFrame, Provenance]:
    """Keep the flags that `filter` has set on the file that these rows will replace."""
    if not (filters := old_provenance.context.get("filters")):
        return rows, provenance
    flags = [
        pl.col("prompt_id")
        .replace_strict(old_rows["prompt_id"], old_rows[name], default=pl.col(name))
        .alias(name)
        for name in ("keep", "dropped_by")
    ]
    return rows.with_columns(flags), replace(provenance, context={**provenance.context, "filters": filters})


def is_same(
    rows: pl.DataFrame, provenance: Provenance, old_rows: pl.DataFrame, old_provenance: Provenance
) -> bool:
    """Whether a file already says what would be written."""
    said = (
        {name: each.context.get(name) for name in (ACCEPTED, ADAPTIVE)}
        for each in (provenance, old_provenance)
    )
    return (
        provenance.identity == old_provenance.identity
        and len({json.dumps(lines) for lines in said}) == 1
        and rows.select(old_rows.columns).equals(old_rows)
    )


def stage1_provenance(config: RunConfig, renderer: PromptRenderer, model: dict[str, str]) -> Provenance:
    """What a sample belongs to."""
    made = context(config)
    identity = {
        **sampling_identity(config, renderer, model, fingerprint(config.grader)),
        "seed": config.seed,
        "revision": config.model.revision,
        **sampler_identity(config.engine.backend, config.model.dtype, made["versions"]),
    }
    return Provenance(identity=identity, context=made)
