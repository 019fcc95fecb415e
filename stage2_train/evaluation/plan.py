"""The benchmarks of a config and the completions to draw for them, read and checked before a model loads."""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from common.config import HELD_OUT, DataConfig, SamplingParams
from common.data.prompts import check_fit, load_prompts, refuse_none_usable, usable_prompts
from common.data.rendering import PromptRenderer
from common.errors import UserError
from common.grading import GraderConfig, GraderPool
from common.model.files import model_identity
from common.model.reading import ModelReading
from common.model.trainable import read_sampled
from common.model.weights import read_weights, weights_hash
from common.rollout import Prompt
from common.runs import run_paths
from stage2_train.config import Config

GREEDY, SAMPLED, POLICY = "greedy", "sampled", "policy"
"""Kinds of completions: the third are drawn as in training, for KL, if the second are not."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Draw:
    """Completions to have of each prompt of a benchmark."""

    kind: str
    sampling: SamplingParams
    num_samples: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Benchmark:
    """A benchmark of the config."""

    name: str
    data: DataConfig
    grader: GraderConfig
    draws: Mapping[str, Draw]
    """By kind; `POLICY` among them if KL needs it."""
    every: int | None = None
    """Iterations between evaluations during training."""

    @property
    def kl_draw(self) -> Draw:
        """The completions that KL is measured on, which are drawn from the distribution that is trained."""
        return self.draws.get(POLICY) or self.draws[SAMPLED]


@dataclass(frozen=True, slots=True, kw_only=True)
class Model:
    """A model to evaluate, with the prompts of each benchmark as its tokenizer renders them."""

    name: str
    folder: Path
    identity: dict[str, Any]
    quantisation: str | None
    """What says that its weights are quantised; None if they are not."""
    renderers: Mapping[str, PromptRenderer]
    prompts: dict[str, list[Prompt]] = field(default_factory=dict)


def benchmarks_of(
    config: Config, chosen: Collection[str] = (), *, must_exist: bool = True
) -> list[Benchmark]:
    """The config's benchmarks, or those of these names. Raises UserError if there are none, or for another name."""
    found: dict[str, Benchmark] = {}
    if config.held_out is not None:
        found[HELD_OUT] = Benchmark(
            name=HELD_OUT,
            data=config.held_out,
            grader=config.grader,
            draws=_draws(config, config.sampling, greedy=True, num_samples=config.evaluate.num_samples),
        )
    for name, each in config.evaluate.benchmarks.items():
        found[name] = Benchmark(
            name=name,
            data=config.shown_alike(each.data),
            grader=each.grader or config.grader,
            every=each.every,
            draws=_draws(config, config.sampling_of(each), greedy=each.greedy, num_samples=each.num_samples),
        )
    if not found and must_exist:
        raise UserError(
            "the config has neither [evaluate.data] nor [evaluate.benchmarks.<name>]: say which prompts to use"
        )
    if unknown := [name for name in chosen if name not in found]:
        raise UserError(f"the config has no benchmark {unknown[0]!r}; use one of {', '.join(found)}")
    return [each for name, each in found.items() if not chosen or name in chosen]


def shots_of(config: Config) -> dict[str, int]:
    """The number of examples in the prompts of each benchmark."""
    return {each.name: len(each.data.few_shot or ()) for each in benchmarks_of(config)}


def _draws(config: Config, sampling: SamplingParams, *, greedy: bool, num_samples: int) -> dict[str, Draw]:
    draws: dict[str, Draw] = {}
    if greedy:
        params = SamplingParams(
            temperature=0.0, max_completion_tokens=sampling.max_completion_tokens, stop=sampling.stop
        )
        draws[GREEDY] = Draw(kind=GREEDY, sampling=params, num_samples=1)
    if num_samples:
        draws[SAMPLED] = Draw(kind=SAMPLED, sampling=sampling, num_samples=num_samples)
    if not num_samples or sampling != config.sampling:
        draws[POLICY] = Draw(kind=POLICY, sampling=config.sampling, num_samples=1)
    return draws


def read_model(
    config: Config,
    name: str,
    folder: Path,
    benchmarks: Sequence[Benchmark],
    read: Callable[[Path, Config], ModelReading] = read_sampled,
) -> Model:
    """A model without its prompts. Raises UserError if it cannot be used, as `read` decides."""
    known = run_paths(config.run).known_weights
    reading = read(folder, config)
    weights_hash(read_weights(folder), known)  # refuses weights that are not finite
    renderers = {each.name: PromptRenderer(folder, each.data) for each in benchmarks}
    return Model(
        name=name,
        folder=folder,
        identity=model_identity(folder, known),
        quantisation=reading.quantisation,
        renderers=renderers,
    )


def models_of(config: Config, folders: Mapping[str, Path], benchmarks: Sequence[Benchmark]) -> list[Model]:
    """The models by name, with their prompts of each benchmark.

    Raises UserError for a model or a benchmark that cannot be used, or a prompt that a model has no room for.
    """
    models = [read_model(config, name, folder, benchmarks) for name, folder in folders.items()]
    for benchmark in benchmarks:
        _read_prompts(config, models, benchmark)
    return models


def _read_prompts(config: Config, models: Sequence[Model], benchmark: Benchmark) -> None:
    """Read a benchmark's prompts, once per tokenizer, and try its grader out on their reference answers."""
    by_rendering: dict[str, list[Prompt]] = {}
    for model in models:
        renderer = model.renderers[benchmark.name]
        rendering = f"{model.identity['tokenizer']} {renderer.identity()}"
        if rendering not in by_rendering:
            own = config.model_copy(update={"grader": benchmark.grader})
            prompts = load_prompts(benchmark.data, own, renderer)
            with GraderPool(benchmark.grader) as pool:
                prompts = usable_prompts(prompts, benchmark.data, pool)
            refuse_none_usable(prompts, benchmark.data)
            by_rendering[rendering] = prompts
        model.prompts[benchmark.name] = by_rendering[rendering]
        check_fit(by_rendering[rendering], roomy(config, [benchmark]), model.folder, benchmark.data)


def roomy(config: Config, benchmarks: Sequence[Benchmark]) -> Config:
    """The config with room in the engine for the longest prompts and completions of these benchmarks."""
    longest = max(draw.sampling.max_completion_tokens for each in benchmarks for draw in each.draws.values())
    data = config.data.model_copy(
        update={"max_prompt_tokens": max(each.data.max_prompt_tokens for each in benchmarks)}
    )
    sampling = config.sampling.model_copy(update={"max_completion_tokens": longest})
    evaluate = config.evaluate.model_copy(update={"data": None, "benchmarks": {}})
    return config.model_copy(update={"data": data, "sampling": sampling, "evaluate": evaluate})
