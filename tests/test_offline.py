"""rescore, filter and inspect: arithmetic on an artifact, on any machine, without a model."""

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest

from common.artifacts import REPOSITORY
from common.errors import UserError
from common.provenance import read_provenance
from common.schema import read_vstar
from stage1_vstar.describe import describe, to_json
from stage1_vstar.filter import Rule, drop_rules, filter_prompts
from stage1_vstar.rescore import rescore
from tests.conftest import RunCli
from tests.fakes import CONTEXT, IDENTITY, write_artifact

OUTCOMES = {
    "none": ["wrong", "unparsed", "truncated", "wrong"],
    "one": ["correct", "wrong", "wrong", "wrong"],
    "three": ["correct", "correct", "correct", "wrong"],
    "all": ["correct"] * 4,
}


@pytest.fixture
def artifact(artifacts: Path) -> Path:
    """The artifact of the run named demo, where the commands look by default."""
    return write_artifact(artifacts / "demo" / "vstar.parquet", OUTCOMES)


def kept(path: Path) -> list[str]:
    rows = read_vstar(path)[0]
    return list(rows.filter("keep")["prompt_id"])


def rules(
    *, unsolved: bool = False, solved: bool = False, min_pass_rate: float = 0.0, max_pass_rate: float = 1.0
) -> list[Rule]:
    return drop_rules(
        unsolved=unsolved, solved=solved, min_pass_rate=min_pass_rate, max_pass_rate=max_pass_rate
    )


@pytest.mark.parametrize(
    ("beta1", "expected"),
    [
        (0.0, [0.0, 1.0, 1.0, 1.0]),
        (math.inf, [0.0, 0.25, 0.75, 1.0]),
        (0.25, [0.0, *(0.25 * math.log((n * math.exp(4) + 4 - n) / 4) for n in (1, 3)), 1.0]),
    ],
)
def test_a_new_beta1_changes_v_star_and_nothing_else(
    artifact: Path, beta1: float, expected: list[float]
) -> None:
    before, provenance = read_vstar(artifact)
    line = rescore(artifact, artifact, beta1)
    after, same_provenance = read_vstar(artifact)
    if math.isinf(beta1) or beta1 == 0:
        assert after["vstar"].to_list() == expected
    else:
        assert after["vstar"].to_list() == pytest.approx(expected, rel=1e-14)
    assert after["beta1"].to_list() == [beta1] * 4
    changed = ["beta1", "vstar", "vstar_se"]
    assert after.drop(changed).equals(before.drop(changed))
    assert same_provenance == provenance
    assert f"4 prompts, β1 0.5 → {beta1:g}, mean V̂*" in line


def test_rescoring_there_and_back_gives_the_same_file(artifact: Path) -> None:
    before = read_vstar(artifact)[0]
    for beta1 in (0.0, math.inf, 1e-6, 0.5):
        rescore(artifact, artifact, beta1)
    assert read_vstar(artifact)[0].equals(before)


def test_rescoring_into_a_new_file_leaves_the_old_one(artifact: Path, tmp_path: Path) -> None:
    before = artifact.read_bytes()
    rescore(artifact, tmp_path / "new.parquet", 0.0)
    assert artifact.read_bytes() == before
    assert read_vstar(tmp_path / "new.parquet")[0]["vstar"].to_list() == [0.0, 1.0, 1.0, 1.0]


@pytest.mark.parametrize(
    ("chosen", "expected"),
    [
        (rules(unsolved=True), ["one", "three", "all"]),
        (rules(solved=True), ["none", "one", "three"]),
        (rules(unsolved=True, solved=True), ["one", "three"]),
        (rules(min_pass_rate=0.25, max_pass_rate=0.75), ["one", "three"]),
        (rules(min_pass_rate=0.5), ["three", "all"]),
        (rules(max_pass_rate=0.5), ["none", "one"]),
        (rules(), ["none", "one", "three", "all"]),
    ],
)
def test_rules_flag_the_prompts_that_they_drop(
    artifact: Path, chosen: list[Rule], expected: list[str]
) -> None:
    before = read_vstar(artifact)[0]
    lines = filter_prompts(artifact, None, chosen)
    assert kept(artifact) == expected
    assert read_vstar(artifact)[0].drop("keep").equals(before.drop("keep"))
    assert lines[-1].endswith(f"{len(expected)} of 4 prompts kept")
    assert read_provenance(artifact).context["filters"] == ([rule.name for rule in chosen] or ["none"])
    assert read_provenance(artifact).identity == IDENTITY


def test_each_rule_tells_how_many_prompts_it_drops(artifact: Path) -> None:
    lines = filter_prompts(artifact, None, rules(unsolved=True, max_pass_rate=0.5))
    assert lines[:2] == ["pass@N = 0: 1 prompts", "pass rate above 0.5: 2 prompts"]


def test_filtering_anew_replaces_the_flags(artifact: Path) -> None:
    filter_prompts(artifact, None, rules(min_pass_rate=0.5))
    filter_prompts(artifact, None, rules(max_pass_rate=0.5))
    assert kept(artifact) == ["none", "one"]


def test_filtering_into_a_new_file_writes_only_what_is_kept(artifact: Path, tmp_path: Path) -> None:
    before = artifact.read_bytes()
    filter_prompts(artifact, tmp_path / "new.parquet", rules(unsolved=True, solved=True))
    assert artifact.read_bytes() == before
    assert list(read_vstar(tmp_path / "new.parquet")[0]["prompt_id"]) == ["one", "three"]


@pytest.mark.parametrize("to_new_file", [False, True])
def test_a_filter_that_would_leave_nothing_is_refused_and_changes_nothing(
    artifact: Path, tmp_path: Path, to_new_file: bool
) -> None:
    before = artifact.read_bytes()
    output = tmp_path / "new.parquet" if to_new_file else None
    with pytest.raises(UserError, match=r"no prompt of .* would be left; nothing was changed"):
        filter_prompts(artifact, output, rules(min_pass_rate=0.3, max_pass_rate=0.6))
    assert artifact.read_bytes() == before
    assert not (tmp_path / "new.parquet").exists()


@pytest.mark.parametrize(
    ("low", "high"), [(0.6, 0.4), (-0.1, 1.0), (0.0, 1.1), (math.nan, 1.0), (0.0, math.nan)]
)
def test_an_empty_or_impossible_range_is_refused(low: float, high: float) -> None:
    with pytest.raises(UserError, match="give --min-pass-rate and --max-pass-rate with 0 ≤ min ≤ max ≤ 1"):
        rules(min_pass_rate=low, max_pass_rate=high)


def test_the_figures_of_an_artifact_are_those_of_its_rows(artifact: Path) -> None:
    filter_prompts(artifact, None, rules(unsolved=True))
    figures = describe(artifact)
    assert (figures["prompts"], figures["kept"], figures["samples"]) == (4, 3, 16)
    assert figures["num_samples"] == {"min": 4, "max": 4}
    assert (figures["beta1"], figures["pass_rate"], figures["pass_at_n"]) == (0.5, 0.5, 0.75)
    assert figures["outcomes"] == {"correct": 8, "wrong": 6, "unparsed": 1, "truncated": 1}
    assert figures["mean_completion_tokens"] == 4.5
    assert figures["pass_rate_histogram"] == [1, 0, 0, 1, 0, 0, 0, 0, 1, 0, 0, 1]
    assert figures["identity"] == IDENTITY
    assert figures["context"] == {**CONTEXT, "filters": ["pass@N = 0"]}


@pytest.mark.parametrize("beta1", [0.0, 0.5, math.inf])
def test_the_figures_as_json_are_json_for_every_beta1(artifact: Path, beta1: float) -> None:
    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is no JSON")

    rescore(artifact, artifact, beta1)
    document = json.loads(to_json(describe(artifact)), parse_constant=refuse)
    assert float(document["beta1"]) == beta1


def test_ragged_artifacts_are_described_too(tmp_path: Path) -> None:
    path = write_artifact(tmp_path / "vstar.parquet", {"a": ["correct"], "b": ["wrong", "correct", "wrong"]})
    assert describe(path)["num_samples"] == {"min": 1, "max": 3}


def test_the_commands_do_what_the_functions_do(artifact: Path, run_cli: RunCli, tmp_path: Path) -> None:
    result = run_cli("rescore", "--beta1", "inf")
    assert (result.returncode, result.stderr) == (0, "")
    assert "β1 0.5 → inf, mean V̂*" in result.stdout
    assert read_vstar(artifact)[0]["vstar"].to_list() == [0.0, 0.25, 0.75, 1.0]

    result = run_cli("rescore", "--vstar", artifact, "--beta1", "0", "--output", tmp_path / "new.parquet")
    assert (result.returncode, result.stderr) == (0, "")
    assert read_vstar(tmp_path / "new.parquet")[0]["vstar"].to_list() == [0.0, 1.0, 1.0, 1.0]

    result = run_cli("filter", "--drop-solved")
    assert (result.returncode, result.stderr) == (0, "")
    assert kept(artifact) == ["one", "three"]
    assert "2 of 4 prompts kept" in result.stdout

    result = run_cli("inspect")
    assert (result.returncode, result.stderr) == (0, "")
    lines = {line.split("  ")[0]: line for line in result.stdout.splitlines()}
    assert "4, of which 2 kept for training" in lines["prompts"]
    assert lines["β1"].split() == ["β1", "inf"]
    assert "pass@N = 0, all correct" in lines["filters"]
    assert "some/model (weights wwwwwwwwwwww)" in lines["model"]
    assert "gsm8k/1" in lines["grader"]
    assert "correct 8, wrong 6" in lines["outcomes"]
    bars = [line.split() for line in result.stdout.splitlines()[-12:]]
    assert [bar[1] for bar in bars] == ["1", "0", "0", "1", "0", "0", "0", "0", "1", "0", "0", "1"]
    assert [len(bar) for bar in bars] == [3 if bar[1] == "1" else 2 for bar in bars]

    result = run_cli("inspect", "--json")
    assert (result.returncode, result.stderr) == (0, "")
    document = json.loads(result.stdout)
    assert (document["prompts"], document["kept"], document["beta1"]) == (4, 2, "inf")


def test_no_offline_command_imports_torch(artifact: Path) -> None:
    script = (
        "import sys\n"
        "from typer.testing import CliRunner\n"
        "import cli\n"
        f"file = ['--vstar', {str(artifact)!r}]\n"
        "for command in (['rescore', '--beta1', '0'], ['filter'], ['inspect'], ['inspect', '--json']):\n"
        "    result = CliRunner().invoke(cli.app, [*command, *file])\n"
        "    assert result.exit_code == 0, result.output\n"
        "heavy = {'torch', 'vllm', 'transformers', 'deepspeed', 'datasets'}\n"
        "print(sorted(heavy & {name.partition('.')[0] for name in sys.modules}))\n"
    )
    result = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=60, cwd=REPOSITORY
    )
    assert result.stdout.strip() == "[]", result.stderr
