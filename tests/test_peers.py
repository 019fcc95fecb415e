"""The parts of benchmarks/peers that need neither TRL nor a model."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.peers import grpo
from benchmarks.peers.__main__ import main
from benchmarks.peers.demo import seconds_to
from benchmarks.peers.job import GRPOSteps
from benchmarks.peers.vocabulary import BATCH_SIZE, LONGEST, completion_lengths
from benchmarks.processes import run
from benchmarks.tables import Column, Values, comparison
from tests.conftest import ROOT

TRL_GRPO = GRPOSteps.read(ROOT / grpo.GOLDEN)


def test_the_time_to_an_accuracy_lies_on_the_line_between_two_evaluations() -> None:
    curve = [(10.0, 0.5), (20.0, 0.6), (30.0, 0.8), (40.0, 0.7), (50.0, 0.9)]
    assert seconds_to(curve, 0.7) == pytest.approx(25.0)
    assert seconds_to(curve, 0.8) == pytest.approx(30.0)
    assert seconds_to(curve, 0.85) == pytest.approx(47.5)
    assert seconds_to(curve, 0.95) is None
    assert seconds_to(curve, 0.4) == 10.0, "reached before training"


def test_ratios_are_taken_repetition_by_repetition_and_a_run_that_never_got_there_is_counted() -> None:
    values: Values = {"ours": [10.0, 20.0, 40.0], "peer": [30.0, 40.0, None]}
    rows = comparison("trainer", [Column(name="seconds", digits=0, values=values)]).splitlines()
    assert rows[2] == "| ours | 20 (10–40) | 1 |"
    assert rows[3] == "| peer | 35 (30–40) in 2 of 3 | 2.50 (2.00–3.00) in 2 of 3 |"


def test_forced_lengths_are_long_tailed_and_reach_the_longest() -> None:
    lengths = completion_lengths(BATCH_SIZE // 2)
    assert lengths == sorted(lengths)
    assert lengths[-1] == LONGEST
    assert lengths[len(lengths) // 2] < LONGEST / 4


def test_the_memory_of_a_process_counts_its_children_and_a_failure_shows_its_output(tmp_path: Path) -> None:
    child = "import time; held = b'x' * (100 << 20); time.sleep(0.5)"
    parent = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {child!r}])"
    finished = run([sys.executable, "-c", parent], tmp_path / "log")
    assert 100 < finished.peak_mib < 250
    with pytest.raises(RuntimeError, match="a reason to fail"):
        run([sys.executable, "-c", "raise SystemExit('a reason to fail')"], tmp_path / "log")


def test_what_runs_in_trls_environment_needs_nothing_else_of_this_project() -> None:
    """TRL's environment has neither vllm nor deepspeed nor polars: the job, the clock and the reward load without."""
    missing = ["vllm", "deepspeed", "polars", "math_verify", "typer"]
    code = f"""
import sys
sys.modules.update(dict.fromkeys({json.dumps(missing)}))
import benchmarks.peers.job, benchmarks.processes
from common.grading import rule_gsm8k
assert rule_gsm8k.grade("", "so #### 3", "3").reward == 1.0
"""
    subprocess.run([sys.executable, "-c", code], check=True, env={**os.environ, "PYTHONPATH": "."})


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (["vocabulary", "--set", "vstar.num_samples=2"], "--set is for demo alone, not for vocabulary"),
        (["demo", "--set", "vstar.num_samples"], "--set takes KEY=VALUE, found vstar.num_samples"),
    ],
)
def test_a_setting_that_would_have_no_effect_is_refused_before_earlier_results_go(
    options: list[str],
    named: str,
    monkeypatch: pytest.MonkeyPatch,
    artifacts: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    kept = artifacts / "peers" / options[0] / "runs.json"
    kept.parent.mkdir(parents=True)
    kept.write_text("[]")
    monkeypatch.setattr(sys, "argv", ["peers", *options])
    with pytest.raises(SystemExit):
        main()
    assert named in capsys.readouterr().err
    assert kept.exists()


@pytest.mark.parametrize("number", range(len(TRL_GRPO.options)), ids=map(grpo.name_of, TRL_GRPO.options))
def test_grpos_advantages_loss_and_gradient_are_trls(number: int) -> None:
    """TRL's are those that `python -m benchmarks.peers grpo --write` has kept."""
    own = grpo.ours(TRL_GRPO, TRL_GRPO.options[number])
    for _, relative in grpo.differences(own, grpo.trls(TRL_GRPO, number)):
        assert relative < grpo.TOLERANCE


def test_the_numbers_that_grpo_is_compared_on_tell_its_settings_apart() -> None:
    assert TRL_GRPO.options == grpo.combinations()
    of_one_batch = [
        loss
        for loss, options in zip(TRL_GRPO.losses, TRL_GRPO.options, strict=True)
        if options["gradient_accumulation_steps"] == 1 and options["loss_type"] != "bnpo"
    ]
    assert len({round(loss, 9) for loss in of_one_batch}) == len(of_one_batch) == 50
    advantages_K = [
        advantage
        for advantage, length in zip(TRL_GRPO.advantages[0], TRL_GRPO.lengths, strict=True)
        for _ in range(length)
    ]
    ratios_K = [math.exp(new - old) for new, old in zip(TRL_GRPO.logprobs, TRL_GRPO.old, strict=True)]
    for sign in (-1, 1):
        for low, high in ((0.0, 0.8), (0.8, 1.2), (1.28, 2.0)):
            tokens = zip(advantages_K, ratios_K, strict=True)
            assert any(sign * advantage > 0 and low < ratio < high for advantage, ratio in tokens)
