"""Which prompts are trained on: rules by name, what each drops, conditions of one's own, and files read in parts."""

import json
import math
from pathlib import Path
from typing import Any

import polars as pl
import pytest

from common.errors import UserError
from common.provenance import read_provenance
from common.vstar_file import read_vstar
from stage1_vstar.filter import Rule, drop_rules, filter_prompts
from stage1_vstar.uncertainty import interval
from tests.conftest import RunCli
from tests.fakes import IDENTITY, write_artifact

OUTCOMES = {
    "none": ["wrong", "unparsed", "truncated", "wrong"],
    "one": ["correct", "wrong", "wrong", "wrong"],
    "three": ["correct", "correct", "correct", "wrong"],
    "all": ["correct"] * 4,
}


@pytest.fixture(params=[65_536, 3, 1], ids="{} at a time".format)
def artifact(request: pytest.FixtureRequest, artifacts: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The artifact of the run named demo; what a filter does must not depend on how many prompts it reads at a time."""
    monkeypatch.setattr("common.contract.BATCH_ROWS", request.param)
    return write_artifact(artifacts / "demo" / "vstar.parquet", OUTCOMES)


def rules(
    *,
    unsolved: bool = False,
    solved: bool = False,
    min_pass_rate: float = 0.0,
    max_pass_rate: float = 1.0,
    **others: Any,
) -> list[Rule]:
    return drop_rules(
        unsolved=unsolved,
        solved=solved,
        min_pass_rate=min_pass_rate,
        max_pass_rate=max_pass_rate,
        **others,
    )


def kept(path: Path) -> list[str]:
    rows = read_vstar(path)[0]
    return list(rows.filter("keep")["prompt_id"])


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
    filtered = filter_prompts(artifact, None, chosen)
    assert kept(artifact) == expected
    flags = ["keep", "dropped_by"]
    assert read_vstar(artifact)[0].drop(flags).equals(before.drop(flags))
    assert filtered.lines()[-1].endswith(f"{len(expected)} of 4 prompts kept")
    assert read_provenance(artifact).context["filters"] == ([rule.name for rule in chosen] or ["none"])
    assert read_provenance(artifact).identity == IDENTITY


def test_every_dropped_prompt_has_the_first_rule_that_drops_it(artifact: Path) -> None:
    filtered = filter_prompts(artifact, None, rules(unsolved=True, solved=True, max_pass_rate=0.5))
    assert read_vstar(artifact)[0]["dropped_by"].to_list() == [
        "pass@N = 0",
        None,
        "pass rate above 0.5",
        "all correct",
    ]
    assert filtered.lines()[:-1] == [
        "pass@N = 0: 1 prompts, 1 dropped by it",
        "all correct: 1 prompts, 1 dropped by it",
        "pass rate above 0.5: 2 prompts, 1 dropped by it",
    ]
    assert sum(rule.drops for rule in filtered.rules) == filtered.rows - filtered.kept == 3


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


@pytest.mark.parametrize(
    ("share", "expected"), [(0.25, ["none", "one", "three", "all"]), (0.24, ["one", "three", "all"])]
)
def test_prompts_whose_samples_are_cut_off_too_often_are_dropped(
    artifact: Path, share: float, expected: list[str]
) -> None:
    filter_prompts(artifact, None, rules(max_truncated=share))
    assert kept(artifact) == expected


def test_prompts_with_a_wide_interval_of_v_star_are_dropped(artifact: Path) -> None:
    rows = read_vstar(artifact)[0]
    found = interval(rows["rewards"].explode().to_numpy(), rows["num_samples"].cast(pl.Int64).to_numpy(), 0.5)
    width_P = found.high_P - found.low_P
    widest_but_one = float(sorted(width_P)[-2])
    narrow = [name for name, width in zip(OUTCOMES, width_P, strict=True) if width <= widest_but_one]
    assert 0 < len(narrow) < 4
    filter_prompts(artifact, None, rules(max_interval_width=widest_but_one))
    assert kept(artifact) == narrow
    filter_prompts(artifact, None, rules(where=[f"interval_width <= {widest_but_one + 1e-9:.12f}"]))
    assert kept(artifact) == narrow


def test_the_intervals_of_all_parts_of_a_file_refer_to_the_same_range_of_rewards(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rewards = {"low": [0.0, 0.5, 1.0], "high": [0.0, 3.0, 3.0], "equal": [1.0, 1.0, 0.0]}
    files = []
    for at_a_time in (1, 3):
        monkeypatch.setattr("common.contract.BATCH_ROWS", at_a_time)
        path = tmp_path / f"{at_a_time}.parquet"
        write_artifact(path, {name: ["wrong"] * 3 for name in rewards}, rewards=rewards)
        filter_prompts(path, None, rules(max_interval_width=2.1))
        files.append(read_vstar(path)[0])
    assert files[0].equals(files[1])
    assert files[0]["keep"].n_unique() == 2


@pytest.mark.parametrize(
    ("condition", "expected"),
    [
        ("pass_rate BETWEEN 0.1 AND 0.9", ["one", "three"]),
        ("prompt_id IN ('one', 'all')", ["one", "all"]),
        ("CASE WHEN keep THEN rewards[1] ELSE 0 END > 0.5", ["one", "three", "all"]),
        ("array_contains(outcomes, 'truncated')", ["none"]),
        ("COALESCE(vstar_se, 9) < 0.1 AND ABS(vstar - pass_rate) < 0.1", ["none", "all"]),
        ("length(prompt) > 12 AND NOT pass_at_n", ["none"]),
        ("prompt LIKE '%three' OR prompt_id = 'all'", ["three", "all"]),
        ("vstar_se < 0.1", ["none", "all"]),
        ("NOT (dropped_by = 'earlier')", []),
    ],
)
def test_a_condition_of_ones_own_names_the_prompts_to_keep(
    artifact: Path, condition: str, expected: list[str]
) -> None:
    chosen = rules(where=[condition])
    if expected:
        filter_prompts(artifact, None, chosen)
        assert kept(artifact) == expected
        assert read_provenance(artifact).context["filters"] == [f"not where {condition}"]
    else:  # a missing value is not true
        with pytest.raises(UserError, match="no prompt of"):
            filter_prompts(artifact, None, chosen)


def test_several_conditions_drop_in_their_order(artifact: Path) -> None:
    filtered = filter_prompts(artifact, None, rules(where=["pass_rate > 0.5", "pass_rate < 0.9"]))
    assert [(rule.matches, rule.drops) for rule in filtered.rules] == [(2, 2), (1, 1)]
    assert kept(artifact) == ["three"]


@pytest.mark.parametrize(
    ("condition", "problem"),
    [
        ("pass_rate >", "unable to parse"),
        ("", "unable to parse"),
        ("SELECT 1", "expected an expression"),
        ("pass_rate > 0.1; DROP TABLE x", "unexpected token"),
        ("nope > 1", r"there is no column nope; the columns are prompt_id, .*interval_width"),
        ("foo(pass_rate) > 1", "unsupported function 'foo'"),
        ("pass_rate + 1", "gives Float64, not true or false"),
        ("true", "names no column"),
        ("pass_rate > AVG(pass_rate)", "compares prompts with each other"),
        ("pass_rate >= MAX(pass_rate) OVER ()", "compares prompts with each other"),
        ("RANK() OVER (ORDER BY pass_rate * 0.5) < 3", "compares prompts with each other"),
        ("QUANTILE_CONT(pass_rate, 0.5) < pass_rate", "compares prompts with each other"),
        ("COUNT(*) > 3 AND keep", "compares prompts with each other"),
    ],
)
def test_what_is_no_condition_on_one_prompt_is_refused(condition: str, problem: str) -> None:
    with pytest.raises(UserError, match=problem) as caught:
        rules(where=[condition])
    assert str(caught.value).startswith(f"--where {condition}")


def test_a_condition_that_fails_on_the_rows_is_refused_and_changes_nothing(artifact: Path) -> None:
    before = artifact.read_bytes()
    with pytest.raises(UserError, match=r"the rules cannot be applied: .*correct --where"):
        filter_prompts(artifact, None, rules(where=["prompt ~ '['"]))
    assert artifact.read_bytes() == before
    assert list(artifact.parent.iterdir()) == [artifact]


@pytest.mark.parametrize("width", [-0.1, math.nan])
def test_an_impossible_width_is_refused(width: float) -> None:
    with pytest.raises(UserError, match="give a width of 0 or more"):
        rules(max_interval_width=width)


@pytest.mark.parametrize("share", [-0.1, 1.1, math.nan])
def test_an_impossible_share_is_refused(share: float) -> None:
    with pytest.raises(UserError, match="give a share from 0 to 1"):
        rules(max_truncated=share)


def test_the_counts_are_there_as_json(artifacts: Path, run_cli: RunCli) -> None:
    path = write_artifact(artifacts / "demo" / "vstar.parquet", OUTCOMES)
    result = run_cli("filter", "--where", "pass_rate < 0.9", "--max-truncated", "0.2", "--json")
    assert (result.returncode, result.stderr) == (0, "")
    assert json.loads(result.stdout) == {
        "path": str(path),
        "prompts": 4,
        "kept": 2,
        "rules": [
            {"name": "pass@N = 0", "matches": 1, "drops": 1},
            {"name": "truncated share above 0.2", "matches": 1, "drops": 0},
            {"name": "not where pass_rate < 0.9", "matches": 1, "drops": 1},
        ],
    }
    result = run_cli("filter", "--where", "nope")
    assert result.returncode == 2
    assert result.stderr.startswith("error: --where nope: there is no column nope;")
