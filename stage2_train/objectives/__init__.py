"""The objectives that stage 2 can optimise, one file each. The union is the only list."""

from typing import Annotated, Any

from pydantic import BeforeValidator, Field

from stage2_train.objectives.astar_po import AStarPO
from stage2_train.objectives.centred_residual import CentredResidual
from stage2_train.objectives.direct_advantage import DirectAdvantage
from stage2_train.objectives.grpo import GRPO
from stage2_train.objectives.pmd_mean import PMDMean
from stage2_train.objectives.ppo import PPO
from stage2_train.objectives.qrpo import QRPO
from stage2_train.objectives.rebel import REBEL
from stage2_train.objectives.spo import SPO

__all__ = ["AStarPO", "ObjectiveConfig"]


def _named(section: Any) -> Any:
    return {"name": "astar_po", **section} if isinstance(section, dict) else section


ObjectiveConfig = Annotated[
    AStarPO | GRPO | REBEL | PPO | CentredResidual | PMDMean | SPO | QRPO | DirectAdvantage,
    Field(discriminator="name"),
    BeforeValidator(_named),
]
"""[train.objective]; without a name it is A*-PO's."""
