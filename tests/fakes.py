"""Fakes of things that are slow or need a device: an engine that follows a script, and artifacts without a model."""

import json
import random
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import polars as pl

from common.config import RunConfig, SamplingParams
from common.data.rendering import PromptRenderer
from common.engines import LowRank
from common.provenance import Provenance
from common.rollout import Completion, SampleRequest
from common.vstar_file import write_vstar
from stage1_vstar.table import vstar_rows
from stage2_train.config import Config

IDENTITY: dict[str, Any] = {
    "model": {"weights": "w" * 32, "tokenizer": "t" * 32},
    "prompt": {"template": "{prompt}\n", "eos_token_ids": [0]},
    "sampling": {"temperature": 1.0, "top_p": 1.0, "max_completion_tokens": 12},
    "grader": "gsm8k/1",
    "seed": 0,
    "revision": None,
    "engine": {"backend": "vllm", "dtype": "float32"},
    "versions": {"torch": "2.13.0", "transformers": "5.19.0", "vllm": "0.32.0"},
}
CONTEXT: dict[str, Any] = {"model_path": "some/model", "versions": {"torch": "2.13.0"}, "commit": None}


class EngineDied(RuntimeError):
    """The error that `ScriptedEngine` raises when its script says so."""


class ScriptedEngine:
    """A RolloutEngine whose completions follow from a request's seed alone, and come out of order, as vLLM's do.

    It draws slowly and raises EngineDied as soon as `dies_when` holds. `drawn` lists the keys of what came out.
    """

    def __init__(
        self,
        write: Callable[[SampleRequest], str] | None = None,
        *,
        dies_when: Callable[[], bool] | None = None,
        sample_seconds: float = 0.0,
    ) -> None:
        self.drawn: list[Any] = []
        self.closed = False
        self._write = write or (lambda request: f"so #### {1 + request.seed % 4}")
        self._dies_when = dies_when
        self._sample_seconds = sample_seconds

    def generate(self, requests: Iterable[SampleRequest], sampling: SamplingParams) -> Iterator[Completion]:
        waiting = list(requests)
        random.Random(len(waiting)).shuffle(waiting)
        for request in waiting:
            if self._sample_seconds:
                time.sleep(self._sample_seconds)
            if self._dies_when is not None:
                time.sleep(0.05)
                if self._dies_when():
                    raise EngineDied(f"after {len(self.drawn)} completions")
            self.drawn.append(request.key)
            yield Completion(
                key=request.key,
                token_ids=tuple(range(1 + request.seed % sampling.max_completion_tokens)),
                text=self._write(request),
                truncated=request.seed % 7 == 0,
            )

    def load_weights(self, _: object) -> None:
        raise AssertionError("stage 1 never changes the weights")

    def sleep(self) -> None:
        raise AssertionError("stage 1 has nothing to make room for")

    def close(self) -> None:
        self.closed = True


class SteppingEngine:
    """A RolloutEngine that writes `a b #### n` in one of a few ways, by a request's seed, and lists what it drew."""

    def __init__(self, renderer: PromptRenderer, *, sample_seconds: float = 0.0) -> None:
        self.drawn: list[tuple[str, int, int]] = []
        """Prompt or state, index, and the number of given tokens."""
        self._renderer = renderer
        self._sample_seconds = sample_seconds

    def generate(self, requests: Iterable[SampleRequest], sampling: SamplingParams) -> Iterator[Completion]:
        for request in requests:
            time.sleep(self._sample_seconds)
            assert isinstance(request.key, tuple)
            self.drawn.append((*request.key, len(request.prefix)))
            first, second = request.seed % 2, request.seed // 2 % 2
            texts = [f"{first} ", f"{second} ", f"#### {1 + request.seed % 4}"]
            written = [token for text in texts for token in self._encode(text)]
            token_ids = (*request.prefix, *written[len(request.prefix) :], self._renderer.eos_token_ids[0])
            yield Completion(
                key=request.key,
                token_ids=token_ids,
                text=self._renderer.decode(token_ids),
                truncated=False,
            )

    def _encode(self, text: str) -> list[int]:
        return list(self._renderer.tokenizer.encode(text, add_special_tokens=False))

    def load_weights(self, _: object) -> None:
        raise AssertionError("stage 1 never changes the weights")

    def sleep(self) -> None:
        raise AssertionError("stage 1 has nothing to make room for")

    def close(self) -> None:
        pass


class SteppingEngines:
    """Stands where `build_engine` does, and keeps the engines that it has built."""

    def __init__(self, *, sample_seconds: float = 0.0) -> None:
        self.built: list[SteppingEngine] = []
        self._sample_seconds = sample_seconds

    def build(
        self,
        config: RunConfig,
        folder: Path,
        renderer: PromptRenderer,
        *,
        beside_trainer: bool,
        adapter: LowRank | None = None,
    ) -> SteppingEngine:
        self.built.append(SteppingEngine(renderer, sample_seconds=self._sample_seconds))
        return self.built[-1]


def change_json(path: Path, /, **values: Any) -> None:
    """Write these values into a JSON file; None removes one."""
    document = json.loads(path.read_text(encoding="utf-8")) | values
    kept = {key: value for key, value in document.items() if key not in values or value is not None}
    path.write_text(json.dumps(kept), encoding="utf-8")


def tiny_config(model: Path, data: Path, /, **sections: Any) -> Config:
    """A run of the tiny model on a generic data set; with these values in place of its own."""
    document: dict[str, Any] = {
        "run": "test",
        "model": {"path": str(model), "dtype": "float32"},
        "data": {"format": "generic", "path": str(data), "template": "line", "max_prompt_tokens": 64},
        "sampling": {"max_completion_tokens": 12},
        "grader": {"name": "gsm8k"},
        "vstar": {"num_samples": 4},
    }
    for name, values in sections.items():
        document[name] = {**document.get(name, {}), **values} if isinstance(values, dict) else values
    return Config.model_validate(document)


def sample_rows(
    outcomes: dict[str, list[str]], rewards: dict[str, list[float]] | None = None
) -> pl.DataFrame:
    """Rows of samples/*.parquet: per prompt the outcomes of its samples; rewards are 1 for correct ones by default."""
    return pl.DataFrame(
        [
            {
                "prompt_id": name,
                "sample_index": index,
                "prompt": f"question {name}",
                "answer": "1",
                "prompt_token_hash": f"tokens of {name}",
                "completion": f"#### {index}",
                "completion_raw": None,
                "completion_ids": None,
                "completion_tokens": 3 + index,
                "outcome": outcome,
                "extracted": None,
                "reason": None,
                "reward": rewards[name][index] if rewards else float(outcome == "correct"),
            }
            for name, many in outcomes.items()
            for index, outcome in enumerate(many)
        ],
        schema_overrides={
            "sample_index": pl.Int32,
            "completion_tokens": pl.Int32,
            "completion_ids": pl.List(pl.Int32),
            "prompt_token_hash": pl.String,
            "completion_raw": pl.Binary,
            "extracted": pl.String,
            "reason": pl.String,
        },
    )


def rows_of_samples(samples: pl.DataFrame, *, num_samples: int, beta1: float = 0.5) -> pl.DataFrame:
    """The rows of vstar.parquet that these samples give, prompts in order of first appearance."""
    prompts = samples.select("prompt_id", "prompt", "answer", "prompt_token_hash").unique(maintain_order=True)
    return vstar_rows(prompts, samples, num_samples=num_samples, beta1=beta1, drop_unsolved=False)


def write_artifact(
    path: Path,
    outcomes: dict[str, list[str]],
    *,
    beta1: float = 0.5,
    rewards: dict[str, list[float]] | None = None,
    identity: dict[str, Any] | None = None,
    cost: dict[str, float] | None = None,
) -> Path:
    """A vstar.parquet made from those samples."""
    many = max(len(each) for each in outcomes.values())
    rows = rows_of_samples(sample_rows(outcomes, rewards), num_samples=many, beta1=beta1)
    context = CONTEXT if cost is None else {**CONTEXT, "cost": cost}
    write_vstar(rows, Provenance(identity=identity or IDENTITY, context=context), path)
    return path
