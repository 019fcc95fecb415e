"""Build the networks, scorers and columns that an objective needs, and no others.

All branches on the kind of objective are here, at set-up; the loop has none.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from stage2_train.collate import Collator, Cutter, known_values
from stage2_train.config import Config
from stage2_train.critic import Critic
from stage2_train.data import TrainingData
from stage2_train.learner import Learner
from stage2_train.objectives.protocol import Column, KeepsHistory, TrainsCritic
from stage2_train.policy import Policy
from stage2_train.prompt_history import PromptHistory
from stage2_train.ranks import Ranks
from stage2_train.scorers import PolicyScorer, Scorer, build_scorers
from stage2_train.update import Update, trained_parts


@dataclass(frozen=True, slots=True, kw_only=True)
class Parts:
    """Everything that an iteration needs besides rollouts."""

    policy: Policy
    scorers: Mapping[Column, Scorer]
    """The scorers, by the column that each fills."""
    collate: Collator
    update: Update
    history: PromptHistory | None

    @property
    def learners(self) -> dict[str, Learner]:
        """The networks that are trained, by their names in a checkpoint."""
        return {name: part.learner for name, part in self.update.parts.items()}


def build_parts(config: Config, data: TrainingData, ranks: Ranks) -> Parts:
    """Load the policy and everything else that the objective needs."""
    train, objective = config.train, config.train.objective
    policy = Policy(data.folder, config, ranks)
    critic = None
    if isinstance(objective, TrainsCritic):
        critic = Critic(data.folder, config, ranks, learning_rate=objective.critic_learning_rate)
    cut = Cutter(train, data.renderer, ranks)
    history = None
    if isinstance(objective, KeepsHistory):
        assert data.stage1 is not None, "a history begins with stage 1"
        history = PromptHistory(objective, data.stage1.rewards, PolicyScorer(policy, ranks), cut, ranks)
    values = known_values(train.columns, data.stage1, history)
    return Parts(
        policy=policy,
        scorers=build_scorers(train.columns, data.folder, config, policy, critic, ranks),
        collate=Collator(train, values, data.renderer, cut, ranks),
        update=Update(trained_parts(objective, policy, critic), ranks),
        history=history,
    )
