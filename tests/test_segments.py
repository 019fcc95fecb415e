"""`segments`: the choice of solutions, states, their completions and the table; restarts; bad input."""

import gc
import io
import json
import re
from array import array
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import polars as pl
import pytest

from benchmarks.tiny_model import save_tiny_model
from common.engines import LOCAL
from common.errors import UserError
from common.provenance import ACCEPTED, Provenance, read_provenance
from common.rollout import Prompt
from common.runs import run_paths
from common.segments.files import SEGMENTS_TABLE, standard_error
from common.segments.split import StepCutter
from common.store import SampleStore, sample_files
from common.terminal.console import Terminal
from stage1_vstar.merge import merge_runs
from stage1_vstar.regrade import run_regrade
from stage1_vstar.run import run_stage1
from stage1_vstar.segments.rows import rows_of
from stage1_vstar.segments.run import States, run_segments
from stage1_vstar.segments.states import Sample, choose, states_of
from stage2_train.config import Config
from tests.conftest import RunCli
from tests.fakes import SteppingEngines, tiny_config
from tests.stage1_runs import write_questions

END = 0


def decode(token_ids: Sequence[int]) -> str:
    """Tokens are characters; END has no text."""
    return "".join(chr(token) for token in token_ids if token != END)


CUTTER = StepCutter([";"], decode)
PROMPT = Prompt(id="p", text="q", answer="1", token_ids=array("i", [5, 6]), token_hash="h")


def sample(text: str, index: int = 0, *, reward: float = 0.0, outcome: str | None = None) -> Sample:
    """A completion that ends with END; correct if its reward is 1."""
    outcome = outcome or ("correct" if reward == 1 else "wrong")
    ends = () if outcome == "truncated" else (END,)
    return Sample(index=index, token_ids=array("i", [*map(ord, text), *ends]), outcome=outcome, reward=reward)


def chosen(samples: Sequence[Sample], count: int) -> list[int]:
    return [each.index for each in choose(samples, count)]


def test_as_many_correct_as_wrong_solutions_are_chosen_the_first_of_each() -> None:
    samples = [sample(str(index), index, reward=float(index % 4 == 0)) for index in range(20)]
    assert chosen(samples, 6) == [0, 1, 2, 3, 4, 8]
    assert chosen(samples, 5) == [0, 1, 2, 4, 8]


def test_if_one_kind_has_too_few_the_other_fills_up() -> None:
    samples = [sample(str(index), index, reward=float(index == 7)) for index in range(20)]
    assert chosen(samples, 6) == [0, 1, 2, 3, 4, 7]
    assert chosen(samples[8:], 3) == [8, 9, 10]
    assert chosen(samples[:2], 6) == [0, 1]
    assert chosen([], 6) == []


def test_solutions_are_chosen_once_and_cut_off_ones_last() -> None:
    samples = [
        sample("a", 0, outcome="truncated"),
        sample("b", 1, outcome="verifier_crash"),
        sample("c", 2),
        sample("c", 3),
        sample("d", 4, reward=1.0),
        sample("e", 5),
    ]
    assert chosen(samples, 3) == [2, 4, 5]
    assert chosen(samples, 6) == [0, 2, 4, 5]


def test_a_state_that_solutions_share_is_there_once() -> None:
    solutions = [sample("a;b;c", 0), sample("a;b;d", 1), sample("x", 2)]
    states = states_of(PROMPT, solutions, CUTTER)
    found = [
        (decode(state.prefix), state.step, [each.index for each in state.solutions], state.is_terminal)
        for state in states
    ]
    assert found == [
        ("", 0, [0, 1, 2], False),
        ("a;", 1, [0, 1], False),
        ("x", 1, [2], True),
        ("a;b;", 2, [0, 1], False),
        ("a;b;c", 3, [0], True),
        ("a;b;d", 3, [1], True),
    ]
    assert len({state.id for state in states}) == 6
    assert states[1].as_prompt().prefix == array("i", map(ord, "a;"))


def test_a_solution_that_ends_with_a_separator_has_a_state_from_which_it_only_ends() -> None:
    states = states_of(PROMPT, [sample("a;b;"), sample("a;b;", outcome="truncated", index=1)], CUTTER)
    assert [(decode(state.prefix), state.is_terminal) for state in states] == [
        *(("", False), ("a;", False), ("a;b;", True), ("a;b;", True)),
    ]
    assert [state.prefix[-1] for state in states[2:]] == [ord(";"), END]


def rows(completions: dict[str, list[Sample]], solutions: Sequence[Sample]) -> dict[str, dict[str, Any]]:
    """The rows by prefix; `completions` by prefix, too."""
    states = states_of(PROMPT, solutions, CUTTER)
    ids = {decode(state.prefix): state.id for state in states if not state.is_terminal}
    found = rows_of(states, {ids[prefix]: each for prefix, each in completions.items()}, CUTTER, decode)
    return {row["prefix"]: row for row in found}


def test_a_value_is_the_mean_reward_and_an_action_has_its_next_states_completions_too() -> None:
    found = rows(
        {
            "": [
                sample("a;1", reward=1.0),
                sample("b;2", reward=0.0),
                sample("a;3", reward=0.0),
                sample("4", reward=1.0),
                sample("zz", reward=0.0, outcome="verifier_timeout"),
            ],
            "a;": [sample("a;1", reward=1.0), sample("a;1", reward=1.0), sample("a;5", reward=0.0)],
        },
        [sample("a;1", 0, reward=1.0), sample("b;2", 1)],
    )
    first = found[""]
    assert (first["num_completions"], first["value"]) == (5, 0.5)
    assert first["value_se"] == pytest.approx(standard_error(2.0, 4))
    assert first["action_texts"] == ["a;", "b;", "4"]
    assert first["action_counts"] == [2, 1, 1]
    assert first["action_ends"] == [False, False, True]
    assert first["action_samples"] == [2 + 3, 1, 1]
    assert first["action_values"] == pytest.approx([3 / 5, 0.0, 1.0])
    second = found["a;"]
    assert (second["action_texts"], second["action_counts"]) == (["1", "5"], [2, 1])
    assert second["action_token_ids"] == [[ord("1"), END], [ord("5"), END]]
    assert second["value"] == pytest.approx(2 / 3)
    whole = found["a;1"]
    assert (whole["is_terminal"], whole["value"], whole["value_se"], whole["action_texts"]) == (
        *(True, 1.0, 0.0, []),
    )
    assert "b;" not in found, "nothing was drawn from it"
    SEGMENTS_TABLE.validate(pl.DataFrame(list(found.values()), schema=pl.Schema(_schema())), Path("x"))


def _schema() -> pl.Schema:
    from common.contract import polars_schema

    return polars_schema(SEGMENTS_TABLE.schema)


# Whole jobs


@pytest.fixture
def settings(tiny_model: Path, tmp_path: Path, artifacts: Path) -> Callable[..., Config]:
    """A config of the tiny model; values of [segments], and of other sections by name."""
    data = write_questions(tmp_path / "data.jsonl")

    def make(sections: dict[str, Any] | None = None, **values: Any) -> Config:
        chosen = {"solutions": 8, "chosen": 4, "completions": 4, "split": [" "], **values}
        return tiny_config(tiny_model, data, segments=chosen, **(sections or {}))

    return make


def run(config: Config, **options: Any) -> tuple[str, list[tuple[str, int, int]]]:
    """The job's output, and what was drawn."""
    printed, engines = io.StringIO(), SteppingEngines()
    run_segments(config, Terminal(file=printed, width=200), engines=LOCAL.built_by(engines.build), **options)
    return printed.getvalue(), [each for engine in engines.built for each in engine.drawn]


def table(name: str = "test") -> pl.DataFrame:
    return SEGMENTS_TABLE.read(run_paths(name).segments)[0]


def test_the_table_is_made_of_solutions_and_completions_that_are_kept(
    settings: Callable[..., Config],
) -> None:
    output, drawn = run(settings())
    rows = table()
    assert len([key for key in drawn if key[2] == 0]) == 6 * 8, "solutions also complete the prompt itself"
    completed = rows.filter(~pl.col("is_terminal") & (pl.col("step") > 0))
    assert len([key for key in drawn if key[2]]) == 4 * completed.height
    assert rows.filter(pl.col("step") == 0)["num_completions"].to_list() == [4] * 6
    assert set(completed["num_completions"]) == {4}
    assert all(prefix.endswith(" ") for prefix in completed["prefix"])
    assert "next steps each" in output
    assert rows["prompt_id"].n_unique() == 6
    again, drawn = run(settings())
    assert drawn == []
    assert "nothing to do" in again
    assert table().equals(rows)


def test_what_is_graded_is_the_prefix_with_its_completion(settings: Callable[..., Config]) -> None:
    """The last step alone has no `####`, which the GSM8K rule asks for, where the state is `0 1 #### `."""
    run(settings({"sampling": {"max_completion_tokens": 12}}, split=[" "]))
    rows = table().filter(pl.col("prefix").str.contains("####") & ~pl.col("is_terminal"))
    assert rows.height
    assert {outcome for outcomes in rows["outcomes"] for outcome in outcomes} == {"correct", "wrong"}
    paths = run_paths("test")
    (fragment, *_) = sorted(paths.continuations.glob("part-*.parquet"))
    stored = pl.read_parquet(fragment)
    assert stored["completion"].str.contains("####").all()


def test_more_completions_draw_the_missing_ones_only(settings: Callable[..., Config]) -> None:
    run(settings())
    states = table().filter(~pl.col("is_terminal") & (pl.col("step") > 0)).height
    _, drawn = run(settings(completions=6))
    assert len(drawn) == 2 * states
    assert {index for _, index, _ in drawn} == {4, 5}
    _, drawn = run(settings())
    assert drawn == []
    assert set(table().filter(pl.col("step") > 0, ~pl.col("is_terminal"))["num_completions"]) == {4}


def test_other_choices_use_what_is_there(settings: Callable[..., Config]) -> None:
    run(settings(chosen=2))
    before = set(table()["state_id"])
    _, drawn = run(settings(chosen=4))
    assert before <= set(table()["state_id"])
    assert {name for name, _, _ in drawn}.isdisjoint(before)


def test_memory_holds_some_prompts_at_a_time_in_four_bytes_per_token(
    settings: Callable[..., Config], monkeypatch: pytest.MonkeyPatch
) -> None:
    run(settings())
    whole = table()
    held: list[int] = []
    read = States._of

    def counted(states: States, prompts: Sequence[Prompt]) -> Any:
        held.append(sum(type(each) is Sample for each in gc.get_objects()))
        part = read(states, prompts)
        assert len(part) == 2
        assert all(each.token_ids.itemsize == 4 for of_prompt in part for each in of_prompt.solutions)
        return part

    monkeypatch.setattr("stage1_vstar.segments.run.PROMPTS_AT_A_TIME", 2)
    monkeypatch.setattr(States, "_of", counted)
    run_paths("test").segments.unlink()
    _, drawn = run(settings())
    assert drawn == []
    assert table().equals(whole)
    assert len(held) == 2 * 3
    assert set(held) == {0}, "a part is let go of before the next one is read"


def test_another_model_completes_from_the_prompt_too(settings: Callable[..., Config], tmp_path: Path) -> None:
    other = tmp_path / "other"
    save_tiny_model(other, seed=1)
    _, drawn = run(settings(completer=str(other)))
    prompts = set(table()["prompt_id"])
    assert len([key for key in drawn if key[0] in prompts]) == 6 * 8
    first_states = table().filter(pl.col("step") == 0)
    assert len([key for key in drawn if key[0] in set(first_states["state_id"])]) == 6 * 4
    identity = SEGMENTS_TABLE.read(run_paths("test").segments)[1].identity
    assert identity["segments"]["completer"] != identity["model"]


def test_a_completer_with_another_tokenizer_is_refused(
    settings: Callable[..., Config], tmp_path: Path
) -> None:
    other = tmp_path / "other"
    save_tiny_model(other, seed=1)
    document = json.loads((other / "tokenizer.json").read_text())
    vocabulary = document["model"]["vocab"]
    first, second, *_ = [token for token in vocabulary if token.isdigit()]
    vocabulary[first], vocabulary[second] = vocabulary[second], vocabulary[first]
    (other / "tokenizer.json").write_text(json.dumps(document))
    with pytest.raises(UserError, match=r"segments\.completer .* has another tokenizer"):
        run(settings(completer=str(other)))
    assert not run_paths("test").samples.exists()


def test_a_completer_is_checked_like_the_reference_before_anything_is_drawn(
    settings: Callable[..., Config], tmp_path: Path
) -> None:
    short, damaged = tmp_path / "short", tmp_path / "damaged"
    save_tiny_model(short, seed=1, context=16)
    save_tiny_model(damaged, seed=1)
    (damaged / "model.safetensors").write_bytes(b"cut off")
    for folder, message in (
        (short, r"the longest prompt of \[data\].*context of 16"),
        (damaged, "safetensors"),
    ):
        with pytest.raises(UserError, match=rf"^segments\.completer: .*{message}"):
            run(settings(completer=str(folder)))
    assert not run_paths("test").samples.exists()


def test_a_completer_may_be_in_the_folder_of_the_run(settings: Callable[..., Config]) -> None:
    save_tiny_model(run_paths("test").root / "other", seed=1)
    run(settings(completer="{run}/other"))
    assert table().filter(pl.col("step") == 0)["num_completions"].to_list() == [4] * 6


@pytest.mark.parametrize("rows", [4, 8])
def test_a_table_of_other_prompts_is_written_again_though_nothing_is_missing(
    settings: Callable[..., Config], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rows: int
) -> None:
    """Fewer prompts; or more, after a kill between their last sample and the write."""
    config = settings()
    run(config)
    write_questions(tmp_path / "data.jsonl", rows)
    with monkeypatch.context() as killed:
        killed.setattr("stage1_vstar.segments.run._write", lambda *_: None)
        run(config)
    output, drawn = run(config)
    assert drawn == []
    assert "nothing to do" not in output
    assert table()["prompt_id"].n_unique() == rows
    assert "nothing to do" in run(config)[0]


def test_a_damaged_table_is_written_again(settings: Callable[..., Config]) -> None:
    run(settings())
    whole = table()
    run_paths("test").segments.write_bytes(b"PAR1 and then")
    output, drawn = run(settings())
    assert drawn == []
    assert "is not a readable Parquet file" in output
    assert table().equals(whole)


def test_an_imported_table_is_not_replaced(settings: Callable[..., Config]) -> None:
    path = run_paths("test").segments
    run(settings())
    rows, provenance = SEGMENTS_TABLE.read(path)
    origin = {"imported": "labels.jsonl", "sha256": "0" * 64, "separators": ["\n"]}
    imported = Provenance(identity={**provenance.identity, "segments": origin}, context={})
    SEGMENTS_TABLE.write(rows, imported, path)
    before = path.read_bytes()
    with pytest.raises(
        UserError, match=r"was imported \(from labels\.jsonl\); choose another --run, or remove"
    ):
        run(settings(completions=6))
    assert path.read_bytes() == before


def rewrite_samples(folder: Path, **values: Any) -> None:
    """Put these values into every stored sample."""
    for file in sample_files(folder):
        provenance, rows = read_provenance(file), pl.read_parquet(file).to_dicts()
        file.unlink()
        SampleStore(folder, provenance).append([{**row, **values} for row in rows])


def test_an_accepted_difference_of_prompts_is_recorded_in_new_samples_and_in_the_table(
    settings: Callable[..., Config],
) -> None:
    run(settings())
    paths = run_paths("test")
    stores = (paths.samples, paths.continuations)
    for folder in stores:
        rewrite_samples(folder, prompt_token_hash="other")
    with pytest.raises(UserError, match=r"prompt\.tokens differ for 6 prompts"):
        run(settings(solutions=9, completions=5))
    old = {file for folder in stores for file in sample_files(folder)}
    run(settings(solutions=9, completions=5), allow_mismatch=["prompt.tokens"])
    new = {file for folder in stores for file in sample_files(folder)} - old
    assert {file.parent for file in new} == set(stores)
    for file in (*new, paths.segments):
        of_prompts, *of_states = read_provenance(file).context[ACCEPTED]
        assert of_prompts.startswith("prompt.tokens differ for 6 prompts"), file
        assert len(of_states) == (file.parent != paths.samples)


def test_an_accepted_difference_stays_accepted(settings: Callable[..., Config]) -> None:
    run(settings())
    with pytest.raises(UserError, match="seed is 0 there and 1 here"):
        run(settings({"seed": 1}))
    run(settings({"seed": 1}), allow_mismatch=["seed"])
    assert "nothing to do" in run(settings({"seed": 1}))[0]


def test_what_is_drawn_and_counted_are_states_in_parts(
    settings: Callable[..., Config], monkeypatch: pytest.MonkeyPatch
) -> None:
    output, _ = run(settings())
    states = table().filter(~pl.col("is_terminal") & (pl.col("step") > 0)).height
    assert "6/6 prompts, 48/48 samples" in output
    assert f"{states}/{states} states, {4 * states}/{4 * states} samples" in output
    monkeypatch.setattr("stage1_vstar.segments.run.PROMPTS_AT_A_TIME", 4)
    output, _ = run(settings(completions=5))
    found = [int(each) for each in re.findall(r"(\d+)/\1 states \(part [12] of 2\), \1/\1 samples", output)]
    assert len(found) == 2
    assert sum(found) == states
    assert f"{found[0]} states (part 1 of 2): {found[0]} samples to draw; loading the model" in output


def test_one_sided_prompts_are_counted_over_all_drawn_solutions(settings: Callable[..., Config]) -> None:
    output, _ = run(settings(chosen=1))
    drawn = pl.concat(map(pl.read_parquet, sample_files(run_paths("test").samples)))
    one_sided = drawn.group_by("prompt_id").agg(pl.col("outcome").n_unique() == 1)["outcome"].sum()
    said = re.search(r"(\d) of 6 prompts have only correct or only wrong solutions", output)
    assert (int(said[1]) if said else 0) == one_sided < 6


def test_a_split_that_cuts_nothing_is_said(settings: Callable[..., Config]) -> None:
    output, _ = run(settings(split="line"))
    solutions = table()["is_terminal"].sum()
    assert (
        f"{solutions} of {solutions} chosen solutions are of one step: segments.split cuts nothing" in output
    )


def test_samples_without_tokens_are_refused(settings: Callable[..., Config], tmp_path: Path) -> None:
    config = settings({"vstar": {"num_samples": 8}})
    run_stage1(
        config, Terminal(file=io.StringIO()), check=False, engines=LOCAL.built_by(SteppingEngines().build)
    )
    before = sample_files(run_paths("test").samples)
    with pytest.raises(UserError, match=r"samples without their tokens, which `vstar` does not keep"):
        run(settings(solutions=9))
    assert sample_files(run_paths("test").samples) == before, "it is found before anything is drawn"
    assert not run_paths("test").segments.exists()
    (tmp_path / "data.jsonl").write_text(json.dumps({"prompt": "Another question?", "answer": "1"}))
    run(settings(solutions=9))
    assert table()["prompt"].unique().to_list() == ["Another question?"]


def test_stored_rewards_outside_of_0_and_1_are_found_before_anything_is_drawn(
    settings: Callable[..., Config],
) -> None:
    run(settings())
    samples = run_paths("test").samples
    rewrite_samples(samples, reward=-1.0)
    before = sample_files(samples)
    with pytest.raises(UserError, match=r"rewards from -1.0 to -1.0, .*: scale the rewards to 0 to 1"):
        run(settings(solutions=9))
    assert sample_files(samples) == before


def test_vstar_uses_the_solutions(settings: Callable[..., Config]) -> None:
    run(settings())
    printed, engines = io.StringIO(), SteppingEngines()
    config = settings({"vstar": {"num_samples": 8}})
    run_stage1(config, Terminal(file=printed, width=200), check=False, engines=LOCAL.built_by(engines.build))
    assert not engines.built
    assert "6 prompts, pass rate" in printed.getvalue()


def test_a_table_without_a_state_is_not_written(
    settings: Callable[..., Config], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("stage1_vstar.segments.run.States.rows", lambda self, summary: iter(()))
    with pytest.raises(UserError, match=r"would be empty: the grader could judge no solution"):
        run(settings())
    assert not run_paths("test").segments.exists()


def test_rewards_outside_of_0_and_1_are_refused(
    settings: Callable[..., Config], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "twice.py").write_text("def reward(prompt, completion, answer):\n    return 2.0\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(UserError, match=r"rewards from 2.0 to 2.0, .*: scale the rewards to 0 to 1"):
        run(settings({"grader": {"name": "twice:reward"}}))


def test_regrade_has_another_grader_judge_solutions_and_completions_of_states(
    settings: Callable[..., Config], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The new one reads the tokens, which `segments` keeps; those of a completion begin with the state's."""
    (tmp_path / "by_length.py").write_text(
        "def reward(completions, completion_ids):\n    return [len(ids) / 100 for ids in completion_ids]\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    run(settings())
    config = settings({"grader": {"name": "by_length:reward"}})
    with pytest.raises(UserError, match=r"grade them again with `python cli\.py regrade`"):
        run(config)
    printed = io.StringIO()
    run_regrade(config, Terminal(file=printed, width=200))
    assert "completions of states are graded by by_length:reward" in printed.getvalue()
    _, drawn = run(config)
    assert drawn == []
    for row in table().iter_rows(named=True):
        lengths = [len(row["prefix_token_ids"]) + after for after in row["completion_tokens"]]
        assert row["rewards"] == [length / 100 for length in lengths]
    printed = io.StringIO()
    run_regrade(config, Terminal(file=printed, width=200))
    assert "completions to grade" not in printed.getvalue()


def test_merge_joins_solutions_and_completions_of_states(
    settings: Callable[..., Config], tmp_path: Path
) -> None:
    run(settings())
    write_questions(tmp_path / "data.jsonl", 3)
    run(settings({"run": "some"}))
    write_questions(tmp_path / "data.jsonl")
    printed = io.StringIO()
    for _ in range(2):
        merge_runs(["some", "test"], "joined", Terminal(file=printed, width=200))
    _, drawn = run(settings({"run": "joined"}))
    assert drawn == []
    assert table("joined").equals(table())
    states = table().filter(~pl.col("is_terminal") & (pl.col("step") > 0)).height
    assert f"{4 * states} completions of {states} states; `python cli.py segments" in printed.getvalue()


def test_completions_of_states_that_do_not_belong_together_are_refused_before_anything_is_written(
    settings: Callable[..., Config], tmp_path: Path
) -> None:
    other = tmp_path / "other"
    save_tiny_model(other, seed=1)
    run(settings())
    run(settings({"run": "by-another"}, completer=str(other)))
    with pytest.raises(
        UserError, match=r"continuations/part-.* does not belong to this run: model\.weights is"
    ):
        merge_runs(["test", "by-another"], "joined", Terminal(file=io.StringIO()))
    assert not run_paths("joined").samples.exists()


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("segments.chosen=200", "chosen 200 is more than the 128 solutions"),
        ("segments.split=words", "should be one of line, paragraph, sentence"),
        ("segments.split=[]", "split should have a text that ends a step"),
        ("segments.completions=1", "segments.completions"),
        ("segments.completer=nowhere/at/all", "segments.completer: there is no model at nowhere/at/all"),
    ],
)
def test_a_wrong_setting_is_one_line(
    run_cli: RunCli,
    settings: Callable[..., Config],
    tmp_path: Path,
    tiny_model: Path,
    setting: str,
    message: str,
) -> None:
    config = tmp_path / "run.toml"
    config.write_text(
        f'run = "test"\nmodel = {{ path = "{tiny_model}", dtype = "float32" }}\ngrader = {{ name = "gsm8k" }}\n'
        f'data = {{ path = "{tmp_path / "data.jsonl"}", template = "line" }}\n'
        "sampling = { max_completion_tokens = 12 }\n"
    )
    settings()
    result = run_cli("segments", "--config", str(config), "--set", setting, warm=True)
    assert result.returncode == 2, result.stderr
    assert message in " ".join(result.stderr.split())
    assert "Traceback" not in result.stderr
