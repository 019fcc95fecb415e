"""What long jobs show of their progress: lines in a log file, a bar in a terminal."""

import io

import numpy as np
import pytest

from common.sampling.progress import SamplingProgress
from common.terminal import progress
from common.terminal.console import Terminal
from common.terminal.progress import Advance


class Clock:
    """A clock that the test moves."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 100.0
        monkeypatch.setattr(progress.time, "monotonic", lambda: self.now)  # type: ignore[attr-defined]


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    return Clock(monkeypatch)


def test_a_log_gets_a_line_every_half_minute_and_a_short_job_none(clock: Clock) -> None:
    log = io.StringIO()
    with Advance(Terminal(file=log), 200, "{}/200 done".format) as job:
        for _ in range(5):
            clock.now += 8
            job.by(10)
        assert log.getvalue() == "40/200 done, 128 s left\n"
        clock.now += 29
        job.by(10)
    assert log.getvalue().splitlines() == ["40/200 done, 128 s left", "60/200 done, 161 s left"]


def test_a_terminal_shows_the_state_from_the_start(clock: Clock) -> None:
    screen = io.StringIO()
    with Advance(Terminal(file=screen, force_terminal=True, width=80), 4, "{}/4 done".format) as job:
        job.by(1)
        clock.now += 1
        job.by(1)
    assert "0/4 done" in screen.getvalue()
    assert "2/4 done" in screen.getvalue()


def test_sampling_counts_a_prompt_once_its_last_sample_is_there_and_says_the_end(clock: Clock) -> None:
    log = io.StringIO()
    missing_PN = np.array([[True, True], [False, False], [False, True]])
    with SamplingProgress(missing_PN, Terminal(file=log)) as sampling:
        for place, tokens in ((0, 30), (2, 10)):
            clock.now += 16
            sampling.add(place, tokens)
        assert log.getvalue() == "1/2 prompts, 2/3 samples, 1 tokens/s, 16 s left\n"
        clock.now += 8
        sampling.add(0, 40)
    assert log.getvalue().splitlines()[1:] == ["2/2 prompts, 3/3 samples, 2 tokens/s, 0 s left"]
