"""End training before its last iteration: on request, after the running iteration, or because it has gone wrong.

Each refusal depends on figures of the whole batch, so all ranks raise it together.
"""

import os
import signal
from collections.abc import Sequence
from contextlib import suppress
from types import FrameType, TracebackType
from typing import Self

from common.errors import UserError
from common.rollout import Rollout
from common.terminal.console import Terminal
from stage2_train.metrics import Metrics

ENDLESS = 0.95
"""From this share of truncated completions on, practically no completion ends."""
COLLAPSED_KL = 50.0
"""Nats per completion: if completions do not end, no useful policy is this far from its reference."""
COLLAPSED_TOKEN_KL = 2.0
"""Nats per token: more than even a policy that is certain of each token differs from a language model."""
LARGEST_UNJUDGED_SHARE = 0.5

GENTLER = "lower train.learning_rate or raise train.warmup_steps, and start again under another --run"


class StopRequest:
    """SIGTERM or Ctrl-C asks for an end with a checkpoint after the running iteration; the second one ends at once.

    Closing the pipe that the main rank's console writes to asks for it too.
    """

    def __init__(self, console: Terminal, *, is_main: bool) -> None:
        """No stop is requested yet; the main rank will announce one."""
        self._is_signalled = False
        self._console = console
        self._is_main = is_main

    @property
    def is_made(self) -> bool:
        """Whether this rank was asked."""
        return self._is_signalled or (
            isinstance(self._console, Terminal) and self._console.has_lost_its_reader
        )

    def __enter__(self) -> Self:
        self._before = {
            number: signal.signal(number, self._ask) for number in (signal.SIGTERM, signal.SIGINT)
        }
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _ask(self, signal_number: int, frame: FrameType | None) -> None:
        if self._is_signalled:
            raise KeyboardInterrupt
        self._is_signalled = True
        if self._is_main:
            # print() is not to be called from a signal's handler: it may be interrupting itself.
            with suppress(OSError):  # Ctrl-C may have ended the pipe's reader too
                os.write(2, b"ending after this iteration with a checkpoint; a second signal ends at once\n")


def refuse_divergence(number: int, metrics: Metrics) -> None:
    """Raise UserError once training has gone wrong beyond repair, before a checkpoint is written.

    An objective without a reference measures no KL, so KL is not checked for it; one that draws nothing has no share of
    truncated completions.
    """
    sequence_kl, token_kl = metrics.get("kl/sequence", 0.0), metrics.get("kl/token", 0.0)
    if metrics.get("completion/truncated", 0.0) >= ENDLESS and sequence_kl > COLLAPSED_KL:
        raise UserError(
            f"iteration {number}: the policy has collapsed: {metrics['completion/truncated']:.0%} of the completions "
            f"do not end, KL to the reference is {sequence_kl:.0f} nats; {GENTLER}"
        )
    if token_kl > COLLAPSED_TOKEN_KL:
        raise UserError(
            f"iteration {number}: the policy has collapsed: KL to the reference is {token_kl:.1f} nats per "
            f"token; {GENTLER}"
        )


def refuse_unjudged(number: int, judged: int, rollouts: int, ours: Sequence[Rollout]) -> None:
    """Raise UserError if the grader judged too few of a batch's rollouts; the message quotes a reason from `ours`."""
    if rollouts - judged <= LARGEST_UNJUDGED_SHARE * rollouts:
        return
    grades = [rollout.graded for rollout in ours if not rollout.is_judged]
    cause = f", such as {grades[0].outcome.value}: {grades[0].reason or 'no reason given'}" if grades else ""
    raise UserError(
        f"iteration {number}: the grader could not judge {rollouts - judged} of {rollouts} completions{cause}; fix "
        "it, or raise grader.timeout_seconds or grader.memory_gib; the same command continues from the last checkpoint"
    )
