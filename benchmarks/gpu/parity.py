"""One policy read three ways: vLLM, the trainer, and a plain forward pass in main memory; before and after updates.

Stage 2's own trainer, with an engine that sleeps while it works, on a model of random weights. After updates the plain
forward reads the model as `export` writes it. With an adapter, vLLM has it beside the first weights, and the exported
model has it merged.
"""

from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from benchmarks.gpu.findings import Findings
from benchmarks.gpu.models import engine_values, settings
from benchmarks.gpu.reload import spread_model
from benchmarks.gpu.watch import TimedEngine
from benchmarks.training import made_up_data, training
from common.engines import LowRank, build_engine
from common.parity import BOUNDS, Gap, engine_logprobs, plain_logprobs
from common.rollout import Rollout
from stage2_train.collate import Cutter
from stage2_train.config import Config
from stage2_train.parity import parity_draw, scored
from stage2_train.scorers import PolicyScorer
from stage2_train.train import Trainer

ITERATIONS = 3
PROMPT, COMPLETION = 40, 64
LEAST_MOVE = 1.0
"""Times the mean gap that is allowed: as far must the policy move, so that old weights would be noticed."""


Gaps = dict[str, list[Gap]]
"""Of each pair, in the order of the iterations."""


def measure(findings: Findings, folder: Path, *, dtype: str, lora: bool = False) -> None:
    """Some iterations, with the log-probs before the first and after each."""
    model = spread_model(folder, is_tiny=findings.is_tiny, tied=True, odd=True, dtype=dtype)
    config = settings(
        model,
        {
            "model.dtype": dtype,
            "data.max_prompt_tokens": PROMPT,
            "sampling.max_completion_tokens": COMPLETION,
            **engine_values(is_tiny=findings.is_tiny, share=0.3),
            "engine.max_num_seqs": 16,
            "engine.enforce_eager": "true",
            "train.batch_size": 16,
            "train.mini_batch_size": 8,
            "train.learning_rate": 1e-3 if findings.is_tiny else 2e-4,
            "train.warmup_steps": 0,
            "train.objective.beta2": 0.01,
            **({"train.lora.rank": 8} if lora else {}),
        },
    )
    data = made_up_data(model, config, [PROMPT] * 16)
    adapter = None if (given := config.train.lora) is None else LowRank(rank=given.rank, alpha=given.alpha)
    build = partial(build_engine, config, model, data.renderer, beside_trainer=True, adapter=adapter)
    gaps: Gaps = {}
    with training(config, data, lambda: TimedEngine(build)) as trainer:
        compare(findings, trainer, config, model, 0, gaps)
        for number in range(1, ITERATIONS + 1):
            turn = trainer.iteration(number, ITERATIONS)
            findings.row(
                "Iterations",
                iteration=number,
                largest_gap_while_drawing=turn.metrics["engine/logprob_gap"],
                gradient_norm=turn.metrics["train/gradient_norm"],
                steps_skipped=turn.metrics["train/skipped_steps"],
            )
            compare(findings, trainer, config, model, number, gaps)
    bound = BOUNDS[dtype]
    for pair, those in gaps.items():
        worst = Gap.worst(those)
        findings.at_most(f"{pair}, nats on average", worst.mean, bound.mean)
        findings.at_most(f"{pair}, nats at most", worst.largest, bound.largest)


def compare(
    findings: Findings, trainer: Trainer[Any], config: Config, model: Path, number: int, gaps: Gaps
) -> None:
    """Add the gaps of the three pairs after iteration `number`."""
    rollouts: list[Rollout] = trainer.source.now(parity_draw(trainer.data, config, trainer.ranks), number)
    cut = Cutter(config.train, trainer.data.renderer, trainer.ranks)
    sequences = [(tuple(each.prompt.token_ids), each.completion.token_ids) for each in rollouts]
    temperature = config.sampling.temperature or 1.0
    with TemporaryDirectory() as place:
        exported = model
        if number:
            exported = Path(place, "model")
            trainer.parts.policy.export(exported)
        found = {
            "vLLM": [list(engine_logprobs(each.completion)) for each in rollouts],
            "trainer": scored(rollouts, PolicyScorer(trainer.parts.policy, trainer.ranks), cut),
            "plain": plain_logprobs(exported, config.model.dtype, temperature, sequences),
        }
    for one, other in (("vLLM", "trainer"), ("vLLM", "plain"), ("trainer", "plain")):
        gap = Gap.between(found[one], found[other])
        pair = f"{one} and {other}"
        findings.row(
            "Gaps in nats", after=number, pair=pair, mean=gap.mean, largest=gap.largest, tokens=gap.tokens
        )
        gaps.setdefault(pair, []).append(gap)
    if number == ITERATIONS:
        at_first = plain_logprobs(model, config.model.dtype, temperature, sequences)
        moved = Gap.between(found["trainer"], at_first)
        findings.at_least(
            "nats on average that the policy has moved",
            moved.mean,
            LEAST_MOVE * BOUNDS[config.model.dtype].mean,
        )
