"""The settings of the step-level method, Direct Advantage Policy Optimization: [segments], [critic], [advantages]."""

from typing import Annotated, Any, Literal, Self, cast, get_args

from pydantic import BeforeValidator, Field, model_validator

from common.errors import UserError
from common.section import Section

SEPARATORS: dict[str, tuple[str, ...]] = {
    "line": ("\n",),
    "paragraph": ("\n\n",),
    "sentence": (". ", "! ", "? ", ".\n", "!\n", "?\n"),
}
"""The rules for steps that have a name: the texts that end a step."""

Values = Literal["critic", "monte_carlo"]
"""Where the values of next steps come from."""


def known_values(name: str) -> Values:
    """The name, if values can come from there. Raises UserError otherwise."""
    for known in get_args(Values):
        if name == known:
            return cast(Values, known)
    raise UserError(f"there are no values of {name}; choose one of {', '.join(get_args(Values))}")


def _known_rule(value: Any) -> Any:
    if isinstance(value, str) and value not in SEPARATORS:
        raise ValueError(
            f'should be one of {", ".join(SEPARATORS)}, or a list of texts that end a step, found "{value}"'
        )
    return value


class SegmentsConfig(Section):
    """States of solutions, and Monte-Carlo values of them. The defaults are the paper's."""

    may_be_blank = ("split",)

    solutions: Annotated[int, Field(ge=1, le=1_000_000)] = 128
    """Solutions of each prompt that the reference draws, from which the cut ones are chosen."""
    chosen: Annotated[int, Field(ge=1)] = 6
    """Solutions of each prompt that are cut into steps: as many correct as wrong ones, if there are enough."""
    completions: Annotated[int, Field(ge=2, le=100_000)] = 16
    """Completions from each state; their mean reward is its Monte-Carlo value."""
    split: Annotated[str | tuple[str, ...], BeforeValidator(_known_rule)] = "line"
    """What ends a step: "line", "paragraph", "sentence", or texts of your own."""
    completer: str | None = None
    """The model that completes the states; by default the reference."""

    @property
    def separators(self) -> tuple[str, ...]:
        """The texts that end a step."""
        return SEPARATORS[self.split] if isinstance(self.split, str) else self.split

    @model_validator(mode="after")
    def _enough_to_choose_from(self) -> Self:
        if self.chosen > self.solutions:
            raise ValueError(
                f"chosen {self.chosen} is more than the {self.solutions} solutions that are drawn"
            )
        if not self.separators:
            raise ValueError("split should have a text that ends a step, found none")
        return self


class CriticConfig(Section):
    """The critic V_φ, which learns the Monte-Carlo values. The defaults are the paper's."""

    model: str | None = None
    """The model that it starts from; by default the reference."""
    learning_rate: Annotated[float, Field(gt=0)] = 5e-6
    batch_size: Annotated[int, Field(ge=1)] = 512
    """States per optimizer step."""
    epochs: Annotated[int, Field(ge=1)] = 1
    held_out: Annotated[float, Field(ge=0, lt=1)] = 0.05
    """The share of prompts whose states it is tested on, not trained on."""


CRITIC_TRAIN_KEYS = frozenset(
    {
        *("warmup_steps", "adam_betas", "weight_decay", "max_grad_norm"),
        *("zero_stage", "lora", "offload_optimizer"),
    }
)
"""The keys of [train] that shape a critic too."""


class AdvantagesConfig(Section):
    """Advantages of next steps. The defaults are the paper's."""

    values: Values = "critic"
    """Values of next steps are the critic's, or the Monte-Carlo values of the completions that begin with them."""
    min_gap: Annotated[float, Field(ge=0)] = 0.1
    """Train on states whose highest and lowest advantage differ by at least this much."""
    unique: bool = True
    """Train on each next step of a state once, not as often as it was drawn."""
