"""Figures for the service Weights & Biases. If it fails training continues, and metrics.jsonl has all figures."""

from typing import Any

from common.errors import UserError, cause
from common.terminal.console import Terminal
from stage2_train.config import Config


class WandbLog:
    """A run of the configured project."""

    def __init__(self, config: Config, console: Terminal) -> None:
        """Begin the run. Raises UserError if that fails, such as without a login."""
        import wandb

        self._console = console
        try:
            self._run: Any = wandb.init(
                project=config.train.wandb_project, name=config.run, config=config.model_dump(mode="json")
            )
        except Exception as error:
            raise UserError(
                f"train.wandb_project: wandb cannot begin a run ({cause(error)}); run `wandb login`, set "
                "WANDB_MODE=offline, or leave it out"
            ) from error

    def write(self, iteration: int, metrics: dict[str, float]) -> None:
        """Send the figures of an iteration. A failure is reported once, and nothing is sent after it."""
        self._try(lambda run: run.log(metrics, step=iteration))

    def close(self) -> None:
        """Send everything that is still pending."""
        self._try(lambda run: run.finish())
        self._run = None

    def _try(self, work: Any) -> None:
        if self._run is None:
            return
        try:
            work(self._run)
        except Exception as error:  # noqa: BLE001  a service can fail in any way
            self._run = None
            self._console.print(
                f"warning: wandb failed ({cause(error)}): it gets no more figures, metrics.jsonl does"
            )
