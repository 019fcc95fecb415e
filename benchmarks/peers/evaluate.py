"""Held-out accuracy of weights that a peer saved, sampled as stage 2 samples it while training."""

from collections.abc import Mapping
from pathlib import Path

import cli  # noqa: F401  the thread settings of the command line
from common.data.prompts import load_prompts
from common.data.rendering import PromptRenderer
from common.engines import build_engine
from common.grading import GraderPool
from common.seeds import derive_seed
from stage2_train.config import Config
from stage2_train.sources.rollouts import collect_rollouts


def evaluate(config: Config, base: Path, weights: Mapping[int, Path]) -> dict[int, float]:
    """The accuracy of each weights file."""
    from safetensors.torch import load_file

    assert config.held_out is not None
    renderer = PromptRenderer(base, config.held_out)
    prompts = load_prompts(config.held_out, config, renderer)[: config.evaluate.training_prompts]
    engine = build_engine(config, base, renderer, beside_trainer=True)
    accuracies = {}
    with GraderPool(config.grader) as pool:
        for number, file in weights.items():
            engine.load_weights(load_file(file).items())
            groups = collect_rollouts(
                prompts,
                engine,
                pool,
                config.sampling,
                seed=derive_seed(config.seed, "evaluate"),
                places=range(len(prompts)),
            )
            accuracies[number] = sum(rollout.is_solved for (rollout,) in groups) / len(groups)
    engine.close()
    return accuracies
