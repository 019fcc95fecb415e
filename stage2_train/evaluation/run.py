"""`evaluate` as a whole: models × benchmarks, from a config to results.parquet, results.json and results.md."""

from collections.abc import Collection, Mapping, Sequence
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
from numpy.typing import NDArray

from common.config import HELD_OUT
from common.data.held_out import remarks_beside_data
from common.doubts import ALL_TRUNCATED
from common.engines import LOCAL, EngineSource
from common.errors import UserError
from common.evaluations import PROMPTS, REFERENCE, Comparison, Figures, Results, read_results, write_results
from common.grading import UNJUDGED, Outcome, fingerprint
from common.model.files import model_identity, reference_model
from common.model.trainable import read_trainable
from common.provenance import STRICT, Provenance, context, read_provenance
from common.remote.places import shown
from common.runs import exclusive_run, run_paths
from common.terminal.console import Terminal
from stage2_train.config import Config
from stage2_train.evaluation.divergence import Divergence, Drawn, Scoring, divergence
from stage2_train.evaluation.drawing import Drawing, rows_of
from stage2_train.evaluation.figures import compare, drawn_figures
from stage2_train.evaluation.plan import (
    GREEDY,
    POLICY,
    SAMPLED,
    Benchmark,
    Model,
    benchmarks_of,
    models_of,
    read_model,
)

Place = tuple[str, str]
"""A model's name and a benchmark's."""


def evaluate(
    config: Config,
    folders: Mapping[str, Path],
    console: Terminal,
    *,
    benchmarks: Collection[str] = (),
    engines: EngineSource = LOCAL,
) -> Results:
    """Evaluate models, by name, on the config's benchmarks or on those of these names, and write the results.

    Completions that an earlier run has drawn are not drawn again. Results of other models and benchmarks stay in the
    files. Raises UserError before any model is loaded.
    """
    chosen = benchmarks_of(config, benchmarks)
    folder = reference_model(config)
    _refuse_other_reference(folder, config)
    models = models_of(config, folders, chosen)
    reference = read_model(config, REFERENCE, folder, chosen, read_trainable)
    for benchmark in chosen:
        if benchmark.name == HELD_OUT:
            prompts = models[0].prompts[HELD_OUT]
            for line in remarks_beside_data(config, [prompt.text for prompt in prompts]):
                console.print(line)
    with exclusive_run(run_paths(config.run), "evaluate"):
        near = _near_reference(reference, models, chosen, console)
        others = [model for model in near if not _is_same(model, reference)]
        rows, drawing = _draw(config, models, chosen, others, engines, console)
        divergences = _divergences(config, reference, others, chosen, drawing, console)
        found: dict[Place, tuple[Figures, pl.DataFrame]] = {}
        for model in models:
            for benchmark in chosen:
                place = (model.name, benchmark.name)
                found[place] = _figures(
                    config, model, benchmark, rows[place], divergences.get(place), model in near or None
                )
        return _record(config, found)


def _near_reference(
    reference: Model, models: Sequence[Model], benchmarks: Sequence[Benchmark], console: Terminal
) -> list[Model]:
    """The models whose KL to the reference can be measured.

    They have its tokenizer and its rendering of prompts, and are not quantised: our log-probs are of plain weights.
    """
    near = []
    for model in models:
        if model.quantisation is not None:
            console.print(f"{model.name} is quantised ({model.quantisation}): no KL")
            continue
        same = model.identity["tokenizer"] == reference.identity["tokenizer"] and all(
            model.renderers[each.name].identity() == reference.renderers[each.name].identity()
            for each in benchmarks
        )
        if same:
            near.append(model)
        else:
            console.print(f"{model.name} has another tokenizer or template than the reference: no KL")
    return near


def _draw(
    config: Config,
    models: Sequence[Model],
    benchmarks: Sequence[Benchmark],
    with_kl: Sequence[Model],
    engines: EngineSource,
    console: Terminal,
) -> tuple[dict[Place, pl.DataFrame], Drawing]:
    """One row per prompt for each model and benchmark, after the missing completions have been drawn.

    Completions for KL alone are drawn for the models `with_kl`.
    """
    rows: dict[Place, pl.DataFrame] = {}
    with Drawing(config, benchmarks, engines, console) as drawing:
        for model in models:
            for benchmark in benchmarks:
                kinds = [kind for kind in benchmark.draws if kind != POLICY or model in with_kl]
                grades = {kind: drawing.grades(model, benchmark, benchmark.draws[kind]) for kind in kinds}
                found = rows_of(model.prompts[benchmark.name], grades)
                _refuse_unjudged(found, benchmark)
                if _all_truncated(found):
                    console.print(f"warning: {model.name} on {benchmark.name}: {ALL_TRUNCATED}")
                rows[model.name, benchmark.name] = found
    return rows, drawing


def _is_same(model: Model, reference: Model) -> bool:
    """Whether both are one network with the same weights: its KL is 0."""
    return all(model.identity[key] == reference.identity[key] for key in ("weights", "config"))


def _divergences(
    config: Config,
    reference: Model,
    models: Sequence[Model],
    benchmarks: Sequence[Benchmark],
    drawing: Drawing,
    console: Terminal,
) -> dict[Place, Divergence]:
    """KL of each model on each benchmark; one model is in memory at a time."""
    ours: dict[Place, NDArray[np.float64]] = {}
    drawn: dict[Place, Drawn] = {}
    for model in models:
        scoring = Scoring(model.folder, config)
        if not config.sampling.cut_by:
            scoring.say_whether_engine_agrees(drawing.checks.get(model.name, []), console)
        for benchmark in benchmarks:
            place = (model.name, benchmark.name)
            drawn[place] = Drawn(
                store=drawing.store(model, benchmark, benchmark.kl_draw),
                prompts=model.prompts[benchmark.name],
                num_samples=benchmark.kl_draw.num_samples,
            )
            ours[place] = scoring.of(drawn[place], console)
        del scoring
    if not ours:
        return {}
    if config.sampling.cut_by:
        names = ", ".join(f"sampling.{key}" for key in config.sampling.cut_by)
        console.print(f"KL is of the whole models, without {names}, on completions that were drawn with it")
    scoring = Scoring(reference.folder, config)
    return {place: divergence(each, ours[place], scoring.of(each, console)) for place, each in drawn.items()}


def _figures(
    config: Config,
    model: Model,
    benchmark: Benchmark,
    rows: pl.DataFrame,
    found: Divergence | None,
    is_near: bool | None,
) -> tuple[Figures, pl.DataFrame]:
    """The figures, and the rows as results.parquet has them."""
    if found is None and is_near:
        found = Divergence(kl_sequence=0.0, kl_sequence_se=0.0, kl_token=0.0, by_prompt={})
        ratios = pl.lit(0.0)
    elif found is None:
        ratios = pl.lit(None, pl.Float64)
    else:
        ratios = pl.col("prompt_id").replace_strict(found.by_prompt, default=None, return_dtype=pl.Float64)
    figures = Figures.model_validate(
        {
            "model": model.name,
            "path": shown(str(model.folder)),
            "benchmark": benchmark.name,
            "grader": fingerprint(benchmark.grader),
            "sampling": (benchmark.draws.get(SAMPLED) or benchmark.draws[GREEDY]).sampling.identity(),
            **drawn_figures(rows, seed=config.seed),
            **(
                {
                    "kl_sequence": found.kl_sequence,
                    "kl_sequence_se": found.kl_sequence_se,
                    "kl_token": found.kl_token,
                }
                if found
                else {}
            ),
        }
    )
    columns = rows.with_columns(model=pl.lit(model.name), benchmark=pl.lit(benchmark.name), log_ratio=ratios)
    return figures, columns.select(PROMPTS.schema.names)


def _record(config: Config, found: Mapping[Place, tuple[Figures, pl.DataFrame]]) -> Results:
    """Write the results, beside those of other models and benchmarks that are there; returns those found now."""
    paths = run_paths(config.run)
    old = read_results(paths)
    figures = {(each.model, each.benchmark): each for each in (old.results if old else [])}
    parts: dict[Any, pl.DataFrame] = {}
    if not figures.keys() <= found.keys():
        before, _ = PROMPTS.read(paths.results("parquet"))
        parts |= before.partition_by("model", "benchmark", maintain_order=True, as_dict=True)
    # Those that are there keep their places.
    figures |= {place: each for place, (each, _) in found.items()}
    parts |= {place: rows for place, (_, rows) in found.items()}
    rows = pl.concat([parts[place] for place in figures if place in parts])
    results = Results(
        results=list(figures.values()), comparisons=_comparisons(figures, rows, seed=config.seed)
    )
    provenance = Provenance(
        identity={"benchmarks": config.evaluate.model_dump(mode="json")}, context=context(config)
    )
    write_results(paths, results, rows, provenance)
    return Results(
        results=[each for each, _ in found.values()],
        comparisons=[
            each
            for each in results.comparisons
            if {(each.first, each.benchmark), (each.second, each.benchmark)} <= found.keys()
        ],
    )


def _comparisons(figures: Mapping[Place, Figures], rows: pl.DataFrame, *, seed: int) -> list[Comparison]:
    """Each pair of models on each benchmark, in the order of the rows, if both were sampled and graded alike.

    Figures of an earlier command may be of another grader or sampling.
    """
    measured = {place: (each.grader, each.sampling) for place, each in figures.items()}
    found = []
    for (benchmark,), some in rows.group_by("benchmark", maintain_order=True):
        by_model = [(str(name), part) for (name,), part in some.group_by("model", maintain_order=True)]
        for (one, first), (other, second) in combinations(by_model, 2):
            if measured[one, str(benchmark)] != measured[other, str(benchmark)]:
                continue
            comparison = compare(str(benchmark), first, second, seed=seed)
            found += [comparison] if comparison else []
    return found


def _refuse_other_reference(reference: Path, config: Config) -> None:
    """Raise UserError if the reference is no longer the model that the run's stage 1 sampled from."""
    paths = run_paths(config.run)
    if not paths.vstar.is_file():
        return
    here = Provenance(identity={"model": model_identity(reference, paths.known_weights)}, context={})
    there = Provenance(identity={"model": read_provenance(paths.vstar).identity["model"]}, context={})
    if refused := here.refused(there.identity, STRICT):
        raise UserError(
            f"{reference} is not the model that {paths.vstar} is of: {'; '.join(refused.values())}; KL to it would "
            "mean nothing: bring the reference back, or choose another --run"
        )


def _outcomes(rows: pl.DataFrame) -> pl.Series:
    return pl.concat([rows["greedy_outcome"], rows["outcomes"].explode()]).drop_nulls()


def _refuse_unjudged(rows: pl.DataFrame, benchmark: Benchmark) -> None:
    """Raise UserError if the grader could judge none of the completions: all would count as wrong."""
    read = _outcomes(rows).filter(_outcomes(rows) != Outcome.TRUNCATED.value)
    if len(read) and read.is_in([each.value for each in UNJUDGED]).all():
        raise UserError(
            f"the grader could judge none of {len(read):,} completions of {benchmark.name}; correct grader.name, or "
            "give it more time or memory"
        )


def _all_truncated(rows: pl.DataFrame) -> bool:
    return bool((_outcomes(rows) == Outcome.TRUNCATED.value).all())


def show(results: Results, console: Terminal) -> None:
    """The figures in a few lines per model and benchmark."""
    for each in results.results:
        _show_figures(each, console)
    for pair in results.comparisons:
        low, high = pair.interval_95
        console.print(
            f"{pair.benchmark}: {pair.second} − {pair.first} = {pair.difference:+.4f} "
            f"(95 % interval {low:+.4f} to {high:+.4f}, p {pair.p_value:.4f}, {pair.prompts:,} prompts)"
        )


def _show_figures(figures: Figures, console: Terminal) -> None:
    console.print(f"{figures.model} on {figures.benchmark}: {figures.prompts:,} prompts")
    if figures.greedy_accuracy is not None and figures.greedy_accuracy_interval_95 is not None:
        low, high = figures.greedy_accuracy_interval_95
        console.print(
            f"  greedy accuracy  {figures.greedy_accuracy:.4f}  (95 % interval {low:.4f} to {high:.4f})"
        )
    if figures.pass_at_1 is not None and figures.pass_at_1_interval_95 is not None:
        low, high = figures.pass_at_1_interval_95
        console.print(
            f"  pass@1, avg@{figures.samples_per_prompt:<4} {figures.pass_at_1:.4f}  "
            f"(95 % interval {low:.4f} to {high:.4f})"
        )
        others = [f"pass@{k} {value:.4f}" for k, value in figures.pass_at_k.items() if k != "1"]
        if others:
            console.print(f"  {'  '.join(others)}")
    if figures.kl_sequence is not None:
        console.print(
            f"  KL(π‖π_ref)      {figures.kl_sequence:.4f} ± {figures.kl_sequence_se:.4f} nats per completion, "
            f"{figures.kl_token:.5f} per token"
        )
    console.print(
        f"  completions      {figures.completion_tokens_mean:.1f} tokens, {figures.truncated:.1%} truncated"
    )
