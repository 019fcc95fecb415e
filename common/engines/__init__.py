"""The engines that sample completions, and the function that builds the configured one."""

from functools import partial
from pathlib import Path

from common.config import RunConfig
from common.data.rendering import PromptRenderer
from common.engines.count import with_engines
from common.engines.protocol import EngineBuilder, EngineSource, LowRank, RolloutEngine
from common.packages import refuse_missing

__all__ = ["LOCAL", "EngineBuilder", "EngineSource", "LowRank", "RolloutEngine", "build_engine"]


def build_engine(
    config: RunConfig,
    folder: Path,
    renderer: PromptRenderer,
    *,
    beside_trainer: bool,
    adapter: LowRank | None = None,
) -> RolloutEngine:
    """Load the model in `folder` into the configured engine, or into several in processes of their own.

    `beside_trainer` means that a training job uses the same process and device; `adapter` as in EngineBuilder.
    """
    if beside_trainer and config.engine.placement == "own processes":
        from common.engines.local_workers import fleet_beside_trainer

        return fleet_beside_trainer(config, folder, renderer, partial(build_engine, adapter=adapter))
    if not beside_trainer and config.engine.engines not in ("auto", 1):
        from common.engines.local_workers import fleet_of_machine

        return fleet_of_machine(config, folder, renderer, build_engine)
    if config.engine.backend == "vllm":
        refuse_missing("vllm", 'engine.backend is "vllm"', 'make setup, or set it to "transformers"')
        from common.engines.vllm_engine import VllmEngine

        return VllmEngine(config, folder, renderer, beside_trainer=beside_trainer, adapter=adapter)
    from common.engines.transformers_engine import TransformersEngine

    assert adapter is None, "it takes whole weights"
    return TransformersEngine(config, folder, renderer)


LOCAL = EngineSource(build=build_engine, sized=with_engines)
"""Engines on this machine."""
