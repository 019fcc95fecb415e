"""Held-out accuracy of weights that a peer saved, sampled as stage 2 samples it while training.

python -m benchmarks.peers.evaluate TASK writes accuracy.json beside TASK.
"""

import json
import sys
from pathlib import Path

import cli  # noqa: F401  the thread settings of the command line
from common.data.prompts import PromptRenderer, load_prompts
from common.engines import build_engine
from common.grading import GraderPool, Outcome
from common.seeds import derive_seed
from stage2_train.config import Config
from stage2_train.sources.rollouts import collect_rollouts


def main() -> None:
    from safetensors.torch import load_file

    task = json.loads(Path(sys.argv[1]).read_text())
    config, base = Config.model_validate(task["config"]), Path(task["base"])
    assert config.evaluate.data is not None
    renderer = PromptRenderer(base, config.evaluate.data)
    prompts = load_prompts(config.evaluate.data, config, renderer)[: config.evaluate.training_prompts]
    engine = build_engine(config, base, renderer, beside_trainer=True)
    accuracy = {}
    with GraderPool(config.grader) as pool:
        for number, file in task["weights"].items():
            engine.load_weights(load_file(file).items())
            rollouts = collect_rollouts(
                prompts,
                engine,
                pool,
                config.sampling,
                seed=derive_seed(config.seed, "evaluate"),
                places=range(len(prompts)),
            )
            solved = [rollout.grade.outcome == Outcome.CORRECT for rollout in rollouts]
            accuracy[number] = sum(solved) / len(solved)
    Path(sys.argv[1]).with_name("accuracy.json").write_text(json.dumps(accuracy))
    engine.close()


if __name__ == "__main__":
    main()
