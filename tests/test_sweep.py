"""The sweep over β1 and N: exact at its limits, the same both ways, and true of runs that really drew N samples."""

import json
import math
import subprocess
import sys
from hashlib import sha256
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest

from common.errors import UserError
from common.report.sweep_files import SamplesDigest
from common.runs import REPOSITORY
from common.value import estimate_vstar
from common.vstar_file import read_vstar
from stage1_vstar.sweep import BETAS, Loss, MeanAndSd, parse_betas, parse_sizes, sweep, units
from stage1_vstar.sweep_run import run_sweep
from tests.conftest import RunCli
from tests.fakes import write_artifact

OUTCOMES = {
    "none": [0, 0, 0, 0, 0, 0],
    "one": [0, 0, 1, 0, 0, 0],
    "one, early": [1, 0, 0, 0, 0, 0],
    "four": [1, 1, 0, 1, 0, 1],
    "all": [1, 1, 1, 1, 1, 1],
}


def artifact_rows(
    path: Path, solved: dict[str, list[int]], rewards: dict[str, list[float]] | None = None
) -> pl.DataFrame:
    outcomes = {name: ["correct" if each else "wrong" for each in row] for name, row in solved.items()}
    return read_vstar(write_artifact(path, outcomes, rewards=rewards))[0]


def graded(path: Path, rates_P: np.ndarray[Any, Any], samples: int, seed: int) -> pl.DataFrame:
    """A run over prompts with known probabilities of a correct sample."""
    drawn_PS = np.random.default_rng(seed).random((len(rates_P), samples)) < rates_P[:, None]
    return artifact_rows(path, {f"{place:04}": row.tolist() for place, row in enumerate(drawn_PS)})


@pytest.fixture
def rows(tmp_path: Path) -> pl.DataFrame:
    return artifact_rows(tmp_path / "vstar.parquet", OUTCOMES)


@pytest.fixture
def halves(tmp_path: Path) -> pl.DataFrame:
    """The same outcomes with rewards of three values, for which subsets are drawn at random."""
    rewards = {
        name: [each or 0.5 * (place % 2) for place, each in enumerate(row)] for name, row in OUTCOMES.items()
    }
    return artifact_rows(tmp_path / "halves.parquet", OUTCOMES, rewards)


def test_infinite_beta1_is_exactly_the_pass_rate_and_zero_exactly_pass_at_n(tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    rows = graded(tmp_path / "vstar.parquet", rng.random(300) ** 2, 24, seed=2)
    (unit,) = units(rows)
    for beta1, name in ((math.inf, "pass_rate"), (0.0, "pass_at_n")):
        subsets = unit.subsets(24)
        vstar_U = (subsets.vstar(beta1) * subsets.probability_UO).sum(axis=1)
        found = np.repeat(vstar_U, unit.prompts_U.astype(int)).tolist()
        assert found == sorted(rows[name].cast(pl.Float64))
    figures = sweep(rows, BETAS, (1, 2, 5, 24))
    for size in (1, 2, 5, 24):
        assert figures.cell(math.inf, size).vstar.mean == pytest.approx(rows["pass_rate"].mean(), rel=1e-12)
        assert figures.cell(0.0, size).vstar.mean == pytest.approx(
            1 - figures.column(size).dropped.mean, rel=1e-12
        )


@pytest.mark.parametrize("beta1", BETAS)
def test_the_figures_are_those_of_every_single_subset(rows: pl.DataFrame, beta1: float) -> None:
    figures = sweep(rows, [beta1], [3])
    means, errors, losses, spreads = [], [], [], []
    for rewards in rows["rewards"].to_list():
        subsets = [list(chosen) for chosen in combinations(range(6), 3)]
        values = estimate_vstar(
            np.array([rewards[place] for chosen in subsets for place in chosen]),
            np.full(len(subsets), 3),
            beta1,
        ).vstar_P
        full = estimate_vstar(np.array(rewards), np.array([6]), beta1).vstar_P[0]
        rest = [[rewards[place] for place in range(6) if place not in chosen] for chosen in subsets]
        means.append(values.mean())
        spreads.append(values.var())
        errors.append(((values - full) ** 2).mean())
        losses.append(np.mean((np.array(rest) - values[:, None]) ** 2))
    found = figures.cell(beta1, 3)
    assert found.vstar.mean == pytest.approx(np.mean(means), rel=1e-12)
    assert found.vstar.sd == pytest.approx(math.sqrt(np.sum(spreads)) / 5, rel=1e-12)
    assert found.prompt_sd == pytest.approx(math.sqrt(np.mean(spreads)), rel=1e-12)
    assert found.spread == pytest.approx(math.sqrt(np.mean(spreads) + np.var(means)), rel=1e-12)
    assert found.rmse == pytest.approx(math.sqrt(np.mean(errors)), rel=1e-12)
    assert found.loss.mean == pytest.approx(np.mean(losses), rel=1e-12)
    dropped = figures.column(3)
    assert dropped.dropped.mean == pytest.approx((1 + 2 * 10 / 20) / 5, rel=1e-12)
    assert dropped.dropped_solvable.mean == pytest.approx(2 * 10 / 20 / 5, rel=1e-12)


def test_random_subsets_of_other_rewards_agree_with_exact_ones(tmp_path: Path) -> None:
    rates_P = np.random.default_rng(3).random(400) ** 2
    rows = graded(tmp_path / "vstar.parquet", rates_P, 16, seed=4)
    doubled = rows.with_columns(rewards=pl.col("rewards").list.eval(pl.element() * 2))
    exact = sweep(rows, [math.inf, 0.5, 0.0], [2, 8])
    random = sweep(doubled, [math.inf, 1.0, 0.0], [2, 8])
    for one, two in zip(exact.cells, random.cells, strict=True):
        assert one.loss.mean is not None
        assert two.loss.mean is not None
        assert two.vstar.mean / 2 == pytest.approx(one.vstar.mean, abs=0.004)
        assert two.rmse / 2 == pytest.approx(one.rmse, rel=0.02)
        assert two.prompt_sd / 2 == pytest.approx(one.prompt_sd, rel=0.02)
        assert two.loss.mean / 4 == pytest.approx(one.loss.mean, rel=0.02)
        assert two.loss.sd / 4 == pytest.approx(one.loss.sd, rel=0.05)
    for here, there in zip(exact.by_num_samples, random.by_num_samples, strict=True):
        for name in ("dropped", "dropped_solvable", "time_saved"):
            assert getattr(there, name).mean == pytest.approx(getattr(here, name).mean, abs=0.004)


def test_two_random_subsets_of_each_of_many_prompts_tell_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rates_P = np.random.default_rng(3).random(4000) ** 2
    rows = graded(tmp_path / "vstar.parquet", rates_P, 8, seed=4)
    rows = rows.with_columns(rewards=pl.col("rewards").list.eval(pl.element() * 2))
    many = sweep(rows, [1.0], [2, 8])
    monkeypatch.setattr("stage1_vstar.sweep.MOST_SUBSETS", 8000)
    few = sweep(rows, [1.0], [2, 8])
    for one, two in zip(many.cells, few.cells, strict=True):
        assert two.vstar.mean == pytest.approx(one.vstar.mean, abs=0.02)
        assert two.bias == pytest.approx(one.bias, abs=0.02)
        assert two.prompt_sd == pytest.approx(one.prompt_sd, rel=0.04)
        assert two.vstar.sd == pytest.approx(one.vstar.sd, rel=0.04)
        assert two.loss.sd == pytest.approx(one.loss.sd, rel=0.08)
    assert few.column(2).dropped.sd == pytest.approx(many.column(2).dropped.sd, rel=0.04)


@pytest.mark.parametrize("name", ["rows", "halves"])
def test_all_samples_are_one_subset_so_that_nothing_varies(name: str, request: pytest.FixtureRequest) -> None:
    figures = sweep(request.getfixturevalue(name), BETAS, [6])
    for beta1 in BETAS:
        found = figures.cell(beta1, 6)
        assert (found.bias, found.prompt_sd, found.rmse) == (0, 0, 0)
        assert (found.vstar.sd, found.loss.sd) == (0, 0)
    everything = figures.column(6)
    assert everything.dropped == MeanAndSd(mean=0.2, sd=0)
    assert everything.dropped_solvable == MeanAndSd(mean=0, sd=0)


@pytest.mark.parametrize("name", ["rows", "halves"])
def test_the_same_artifact_gives_the_same_figures(name: str, request: pytest.FixtureRequest) -> None:
    rows = request.getfixturevalue(name)
    assert sweep(rows, BETAS, [1, 2, 4]) == sweep(rows, BETAS, [1, 2, 4])


def test_runs_that_draw_n_samples_fall_within_the_error_bars(tmp_path: Path) -> None:
    """Two standard deviations should hold 95 % of fresh runs. A fresh run does not share the large run's samples, which
    widens the error bar by √((M + N)/(M − N))."""
    many, sizes, betas, repeats = 128, (2, 8, 32), (math.inf, 0.5, 0.125, 0.0), 40
    rates_P = np.random.default_rng(5).beta(0.6, 0.9, 500)
    figures = sweep(graded(tmp_path / "large.parquet", rates_P, many, seed=6), betas, sizes)
    rng = np.random.default_rng(7)
    inside = []
    for size in sizes:
        wider = math.sqrt((many + size) / (many - size))
        for _ in range(repeats):
            rewards_PN = (rng.random((len(rates_P), size)) < rates_P[:, None]).astype(float)
            expected: dict[str, MeanAndSd | Loss] = {"dropped": figures.column(size).dropped}
            fresh = {"dropped": 1 - rewards_PN.max(axis=1).mean()}
            for beta1 in betas:
                estimate = estimate_vstar(rewards_PN.ravel(), np.full(len(rates_P), size), beta1).vstar_P
                found = figures.cell(beta1, size)
                expected |= {f"vstar {beta1}": found.vstar, f"loss {beta1}": found.loss}
                fresh |= {
                    f"vstar {beta1}": estimate.mean(),
                    f"loss {beta1}": (rates_P - 2 * estimate * rates_P + estimate**2).mean(),
                }
            inside.append(
                [
                    abs(fresh[name] - (expected[name].mean or 0.0)) <= 2 * wider * expected[name].sd
                    for name in fresh
                ]
            )
    shares = np.mean(inside, axis=0)
    assert shares.mean() > 0.9, shares
    assert shares.mean() < 0.995, shares


def test_prompts_with_fewer_samples_are_left_out_and_counted(tmp_path: Path) -> None:
    rows = artifact_rows(tmp_path / "vstar.parquet", {"a": [1, 0], "b": [0, 0, 0, 1], "c": [0, 0, 0, 0]})
    figures = sweep(rows, [math.inf], parse_sizes([], rows["num_samples"].to_list()))
    assert [(each.num_samples, each.left_out) for each in figures.by_num_samples] == [
        (1, 0),
        (2, 0),
        (4, 1),
    ]
    assert figures.cell(math.inf, 2).vstar.mean == pytest.approx((0.5 + 0.25 + 0) / 3)
    assert figures.cell(math.inf, 4).vstar.mean == pytest.approx((0.25 + 0) / 2)


def test_the_time_saved_weighs_prompts_by_their_tokens(rows: pl.DataFrame) -> None:
    lengths = {"none": 40, "one": 10, "one, early": 10, "four": 10, "all": 30}
    longer = rows.with_columns(
        completion_tokens=pl.col("prompt_id").replace_strict(lengths, return_dtype=pl.Int32).repeat_by(6)
    )
    saved = sweep(longer, [0.0], [3]).column(3).time_saved.mean
    assert saved == pytest.approx((40 + 10 / 20 * (10 + 10)) / 100, rel=1e-12)


def test_quantiles_and_histogram_are_those_of_the_values(rows: pl.DataFrame) -> None:
    figures = sweep(rows, [math.inf], [6])
    found = figures.cell(math.inf, 6)
    assert found.quantiles == pytest.approx(
        {"0.05": 0, "0.25": 1 / 6, "0.5": 1 / 6, "0.75": 2 / 3, "0.95": 1}
    )
    counts, _ = np.histogram(rows["pass_rate"], figures.histogram_edges)
    assert found.histogram == pytest.approx(counts / 5)


def test_one_sample_a_prompt_leaves_no_fresh_sample_for_a_loss(tmp_path: Path) -> None:
    source = tmp_path / "vstar.parquet"
    artifact_rows(source, {"a": [1], "b": [0]})
    run_sweep(source, beta1=["inf"])
    (first, *_) = json.loads((tmp_path / "report" / "sweep.json").read_text())["cells"]
    assert (first["beta1"], first["num_samples"]) == ("inf", 1)
    assert first["loss"] == {"mean": None, "sd": 0.0}


@pytest.mark.parametrize("name", ["rows", "halves"])
def test_the_plots_are_whole_and_the_same_each_time(
    name: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    request.getfixturevalue(name)
    source = tmp_path / ("vstar.parquet" if name == "rows" else "halves.parquet")
    stem = "sweep" if name == "rows" else "sweep-halves"
    drawings = []
    for _ in range(2):
        run_sweep(source, beta1=["inf,0.5"], num_samples=["1,3,6"])
        drawings.append((tmp_path / "report" / f"{stem}.svg").read_bytes())
    assert drawings[0] == drawings[1]
    assert drawings[0].rstrip().endswith(b"</svg>")
    assert (tmp_path / "report" / f"{stem}.png").read_bytes().startswith(b"\x89PNG")
    assert {file.name for file in (tmp_path / "report").iterdir()} == {
        f"{stem}.{suffix}" for suffix in ("json", "png", "svg")
    }


def digest(*parts: pl.DataFrame) -> str:
    made = SamplesDigest()
    for part in parts:
        made.add(part)
    return made.hexdigest()


def test_the_json_names_its_drawings_and_its_samples(rows: pl.DataFrame, tmp_path: Path) -> None:
    run_sweep(tmp_path / "vstar.parquet", beta1=["inf"])
    report = tmp_path / "report"
    document = json.loads((report / "sweep.json").read_text())
    assert document["drawings"] == {
        suffix: sha256((report / f"sweep.{suffix}").read_bytes()).hexdigest() for suffix in ("png", "svg")
    }
    assert document["samples"] == digest(rows)


def test_samples_have_the_same_digest_in_parts_and_after_what_leaves_them_as_they_are(
    rows: pl.DataFrame,
) -> None:
    assert (
        digest(rows) == digest(rows[:2], rows[2:]) == digest(rows.with_columns(vstar=pl.lit(0.5), keep=False))
    )


def test_other_samples_have_another_digest(rows: pl.DataFrame) -> None:
    others = [
        rows[1:],
        rows.reverse(),
        rows.with_columns(prompt_id=pl.col("prompt_id") + "x"),
        rows.with_columns(
            pl.col("rewards", "outcomes", "completion_tokens").list.head(3), num_samples=pl.lit(3)
        ),
        rows.with_columns(rewards=pl.col("rewards").list.reverse()),
        rows.with_columns(outcomes=pl.col("outcomes").list.reverse()),
        rows.with_columns(completion_tokens=pl.col("completion_tokens").list.eval(pl.element() + 1)),
    ]
    assert len({digest(each) for each in (rows, *others)}) == 1 + len(others)


def test_beta1_is_a_comma_list_sorted_from_large_to_small() -> None:
    assert parse_betas([]) == BETAS
    assert parse_betas(["0.5,inf", "0,0.5"]) == (math.inf, 0.5, 0.0)


@pytest.mark.parametrize("text", ["-1", "nan", "half", "", "1,,2"])
def test_an_impossible_beta1_is_refused(text: str) -> None:
    with pytest.raises(UserError, match=r"--beta1 .*: β1 is a number from 0 \(best reward\) to inf \(mean\)"):
        parse_betas([text])


def test_the_powers_of_two_and_all_samples_are_swept_unless_others_are_asked_for() -> None:
    assert parse_sizes([], [12, 3]) == (1, 2, 4, 8, 12)
    assert parse_sizes([], [8]) == (1, 2, 4, 8)
    assert parse_sizes(["4, 2", "4"], [8]) == (2, 4)


@pytest.mark.parametrize("text", ["16", "0", "-1", "2.5", "many", ""])
def test_an_impossible_n_is_refused(text: str) -> None:
    with pytest.raises(
        UserError, match=r"--num-samples .*: this artifact has at most 8 .* from 1 to 8; .* draws more"
    ):
        parse_sizes([text], [8, 4])


def test_the_command_prints_tables_that_fit_eighty_columns(run_cli: RunCli, artifacts: Path) -> None:
    outcomes = {name: ["correct" if each else "wrong" for each in row] for name, row in OUTCOMES.items()}
    many = {name: row * 22 for name, row in outcomes.items()}
    write_artifact(artifacts / "demo" / "vstar.parquet", many)
    result = run_cli("sweep")
    assert (result.returncode, result.stderr) == (0, "")
    tables = result.stdout[: result.stdout.index("± is the standard deviation")]
    assert max(map(len, tables.splitlines()[1:])) <= 80
    assert "…" not in tables
    assert [line.split()[0] for line in tables.splitlines() if line.strip().startswith("128 ")] == ["128"] * 6

    result = run_cli("sweep", "--json", "--beta1", "inf,0", "--num-samples", "2")
    assert (result.returncode, result.stderr) == (0, "")
    document = json.loads(result.stdout)
    assert [(each["beta1"], each["num_samples"]) for each in document["cells"]] == [("inf", 2), (0.0, 2)]
    assert document == json.loads((artifacts / "demo" / "report" / "sweep.json").read_text())


def test_the_command_imports_no_torch(tmp_path: Path) -> None:
    artifact_rows(tmp_path / "vstar.parquet", OUTCOMES)
    script = (
        "import sys\n"
        "from typer.testing import CliRunner\n"
        "import cli\n"
        f"command = ['sweep', '--vstar', {str(tmp_path / 'vstar.parquet')!r}, '--beta1', '0', '--num-samples', '2']\n"
        "result = CliRunner().invoke(cli.app, command)\n"
        "assert result.exit_code == 0, result.output\n"
        "heavy = {'torch', 'vllm', 'transformers', 'deepspeed', 'datasets'}\n"
        "print(sorted(heavy & {name.partition('.')[0] for name in sys.modules}))\n"
    )
    result = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=60, cwd=REPOSITORY
    )
    assert result.stdout.strip() == "[]", result.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--run", "absent"], "there is no"),
        (["--beta1", "-1"], "error: --beta1 -1"),
        (["--num-samples", "7"], "at most 6 samples per prompt"),
    ],
)
def test_mistakes_are_told_in_a_line(
    run_cli: RunCli, artifacts: Path, arguments: list[str], message: str
) -> None:
    artifact_rows(artifacts / "demo" / "vstar.parquet", OUTCOMES)
    result = run_cli("sweep", *arguments)
    assert result.returncode == 2
    assert message in result.stderr
    assert len(result.stderr.splitlines()) == 1
    assert not (artifacts / "demo" / "report").exists()
