"""The objectives that stage 2 can optimise. This list is the only one."""

from stage2_train.objectives.astar_po import AStarPO

__all__ = ["AStarPO", "ObjectiveConfig"]

ObjectiveConfig = AStarPO
