"""A grader's parts and settings, as plain data that a worker reads without pydantic."""

import json
from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True, slots=True, kw_only=True)
class JudgeSpec:
    """A judge model behind an OpenAI-compatible address; `[grader.judge]` says what each value means."""

    url: str
    model: str
    prompt: str
    max_score: float
    temperature: float
    max_tokens: int
    request_timeout_seconds: float
    retries: int
    requests_per_minute: float | None
    """Per worker process."""
    api_key_env: str


@dataclass(frozen=True, slots=True, kw_only=True)
class GraderSpec:
    """The rules, reward functions and judge of a grader, with what changes their verdicts."""

    names: tuple[str, ...]
    weights: tuple[float, ...] = ()
    """One per name; none where each counts once."""
    convention: str | None = None
    answer_after: str | None = None
    judge: JudgeSpec | None = None
    max_concurrent: int = 32
    timeout_seconds: float = 5.0

    def to_json(self) -> str:
        """For another process."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> "GraderSpec":
        """Reads the text that `to_json` wrote."""
        values: dict[str, Any] = json.loads(text)
        judge = values["judge"]
        values |= {"names": tuple(values["names"]), "weights": tuple(values["weights"])}
        return cls(**values | {"judge": None if judge is None else JudgeSpec(**judge)})
