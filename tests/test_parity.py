"""An engine that samples from another network than the checkpoint's is found out before anything is learnt from it."""

import json
import math
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from common.errors import UserError
from common.parity import BOUNDS, PARITY, Gap, plain_logprobs, refuse_gap
from common.provenance import ACCEPTED, STRICT, Allowance, read_provenance
from common.runs import Shard, run_paths
from common.store import sample_files
from stage2_train.config import Config
from tests import stage1_runs, warm
from tests.fakes import tiny_config as stage1_config
from tests.parity_steps import faulty_engine
from tests.stage1_runs import write_questions
from tests.stage2_runs import tiny_config, write_tiny_vstar

pytestmark = pytest.mark.filterwarnings(r"ignore::DeprecationWarning:(torch|tensorboard|deepspeed|vllm)\..*")

BACKENDS = ["vllm", "transformers"]
FAULTS = ["scaled logits", "unknown softcap", "stale weights"]


# The figures.


def test_a_gap_is_over_all_tokens_and_one_that_is_no_number_is_beyond_every_bound() -> None:
    gap = Gap.between([[0.0, -1.0], [-2.0]], [[-0.5, -1.0], [-1.0]])
    assert (gap.largest, gap.mean, gap.tokens) == (1.0, 0.5, 3)
    assert str(gap) == "3 tokens, 5.0e-01 nats apart on average, 1.0e+00 at most"
    broken = Gap.between([[0.0, math.nan]], [[0.0, 0.0]])
    assert math.isnan(broken.largest)
    assert not any(broken.is_within(bound) for bound in BOUNDS.values())
    assert math.isnan(Gap.worst([gap, broken]).largest)
    assert Gap.worst([gap, Gap.between([[0.0]], [[-4.0]])]) == Gap(largest=4.0, mean=1.375, tokens=4)
    with pytest.raises(ValueError, match="shorter"):
        Gap.between([[0.0]], [[]])


def test_a_gap_beyond_the_bound_is_refused_with_what_was_found_and_what_to_try(tmp_path: Path) -> None:
    def refuse(gap: Gap, allowance: Allowance = STRICT, *, dtype: str = "float32", **sections: Any) -> str:
        config = stage1_config(tmp_path, tmp_path, model={"dtype": dtype}, **sections)
        return refuse_gap(gap, "A and B", config, allowance=allowance, remedy="nothing was drawn")

    gap = Gap(largest=0.02, mean=0.01, tokens=7)
    with pytest.raises(UserError) as caught:
        refuse(gap)
    for text in (
        "A and B give the same 7 tokens",
        "0.01 nats on average and 0.02",
        'engine.backend = "transformers"',
    ):
        assert text in str(caught.value)
    assert "model.dtype" not in str(caught.value)
    assert "--allow-mismatch parity" in str(caught.value)
    assert refuse(gap, dtype="bfloat16") == f"A and B agree: {gap}"
    assert refuse(gap, sampling={"temperature": 0.02}) == f"A and B agree: {gap}"
    wide = Gap(largest=0.2, mean=0.1, tokens=7)
    with pytest.raises(UserError, match=r'engine\.backend = "vllm", or model\.dtype = "float32"'):
        refuse(wide, dtype="bfloat16", engine={"backend": "transformers"})
    allowance = Allowance([PARITY])
    accepted = refuse(gap, allowance)
    [line] = allowance.used
    assert line.startswith("parity: A and B give")
    assert accepted == f"accepted: {line}"


# Stage 1.


def stage1(model: Path, folder: Path, monkeypatch: pytest.MonkeyPatch, fault: str) -> Config:
    monkeypatch.setattr(stage1_runs, "engine_builder", faulty_engine(fault))
    return stage1_config(model, write_questions(folder / "q.jsonl"), engine={"backend": "transformers"})


def test_stage_one_says_that_the_engine_samples_from_the_model(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, artifacts: Path
) -> None:
    config = stage1(tiny_model, tmp_path, monkeypatch, "none")
    said = "the engine (transformers) and a plain forward pass by transformers agree: "
    printed = stage1_runs.run(config, check=True)
    assert said in printed
    assert "compared nothing" not in printed
    assert ACCEPTED not in read_provenance(artifacts / "test" / "vstar.parquet").context


@pytest.mark.parametrize("fault", FAULTS[:2])
def test_stage_one_draws_nothing_from_another_network_unless_that_is_accepted(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, artifacts: Path, fault: str
) -> None:
    config = stage1(tiny_model, tmp_path, monkeypatch, fault)
    with pytest.raises(UserError, match=r"the engine \(transformers\) and a plain forward pass .* differ by"):
        stage1_runs.run(config, check=True)
    assert sample_files(run_paths("test").samples) == []
    said = stage1_runs.run(config, check=True, allow_mismatch=[PARITY])
    assert "accepted: parity: the engine" in said
    assert " agree: " not in said
    path = artifacts / "test" / "vstar.parquet"
    for file in (path, *sample_files(run_paths("test").samples)):
        [line] = read_provenance(file).context[ACCEPTED]
        assert line.startswith("parity: the engine")
    before = path.read_bytes()
    assert "nothing to do" in stage1_runs.run(config, check=True)
    assert path.read_bytes() == before


def test_what_was_accepted_for_shards_is_in_the_file_that_is_made_of_them(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, artifacts: Path
) -> None:
    config = stage1(tiny_model, tmp_path, monkeypatch, "scaled logits")
    for index in (1, 2):
        stage1_runs.run(config, check=True, allow_mismatch=[PARITY], shard=Shard(index, 2))
    assert "samples to draw" not in stage1_runs.run(config, check=True)
    lines = read_provenance(artifacts / "test" / "vstar.parquet").context[ACCEPTED]
    assert len(lines) == 2
    assert all(line.startswith("parity: the engine") for line in lines)
    assert "nothing to do" in stage1_runs.run(config, check=True)


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_plain_log_probs_are_those_of_the_sampling_temperature(tiny_model: Path, temperature: float) -> None:
    [found] = plain_logprobs(tiny_model, "float32", temperature, [((3, 4), (5, 6))])
    model = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
    with torch.no_grad():
        logits_TV = model(torch.tensor([[3, 4, 5, 6]])).logits[0].double() / temperature
    expected = [
        float(logits_TV[place, token] - logits_TV[place].exp().sum().log())
        for place, token in ((1, 5), (2, 6))
    ]
    assert found == pytest.approx(expected, abs=1e-5)


# Stage 2.


@pytest.fixture(scope="module")
def prepared(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Config]:
    folder = tmp_path_factory.mktemp("parity")
    config = tiny_config(folder, tiny_model, train={"iterations": 2, "learning_rate": 3e-3})
    write_tiny_vstar(config, folder / "vstar.parquet")
    return folder, config


def train(
    prepared: tuple[Path, Config], artifacts: Path, backend: str, fault: str, *allowed: str
) -> "subprocess.CompletedProcess[str]":
    folder, config = prepared
    document: dict[str, Any] = config.model_dump(mode="json")
    document["engine"]["backend"] = backend
    order = {"config": document, "vstar": str(folder / "vstar.parquet"), "fault": fault, "allowed": allowed}
    environment = {**os.environ, "ASTAR_PO_ARTIFACTS": str(artifacts), "OMP_NUM_THREADS": "1"}
    return warm.run(["-m", "tests.parity_steps", json.dumps(order)], env=environment)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_sound_engine_passes_before_the_first_iteration_and_after_the_first_load(
    prepared: tuple[Path, Config], tmp_path: Path, backend: str
) -> None:
    result = train(prepared, tmp_path, backend, "none")
    assert result.returncode == 0, result.stdout + result.stderr[-3000:]
    lines = [line for line in result.stdout.splitlines() if "trainer's policy agree" in line]
    assert [line.partition(" the engine")[0] for line in lines] == [
        "before the first iteration",
        "after iteration 1",
    ]
    written = json.loads((tmp_path / "tiny" / "model" / "astar_po.json").read_text())
    assert written[ACCEPTED] == []


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("fault", FAULTS)
def test_training_on_another_network_ends_within_one_iteration(
    prepared: tuple[Path, Config], tmp_path: Path, backend: str, fault: str
) -> None:
    result = train(prepared, tmp_path, backend, fault)
    assert result.returncode == 2, result.stdout + result.stderr[-3000:]
    when = "after iteration 1" if fault == "stale weights" else "before the first iteration"
    assert f"error: parity: {when} the engine ({backend}) and the trainer's policy give" in result.stdout
    assert not (tmp_path / "tiny" / "model").exists()


def test_an_accepted_gap_is_recorded_beside_the_model(prepared: tuple[Path, Config], tmp_path: Path) -> None:
    result = train(prepared, tmp_path, "transformers", "scaled logits", PARITY)
    assert result.returncode == 0, result.stdout + result.stderr[-3000:]
    written = json.loads((tmp_path / "tiny" / "model" / "astar_po.json").read_text())
    assert len(written[ACCEPTED]) >= 2
    assert all(line.startswith("parity: ") for line in written[ACCEPTED])
    assert "nothing to do" in train(prepared, tmp_path, "transformers", "scaled logits").stdout
