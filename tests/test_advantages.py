"""advantages.parquet: values, advantages and rules against examples by hand; the job, rescore, filter and inspect."""

import io
import json
import shutil
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import polars as pl
import pytest

from common import contract
from common.contract import polars_schema
from common.errors import UserError
from common.files import file_digest
from common.provenance import Provenance
from common.runs import exclusive_run, run_paths
from common.segments.advantages import dropped_by, with_advantage_error, with_advantages
from common.segments.files import ADVANTAGES, ADVANTAGES_TABLE, standard_error
from common.terminal import progress
from common.terminal.console import Terminal
from stage1_vstar.advantages import values as kept_values
from stage1_vstar.advantages.filter import filter_states
from stage1_vstar.advantages.rescore import rescore_advantages
from stage1_vstar.advantages.run import run_advantages
from stage1_vstar.advantages.values import Score
from stage1_vstar.table import with_dropped
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


def test_a_gap_that_only_rounding_makes_smaller_is_not_below(config: Config, tmp_path: Path) -> None:
    table = tmp_path / "advantages.parquet"
    actions = [((7,), 1, False, 0.5, 4), ((8,), 1, False, 0.6, 4)]
    found = with_advantages(with_critic([state((5,), actions)], [None] * 2), "monte_carlo")
    assert found["gap"].item() < 0.1
    assert found.select(dropped_by(0.1)).item() is None
    assert found.select(dropped_by(0.1001)).item() == "gap < 0.1001"
    rows = with_dropped(found, dropped_by(0.1)).select(ADVANTAGES.names)
    context = {"values": "monte_carlo", "min_gap": 0.1}
    ADVANTAGES_TABLE.write(rows, Provenance(identity={}, context=context), table)
    assert filter_states(table, None, min_gap=0.1).kept == 1
    assert "kept 1 → 1" in rescore_advantages(table, table, None, 0.1)


# The job.


class Critic:
    """A critic whose value of a state is a function of its last token; it can die after some calls."""

    def __init__(self, calls: int = 1000) -> None:
        self.seen: list[tuple[int, ...]] = []
        self.loads = 0
        self._calls = calls

    def load(self, folder: Path) -> Score:
        assert folder.name == "critic"
        self.loads += 1
        return self.values

    def values(self, states: Iterable[Sequence[int]]) -> list[float]:
        self._calls -= 1
        if self._calls < 0:
            raise KeyboardInterrupt
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
    (paths.critic / "astar_po.json").write_text('{"trained_with": {}}')
    rows = states_of(config)
    write_segments(
        paths.segments, [*rows, {**state((1, 2, 3), ()), **terminal(rows[0])}], identity_of(config)
    )
    return config


def terminal(row: dict[str, Any]) -> dict[str, Any]:
    return {name: row[name] for name in ("prompt_id", "prompt", "answer", "prompt_token_hash")}


def changed(config: Config, **advantages: Any) -> Config:
    return config.model_copy(update={"advantages": config.advantages.model_copy(update=advantages)})


def run(config: Config, critic: Critic | None = None, allow_mismatch: Sequence[str] = ()) -> str:
    printed = io.StringIO()
    load = (critic or Critic()).load
    run_advantages(config, Terminal(file=printed, width=200), load, allow_mismatch=allow_mismatch)
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
    assert (rows["keep"] == (rows["gap"] >= 0.1 - 1e-9)).all()


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
        assert (rows["keep"] == (rows["gap"] >= min_gap - 1e-9)).all()
        assert provenance.context["min_gap"] == min_gap
    assert rows.equals(before)
    assert len(critic.seen) == asked
    bfloat16 = config.model_copy(update={"model": config.model.model_copy(update={"dtype": "bfloat16"})})
    run(bfloat16, critic)
    assert len(critic.seen) == 2 * asked
    assert "nothing to do" in run(bfloat16, critic)
    (paths.critic / "config.json").write_text('{"another": 1}')
    run(bfloat16, critic)
    assert len(critic.seen) == 3 * asked


def test_monte_carlo_values_need_no_critic(config: Config) -> None:
    critic = Critic()
    shutil.rmtree(run_paths(config.run).critic)
    with pytest.raises(UserError, match=r"no critic .*; train it with `python cli.py critic`, or take"):
        run(config, critic)
    run(changed(config, values="monte_carlo"), critic)
    assert critic.seen == []
    rows, _ = ADVANTAGES_TABLE.read(run_paths(config.run).advantages)
    assert rows["critic_values"].null_count() == rows.height
    assert rows["values"].equals(rows["action_values"].alias("values"))


def test_if_nothing_is_kept_there_is_no_table_each_time_and_the_critic_is_not_asked_again(
    config: Config,
) -> None:
    critic, paths = Critic(), run_paths(config.run)
    for _ in range(2):
        with pytest.raises(
            UserError, match=r"left to train on .*; lower advantages.min_gap \(2\), which needs no"
        ):
            run(changed(config, min_gap=2.0), critic)
        assert not paths.advantages.exists()
    asked = len(critic.seen)
    run(config, critic)
    assert len(critic.seen) == asked
    assert critic.loads == 1
    assert not paths.critic_values.exists()
    before = paths.advantages.read_bytes()
    for _ in range(2):
        with pytest.raises(UserError, match=r"nothing was changed\. Choose a smaller advantages.min_gap"):
            run(changed(config, min_gap=2.0), critic)
    assert paths.advantages.read_bytes() == before


def test_make_train_ends_with_the_error_of_advantages(
    config: Config, run_cli: RunCli, tmp_path: Path
) -> None:
    document = changed(config, min_gap=2.0, values="monte_carlo").model_dump(mode="json", exclude_none=True)
    document["train"]["objective"] = {"name": "direct_advantage"}
    (tmp_path / "run.toml").write_text(as_toml(Config.model_validate(document)))
    finished = run_cli("advantages", "--config", tmp_path / "run.toml")
    assert finished.returncode == 2
    assert "no state is left to train on" in finished.stderr
    # As the Makefile asks which steps come first.
    missing = run_cli("needs-stage1", "--missing", "--config", tmp_path / "run.toml")
    assert missing.stdout == "segments advantages\n"


def test_a_killed_job_asks_the_critic_only_for_the_parts_that_are_missing(
    config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kept_values, "STATES_A_PART", 10)
    killed, critic, whole = Critic(calls=3), Critic(), Critic()
    with pytest.raises(KeyboardInterrupt):
        run(config, killed)
    assert len(killed.seen) == 30
    run(config, critic)
    continued = ADVANTAGES_TABLE.read(run_paths(config.run).advantages)[0]
    assert critic.loads == 1
    assert not run_paths(config.run).critic_values.exists()
    run_paths(config.run).advantages.unlink()
    run(config, whole)
    assert killed.seen + critic.seen == whole.seen
    assert continued.equals(ADVANTAGES_TABLE.read(run_paths(config.run).advantages)[0])


def test_values_of_another_critic_or_number_format_are_not_taken(config: Config) -> None:
    critic, paths = Critic(), run_paths(config.run)
    nothing = changed(config, min_gap=2.0)
    bfloat16 = nothing.model_copy(update={"model": nothing.model.model_copy(update={"dtype": "bfloat16"})})
    for number, other in enumerate((nothing, bfloat16, nothing), start=1):
        with pytest.raises(UserError, match="no state is left"):
            run(other, critic)
        assert critic.loads == min(number, 2)
    (paths.critic / "config.json").write_text('{"another": 1}')
    run(config, critic)
    assert critic.loads == 3


def test_the_job_says_how_many_states_the_critic_has_valued(
    config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kept_values, "STATES_A_PART", 10)
    monkeypatch.setattr(contract, "BATCH_ROWS", 40)
    monkeypatch.setattr(progress, "LOG_SECONDS", -1.0)
    critic = Critic()
    said = run(config, critic)
    total = len(critic.seen)
    assert f"the critic's values of 10/{total} states, " in said
    assert f"the critic's values of {total}/{total} states, 0 s left" in said


def test_the_critic_is_loaded_once_for_all_parts_of_the_table(
    config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(contract, "BATCH_ROWS", 7)
    critic = Critic()
    run(config, critic)
    assert critic.loads == 1
    assert ADVANTAGES_TABLE.read(run_paths(config.run).advantages)[0].height == 64


def test_states_beyond_the_critics_context_are_refused_before_it_loads(config: Config) -> None:
    paths, critic = run_paths(config.run), Critic()
    (paths.critic / "config.json").write_text('{"max_position_embeddings": 12}')
    with pytest.raises(UserError, match=r"has \d+ tokens with its prompt, more than the context of 12 of"):
        run(config, critic)
    assert critic.loads == 0
    run(changed(config, values="monte_carlo"), critic)


def test_a_critic_of_other_states_is_used_with_a_warning(config: Config) -> None:
    record = run_paths(config.run).critic / "astar_po.json"
    record.write_text(json.dumps({"trained_with": {"segments": file_digest(run_paths(config.run).segments)}}))
    assert "warning" not in run(config)
    run_paths(config.run).advantages.unlink()
    record.write_text(json.dumps({"trained_with": {"segments": "others"}}))
    assert "was trained on another table of states" in run(config)


def test_states_of_another_origin_are_refused_before_the_critic_loads_or_accepted_by_name(
    config: Config,
) -> None:
    data = config.data.model_copy(update={"template": "{prompt} Answer:"})
    other = config.model_copy(update={"data": data})
    critic, paths = Critic(), run_paths(config.run)
    with pytest.raises(UserError, match=r"does not belong to this run: prompt.template is"):
        run(other, critic)
    with pytest.raises(UserError, match=r"prompt.tokens differ for 32 prompts"):
        run(other, critic, ["prompt.template"])
    assert critic.loads == 0
    assert not paths.advantages.exists()
    run(other, critic, ["prompt.template", "prompt.tokens"])
    accepted = ADVANTAGES_TABLE.provenance(paths.advantages).context["accepted_mismatches"]
    assert [line.split()[0] for line in accepted] == ["prompt.template", "prompt.tokens"]
    assert "nothing to do" in run(other, critic), "what was accepted stays accepted"


def test_a_finished_table_of_another_origin_is_refused_too(config: Config) -> None:
    run(config)
    before = run_paths(config.run).advantages.read_bytes()
    data = config.data.model_copy(update={"template": "{prompt} Answer:"})
    other = config.model_copy(update={"data": data})
    for again in (other, changed(other, min_gap=0.3)):
        with pytest.raises(UserError, match=r"does not belong to this run: prompt.template is"):
            run(again)
    with pytest.raises(UserError, match=r"--allow-mismatch nonsense: there is no such field"):
        run(config, allow_mismatch=["nonsense"])
    assert run_paths(config.run).advantages.read_bytes() == before


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


@pytest.mark.parametrize("change", [filter_states, rescore_advantages])
def test_a_table_of_states_is_no_table_of_advantages(config: Config, tmp_path: Path, change: Any) -> None:
    with pytest.raises(
        UserError, match=r"segments\.parquet lacks the columns values_from, .*cli\.py advantages"
    ):
        change(run_paths(config.run).segments, tmp_path / "other.parquet")
    assert not (tmp_path / "other.parquet").exists()


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
        (pl.col("gap") >= 0.3 - 1e-9) & (pl.col("advantage_error") <= limit) & (pl.col("step") > 0)
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
    with exclusive_run(run_paths(config.run), "advantages"):
        states = run_paths(config.run).segments.rename(tmp_path / "states.parquet")
        finished = run_cli("filter", "--run", config.run, "--min-gap", "0.2")
        assert finished.returncode == 2
        assert "another" in finished.stderr
        states.rename(run_paths(config.run).segments)
    assert "there is no run another" in run_cli("rescore", "--run", "another").stderr
    run_paths("another").root.mkdir()
    assert "give --beta1" in run_cli("rescore", "--run", "another").stderr
    (tmp_path / "run.toml").write_text(as_toml(changed(config, values="monte_carlo", min_gap=0.3)))
    finished = run_cli("advantages", "--config", tmp_path / "run.toml")
    assert "smallest gap 0.1 → 0.3" in finished.stdout, finished.stderr
