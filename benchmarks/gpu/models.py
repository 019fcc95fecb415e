"""Models of random weights, in folders that parts share, and the settings that they are trained and sampled with."""

import gc
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from benchmarks.processes import assignments
from benchmarks.scale import QWEN2_5, qwen
from benchmarks.training import DEMO, save_random_model
from common.files import new_folder
from stage2_train.config import Config, load_config

TINY = qwen(64, 2, 128, 2, 2, 4608, tied=True)
"""In place of any of them with --tiny."""


def random_model(folder: Path, shape: str, dtype: str, *, is_tiny: bool) -> Path:
    """A model of one of Qwen2.5's shapes; made once, by the first part that asks for it."""
    document = TINY if is_tiny else QWEN2_5[shape]
    return written_model(folder, f"{'tiny' if is_tiny else shape}-{dtype}", {**document, "dtype": dtype})


def written_model(folder: Path, name: str, document: dict[str, Any]) -> Path:
    """The model of this config.json in folder/name; made if it is not there."""
    place = folder / name
    if not place.exists():
        with new_folder(place) as unfinished:
            save_random_model(unfinished, document)
        gc.collect()
        torch.cuda.empty_cache()  # it was made there
    return place


def settings(model: Path, values: Mapping[str, object]) -> Config:
    """The demo's config with this model and these values."""
    return load_config(DEMO, assignments({"model.path": model, **values}), "gpu")


def engine_values(*, is_tiny: bool, share: float) -> dict[str, object]:
    """Of [engine]: vLLM with a share of the GPU, asleep while the trainer works; on a CPU a small cache."""
    if is_tiny:
        return {
            "engine.cpu_kv_cache_gib": 0.05,
            "engine.max_num_seqs": 16,
            "engine.sleep_while_training": "true",
        }
    return {"engine.training_gpu_memory_utilization": share, "engine.sleep_while_training": "true"}
