"""rescore, filter and inspect: arithmetic on an artifact, on any machine, without a model."""

import io
import json
import math
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest

from common.errors import UserError
from common.provenance import read_provenance
from common.runs import REPOSITORY, exclusive_run, run_paths
from common.terminal.console import Terminal
from common.vstar_file import ESTIMATORS, read_vstar
from stage1_vstar.describe import Extent, describe, show, to_json
from stage1_vstar.estimator import estimate
from stage1_vstar.filter import drop_rules, filter_prompts
from stage1_vstar.rescore import rescore
from tests.conftest import RunCli
from tests.fakes import CONTEXT, IDENTITY, write_artifact

OUTCOMES = {
    "none": ["wrong", "unparsed", "truncated", "wrong"],
    "one": ["correct", "wrong", "wrong", "wrong"],
    "three": ["correct", "correct", "correct", "wrong"],
    "all": ["correct"] * 4,
}


DEFAULTS: dict[str, Any] = {"unsolved": True, "solved": False, "min_pass_rate": 0, "max_pass_rate": 1}
"""Of `filter`."""


@pytest.fixture
def artifact(artifacts: Path) -> Path:
    """The artifact of the run named demo, where the commands look by default."""
    return write_artifact(artifacts / "demo" / "vstar.parquet", OUTCOMES)


def kept(path: Path) -> list[str]:
    rows = read_vstar(path)[0]
    return list(rows.filter("keep")["prompt_id"])


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


@pytest.fixture
def uneven(artifacts: Path) -> Path:
    """A run of 40 prompts with 2 to 8 samples, of all pass rates."""
    random = np.random.default_rng(0)
    outcomes = {}
    for number, rate in enumerate(random.random(40)):
        correct = random.random(2 + number % 7) < rate
        outcomes[f"p{number}"] = ["correct" if each else "wrong" for each in correct]
    return write_artifact(artifacts / "demo" / "vstar.parquet", outcomes)


@pytest.mark.parametrize("at_a_time", [1, 7, 65_536])
@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("beta1", [0.0, 0.125, math.inf])
def test_a_file_rescored_in_parts_is_the_file_rescored_whole(
    uneven: Path, monkeypatch: pytest.MonkeyPatch, at_a_time: int, estimator: str, beta1: float
) -> None:
    if (estimator, beta1) == ("beta_binomial", 0.0):
        with pytest.raises(UserError, match="says nothing at β1 = 0"):
            rescore(uneven, uneven, beta1, estimator)
        return
    rows = read_vstar(uneven)[0]
    whole = estimate(
        rows["rewards"].explode().to_numpy(),
        rows["num_samples"].cast(pl.Int64).to_numpy(),
        beta1,
        estimator=estimator,
    )
    monkeypatch.setattr("common.contract.BATCH_ROWS", at_a_time)
    line = rescore(uneven, uneven, beta1, estimator)
    rescored, provenance = read_vstar(uneven)
    tolerance = 1e-7 if estimator == "beta_binomial" else 0  # of the search for the prior
    np.testing.assert_allclose(rescored["vstar"], whole.vstar_P, rtol=tolerance)
    np.testing.assert_allclose(rescored["vstar_se"].fill_null(math.nan), whole.se_P, rtol=tolerance)
    unchanged = [name for name in rows.columns if name not in ("beta1", "vstar", "vstar_se")]
    assert rescored.select(unchanged).equals(rows.select(unchanged))
    assert provenance.context.get("estimator", "plugin") == estimator
    assert (f"plugin → {estimator}" in line) == (estimator != "plugin")


def test_the_estimator_is_recorded_until_the_papers_is_back(uneven: Path) -> None:
    before = uneven.read_bytes()
    rescore(uneven, uneven, 0.5, "beta_binomial")
    context = read_provenance(uneven).context
    assert context["estimator"] == "beta_binomial"
    assert set(context["prior"]) == {"a", "b"}
    filter_prompts(uneven, None, drop_rules(**DEFAULTS))
    assert read_provenance(uneven).context["estimator"] == "beta_binomial"
    rescore(uneven, uneven, 0.5, "jackknife")
    assert describe(uneven).estimator == "jackknife"
    assert "prior" not in read_provenance(uneven).context
    assert "jackknife → plugin" in rescore(uneven, uneven, 0.5)
    filter_prompts(uneven, None, [])
    context = read_provenance(uneven).context
    assert {**context, "filters": None} == {**CONTEXT, "filters": None}
    assert read_vstar(uneven)[0]["vstar"].equals(pl.read_parquet(before)["vstar"])


@pytest.mark.parametrize(
    ("estimator", "beta1", "problem"),
    [
        ("beta_binomial", 0.5, r"needs rewards of 0 and 1, found 0\.5; use the plugin"),
        ("mode", 0.5, "there is no estimator mode; choose one of plugin, jackknife, beta_binomial"),
    ],
)
def test_an_estimator_that_is_none_or_not_for_these_rewards_is_refused(
    tmp_path: Path, estimator: str, beta1: float, problem: str
) -> None:
    path = tmp_path / "vstar.parquet"
    write_artifact(path, {"a": ["wrong"] * 2, "b": ["wrong"] * 2}, rewards={"a": [0.0, 1.0], "b": [0.5, 1.0]})
    before = path.read_bytes()
    with pytest.raises(UserError, match=problem):
        rescore(path, path, beta1, estimator)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_the_figures_of_an_artifact_are_those_of_its_rows(artifact: Path) -> None:
    filter_prompts(artifact, None, drop_rules(**DEFAULTS))
    figures = describe(artifact)
    assert (figures.prompts, figures.kept, figures.samples) == (4, 3, 16)
    assert figures.num_samples == Extent(min=4, max=4)
    assert (figures.beta1, figures.pass_rate, figures.pass_at_n) == (0.5, 0.5, 0.75)
    assert figures.outcomes == {"correct": 8, "wrong": 6, "unparsed": 1, "truncated": 1}
    assert figures.mean_completion_tokens == 4.5
    assert figures.pass_rate_histogram == [1, 0, 0, 1, 0, 0, 0, 0, 1, 0, 0, 1]
    assert (figures.dropped_by, figures.estimator) == ({"pass@N = 0": 1}, "plugin")
    assert figures.identity == IDENTITY
    assert figures.context == {**CONTEXT, "filters": ["pass@N = 0"]}


@pytest.mark.parametrize("beta1", [0.0, 0.5, math.inf])
def test_the_figures_as_json_are_json_for_every_beta1(artifact: Path, beta1: float) -> None:
    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is no JSON")

    rescore(artifact, artifact, beta1)
    document = json.loads(to_json(describe(artifact)), parse_constant=refuse)
    assert float(document["beta1"]) == beta1


def test_inspect_says_how_far_vstar_may_be_off(tmp_path: Path) -> None:
    chance = np.random.default_rng(0)
    rates_P = chance.beta(1, 3, 3000)
    outcomes = {
        f"{place:032x}": ["correct" if draw < rate else "wrong" for draw in chance.random(4)]
        for place, rate in enumerate(rates_P)
    }
    figures = describe(write_artifact(tmp_path / "vstar.parquet", outcomes, beta1=0.5))
    solvable_P = rates_P >= 0.05
    assert figures.solvable_dropped == pytest.approx(((1 - rates_P) ** 4)[solvable_P].mean(), abs=0.02)
    truth_P = 0.5 * np.log1p(rates_P * np.expm1(2))
    bias = figures.vstar.mean - truth_P.mean()
    assert bias < -0.01
    assert figures.mean_bias == pytest.approx(bias, abs=0.015)
    assert 0.4 < figures.mean_interval_width < 0.8
    graded = write_artifact(tmp_path / "graded.parquet", {"p": ["wrong"] * 2}, rewards={"p": [0.25, 0.5]})
    assert describe(graded).solvable_dropped is None


@pytest.mark.parametrize(("outcome", "dropped"), [("wrong", "–"), ("correct", "0.00% of the prompts")])
def test_prompts_that_are_all_alike_are_described_without_a_warning(
    outcome: str, dropped: str, tmp_path: Path
) -> None:
    """Where none is ever solved there is no prompt of pass rate 0.05 that could be dropped wrongly."""
    path = tmp_path / "vstar.parquet"
    write_artifact(path, {name: [outcome] * 4 for name in ("p1", "p2", "p3")})
    printed = io.StringIO()
    show(describe(path), Terminal(file=printed, width=120))
    assert re.search(rf"pass@N = 0 would drop +{dropped}", printed.getvalue())
    assert not re.search(r"nan|-0\.0+\b", printed.getvalue())


def test_rescoring_says_when_flags_are_of_the_old_vstar(artifact: Path) -> None:
    filter_prompts(artifact, None, drop_rules(**DEFAULTS, max_interval_width=0.9))
    assert "interval of V* wider than 0.9): run `python cli.py filter` again" in rescore(
        artifact, artifact, 2.0
    )
    filter_prompts(artifact, None, drop_rules(**DEFAULTS))
    assert "again" not in rescore(artifact, artifact, 2.0)


def test_ragged_artifacts_are_described_too(tmp_path: Path) -> None:
    path = write_artifact(tmp_path / "vstar.parquet", {"a": ["correct"], "b": ["wrong", "correct", "wrong"]})
    assert describe(path).num_samples == Extent(min=1, max=3)


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
    dropped = lines["dropped by"].removeprefix("dropped by").strip().split(", ")
    assert sorted(dropped) == ["all correct 1", "pass@N = 0 1"]
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


@pytest.mark.parametrize("command", [["rescore", "--beta1", "1"], ["filter"]])
def test_a_run_that_vstar_is_writing_is_left_alone(
    artifact: Path, run_cli: RunCli, tmp_path: Path, command: list[str]
) -> None:
    run_paths("demo").samples.mkdir()
    spellings = [[], ["--vstar", artifact.parent / ".." / "demo" / artifact.name, "--run", "other"]]
    with exclusive_run(run_paths("demo"), "vstar"):
        before = artifact.read_bytes()
        for spelling in spellings:
            refused = run_cli(*command, *spelling)
            assert refused.returncode == 2
            assert "another vstar job" in refused.stderr
        assert artifact.read_bytes() == before
        assert run_cli(*command, "-o", str(tmp_path / "new.parquet")).returncode == 0


def test_no_offline_command_imports_torch(artifact: Path) -> None:
    script = (
        "import sys\n"
        "from typer.testing import CliRunner\n"
        "import cli\n"
        f"file = ['--vstar', {str(artifact)!r}]\n"
        f"exports = [['export-data', '--format', name, '-o', {str(artifact.parent)!r} + '/new' + ending]\n"
        "    for name, ending in (('spo', '.json'), ('trl', '.parquet'), ('verl', '.parquet'))]\n"
        "offline = [['rescore', '--beta1', '0'], ['filter'], ['inspect'], ['inspect', '--json'], *exports]\n"
        "for command in offline:\n"
        "    result = CliRunner().invoke(cli.app, [*command, *file])\n"
        "    assert result.exit_code == 0, result.output\n"
        "heavy = {'torch', 'vllm', 'transformers', 'deepspeed', 'datasets'}\n"
        "print(sorted(heavy & {name.partition('.')[0] for name in sys.modules}))\n"
    )
    result = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=60, cwd=REPOSITORY
    )
    assert result.stdout.strip() == "[]", result.stderr
