"""Settings that save memory give the same result: LoRA, offloaded optimizer or reference, bfloat16 with float32 copies.

Steps are those of tests/lean_steps.py, in one process and in two. Sums over two are taken in another order.
"""

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from common.errors import UserError
from stage2_train.config import Config, LoraConfig, TrainConfig
from tests import warm
from tests.conftest import ROOT
from tests.lean_steps import LORA, SMALL_STEP, SMALL_STEPS, SMALL_UPDATES, STAGES, Weights, changed, tokens
from tests.stage2_runs import tiny_config

RUNS = [(1, 0), (1, 1), (1, 2), (1, 3), (2, 2), (2, 3)]
"""Processes, and ZeRO's stage."""
TOLERANCE = 1e-6
"""Absolute, for weights that four steps move by up to 4e-3 (measured: 1e-7)."""
LINEAR = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@pytest.fixture(scope="module")
def config(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Config:
    return tiny_config(tmp_path_factory.mktemp("data"), tiny_model)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("lean")


@pytest.fixture(scope="module")
def found(config: Config, folder: Path) -> dict[int, list[dict[str, Any]]]:
    """What each rank of one process and of two found."""
    results = {}
    for processes in (1, 2):
        job, output = folder / f"job-{processes}.json", folder / f"found-{processes}"
        job.write_text(json.dumps({"config": config.model_dump(mode="json"), "output": str(output)}))
        launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
        finished = warm.run(
            [*(launcher if processes > 1 else []), "-m", "tests.lean_steps", job],
            cwd=ROOT,
            env={**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
            timeout=300,
        )
        assert finished.returncode == 0, finished.stderr[-4000:]
        results[processes] = [torch.load(f"{output}.{rank}") for rank in range(processes)]
    return results


def difference(ours: Weights, theirs: Weights) -> float:
    assert ours.keys() == theirs.keys()
    return max(float((weight - theirs[name]).abs().max()) for name, weight in ours.items())


@pytest.mark.parametrize("stage", STAGES)
def test_an_adapter_starts_at_the_base_model_and_moves_the_adapted_layers_alone(
    found: dict[int, list[dict[str, Any]]], stage: int, tiny_model: Path
) -> None:
    base = load_file(tiny_model / "model.safetensors")
    case = found[1][0]["LoRA"][stage]
    assert difference(case["at start"], base) == 0
    for name, weight in case["weights"].items():
        is_adapted = name.split(".")[-2] in LINEAR and name.endswith(".weight")
        assert torch.equal(weight, base[name]) != is_adapted, name
    # Each of two layers: seven matrices of 64 × 64.
    assert case["optimized"] == 2 * 7 * LORA.rank * (64 + 64)


@pytest.mark.parametrize(("processes", "stage"), RUNS)
def test_processes_and_zero_stages_take_the_same_steps_of_an_adapter(
    found: dict[int, list[dict[str, Any]]], processes: int, stage: int
) -> None:
    expected = found[1][0]["LoRA"][0]["weights"]
    first, *others = (rank["LoRA"][stage]["weights"] for rank in found[processes])
    assert difference(first, expected) < TOLERANCE
    assert all(difference(other, first) == 0 for other in others)


@pytest.mark.parametrize(("processes", "stage"), RUNS)
def test_the_policy_without_its_adapter_is_the_reference_model(
    found: dict[int, list[dict[str, Any]]], processes: int, stage: int
) -> None:
    for rank in found[processes]:
        ours, separate = rank["LoRA"][stage]["reference"]
        assert len(ours) == len(separate)
        assert all(torch.equal(*pair) for pair in zip(ours, separate, strict=True))


def test_the_reference_has_no_dropout_and_the_policy_keeps_its_own(
    found: dict[int, list[dict[str, Any]]],
) -> None:
    case = found[1][0]["dropout"]
    assert torch.equal(case["reference"][0], case["separate"][0])
    assert not torch.equal(*case["policy"])


@pytest.mark.parametrize(("processes", "stage"), RUNS)
def test_a_checkpoint_holds_the_adapter_alone_and_is_continued_bit_for_bit(
    found: dict[int, list[dict[str, Any]]], processes: int, stage: int
) -> None:
    for rank in found[processes]:
        case = rank["LoRA"][stage]
        assert case["kept"]
        assert all(".lora_" in name for name in case["kept"])
        assert difference(case["resumed"], case["weights"]) == 0


@pytest.mark.parametrize(("processes", "stage"), RUNS)
def test_the_exported_model_is_merged_and_its_adapter_loads_into_the_base_model(
    found: dict[int, list[dict[str, Any]]], processes: int, stage: int, folder: Path, tiny_model: Path
) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    from stage2_train.logprobs import LogprobModel, token_logprobs

    case = found[processes][0]["LoRA"][stage]
    model = folder / f"found-{processes}-model-{stage}"
    assert difference(load_file(model / "model.safetensors"), case["weights"]) == 0
    base = AutoModelForCausalLM.from_pretrained(tiny_model)
    adapted: Any = PeftModel.from_pretrained(base, model / "adapter").get_base_model()
    for exported in (AutoModelForCausalLM.from_pretrained(model), adapted):
        with torch.no_grad():
            logprobs_K = token_logprobs(LogprobModel(exported, 1.0), tokens(1000)).logprobs_K
        torch.testing.assert_close(logprobs_K, case["logprobs"], rtol=0, atol=1e-5)


@pytest.mark.parametrize(("processes", "stage"), RUNS)
def test_a_checkpoint_is_exported_with_the_weights_that_the_policy_had(
    found: dict[int, list[dict[str, Any]]], processes: int, stage: int, folder: Path, tmp_path: Path
) -> None:
    from stage2_train.export import export_checkpoint

    case = found[processes][0]
    expected = {"lora": case["LoRA"][stage]["at checkpoint"], "whole": case["whole"][stage]}
    for name, weights in expected.items():
        (checkpoint,) = (folder / f"found-{processes}-{name}-{stage}" / "checkpoints").iterdir()
        export_checkpoint(checkpoint, tmp_path / name)
        exported = load_file(tmp_path / name / "model.safetensors")
        assert difference(exported, weights) == 0
        assert {weight.dtype for weight in exported.values()} == {weight.dtype for weight in weights.values()}
    assert (tmp_path / "lora" / "adapter" / "adapter_model.safetensors").is_file()


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_an_offloaded_optimizer_takes_the_same_steps(
    found: dict[int, list[dict[str, Any]]], stage: int, tiny_model: Path
) -> None:
    """So does one that is offloaded, or no longer, after a restart."""
    weights = found[1][0]["offloaded"][stage]
    assert len(weights) == 4
    for name in weights:
        assert difference(weights[name], weights["resident"]) < 1e-5, name
    assert difference(weights["resident"], load_file(tiny_model / "model.safetensors")) > 1e-3


@pytest.mark.parametrize("case", SMALL_UPDATES)
def test_steps_too_small_for_bfloat16_add_up(
    found: dict[int, list[dict[str, Any]]], case: tuple[int, bool]
) -> None:
    """Between 1/64 and 1/32 bfloat16 has a number every 1.2e-4; AdamW's steps here are of 2e-5."""
    start, once, often = found[1][0]["small updates"][case]

    def moved(weights: Weights) -> float:
        """The share of the matrices' weights in that range that are others than at the start."""
        pairs = [(weight, weights[name]) for name, weight in start.items() if "_proj.weight" in name]
        chosen = torch.cat([((old.abs() > 1 / 64) & (old.abs() < 1 / 32)).flatten() for old, _ in pairs])
        return float(torch.cat([(old != new).flatten() for old, new in pairs])[chosen].float().mean())

    assert SMALL_STEP < 1.2e-4 / 2 < 1.2e-4 < SMALL_STEP * SMALL_STEPS
    assert moved(once) == 0
    assert moved(often) > 0.5


def test_an_offloaded_reference_gives_the_same_log_probs_and_is_in_main_memory_between_visits(
    config: Config,
) -> None:
    from stage2_train.scorers import SeparateModel

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    batch = tokens(0).to(device)
    resident = SeparateModel(Path(config.model.path), config, device)
    offloaded = SeparateModel(Path(config.model.path), changed(config, offload_reference=True), device)
    for _visit in range(2):
        assert torch.equal(offloaded.score([batch])[0], resident.score([batch])[0])
        assert {parameter.device.type for parameter in offloaded._module.parameters()} == {"cpu"}


def test_under_zero_3_each_rank_holds_a_share_of_the_reference_and_gets_the_log_probs_of_the_whole(
    found: dict[int, list[dict[str, Any]]],
) -> None:
    """In float32 and bfloat16, offloaded or not. Ranks score unequal numbers of batches."""
    for rank in found[2]:
        assert len(rank["references"]) == 4
        for case in rank["references"]:
            assert case["gathered"] == 0
            assert case["held"] == pytest.approx(case["all"] / 2, rel=0.01)
            for scores, expected in zip(case["scores"], case["expected"], strict=True):
                assert len(scores) == len(expected) > 0
                assert all(torch.equal(*pair) for pair in zip(scores, expected, strict=True))


def test_a_layer_that_cannot_be_adapted_is_named(config: Config) -> None:
    from stage2_train.logprobs import load_model
    from stage2_train.lora import Adapter

    for name in ("lm_head", "embed_tokens", "wq"):
        chosen = LoraConfig(target_modules=("q_proj", name))
        model = load_model(Path(config.model.path), config).model
        with pytest.raises(
            UserError, match=f"no linear layers called {name} before its output layer; choose"
        ):
            Adapter(model, changed(config, lora=chosen))


def test_options_that_contradict_each_other_are_refused() -> None:
    with pytest.raises(ValueError, match="offload_optimizer needs ZeRO, found zero_stage 0"):
        TrainConfig(offload_optimizer=True, zero_stage=0)
    with pytest.raises(ValueError, match="offload_reference has nothing to move under lora"):
        TrainConfig(offload_reference=True, lora=LoraConfig())
    with pytest.raises(ValueError, match="target_modules"):
        LoraConfig(target_modules=())


def test_bfloat16_needs_zero(config: Config) -> None:
    """Without it DeepSpeed's optimizer has taken a step, of weight decay alone, before the first gradient."""
    document = config.model_dump()
    document["model"]["dtype"] = "bfloat16"
    Config.model_validate(document)
    document["train"]["zero_stage"] = 0
    with pytest.raises(ValueError, match=r"zero_stage 0 cannot be combined with model\.dtype bfloat16"):
        Config.model_validate(document)
