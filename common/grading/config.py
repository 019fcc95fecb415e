"""The `[grader]` section of a run's configuration, and the fingerprint that artifacts carry."""

from typing import Self

from pydantic import Field, field_validator, model_validator

from common.grading.graders import GRADERS, find_grader, is_grader_name
from common.section import Section


class GraderConfig(Section):
    """Which grader, and what one worker process may use. Only the name changes verdicts."""

    name: str
    workers: int = Field(default=1, ge=1, le=1024)
    timeout_seconds: float = Field(default=5.0, ge=0.1, le=86_400)
    memory_gib: float = Field(default=2.0, ge=0.5, le=65_536)

    @field_validator("name")
    @classmethod
    def _known(cls, name: str) -> str:
        if not is_grader_name(name):
            known = ", ".join(GRADERS)
            raise ValueError(f"unknown grader {name!r}: use one of {known}, or 'package.module:function'")
        return name

    @model_validator(mode="after")
    def _rule_has_its_time(self) -> Self:
        rule = GRADERS.get(self.name)
        if rule and self.timeout_seconds <= rule.own_seconds:
            raise ValueError(
                f'timeout_seconds should be above {rule.own_seconds:g}, which the grader "{self.name}" gives a program '
                f"itself, found {self.timeout_seconds:g}"
            )
        return self


def fingerprint(config: GraderConfig) -> str:
    """Name and version: two artifacts with equal fingerprints were graded by the same rule."""
    return find_grader(config.name).version
