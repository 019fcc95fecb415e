"""`benchmarks.gpu` on a CPU: its parts at the smallest sizes, and what it says of those that fail or miss their aim."""

import json
import os
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from benchmarks.gpu.__main__ import main
from benchmarks.gpu.comparison import SUMMARY, compare
from benchmarks.gpu.findings import FORMAT, Findings, shown
from benchmarks.gpu.machine import describe
from benchmarks.gpu.parts import PARTS, chosen_parts
from benchmarks.gpu.running import environment, run
from common.errors import UserError
from tests import warm

ROOT = Path(__file__).parents[1]
FAST = (
    "formula",
    "iteration-1.5b",
    "reload-graphs-qwen3",
    "rebuild",
    "update-7b",
    "sweep",
    "logits",
    "noise",
    "accumulation",
)
"""Parts that take seconds, each of another module."""
SLOW = (
    "parity-adapter",
    "sampling-1.5b",
    "reload-eager-tied-odd",
    "ahead",
    "demo-vllm-bfloat16",
    "demo-transformers-float32",
    "naive-1.5b",
    "compiled-1.5b",
    "method-ppo",
    "sampling-demo",
)


def findings(part: str, file: Path | None = None, **values: Any) -> Findings:
    kept = {"device": "cpu", "is_tiny": True, "machine": describe("cpu"), **values}
    return Findings(part=part, file=file, **kept)


def measured(part: str, folder: Path) -> dict[str, Any]:
    """The JSON document of a part whose process ended well."""
    file = folder / f"{part}.json"
    findings(part, file).write()
    program: list[str | Path] = ["-m", "benchmarks.gpu.child", part, file, folder]
    process = warm.run(program, cwd=ROOT, env={**environment("cpu"), "OMP_NUM_THREADS": "1"}, timeout=600)
    assert process.returncode == 0, process.stderr[-4000:]
    document: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"), parse_constant=pytest.fail)
    return document


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Models are made once."""
    return tmp_path_factory.mktemp("gpu")


@pytest.mark.parametrize("part", [*FAST, *(pytest.param(part, marks=pytest.mark.slow) for part in SLOW)])
def test_a_part_runs_on_a_cpu_and_meets_the_aims_that_do_not_need_a_gpu(part: str, folder: Path) -> None:
    document = measured(part, folder)
    assert document["format"] == FORMAT
    assert (document["part"], document["device"], document["is_tiny"]) == (part, "cpu", True)
    assert document["machine"]["torch"]
    assert document["tables"]
    for rows in document["tables"].values():
        assert rows
        assert all(isinstance(cell, str | int | float | bool | None) for row in rows for cell in row.values())
    missed = [check for check in document["checks"] if check["verdict"] == "missed"]
    assert not missed
    assert Findings.of(document).markdown().startswith(f"### {part}: running")


def test_every_module_of_a_part_is_tested() -> None:
    assert {PARTS[name].module for name in (*FAST, *SLOW)} == {part.module for part in PARTS.values()}


SCRIPT = """
import json, sys, time
from pathlib import Path
part, file, folder = sys.argv[1:]
document = json.loads(Path(file).read_text())
if part == "hangs":
    document["tables"] = {"before": [{"figure": 1}]}
    Path(file).write_text(json.dumps(document))
    print("about to hang", flush=True)
    time.sleep(600)
if part == "breaks":
    print("the cause", file=sys.stderr)
    raise RuntimeError("it broke")
from benchmarks.gpu.findings import Findings
found = Findings.of(document)
found.file = Path(file)
if part == "good":
    found.row("a table", figure=1.5)
    found.at_least("enough", 2.0, 1.0)
else:
    found.at_least("too little", 0.4, 0.5)
    found.at_most("not a number", float("nan"), 1.0)
    found.at_least("of a GPU", 0.0, 1.0, of_the_hardware=True)
"""


def scripted(part: str, folder: Path, limit_seconds: float = 100) -> Findings:
    """A part that is a script."""
    base = replace(next(iter(PARTS.values())), name=part)
    return run(base, "cpu", folder, is_tiny=True, program=("-c", SCRIPT), limit_seconds=limit_seconds)


def test_a_part_that_fails_is_reported_with_its_last_lines(tmp_path: Path) -> None:
    failed = scripted("breaks", tmp_path)
    assert failed.status == "failed"
    assert failed.missed == 1
    assert "exit status 1" in failed.end_of_output[0]
    assert "the cause" in failed.end_of_output
    assert failed.end_of_output[-1] == "RuntimeError: it broke"
    assert failed.end_of_output[-1] in failed.markdown()
    assert json.loads((tmp_path / "breaks.json").read_text())["status"] == "failed"


def test_a_part_that_takes_too_long_is_ended_and_what_it_found_is_kept(tmp_path: Path) -> None:
    late = scripted("hangs", tmp_path, limit_seconds=5)
    assert late.status == "too slow"
    assert late.tables == {"before": [{"figure": 1}]}
    assert late.end_of_output == ["exit status None", "about to hang"]
    assert late.missed == 1


def test_a_check_beyond_its_aim_is_missed_and_one_that_needs_a_gpu_is_not_judged_here(tmp_path: Path) -> None:
    found = scripted("misses", tmp_path)
    assert found.status == "finished"
    verdicts = {check.what: (check.value, check.aim, check.verdict) for check in found.checks}
    assert verdicts == {
        "too little": (0.4, "≥ 0.5", "missed"),
        "not a number": (None, "≤ 1", "missed"),
        "of a GPU": (0.0, "≥ 1", "not judged"),
    }
    assert found.missed == 2
    assert scripted("good", tmp_path).missed == 0


def test_on_a_gpu_at_real_sizes_every_aim_is_judged() -> None:
    found = findings("update-1.5b", device="cuda", is_tiny=False)
    found.at_least("share", 0.4, 0.5, of_the_hardware=True)
    found.at_most("memory", 0.04, 0.05, of_the_hardware=True)
    assert [check.verdict for check in found.checks] == ["missed", "met"]


def test_the_command_goes_on_after_a_failure_and_its_status_counts_what_failed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("benchmarks.gpu.__main__.run", fake_run)
    out, together = tmp_path / "out", tmp_path / "all.json"
    names = ["noise", "logits", "formula"]
    assert main(["--part", *names, "--out", str(out), "--together", str(together), "--device", "cpu"]) == 2
    printed = capsys.readouterr().out
    assert all(f"### {name}" in printed for name in names)
    assert "2 failed or missed, of 3 parts" in printed
    assert [document["part"] for document in json.loads(together.read_text())] == names
    for place in (out, together):
        assert main(["--report", str(place)]) == 0
        report = capsys.readouterr().out
        assert "| noise | failed |  | finished |" in report
        assert "| logits | too little | 0.4 | ≥ 0.5 |" in report
        assert report.count("Measured on:") == 1


def fake_run(part: Any, device: Any, folder: Path, *, is_tiny: bool) -> Findings:
    """In place of a process: one part fails, one misses an aim."""
    found = findings(part.name, folder / f"{part.name}.json")
    found.status = "failed" if part.name == "noise" else "finished"
    if part.name == "logits":
        found.at_least("too little", 0.4, 0.5)
    found.write()
    return found


def test_objectives_are_compared_where_a_star_po_was_measured_too() -> None:
    def method(name: str, seconds: float, gib: float) -> Findings:
        found = findings(f"method-{name}", device="cuda", is_tiny=False, status="finished")
        found.row(
            SUMMARY, iteration=seconds, rollout=seconds / 2, training=seconds / 2, peak_GiB=gib, completions=1
        )
        return found

    ours, ppo = method("astar_po", 10.0, 30.0), method("ppo", 20.0, 40.0)
    compared = compare({one.part: one for one in (ours, ppo)})
    assert compared is not None
    assert [(check.value, check.verdict) for check in compared.checks] == [(2.0, "met"), (0.25, "missed")]
    (rows,) = compared.tables.values()
    assert [(row["objective"], row["over ours"]) for row in rows] == [("astar_po", 1.0), ("ppo", 2.0)]
    assert compare({ppo.part: ppo}) is None
    on_a_cpu = compare({one.part: one for one in (method("astar_po", 1.0, 0.0), method("ppo", 1.0, 0.0))})
    assert on_a_cpu is not None
    assert on_a_cpu.checks[1].value is None
    elsewhere = replace(ppo, machine={**ppo.machine, "card": "another"})
    assert compare({ours.part: ours, ppo.part: elsewhere}) is not None
    assert not compare({ours.part: ours, ppo.part: elsewhere}).checks  # type: ignore[union-attr]


def test_parts_are_chosen_by_name_or_by_its_beginning() -> None:
    assert [part.name for part in chosen_parts(["noise"])] == ["noise"]
    assert len(chosen_parts(["reload"])) == 9
    assert chosen_parts(["reload", "reload-graphs-qwen3"]) == chosen_parts(["reload"])
    assert len(chosen_parts([])) == len(PARTS)
    with pytest.raises(UserError, match="there is no such part"):
        chosen_parts(["relo"])


@pytest.mark.parametrize("content", ["", "[1]", '{"format": 99, "part": "x"}', '{"rows": []}'])
def test_a_file_that_is_not_of_this_command_is_refused_in_one_line(
    tmp_path: Path, content: str, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "other.json"
    file.write_text(content)
    with pytest.raises(SystemExit) as ended:
        main(["--report", str(file)])
    assert ended.value.code == 2
    assert f"--report {file}: it is not what" in capsys.readouterr().err


def test_a_part_on_a_cpu_sees_no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DS_ACCELERATOR", "cuda")  # as a GPU machine's environment may say
    assert environment("cpu")["CUDA_VISIBLE_DEVICES"] == ""
    assert environment("cpu")["DS_ACCELERATOR"] == "cpu"
    assert environment("cuda").get("CUDA_VISIBLE_DEVICES") == os.environ.get("CUDA_VISIBLE_DEVICES")


@pytest.mark.parametrize(
    ("cell", "text"), [(None, ""), (True, "yes"), (12345, "12,345"), (0.123456, "0.1235"), ("a", "a")]
)
def test_cells_are_short(cell: Any, text: str) -> None:
    assert shown(cell) == text


def test_the_list_names_every_part() -> None:
    process = warm.run(["-m", "benchmarks.gpu", "--list"], cwd=ROOT, env=dict(os.environ), timeout=60)
    assert process.returncode == 0, process.stderr
    assert all(f"| {name} |" in process.stdout for name in PARTS)
    assert sys.executable not in process.stdout
