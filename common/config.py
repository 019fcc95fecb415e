"""A run's configuration: written as TOML by hand, validated as a whole, dumped as JSON.

The settings and defaults that both stages read are here; those of training are in stage2_train/config.py and in the
objectives. Values are checked where they are declared. Checks that need a file or a model (does the data exist, does
the prompt fit the context) belong to the stage that needs it, before it loads one.
"""

import math
import re
import tomllib
from collections.abc import Mapping, Sequence
from glob import has_magic
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Self, TypeVar, get_args

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    Field,
    JsonValue,
    PrivateAttr,
    ValidationError,
    model_validator,
)

from common.errors import UserError
from common.grading import GraderConfig
from common.remote.copies import fetched
from common.runs import NAME_RULE, RUN_NAME
from common.section import Section
from common.segments.config import AdvantagesConfig, CriticConfig, SegmentsConfig


def _not_nan(value: float) -> float:
    if math.isnan(value):
        raise ValueError("must be a number, found nan")
    return value


Beta1 = Annotated[float, Field(ge=0, allow_inf_nan=True), AfterValidator(_not_nan)]
"""β1 in [0, inf]: 0 is the best reward, inf the mean."""

Seed = Annotated[int, Field(ge=0, lt=2**32)]
"""32 bits, as the libraries take them."""

NumSamples = Annotated[int, Field(ge=1, le=1_000_000)]
"""Completions per prompt; each takes some memory."""

LOWEST_TEMPERATURE = 0.01
"""The lowest temperature above 0: below it vLLM samples at this one."""

LOCAL_FILES = (".jsonl", ".json", ".parquet", ".csv", ".tsv", ".ndjson", ".pq", ".arrow")
"""Endings of data files on this machine, in upper or lower case."""

COMPRESSED = {".gz": "gzip", ".zst": "zstd", ".bz2": "bz2"}
"""Endings of compressed files, and pyarrow's names for them."""


def data_suffix(name: str) -> str:
    """The ending of a data file's name, in lower case and without that of its compression."""
    suffixes = [suffix.lower() for suffix in Path(name).suffixes]
    if suffixes and suffixes[-1] in COMPRESSED:
        suffixes.pop()
    return suffixes[-1] if suffixes else ""


def _is_path_or_paths(value: Any) -> Any:
    if not isinstance(value, str) and not (
        isinstance(value, list) and all(isinstance(each, str) for each in value)
    ):
        raise ValueError(f"should be a path or a list of paths, found {value!r}")
    return value


PATH_ADVICE = f"give a {', '.join(LOCAL_FILES[:4])} file, a folder of them, or a hub data set's name"


class ModelConfig(Section):
    """The reference policy: stage 1 samples from it; stage 2 starts at it and measures KL against it."""

    path: str
    """A folder in Hugging Face format ({run} stands for artifacts/<run>), or a name on the Hugging Face hub."""
    revision: str | None = None
    dtype: Literal["float32", "bfloat16"] = "bfloat16"


class FewShot(Section):
    """An example of a question and its answer, shown before each prompt."""

    prompt: str
    completion: str


class DataConfig(Section):
    """Where prompts come from and how they are shown to the model."""

    _section: str = PrivateAttr("data")
    may_be_blank: ClassVar[tuple[str, ...]] = ("prefill",)
    chat_only: ClassVar[tuple[str, ...]] = ("system_prompt", "chat_template_kwargs")
    """Keys that a text template has no place for."""
    shown: ClassVar[tuple[str, ...]] = ("template", "instruction", "few_shot", "prefill", *chat_only)
    """The keys that say how prompts are shown: [evaluate.data] takes those of [data] that it does not set."""

    format: Literal["auto", "gsm8k", "math", "openr1", "generic", "word_problems", "mbpp"] = "auto"
    """"auto" recognises other projects' formats too, by their columns (docs/data.md)."""
    path: Annotated[str | list[str], BeforeValidator(_is_path_or_paths)] = ""
    """Local files, a folder or a pattern such as data/*.jsonl, or a data set's name on the Hugging Face hub."""
    name: str | None = None
    """The hub data set's configuration, such as "main"."""
    split: str = "train"
    """The split of a hub data set, or of a folder whose file names say train, validation or test."""
    prompt_field: str | None = None
    """The column of prompts, or a dotted path to them, such as extra_info.question."""
    answer_field: str | None = None
    template: str | None = None
    """A named template or a text containing {prompt}; by default the format's own (the paper's Table 4)."""
    system_prompt: str | None = None
    """A first turn of the system, where a prompt has none of its own."""
    instruction: str | None = None
    """A line after each question, such as how to mark the answer."""
    few_shot: list[FewShot] | None = None
    """Examples, shown before each prompt."""
    chat_template_kwargs: dict[str, JsonValue] | None = None
    """Arguments of the chat template, such as enable_thinking."""
    prefill: str | None = None
    """The beginning of each completion, given to the model as part of the prompt."""
    limit: Annotated[int, Field(ge=1)] | None = None
    """Take this many prompts, chosen at random by `seed`; all of them in file order by default."""
    seed: Seed = 0
    max_prompt_tokens: Annotated[int, Field(ge=1)] = 256
    long_prompts: Literal["error", "drop"] = "error"
    bad_golds: Literal["error", "drop"] = "error"
    """Rows without a prompt, or without a reference answer that the grader can use."""

    @property
    def section(self) -> str:
        """Its name in the TOML file, for messages."""
        return self._section

    @property
    def is_file(self) -> bool:
        """Whether `path` names files on this machine, not a folder or a data set of the hub."""
        if not isinstance(self.path, str):
            return True
        return data_suffix(self.path) in LOCAL_FILES or has_magic(self.path)

    @property
    def title(self) -> str:
        """The data set's name in messages."""
        if not isinstance(self.path, str):
            return ", ".join(self.path[:3]) + (", …" if len(self.path) > 3 else "")
        return self.path or self.format

    @model_validator(mode="after")
    def _every_key_has_an_effect(self) -> Self:
        if self.format == "word_problems":
            self.refuse_unused(
                *("path", "name", "prompt_field", "answer_field", "seed"),
                because="word_problems are made up from the run's seed; leave it out, or choose another format",
            )
            if self.split not in ("train", "test"):
                raise ValueError(f'word_problems have the splits "train" and "test", found "{self.split}"')
        is_empty = not self.path or not all(self.path)
        if self.format != "word_problems" and is_empty and "path" in self.model_fields_set:
            raise ValueError(f"path should not be empty; {PATH_ADVICE}")
        if self.is_file:
            self.refuse_unused(
                *("name", "split"),
                because=f"{self.title} is a local file, which is read whole; leave it out and give a file that holds "
                "the rows you mean (name and split choose from a data set of the hub)",
            )
        if self.limit is None:
            self.refuse_unused(
                "seed",
                because="it chooses the prompts that `limit` takes, and there is no limit; set one, or leave it out",
            )
        return self


class HeldOutConfig(DataConfig):
    """Prompts that are not trained on."""

    _section: str = PrivateAttr("evaluate.data")


LATER = ("top_k", "min_p", "stop")
"""Keys of [sampling] that the identity of older samples lacks; 0 or empty means off."""


class SamplingParams(Section):
    """The distribution that completions are drawn from, in both stages; temperature 0 is greedy."""

    may_be_blank: ClassVar[tuple[str, ...]] = ("stop",)
    cuts: ClassVar[tuple[str, ...]] = ("top_p", "top_k", "min_p")
    """The keys that remove tokens from the model's distribution."""

    temperature: Annotated[float, Field(ge=0)] = 1.0
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Sample from the most probable tokens that together have this probability; 1 keeps all tokens."""
    top_k: Annotated[int, Field(ge=0)] = 0
    """Sample from this many of the most probable tokens; 0 keeps all."""
    min_p: Annotated[float, Field(ge=0, le=1)] = 0.0
    """Sample from tokens with at least this fraction of the highest probability; 0 keeps all."""
    max_completion_tokens: Annotated[int, Field(ge=1)] = 1024
    stop: Annotated[tuple[str, ...], Field(max_length=16)] = ()
    """Texts that end a completion: its last token completes one of them, and its text ends before it."""

    @model_validator(mode="after")
    def _is_a_distribution_that_engines_draw_from(self) -> Self:
        if 0 < self.temperature < LOWEST_TEMPERATURE:
            raise ValueError(
                f"temperature should be 0 or at least {LOWEST_TEMPERATURE}, which vLLM would sample at instead, "
                f"found {self.temperature!r}"
            )
        if self.temperature == 0:
            self.refuse_unused(
                *self.cuts, because="temperature 0 takes the most probable token; raise it, or leave it out"
            )
        return self

    @property
    def cut_by(self) -> dict[str, float]:
        """The settings that remove tokens from the model's distribution, with their values."""
        fields = type(self).model_fields
        return {key: getattr(self, key) for key in self.cuts if getattr(self, key) != fields[key].default}

    def identity(self) -> dict[str, Any]:
        """The settings that samples of one distribution share; LATER keys are included only if set."""
        return {
            key: value for key, value in self.model_dump(mode="json").items() if key not in LATER or value
        }


class EngineConfig(Section):
    """The rollout engine of both stages."""

    backend: Literal["vllm", "transformers"] = "vllm"
    engines: Annotated[int, Field(ge=1)] | Literal["auto"] = "auto"
    """Engines on this machine, each a process with GPUs of its own, or a share of the cores."""
    placement: Literal["inside", "own processes"] = "inside"
    """Where the engines of training are: one in each of its processes, or beside them, on the GPUs that they leave."""
    max_num_seqs: Annotated[int, Field(ge=1)] = 256
    gpu_memory_utilization: Annotated[float, Field(gt=0, le=1)] = 0.9
    training_gpu_memory_utilization: Annotated[float, Field(gt=0, le=1)] = 0.4
    """The engine's share of a GPU if the trainer uses the GPU too."""
    cpu_kv_cache_gib: Annotated[float, Field(gt=0)] = 1.0
    """Size of the key-value cache on a CPU, allocated at the start; engines of one process share it."""
    tensor_parallel_size: Annotated[int, Field(ge=1)] = 1
    """GPUs per engine that is a process of its own."""
    training_tensor_parallel_size: Annotated[int, Field(ge=1)] = 1
    """Processes per engine in stage 2; 1 unless the model does not fit one GPU."""
    hang_minutes: Annotated[float, Field(gt=0)] = 30.0
    """An engine in a process of its own that finishes nothing for so long is taken to hang, and started again."""
    sleep_while_training: bool = False
    """Free the engine's GPU memory while the trainer works; has no effect on a CPU."""
    enforce_eager: bool = False

    @model_validator(mode="after")
    def _every_key_has_an_effect(self) -> Self:
        if self.backend != "vllm":
            self.refuse_unused(
                *(
                    key
                    for key in type(self).model_fields
                    if key not in ("backend", "engines", "placement", "max_num_seqs", "hang_minutes")
                ),
                because=f"such settings need backend vllm, found {self.backend}; leave them out",
            )
        if self.placement == "own processes":
            self.refuse_unused(
                *("training_gpu_memory_utilization", "training_tensor_parallel_size", "sleep_while_training"),
                because='such settings are for engines inside training, found placement "own processes"; leave them '
                "out",
            )
        return self


class VstarConfig(Section):
    """Stage 1."""

    num_samples: NumSamples = 8
    beta1: Beta1 = 0.5
    drop_unsolved: bool = False
    """Exclude prompts with pass@N = 0 from training (the paper's optional line 6)."""
    keep_token_ids: bool = False
    """Store the token ids of samples too, which `train.rollouts = "stage1"` trains on."""


HELD_OUT = "held_out"
"""The benchmark that [evaluate.data] makes."""


class BenchmarkConfig(Section):
    """Prompts to evaluate on, with a grader and a way of sampling of their own."""

    data: HeldOutConfig
    grader: GraderConfig | None = None
    """By default the run's."""
    sampling: SamplingParams | None = None
    """Of the sampled completions; keys that are not set are the run's. Greedy ones take its length and stop strings."""
    greedy: bool = True
    """Whether to draw a greedy completion per prompt."""
    num_samples: Annotated[int, Field(ge=0, le=1_000_000)] = 0
    """Sampled completions per prompt, for avg@k and pass@k."""
    every: Annotated[int, Field(ge=1)] | None = None
    """Iterations between evaluations during training; by default there are none."""

    @model_validator(mode="after")
    def _something_is_drawn(self) -> Self:
        if not self.greedy and self.num_samples == 0:
            raise ValueError("greedy = false and num_samples = 0 draw nothing: set one of them")
        return self


class EvaluateConfig(Section):
    """Evaluation of models on prompts that are not trained on."""

    data: HeldOutConfig | None = None
    """Held-out prompts like those of [data]: the benchmark "held_out"."""
    benchmarks: dict[str, BenchmarkConfig] = Field(default_factory=dict)
    """Others by name."""
    num_samples: NumSamples = 8
    """Sampled completions per prompt, for pass@1 and pass@k."""
    training_prompts: Annotated[int, Field(ge=1)] = 256
    """Held-out prompts for the evaluations during training, one sampled completion each."""

    @model_validator(mode="after")
    def _benchmarks_have_names(self) -> Self:
        for name, benchmark in self.benchmarks.items():
            if not re.fullmatch(RUN_NAME, name) or name == HELD_OUT:
                raise ValueError(
                    'a benchmark should have a name of letters, digits, ".", "_" and "-", other than '
                    f'"{HELD_OUT}", which [evaluate.data] is; found "{name}"'
                )
            benchmark.data._section = f"evaluate.benchmarks.{name}.data"
        return self

    @model_validator(mode="after")
    def _every_key_has_an_effect(self) -> Self:
        if self.data is None:
            self.refuse_unused(
                *("num_samples", "training_prompts"),
                because="there are no held-out prompts; add a section [evaluate.data], or leave it out",
            )
        return self


class RunConfig(Section):
    """One run, artifacts/<run>: the sections that both stages read. Stage 2 adds its own (stage2_train/config.py)."""

    run: Annotated[str, Field(pattern=RUN_NAME)]
    seed: Seed = 0
    model: ModelConfig
    data: DataConfig
    sampling: SamplingParams = SamplingParams()
    grader: GraderConfig
    engine: EngineConfig = EngineConfig()
    vstar: VstarConfig = VstarConfig()
    evaluate: EvaluateConfig = EvaluateConfig()
    segments: SegmentsConfig = SegmentsConfig()
    critic: CriticConfig = CriticConfig()
    advantages: AdvantagesConfig = AdvantagesConfig()

    @property
    def held_out(self) -> DataConfig | None:
        """[evaluate.data], with the keys of [data] for how prompts are shown if it does not set its own."""
        return None if self.evaluate.data is None else self.shown_alike(self.evaluate.data)

    @property
    def during_training(self) -> dict[str, BenchmarkConfig]:
        """The benchmarks that training evaluates too."""
        return {name: each for name, each in self.evaluate.benchmarks.items() if each.every is not None}

    @property
    def is_evaluated(self) -> bool:
        """Whether there is anything to evaluate models on."""
        return self.evaluate.data is not None or bool(self.evaluate.benchmarks)

    def sampling_of(self, benchmark: BenchmarkConfig) -> SamplingParams:
        """A benchmark's sampling, with the run's values of the keys that it does not set."""
        own = benchmark.sampling
        if own is None:
            return self.sampling
        values = self.sampling.model_dump() | {key: getattr(own, key) for key in own.model_fields_set}
        if values["temperature"] == 0:
            values = {key: value for key, value in values.items() if key not in own.cuts}
        return SamplingParams.model_validate(values)

    def shown_alike(self, data: DataConfig) -> DataConfig:
        """The same prompts, shown as those of [data] unless they set their own keys for it."""
        inherited = set(data.shown)
        if data.template not in (None, "chat"):
            inherited -= set(data.chat_only)
        update = {key: getattr(self.data, key) for key in inherited if getattr(data, key) is None}
        return data.model_copy(update=update)

    def to_json(self) -> str:
        """Every value, defaults included."""
        return self.model_dump_json(indent=2)


Run = TypeVar("Run", bound=Section)


def read_config(kind: type[Run], path: Path, overrides: Sequence[str] = (), run: str | None = None) -> Run:
    """Read a TOML file as a document of that kind, apply `--set section.key=value` overrides, validate the whole.

    Raises UserError naming the file, each wrong key and what was found there.
    """
    document = _document(path, examples="configs/studies/*.toml" if _is_study(kind) else "configs/*.toml")
    _refuse_other_kind(document, kind, path)
    for override in overrides:
        _apply_override(document, override)
    if run is not None:
        document["run"] = run
    try:
        return kind.model_validate(document)
    except ValidationError as error:
        raise UserError(f"{path}: {_describe(error, kind)}") from error


def _is_study(kind: type[BaseModel]) -> bool:
    return "study" in kind.model_fields


def _refuse_other_kind(document: Mapping[str, Any], kind: type[BaseModel], path: Path) -> None:
    """Raise UserError for a study in place of a run's config, and the reverse."""
    of_study, of_run = (not keys.isdisjoint(document) for keys in ({"study", "arms"}, {"run", "model"}))
    if _is_study(kind) and of_run and not of_study:
        raise UserError(
            f"{path} is a run's config, not a study; give one of configs/studies/*.toml, or do the run with "
            f"`python cli.py run --config {path}`"
        )
    if not _is_study(kind) and of_study and not of_run:
        raise UserError(f"{path} is a study, not a run's config; use `python cli.py compare {path}`")


INCLUDE = "include"
"""The key of a config that names others, whose values it takes where it has none of its own."""


def _document(path: Path, including: Sequence[Path] = (), examples: str = "configs/*.toml") -> dict[str, Any]:
    """A TOML file, with those that it includes beneath it; paths are relative to it. Raises UserError."""
    try:
        document = tomllib.loads(fetched(path).read_text(encoding="utf-8-sig"))
    except OSError as error:
        by = f", which {including[-1]} includes" if including else f"; give one of {examples}"
        raise UserError(f"cannot read the config {path}: {error.strerror}{by}") from error
    except (ValueError, RecursionError) as error:  # beside what is no TOML, what Python cannot hold of it
        raise UserError(f"{path} is not valid TOML: {error}") from error
    files = document.pop(INCLUDE, [])
    if not isinstance(files, list) or not all(isinstance(file, str) and file for file in files):
        raise UserError(f"{path}: {INCLUDE} should be a list of paths, found {files!r}")
    beneath: dict[str, Any] = {}
    for file in files:
        included = (path.parent / file).resolve()
        if included in {each.resolve() for each in (path, *including)}:
            raise UserError(f"{path}: {INCLUDE} leads back to {included}; leave it out")
        beneath = _merged(beneath, _document(included, (*including, path)))
    return _merged(beneath, document)


def _merged(beneath: dict[str, Any], above: dict[str, Any]) -> dict[str, Any]:
    """Two tables as one; where both have a value that is no table, that of the one above."""
    both = {
        key: _merged(beneath[key], value)
        for key, value in above.items()
        if isinstance(value, dict) and isinstance(beneath.get(key), dict)
    }
    return {**beneath, **above, **both}


def _apply_override(document: dict[str, Any], override: str) -> None:
    key, separator, text = override.partition("=")
    names = key.strip().split(".")
    if not separator or not all(names):
        raise UserError(
            f"--set {override}: write it as section.key=value, for example --set vstar.beta1=0.25"
        )
    table = document
    for name in names[:-1]:
        table = table.setdefault(name, {})
        if not isinstance(table, dict):
            raise UserError(f"--set {override}: {name} is a value, not a section")
    table[names[-1]] = _parse_value(text.strip())


def _parse_value(text: str) -> Any:
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except (ValueError, RecursionError):
        return text


def _section_of(
    place: tuple[int | str, ...], kind: type[BaseModel]
) -> tuple[list[str], list[type[BaseModel]]]:
    """The keys that lead to a wrong key's section, and what that section may be; a union's tag is no key."""
    keys: list[str] = []
    sections: list[type[BaseModel]] = [kind]
    for part in place[:-1]:
        fields = [section.model_fields[str(part)] for section in sections if part in section.model_fields]
        if fields:
            keys.append(str(part))
            sections = [inner for field in fields for inner in _sections_in(field.annotation)] or sections
        elif tagged := [section for section in sections if part in _tags(section)]:
            sections = tagged
        else:
            keys.append(str(part))
    return keys, sections


def _tags(section: type[BaseModel]) -> tuple[Any, ...]:
    return get_args(section.model_fields["name"].annotation) if "name" in section.model_fields else ()


def _sections_in(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [section for argument in get_args(annotation) for section in _sections_in(argument)]


def _describe(error: ValidationError, kind: type[BaseModel]) -> str:
    problems: list[str] = []
    unknown: dict[str, list[str]] = {}
    """The unknown keys, by what is known."""
    for item in error.errors():
        keys, sections = _section_of(item["loc"], kind)
        last = [str(part) for part in item["loc"][-1:] if not any(part in _tags(each) for each in sections)]
        place = ".".join([*keys, *last]) or "the file"
        if item["type"] == "extra_forbidden":
            known = dict.fromkeys(key for section in sections for key in section.model_fields)
            tags = [tag for section in sections for tag in _tags(section)]
            given = f' with name = "{tags[0]}"' if len(tags) == 1 else ""
            unknown.setdefault(f"{given}; use one of {', '.join(known)}", []).append(place)
        elif item["type"] == "union_tag_invalid":
            names = item["ctx"]["expected_tags"]
            problems.append(f'{place}.name is "{item["ctx"]["tag"]}"; use one of {names}')
        elif item["type"] == "missing":
            problems.append(f"{place} is missing")
        elif item["type"] == "value_error":
            problems.append(f"{place}: {item['ctx']['error']}")
        else:
            problems.append(f"{place} {_rule(item, place, kind)}")
    for advice, places in unknown.items():
        problems.append(f"unknown key{'s' if len(places) > 1 else ''} {', '.join(places)}{advice}")
    return "; ".join(problems)


def _rule(item: Mapping[str, Any], place: str, kind: type[BaseModel]) -> str:
    """What a value should be, and what it is."""
    found = repr(item["input"])
    match item["type"]:
        case "model_type" | "model_attributes_type":
            _, sections = _section_of((*item["loc"], ""), kind)
            fields = sections[0].model_fields
            values = [name for name, field in fields.items() if not _sections_in(field.annotation)]
            required = [name for name in values if fields[name].is_required()]
            key = "path" if "path" in fields else [*required, *values][0]
            is_in_list = isinstance(item["loc"][-1], int)
            rule = (
                f"table, such as {{ {key} = … }}"
                if is_in_list
                else f"section, such as [{place}] with {key} = …"
            )
            rule = f"should be a {rule}"
        case "dict_type":
            rule = "should be a section of keys and values"
        case "string_pattern_mismatch" if item["ctx"]["pattern"] == RUN_NAME:
            rule = NAME_RULE
        case "too_short" | "too_long":
            at_least = item["ctx"].get("min_length")
            number = item["ctx"]["max_length"] if at_least is None else at_least
            rule = f"should have at {'most' if at_least is None else 'least'} {number} item{'s' if number > 1 else ''}"
            found = str(item["ctx"]["actual_length"])
        case _:
            rule = re.sub(r"^Input should be", "should be", item["msg"]).replace("valid tuple", "valid list")
    return f"{rule}, found {found}"
