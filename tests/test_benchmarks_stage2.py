"""The benchmarks of stage 2: operations against torch's own count, and that no objective is forgotten."""

from pathlib import Path

import pytest
import torch
from pydantic import ValidationError
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM

from benchmarks.flops import forward_flops
from benchmarks.objectives import BASELINE, objectives
from benchmarks.scale import SHAPES
from benchmarks.training import save_random_model
from stage2_train.config import TrainConfig
from stage2_train.memory import read_shape


def test_operations_are_those_that_torch_counts_but_for_what_a_causal_attention_leaves_out(
    tmp_path: Path,
) -> None:
    save_random_model(tmp_path, SHAPES["tiny"])
    shape, length = read_shape(tmp_path), 128
    # torch's counter does not know the fused attention
    model = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="eager")
    with FlopCounterMode(display=False) as counted:
        model(input_ids=torch.zeros(2, length, dtype=torch.long), use_cache=False)
    # The counted attention looks at all pairs of positions.
    left_out = 2 * shape.layers * 2 * shape.queries * (2 * length**2 - length * (length + 1))
    ours = forward_flops(shape, [length, length], [length, length])
    assert ours + left_out == counted.get_total_flops()


def test_the_objectives_that_are_compared_are_those_that_a_config_can_name() -> None:
    names = objectives()
    assert names[0] == BASELINE
    for name in names:
        assert TrainConfig.model_validate({"objective": {"name": name}}).objective.name == name
    with pytest.raises(ValidationError) as refused:
        TrainConfig.model_validate({"objective": {"name": "unheard of"}})
    assert all(f"'{name}'" in str(refused.value) for name in names)
    assert str(refused.value).count("', '") == len(names) - 1, "every name that is accepted is compared"
