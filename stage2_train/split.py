"""The division of a training job's state over its processes, which a continuation may change."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self


@dataclass(frozen=True, slots=True, kw_only=True)
class Split:
    """A number of processes, and the stage of ZeRO that divides weights, gradients or AdamW's moments over them."""

    processes: int
    zero_stage: int

    @classmethod
    def of(cls, state: Mapping[str, Any]) -> Self:
        """The split of the job that wrote a checkpoint with this state; earlier ones have the stage in their origin."""
        source = state if "zero_stage" in state else state["origin"]["config"]["train"]
        return cls(processes=state["world_size"], zero_stage=source["zero_stage"])

    def reads(self, saved: "Split") -> bool:
        """Whether a job with this split loads the files of another as they are; without ZeRO each process has all."""
        return self == saved or self.zero_stage == saved.zero_stage == 0

    def __str__(self) -> str:
        processes = f"{self.processes} process{'es' if self.processes > 1 else ''}"
        return f"{processes} {f'under ZeRO-{self.zero_stage}' if self.zero_stage else 'without ZeRO'}"
