"""Forecast a training run before it starts: steps, tokens, the first iteration's figures, memory.

Reads vstar.parquet, the config, and the model's config.json, tokenizer.json and weight headers. Loads no model and no
torch.
"""

import json
import math
import random
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
from rich.table import Table
from rich.text import Text

from common.config import DataConfig
from common.data.framing import chat_turns, text_prompt
from common.data.rendering import prompt_template
from common.errors import UserError, cause
from common.model.files import reference_model
from common.model.reading import describe_model, read_model
from common.model.weights import AGAIN, refuse_pointer
from common.remote.places import shown
from common.runs import run_paths
from common.terminal.console import Terminal
from common.value import Floats
from common.vstar_file import read_vstar, rows_to_train_on
from stage2_train.config import Config
from stage2_train.first_batch import ALARM_LEVEL, LEVEL, Expectation, expected_first_batch
from stage2_train.memory import memory_per_gpu, read_shape
from stage2_train.preflight import foresight, refuse_uneven_split

TOKENIZED_PROMPTS = 2000
"""The mean number of prompt tokens is taken over this many prompts, chosen at random."""
GIB = 2**30


def forecast(config: Config, vstar_file: Path, *, gpus: int, gpu_gib: float) -> dict[str, Any]:
    """The figures that `show` prints, as a JSON document. Raises UserError for an invalid file or model."""
    if config.train.reads_advantages:
        raise UserError(
            f"forecast is for runs that draw completions; {config.train.objective.name} reads its steps from a table, "
            f"whose size `python cli.py inspect --advantages {run_paths(config.run).advantages}` shows"
        )
    if not config.train.draws:
        raise UserError(
            'forecast is for runs that draw completions; train.rollouts = "stage1" reads those of stage 1, whose '
            f"number and lengths `python cli.py inspect --run {config.run}` shows"
        )
    refuse_uneven_split(config, gpus)
    if not (math.isfinite(gpu_gib) and gpu_gib > 0):
        raise UserError(
            f"--gpu-memory {gpu_gib:g} is not an amount of memory; give one GPU's, in GiB, such as 80"
        )
    rows, provenance = read_vstar(vstar_file)
    kept = rows_to_train_on(rows, vstar_file)
    folder = reference_model(config)
    model = read_model(folder).document()
    turns = config.train.iterations_over(kept.height)
    visits = turns * config.train.batch_size
    completions = visits * config.train.objective.group_size
    batch = expected_first_batch(rows, config.train)
    return {
        "path": shown(str(vstar_file)),
        "model": model,
        "eos_token_ids": provenance.identity["prompt"]["eos_token_ids"],
        "foreseen": foresight(config, folder),
        "filters": provenance.context.get("filters", []),
        "iterations": turns,
        "optimizer_steps": turns * config.train.steps_per_iteration,
        "prompts": rows.height,
        "kept": kept.height,
        "visits_a_prompt": {"least": visits // kept.height, "most": -(-visits // kept.height)},
        "tokens": _tokens(kept, completions, config, folder),
        "saved_by_filter": _saved(rows, kept),
        "first_iteration": None
        if batch is None
        else {"loss": _figure(batch.loss), "reward": _figure(batch.reward)},
        "memory": memory_per_gpu(read_shape(folder), config, gpus=gpus, gpu_bytes=round(gpu_gib * GIB)),
    }


def _figure(figure: Expectation) -> dict[str, Any]:
    return {
        "mean": figure.mean,
        "interval_95": list(figure.interval(LEVEL)),
        "warning_interval": list(figure.interval(ALARM_LEVEL)),
    }


def _saved(rows: pl.DataFrame, kept: pl.DataFrame) -> dict[str, float]:
    """The share of an epoch that the dropped prompts would have taken."""
    all_tokens, kept_tokens = (float(table["completion_tokens"].list.mean().sum()) for table in (rows, kept))
    return {"prompts": 1 - kept.height / rows.height, "completion_tokens": 1 - kept_tokens / all_tokens}


def _tokens(kept: pl.DataFrame, completions: int, config: Config, folder: Path) -> dict[str, Any]:
    """Tokens of all iterations, if completions stay as long as the reference policy's."""
    sampled = completion_tokens(kept, completions)
    low, high = sampled.interval()
    prompt_tokens = _mean_prompt_tokens(kept["prompt"], config, folder)
    prompts = prompt_tokens * completions
    return {
        "completions": completions,
        "mean_prompt": prompt_tokens,
        "mean_completion": sampled.mean / completions,
        "sampled": {"mean": sampled.mean, "interval_95": [low, high]},
        "trained": {"mean": prompts + sampled.mean, "interval_95": [prompts + low, prompts + high]},
    }


def completion_tokens(kept: pl.DataFrame, completions: int) -> Expectation:
    """The tokens in `completions` completions, spread evenly over the kept prompts.

    Two sources of error: the completions to come vary, and so did the cached ones that the means were taken from.
    """
    lengths = kept["completion_tokens"].list
    mean_P: Floats = lengths.mean().to_numpy().astype(np.float64)
    counts_P = lengths.len().to_numpy().astype(np.float64)
    repeated_P = counts_P > 1
    # With one sample a prompt everywhere, the variance over all of them is an upper limit.
    within = (
        float(np.average(lengths.var().to_numpy()[repeated_P], weights=counts_P[repeated_P] - 1))
        if repeated_P.any()
        else float(mean_P.var())
    )
    error_of_mean = within * float((1 / counts_P).sum()) / len(mean_P) ** 2
    variance = completions * within + completions**2 * error_of_mean
    total = completions * float(mean_P.mean())
    return Expectation(mean=total, sd=variance**0.5, lowest=0.0, highest=float("inf"))


def _mean_prompt_tokens(texts: pl.Series, config: Config, folder: Path) -> float:
    """Counted by the tokenizer alone, since transformers would load torch; of a chat template only the turns count."""
    from tokenizers import Tokenizer

    file = folder / "tokenizer.json"
    if not file.is_file():
        return float(config.data.max_prompt_tokens)
    chosen = random.Random(0).sample(texts.to_list(), min(TOKENIZED_PROMPTS, len(texts)))
    template, data = prompt_template(config.data), config.data
    rendered = [
        _turns_alone(text, data) if template == "chat" else text_prompt(template, text, data)
        for text in chosen
    ]
    refuse_pointer(file)
    try:
        tokenizer = Tokenizer.from_file(str(file))
    except Exception as error:  # it raises nothing more specific for a damaged file
        raise UserError(f"{file} is not a tokenizer ({cause(error)}); {AGAIN}") from error
    encodings = tokenizer.encode_batch(rendered, add_special_tokens=False)
    return sum(len(encoding.ids) for encoding in encodings) / len(encodings)


def _turns_alone(text: str, data: DataConfig) -> str:
    turns = [turn["content"] for turn in chat_turns(text, data)]
    return "\n".join([*turns, *([data.prefill] if data.prefill else [])])


def to_json(figures: dict[str, Any]) -> str:
    """The figures as JSON."""
    return json.dumps(figures, indent=2, ensure_ascii=False, allow_nan=False)


def show(figures: dict[str, Any], console: Terminal) -> None:
    """Print the figures: the run, then a GPU's memory by component."""
    tokens, visits, saved = figures["tokens"], figures["visits_a_prompt"], figures["saved_by_filter"]
    rows = {
        "file": figures["path"],
        "model": describe_model(figures["model"], [str(number) for number in figures["eos_token_ids"]]),
        **({"foreseen": "; ".join(figures["foreseen"])} if figures["foreseen"] else {}),
        "prompts": f"{figures['kept']:,} kept of {figures['prompts']:,}, each visited "
        + (
            f"{visits['least']}"
            if visits["least"] == visits["most"]
            else f"{visits['least']} or {visits['most']}"
        )
        + " times",
        "iterations": f"{figures['iterations']:,}, {figures['optimizer_steps']:,} optimizer steps",
        "saved by the filter": f"{saved['prompts']:.1%} of an epoch's prompts, "
        f"{saved['completion_tokens']:.1%} of its completion tokens",
        "tokens to sample": _tokens_line(tokens["sampled"]),
        "tokens to train on": f"{_tokens_line(tokens['trained'])}, with prompts of {tokens['mean_prompt']:.1f}",
        **_first_iteration_lines(figures["first_iteration"]),
    }
    table = Table.grid(padding=(0, 2))
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in rows.items():
        table.add_row(Text(name, style="bold"), Text(value))
    console.print(table)
    console.print()
    console.print(_memory_table(figures["memory"]))
    for assumption in figures["memory"]["assumptions"]:
        console.print(f"  assumes: {assumption}")


def _tokens_line(total: dict[str, Any]) -> str:
    low, high = total["interval_95"]
    return f"{total['mean']:,.0f} ({low:,.0f} to {high:,.0f})"


def _first_iteration_lines(first: dict[str, Any] | None) -> dict[str, str]:
    if first is None:
        return {"first iteration": "cannot be told for this objective, or from one sample a prompt"}
    return {
        f"first iteration, {name}": "{:.4f} (95 %: {:.4f} to {:.4f}; `train` warns outside {:.4f} to {:.4f})".format(
            figure["mean"], *figure["interval_95"], *figure["warning_interval"]
        )
        for name, figure in first.items()
    }


def _memory_table(memory: dict[str, Any]) -> Table:
    table = Table(
        title=f"GiB on {'the GPU' if memory['gpus'] == 1 else 'each of {gpus} GPUs'.format(**memory)}, "
        f"{memory['parameters']:,} parameters"
        + (
            ""
            if memory["trained_parameters"] == memory["parameters"]
            else f", {memory['trained_parameters']:,} of an adapter trained"
        ),
        title_justify="left",
    )
    for heading in ("when", "what", "GiB"):
        table.add_column(heading, justify="right" if heading == "GiB" else "left")
    for when, label in {
        "held": "always",
        "backward": "+ backward pass",
        "step": "or + step",
        "reference": "or + reference",
        "rollout": "or + rollout",
    }.items():
        _add_components(table, label, memory[when])
    verdict = "fits" if memory["fits"] else "does not fit"
    capacity = f"at most, {verdict} in {memory['gpu_bytes'] / GIB:g} GiB"
    table.add_row("together", capacity, f"{memory['total'] / GIB:.2f}", style="bold")
    _add_components(table, "in main memory", memory["host"])
    return table


def _add_components(table: Table, label: str, components: dict[str, int]) -> None:
    for number, (name, size) in enumerate(components.items()):
        table.add_row("" if number else label, name, f"{size / GIB:.2f}")
