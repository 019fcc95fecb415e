"""advantages.parquet: values, advantages and rules against examples by hand; the job, rescore, filter and inspect."""

import io
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import polars as pl
import pytest

from common.contract import polars_schema
from common.errors import UserError
from common.files import file_digest
from common.runs import run_paths
from common.segments.advantages import with_advantage_error, with_advantages
from common.segments.files import ADVANTAGES, ADVANTAGES_TABLE, standard_error
from common.terminal.console import Terminal
from stage1_vstar.advantages.filter import filter_states
from stage1_vstar.advantages.rescore import rescore_advantages
from stage1_vstar.advantages.run import run_advantages
from stage2_train.config import Config
from tests.conftest import RunCli
from tests.stage2_runs import as_toml, tiny_config
from tests.step_tables import identity_of, segments, state, states_of, write_segments

# Four completions: two begin with (7,), one with (8, 9), one is (1,), which ends a wrong solution.
THREE = [((7,), 2, False, 0.75, 8), ((8, 9), 1, False, 0.5, 4), ((1,), 1, True, 0.0, 1)]


def with_critic(rows: list[dict[str, Any]], *values: list[float | None]) -> pl.DataFrame:
    column = pl.Series("critic_values", list(values), polars_schema(ADVANTAGES)["critic_values"])
    return segments(rows).with_columns(column)


def test_advantages_are_values_less_their_mean_over_all_completions() -> None:
    found = with_advantages(with_critic([state((5,), THREE)], [0.9, 0.1, None]), "monte_carlo")
    assert found["values"].to_list() == [[0.75, 0.5, 0.0]]
    mean = (2 * 0.75 + 0.5 + 0.0) / 4
    assert found["advantages"][0].to_list() == pytest.approx([0.75 - mean, 0.5 - mean, -mean])
    assert found["gap"].to_list() == pytest.approx([0.75])
    errors = [standard_error(6, 8), standard_error(2, 4), 0.0]
    assert found["standard_errors"][0].to_list() == pytest.approx(errors)


def test_a_step_that_ends_the_solution_is_worth_its_reward_whatever_the_critic_says() -> None:
    found = with_advantages(with_critic([state((5,), THREE)], [0.9, 0.1, 0.8]), "critic")
    assert found["values"].to_list() == [[0.9, 0.1, 0.0]]
    mean = (2 * 0.9 + 0.1) / 4
    assert found["advantages"][0].to_list() == pytest.approx([0.9 - mean, 0.1 - mean, -mean])
    assert found["values_from"].to_list() == ["critic"]


def test_states_are_told_apart() -> None:
    one, other = state((5,), THREE), state((6,), [((7,), 3, False, 1.0, 3), ((8,), 1, False, 0.0, 1)])
    together = with_advantages(with_critic([one, other], [None] * 3, [None] * 2), "monte_carlo")
    assert together["advantages"][1].to_list() == pytest.approx([0.25, -0.75])
    alone = with_advantages(with_critic([one], [None] * 3), "monte_carlo")
    assert together["advantages"][0].to_list() == alone["advantages"][0].to_list()


def test_the_error_of_an_advantage_is_that_of_a_difference_of_independent_values() -> None:
    found = with_advantage_error(with_advantages(with_critic([state((), THREE)], [None] * 3), "monte_carlo"))
    shares, errors = [0.5, 0.25, 0.25], found["standard_errors"][0].to_list()
    expected = max(
        sum(((i == j) - shares[j]) ** 2 * errors[j] ** 2 for j in range(3)) ** 0.5 for i in range(3)
    )
    assert found["advantage_error"].to_list() == pytest.approx([expected])


# The job.


class Critic:
    """A critic whose value of a state is a function of its last token."""

    def __init__(self) -> None:
        self.seen: list[tuple[int, ...]] = []

    def __call__(self, folder: Path, states: Iterable[Sequence[int]]) -> list[float]:
        assert folder.name == "critic"
        found = [tuple(each) for each in states]
        self.seen += found
        return [each[-1] % 10 / 10 for each in found]


@pytest.fixture
def config(tmp_path: Path, tiny_model: Path, artifacts: Path) -> Config:
    """A run with states of its prompts, and a folder for its critic."""
    config = tiny_config(tmp_path, tiny_model)
    paths = run_paths(config.run)
    paths.critic.mkdir(parents=True)
    (paths.critic / "config.json").write_text("{}")
    rows = states_of(config)
    write_segments(
        paths.segments, [*rows, {**state((1, 2, 3), ()), **terminal(rows[0])}], identity_of(config)
    )
    return config


def terminal(row: dict[str, Any]) -> dict[str, Any]:
    return {name: row[name] for name in ("prompt_id", "prompt", "answer", "prompt_token_hash")}


def changed(config: Config, **advantages: Any) -> Config:
    return config.model_copy(update={"advantages": config.advantages.model_copy(update=advantages)})


def run(config: Config, critic: Critic | None = None) -> str:
    printed = io.StringIO()
    run_advantages(config, Terminal(file=printed), critic or Critic())
    return printed.getvalue()


def test_the_job_asks_the_critic_for_the_states_that_steps_lead_to(config: Config) -> None:
    critic = Critic()
    said = run(config, critic)
    rows, provenance = ADVANTAGES_TABLE.read(run_paths(config.run).advantages)
    assert rows.height == 64
    assert "64 states with" in said
    steps = sum(not ends for row in rows["action_ends"] for ends in row)
    assert len(critic.seen) == steps
    for row in rows.iter_rows(named=True):
        for tokens, ends, value, of_critic, own in zip(
            *(
                row[name]
                for name in ("action_token_ids", "action_ends", "values", "critic_values", "action_values")
            ),
            strict=True,
        ):
            assert value == (own if ends else tokens[-1] % 10 / 10)
            assert of_critic == (None if ends else value)
    first = rows.row(0, named=True)
    assert critic.seen[0][-len(first["action_token_ids"][1]) :] == tuple(first["action_token_ids"][1])
    assert provenance.identity == identity_of(config)
    assert set(rows["dropped_by"].drop_nulls()) <= {"gap < 0.1"}
    assert (rows["keep"] == (rows["gap"] >= 0.1)).all()


def test_other_settings_need_no_model_as_long_as_segments_and_critic_are_the_same(config: Config) -> None:
    critic, paths = Critic(), run_paths(config.run)
    run(config, critic)
    asked = len(critic.seen)
    assert "nothing to do" in run(config, critic)
    before = ADVANTAGES_TABLE.read(paths.advantages)[0]
    for values, min_gap in (("monte_carlo", 0.3), ("critic", 0.0), ("critic", 0.1)):
        run(changed(config, values=values, min_gap=min_gap), critic)
        rows, provenance = ADVANTAGES_TABLE.read(paths.advantages)
        assert set(rows["values_from"]) == {values}
        assert (rows["keep"] == (rows["gap"] >= min_gap)).all()
        assert provenance.context["min_gap"] == min_gap
    assert rows.equals(before)
    assert len(critic.seen) == asked
    (paths.critic / "config.json").write_text('{"another": 1}')
    run(config, critic)
    assert len(critic.seen) == 2 * asked


def test_monte_carlo_values_need_no_critic(config: Config) -> None:
    critic = Critic()
    (run_paths(config.run).critic / "config.json").unlink()
    run_paths(config.run).critic.rmdir()
    with pytest.raises(UserError, match=r"there is no critic in .*; train it with `python cli.py critic`"):
        run(config, critic)
    run(changed(config, values="monte_carlo"), critic)
    assert critic.seen == []
    rows, _ = ADVANTAGES_TABLE.read(run_paths(config.run).advantages)
    assert rows["critic_values"].null_count() == rows.height
    assert rows["values"].equals(rows["action_values"].alias("values"))


def test_a_table_of_which_nothing_is_kept_is_an_error_that_keeps_the_critics_values(config: Config) -> None:
    critic = Critic()
    with pytest.raises(UserError, match=r"no state is left to train on; lower advantages.min_gap \(2\)"):
        run(changed(config, min_gap=2.0), critic)
    asked = len(critic.seen)
    run(config, critic)
    assert len(critic.seen) == asked


def test_a_critic_of_other_states_is_used_with_a_warning(config: Config) -> None:
    record = run_paths(config.run).critic / "astar_po.json"
    record.write_text(json.dumps({"trained_with": {"segments": file_digest(run_paths(config.run).segments)}}))
    assert "warning" not in run(config)
    record.write_text(json.dumps({"trained_with": {"segments": "others"}}))
    assert "was trained on another table of states" in run(config)


def test_states_of_other_prompts_are_refused_before_the_critic_is_asked(config: Config) -> None:
    other = config.model_copy(
        update={"data": config.data.model_copy(update={"template": "{prompt} Answer:"})}
    )
    critic = Critic()
    with pytest.raises(UserError, match="is rendered to other token ids than those of the states"):
        run(other, critic)
    assert critic.seen == []
    assert not run_paths(config.run).advantages.exists()


def test_a_run_without_states_is_told_how_to_make_them(config: Config) -> None:
    run_paths(config.run).segments.unlink()
    with pytest.raises(
        UserError, match=r"there is no .*segments.parquet; make it with `python cli.py segments`"
    ):
        run(config)


# Without a model.


def test_rescore_changes_the_values_and_says_what_it_did(config: Config) -> None:
    run(config)
    table = run_paths(config.run).advantages
    before = ADVANTAGES_TABLE.read(table)[0]
    filter_states(table, None, where=["step = 0"])
    line = rescore_advantages(table, table, "monte_carlo", 0.25)
    assert "values critic → monte_carlo, smallest gap 0.1 → 0.25" in line
    assert (
        "the rules of the last filter (one next step, gap < 0.1, not where step = 0) no longer apply" in line
    )
    rescore_advantages(table, table, "critic", 0.1)
    assert ADVANTAGES_TABLE.read(table)[0].equals(before)
    with pytest.raises(UserError, match=r"nothing was changed\. Choose a smaller --min-gap"):
        rescore_advantages(table, table, None, 5.0)
    with pytest.raises(UserError, match="there are no values of magic; choose one of critic, monte_carlo"):
        rescore_advantages(table, table, "magic")
    assert ADVANTAGES_TABLE.read(table)[0].equals(before)


def test_rescore_to_a_critic_that_was_never_asked_is_refused(config: Config) -> None:
    run(changed(config, values="monte_carlo"))
    table = run_paths(config.run).advantages
    with pytest.raises(
        UserError, match=r"has no values of a critic; add them with `python cli.py advantages`"
    ):
        rescore_advantages(table, table, "critic")


def test_filter_drops_states_by_gap_error_and_condition(config: Config, tmp_path: Path) -> None:
    run(config)
    table, chosen = run_paths(config.run).advantages, tmp_path / "chosen.parquet"
    rows = with_advantage_error(ADVANTAGES_TABLE.read(table)[0])
    limit = rows.select(pl.col("advantage_error").median()).item()
    filtered = filter_states(table, chosen, min_gap=0.3, max_error=limit, where=["step > 0"])
    expected = rows.filter(
        (pl.col("gap") >= 0.3) & (pl.col("advantage_error") <= limit) & (pl.col("step") > 0)
    )
    found, provenance = ADVANTAGES_TABLE.read(chosen)
    assert 0 < found.height < rows.height
    assert found["state_id"].to_list() == expected["state_id"].to_list()
    assert filtered.document()["states"] == rows.height
    assert provenance.context["filters"][1] == "gap < 0.3"
    with pytest.raises(UserError, match="write a condition on the states to keep"):
        filter_states(table, None, where=["max(gap) > 0"])


def test_the_commands_find_the_runs_only_table(config: Config, run_cli: RunCli, tmp_path: Path) -> None:
    run(config)
    finished = run_cli("filter", "--run", config.run, "--where", "gap >= 0.2", "--json")
    assert finished.returncode == 0, finished.stderr
    assert json.loads(finished.stdout)["states"] == 64
    finished = run_cli("rescore", "--run", config.run, "--values", "monte_carlo")
    assert "values critic → monte_carlo" in finished.stdout, finished.stderr
    finished = run_cli("inspect", "--run", config.run)
    assert "64 of 32 prompts" in finished.stdout, finished.stderr
    finished = run_cli("filter", "--run", config.run, "--min-gap", "0.2", "--drop-solved")
    assert finished.returncode == 2
    assert "--min-gap is for a table of advantages and --drop-solved for V̂*" in finished.stderr
    finished = run_cli("rescore", "--run", "another")
    assert "give --beta1" in finished.stderr
    (tmp_path / "run.toml").write_text(as_toml(changed(config, values="monte_carlo", min_gap=0.3)))
    finished = run_cli("advantages", "--config", tmp_path / "run.toml")
    assert "smallest gap 0.1 → 0.3" in finished.stdout, finished.stderr
