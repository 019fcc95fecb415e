"""Helpers of stage 2's tests: a config for the tiny model, and a vstar.parquet made without sampling."""

import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import polars as pl

from benchmarks.tiny_model import write_questions
from common.data.prompts import load_prompts
from common.data.rendering import PromptRenderer
from common.grading import fingerprint
from common.model.files import model_identity
from common.provenance import Provenance, sampling_identity
from common.terminal.console import Terminal
from common.vstar_file import write_vstar
from stage2_train.config import Config

NUM_SAMPLES = 4
GRADED = ([0.0, 0.25, 0.5, 0.75], [1.0, 0.0, 0.5, 0.25], [1.0, 0.75, 0.25, 0.0], [1.0, 0.5, 0.75, 0.25])
REWARDS = ([0.0, 0.0, 0.0, 0.0], [1.0, 0.0, 0.0, 0.0], [1.0, 1.0, 0.0, 0.0], [1.0, 1.0, 1.0, 1.0])


def tiny_config(folder: Path, model: Path, **sections: dict[str, Any]) -> Config:
    """A config of three iterations of two steps on 32 prompts; `sections` override its values."""
    train, held_out = folder / "train.jsonl", folder / "test.jsonl"
    write_questions(train, 32)
    write_questions(held_out, 5, first=32)
    document: dict[str, Any] = {
        "run": "tiny",
        "seed": 1,
        "model": {"path": str(model), "dtype": "float32"},
        "data": {"format": "generic", "path": str(train), "max_prompt_tokens": 64},
        "sampling": {"max_completion_tokens": 6},
        "grader": {"name": "gsm8k"},
        "engine": {"max_num_seqs": 16},
        "vstar": {"num_samples": NUM_SAMPLES},
        "train": {
            "objective": {"beta2": 0.05},
            "learning_rate": 1e-3,
            "batch_size": 16,
            "mini_batch_size": 8,
            "iterations": 3,
            "tokens_per_micro_batch": 160,
            "evaluate_every": 2,
        },
        "evaluate": {"num_samples": 4, "data": {"format": "generic", "path": str(held_out)}},
    }
    for name, values in sections.items():
        document[name] = {**document[name], **values} if isinstance(values, dict) else values
    return Config.model_validate(document)


def write_tiny_vstar(
    config: Config,
    path: Path,
    *,
    change: dict[str, Any] | None = None,
    made_up: Sequence[Sequence[float]] = REWARDS,
) -> None:
    """vstar.parquet of a config, with made-up rewards; `change` overrides parts of the identity that it records."""
    folder = Path(config.model.path)
    renderer = PromptRenderer(folder, config.data)
    prompts = load_prompts(config.data, config, renderer)
    rewards = [list(made_up[number % len(made_up)]) for number in range(len(prompts))]
    solved = [[reward >= 1 for reward in row] for row in rewards]
    identity = sampling_identity(config, renderer, model_identity(folder), fingerprint(config.grader))
    rows = pl.DataFrame(
        {
            "prompt_id": [prompt.id for prompt in prompts],
            "prompt": [prompt.text for prompt in prompts],
            "answer": [prompt.answer for prompt in prompts],
            "prompt_token_hash": [prompt.token_hash for prompt in prompts],
            "num_samples": [NUM_SAMPLES] * len(prompts),
            "rewards": rewards,
            "outcomes": [["correct" if one else "wrong" for one in row] for row in solved],
            "completion_tokens": [[5] * NUM_SAMPLES] * len(prompts),
            "pass_rate": [sum(row) / NUM_SAMPLES for row in solved],
            "pass_at_n": [any(row) for row in solved],
            "beta1": [float("inf")] * len(prompts),
            "vstar": [sum(row) / NUM_SAMPLES for row in rewards],
            "vstar_se": [0.1] * len(prompts),
            "keep": [True] * len(prompts),
            "dropped_by": [None] * len(prompts),
        }
    )
    frame = rows.cast(
        {"num_samples": pl.Int32, "completion_tokens": pl.List(pl.Int32), "dropped_by": pl.String}
    )
    write_vstar(frame, Provenance(identity={**identity, "seed": 1, **(change or {})}, context={}), path)


def trained_offline(config: Config) -> str:
    """Train without an engine, which may not even be built; returns the output."""

    def no_engine(*_: Any, **__: Any) -> Any:
        raise AssertionError("there is nothing to draw")

    from stage2_train.run import run_stage2  # loads torch and DeepSpeed

    printed = io.StringIO()
    run_stage2(config, Terminal(file=printed, width=200), build_engine=no_engine)
    return printed.getvalue()


def _inline(value: Any) -> str:
    if isinstance(value, list):
        return f"[{', '.join(map(_inline, value))}]"
    if isinstance(value, dict):
        return f"{{ {', '.join(f'{key} = {_inline(inner)}' for key, inner in value.items())} }}"
    return json.dumps(value)


def as_toml(config: Config) -> str:
    """The config as a TOML file."""
    lines: list[str] = []

    def table(name: str, values: dict[str, Any]) -> None:
        if name:
            lines.append(f"[{name}]")
        tables = {key: value for key, value in values.items() if isinstance(value, dict)}
        lines.extend(f"{key} = {_inline(value)}" for key, value in values.items() if key not in tables)
        for key, value in tables.items():
            table(f"{name}.{key}" if name else key, value)

    table("", config.model_dump(mode="json", exclude_none=True))
    return "\n".join(lines) + "\n"
