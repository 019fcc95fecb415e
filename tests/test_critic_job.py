"""The command `critic`: it learns a table of values, its folder opens in transformers, mistakes are refused early."""

import io
import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from threading import Event
from typing import Any

import polars as pl
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForTokenClassification, AutoTokenizer

from benchmarks.tiny_model import save_tiny_model
from common.data.rendering import PromptRenderer
from common.errors import UserError
from common.runs import run_paths
from common.terminal.console import Terminal
from stage2_train.config import Config
from stage2_train.critic_job import run as critic_run
from stage2_train.critic_job.process_bench import ProcessBenchSolution, run_process_bench, trajectories_of
from stage2_train.critic_job.run import run_critic
from stage2_train.critic_job.states import Trajectory, is_held_out
from stage2_train.critic_job.training import CriticTraining
from stage2_train.critic_job.values import state_values
from tests import warm
from tests.conftest import ROOT, RunCli
from tests.stage2_runs import as_toml, tiny_config
from tests.step_tables import GOOD, write_solutions

pytestmark = pytest.mark.filterwarnings(r"ignore::DeprecationWarning:(torch|deepspeed)\..*")

HELD_OUT = 0.3
LORA = {"rank": 4, "alpha": 8}


@dataclass(frozen=True)
class Job:
    """A finished run of the command, its config and its table."""

    config: Config
    rows: pl.DataFrame
    output: str

    @property
    def folder(self) -> Path:
        return run_paths(self.config.run).critic

    def rerun(self, config: Config | None = None) -> str:
        return run(config or self.config)

    def tokens(self, rows: pl.DataFrame) -> list[list[int]]:
        renderer = PromptRenderer(Path(self.config.model.path), self.config.data)
        return [
            [*renderer.render(prompt), *prefix]
            for prompt, prefix in rows.select("prompt", "prefix_token_ids").iter_rows()
        ]


def run(config: Config, allow_mismatch: Sequence[str] = ()) -> str:
    output = io.StringIO()
    run_critic(config, Terminal(file=output, width=120), allow_mismatch=allow_mismatch)
    return output.getvalue()


def changed(config: Config, **sections: dict[str, Any]) -> Config:
    document = config.model_dump(mode="json", exclude_none=True)
    for name, values in sections.items():
        document[name] = {**document.get(name, {}), **values}
    return Config.model_validate(document)


def prepared(folder: Path, model: Path, **sections: dict[str, Any]) -> tuple[Config, pl.DataFrame]:
    """A config and its table in artifacts/."""
    critic = {"learning_rate": 3e-3, "batch_size": 32, "held_out": HELD_OUT, **sections.pop("critic", {})}
    config = changed(tiny_config(folder, model, **sections), critic=critic)
    table = run_paths(config.run).segments
    table.parent.mkdir(parents=True)
    return config, write_solutions(config, table)


@pytest.fixture(scope="module")
def job(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Job]:
    folder = tmp_path_factory.mktemp("critic")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ASTAR_PO_ARTIFACTS", str(folder / "artifacts"))
        config, rows = prepared(folder, tiny_model, critic={"epochs": 20})
        yield Job(config, rows, run(config))


def figures_of(job: Job) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((job.folder / "figures.json").read_bytes())
    return found


def test_it_learns_the_values_of_states_of_held_out_prompts(job: Job) -> None:
    found = figures_of(job)["held_out"]
    assert found["intermediate"]["pearson"] > 0.8
    assert found["all"]["brier"] < 0.5 * found["all"]["brier_constant"]
    lines = (job.folder / "metrics.jsonl").read_text().splitlines()
    losses = [json.loads(line)["loss/cross_entropy"] for line in lines]
    assert losses[0] == pytest.approx(0.693, abs=1e-3)
    assert sum(losses[-5:]) / 5 < 0.5
    for name in ("reliability.png", "reliability.svg", "README.md"):
        assert (job.folder / name).stat().st_size > 1000


def test_the_figures_are_those_of_the_saved_critic_on_held_out_prompts_alone(job: Job) -> None:
    rows = job.rows.filter(pl.col("prompt_id").map_elements(lambda x: is_held_out(x, HELD_OUT), pl.Boolean))
    values = torch.tensor(state_values(job.folder, job.tokens(rows), job.config))
    brier = float(((values - torch.tensor(rows["value"].to_list())) ** 2).mean())
    found = figures_of(job)
    assert found["held_out"]["all"]["states"] == rows.height
    assert found["held_out_prompts"] == rows["prompt_id"].n_unique()
    assert found["held_out"]["all"]["brier"] == pytest.approx(brier, rel=1e-4)
    assert f"{rows.height} states" in job.output


def test_the_folder_opens_in_transformers_with_the_same_values(job: Job) -> None:
    model = AutoModelForTokenClassification.from_pretrained(job.folder).eval()
    assert model.config.num_labels == 1
    assert model.config.id2label == {0: "correct"}
    tokens = job.tokens(job.rows.head(20))
    with torch.no_grad():
        theirs = [model(torch.tensor([ids])).logits[0, -1, 0].sigmoid().item() for ids in tokens]
    assert state_values(job.folder, tokens, job.config) == pytest.approx(theirs, abs=1e-5)
    assert max(theirs) - min(theirs) > 0.3
    reference = AutoTokenizer.from_pretrained(job.config.model.path)
    assert AutoTokenizer.from_pretrained(job.folder).get_vocab() == reference.get_vocab()


def test_values_do_not_depend_on_how_sequences_are_batched(job: Job) -> None:
    tokens = job.tokens(job.rows.head(40))
    alone = changed(job.config, train={"tokens_per_micro_batch": 1})
    assert state_values(job.folder, iter(tokens), job.config) == pytest.approx(
        state_values(job.folder, tokens, alone), abs=1e-5
    )
    assert state_values(job.folder, [], job.config) == []


def test_values_need_a_critic_and_sequences_that_fit_its_context(job: Job, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"there is no critic .*train it with `python cli.py critic`"):
        state_values(tmp_path / "critic", [[1, 2]], job.config)
    with pytest.raises(UserError, match="513 tokens with its prompt, more than the context of 512"):
        state_values(job.folder, [[1] * 513], job.config)


def test_a_finished_critic_is_left_and_one_of_other_settings_is_refused(job: Job) -> None:
    before = (job.folder / "model.safetensors").stat().st_mtime_ns
    assert "nothing to do" in job.rerun(changed(job.config, train={"tokens_per_micro_batch": 77}))
    with pytest.raises(
        UserError, match=r"critic.batch_size is 32 there and 64 here; choose another --run, or"
    ):
        job.rerun(changed(job.config, critic={"batch_size": 64}))
    other = job.folder.parent / "other.parquet"
    write_solutions(changed(job.config), other, steps=2)
    with pytest.raises(UserError, match="segments is"):
        run_critic(job.config, Terminal(quiet=True), other)
    assert (job.folder / "model.safetensors").stat().st_mtime_ns == before


def write_labelled(path: Path) -> list[dict[str, Any]]:
    rows = [
        {"id": "1", "problem": "Tom has 3 apples.", "steps": [GOOD, " has"], "label": 1},
        {"id": "2", "problem": "Tom has 4 apples.", "steps": [GOOD], "label": -1},
        {"id": "3", "problem": "Tom has 5 apples.", "steps": [" has", " has"], "label": 0},
        {"id": "4", "problem": "Tom has 5 apples." * 99, "steps": [" has"], "label": 0},
    ]
    path.write_text("".join(json.dumps({**row, "final_answer_correct": True}) + "\n" for row in rows))
    return rows


def test_a_trained_critic_is_measured_on_a_file_of_first_wrong_steps(job: Job, tmp_path: Path) -> None:
    file = tmp_path / "gsm8k.jsonl"
    rows = write_labelled(file)
    output = io.StringIO()
    run_process_bench(job.config, Terminal(file=output), file)
    found = json.loads((job.folder / "process_bench-gsm8k.json").read_bytes())
    assert found["too_long"] == 1
    renderer = PromptRenderer(Path(job.config.model.path), job.config.data)
    right = {True: [], False: []}  # type: ignore[var-annotated]
    for row in rows[:3]:
        encode, steps = renderer.tokenizer.encode, row["steps"]
        ids, values = list(renderer.render(row["problem"])), []
        for number, step in enumerate(steps, start=1):
            is_last = number == len(steps)
            ids += [*encode(step), renderer.eos_token_ids[0]] if is_last else encode(f"{step}\n")
            values += state_values(job.folder, [list(ids)], job.config)
        below = next((place for place, value in enumerate(values) if value < 0.5), -1)
        right[row["label"] == -1].append(below == row["label"])
    erroneous, correct = (sum(right[kind]) / len(right[kind]) for kind in (False, True))
    assert (found["default"]["accuracy_erroneous"], found["default"]["accuracy_correct"]) == (
        erroneous,
        correct,
    )
    assert found["chosen"]["threshold"] == figures_of(job)["threshold"]
    pl.read_ndjson(file).write_parquet(tmp_path / "gsm8k.parquet")
    run_process_bench(job.config, Terminal(file=output), tmp_path / "gsm8k.parquet")
    assert json.loads((job.folder / "process_bench-gsm8k.json").read_bytes())["default"] == found["default"]


def test_steps_are_tokenised_at_their_ends(job: Job) -> None:
    renderer = PromptRenderer(Path(job.config.model.path), job.config.data)
    steps = [" Tom buys", " has 7"]
    solution = ProcessBenchSolution(problem="Tom has 3 apples.", steps=steps, label=-1)
    (found,) = trajectories_of([solution], renderer, job.config.segments.separators)
    prompt = len(renderer.render(solution.problem))
    first, second = (
        renderer.decode(found.token_ids[prompt : found.ends[0]]),
        found.token_ids[found.ends[0] :],
    )
    assert first == " Tom buys\n"
    assert renderer.decode(second) == " has 7"
    assert second[-1] in renderer.eos_token_ids
    assert found.ends[1] == len(found.token_ids)


@pytest.mark.parametrize(
    ("row", "problem"),
    [
        ({"problem": "1 + 1?", "steps": ["2"]}, r"row 1 is not in ProcessBench's format .*label: Field"),
        ({"problem": "1 + 1?", "steps": ["2"], "label": 1}, "label is 1, and there are 1 steps"),
        ({"problem": "1 + 1?", "steps": "2", "label": 0}, "steps: Input should be a valid list"),
    ],
)
def test_a_file_in_another_format_is_refused(
    job: Job, tmp_path: Path, row: dict[str, Any], problem: str
) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text(json.dumps(row) + "\n")
    with pytest.raises(UserError, match=problem):
        run_process_bench(job.config, Terminal(quiet=True), file)


def test_two_processes_write_the_critic_of_one(tiny_model: Path, artifacts: Path, tmp_path: Path) -> None:
    """The command itself, as torchrun starts it."""
    config, _ = prepared(tmp_path, tiny_model, critic={"learning_rate": 1e-4})
    run(config)
    alone = run_paths(config.run).critic.rename(tmp_path / "alone")
    (tmp_path / "tiny.toml").write_text(as_toml(config))
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    warm.run_ranks(
        2, [ROOT / "cli.py", "critic", "--config", tmp_path / "tiny.toml"], timeout=100, env=environment
    )
    together = run_paths(config.run).critic
    assert {file.name for file in together.iterdir()} == {file.name for file in alone.iterdir()}
    ours, theirs = (load_file(folder / "model.safetensors") for folder in (together, alone))
    assert ours.keys() == theirs.keys()
    for name, weight in ours.items():
        assert float((weight - theirs[name]).abs().max()) < 1e-5, name
    record = json.loads((together / "astar_po.json").read_bytes())
    assert record["context"]["processes"] == 2
    assert "nothing to do" in run(config)


def test_differences_that_are_accepted_are_recorded(
    tiny_model: Path, artifacts: Path, tmp_path: Path
) -> None:
    config, _ = prepared(tmp_path, tiny_model)
    other = changed(config, data={"template": "Q: {prompt}"})
    run(other, ["prompt.template", "prompt.tokens"])
    record = json.loads((run_paths(config.run).critic / "astar_po.json").read_bytes())
    assert [line.split()[0] for line in record["context"]["accepted_mismatches"]] == [
        "prompt.template",
        "prompt.tokens",
    ]


@pytest.mark.filterwarnings("ignore:.torch.distributed:FutureWarning")
def test_an_adapter_is_merged_into_the_critic(tiny_model: Path, artifacts: Path, tmp_path: Path) -> None:
    config, rows = prepared(tmp_path, tiny_model, train={"lora": LORA, "zero_stage": 3})
    one = Job(config, rows, run(config))
    start = AutoModelForTokenClassification.from_pretrained(tiny_model, num_labels=1).state_dict()
    found = AutoModelForTokenClassification.from_pretrained(one.folder).state_dict()
    assert found.keys() == start.keys()
    assert torch.equal(found["model.embed_tokens.weight"], start["model.embed_tokens.weight"])
    name = "model.layers.0.self_attn.q_proj.weight"
    assert not torch.equal(found[name], start[name])
    held_out = rows.filter(pl.col("prompt_id").map_elements(lambda x: is_held_out(x, HELD_OUT), pl.Boolean))
    values = torch.tensor(state_values(one.folder, one.tokens(held_out), config))
    brier = float(((values - torch.tensor(held_out["value"].to_list())) ** 2).mean())
    assert figures_of(one)["held_out"]["all"]["brier"] == pytest.approx(brier, rel=1e-4)


def test_a_step_that_hangs_ends_the_job(
    tiny_model: Path, artifacts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, _ = prepared(tmp_path, tiny_model, train={"hang_minutes": 0.005})
    said: list[str] = []
    hangs = Event()

    def leave(status: int, message: str, *, unless_said: bool) -> None:
        said.append(message)
        if "hangs in update" in message:
            hangs.set()

    def step(self: CriticTraining, trajectories: Sequence[Trajectory]) -> dict[str, float]:
        assert hangs.wait(60), said
        raise ConnectionAbortedError

    monkeypatch.setattr("stage2_train.watchdog.leave", leave)
    monkeypatch.setattr(CriticTraining, "step", step)
    with pytest.raises(ConnectionAbortedError):
        run(config)


def test_a_job_that_fails_leaves_nothing_and_the_same_command_starts_over(
    tiny_model: Path, artifacts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, _ = prepared(tmp_path, tiny_model)
    with monkeypatch.context() as patch:
        patch.setattr(critic_run, "critic_card", lambda *_: 1 // 0)
        with pytest.raises(ZeroDivisionError):
            run(config)
    assert not list(run_paths(config.run).root.glob("*critic/*"))
    assert not list(run_paths(config.run).root.glob(".critic.tmp"))
    run(config)
    assert (run_paths(config.run).critic / "astar_po.json").exists()


def test_mistakes_are_refused_before_a_model_loads(
    tiny_model: Path, artifacts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(critic_run, "Critic", None)
    config, _ = prepared(tmp_path, tiny_model)
    with pytest.raises(UserError, match=r"holds all 32 out; lower it"):
        run(changed(config, critic={"held_out": 0.9999}))
    other = changed(config, data={"template": "Q: {prompt}"})
    with pytest.raises(
        UserError, match=r"does not belong to this run: prompt.template is .*--allow-mismatch prompt.template"
    ):
        run(other)
    with pytest.raises(
        UserError, match=r"prompt.tokens differ for 32 prompts, .*--allow-mismatch prompt.tokens"
    ):
        run(other, ["prompt.template"])
    with pytest.raises(
        UserError, match=r"--allow-mismatch magic: there is no such field; use one of .*prompt.tokens"
    ):
        run(config, ["magic"])
    with pytest.raises(UserError, match=r"critic.model: there is no model at /nowhere"):
        run(changed(config, critic={"model": "/nowhere"}))
    from common.demo.base_model import build_tokenizer

    tokenizer = build_tokenizer()
    tokenizer.add_tokens(["<new>"])
    save_tiny_model(tmp_path / "more", seed=1, tokenizer=tokenizer)
    with pytest.raises(UserError, match=r"has another tokenizer .*: 1 tokens .*such as '<new>'"):
        run(changed(config, model={"path": str(tmp_path / "more")}, critic={"model": str(tiny_model)}))
    save_tiny_model(tmp_path / "short", seed=1, context=8)
    with pytest.raises(UserError, match=r"more than the context of 8 .*choose another critic.model"):
        run(changed(config, critic={"model": str(tmp_path / "short")}))


def test_the_command_line_says_what_is_missing(tiny_model: Path, run_cli: RunCli, tmp_path: Path) -> None:
    config = tiny_config(tmp_path, tiny_model)
    (tmp_path / "tiny.toml").write_text(as_toml(config))
    result = run_cli("critic", "--config", tmp_path / "tiny.toml", warm=True)
    assert result.returncode == 2
    assert (
        f"segments.parquet; make it with `python cli.py segments --config {tmp_path / 'tiny.toml'}`"
        in result.stderr
    )
    (tmp_path / "rows.jsonl").write_text("{}")
    result = run_cli(
        "critic", "--config", tmp_path / "tiny.toml", "--process-bench", tmp_path / "rows.jsonl", warm=True
    )
    assert result.returncode == 2
    assert f"train it with `python cli.py critic --config {tmp_path / 'tiny.toml'}`" in result.stderr
    for option in ("--segments", "--allow-mismatch"):
        measure = ("--process-bench", tmp_path / "rows.jsonl")
        result = run_cli("critic", "--config", tmp_path / "tiny.toml", *measure, option, "x", warm=True)
        assert result.returncode == 2
        assert f"reads no table of states; leave {option} out" in result.stderr
