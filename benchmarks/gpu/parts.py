"""The parts of `benchmarks.gpu`: what each measures, by name, in the order in which they are worth their time."""

from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any

from benchmarks.gpu.findings import Findings
from common.errors import UserError

LIMIT_SECONDS = 100
"""For each part's process, its start included."""

ITERATIONS = {"1.5b": 256, "3b": 128, "7b": 64}
"""Prompts of a whole iteration with an engine, by the model's shape: what fits the limit."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """A measurement that runs in a process of its own, which ends after LIMIT_SECONDS."""

    name: str
    what: str
    module: str
    """In this package: its `measure` takes the findings to add to, a folder that parts share, and the arguments."""
    arguments: dict[str, Any] = field(default_factory=dict)

    def measure(self, findings: Findings, folder: Path) -> None:
        """Run it in this process."""
        import_module(f"benchmarks.gpu.{self.module}").measure(findings, folder, **self.arguments)


def _demos() -> list[Part]:
    return [
        Part(
            name=f"demo-{backend}-{dtype}",
            what=f"`vstar` and `train` on the demo, {backend}, {dtype}: both stages end to end",
            module="demo",
            arguments={"backend": backend, "dtype": dtype},
        )
        for dtype in ("bfloat16", "float32")
        for backend in ("vllm", "transformers")
    ]


def _parities() -> list[Part]:
    ways: dict[str, dict[str, Any]] = {
        "bfloat16": {"dtype": "bfloat16"},
        "float32": {"dtype": "float32"},
        "adapter": {"dtype": "bfloat16", "lora": True},
    }
    return [
        Part(
            name=f"parity-{name}",
            what=f"log-probs of vLLM, the trainer and a plain forward, before and after updates: {name}",
            module="parity",
            arguments=arguments,
        )
        for name, arguments in ways.items()
    ]


def _reloads() -> list[Part]:
    crossed = [
        Part(
            name=f"reload-{mode}-{head}-{size}",
            what=f"sleep, wake, reload: {mode}, {head} head, vocabulary {'not ' if size == 'odd' else ''}a multiple "
            "of 64",
            module="reload",
            arguments={"eager": mode == "eager", "tied": head == "tied", "odd": size == "odd"},
        )
        for mode in ("graphs", "eager")
        for head in ("untied", "tied")
        for size in ("odd", "even")
    ]
    other = Part(
        name="reload-graphs-qwen3",
        what="the same for Qwen3, which runs in the second model runner of vLLM 0.24 too, untied, not a multiple of 64",
        module="reload",
        arguments={"eager": False, "tied": False, "odd": True, "architecture": "qwen3"},
    )
    return [crossed[0], other, *crossed[1:]]


def _lives() -> list[Part]:
    return [
        Part(
            name="ahead",
            what="completions that a thread draws ahead in a stream of its own, against the main thread's",
            module="ahead",
        ),
        Part(
            name="rebuild",
            what="an engine with graphs and sleep mode, closed and built again in the same process: memory, tokens",
            module="rebuild",
        ),
    ]


def _at_scale() -> list[Part]:
    adapted = {"7b": "an adapter, and the forecast of training all weights"}
    updates = [
        Part(
            name=f"update-{shape}",
            what=f"reference and update, random tokens, no engine, {shape}: rate, memory"
            + (f"; {adapted[shape]}" if shape in adapted else ""),
            module="update",
            arguments={"shape": shape, "lora": shape in adapted},
        )
        for shape in ("1.5b", "3b", "7b")
    ]
    naive = Part(
        name="naive-1.5b",
        what="the same with full logits under autograd, and with ours, in micro-batches of 4,096 tokens",
        module="naive",
    )
    compiled = Part(
        name="compiled-1.5b",
        what="reference and update as in update-1.5b, with each layer compiled by torch, which the product does not do",
        module="update",
        arguments={"shape": "1.5b", "compiled": True},
    )
    iterations = [
        Part(
            name=f"iteration-{shape}",
            what=f"a whole iteration with vLLM, {prompts} completions of 1,024 tokens, {shape}: phases, memory"
            + (", an adapter" if shape in adapted else ""),
            module="iteration",
            arguments={"shape": shape, "lora": shape in adapted, "prompts": prompts},
        )
        for shape, prompts in ITERATIONS.items()
    ]
    methods = [
        Part(
            name=f"method-{objective}",
            what=f"a whole iteration with vLLM, 128 prompts, 512 tokens, 1.5b: {objective}",
            module="iteration",
            arguments={"shape": "1.5b", "objective": objective, "prompts": 128, "longest": 512, "warm_up": 1},
        )
        for objective in ("astar_po", "ppo", "grpo", "rebel")
    ]
    return [*updates, *iterations, *methods, naive, compiled]


def _stage1() -> list[Part]:
    return [
        Part(
            name=f"sampling-{shape}",
            what=f"stage 1 against bare vLLM, {shape}: tokens a second",
            module="sampling",
            arguments={"shape": shape},
        )
        for shape in ("1.5b", "demo")
    ]


def _suspects() -> list[Part]:
    suspects = {
        "sweep": "an update with other micro-batches, slices of logits and costs of a batch; padding",
        "logits": "log-probs of completion tokens alone, by several methods: time and memory",
        "accumulation": "gradients of many slices added up in bfloat16 and in float32",
        "noise": "a step of the transformers engine's sampler at a vocabulary of 151,936",
    }
    return [Part(name=name, what=what, module=name) for name, what in suspects.items()]


PARTS = {
    part.name: part
    for part in [
        *_demos(),
        *_parities(),
        Part(
            name="formula",
            what="ZeRO 0 to 3 and an adapter against the formula in plain torch, float32 and bfloat16",
            module="against_formula",
        ),
        *_reloads(),
        *_lives(),
        *_at_scale(),
        *_stage1(),
        *_suspects(),
    ]
}


def chosen_parts(names: list[str]) -> list[Part]:
    """The parts of these names, or that begin with them and `-`; all without a name. Raises UserError."""
    if not names:
        return list(PARTS.values())
    found: dict[str, Part] = {}
    for name in names:
        those = {each: part for each, part in PARTS.items() if each == name or each.startswith(f"{name}-")}
        if not those:
            raise UserError(f"--part {name}: there is no such part; --list shows them")
        found |= those
    return list(found.values())
