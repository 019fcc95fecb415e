"""Steps of the critic job, on one rank of a job: what tests/training_jobs.py runs for tests/test_critic_steps.py.

The order holds a `config`, `cases` (name to changes of it) and the `output` to write to; segments.parquet is beside the
order's vstar.parquet.
"""

from pathlib import Path
from typing import Any

import torch

from common.data.rendering import PromptRenderer
from stage2_train.config import Config
from stage2_train.critic import Critic
from stage2_train.critic_job.batches import optimizer_steps
from stage2_train.critic_job.states import CriticData, Trajectory, read_critic_data
from stage2_train.critic_job.training import CriticTraining
from stage2_train.ranks import Ranks, join_ranks
from tests.train_steps import changed


def steps_of(config: Config, states: CriticData) -> list[list[Trajectory]]:
    """The first epoch's optimizer steps."""
    return optimizer_steps(states.training, config.critic.batch_size, config.seed, 0)


def trained(config: Config, states: CriticData, padding: int, ranks: Ranks) -> dict[str, Any]:
    """The figures of each step, and after the last the weights (of the main rank) and the logits of all states."""
    critic = Critic(
        Path(config.model.path),
        config,
        ranks,
        learning_rate=config.critic.learning_rate,
        setting="critic.learning_rate",
    )
    training = CriticTraining(critic, states, config.train.tokens_per_micro_batch, padding, ranks)
    return {
        "steps": [training.step(step) for step in steps_of(config, states)],
        "logits": training.logits(states.training),
        "weights": critic.weights(),
    }


def main(order: dict[str, Any]) -> None:
    config = Config.model_validate(order["config"])
    ranks = join_ranks(seed=0)
    renderer = PromptRenderer(Path(config.model.path), config.data)
    states = read_critic_data(Path(order["vstar"]).with_name("segments.parquet"), config.data, renderer, 0.0)
    found = {
        name: trained(changed(config, change), states, renderer.pad_token_id, ranks)
        for name, change in order["cases"].items()
    }
    torch.save(found, f"{order['output']}.{ranks.rank}")
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()
