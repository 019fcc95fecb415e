"""The `[grader]` section of a run's configuration, and the fingerprint that artifacts carry."""

from typing import Annotated, Literal, Self

from pydantic import Field, field_validator, model_validator

from common.grading.graders import KNOWN, RULES, Grader, is_function, is_grader_name
from common.grading.judge import JUDGE, PROMPT
from common.grading.spec import GraderSpec, JudgeSpec
from common.section import Section


class JudgeConfig(Section):
    """A judge model behind an OpenAI-compatible address, such as that of `vllm serve`."""

    url: str
    """Such as "http://localhost:8000/v1"."""
    model: str
    prompt: str = PROMPT
    """Contains {completion}, and may contain {prompt} and {answer}. It asks for a last line such as "Score: 1"."""
    max_score: Annotated[float, Field(gt=0)] = 1.0
    """The score whose reward is 1; 0 is the lowest."""
    temperature: Annotated[float, Field(ge=0)] = 0.0
    max_tokens: Annotated[int, Field(ge=1)] = 2048
    """Of a reply."""
    request_timeout_seconds: Annotated[float, Field(gt=0, le=86_400)] = 60.0
    retries: Annotated[int, Field(ge=0, le=100)] = 5
    """After a request that failed for a reason that may pass, with growing pauses."""
    requests_per_minute: Annotated[float, Field(gt=0)] | None = None
    """At most, of all workers of a process together."""
    api_key_env: str = "OPENAI_API_KEY"
    """The environment variable that holds the key, where the address wants one."""

    @field_validator("url")
    @classmethod
    def _is_an_address(cls, url: str) -> str:
        if not url.startswith(("http://", "https://")):
            raise ValueError(f'should be an address such as "http://localhost:8000/v1", found {url!r}')
        return url

    @field_validator("prompt")
    @classmethod
    def _shows_the_completion(cls, prompt: str) -> str:
        if "{completion}" not in prompt:
            raise ValueError(f"should contain {{completion}}, found {prompt[:60]!r}")
        return prompt


class GraderConfig(Section):
    """Which grader, and what one worker process may use."""

    name: str | Annotated[list[str], Field(min_length=1)]
    """A rule, "judge" or the dotted path of a function; or several, whose rewards are added up."""
    weights: Annotated[list[float], Field(min_length=1)] | None = None
    """One per name; 1 each by default."""
    convention: Literal["plain", "trl", "verl", "verifiers"] | None = None
    """The calling convention of functions; by default recognised by their parameters' names (docs/rewards.md)."""
    columns: list[str] | None = None
    """The columns of the data set that functions with **kwargs get; by default all."""
    answer_after: str | None = None
    """The end of a reasoning model's thinking, such as "</think>": rules and the judge read the text after the last."""
    judge: JudgeConfig | None = None
    workers: int = Field(default=1, ge=1, le=1024)
    max_concurrent: int = Field(default=32, ge=1, le=4096)
    """Async functions and requests to the judge that are under way at a time, per worker."""
    timeout_seconds: float = Field(default=5.0, ge=0.1, le=86_400)
    memory_gib: float = Field(default=2.0, ge=0.5, le=65_536)

    @property
    def names(self) -> tuple[str, ...]:
        """The parts of the grader."""
        return (self.name,) if isinstance(self.name, str) else tuple(self.name)

    @property
    def title(self) -> str:
        """The grader's name in messages."""
        return repr(self.name)

    @property
    def reads_answer(self) -> bool:
        """Whether it needs reference answers that are texts; reward functions take any, or none."""
        asked = self.judge is not None and "{answer}" in self.judge.prompt
        return asked or any(name in RULES for name in self.names)

    @property
    def memory_bytes(self) -> int:
        """The address space of a worker."""
        return int(self.memory_gib * 1024**3)

    @field_validator("name")
    @classmethod
    def _known(cls, name: str | list[str]) -> str | list[str]:
        names = [name] if isinstance(name, str) else name
        for each in names:
            if not is_grader_name(each):
                raise ValueError(f"unknown grader {each!r}: use one of {KNOWN}, or 'package.module:function'")
        if twice := [each for each in names if names.count(each) > 1]:
            raise ValueError(f"{twice[0]!r} is there twice; name it once, with its weight in grader.weights")
        return name

    @model_validator(mode="after")
    def _rule_has_its_time(self) -> Self:
        for name in self.names:
            rule = RULES.get(name)
            if rule and self.timeout_seconds <= rule.own_seconds:
                raise ValueError(
                    f'timeout_seconds should be above {rule.own_seconds:g}, which the grader "{name}" gives a '
                    f"program itself, found {self.timeout_seconds:g}"
                )
        return self

    @model_validator(mode="after")
    def _parts_belong_together(self) -> Self:
        if self.weights is not None and len(self.weights) != len(self.names):
            raise ValueError(f"weights should be {len(self.names)}, one per name, found {len(self.weights)}")
        if (JUDGE in self.names) != (self.judge is not None):
            raise ValueError(
                'the name "judge" needs a section [grader.judge] with url and model'
                if self.judge is None
                else f'[grader.judge] would have no effect: name it, name = "judge", found {self.title}'
            )
        if not any(is_function(name) for name in self.names):
            self.refuse_unused(
                *("convention", "columns"), because="no reward function is named; leave it out, or name one"
            )
        if all(is_function(name) for name in self.names):
            self.refuse_unused(
                "answer_after",
                because="a reward function gets the whole completion; leave it out, or name a built-in grader",
            )
        return self

    @property
    def spec(self) -> GraderSpec:
        """The grader as a worker process is told it."""
        weights = self.weights or ([1.0] * len(self.names) if len(self.names) > 1 else [])
        judge = None
        if self.judge is not None:
            asked = self.judge.model_dump()
            if self.judge.requests_per_minute is not None:
                asked["requests_per_minute"] = self.judge.requests_per_minute / self.workers
            judge = JudgeSpec(**asked)
        return GraderSpec(
            names=self.names,
            weights=tuple(weights),
            convention=self.convention,
            answer_after=self.answer_after,
            judge=judge,
            max_concurrent=self.max_concurrent,
            timeout_seconds=self.timeout_seconds,
        )


def fingerprint(config: GraderConfig) -> str:
    """Name and version: two artifacts with equal fingerprints were graded by the same rule."""
    return Grader(config.spec).version
