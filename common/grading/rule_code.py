"""The code rule: the completion is a Python program, the reference answer its unit tests, and all of them must pass.

A program is run in the sandbox, with the standard library alone. Whatever it does there, failing included, is its own
fault: wrong. It shares an interpreter with its tests, so an `__eq__` that is always true passes them.
"""

import ast
import json
import re
import sys
import warnings
from functools import lru_cache
from typing import Any

from common.errors import UserError
from common.grading import sandbox
from common.grading.outcome import Grade, Outcome, graded

VERSION = f"code/2+python-{sys.version_info.major}.{sys.version_info.minor}"
MAX_COMPLETION_CHARACTERS = 65_536
SECONDS = 4.0  # of wall clock, for a program and its tests
MEMORY_BYTES = 1024**3

_FENCE = re.compile(
    r"^([ \t]*+(?:(?:[-*+>]|\d{1,9}+[.)])[ \t]++)?)(`{3,}+)[ \t]*+([^\s`]*+)[^\n`]*+$", re.MULTILINE
)
"""A line's indentation, with the mark of a list's item; the fence; the language."""
_END = re.compile(r"```[ \t]*+$", re.MULTILINE)
"""A fence behind the last line of code, where none stands on a line of its own."""
_SET_UP = "the set-up"
_PYTHON = frozenset({"python", "python3", "py"})
_MARKDOWN = frozenset({"markdown", "md"})

# What must not work in there; the tests pass if it does not.
_PROBE = """
import os, _socket
def denied(call, *arguments):
    try:
        call(*arguments)
    except PermissionError:
        return True
"""
_PROBE_TESTS = (
    ("network", "assert denied(_socket.socket)"),
    ("processes", "assert denied(os.fork)"),
    ("signals", "assert denied(os.kill, os.getppid(), 0)"),
    ("files", "assert denied(os.open, '/dev/null', os.O_WRONLY)"),
)


def extract_gold(raw: str) -> str:
    """The tests in a data set's field: a JSON list, {"setup": …, "tests": […]}, or a script; JSON in one form."""
    try:
        setup, tests = _parts(raw)
    except ValueError as error:
        raise UserError(f"{error}: {raw[:80]!r}") from error
    if tests == [raw]:
        return raw
    return json.dumps({"setup": setup, "tests": tests} if setup else tests)


def validate_gold(gold: str) -> str | None:
    try:
        steps = _steps(gold)
    except ValueError as error:
        return str(error)
    empty = _run("", steps)
    return "the tests pass without a program: is their call missing?" if empty.failure is None else None


def warm_up() -> None:
    """Raises UserError where programs cannot be run in isolation."""
    try:
        leak = _run(_PROBE, _PROBE_TESTS).failure
    except (OSError, RuntimeError) as error:
        leak = str(error)
    if leak is not None:
        raise UserError(
            'the grader "code" runs programs in isolation only; that needs Linux on x86-64 or aarch64, with seccomp '
            f"filters, and grader.memory_gib of at least {MEMORY_BYTES / 1024**3:g}; found: {leak}"
        )


def grade(prompt: str, completion: str, answer: str) -> Grade:
    try:
        steps = _steps(answer)
    except ValueError as error:
        return graded(Outcome.GOLD_UNPARSED, reason=str(error))
    program, fenced = extract_program(completion[-MAX_COMPLETION_CHARACTERS:])
    if not program.strip():
        return graded(Outcome.UNPARSED)
    run = _run(program, steps)
    if run.failure is None:
        return graded(Outcome.CORRECT, program)
    if not (fenced or run.compiled):
        return graded(Outcome.UNPARSED)
    return graded(Outcome.WRONG, program, reason=run.failure)


def extract_program(text: str) -> tuple[str, bool]:
    """The last block fenced as Python, else the last without a language; a text without fences is all program.

    Also says whether there was a fence. A fence ends the block of another that is no longer. A block that never closes
    ends with the text. The indentation of a block's first fence is no part of its lines.
    """
    blocks: list[tuple[str, str]] = []
    opening: re.Match[str] | None = None
    for fence in _FENCE.finditer(text):
        if opening is not None:
            if len(fence[2]) < len(opening[2]):
                continue
            blocks.append((opening[3].lower(), _lines(opening, text[opening.end() : fence.start()])))
        opening = None if opening is not None and not fence[3] else fence
    if opening is not None:
        rest = text[opening.end() :]
        end = _END.search(rest)
        blocks.append((opening[3].lower(), _lines(opening, rest[: end.start()] if end else rest)))
    if not blocks:
        return text, False
    python = [program for language, program in blocks if language in _PYTHON]
    unmarked = [program for language, program in blocks if not language]
    if not (python or unmarked) and (pages := [page for language, page in blocks if language in _MARKDOWN]):
        program, is_fenced = extract_program(pages[-1])
        return (program if is_fenced else ""), True
    return (python or unmarked or [""])[-1], True


def _lines(opening: re.Match[str], block: str) -> str:
    """The lines of a block without the indentation of the fence that opens it, as far as all of them have it."""
    indented = [line for line in block.splitlines() if line.strip()]
    width = min([len(opening[1]), *(len(line) - len(line.lstrip(" \t")) for line in indented)])
    return re.sub(rf"^[ \t]{{{width}}}", "", block, flags=re.MULTILINE) if width else block


def _run(program: str, steps: tuple[tuple[str, str], ...]) -> sandbox.Run:
    return sandbox.run(program, steps, seconds=SECONDS, memory_bytes=MEMORY_BYTES)


@lru_cache(maxsize=1_024)
def _steps(gold: str) -> tuple[tuple[str, str], ...]:
    """The set-up and each test, with names, to run after the completion. ValueError if one is not Python."""
    setup, tests = _parts(gold)
    steps = [(_SET_UP, setup)] if setup.strip() else []
    steps += [(f"test {number}", test) for number, test in enumerate(tests, start=1)]
    for name, source in steps:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                tree = ast.parse(source, name)
                compile(tree, name, "exec", dont_inherit=True)
        except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
            raise ValueError(f"{name} is not Python: {error}") from error
        if not tree.body:
            raise ValueError(f"{name} is empty")
        if name != _SET_UP and _only_compares(tree):
            raise ValueError(f"{name} compares and asserts nothing: write assert before it")
    return tuple(steps)


def _only_compares(test: ast.Module) -> bool:
    """Whether a test ends with a comparison whose result nothing uses, and neither asserts nor raises anything."""
    last = test.body[-1]
    if not (isinstance(last, ast.Expr) and isinstance(last.value, ast.Compare | ast.BoolOp | ast.UnaryOp)):
        return False
    return not any(isinstance(node, ast.Assert | ast.Raise) for node in ast.walk(test))


def _parts(text: str) -> tuple[str, list[str]]:
    """The set-up and the tests that a text holds; ValueError if there is none."""
    try:
        found: Any = json.loads(text)
    except (ValueError, RecursionError):
        found = None
    if isinstance(found, list):
        found = {"tests": found}
    if not isinstance(found, dict):
        found = {"tests": [text]}
    setup, tests = found.get("setup") or "", found.get("tests")
    if (
        not isinstance(setup, str)
        or not isinstance(tests, list)
        or not all(isinstance(test, str) for test in tests)
    ):
        raise ValueError(
            'the tests are neither a list of texts, nor {"setup": text, "tests": list}, nor a script'
        )
    if not tests or not any(test.strip() for test in tests):
        raise ValueError("there is no test")
    return setup, tests
