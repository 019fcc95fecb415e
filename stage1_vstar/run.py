"""Stage 1 whole: from a config to vstar.parquet. Needs no training library; a re-run continues or does nothing."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import polars as pl
from rich.console import Console

from common.artifacts import context, exclusive_run, model_identity, reference_model, run_paths, write_text
from common.config import Config
from common.engine import build_engine
from common.errors import UserError
from common.grading import GraderPool, fingerprint
from common.prompts import (
    PromptRenderer,
    check_context,
    prompts_from_pairs,
    read_pairs,
    sampling_identity,
    usable_prompts,
)
from common.rollout import Prompt
from common.schema import Provenance, SampleStore, read_provenance, read_vstar, write_vstar
from stage1_vstar.generate import Address, generate_samples, missing_samples
from stage1_vstar.table import vstar_rows, with_keep


def run_stage1(config: Config, console: Console) -> None:
    """Draw the samples that are missing, estimate V̂* and write vstar.parquet.

    Everything a user can get wrong is checked before the model loads. Raises UserError.
    """
    paths = run_paths(config.run)
    folder = reference_model(config)
    pairs = read_pairs(config.data, config)
    renderer = PromptRenderer(folder, config.data)
    prompts = prompts_from_pairs(pairs, config.data, renderer)
    check_context(prompts, config, folder)
    if left_out := len(pairs) - len(prompts):
        limit = config.data.max_prompt_tokens
        console.print(
            f"{left_out:,} of {len(pairs):,} rows left out: longer than {limit} tokens, or there twice"
        )
    with exclusive_run(paths, "vstar"):
        provenance = stage1_provenance(config, renderer, model_identity(folder))
        store = SampleStore(paths.samples, provenance)
        if paths.vstar.exists():
            provenance.refuse_unless_same(
                read_provenance(paths.vstar),
                what=str(paths.vstar),
                advice="remove it or choose another --run",
            )
        missing = missing_samples(prompts, config.vstar.num_samples, store.present())
        if missing:
            draw(missing, prompts, config, folder, renderer, store, console)
        rows = vstar_rows(
            in_order(store.read_grades(), prompts),
            num_samples=config.vstar.num_samples,
            beta1=config.vstar.beta1,
            drop_unsolved=config.vstar.drop_unsolved,
        )
        if paths.vstar.exists():
            old_rows, old_provenance = read_vstar(paths.vstar)
            rows, provenance = carry_over_filter(rows, provenance, old_rows, old_provenance)
            if is_same(rows, provenance, old_rows, old_provenance):
                console.print(f"nothing to do: {paths.vstar} is complete ({rows.height:,} prompts)")
                return
            if (before := old_rows["beta1"][0]) != config.vstar.beta1:
                console.print(f"re-scored as the config says: β1 {before:g} → {config.vstar.beta1:g}")
        write_text(paths.config, config.to_json())
        write_vstar(rows, provenance, paths.vstar)
    console.print(f"{paths.vstar}: {summary(rows)}")


def summary(rows: pl.DataFrame) -> str:
    """The means of a table in a line."""
    means = rows.select(pl.col("pass_rate", "pass_at_n", "vstar").mean()).row(0)
    return (
        f"{rows.height:,} prompts, pass rate {means[0]:.3f}, pass@N {means[1]:.3f}, "
        f"β1 = {rows['beta1'][0]:g}, mean V̂* {means[2]:.3f}"
    )


def draw(
    missing: Sequence[Address],
    prompts: Sequence[Prompt],
    config: Config,
    folder: Path,
    renderer: PromptRenderer,
    store: SampleStore,
    console: Console,
) -> None:
    """Draw the missing samples of the prompts that can be graded. Raises UserError before the model loads."""
    incomplete = {identifier for identifier, _ in missing}
    with GraderPool(config.grader) as pool:
        wanted = [prompt for prompt in prompts if prompt.id in incomplete]
        usable = usable_prompts(wanted, config.data, pool)
        if len(usable) < len(wanted):
            dropped = len(wanted) - len(usable)
            console.print(f"{dropped:,} prompts dropped: the grader cannot use their reference answers")
            identifiers = {prompt.id for prompt in usable}
            missing = [address for address in missing if address[0] in identifiers]
        if not missing:
            if store.fragments():
                return
            raise UserError("no prompt is left: the grader can use none of the reference answers")
        console.print(
            f"{len(usable):,} prompts × {config.vstar.num_samples} samples: {len(missing):,} to draw; loading the model"
        )
        engine = build_engine(config, folder, renderer, beside_trainer=False)
        try:
            generate_samples(missing, usable, engine, pool, store, config.sampling, config.seed, console)
        finally:
            engine.close()


def in_order(samples: pl.DataFrame, prompts: Sequence[Prompt]) -> pl.DataFrame:
    """The samples of these prompts, in the order of the prompts."""
    order = pl.DataFrame({"prompt_id": [prompt.id for prompt in prompts]})
    return order.join(samples, on="prompt_id", how="inner", maintain_order="left")


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
    return provenance.identity == old_provenance.identity and rows.select(old_rows.columns).equals(old_rows)


def stage1_provenance(config: Config, renderer: PromptRenderer, model: dict[str, str]) -> Provenance:
    """What a sample belongs to."""
    identity = sampling_identity(config, renderer, model, fingerprint(config.grader))
    return Provenance(identity={**identity, "seed": config.seed}, context=context(config))
