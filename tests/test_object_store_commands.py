"""Commands at s3:// that work on several runs, files or machines: what one machine writes is what another one reads."""

import io
import json
import os
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import polars as pl
import pytest

import cli
from common.config import DataConfig
from common.data.files import local_files
from common.errors import UserError
from common.evaluations import Results, read_results
from common.files import new_folder, write_text
from common.processes import Finished
from common.remote.copies import fetched, given
from common.remote.places import here, shown
from common.rounds import run_rounds
from common.runs import exclusive_run, run_paths
from common.segments.files import ADVANTAGES_TABLE
from common.store import sample_files
from common.study import compare
from common.terminal.console import Terminal
from stage1_vstar.merge import merge_runs
from stage2_train.card import evaluations_of
from stage2_train.config import load_config, load_with_inputs
from stage2_train.metrics import MetricsLog
from stage2_train.ranks import ALONE, Ranks
from stage2_train.run import _refuse_several_copies
from tests import warm
from tests.conftest import ROOT
from tests.fakes import tiny_config
from tests.killing import Killed
from tests.object_store import KEY, SECRET, Machines, Store
from tests.stage1_runs import QUESTIONS, Engines, run
from tests.test_compare import evaluated
from tests.tiny_config import write_config

NUM_SAMPLES = 4
STEPS = """
[segments]
solutions = 6
chosen = 4
completions = 3
split = [" "]
[critic]
learning_rate = 1e-3
batch_size = 8
"""


Command = Callable[..., str]


@pytest.fixture
def command(machines: Machines, tmp_path: Path) -> Command:
    """Run a command on the present machine; returns what it prints."""

    def start(*arguments: str | Path) -> str:
        environment = {**os.environ, "HF_HUB_OFFLINE": "1", "COLUMNS": "200"}
        done = warm.run([ROOT / "cli.py", *arguments], cwd=tmp_path, env=environment, timeout=120)
        assert done.returncode == 0, done.stderr
        assert str(tmp_path / "machines") not in done.stdout + done.stderr
        return done.stdout

    return start


class Commands:
    """Runs the commands of `rounds` and `compare`, lists them, and dies after so many."""

    def __init__(self, dies_after: int | None = None) -> None:
        self.done: list[str] = []
        self._dies_after = dies_after

    def __call__(self, command: Sequence[str], log: Path, environment: Mapping[str, str]) -> Finished:
        arguments = command[command.index(str(ROOT / "cli.py")) :]
        self.done.append(arguments[1])
        done = warm.run(arguments, env={**os.environ, **environment, "HF_HUB_OFFLINE": "1"}, timeout=120)
        assert done.returncode == 0, done.stderr
        if len(self.done) == self._dies_after:
            raise Killed
        return Finished(seconds=1.0, cpu_seconds=1.0, peak_gib=1.0)


def never(command: Sequence[str], log: Path, environment: Mapping[str, str]) -> Finished:
    raise AssertionError(f"{command} was started")


def drawn(folder: Path) -> dict[str, list[tuple[str, int]]]:
    """The addresses of all samples below a folder, by the store that they are in."""
    found: dict[str, list[tuple[str, int]]] = {}
    for file in folder.rglob("part-*.parquet"):
        rows = pl.read_parquet(file).select("prompt_id", "sample_index").iter_rows()
        found.setdefault(str(file.parent.relative_to(folder)), []).extend(rows)
    return found


def assert_clean(store: Store, folder: Path) -> Path:
    """Nothing unfinished, no lease, no credential and no path of a machine is in the store; returns a copy of it."""
    names = store.names()
    assert not [name for name in names if re.search(r"\.tmp|\.lock|\.leases|\.log$", name)]
    everything = store.download(folder / "all")
    for file in filter(Path.is_file, everything.rglob("*")):
        assert not re.search(f"{KEY}|{SECRET}|{folder}/machines".encode(), file.read_bytes()), file
    for file in filter(Path.is_file, (folder / "machines").rglob("*")):
        assert not re.search(f"{KEY}|{SECRET}".encode(), file.read_bytes()), file
    return everything


def test_each_command_of_the_step_level_method_may_run_on_another_machine(
    command: Command, machines: Machines, store: Store, tiny_model: Path, data_file: Path, tmp_path: Path
) -> None:
    config = write_config(tmp_path, tiny_model, data_file, objective={"name": "direct_advantage"})
    config.write_text(config.read_text().replace("iterations = 2", "epochs = 1") + STEPS)
    for place, step in enumerate(("segments", "critic", "advantages", "train")):
        machines.use(f"machine-{place}")
        command(step, "--config", config)
    machines.use("reader")
    command("inspect", "--run", "mine")
    command("export-segments", "--run", "mine", "-o", f"{store.url}/exported/steps.jsonl")
    read = {file.name for file in machines.use("reader").rglob("*") if file.is_file()}
    assert {"advantages.parquet", "astar_po.json"} <= read
    assert not [name for name in read if re.search(r"part-|safetensors|\.pt$", name)], "only what is read"
    machines.use("another")
    steps = f"{store.url}/exported/steps.jsonl"
    assert "24 solutions" in command("import-segments", steps, "--config", config, "--run", "theirs")
    everything = assert_clean(store, tmp_path)
    assert {"mine/critic/astar_po.json", "mine/model/astar_po.json", "theirs/segments.parquet"} <= set(
        store.names()
    )
    assert all(len(rows) == len(set(rows)) for rows in drawn(everything).values())
    kept = ADVANTAGES_TABLE.read(everything / "mine" / "advantages.parquet")[0]
    assert 0 < kept["keep"].sum() <= kept.height


def test_rounds_that_were_killed_continue_on_another_machine_and_draw_nothing_twice(
    machines: Machines, store: Store, tiny_model: Path, data_file: Path, tmp_path: Path
) -> None:
    config = write_config(tmp_path, tiny_model, data_file)

    def rounds(commands: Commands) -> None:
        run_rounds(config, load_with_inputs, Terminal(quiet=True), count=1, execute=commands)

    first = Commands(dies_after=3)
    with pytest.raises(Killed):
        rounds(first)
    before = {name for name in store.names() if "part-" in name}
    machines.use("second")
    second = Commands()
    rounds(second)
    assert (first.done, second.done) == (["vstar", "train", "evaluate"], ["evaluate", "evaluate"])
    samples = drawn(assert_clean(store, tmp_path))
    assert before <= set(store.names())
    assert all(len(rows) == len(set(rows)) for rows in samples.values())
    own = {name.rpartition("/")[2] for name in before if "/evaluations/" in name}
    everyones = {name.rpartition("/")[2] for name in store.names() if name.startswith("mine/evaluations/")}
    assert own <= everyones, "the evaluation of all rounds has the completions of the round's own"
    results = read_results(run_paths("mine"))
    assert results is not None
    assert [each.model for each in results.results] == ["reference", f"{store.url}/mine-round1/model"]
    machines.use("third")
    rounds(Commands(dies_after=0))


def test_a_study_that_was_killed_continues_on_another_machine(
    machines: Machines, store: Store, tiny_model: Path, data_file: Path, tmp_path: Path
) -> None:
    store.put("studies/run.toml", write_config(tmp_path, tiny_model, data_file).read_bytes())
    store.put("studies/study.toml", b'study = "s"\nconfig = "run.toml"\nseeds = [0]\n[[arms]]\nname = "A"\n')
    place = f"{store.url}/studies/study.toml"

    def study(commands: Commands, **options: bool) -> str:
        output, records = io.StringIO(), given(f"{store.url}/records")
        console = Terminal(file=output, width=200)
        compare(given(place), load_with_inputs, console, results=records, execute=commands, **options)
        return output.getvalue()

    first, second = Commands(dies_after=2), Commands()
    with pytest.raises(Killed):
        study(first)
    assert first.done == ["vstar", "train"]
    machines.use("second")
    study(second)
    assert second.done == ["train", "evaluate", "evaluate"], "the cost of training had not been written"
    assert {"records/A-seed0.json", "s/report.html", "s/tables.md"} <= set(store.names())
    assert all(len(rows) == len(set(rows)) for rows in drawn(assert_clean(store, tmp_path)).values())
    machines.use("third")
    assert "A, seed 0: done" in study(second, dry_run=True)
    assert len(second.done) == 3


def test_a_second_machine_is_refused_while_one_is_at_work(
    machines: Machines, store: Store, tiny_model: Path, data_file: Path, tmp_path: Path
) -> None:
    config = write_config(tmp_path, tiny_model, data_file)
    study = tmp_path / "study.toml"
    study.write_text('study = "mine"\nconfig = "run.toml"\nseeds = [0]\n[[arms]]\nname = "A"\n')
    second: dict[str, Callable[[], None]] = {
        "rounds": lambda: run_rounds(config, load_with_inputs, Terminal(quiet=True), count=1, execute=never),
        "compare": lambda: compare(study, load_with_inputs, Terminal(quiet=True), execute=never),
        "base-model": lambda: cli.base_model(config),
    }
    for job, start in second.items():
        machines.use("first")
        with exclusive_run(run_paths("mine"), job):
            machines.use("second")
            with pytest.raises(UserError, match=rf"another {job} job .* is writing to {store.url}/mine"):
                start()


def test_a_file_that_was_never_looked_for_is_replaced(machines: Machines, store: Store) -> None:
    for machine in ("first", "second"):
        machines.use(machine)
        write_text(here(f"{store.url}/report/sweep.json"), machine)
        assert store.read("report/sweep.json") == machine.encode()


def test_files_of_an_unfinished_folder_are_stored_with_it(machines: Machines, store: Store) -> None:
    for text in ("first", "again"):
        with new_folder(run_paths("one").critic) as temporary:
            write_text(temporary / "figures.json", text)
            write_text(temporary / "astar_po.json", "{}")
            assert not [name for name in store.names() if ".tmp" in name]
        assert store.read("one/critic/figures.json") == text.encode()
    assert store.names() == ["one/critic/astar_po.json", "one/critic/figures.json"]


def test_logs_stay_on_the_machine_that_wrote_them_and_are_named_there(
    machines: Machines, store: Store
) -> None:
    log = run_paths("one").step("train", "log")
    log.parent.mkdir(parents=True)
    log.write_text("what happened")
    fetched(run_paths("one").root, again=True)
    assert log.read_text() == "what happened"
    text = f"it failed (all of it: {log}); see {log.parent}/train.json"
    assert shown(text) == f"it failed (all of it: {log}); see {store.url}/one/steps/train.json"


def test_a_command_beside_training_costs_no_line_of_its_log(
    machines: Machines, store: Store, tiny_model: Path, data_file: Path, tmp_path: Path
) -> None:
    paths = run_paths("mine")
    config = load_config(write_config(tmp_path, tiny_model, data_file))
    log = MetricsLog(config, paths, Terminal(file=io.StringIO()), first_iteration=1, last=2)
    log.write(1, {"a/b": 1.0})
    fetched(paths.root, again=True)  # as `report` does
    assert paths.metrics.read_bytes() == b"", "what the store has"
    log.write(2, {"a/b": 2.0})
    log.store()
    log.close()
    lines = [json.loads(line) for line in store.read("mine/metrics.jsonl").splitlines()]
    assert lines == [{"iteration": 1, "a/b": 1.0}, {"iteration": 2, "a/b": 2.0}]
    assert paths.metrics.read_bytes() == store.read("mine/metrics.jsonl")


def test_a_card_has_the_evaluations_that_another_machine_made(machines: Machines, store: Store) -> None:
    paths = run_paths("mine")
    write_text(paths.trained_with, json.dumps({"iterations": 2}))
    results = Results(
        results=[
            evaluated(0.5).model_copy(update={"model": "reference", "path": "elsewhere"}),
            evaluated(0.5).model_copy(update={"model": "trained", "path": shown(str(paths.model))}),
        ]
    )
    write_text(paths.results("json"), results.model_dump_json())
    machines.use("second")
    found = evaluations_of(run_paths("mine"), 2, is_exported=False)
    assert [each.model for each in found] == ["reference", "trained"]


def test_samples_are_merged_from_one_store_into_another(
    machines: Machines,
    store: Store,
    tiny_model: Path,
    data_file: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("tests.stage1_runs.engine_builder", Engines().build)
    run(tiny_config(tiny_model, data_file))
    other = store.beside("other")
    machines.use("second")
    monkeypatch.setenv("ASTAR_PO_ARTIFACTS", other.url)
    merge_runs([f"{store.url}/test"], "joined", Terminal(quiet=True))
    assert [name.rpartition("/")[2] for name in other.names()] == [
        name.rpartition("/")[2] for name in store.names() if "part-" in name
    ]
    machines.use("third")
    [samples] = [pl.read_parquet(file) for file in sample_files(run_paths("joined").samples)]
    assert samples.height == QUESTIONS * NUM_SAMPLES


def test_configs_and_data_may_be_at_urls(
    machines: Machines, store: Store, tiny_model: Path, data_file: Path, tmp_path: Path
) -> None:
    store.put("in/base.toml", write_config(tmp_path, tiny_model, data_file).read_bytes())
    store.put("in/mine.toml", b'include = ["base.toml"]\nrun = "theirs"\n')
    store.put("in/data.jsonl", data_file.read_bytes())
    assert load_config(here(f"{store.url}/in/mine.toml")).run == "theirs"
    for path in (f"{store.url}/in/data.jsonl", f"{store.url}/in"):
        found = local_files(DataConfig(format="generic", path=path, template="line"))
        assert found is not None
        assert [file.read_bytes() for file in found] == [data_file.read_bytes()]
    for missing in (f"{store.url}/none.jsonl", f"{store.url}/none"):
        with pytest.raises(UserError, match="there is no data file"):
            local_files(DataConfig(format="generic", path=missing, template="line"))


def test_nodes_with_copies_of_their_own_are_refused(
    machines: Machines, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    paths = run_paths("mine")
    _refuse_several_copies(paths, ALONE)
    monkeypatch.setattr(Ranks, "gather", lambda ranks, items: [*items, *items])
    _refuse_several_copies(paths, ALONE)
    monkeypatch.setattr(Ranks, "gather", lambda ranks, items: [*items, "another"])
    with pytest.raises(
        UserError, match=r"has 2 copies on the nodes of this job.*: set ASTAR_PO_CACHE to one folder"
    ):
        _refuse_several_copies(paths, ALONE)
    monkeypatch.setenv("ASTAR_PO_ARTIFACTS", str(tmp_path / "folder"))
    _refuse_several_copies(run_paths("mine"), ALONE)
