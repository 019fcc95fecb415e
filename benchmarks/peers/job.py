"""The jobs and reports of trainers, as JSON; this module loads in TRL's environment and in ours."""

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

if TYPE_CHECKING:
    from stage2_train.config import Config


@dataclass(frozen=True, slots=True, kw_only=True)
class JsonFile:
    """Fields that go to a file and come back from it."""

    def write(self, file: Path) -> None:
        file.write_text(json.dumps(asdict(self)), encoding="utf-8")

    @classmethod
    def read(cls, file: Path) -> Self:
        document: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        return cls(**document)


@dataclass(frozen=True, slots=True, kw_only=True)
class Job(JsonFile):
    """A training run of TRL's."""

    trainer: str
    """a2po or grpo."""
    model: str
    prompts: list[dict[str, str]]
    """prompt (in its template) and answer."""
    weights: str
    """The folder for the weights at the end of some updates: <updates>.safetensors."""
    save_every: int
    """Updates between saved weights; 0 for none."""
    seed: int
    updates: int
    batch_size: int
    """Completions that GRPO generates at a time; A2PO generates one micro-batch at a time regardless."""
    mini_batch_size: int
    """Completions per update."""
    micro_batch_size: int
    """Completions per forward and backward pass."""
    max_prompt_tokens: int
    max_completion_tokens: int
    learning_rate: float
    warmup_steps: int
    adam_betas: tuple[float, float]
    weight_decay: float
    max_grad_norm: float
    gradient_checkpointing: bool
    beta1: float
    beta2: float
    num_samples: int
    vstar: float | None = None
    """V̂* of every prompt, in place of A2PO's stage 1."""
    completion_lengths: list[int] | None = None
    """The completion length of each prompt, in place of the model's own end."""

    @classmethod
    def like(cls, config: "Config", **own: Any) -> Self:
        """A job with the settings of one of our configs; the rest is its `own`."""
        from stage2_train.objectives import AStarPO

        train = config.train
        assert isinstance(train.objective, AStarPO), "A2PO is TRL's name of A*-PO"
        return cls(
            batch_size=train.batch_size,
            mini_batch_size=train.mini_batch_size,
            max_prompt_tokens=config.data.max_prompt_tokens,
            max_completion_tokens=config.sampling.max_completion_tokens,
            learning_rate=train.learning_rate,
            warmup_steps=train.warmup_steps,
            adam_betas=train.adam_betas,
            weight_decay=train.weight_decay,
            max_grad_norm=train.max_grad_norm,
            gradient_checkpointing=train.gradient_checkpointing,
            beta1=config.vstar.beta1,
            beta2=train.objective.beta2,
            num_samples=config.vstar.num_samples,
            **own,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Report(JsonFile):
    """A run's report. Times are seconds since the epoch, minus those spent on saving weights."""

    imported: float
    began: float
    """Stage 1 done, training about to begin."""
    updates: list[float]
    """The end of each update; of ours, of each iteration."""
    generate_seconds: float
    """Spent in `generate` while training."""
    imports_mib: float
    """Resident memory once the libraries are loaded."""


@dataclass(frozen=True, slots=True, kw_only=True)
class GRPOSteps(JsonFile):
    """Optimizer steps of GRPO, all on the same numbers, and TRL's result for each once it has run."""

    group_size: int
    lengths: list[int]
    """The tokens of each completion, group after group; numbers of tokens stand one completion after the other."""
    rewards: list[float]
    logprobs: list[float]
    old: list[float]
    reference: list[float]
    options: list[dict[str, Any]]
    """The settings of each step, in the words of TRL's GRPOConfig."""
    trl: str = ""
    """Its version."""
    advantages: list[list[float]] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    gradients: list[list[float]] = field(default_factory=list)
    """The gradient with respect to each token's log-prob."""
