"""Stage 2 with an engine that samples from another network than the trainer's: `python -m tests.parity_steps ORDER`.

The order holds a `config`, the `vstar` file, what is wrong with the engine (`fault`), and the mismatches allowed.
"""

import json
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch

from common.data.rendering import PromptRenderer
from common.engines import RolloutEngine, build_engine
from common.errors import UserError
from common.terminal.console import Terminal
from stage2_train.config import Config
from stage2_train.run import run_stage2

SCALE = 1.01
SOFTCAP = 1.0


def faulty_engine(fault: str) -> Callable[..., RolloutEngine]:
    """Builds the configured engine, and breaks it."""

    def build(
        config: Config, folder: Path, renderer: PromptRenderer, *, beside_trainer: bool
    ) -> RolloutEngine:
        engine: Any = build_engine(config, folder, renderer, beside_trainer=beside_trainer)
        if fault == "stale weights":
            engine.load_weights = keep_old_weights
        elif fault != "none":
            break_logits(engine, fault)
        built: RolloutEngine = engine
        return built

    return build


def keep_old_weights(named_tensors: Iterable[tuple[str, torch.Tensor]]) -> None:
    """Take the new weights and do nothing with them, as an engine with a packed copy of the old ones would."""
    for _ in named_tensors:
        pass


def break_logits(engine: Any, fault: str) -> None:
    """Change what comes out of the engine's output layer."""
    if hasattr(engine, "llm"):
        name, value = {"scaled logits": ("scale", SCALE), "unknown softcap": ("soft_cap", SOFTCAP)}[fault]
        engine.llm.apply_model(lambda model: setattr(model.logits_processor, name, value))
    else:
        changes: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
            "scaled logits": lambda logits: logits * SCALE,
            "unknown softcap": lambda logits: SOFTCAP * torch.tanh(logits / SOFTCAP),
        }
        change = changes[fault]
        engine._model.lm_head.register_forward_hook(lambda _layer, _inputs, logits: change(logits))


def main(order: dict[str, Any]) -> None:
    """Train as the order says."""
    config = Config.model_validate(order["config"])
    build = faulty_engine(order["fault"])
    try:
        run_stage2(config, Terminal(width=400), Path(order["vstar"]), order["allowed"], build)
    except UserError as error:
        print("error:", error)
        raise SystemExit(2) from error


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
