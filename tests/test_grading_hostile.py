"""Completions written to break a grader: each ends in an outcome within its limit and costs its neighbours nothing."""

import subprocess
import sys
import time
from pathlib import Path

from common.grading import UNJUDGED, GraderConfig, GraderPool, Outcome
from common.grading.process import KILL_GRACE_SECONDS
from common.grading.progress import ProgressPage, page_file

ROOT = Path(__file__).parents[1]
LIMIT_SECONDS = 1.0
GOOD = r"so \boxed{\frac{x}{2}}"

# The content of a box.
BOXES = {
    "tower of factorials": "((((9!)!)!)!)!",
    "tower with a fraction": r"2^{3^{4^{5^{\frac{1}{2}}}}}",
    "power of a sum": r"(1+\sqrt{2})^{10^{9}}",
    "difference of towers": "7^{7^{7^{7}}}-7^{7^{7^{7}}}+5",
    "remainder of a tower": r"3^{3^{3^{3}}} \mod 5",
    "binomial of giants": r"\binom{10^{12}}{10^{11}}",
    "fractions in fractions": r"\frac{1}{" * 90 + "2" + "}" * 90,
    "roots in roots": r"\sqrt[3]{" * 60 + "2" + "}" * 60,
    "continued fraction": "1+" + r"\cfrac{1}{2+" * 45 + "1" + "}" * 45,
    "matrix to a power": r"\begin{pmatrix}1&1\\1&0\end{pmatrix}^{10^{8}}",
    "matrices in matrices": r"\begin{pmatrix}" * 20 + "1" + r"\end{pmatrix}" * 20,
    "sum to a tower": r"\sum_{n=1}^{10^{10^{10}}} \frac{1}{n^2}",
    "sum of sums": r"\sum_{i=1}^{9^9}\sum_{j=1}^{i^i}\sum_{k=1}^{j^j} k!",
    "product to a giant": r"\prod_{n=2}^{10^{15}} (1-\frac{1}{n^2})",
    "integral without a form": r"\int_0^{10^{100}} e^{\sin(x^x)} \, dx",
    "integrals in integrals": r"\int_0^1 " * 12 + "x^x" + " dx" * 12,
    "limit of a tower": r"\lim_{n \to \infty} (1+\frac{1}{n^n})^{n^{n^n}}",
    "logarithms in logarithms": r"\log(" * 80 + "10^{10^{10}}" + ")" * 80,
    "sines in cosines": r"\sin(\cos(" * 40 + "1" + "))" * 40,
    "absolute values": "|" * 401 + "1",
    "floor of a tower": r"\lfloor 9^{9^{9}} / 7 \rfloor",
    "hard identity": r"\sqrt{2+\sqrt{3+\sqrt{5+\sqrt{7+\sqrt{11}}}}}-\sqrt[7]{x^{99}+y^{98}}",
    "polynomial equation": "x^{97}+3x^{13}-7x+1=0",
    "system of inequalities": r"\sin(x)<x^5-x, x^7>e^x, \tan(x) \le \ln(x)",
    "chain of equations": "=".join(["(x+1)^{20}"] * 30),
    "union of intervals": r"\cup".join(f"[{i},{i}.5)" for i in range(40)),
    "interval of towers": "(9^{9^{9}}, 10^{10^{10}})",
    "set of a million": r"\{" + ",".join(map(str, range(1_000_000))) + r"\}",
    "sets in sets": r"\{" * 80 + "1" + r"\}" * 80,
    "many percent signs": "5" + r"\%" * 200,
    "percent of a tower": r"9^{9^{9}}\%",
    "base of a tower": "10_{9^{9^{9}}}",
    "giant integer": "9" * 500,
    "giant decimal": "0." + "1" * 500,
    "giant exponent": "1e999999999",
    "exponent in braces": "10^{999999999999}",
    "negative zero power": "0^{-1}+0^{0}",
    "division by a sum of zero": r"\frac{1}{\sqrt{2}\sqrt{2}-2}",
    "unclosed braces": "{" * 200 + "1",
    "closed too often": "1" + "}" * 200,
    "escaped braces": r"\{\}\{\}" * 60,
    "backslashes": "\\" * 399,
    "unicode digits": "٤٢ + ४२ + 𝟒𝟐",
    "zero width": "4\u200b2\u200c\u200d\ufeff",
    "right to left": "\u202e24\u202c",
    "emoji": "👩‍👩‍👧‍👦" * 20,
    "control characters": "4\x00\x01\x1b[2J2",
    "lone surrogates": "4\ud83d2\udc00",
    "combining marks": "4" + "\u0301" * 400,
    "python code": "__import__('os')._exit(0)",
    "lambda": "(lambda: 9**9**9)()",
    "dunder": "x.__class__.__base__.__subclasses__()",
}
# A whole completion.
COMPLETIONS = {
    "box of a megabyte": rf"\boxed{{{'1+' * 500_000}1}}",
    "ten thousand boxes": r"\boxed{9^{9^9}}" * 10_000,
    "boxes in boxes": r"\boxed{" * 8_000 + "5" + "}" * 8_000,
    "boxes without an end": r"\boxed{" * 200_000,
    "braces after a box": r"\boxed{5" + "{}" * 30_000 + "}",
    "spaces after a box": r"\boxed" + " " * 60_000 + "5",
    "dollars in a box": r"\boxed{" + "$" * 60_000 + "}",
    "spaces in a box": r"\boxed{" + " " * 60_000 + "5}",
    "thousands in a box": r"\boxed{1" + r",\!000" * 10_000 + "}",
    "surrogates everywhere": "\ud800" * 60_000 + r"\boxed{5}",
    "nothing but control characters": "\x00" * 60_000,
}
REALLY_FIVE = {"boxes in boxes", "spaces after a box", "spaces in a box", "surrogates everywhere"}


def test_invented_hostile_completions_end_in_time_and_cost_their_neighbours_nothing() -> None:
    hostile = {name: rf"\boxed{{{box}}}" for name, box in BOXES.items()} | COMPLETIONS
    config = GraderConfig(name="math", workers=2, timeout_seconds=LIMIT_SECONDS, memory_gib=1)
    with GraderPool(config) as pool:
        began = time.monotonic()
        for name, completion in hostile.items():
            pool.submit(name, prompt="", completion=completion, answer="5", truncated=False)
            pool.submit((name, "neighbour"), prompt="", completion=GOOD, answer="0.5x", truncated=False)
        grades = dict(pool.drain())
        seconds = time.monotonic() - began
        peaks = [peak_address_space_kib(worker.pid) for worker in pool._workers]
    assert {grades[name, "neighbour"].outcome for name in hostile} == {Outcome.CORRECT}
    assert {name for name in hostile if grades[name].outcome is Outcome.CORRECT} == REALLY_FIVE
    lost = [name for name in hostile if grades[name].outcome in UNJUDGED]
    assert seconds < (LIMIT_SECONDS + KILL_GRACE_SECONDS) * len(lost) / 2 + 5
    assert max(peaks) <= 1024**2
    for grade in grades.values():
        assert len((grade.extracted or "").encode()) <= 4 * 512


def peak_address_space_kib(pid: int) -> int:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmPeak"))


def test_a_busy_worker_is_never_seen_with_an_old_start() -> None:
    """A reader between two stores would kill a worker that has only just begun."""
    script = """
import sys, time
from common.grading.progress import ProgressPage
page = ProgressPage(int(sys.argv[1]))
end = time.monotonic() + 1
while time.monotonic() < end:
    for position in (0, 1, 2):
        page.start(position)
    page.rest()
"""
    seen = set()
    with page_file() as file:
        page = ProgressPage(file.fileno())
        writer = subprocess.Popen(
            [sys.executable, "-c", script, str(file.fileno())], cwd=ROOT, pass_fds=[file.fileno()]
        )
        while writer.poll() is None:
            now = time.monotonic()
            for _ in range(1000):
                progress = page.read()
                seen.add(progress.position)
                assert not progress.busy or progress.started > now - LIMIT_SECONDS
        page.close()
    assert writer.returncode == 0
    assert seen == {-1, 0, 1, 2}
