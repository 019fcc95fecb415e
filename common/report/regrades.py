"""The results of `regrade` that `report` reads."""

from pydantic import BaseModel


class BeforeAfter(BaseModel):
    """A figure under the old grades and under the new ones."""

    before: float
    after: float


class Regrade(BaseModel):
    """The part of a regrade's summary that is shown."""

    before: str
    after: str
    prompts: int
    changed_prompts: int
    changed_outcomes: dict[str, int]
    pass_rate: BeforeAfter
    mean_vstar: BeforeAfter
    mean_absolute_delta_vstar: float
