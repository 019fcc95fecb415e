"""The command `critic`: from segments.parquet to the folder of a trained critic, or a trained critic's F1 on a file.

    artifacts/<run>/critic/
      config.json, model.safetensors, tokenizer   a token classifier with one label
      README.md         the model card
      metrics.jsonl     one line per optimizer step
      figures.json      the figures on held-out prompts; reliability.png and .svg: the plot
      astar_po.json     what it was trained with

The folder appears whole at the end of the job. A job that is killed starts over.
"""

import json
import math
from collections.abc import Collection
from contextlib import ExitStack
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

from common.data.rendering import PromptRenderer, load_tokenizer
from common.errors import UserError
from common.files import new_folder, write_text
from common.grading import fingerprint
from common.model.files import model_identity, reference_model
from common.model.pretrained import token_classifier
from common.model.reading import read_model
from common.provenance import ACCEPTED, Allowance, commit, sampling_identity, versions
from common.report.reliability import draw_reliability
from common.runs import RunPaths, exclusive_run, run_paths
from common.segments.critic import refuse_longer
from common.segments.files import SEGMENTS_TABLE
from common.table_origin import refuse_other_steps
from common.terminal.console import Terminal
from common.terminal.progress import progress_bar
from stage2_train.card import CARD, LIBRARIES, title_of
from stage2_train.config import Config
from stage2_train.critic import Critic
from stage2_train.critic_job.batches import optimizer_steps
from stage2_train.critic_job.card import critic_card
from stage2_train.critic_job.record import Record, is_finished, trained_with
from stage2_train.critic_job.results import (
    FIGURES,
    CriticFigures,
    calibration_table,
    critic_figures,
    first_wrong_lines,
)
from stage2_train.critic_job.states import CriticData, read_critic_data
from stage2_train.critic_job.training import CriticTraining
from stage2_train.export import loadable_model
from stage2_train.metrics import Metrics
from stage2_train.ranks import Ranks, join_ranks, noticing_lost_ranks
from stage2_train.watchdog import Watchdog, in_phase

SETTING = "critic.learning_rate"
PROMPTS_FOR_THRESHOLD = 200
"""At least so many training prompts choose the threshold; as many as are held out, if these are more."""
LINES_SHOWN = 20
METRICS = "metrics.jsonl"
PLOT = "reliability"


@dataclass(frozen=True, slots=True, kw_only=True)
class _Inputs:
    """What training reads, checked."""

    model: Path
    """The folder that the critic starts from."""
    tokenizer: Path
    """The reference's folder."""
    renderer: PromptRenderer
    states: CriticData
    trained_with: dict[str, Any]


def run_critic(
    config: Config,
    console: Terminal,
    segments: Path | None = None,
    allow_mismatch: Collection[str] = (),
) -> None:
    """Train the critic of a run and test it on held-out prompts; a finished one is left as it is.

    All user mistakes are found before a model loads. Raises UserError.
    """
    paths = run_paths(config.run)
    ranks = join_ranks(config.seed)
    if not ranks.is_main:
        console = Terminal(quiet=True)
    allowance = Allowance(allow_mismatch)
    with noticing_lost_ranks(ranks), ExitStack() as job:
        inputs = _prepare(config, segments or paths.segments, paths, ranks, allowance)
        if is_finished(paths.critic, inputs.trained_with):
            console.print(f"nothing to do: {paths.critic} has been trained with this config and table")
            return
        if ranks.is_main:
            job.enter_context(exclusive_run(paths, "critic"))
        job.enter_context(Watchdog(ranks, timedelta(minutes=config.train.hang_minutes)))
        _describe(inputs.states, ranks, console)
        with in_phase("loading the models"):
            critic = Critic(
                inputs.model, config, ranks, learning_rate=config.critic.learning_rate, setting=SETTING
            )
        budget, padding = config.train.tokens_per_micro_batch, inputs.renderer.pad_token_id
        training = CriticTraining(critic, inputs.states, budget, padding, ranks)
        metrics = _train(training, inputs.states, config, console)
        figures = _test(training, inputs.states, config.seed)
        weights = critic.weights()
        if ranks.is_main:
            record = Record(
                trained_with=inputs.trained_with,
                context={
                    "model": title_of(config.critic.model or config.model.path),
                    "processes": ranks.world_size,
                    "commit": commit(),
                    "versions": versions(("torch", "transformers", *LIBRARIES)),
                    **({ACCEPTED: list(allowance.used)} if allowance.used else {}),
                },
            )
            with new_folder(paths.critic) as temporary:
                critic.write(temporary, weights, inputs.tokenizer, config.model.dtype)
                _write_figures(temporary, metrics, figures, record)
        ranks.wait()
    _show(figures, console)
    console.print(f"{paths.critic}: the critic in Hugging Face format, its figures and its reliability plot")


def _prepare(config: Config, segments: Path, paths: RunPaths, ranks: Ranks, allowance: Allowance) -> _Inputs:
    """Read and check everything that needs no model. A collective operation."""
    provenance = SEGMENTS_TABLE.provenance(segments)
    reference = reference_model(config)
    model = _start(config, reference)
    renderer = PromptRenderer(reference, config.data)
    ours, start = ranks.once_a_node(
        lambda: [model_identity(folder, paths.known_weights) for folder in (reference, model)]
    )
    identity = sampling_identity(config, renderer, ours, fingerprint(config.grader))
    refuse_other_steps(identity, provenance, segments, allowance)
    states = read_critic_data(segments, config.data, renderer, config.critic.held_out, allowance)
    refuse_longer(max(map(len, [*states.training, *states.held_out])), model)
    return _Inputs(
        model=model,
        tokenizer=reference,
        renderer=renderer,
        states=states,
        trained_with=trained_with(config, segments, start),
    )


def _start(config: Config, reference: Path) -> Path:
    """The folder of the model to start from. Raises UserError unless it reads the reference's tokens."""
    folder = reference
    if config.critic.model is not None:
        try:
            folder = loadable_model(config.critic.model)
        except UserError as error:
            raise UserError(f"critic.model: {error}") from error
        theirs, ours = (load_tokenizer(each).get_vocab() for each in (folder, reference))
        if others := sorted(token for token, number in ours.items() if theirs.get(token) != number):
            raise UserError(
                f"critic.model {config.critic.model} has another tokenizer than the reference: {len(others):,} tokens "
                f"have other ids or are missing, such as {others[0]!r}; choose a model with the reference's tokenizer"
            )
    read_model(folder)
    token_classifier(folder)
    return folder


def _describe(states: CriticData, ranks: Ranks, console: Terminal) -> None:
    for name, part in (("train on", states.training), ("held out", states.held_out)):
        count = sum(len(each.states) for each in part)
        console.print(
            f"{name}: {count:,} states along {len(part):,} trajectories, {sum(map(len, part)):,} tokens"
        )
    if not states.held_out:
        console.print("warning: no prompt is held out, so the critic is not tested; raise critic.held_out")
    console.print(f"{ranks.world_size} process{'es' if ranks.world_size > 1 else ''}")


def _train(training: CriticTraining, states: CriticData, config: Config, console: Terminal) -> list[Metrics]:
    """All optimizer steps; returns the figures of each."""
    settings = config.critic
    steps = [
        step
        for epoch in range(settings.epochs)
        for step in optimizer_steps(states.training, settings.batch_size, config.seed, epoch)
    ]
    every = max(1, len(steps) // LINES_SHOWN)
    metrics: list[Metrics] = []
    with progress_bar(console) as bar:
        task = bar.add_task("", total=len(steps))
        for number, step in enumerate(steps, start=1):
            with in_phase("update"):
                found = training.step(step)
            metrics.append(found)
            if number % every == 0 or number == len(steps):
                console.print(
                    f"{number:>5}/{len(steps)}  cross-entropy {found['loss/cross_entropy']:.4f}  "
                    f"states {found['train/states']:.0f}"
                )
            bar.update(task, completed=number, description=f"step {number}/{len(steps)}")
    return metrics


def _test(training: CriticTraining, states: CriticData, seed: int) -> CriticFigures:
    held_out = states.states(states.held_out)
    prompts = max(PROMPTS_FOR_THRESHOLD, held_out["prompt_id"].n_unique())
    some = states.some_training(prompts, seed)
    logits = training.logits([*states.held_out, *some])
    return critic_figures(held_out, states.states(some), logits)


def _write_figures(folder: Path, metrics: list[Metrics], figures: CriticFigures, record: Record) -> None:
    # JSON has no NaN.
    finite = [{key: value if math.isfinite(value) else None for key, value in row.items()} for row in metrics]
    lines = [json.dumps({"iteration": number, **row}) + "\n" for number, row in enumerate(finite, start=1)]
    write_text(folder / METRICS, "".join(lines))
    write_text(folder / FIGURES, figures.model_dump_json(indent=2))
    if figures.held_out:
        bins = figures.held_out["all"].bins
        for suffix in ("png", "svg"):
            draw_reliability(
                [each.predicted for each in bins],
                [each.monte_carlo for each in bins],
                [each.standard_error or 0.0 for each in bins],
                [each.states for each in bins],
                folder / f"{PLOT}.{suffix}",
                suffix,
            )
    write_text(folder / CARD, critic_card(figures, record))
    write_text(folder / RunPaths.TRAINED_WITH, record.model_dump_json(indent=2))


def _show(figures: CriticFigures, console: Terminal) -> None:
    if figures.held_out:
        console.print(calibration_table(figures))
    for line in first_wrong_lines(figures.first_wrong_step):
        console.print(line)
