"""A config of both stages that real commands finish within seconds."""

from pathlib import Path

from common.settings import as_toml

TRAIN = {
    "learning_rate": 1e-4,
    "iterations": 2,
    "batch_size": 4,
    "mini_batch_size": 4,
    "checkpoint_every": 1,
    "gradient_checkpointing": False,
}


def write_config(folder: Path, model: Path, data_file: Path, **train: object) -> Path:
    """Write run.toml, a run named `mine` with transformers as its engine; `train` are more values of [train]."""
    data = f'format = "generic"\npath = "{data_file}"\ntemplate = "line"\nmax_prompt_tokens = 64\n'
    path = folder / "run.toml"
    path.write_text(
        f"""
run = "mine"
model = {{ path = "{model}", dtype = "float32" }}
grader = {{ name = "gsm8k" }}
sampling = {{ max_completion_tokens = 12 }}
vstar = {{ num_samples = 4 }}
engine = {{ backend = "transformers" }}
[train]
{"".join(f"{key} = {as_toml(value)}{chr(10)}" for key, value in {**TRAIN, **train}.items())}
[data]
{data}
[evaluate]
num_samples = 2
[evaluate.data]
{data}
"""
    )
    return path
