"""Several engines in processes of their own: the same completions as one, whatever happens to the processes."""

import os
import platform
import re
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing, suppress
from functools import partial
from pathlib import Path
from queue import SimpleQueue
from threading import Event
from typing import Any, cast

import pytest
import torch

from common import processes
from common.config import EngineConfig, SamplingParams
from common.engines.count import idle_gpu, with_engines
from common.engines.fleet import EngineFleet
from common.engines.local_workers import LocalWorker, Share, shares_of
from common.engines.orders import Begin, Done, Draw, Drawn, LoadWeights, Order, Ready, Reply
from common.engines.weight_files import WeightFiles
from common.errors import EngineFailed, UserError
from common.rollout import Completion, SampleRequest
from common.runs import REPOSITORY, run_paths
from common.vstar_file import read_vstar
from common.warm_starts import Process
from stage2_train.config import Config
from tests.fakes import tiny_config
from tests.fleet_engines import engine_with_child, large_engine, number_engine
from tests.stage1_runs import run, stored, write_questions

pytestmark = pytest.mark.filterwarnings(r"ignore::DeprecationWarning:torch\..*")

SAMPLING = SamplingParams(max_completion_tokens=8)
ENGINE = EngineConfig(max_num_seqs=8)
BATCH = ENGINE.max_num_seqs
Start = Callable[..., EngineFleet]


def requests(count: int, *, first: int = 0) -> list[SampleRequest]:
    return [
        SampleRequest(key=("prompt", number), prompt_token_ids=(1, 2), seed=number)
        for number in range(first, first + count)
    ]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    """Starts fleets of engines that sample numbers; closes them at the end."""
    started: list[EngineFleet] = []

    def fleet(count: int, *, seconds: float = 0.002) -> EngineFleet:
        build = partial(number_engine, tmp_path, seconds)
        launch = lambda _: LocalWorker(build, Share(threads=1), tmp_path / "libraries.log")  # noqa: E731
        fleet = EngineFleet(launch, count, engine=ENGINE, share=WeightFiles.write)
        started.append(fleet)
        deadline = time.monotonic() + 60
        while len(drawn(fleet, 100)) < count:  # until all of them are ready
            assert time.monotonic() < deadline
        return fleet

    yield fleet
    for each in started:
        each.close()
    deadline = time.monotonic() + 10
    while alive := [pid for pid in pids(tmp_path) if is_alive(pid)]:
        assert time.monotonic() < deadline, alive


def pids(folder: Path, what: str = "built") -> list[int]:
    return [int(path.name.rpartition("-")[2]) for path in folder.glob(f"{what}-*")]


def is_alive(pid: int) -> bool:
    with suppress(ProcessLookupError):
        os.kill(pid, 0)
        return "zombie" not in Path(f"/proc/{pid}/status").read_text()
    return False


def drawn(fleet: EngineFleet, count: int, weight: int = 0) -> set[str]:
    """Draw completions of so many requests, check them, and return the processes that drew them."""
    found = list(fleet.generate(requests(count), SAMPLING))
    assert sorted(each.token_ids for each in found) == [(number, weight, 8) for number in range(count)]
    assert {each.key for each in found} == {("prompt", number) for number in range(count)}
    assert len(found) == count
    return {each.text for each in found}


def test_engines_share_the_requests_and_each_is_drawn_once(start: Start, tmp_path: Path) -> None:
    fleet = start(3)
    assert drawn(fleet, 300) == {str(pid) for pid in pids(tmp_path)}
    assert drawn(fleet, 0) == set()
    assert len(drawn(fleet, 1)) == 1


def test_the_first_completions_come_while_others_are_still_to_be_requested(start: Start) -> None:
    fleet, asked = start(2), 0

    def counted() -> Iterator[SampleRequest]:
        nonlocal asked
        for request in requests(1000):
            asked += 1
            yield request

    completions = fleet.generate(counted(), SAMPLING)
    next(completions)
    assert asked <= 2 * (3 * BATCH + 1)
    assert len(list(completions)) == 999


def test_completions_that_nobody_waits_for_do_not_come_later(start: Start) -> None:
    fleet = start(2)
    for number in range(5):
        with closing(cast(Any, fleet.generate(requests(100, first=1000 * number), SAMPLING))) as early:
            next(early)
    drawn(fleet, 50)


def test_each_engine_gets_new_weights_and_sleeps(start: Start, tmp_path: Path) -> None:
    fleet = start(2)
    drawn(fleet, 100)
    for weight in (3, 5):
        shared = torch.full((4,), weight / 8)
        fleet.load_weights(iter([("a", shared), ("tied", shared), ("column", torch.ones(2, 3)[:, 1] * 0)]))
        drawn(fleet, 100, weight)
    fleet.sleep()
    assert sorted(pids(tmp_path, "asleep")) == sorted(pids(tmp_path))


@pytest.mark.parametrize("how", ["die", "fail"])
def test_an_engine_that_is_lost_is_started_again_and_its_requests_are_drawn(
    start: Start, tmp_path: Path, capsys: pytest.CaptureFixture[str], how: str
) -> None:
    fleet = start(2)
    for seed in (0, 40, 199):
        (tmp_path / f"{how}-{seed}").touch()
    drawn(fleet, 200)
    assert len(pids(tmp_path)) >= 4
    said = capsys.readouterr().err
    reason = "died of SIGKILL, perhaps for want of memory" if how == "die" else "out of luck"
    assert reason in said
    found = re.findall(
        r"warning: engine (\d) of 2 .*; it is started again, and (\d+) unfinished requests", said
    )
    assert len(found) == 3
    assert all(0 < int(lost) <= 3 * BATCH for _, lost in found)


def test_an_engine_that_is_started_again_has_the_newest_weights(start: Start, tmp_path: Path) -> None:
    fleet = start(2)
    fleet.load_weights(iter([("a", torch.tensor([7.0]))]))
    first = set(pids(tmp_path))
    (tmp_path / "die-0").touch()
    (tmp_path / "die-1").touch()
    drawn(fleet, 400, 7)
    # It draws as soon as it is there: the other one alone would not have been given all of these.
    assert set(pids(tmp_path, "loaded-7")) - first


def test_engines_that_die_at_the_same_request_end_the_job_with_its_name(start: Start, tmp_path: Path) -> None:
    fleet = start(2)
    (tmp_path / "always-17").touch()
    with pytest.raises(
        EngineFailed, match=r"engines have died 3 times, each time with the request \('prompt', \d+\)"
    ):
        drawn(fleet, 100)


def test_engines_that_cannot_be_built_are_one_error(start: Start, tmp_path: Path) -> None:
    (tmp_path / "refuse").touch()
    with pytest.raises(UserError, match=r"^the model cannot be loaded; take another$"):
        start(2)


def test_a_killed_process_is_replaced_while_nobody_draws(start: Start, tmp_path: Path) -> None:
    fleet = start(2)
    for pid in pids(tmp_path):
        os.kill(pid, signal.SIGKILL)
    drawn(fleet, 100)


def test_an_engine_that_hangs_is_started_again(
    start: Start, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("common.engines.fleet.WATCH_SECONDS", 0.1)
    fleet = start(2)
    monkeypatch.setattr(fleet, "_hang_seconds", 1.0)
    (tmp_path / "hang-100").touch()
    drawn(fleet, 200)
    assert re.search(
        r"engine \d of 2 has been silent for 0.01\d* minutes \(engine.hang_minutes\)", capsys.readouterr().err
    )


class Node:
    """Workers of which half are lost at once, before the others have drawn anything; then all work."""

    def __init__(self, engines: int) -> None:
        self._engines = engines
        self.workers: list[Drawing] = []

    def launch(self, number: int) -> "Drawing":
        self.workers.append(Drawing())
        lost = self.workers[: self._engines // 2]
        if len(self.workers) == self._engines:
            for worker in lost:
                worker.replies.put(None)
        if len(self.workers) == self._engines + len(lost):  # all have been replaced
            for worker in self.workers[len(lost) :]:
                worker.begin.set()
        return self.workers[-1]


class Drawing:
    """A worker that draws at once, when it may begin."""

    begins_at_once = True

    def __init__(self) -> None:
        self.replies: SimpleQueue[Reply | None] = SimpleQueue()
        self.replies.put(Ready())
        self.begin = Event()
        self._stream = 0

    def send(self, order: Order) -> None:
        if isinstance(order, LoadWeights):
            self.replies.put(Done())
        if isinstance(order, Begin):
            self._stream = order.stream
        if isinstance(order, Draw):
            for each in order.requests:
                completion = Completion(key=each.key, token_ids=(each.seed,), text="", truncated=False)
                self.replies.put(Drawn(self._stream, (completion,)))

    def receive(self) -> list[Reply]:
        reply = self.replies.get()
        if reply is None:
            raise EOFError
        if isinstance(reply, Drawn):
            self.begin.wait()
        return [reply]

    def cause_of_death(self) -> str:
        return "is lost"

    def close(self) -> None:
        pass


class Stuck(Drawing):
    """Never gets ready."""

    def __init__(self, begins_at_once: bool) -> None:
        super().__init__()
        self.begins_at_once = begins_at_once

    def receive(self) -> list[Reply]:
        Event().wait()
        return []


@pytest.mark.parametrize("begins_at_once", [True, False])
def test_an_engine_that_hangs_while_it_starts_is_started_again_but_not_one_that_waits_for_a_machine(
    begins_at_once: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("common.engines.fleet.WATCH_SECONDS", 0.01)
    launched: list[Drawing] = []

    def launch(_: int) -> Drawing:
        launched.append(Drawing() if launched else Stuck(begins_at_once))
        launched[-1].begin.set()
        return launched[-1]

    hang_seconds = 0.1
    engine = ENGINE.model_copy(update={"hang_minutes": hang_seconds / 60})
    with closing(
        cast(Any, EngineFleet(cast(Any, launch), 2, engine=engine, share=WeightFiles.write))
    ) as fleet:
        deadline = time.monotonic() + 10 * hang_seconds
        while time.monotonic() < deadline and len(launched) == 2:
            assert len(list(fleet.generate(requests(100), SAMPLING))) == 100
    assert len(launched) == (3 if begins_at_once else 2)


def test_a_job_outlives_the_loss_of_many_engines_at_once() -> None:
    node = Node(16)
    fleet = EngineFleet(
        lambda number: cast(Any, node.launch(number)), 16, engine=ENGINE, share=WeightFiles.write
    )
    with closing(cast(Any, fleet)):
        found = [each.token_ids[0] for each in fleet.generate(requests(1000), SAMPLING)]
    assert sorted(found) == list(range(1000))
    assert len(node.workers) == 24


def test_new_weights_are_shared_when_the_old_ones_are_gone() -> None:
    """Both together may be too much for the memory that they are in."""
    shared: list[WeightFiles] = []

    def share(tensors: Iterable[tuple[str, torch.Tensor]]) -> WeightFiles:
        assert not [weights for weights in shared if weights.folder.exists()]
        shared.append(WeightFiles.write(tensors))
        return shared[-1]

    fleet = EngineFleet(lambda _: cast(Any, Drawing()), 2, engine=ENGINE, share=share)
    with closing(cast(Any, fleet)):
        for value in range(3):
            fleet.load_weights([("a", torch.full((2,), float(value)))])
        assert shared[-1].folder.exists()
    assert len(shared) == 3


class Stillborn(Drawing):
    """A worker that dies while it starts."""

    def receive(self) -> list[Reply]:
        raise EOFError


def test_engines_that_only_die_end_the_job() -> None:
    with pytest.raises(
        EngineFailed, match=r"engines have died 6 times without a completion; the last one is lost"
    ):
        EngineFleet(lambda _: cast(Any, Stillborn()), 2, engine=ENGINE, share=WeightFiles.write)


class NeverReady:
    """A worker that has been asked for, and does not come."""

    begins_at_once = False

    def receive(self) -> list[Any]:
        time.sleep(60)
        return []

    def close(self) -> None:
        pass


def test_workers_that_will_never_come_are_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("common.engines.fleet.WATCH_SECONDS", 0.01)
    reasons = iter([None, None, "the cluster is gone"])
    with pytest.raises(EngineFailed, match=r"^the cluster is gone; start the job again"):
        EngineFleet(
            lambda _: cast(Any, NeverReady()),
            2,
            engine=ENGINE,
            share=WeightFiles.write,
            hopeless=lambda: next(reasons),
        )


JOB = """
import sys
from functools import partial
from pathlib import Path
import torch
from common.engines.fleet import EngineFleet
from common.engines.local_workers import LocalWorker, Share
from common.engines.weight_files import WeightFiles
from tests.fleet_engines import number_engine
from tests.test_fleet import ENGINE, SAMPLING, requests
folder = Path(sys.argv[1])
build = partial(number_engine, folder, 0.01)
fleet = EngineFleet(lambda _: LocalWorker(build, Share(), folder / "log"), 2, engine=ENGINE, share=WeightFiles.write)
fleet.load_weights(iter([("a", torch.ones(3))]))
for number, completion in enumerate(fleet.generate(requests(10**6), SAMPLING)):
    if number == 100:
        print(fleet._weights.folder, flush=True)
"""


def test_the_processes_end_with_a_job_that_is_killed_and_free_its_shared_memory(tmp_path: Path) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", JOB, str(tmp_path)], cwd=REPOSITORY, stdout=subprocess.PIPE, text=True
    ) as job:
        assert job.stdout is not None
        weights = Path(job.stdout.readline().strip())
        assert list(weights.iterdir())
        assert all(map(is_alive, pids(tmp_path)))
        job.kill()
    deadline = time.monotonic() + 10
    while any(map(is_alive, pids(tmp_path))):
        assert time.monotonic() < deadline
    assert not weights.exists()


def test_what_a_killed_job_has_left_in_shared_memory_is_removed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("common.engines.weight_files.SHARED_MEMORY", tmp_path)
    with subprocess.Popen(["true"]) as ended:
        pass
    host = platform.node()
    left = tmp_path / f"astar-po-{host}-{ended.pid}-weights-a"
    others = [
        f"astar-po-{host}-1-weights-b",
        f"astar-po-other-{ended.pid}-weights-c",
        "astar-po",
        "of-others",
    ]
    for folder in (left, *(tmp_path / name for name in others)):
        folder.mkdir()
        (folder / "00000.safetensors").touch()
    ours = WeightFiles.write([("a", torch.ones(2))])
    assert {path.name for path in tmp_path.iterdir()} == {*others, ours.folder.name}
    again = WeightFiles.write([("a", torch.ones(2))])
    assert [name for name, _ in ours] == ["a"]
    for weights in (ours, again):
        weights.discard()


def test_shared_memory_without_room_is_an_error_of_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("common.engines.weight_files.SHARED_MEMORY", tmp_path)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    try:
        with pytest.raises(UserError, match=r"^cannot write .*/astar-po-.*-weights-.*: File too large"):
            WeightFiles.write([("a", torch.ones(1000))])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert not list(tmp_path.iterdir())


def test_what_an_engine_has_started_ends_with_it(tmp_path: Path) -> None:
    worker = LocalWorker(partial(engine_with_child, tmp_path), Share(), tmp_path / "log")
    with pytest.raises(EOFError):
        worker.receive()
    assert worker.cause_of_death().startswith("died of SIGKILL")
    (child,) = pids(tmp_path, "child")
    assert is_alive(child)
    worker.close()
    deadline = time.monotonic() + 10
    while is_alive(child):
        assert time.monotonic() < deadline


def test_a_process_is_not_waited_for_until_it_has_read_what_to_build(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A tokenizer is larger than what a socket holds, and a process reads it once it has imported everything."""
    stopped = []

    def start_and_stop(*arguments: Any, **options: Any) -> Process:
        process = processes.start(*arguments, **options)
        os.kill(process.pid, signal.SIGSTOP)
        stopped.append(process.pid)
        return process

    monkeypatch.setattr("common.engines.local_workers.start", start_and_stop)
    worker = LocalWorker(partial(large_engine, tmp_path, bytes(10**7)), Share(), tmp_path / "log")
    os.kill(stopped[0], signal.SIGCONT)
    assert worker.receive() == [Ready()]
    worker.close()


# How many, and with what.


def configured(folder: Path, model: Path, **engine: Any) -> Config:
    return tiny_config(model, write_questions(folder / "questions.jsonl"), engine=engine)


@pytest.mark.parametrize(
    ("engine", "gpus", "samples", "expected"),
    [
        ({}, 8, 10**6, 8),
        ({"tensor_parallel_size": 2}, 8, 10**6, 4),
        ({"tensor_parallel_size": 8}, 4, 10**6, 1),
        ({}, 8, 600, 3),
        ({}, 0, 10**6, 2),
        ({}, 0, 256, 1),
        ({"engines": 3}, 0, 1, 3),
        ({"engines": 1}, 8, 10**6, 1),
    ],
)
def test_all_devices_are_used_as_far_as_there_is_work(
    tmp_path: Path,
    tiny_model: Path,
    monkeypatch: pytest.MonkeyPatch,
    engine: dict[str, Any],
    gpus: int,
    samples: int,
    expected: int,
) -> None:
    monkeypatch.setattr("common.engines.count.visible_devices", lambda: [str(gpu) for gpu in range(gpus)])
    monkeypatch.setattr("common.engines.count.cores", lambda: 2)
    config = with_engines(configured(tmp_path, tiny_model, **engine), tiny_model, samples)
    assert config.engine.engines == expected


def test_a_larger_model_has_all_cores_of_a_machine_without_gpus(
    tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("common.engines.count.SMALL", 1000)
    assert with_engines(configured(tmp_path, tiny_model), tiny_model, 10**6).engine.engines == 1


def test_engines_share_gpus_or_cores() -> None:
    four = ["2", "3", "5", "GPU-7"]
    assert [share.environment for share in shares_of(2, four, 2, cores=16)] == [
        {"CUDA_VISIBLE_DEVICES": "2,3"},
        {"CUDA_VISIBLE_DEVICES": "5,GPU-7"},
    ]
    assert [share.environment for share in shares_of(3, [], 1, cores=8)] == [{"OMP_NUM_THREADS": "2"}] * 3
    assert [share.environment for share in shares_of(3, [], 1, cores=2)] == [{"OMP_NUM_THREADS": "1"}] * 3
    with pytest.raises(UserError, match=r"engine.engines 5 needs 5 GPUs, found 4; choose at most 4 engines"):
        shares_of(5, four, 1, cores=16)
    with pytest.raises(
        UserError, match=r"engines 3 × tensor_parallel_size 2 needs 6 GPUs, found 4; choose at most 2"
    ):
        shares_of(3, four, 2, cores=16)
    with pytest.raises(UserError, match=r"size 8 needs 16 GPUs, found 4; lower tensor_parallel_size"):
        shares_of(2, four, 8, cores=16)


# Real engines.


@pytest.mark.parametrize("backend", ["transformers", "vllm"])
def test_two_engines_give_the_store_of_one(
    tiny_model: Path, tmp_path: Path, artifacts: Path, backend: str
) -> None:
    data = write_questions(tmp_path / "questions.jsonl", rows=24)
    found = {}
    for engines in (1, 2):
        name = f"engines{engines}"
        config = tiny_config(
            tiny_model,
            data,
            run=name,
            engine={"backend": backend, "engines": engines, "max_num_seqs": 8},
            vstar={"num_samples": 4},
        )
        run(config, check=True)
        found[engines] = stored(name).drop("completion_raw"), read_vstar(run_paths(name).vstar)[0]
    for one, two in zip(found[1], found[2], strict=True):
        assert one.equals(two)


def test_a_gpu_that_the_installed_torch_cannot_use_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr("common.engines.count.versions", lambda names: {"torch": "2.13.0+cpu"})
    (tmp_path / "nvidiactl").touch()
    assert idle_gpu(tmp_path) is None
    (tmp_path / "nvidia0").touch()
    assert "torch 2.13.0+cpu uses the CPU; `make setup ACCELERATOR=cuda`" in str(idle_gpu(tmp_path))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert idle_gpu(tmp_path) is None
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    monkeypatch.setattr("common.engines.count.versions", lambda names: {"torch": "2.13.0"})
    assert idle_gpu(tmp_path) is None
