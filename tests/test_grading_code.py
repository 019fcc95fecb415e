"""The code rule and its sandbox: programs are judged by their tests, and can do nothing but compute."""

import ctypes
import json
import os
import platform
import signal
import socket
import struct
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from common.data.datasets import read_pairs
from common.errors import UserError
from common.grading import Grade, GraderConfig, GraderPool, GradingTask, Outcome, fingerprint, sandbox
from common.grading.rule_code import (
    MEMORY_BYTES,
    VERSION,
    extract_gold,
    extract_program,
    grade,
    validate_gold,
    warm_up,
)
from common.grading.sandbox.seccomp import MACHINES, filter_program
from tests.fakes import tiny_config

# Tests, a program that passes them and one that does not.
CASES = [
    (
        ["assert add(1, 2) == 3", "assert add(-1, 1) == 0"],
        "def add(a, b):\n    return a + b",
        "def add(a, b):\n    return a + b + 1",
    ),
    (
        ["assert fib(0) == 0", "assert fib(30) == 832040"],
        "from functools import lru_cache\n@lru_cache(None)\n"
        "def fib(n):\n    return n if n < 2 else fib(n - 1) + fib(n - 2)",
        "def fib(n):\n    return 1 if n < 2 else fib(n - 1) + fib(n - 2)",
    ),
    (
        ["assert Counter2('aab').most() == 'a'"],
        "import collections\nclass Counter2:\n    def __init__(self, s): self.c = collections.Counter(s)\n"
        "    def most(self): return self.c.most_common(1)[0][0]",
        "class Counter2:\n    def __init__(self, s): self.s = s\n    def most(self): return self.s[-1]",
    ),
    (
        ["assert text_match('ab') == 'yes'", "assert text_match('b') == 'no'"],
        "import re\ndef text_match(s):\n    return 'yes' if re.search('^ab*$', s) else 'no'",
        "import re\ndef text_match(s):\n    return 'yes' if re.search('b*$', s) else 'no'",
    ),
    (
        ["assert sum(10, 15) == 6", "assert sum(100, 150) == 93"],  # MBPP has functions named like built-ins
        "def sum(a, b):\n    return __builtins__['sum'](d for d in range(1, min(a, b) + 1) if a % d == 0 == b % d)",
        "def sum(a, b):\n    return a + b",
    ),
    (
        ["assert points() == 3"],
        "from dataclasses import dataclass\n@dataclass\nclass P:\n    x: 'int'\n\ndef points():\n    return P(3).x",
        "from dataclasses import dataclass\n@dataclass\nclass P:\n    x: 'int'\n\ndef points():\n    return P().x",
    ),
    (
        ["assert squares([1, 2, 3]) == [1, 4, 9]"],
        "from concurrent.futures import ThreadPoolExecutor\ndef squares(xs):\n"
        "    with ThreadPoolExecutor(4) as pool:\n        return list(pool.map(lambda x: x * x, xs))",
        "def squares(xs):\n    return [x ^ 2 for x in xs]",
    ),
    (
        ["assert mean(['0.1', '0.2']) == '0.15'", "assert mean(['1']) == '1'"],
        "from decimal import Decimal\nfrom statistics import mean as average\n"
        "def mean(xs):\n    return str(average(map(Decimal, xs)))",
        "def mean(xs):\n    return str(sum(map(float, xs)) / len(xs))",
    ),
]
TEST = '["assert f()"]'  # a hostile program passes it if and only if what it attempted has worked


@pytest.fixture
def briefly(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("common.grading.rule_code.SECONDS", 1.0)


def verdict(program: str, answer: str = TEST) -> tuple[Outcome, str | None]:
    result = grade("", f"```python\n{program}\n```", answer)
    return result.outcome, result.reason


def attempt(
    body: str, *, imports: str = "import ctypes, os, socket, subprocess, sys, threading, time"
) -> str:
    """A program whose f() is true if the body gets to its end."""
    return (
        f"{imports}\ndef f():\n" + "".join(f"    {line}\n" for line in body.splitlines()) + "    return True"
    )


def sandboxes() -> list[int]:
    """The processes of all sandboxes that were started below this one and still run."""
    parents, found = {}, []
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            try:
                command = (folder / "cmdline").read_bytes()
                parents[int(folder.name)] = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
            except OSError:
                continue
            if b"sandbox/child.py" in command:
                found.append(int(folder.name))
    return [pid for pid in found if os.getpid() in (parents[pid], parents.get(parents[pid]))]


def eventually(condition: Callable[[], object], seconds: float = 10.0) -> bool:
    end = time.monotonic() + seconds
    while not condition() and time.monotonic() < end:
        time.sleep(0.02)
    return bool(condition())


def has_landlock() -> bool:
    return bool(ctypes.CDLL(None).syscall(444, None, 0, 1) > 0)


# Verdicts.


@pytest.mark.parametrize(("tests", "right", "wrong"), CASES, ids=[case[0][0] for case in CASES])
def test_a_program_is_correct_if_it_passes_its_tests(tests: list[str], right: str, wrong: str) -> None:
    answer = extract_gold(json.dumps(tests))
    assert validate_gold(answer) is None
    assert verdict(right, answer) == (Outcome.CORRECT, None)
    assert verdict(wrong, answer)[0] is Outcome.WRONG


@pytest.mark.parametrize(
    ("program", "reason"),
    [
        ("def f(): return 0", "test 1: AssertionError"),
        ("def f(): return 1 / 0", "test 1: ZeroDivisionError"),
        ("def g(): return 1", "test 1: NameError"),
        ("import numpy", "the program: ModuleNotFoundError"),
        ("def f() return 1", "SyntaxError: expected ':' (the program, line 2)"),
        ("return 1", "SyntaxError: 'return' outside function (the program, line 2)"),
        ("x = '\ud800'", "UnicodeEncodeError: "),
        ("x = " + "(" * 1000 + ")" * 1000, "SyntaxError: too many nested parentheses"),
        ("raise SystemExit", "the program: SystemExit"),
        ("def f(): return f()", "test 1: RecursionError"),
    ],
)
def test_a_wrong_program_is_told_what_failed_first(program: str, reason: str) -> None:
    outcome, found = verdict(program)
    assert outcome is Outcome.WRONG
    assert (found or "").startswith(reason)


@pytest.mark.parametrize(
    ("completion", "program"),
    [
        ("```python\na\n```", "a"),
        ("```py\na\n```", "a"),
        ("``` Python3 \na\n```", "a"),
        ("```\na\n```", "a"),
        ("```python\r\na\r\n```\r\n", "a"),
        ("text\n   ```python title=x\na\n   ```\ntext", "a"),
        ("```python\na\n```\nno, rather\n```python\nb\n```\ntext", "b"),
        ("```python\na\n```\nIt prints:\n```\n1\n```\nand\n```text\n2\n```", "a"),
        ("```bash\nls\n```\n```\na\n```\n```\nb\n```", "b"),
        ("```python\na", "a"),
        ("```python\na\n```python\nb\n```", "b"),
        ("```java\na\n```", ""),
        ("```python\n```", ""),
        ("1. So:\n   ```python\n   if a:\n       b\n   ```\n", "if a:\n    b"),
        ("- ```python\n  if a:\n      b\n  ```\n", "if a:\n    b"),
        ("2) ```python\n   a\n   ```", "a"),
        ("  ```python\nif a:\n  b\n  ```", "if a:\n  b"),
        ("1. x\n    ```python\nif a:\n    b\n    ```", "if a:\n    b"),
        ("10. ```python\n  if a:\n      b\n    ```", "if a:\n    b"),
        ("````markdown\n```python\na\n```\n````", "a"),
        ("```markdown\ntext\n```", ""),
        ("````python\na = '\n```\n'\n````\ntext", "a = '\n```\n'"),
        ("```python\na\nb```\nIt gives b.", "a\nb"),
        ("````markdown\n```python\na\n```\n````\n```python\nb\n```", "b"),
    ],
)
def test_the_program_is_the_last_block_in_python(completion: str, program: str) -> None:
    found, fenced = extract_program(completion)
    assert (found.strip(), fenced) == (program, True)


def test_without_a_fence_the_completion_is_the_program_if_it_is_python() -> None:
    assert grade("", "def f():\n    return 1\n", TEST).outcome is Outcome.CORRECT
    assert grade("", "def f():\n    return 0\n", TEST).outcome is Outcome.WRONG
    for completion in (
        "",
        " \n",
        "I would write a function.",
        "```java\nint f;\n```",
        "```python\n```",
        "x" * 70_000 + " y",
    ):
        assert grade("", completion, TEST).outcome is Outcome.UNPARSED


def test_finding_the_program_takes_linear_time() -> None:
    texts = [
        "```\n" * 16_000,
        "```" * 22_000,
        " " * 65_536,
        "```" + "a" * 65_000,
        ("`" * 99 + "\n") * 650,
        " \t```x\n" * 9_000,
    ]
    started = time.perf_counter()
    for text in texts:
        extract_program(text)
    assert time.perf_counter() - started < 2


def test_the_version_names_the_language_that_verdicts_depend_on() -> None:
    assert fingerprint(GraderConfig(name="code")) == VERSION
    assert VERSION.startswith("code/2+python-3.")


# Reference answers.


def test_tests_may_be_a_list_or_have_a_set_up_or_be_a_script() -> None:
    program = "class Node:\n    def __init__(self, x): self.x = x\n\ndef root(n): return n.x"
    with_setup = extract_gold(
        '{"setup": "import math\\nnode = Node(4)", "tests": ["assert math.sqrt(root(node)) == 2"]}'
    )
    assert validate_gold(with_setup) is None
    assert verdict(program, with_setup) == (Outcome.CORRECT, None)
    assert verdict("def root(n): return 4", with_setup) == (Outcome.WRONG, "the set-up: NameError")
    script = "def check(candidate):\n    assert candidate() == 'é'\n\ncheck(f)\n"
    assert extract_gold(script) == script
    assert verdict("def f(): return 'é'", script) == (Outcome.CORRECT, None)
    assert verdict("def f(): return 'e'", script) == (Outcome.WRONG, "test 1: AssertionError")


def test_equal_tests_become_equal_texts() -> None:
    assert extract_gold('[ "assert f()" ]') == extract_gold('{"tests": ["assert f()"], "setup": ""}') == TEST
    assert extract_gold(TEST) == TEST


@pytest.mark.parametrize(
    "raw",
    ["", " \n", "[]", '["", " "]', "{}", '{"tests": "assert f()"}', "[1]", '{"setup": 1, "tests": ["a"]}'],
)
def test_an_answer_without_tests_is_refused(raw: str) -> None:
    with pytest.raises(UserError, match=r"tests are neither|there is no test"):
        extract_gold(raw)
    assert validate_gold(raw) is not None
    assert grade("", "def f(): return 1", raw).outcome is Outcome.GOLD_UNPARSED


@pytest.mark.parametrize(
    ("gold", "problem"),
    [
        ('["assert f("]', "test 1 is not Python: '(' was never closed"),
        ('["assert f()", "return 1"]', "test 2 is not Python: 'return' outside function"),
        ('["f() == 1"]', "test 1 compares and asserts nothing: write assert before it"),
        ('["assert f()", "f() == 1 and not f() == 2"]', "test 2 compares and asserts nothing"),
        ('["not f() == 1"]', "test 1 compares and asserts nothing"),
        ('{"setup": "import", "tests": ["assert f()"]}', "the set-up is not Python"),
        ('["assert f()", "# none"]', "test 2 is empty"),
        ("# nothing", "test 1 is empty"),
        ("[\"assert f() == '\\ud800'\"]", "test 1 is not Python"),
        ("def check(candidate):\n    assert candidate(1) == 2\n", "the tests pass without a program"),
        ("[" * 100_000, "test 1 is not Python"),
    ],
)
def test_tests_that_test_nothing_are_refused_before_anything_is_generated(gold: str, problem: str) -> None:
    assert (validate_gold(gold) or "").startswith(problem)
    with GraderPool(GraderConfig(name="code")) as pool:
        assert [(found or "").startswith(problem) for found in pool.validate_golds([gold, TEST])] == [
            True,
            False,
        ]


def test_rows_of_mbpp_become_prompts_with_one_test_and_answers_with_all(
    tiny_model: Path, tmp_path: Path
) -> None:
    rows = [
        {
            "text": "Add.",
            "test_list": ["assert add(1, 2) == 3", "assert add(0, 0) == 0"],
            "test_setup_code": "",
        },
        {"text": "Root.", "test_list": ["assert math.isclose(root(4), 2)"], "test_imports": ["import math"]},
        {"text": "Script.", "test_list": "assert f()"},
    ]
    path = tmp_path / "mbpp.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = tiny_config(tiny_model, path, data={"format": "mbpp", "template": None}, grader={"name": "code"})
    (first, add), (_, root), (third, script) = read_pairs(config.data, config)
    assert first == "Add.\nYour code must pass this test, and others:\nassert add(1, 2) == 3"
    assert verdict("def add(a, b): return a + b", add)[0] is Outcome.CORRECT
    assert verdict("def root(x): return x ** 0.5", root)[0] is Outcome.CORRECT
    assert (third, script) == ("Script.", "assert f()")


@pytest.mark.parametrize("tests", [[], [1], {"a": 1}, None])
def test_a_row_without_tests_is_named(tiny_model: Path, tmp_path: Path, tests: object) -> None:
    path = tmp_path / "mbpp.jsonl"
    path.write_text(json.dumps({"text": "Add.", "test_list": tests}) + "\n")
    config = tiny_config(tiny_model, path, data={"format": "mbpp"}, grader={"name": "code"})
    with pytest.raises(UserError, match="row 1"):
        read_pairs(config.data, config)


# A verdict is earned.

FORGERIES = {
    "os._exit": "import os; os._exit(0)",
    "sys.exit": "import sys; sys.exit(0)",
    "exit in a test": "import os\ndef f(): os._exit(0)",
    "SystemExit": "def f(): raise SystemExit(0)",
    "KeyboardInterrupt": "def f(): raise KeyboardInterrupt",
    "quit": "quit()",
    "output": "print('OK', flush=True)\nimport sys; sys.stderr.write('+*'); sys.exit()",
    "atexit": "import atexit, os\natexit.register(os._exit, 0)\nraise ValueError",
    "excepthook": "import os, sys\nsys.excepthook = lambda *a: os._exit(0)\nraise ValueError",
    "assertion": "import builtins\nbuiltins.AssertionError = AssertionError = type('X', (BaseException,), {})",
    "exec": "import builtins\nbuiltins.exec = lambda *a: None\ndef f(): builtins.exec = lambda *a: None",
    "write": "import os\nos.write = lambda *a: 1\nos._exit = lambda *a: None",
    "reports": "import os\ndef f():\n    for n in range(64):\n        try: os.write(n, b'+*ok')\n"
    "        except OSError: pass\n    return 1",
    "closed": "import os\nos.closerange(0, 64)\ndef f(): return 1",
    "builtins": "import builtins\nbuiltins.len = lambda x: 3\nbuiltins.__build_class__ = None\ndef f(): return ''",
    "main": "import __main__\n__main__.judge = __main__.os = None\ndef f(): return 0",
    "input": "import os, sys\ndef f(): os.lseek(0, 0, 0); return os.read(0, 99) or sys.stdin.read()",
    "deep": "import sys\nsys.setrecursionlimit(10**9)\ndef f(): return f()",
    "deeper": "import sys\nsys.setrecursionlimit(10**9)\nclass A:\n"
    "    def __getattr__(self, n): return getattr(self, n)\nA().x",
    "crash": "import ctypes\nctypes.string_at(0)",
    "abort": "import os; os.abort()",
    "memory": "x = bytearray(1 << 31)",
    "lists": "x = []\nwhile True: x.append([0] * 1000)",
    "lies": "class E(Exception): pass\nE.__name__ = 'x' * 10**6\nraise E",
}


@pytest.mark.parametrize("name", FORGERIES)
def test_a_verdict_cannot_be_had_without_passing(name: str, briefly: None) -> None:
    outcome, reason = verdict(FORGERIES[name])
    assert outcome is Outcome.WRONG
    assert reason
    assert len(reason) <= 512
    assert sandboxes() == []


def test_built_ins_of_the_tests_are_not_the_programs() -> None:
    program = "import builtins\nbuiltins.len = lambda x: 3\ndef f():\n    builtins.all = any\n    return []"
    assert verdict(program, '["assert len(f()) == 3"]') == (Outcome.WRONG, "test 1: AssertionError")
    assert verdict(program, '["f()", "assert all([0, 1])"]') == (Outcome.WRONG, "test 2: AssertionError")


@pytest.mark.parametrize(
    "program",
    [
        "while True: pass",
        "import time; time.sleep(60)",
        "import signal, os\nfor n in range(1, 65):\n    try: signal.signal(n, signal.SIG_IGN)\n"
        "    except (OSError, ValueError): pass\n"
        "signal.pthread_sigmask(signal.SIG_SETMASK, range(1, 65))\nos.closerange(0, 3)\nwhile True: pass",
        "while True: print('x' * 1000)",
        "while True:\n    try: raise SystemExit\n    except BaseException: pass",
        "import re; re.match('(a+)+$', 'a' * 64 + 'b')",
    ],
)
def test_a_program_over_its_time_is_wrong(program: str, briefly: None) -> None:
    started = time.monotonic()
    assert verdict(program) == (Outcome.WRONG, "over 1 s")
    assert time.monotonic() - started < 3
    assert sandboxes() == []


def test_threads_that_never_end_delay_no_verdict() -> None:
    program = "import threading, time\ndef forever():\n    while True: time.sleep(0.01)\n"
    program += "threading.Thread(target=forever).start()\n"
    started = time.monotonic()
    assert verdict(program + "def f(): return 1") == (Outcome.CORRECT, None)
    assert verdict(program + "def f(): return 0") == (Outcome.WRONG, "test 1: AssertionError")
    assert time.monotonic() - started < 2
    assert sandboxes() == []


def test_the_same_program_gets_the_same_verdict_every_time() -> None:
    program = "def f(): return list({'a', 'b', 'c', 'd', 'e'})[0] == 'a'"
    assert len({verdict(program) for _ in range(8)}) == 1


# Nothing but computing.

DENIED = {
    "udp": "socket.socket(socket.AF_INET, socket.SOCK_DGRAM)",
    "netlink": "socket.socket(socket.AF_NETLINK, socket.SOCK_RAW)",
    "packet": "socket.socket(socket.AF_PACKET, socket.SOCK_RAW)",
    "pair": "socket.socketpair()",
    "asyncio": "import asyncio\nasyncio.run(asyncio.sleep(0))",
    "fork": "os.fork()",
    "run": "subprocess.run(['/bin/true'])",
    "system": "assert os.system('true') == 0",
    "spawn": "os.posix_spawn('/bin/true', ['true'], {})",
    "exec": "os.execv('/bin/true', ['true'])",
    "multiprocessing": "import multiprocessing\nmultiprocessing.Process(target=print).start()",
    "kill": "os.kill(os.getppid(), 0)",
    "kill all": "os.kill(-1, 0)",
    "group": "os.killpg(0, 0)",
    "pidfd": "os.pidfd_open(os.getppid())",
    "session": "os.setsid()",
    "memfd": "os.memfd_create('x')",
    "chdir": "os.chdir('/tmp')",
    "chroot": "os.chroot('/')",
    "nice": "os.setpriority(os.PRIO_PROCESS, os.getppid(), 19)",
    "affinity": "os.sched_setaffinity(os.getppid(), [0])",
    "limits": "import resource\nresource.setrlimit(resource.RLIMIT_CPU, (-1, -1))",
    "parent's limits": "import resource\nresource.prlimit(os.getppid(), resource.RLIMIT_CPU, (0, 0))",
    "owner": "import fcntl\nr, w = os.pipe()\nfcntl.fcntl(r, fcntl.F_SETOWN, os.getppid())",
    "signal of owner": "import fcntl\nr, w = os.pipe()\nfcntl.fcntl(r, 10, 9)",
    "own memory": "open('/proc/self/mem', 'r+b')",
    "oom": "open('/proc/self/oom_score_adj', 'w')",
    "device": "open('/dev/null', 'w')",
    "temporary": "import tempfile\ntempfile.TemporaryFile(dir='/dev/shm')",
}  # fmt: skip


@pytest.mark.parametrize("name", DENIED)
def test_a_program_cannot(name: str) -> None:
    outcome, reason = verdict(attempt(DENIED[name]))
    assert outcome is Outcome.WRONG
    assert reason in ("test 1: PermissionError", "test 1: AssertionError" if name == "system" else None)


def test_a_program_can_reach_no_listener(tmp_path: Path) -> None:
    path = str(tmp_path / "listener")
    with socket.create_server(("127.0.0.1", 0)) as tcp, socket.socket(socket.AF_UNIX) as local:
        local.bind(path)
        local.listen()
        abstract = socket.socket(socket.AF_UNIX)
        abstract.bind("\0astar-po-test")
        abstract.listen()
        bodies = [
            f"socket.create_connection({tcp.getsockname()!r}).send(b'secret')",
            f"s = socket.socket(socket.AF_UNIX)\ns.connect({path!r})",
            "s = socket.socket(socket.AF_UNIX)\ns.connect('\\0astar-po-test')",
            f"import urllib.request\nurllib.request.urlopen('http://127.0.0.1:{tcp.getsockname()[1]}', timeout=1)",
            "assert ctypes.CDLL(None).syscall(41 if os.uname().machine == 'x86_64' else 198, 2, 1, 0) >= 0",
        ]
        for body in bodies:
            outcome, reason = verdict(attempt(body))
            assert outcome is Outcome.WRONG
            assert reason in ("test 1: PermissionError", "test 1: AssertionError", "test 1: URLError")
        for listener in (tcp, local, abstract):
            listener.setblocking(False)
            with pytest.raises(BlockingIOError):
                listener.accept()
        abstract.close()


def test_the_files_of_the_machine_stay_as_they_are(tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    file = folder / "file"
    file.write_text("mine")
    before = file.stat()
    name, other = repr(str(file)), repr(str(folder / "other"))
    attempts = [
        *(f"open({name}, {mode!r})" for mode in ("w", "a", "r+", "w+")),
        *(f"open({other}, {mode!r})" for mode in ("w", "a", "x")),
        f"os.open({name}, os.O_RDONLY | os.O_TRUNC)",
        f"os.open({other}, os.O_RDONLY | os.O_CREAT)",
        f"os.open({str(folder)!r}, os.O_RDWR | os.O_TMPFILE)",
        f"os.remove({name})",
        f"os.rename({name}, {other})",
        f"os.link({name}, {other})",
        f"os.symlink({name}, {other})",
        f"os.truncate({name}, 0)",
        f"os.chmod({name}, 0)",
        f"os.chown({name}, 1, 1)",
        f"os.utime({name}, (0, 0))",
        f"os.setxattr({name}, 'user.x', b'')",
        f"os.mkdir({other})",
        f"os.mkfifo({other})",
        f"os.mknod({other})",
        f"import shutil\nshutil.rmtree({str(folder)!r})",
        f"import sqlite3\nsqlite3.connect({other}).execute('create table t (x)')",
    ]
    for body in attempts:
        outcome, reason = verdict(attempt(body))
        assert (outcome, body) == (Outcome.WRONG, body)
        assert reason in ("test 1: PermissionError", "test 1: OperationalError"), body
    after = file.stat()
    assert file.read_text() == "mine"
    assert os.listdir(folder) == ["file"]
    assert (after.st_mode, after.st_mtime_ns, after.st_uid) == (
        before.st_mode,
        before.st_mtime_ns,
        before.st_uid,
    )


def test_there_is_nothing_to_read_in_the_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("ASTAR_SECRET", "s3cret")
    (tmp_path / "token").write_text("s3cret")
    assert (
        verdict("import os\ndef f(): return not os.environ and os.getenv('ASTAR_SECRET') is None")[0]
        is Outcome.CORRECT
    )
    assert verdict("def f(): return b'ASTAR' not in open('/dev/null', 'rb').read()")[0] is Outcome.CORRECT
    if not has_landlock():
        pytest.skip("this kernel has no Landlock: files can be read")
    parent = f"/proc/{os.getpid()}"
    for path in (
        f"{parent}/environ",
        f"{parent}/mem",
        f"{parent}/fd/0",
        "/proc/self/environ",
        "/etc/passwd",
        tmp_path / "token",
    ):
        assert verdict(attempt(f"open({str(path)!r}, 'rb')")) == (Outcome.WRONG, "test 1: PermissionError")
    assert verdict(attempt("os.listdir('/')")) == (Outcome.WRONG, "test 1: PermissionError")


def test_system_calls_cannot_be_made_by_hand() -> None:
    calls = [("clone", 56, 17), ("vfork", 58, 0), ("ptrace", 101, 16), ("io_uring_setup", 425, 8),
             ("timer_delete", 226, 0), ("process_vm_writev", 311, 1), ("prctl", 157, 1), ("unshare", 272, 1 << 28),
             ("openat2", 437, 0), ("shmget", 29, 0), ("seccomp", 317, 0)]  # fmt: skip
    if platform.machine() != "x86_64":
        pytest.skip("the numbers are those of x86-64")
    for name, number, argument in calls:
        body = f"c = ctypes.CDLL(None, use_errno=True)\nassert c.syscall({number}, {argument}, 0, 0, 0, 0, 0) < 0\n"
        body += "raise OSError(ctypes.get_errno(), '')"
        assert (name, *verdict(attempt(body))) == (name, Outcome.WRONG, "test 1: PermissionError")


@pytest.mark.skipif(platform.machine() != "x86_64", reason="the other tables of x86-64")
def test_the_other_system_call_tables_are_closed() -> None:
    x32 = attempt("ctypes.CDLL(None).syscall(0x40000000 + 39)")
    assert verdict(x32) == (Outcome.WRONG, "died of SIGSYS")
    code = b"\xb8\x14\x00\x00\x00\xcd\x80\xc3"  # mov eax, 20 (getpid); int 0x80; ret
    i386 = attempt(
        f"import mmap\nm = mmap.mmap(-1, 4096, prot=7)\nm.write({code!r})\n"
        "ctypes.CFUNCTYPE(ctypes.c_int)(ctypes.addressof(ctypes.c_char.from_buffer(m)))()"
    )
    assert verdict(i386)[0] is Outcome.WRONG
    assert str(verdict(i386)[1]).startswith("died of SIG")


def test_a_fork_bomb_is_a_dud(briefly: None) -> None:
    bomb = "import os, threading, time\nwhile True:\n    try: os.fork()\n    except OSError: pass\n"
    bomb += "    try: threading.Thread(target=time.sleep, args=(9,)).start()\n    except RuntimeError: pass"
    assert verdict(bomb)[0] is Outcome.WRONG
    assert sandboxes() == []


# Where it cannot be safe, nothing runs.


def test_without_a_filter_nothing_runs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    warm_up()
    monkeypatch.setattr(sandbox, "_filter", lambda: struct.pack("=HBBI", 6, 0, 0, 0x7FFF_0000)[:-1])
    with pytest.raises(sandbox.SandboxError, match="prctl: Invalid argument"):
        verdict("def f(): return 1")
    with pytest.raises(UserError, match=r"in isolation only.*prctl: Invalid argument"):
        warm_up()
    monkeypatch.setattr(sandbox, "_filter", lambda: struct.pack("=HBBI", 6, 0, 0, 0x7FFF_0000))
    with pytest.raises(UserError, match="found: network: AssertionError"):
        warm_up()


def test_an_unknown_machine_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    sandbox._filter.cache_clear()
    monkeypatch.setattr(platform, "machine", lambda: "riscv64")
    with pytest.raises(UserError, match="no system call filter for 'riscv64', only for x86_64, aarch64"):
        warm_up()


def test_every_machines_filter_allows_no_call_by_which_to_leave() -> None:
    for machine in MACHINES:
        program = filter_program(machine)
        assert len(program) % 8 == 0
        assert struct.unpack("=HBBI", program[-8:]) == (6, 0, 0, 0x0005_000D)
        assert len(program) // 8 < 4096


# In the pool.


def test_good_programs_among_hostile_ones_are_graded_right() -> None:
    hostile = [*FORGERIES.values(), attempt(DENIED["fork"]), "while True: pass", "def f(): return 0"]
    good = "def f():\n    print('x')\n    return 1"
    texts = [f"```python\n{each}\n```" for program in hostile for each in (program, good)]
    tasks = [GradingTask(prompt="", completion=text, answer=TEST) for text in texts]
    grades: list[Grade] = []
    # The grader's own limit ends them; that of the pool would come first on a loaded machine.
    with GraderPool(GraderConfig(name="code", workers=2, timeout_seconds=60)) as pool:
        thread = threading.Thread(target=lambda: grades.extend(pool.grade_all(tasks)))
        thread.start()
        thread.join()
    assert len(grades) == len(tasks)
    assert {grade.outcome for grade in grades[0::2]} == {Outcome.WRONG}
    assert {grade.outcome for grade in grades[1::2]} == {Outcome.CORRECT}
    assert eventually(lambda: sandboxes() == [])


@pytest.mark.parametrize("how", ["killed", "interrupted"])
def test_a_sandbox_does_not_survive_its_worker(how: str) -> None:
    before = set(os.listdir("/tmp"))
    config = GraderConfig(name="code", timeout_seconds=60)
    if how == "interrupted":
        config = config.model_copy(update={"timeout_seconds": 0.5})
    with GraderPool(config) as pool:
        pool.submit("slow", prompt="", completion="import time; time.sleep(60)", answer=TEST, truncated=False)
        assert eventually(sandboxes)
        if how == "killed":
            (child,) = sandboxes()
            status = Path(f"/proc/{child}/stat").read_text()
            os.kill(int(status.rpartition(")")[2].split()[1]), signal.SIGKILL)
        started = time.monotonic()
        ((_, grade),) = pool.drain()
        assert grade.outcome is (Outcome.VERIFIER_CRASH if how == "killed" else Outcome.VERIFIER_TIMEOUT)
        assert eventually(lambda: sandboxes() == [], 2)
        assert time.monotonic() - started < 3
    assert not any("payload" in name for name in set(os.listdir("/tmp")) - before)


def test_a_sandbox_leaves_nothing_behind(tmp_path: Path) -> None:
    descriptors, files = len(os.listdir("/proc/self/fd")), set(os.listdir("/tmp"))
    for program in ("def f(): return 1", "import os; os._exit(1)", "while True: print(1, file=open(1, 'w'))"):
        sandbox.run(program, [("test", "assert f()")], seconds=0.5, memory_bytes=MEMORY_BYTES)
    assert len(os.listdir("/proc/self/fd")) == descriptors
    assert set(os.listdir("/tmp")) <= files
    assert sandboxes() == []
