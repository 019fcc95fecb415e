"""The objectives that stage 2 can optimise. This list is the only one."""

from stage2_train.config import AStarPOConfig
from stage2_train.objectives.astar_po import AStarPO
from stage2_train.objectives.protocol import Objective

__all__ = ["AStarPO", "Objective", "build_objective"]


def build_objective(config: AStarPOConfig) -> Objective:
    """The objective that a config names."""
    match config:
        case AStarPOConfig():
            return AStarPO(beta2=config.beta2)
