"""Failures that training survives or stops at: bad gradients, dead engines, graders that fail, collapse."""

import json
import math
import re
import subprocess
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from common.config import SamplingParams
from common.data.prompts import load_prompts
from common.data.rendering import PromptRenderer
from common.errors import EngineFailed, UserError
from common.grading import Grade, GraderPool, Outcome
from common.rollout import Completion, Prompt, Rollout, SampleRequest
from common.runs import run_paths
from stage2_train.checkpoint import latest_state
from stage2_train.config import Config
from stage2_train.learner import MAX_SKIPPED_STEPS
from stage2_train.ranks import Ranks
from stage2_train.safeguards import refuse_divergence, refuse_unjudged
from stage2_train.sources.sampler import Draw, Sampler
from tests.conftest import ROOT, RunCli
from tests.stage2_runs import as_toml, tiny_config, write_tiny_vstar
from tests.train_steps import ScriptedEngine
from tests.training_jobs import ranks_found

CASES: dict[str, dict[str, Any]] = {
    **{f"ZeRO-{stage}": {"train": {"zero_stage": stage}} for stage in range(4)},
    "ZeRO-2 in bfloat16": {"model": {"dtype": "bfloat16"}},
}
ALONE = Ranks(0, 1, torch.device("cpu"))


@pytest.fixture(scope="module")
def found(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[int, list[dict[str, Any]]]:
    """What each rank of one process and of two found."""
    folder = tmp_path_factory.mktemp("safeguards")
    config = tiny_config(folder, tiny_model, train={"warmup_steps": 10}, grader={"workers": 1})
    write_tiny_vstar(config, folder / "vstar.parquet")
    return ranks_found("policy_steps", config, folder, {1: CASES, 2: CASES})


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("processes", [1, 2])
def test_a_step_that_is_not_finite_leaves_no_trace_on_any_rank(
    found: dict[int, list[dict[str, Any]]], processes: int, case: str
) -> None:
    for rank in found[processes]:
        disturbed, undisturbed = rank[case]["disturbed"], rank[case]["undisturbed"]
        assert [math.isnan(norm) for norm in disturbed["norms"]] == [False, True, True, False, False]
        kept = [norm for norm in disturbed["norms"] if not math.isnan(norm)]
        assert kept == undisturbed["norms"]
        first, *later = undisturbed["rates"]
        assert disturbed["rates"] == [first, first, first, *later]
        assert first < later[0] < later[1]
        for name, weight in undisturbed["weights"].items():
            assert torch.equal(disturbed["weights"][name], weight), name


@pytest.mark.parametrize("processes", [1, 2])
def test_too_many_bad_steps_in_a_row_stop_training(
    found: dict[int, list[dict[str, Any]]], processes: int
) -> None:
    for rank in found[processes]:
        number, message = rank["hopeless"]["error"]
        assert number == MAX_SKIPPED_STEPS
        assert f"{MAX_SKIPPED_STEPS} optimizer steps in a row" in message
        assert "lower train.learning_rate" in message


def test_completions_that_were_not_judged_are_as_if_they_were_not_there(
    found: dict[int, list[dict[str, Any]]], tiny_model: Path
) -> None:
    """Also where a whole rank's were not: the loss is divided by the judged sequences of all ranks."""
    (alone,) = found[1]
    for name, weight in alone["judged only"].items():
        assert torch.equal(alone["unjudged, ZeRO-2"][name], weight), name
        for rank in (alone, *found[2]):
            for stage in (2, 3):
                assert float((rank[f"unjudged, ZeRO-{stage}"][name] - weight).abs().max()) < 5e-5, name


class MortalEngine(ScriptedEngine):
    """Dies after some completions of its first batch; the next one built lives longer."""

    def __init__(
        self, renderer: PromptRenderer, completions: int | None, error: Exception | None = None
    ) -> None:
        super().__init__(renderer)
        self.completions = completions
        self.error = error or RuntimeError("a scheduler error")
        self.closed = False

    def generate(self, requests: Iterable[SampleRequest], sampling: SamplingParams) -> Iterator[Completion]:
        for number, completion in enumerate(super().generate(requests, sampling)):
            if number == self.completions:
                raise self.error
            yield completion

    def close(self) -> None:
        self.closed = True


@pytest.fixture
def setting(tmp_path: Path, tiny_model: Path) -> tuple[Config, PromptRenderer, list[Prompt]]:
    config = tiny_config(tmp_path, tiny_model, grader={"workers": 1})
    renderer = PromptRenderer(tiny_model, config.data)
    return config, renderer, load_prompts(config.data, config, renderer)[:8]


def engine_failed() -> EngineFailed:
    """As the vLLM engine says it."""
    failed = EngineFailed(
        "vLLM failed while it sampled (RuntimeError: a scheduler error); start the job again"
    )
    failed.__cause__ = RuntimeError("a scheduler error")
    return failed


@pytest.mark.parametrize("error", [None, engine_failed()], ids=["anything", "in a line"])
def test_an_engine_that_dies_is_built_anew_and_draws_the_same_with_the_current_weights(
    error: Exception | None,
    setting: tuple[Config, PromptRenderer, list[Prompt]],
    capsys: pytest.CaptureFixture[str],
) -> None:
    config, renderer, prompts = setting
    engines = [MortalEngine(renderer, 3, error), MortalEngine(renderer, None)]
    waiting = iter(engines)
    weights = [("a", torch.tensor(7.0))]
    draw = Draw(prompts=prompts, places=range(8), seed=5)
    with GraderPool(config.grader) as pool:
        undisturbed = Sampler(lambda: ScriptedEngine(renderer), pool, config.sampling, ALONE)
        sampler = Sampler(lambda: next(waiting), pool, config.sampling, ALONE)
        expected, died = undisturbed.settle(draw, undisturbed.attempt(draw), lambda: weights)
        assert died == 0
        for died_of_it in (1, 0):
            rollouts, died = sampler.settle(draw, sampler.attempt(draw), lambda: weights)
            assert died == died_of_it
            assert rollouts == expected
    assert [engine.closed for engine in engines] == [True, False]
    assert [engine.weights for engine in engines] == [{}, {"a": torch.tensor(7.0)}]
    said = capsys.readouterr().err
    assert said.count("warning: rank 0: the rollout engine died (RuntimeError: a scheduler error") == 1


def test_what_a_group_of_ranks_cannot_go_on_after_ends_the_job(
    setting: tuple[Config, PromptRenderer, list[Prompt]],
) -> None:
    config, renderer, prompts = setting
    with GraderPool(config.grader) as pool:
        died = UserError("vLLM failed while it sampled")
        sampler = Sampler(lambda: MortalEngine(renderer, 3, died), pool, config.sampling, ALONE)
        with pytest.raises(UserError, match="vLLM failed"):
            sampler.attempt(Draw(prompts=prompts, places=range(8), seed=5))


@pytest.mark.parametrize("is_in_a_line", [False, True])
def test_a_gpu_that_has_failed_ends_the_job(
    is_in_a_line: bool, setting: tuple[Config, PromptRenderer, list[Prompt]]
) -> None:
    """Nothing in this process can use it again."""
    config, renderer, prompts = setting
    error: Exception = torch.AcceleratorError("CUDA error: an illegal memory access was encountered")
    if is_in_a_line:
        failed = EngineFailed("vLLM failed while it sampled; start the job again")
        failed.__cause__ = error
        error = failed
    with GraderPool(config.grader) as pool:
        sampler = Sampler(lambda: MortalEngine(renderer, 3, error), pool, config.sampling, ALONE)
        with pytest.raises(UserError, match=r"the GPU failed .*illegal memory access .*start the job again"):
            sampler.attempt(Draw(prompts=prompts, places=range(8), seed=5))
        full = torch.AcceleratorError("CUDA error: out of memory")
        sampler = Sampler(lambda: MortalEngine(renderer, 3, full), pool, config.sampling, ALONE)
        assert sampler.attempt(Draw(prompts=prompts, places=range(8), seed=5)) is None, (
            "it can be built again"
        )


def test_an_engine_that_dies_twice_of_one_batch_ends_the_job(
    setting: tuple[Config, PromptRenderer, list[Prompt]],
) -> None:
    config, renderer, prompts = setting
    with GraderPool(config.grader) as pool:
        sampler = Sampler(lambda: MortalEngine(renderer, 3), pool, config.sampling, ALONE)
        draw = Draw(prompts=prompts, places=range(8), seed=5)
        first = sampler.attempt(draw)
        with pytest.raises(RuntimeError, match="a scheduler error"):
            sampler.settle(draw, first, list)


READER_LEAVES = """
import os, signal, sys
from common.terminal.console import Terminal
from stage2_train.safeguards import StopRequest
ours, theirs = os.pipe()
os.close(ours)
kept = os.dup(2)
for standard in (1, 2):
    os.dup2(theirs, standard)
said = []
for signalled in (False, True):
    console = Terminal()
    console.outlives_its_reader = True
    with StopRequest(console, is_main=True) as stop:
        said.append(stop.is_made)
        if signalled:
            signal.raise_signal(signal.SIGINT)
            said.append(stop.is_made)
        console.print("a line")
        said.append(stop.is_made)
    os.dup2(theirs, 1)
os.write(kept, repr(said).encode())
os._exit(0)
"""


def test_whoever_closes_the_pipe_of_the_output_asks_for_an_end_and_breaks_nothing() -> None:
    """As `train | head` does, and Ctrl-C in `train 2>&1 | tee log`, which ends tee at once."""
    result = subprocess.run(
        [sys.executable, "-c", READER_LEAVES], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert (result.returncode, result.stderr) == (0, "[False, True, False, True, True]")


WELL = {"completion/truncated": 0.9, "kl/sequence": 60.0, "kl/token": 0.1}


@pytest.mark.parametrize(
    ("wrong", "named"),
    [
        ({"completion/truncated": 0.96}, "96% of the completions do not end, KL to the reference is 60 nats"),
        ({"kl/token": 2.5}, "KL to the reference is 2.5 nats per token"),
    ],
)
def test_a_policy_that_has_collapsed_stops_training_with_advice(wrong: dict[str, float], named: str) -> None:
    refuse_divergence(7, WELL)
    refuse_divergence(7, WELL | {"completion/truncated": 1.0, "kl/sequence": 3.0})
    with pytest.raises(UserError, match=f"iteration 7: .*{named}; lower train.learning_rate"):
        refuse_divergence(7, WELL | wrong)


def test_a_policy_that_is_driven_into_collapse_is_noticed_before_a_checkpoint_is_made_of_it(
    tmp_path: Path, tiny_model: Path, artifacts: Path, run_cli: RunCli
) -> None:
    train = {"learning_rate": 0.1, "iterations": 20, "checkpoint_every": 1, "evaluate_every": 20}
    sampling = {"max_completion_tokens": 64}
    config = tiny_config(
        tmp_path,
        tiny_model,
        sampling=sampling,
        train=train,
        engine={"backend": "transformers"},
        grader={"workers": 1},
    ).model_copy(update={"seed": 2})  # with others it may fall silent in place of babbling
    write_tiny_vstar(config, tmp_path / "vstar.parquet")
    (tmp_path / "run.toml").write_text(as_toml(config), encoding="utf-8")
    files = ("--config", tmp_path / "run.toml", "--vstar", tmp_path / "vstar.parquet")
    finished = run_cli("train", *files, timeout=100, warm=True)
    assert finished.returncode == 2, finished.stderr
    stopped = re.search(r"error: iteration (\d+): the policy has collapsed: .*; lower", finished.stderr)
    assert stopped
    paths = run_paths(config.run)
    rows = [json.loads(line) for line in paths.metrics.read_text(encoding="utf-8").splitlines()]
    assert rows[-1]["iteration"] == int(stopped[1]) < 20
    assert rows[-1]["completion/tokens_mean"] > 4 * rows[1]["completion/tokens_mean"]
    assert latest_state(paths.checkpoints)["iteration"] == int(stopped[1]) - 1


def test_a_grader_that_fails_on_more_than_half_of_a_batch_stops_training() -> None:
    completion = Completion(key=0, token_ids=(1,), text="", truncated=False)
    prompt: Any = None
    grade = Grade(outcome=Outcome.VERIFIER_CRASH, reward=0.0, reason="KeyError: 'answer'")
    ours = [Rollout(prompt=prompt, completion=completion, grade=grade)]
    refuse_unjudged(3, 8, 16, ours)
    with pytest.raises(
        UserError, match=r"could not judge 9 of 16 completions, such as verifier_crash: KeyError"
    ):
        refuse_unjudged(3, 7, 16, ours)
