"""The arithmetic behind the benchmarks of stage 2: operations and parameters against torch's own counts."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig, AutoModelForCausalLM

from benchmarks.flops import forward_flops
from benchmarks.scale import SHAPES, shape_of


def model_of(name: str) -> torch.nn.Module:
    """A model with random weights."""
    model: torch.nn.Module = AutoModelForCausalLM.from_config(
        AutoConfig.for_model(**SHAPES[name]),
        attn_implementation="eager",  # torch's counter does not know the fused one
    )
    return model


@pytest.mark.parametrize("name", SHAPES)
def test_a_shape_has_the_parameters_of_the_model(name: str) -> None:
    with torch.device("meta"):
        model = model_of(name)
    assert shape_of(SHAPES[name]).parameters == sum(weight.numel() for weight in model.parameters())


def test_operations_are_those_that_torch_counts_but_for_what_a_causal_attention_leaves_out() -> None:
    shape, length = shape_of(SHAPES["tiny"]), 128
    with FlopCounterMode(display=False) as counted:
        model_of("tiny")(input_ids=torch.zeros(2, length, dtype=torch.long), use_cache=False)
    # The counted attention looks at all pairs of positions.
    left_out = 2 * shape.layers * 2 * shape.queries * (2 * length**2 - length * (length + 1))
    ours = forward_flops(shape, [length, length], [length, length])
    assert ours + left_out == counted.get_total_flops()
