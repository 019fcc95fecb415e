"""The configuration of a whole run: the settings of both stages, including stage 2's. Imports no torch."""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from common.config import RunConfig, read_config
from common.section import Section
from stage2_train.objectives import AStarPO, ObjectiveConfig
from stage2_train.objectives.protocol import STAGE1_COLUMNS, Column

Decay = Annotated[float, Field(ge=0, lt=1)]
"""The decay of a moving average."""


class LoraConfig(Section):
    """Train small matrices beside frozen linear layers, W + (alpha / rank) B A, instead of the layers themselves."""

    rank: Annotated[int, Field(ge=1)] = 16
    alpha: Annotated[int, Field(ge=1)] = 32
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    target_modules: Literal["all-linear"] | Annotated[tuple[str, ...], Field(min_length=1)] = "all-linear"
    """The last part of the layers' names, such as ["q_proj", "v_proj"]; by default all but the output layer."""
    in_engine: Literal["adapter", "merged"] | None = None
    """How vLLM gets it: by itself, which leaves the weights as they are (the default), or merged into them, which loses
    small updates in bfloat16."""


class TrainConfig(Section):
    """Stage 2. The defaults are the paper's (Appendix A.5)."""

    objective: ObjectiveConfig = AStarPO()
    learning_rate: Annotated[float, Field(gt=0)] = 1e-6
    batch_size: Annotated[int, Field(ge=1)] = 256
    """Prompts per iteration, each with `objective.group_size` completions; for direct_advantage states."""
    mini_batch_size: Annotated[int, Field(ge=1)] = 128
    """Prompts per optimizer step, with all of their completions, which are never split; for direct_advantage states."""
    rollouts: Literal["policy", "stage1"] = "policy"
    """Where completions come from: the current policy draws them, or they are the samples behind V̂*, and no engine is
    loaded."""
    staleness: Annotated[int, Field(ge=0)] = 0
    """By how many iterations the weights that draw completions may lag; above 0, drawing overlaps training."""
    epochs: Annotated[int, Field(ge=1)] = 25
    iterations: Annotated[int, Field(ge=1)] | None = None
    """Stop after this many iterations; overrides `epochs`."""
    warmup_steps: Annotated[int, Field(ge=0)] = 0
    """Optimizer steps of linear warm-up; constant after it."""
    adam_betas: tuple[Decay, Decay] = (0.9, 0.999)
    weight_decay: Annotated[float, Field(ge=0)] = 0.01
    max_grad_norm: Annotated[float, Field(gt=0)] = 1.0
    tokens_per_micro_batch: Annotated[int, Field(ge=1)] = 16384
    """Prompt and completion tokens, padding included, in one forward and backward pass."""
    zero_stage: Literal[0, 1, 2, 3] = 2
    gradient_checkpointing: bool = True
    """Compute activations again in the backward pass instead of keeping them."""
    lora: LoraConfig | None = None
    offload_optimizer: bool = False
    """Keep the optimizer's states in the host's memory and step there."""
    offload_reference: bool = False
    """Keep the reference model in the host's memory, except while it computes log-probs."""
    hang_minutes: Annotated[float, Field(gt=0)] = 60.0
    """A job in which a rank takes longer for one phase of an iteration is taken to hang, and ended."""
    checkpoint_every: Annotated[int, Field(ge=1)] = 50
    """Iterations between checkpoints."""
    keep_checkpoints: Annotated[int, Field(ge=1)] = 2
    evaluate_every: Annotated[int, Field(ge=1)] = 10
    """Iterations between evaluations on held-out prompts."""
    wandb_project: str | None = None

    @model_validator(mode="after")
    def _mini_batches_fill_the_batch(self) -> "TrainConfig":
        if self.batch_size % self.mini_batch_size:
            raise ValueError(
                f"batch_size {self.batch_size} is not a multiple of mini_batch_size {self.mini_batch_size}"
            )
        return self

    @model_validator(mode="after")
    def _completions_are_of_the_weights_that_the_objective_is_for(self) -> "TrainConfig":
        if self.staleness and not self.objective.allows_staleness:
            raise ValueError(
                f"staleness {self.staleness} draws completions from older weights, which the objective "
                f"{self.objective.name} is not for; set it to 0"
            )
        if self.rollouts == "stage1" and not self.objective.allows_staleness:
            raise ValueError(
                'rollouts = "stage1" trains on completions of the reference, which the objective '
                f"{self.objective.name} is not for; leave it out"
            )
        if self.rollouts == "stage1":
            self.refuse_unused("staleness", because='rollouts = "stage1" draws nothing; leave it out')
        return self

    @property
    def steps_per_iteration(self) -> int:
        """Optimizer steps on one batch."""
        return self.objective.passes * (self.batch_size // self.mini_batch_size)

    def iterations_over(self, prompts: int) -> int:
        """The configured number, or the batches in which each prompt is seen `epochs` times."""
        return self.iterations or max(1, self.epochs * prompts // self.batch_size)

    @property
    def columns(self) -> frozenset[Column]:
        """The columns that the objective needs."""
        return self.objective.needs(self.steps_per_iteration)

    @property
    def reads_stage1(self) -> bool:
        """Whether training needs stage 1's file."""
        return self.rollouts == "stage1" or not self.columns.isdisjoint(STAGE1_COLUMNS)

    @property
    def reads_advantages(self) -> bool:
        """Whether the objective learns from the table of advantages, and draws nothing."""
        return "advantage" in self.columns

    @property
    def draws(self) -> bool:
        """Whether the policy draws what it is trained on; if not, files have it, and there is no engine."""
        return self.rollouts == "policy" and not self.reads_advantages

    @model_validator(mode="after")
    def _there_is_something_to_offload(self) -> "TrainConfig":
        if self.offload_optimizer and self.zero_stage == 0:
            raise ValueError(
                "offload_optimizer needs ZeRO, found zero_stage 0; choose zero_stage 1, 2 or 3, or leave it out"
            )
        if self.offload_reference and self.lora is not None:
            raise ValueError(
                "offload_reference has nothing to move under lora, whose reference is the policy without its "
                "adapter; leave one of them out"
            )
        if self.offload_reference and "reference" not in self.columns:
            raise ValueError(
                f"offload_reference has nothing to move: the objective {self.objective.name} has no reference; "
                "leave it out"
            )
        return self


class Config(RunConfig):
    """One run whole: artifacts/<run>."""

    train: TrainConfig = TrainConfig()

    @property
    def engine_takes_adapter(self) -> bool:
        """Whether training gives its engine an adapter, and not whole weights."""
        lora = self.train.lora
        return lora is not None and self.engine.backend == "vllm" and lora.in_engine != "merged"

    @model_validator(mode="after")
    def _only_vllm_takes_an_adapter(self) -> Self:
        lora = self.train.lora
        if lora is not None and lora.in_engine == "adapter" and self.engine.backend != "vllm":
            raise ValueError(
                f'train.lora.in_engine = "adapter" needs engine.backend vllm, found {self.engine.backend}; leave it out'
            )
        return self

    @property
    def before_training(self) -> list[str]:
        """The commands that make the table that training reads in the run's folder, in their order."""
        if self.train.reads_advantages:
            critic = ["critic"] if self.advantages.values == "critic" else []
            return ["segments", *critic, "advantages"]
        return ["vstar"] if self.train.reads_stage1 else []

    @model_validator(mode="after")
    def _stage1_keeps_what_training_reads(self) -> Self:
        if self.train.rollouts == "stage1" and not self.vstar.keep_token_ids:
            raise ValueError(
                'train.rollouts = "stage1" reads the token ids of stage 1\'s samples, which it keeps only with '
                "vstar.keep_token_ids = true; set it before `vstar` draws them"
            )
        return self

    @model_validator(mode="after")
    def _every_key_has_an_effect(self) -> Self:
        if self.evaluate.data is None:
            self.train.refuse_unused(
                "evaluate_every",
                because="there are no held-out prompts; add a section [evaluate.data], or leave it out of [train]",
            )
        return self

    @model_validator(mode="after")
    def _deepspeed_can_train(self) -> "Config":
        if self.model.dtype == "bfloat16" and self.train.zero_stage == 0:
            raise ValueError(
                "train.zero_stage 0 cannot be combined with model.dtype bfloat16: DeepSpeed's optimizer for it takes a "
                "step before the first gradient; choose zero_stage 1, which needs no more memory, or dtype float32"
            )
        return self

    @model_validator(mode="after")
    def _one_thread_speaks_to_other_ranks(self) -> "Config":
        if self.engine.training_tensor_parallel_size > 1 and self.train.staleness > 0:
            raise ValueError(
                f"train.staleness {self.train.staleness} cannot be combined with engine.training_tensor_parallel_size "
                f"{self.engine.training_tensor_parallel_size}: the engine's and the trainer's collective operations "
                "could wait for each other; set one of them to its default"
            )
        return self

    @model_validator(mode="after")
    def _engine_has_time_to_sleep(self) -> "Config":
        if self.engine.sleep_while_training and self.train.staleness > 0:
            raise ValueError(
                f"engine.sleep_while_training leaves no time to draw ahead, found train.staleness "
                f"{self.train.staleness}; set one of them to its default"
            )
        return self


def load_config(path: Path, overrides: Sequence[str] = (), run: str | None = None) -> Config:
    """The run that a TOML file describes, with `--set` overrides and `--run`. Raises UserError, see `read_config`."""
    return read_config(Config, path, overrides, run)


def load_with_inputs(
    path: Path, overrides: Sequence[str] = (), run: str | None = None
) -> tuple[Config, Sequence[str]]:
    """A run's config, and the commands that make what its training reads; see `load_config`."""
    settings = load_config(path, overrides, run)
    return settings, settings.before_training
