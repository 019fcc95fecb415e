"""Ranks that share one vLLM engine, and an engine that sleeps while the trainer works.

Two ranks share a real engine on the CPU. Sleeping needs a GPU: there the order of calls is tested, with a fake of vLLM.
"""

import gc
import inspect
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from common.data.rendering import PromptRenderer
from common.engines import RolloutEngine, build_engine
from common.engines.shared_engine import refuse_wrong_size
from common.engines.vllm_engine import keep_threads, set_environment
from common.engines.vllm_repairs import follow_stream
from common.errors import UserError
from stage2_train.config import Config
from tests import warm
from tests.quantised import save_quantised
from tests.rollout_ranks import GREEDY, REQUESTS, SAMPLING, Found, other_weights, requests, sample
from tests.stage2_runs import tiny_config

pytestmark = pytest.mark.filterwarnings(
    r"ignore::DeprecationWarning:(torch|vllm)\..*",
    "ignore:`torch.distributed.reduce_op` is deprecated:FutureWarning",
)

ROOT = Path(__file__).parents[1]
TOLERANCE = 1e-5
"""Of a log-prob (measured: 1e-6): sums over shards are taken in another order."""


def start(arguments: list[str]) -> None:
    finished = subprocess.run(
        [sys.executable, *arguments],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert finished.returncode == 0, finished.stderr[-4000:]


@pytest.fixture(scope="module")
def together(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each of two ranks got from the engine that they share."""
    folder = tmp_path_factory.mktemp("group")
    config = tiny_config(
        folder, tiny_model, engine={"max_num_seqs": 16, "training_tensor_parallel_size": 2}
    ).model_dump(mode="json")
    job, output = folder / "job.json", folder / "found"
    job.write_text(json.dumps({"config": config, "folder": str(tiny_model), "output": str(output)}))
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    warm.run_ranks(2, ["-m", "tests.rollout_ranks", job], timeout=300, env=environment)
    return [torch.load(f"{output}.{rank}", weights_only=False) for rank in range(2)]


@pytest.fixture(scope="module")
def alone(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Found]:
    """What one rank gets from an engine of its own."""
    config = tiny_config(tmp_path_factory.mktemp("alone"), tiny_model)
    renderer = PromptRenderer(tiny_model, config.data)
    engine = build_engine(config, tiny_model, renderer, beside_trainer=True)
    batch = requests(renderer)
    found = {"greedy": sample(engine, batch, GREEDY), "sampled": sample(engine, batch, SAMPLING)}
    engine.load_weights(other_weights(tiny_model).items())
    found["with other weights"] = sample(engine, batch, SAMPLING)
    engine.close()
    return found


@pytest.mark.parametrize(
    ("case", "expected", "split"),
    [
        ("greedy", "greedy", (REQUESTS - 4, 4)),
        ("sampled", "sampled", (REQUESTS - 4, 4)),
        ("all are rank 1's", "sampled", (0, REQUESTS)),
        ("after rank 0 lost interest", "sampled", (REQUESTS - 4, 4)),
        ("with other weights", "with other weights", (REQUESTS - 4, 4)),
        ("built anew", "sampled", (REQUESTS - 4, 4)),
    ],
)
def test_ranks_that_share_an_engine_get_what_each_would_get_from_its_own(
    together: list[dict[str, Any]],
    alone: dict[str, Found],
    case: str,
    expected: str,
    split: tuple[int, int],
) -> None:
    """The tokens themselves, also of ranks with unequal shares."""
    shares: list[Found] = [rank[case] for rank in together]
    assert tuple(len(share) for share in shares) == split
    ours, theirs = shares[0] | shares[1], alone[expected]
    assert ours.keys() == theirs.keys()
    for key, (token_ids, logprobs) in theirs.items():
        assert ours[key][0] == token_ids
        assert ours[key][1] == pytest.approx(logprobs, abs=TOLERANCE)


def test_new_weights_change_what_is_drawn(alone: dict[str, Found]) -> None:
    assert alone["with other weights"] != alone["sampled"]


def test_an_engine_that_closes_leaves_the_ranks_together(together: list[dict[str, Any]]) -> None:
    assert [rank["ranks after closing"] for rank in together] == [2, 2]


def test_a_shared_engine_that_dies_ends_the_job_with_advice(together: list[dict[str, Any]]) -> None:
    for rank in together:
        kind, message = rank["error"]
        assert kind == "UserError"
        assert "maximum context length is" in message
        assert "start the job again" in message


def test_groups_are_consecutive_ranks_that_share_with_nobody_else(tmp_path: Path) -> None:
    start(["-m", "tests.rollout_sharing", str(tmp_path)])
    found = [json.loads((tmp_path / str(rank)).read_text()) for rank in range(4)]
    assert [rank["requests"] for rank in found] == [
        [[True, "0.0"], [False, "1.0"], [False, "1.1"], [False, "1.2"]],
        [[False, "0.0"], [True, "1.0"], [True, "1.1"], [True, "1.2"]],
        [[True, "2.0"], [True, "2.1"]],
        [[False, "2.0"], [False, "2.1"]],
    ]
    names = [rank["name"] for rank in found]
    assert names[0] == names[1] != names[2] == names[3]


def test_a_group_that_does_not_divide_the_processes_is_refused_before_a_model_loads(
    tmp_path: Path, tiny_model: Path
) -> None:
    config = tiny_config(tmp_path, tiny_model, engine={"training_tensor_parallel_size": 2})
    renderer = PromptRenderer(tiny_model, config.data)
    with pytest.raises(UserError, match=r"training_tensor_parallel_size 2 cannot group .* found 1; start a"):
        build_engine(config, tiny_model, renderer, beside_trainer=True)


@pytest.mark.parametrize(
    ("size", "changes", "complaint"),
    [
        (3, {}, "num_attention_heads 14"),
        (4, {"num_attention_heads": 16}, None),
        (4, {"num_attention_heads": 16, "intermediate_size": 90}, "intermediate_size 90"),
        (4, {"num_attention_heads": 24, "num_key_value_heads": 6}, "num_key_value_heads 6"),
        (2, {"num_key_value_heads": 1}, None),
    ],
)
def test_a_model_that_cannot_be_divided_is_refused(
    tmp_path: Path, size: int, changes: dict[str, int], complaint: str | None
) -> None:
    shape = {"num_attention_heads": 14, "num_key_value_heads": 2, "intermediate_size": 4864}
    for document in (shape | changes, {"text_config": shape | changes}):
        (tmp_path / "config.json").write_text(json.dumps(document))
        if complaint is None:
            refuse_wrong_size(size, 2 * size, tmp_path)
        else:
            with pytest.raises(UserError, match=complaint):
                refuse_wrong_size(size, 2 * size, tmp_path)


@pytest.mark.parametrize(
    ("engine", "train", "complaint"),
    [
        ({"backend": "transformers", "sleep_while_training": True}, {}, "need backend vllm"),
        ({"backend": "transformers", "training_tensor_parallel_size": 2}, {}, "need backend vllm"),
        ({"sleep_while_training": True}, {"staleness": 1}, "found train.staleness 1"),
        ({"training_tensor_parallel_size": 2}, {"staleness": 1}, "train.staleness 1 cannot be combined with"),
    ],
)
def test_an_engine_is_not_asked_for_what_it_cannot_do(
    tmp_path: Path, tiny_model: Path, engine: dict[str, Any], train: dict[str, Any], complaint: str
) -> None:
    document = tiny_config(tmp_path, tiny_model).model_dump()
    document["engine"] |= engine
    document["train"] |= train
    with pytest.raises(ValueError, match=complaint):
        Config.model_validate(document)


class FakeLLM:
    """Writes down what vLLM is told."""

    def __init__(self, **options: Any) -> None:
        self.options = options
        self.told: list[str] = []
        client = SimpleNamespace(shutdown=lambda: self.told.append("shutdown"))
        self.llm_engine = SimpleNamespace(engine_core=client)

    def sleep(self, level: int) -> None:
        self.told.append(f"sleep {level}")

    def wake_up(self, tags: Sequence[str] = ("all",)) -> None:
        self.told.append(f"wake {' '.join(tags)}")

    def collective_rpc(self, method: str | Callable[..., None], kwargs: dict[str, Any] | None = None) -> None:
        if callable(method):
            self.told.append(method.__name__)
        else:
            assert kwargs is not None
            self.told += [method, *(name for name, _ in kwargs["weights_iterator"])]

    def apply_model(self, _: object) -> None:
        pass

    def reset_prefix_cache(self) -> None:
        self.told.append("reset_prefix_cache")


@pytest.fixture
def fake(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, tiny_model: Path
) -> Iterator[tuple[RolloutEngine, FakeLLM]]:
    """An engine around a fake of vLLM: on a GPU or not, beside a trainer or not."""
    import vllm

    on_gpu, beside_trainer = request.param
    monkeypatch.setattr(vllm, "LLM", FakeLLM)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: on_gpu)
    config = tiny_config(tmp_path, tiny_model, engine={"sleep_while_training": True})
    renderer = PromptRenderer(tiny_model, config.data)
    engine = build_engine(config, tiny_model, renderer, beside_trainer=beside_trainer)
    llm = vars(engine)["llm"]
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: llm.told.append("empty_cache"))
    yield engine, llm
    gc.unfreeze()


@pytest.mark.parametrize("fake", [(True, True)], indirect=True)
def test_an_engine_sleeps_until_it_is_given_weights(fake: tuple[RolloutEngine, FakeLLM]) -> None:
    """Weights are loaded before there is room for the key-value cache, and into memory that torch has given back."""
    engine, llm = fake
    load = ["reload_weights", "a"]
    assert llm.options["enable_sleep_mode"]
    engine.load_weights([("a", torch.ones(1))])
    assert llm.told == [*load, "reset_prefix_cache"]
    llm.told.clear()
    for _ in range(2):
        engine.sleep()
    assert llm.told == ["sleep 2"]
    with pytest.raises(AssertionError, match="load_weights wakes the engine"):
        next(engine.generate([], SAMPLING))
    llm.told.clear()
    for _ in range(2):
        engine.load_weights([("a", torch.ones(1))])
    awake = [*load, "reset_prefix_cache"]
    woken = ["empty_cache", "wake weights", *load, "wake kv_cache", "reset_prefix_cache"]
    assert llm.told == [*woken, *awake]


@pytest.mark.parametrize("fake", [(True, True)], indirect=True)
def test_a_sleeping_engine_wakes_before_it_is_closed(
    fake: tuple[RolloutEngine, FakeLLM], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What it frees is there: vLLM's allocator would free memory twice that sleep has already given back."""
    engine, llm = fake
    monkeypatch.setattr(engine, "_is_guest", False)  # an earlier test may have left a group of processes
    engine.sleep()
    engine.close()
    assert llm.told == ["sleep 2", "empty_cache", "wake all", "shutdown", "empty_cache"]
    engine.close()
    assert llm.told.count("wake all") == llm.told.count("shutdown") == 1


class SecondRunner:
    """Keeps the stream in which it is first asked, as vLLM's second model runner does."""

    @cached_property
    def main_stream(self) -> torch.cuda.Stream:
        return torch.cuda.current_stream()


def test_a_runner_follows_the_calling_thread_to_its_stream(monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm.v1.worker.gpu.model_runner import GPUModelRunner

    assert isinstance(inspect.getattr_static(GPUModelRunner, "main_stream"), cached_property)
    done: list[str] = []
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: done.append("waited"))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: "the first thread's")
    runner: Any = SecondRunner()
    assert runner.main_stream == "the first thread's"
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: "another's")
    assert runner.main_stream == "the first thread's"
    follow_stream(SimpleNamespace(model_runner=runner))
    assert runner.main_stream == "another's"
    assert done == ["waited"]


@pytest.mark.parametrize(
    ("fake", "told"),
    [((True, True), ["follow_stream"]), ((True, False), []), ((False, True), [])],
    indirect=["fake"],
)
def test_an_engine_beside_a_trainer_follows_whoever_draws(
    fake: tuple[RolloutEngine, FakeLLM], told: list[str]
) -> None:
    engine, llm = fake
    assert list(engine.generate([], SAMPLING)) == []
    assert llm.told == told


def test_a_trainer_keeps_its_threads_beside_vllm(monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm.utils.torch_utils import set_torch_threads_for_runtime

    chosen: list[int] = []
    monkeypatch.setattr(os, "environ", {})
    monkeypatch.setattr(torch, "get_num_threads", lambda: 4)
    monkeypatch.setattr(torch, "set_num_threads", chosen.append)
    set_torch_threads_for_runtime()  # what vLLM does once a model is on a GPU
    assert chosen == [1]
    keep_threads()
    set_torch_threads_for_runtime()
    assert chosen == [1]
    assert os.environ == {"OMP_NUM_THREADS": "4"}


def test_vllms_workers_are_no_forks_of_a_process_that_has_looked_for_a_gpu(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    name = "VLLM_WORKER_MULTIPROC_METHOD"
    for given, method in (({}, "spawn"), ({name: "fork"}, "fork")):
        monkeypatch.setattr(os, "environ", dict(given))
        set_environment("bfloat16")
        assert os.environ[name] == method


def test_what_vllm_cannot_load_is_one_line(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, tiny_model: Path
) -> None:
    import vllm

    def broken(**_: Any) -> None:
        raise ValueError("1 validation error\n  no such kernel\n  see the log\n  and more")

    monkeypatch.setattr(vllm, "LLM", broken)
    config = tiny_config(tmp_path, tiny_model)
    with pytest.raises(
        UserError, match=r"\(ValueError: 1 validation error no such kernel see the log\); .*transformers"
    ):
        build_engine(config, tiny_model, PromptRenderer(tiny_model, config.data), beside_trainer=False)
    quantised = save_quantised(tiny_model, tmp_path / "int8")
    with pytest.raises(UserError, match=r"correct what it says, or use the model without quantisation$"):
        build_engine(config, quantised, PromptRenderer(quantised, config.data), beside_trainer=False)
    gc.unfreeze()


@pytest.mark.parametrize("fake", [(True, False), (False, True)], indirect=True)
def test_an_engine_without_a_trainer_or_a_gpu_stays_awake(fake: tuple[RolloutEngine, FakeLLM]) -> None:
    engine, llm = fake
    engine.sleep()
    assert llm.told == []
    assert not llm.options.get("enable_sleep_mode", False)
