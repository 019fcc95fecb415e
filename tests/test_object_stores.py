"""Runs at s3://: every command works as with a folder, on several machines, and whatever happens to the connection."""

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

import polars as pl
import pytest

from common.errors import UserError
from common.files import discard, new_folder, write_text
from common.model.files import resolve_model
from common.remote import leases, objects
from common.remote.places import here, named, shown, url_of, without_secrets
from common.runs import REPOSITORY, Shard, exclusive_run, run_paths
from common.sampling import writer
from common.store import set_aside_damaged
from common.vstar_file import read_vstar
from stage1_vstar.filter import drop_rules, filter_prompts
from stage1_vstar.rescore import rescore
from tests.conftest import RunCli
from tests.fakes import EngineDied, ScriptedEngine, tiny_config
from tests.object_store import KEY, SECRET, Machines, Store, environment
from tests.stage1_runs import QUESTIONS, Engines, rows_of, run, stored

NUM_SAMPLES = 4


@pytest.fixture
def engines(machines: Machines, monkeypatch: pytest.MonkeyPatch) -> Engines:
    """Every run of stage 1 in the test draws from a scripted engine."""
    scripted = Engines()
    monkeypatch.setattr("tests.stage1_runs.engine_builder", scripted.build)
    return scripted


def test_a_url_has_a_copy_and_the_copy_a_url(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ASTAR_PO_CACHE", str(tmp_path))
    copy = here("s3://bucket/prefix/")
    assert copy == tmp_path.resolve() / "s3" / "bucket" / "prefix"
    assert here(str(Path("s3://bucket/prefix"))) == copy, "pathlib drops a slash"
    assert url_of(copy / "run") == named(copy / "run") == "s3://bucket/prefix/run"
    assert shown(f"see {copy}/run/vstar.parquet") == "see s3://bucket/prefix/run/vstar.parquet"
    assert here("hf://datasets/me/runs@main") == tmp_path.resolve() / "hf" / "datasets" / "me" / "runs@main"
    assert here("folder/x") == Path("folder/x")
    assert here("file:///folder/x") == Path("/folder/x")
    assert url_of(Path("/folder/x")) is None


@pytest.mark.parametrize(
    "url",
    [
        "s3://user:hush-hush@bucket/prefix",
        "s3://user:hush/hush@bucket/prefix",
        "s3://bucket/prefix?X-Amz-Signature=hush-hush",
        "s3:/user:hush-hush@bucket/prefix",
    ],
)
def test_credentials_in_a_url_are_refused_and_not_repeated(url: str) -> None:
    with pytest.raises(UserError, match="leave them out: credentials come from the environment") as refused:
        here(url)
    assert "s3://bucket/prefix" in str(refused.value)
    assert not re.search("hush|user:", str(refused.value))


def test_a_stores_address_belongs_elsewhere() -> None:
    with pytest.raises(
        UserError, match="host and a port: write s3://bucket/prefix, and set AWS_ENDPOINT_URL"
    ):
        here("s3://localhost:9000/bucket/prefix")


@pytest.mark.parametrize("url", ["s3://bucket//x", "s3://bucket/../x", "s3://"])
def test_a_url_that_names_no_folder_is_refused(url: str) -> None:
    with pytest.raises(UserError, match="write it as s3://bucket/prefix"):
        here(url)


def test_a_text_loses_users_and_parameters_of_its_urls() -> None:
    text = 'no answer from "https://me:secret@host:9000/bucket/x?sig=secret" nor s3://bucket/x.'
    assert without_secrets(text) == 'no answer from "https://host:9000/bucket/x" nor s3://bucket/x.'


def test_stage_one_and_the_offline_commands_give_what_they_give_in_a_folder(
    tiny_model: Path,
    data_file: Path,
    tmp_path: Path,
    engines: Engines,
    store: Store,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    config = tiny_config(tiny_model, data_file)

    def results() -> list[pl.DataFrame]:
        first = run(config)
        assert f"{tmp_path}/machines" not in first
        samples, rows = stored(), rows_of()
        rescore(run_paths("test").vstar, run_paths("test").vstar, 0.25)
        rules = drop_rules(unsolved=True, solved=True, min_pass_rate=0, max_pass_rate=1)
        filter_prompts(run_paths("test").vstar, None, rules)
        return [samples, rows, rows_of()]

    remote = results()
    names = store.names()
    assert {"test/config.json", "test/vstar.parquet"} < set(names)
    assert any(re.fullmatch(r"test/samples/part-[0-9a-f]{64}\.parquet", name) for name in names)
    assert not [name for name in names if ".tmp" in name or ".lock" in name or ".leases" in name]
    monkeypatch.setenv("ASTAR_PO_ARTIFACTS", str(tmp_path / "folder"))
    local = results()
    for here_, there in zip(local, remote, strict=True):
        assert here_.equals(there)


def test_another_machine_draws_only_what_is_missing(
    tiny_model: Path,
    data_file: Path,
    engines: Engines,
    machines: Machines,
    store: Store,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(writer, "FRAGMENT_SAMPLES", 3)
    config = tiny_config(tiny_model, data_file)
    engines.next = ScriptedEngine(dies_when=lambda: len(store.names()) > 4)
    with pytest.raises(EngineDied):
        run(config)
    kept = [name for name in store.names() if "part-" in name]
    assert kept
    there = pl.concat(pl.read_parquet(store.read(name)) for name in kept)
    addresses = list(there.select("prompt_id", "sample_index").iter_rows())
    copy = machines.use("second")
    engines.next = ScriptedEngine()
    run(config)
    assert len(addresses) + len(engines.next.drawn) == QUESTIONS * NUM_SAMPLES
    assert not set(addresses) & set(engines.next.drawn)
    copied = {file.name for file in copy.rglob("part-*")}
    assert {name.rpartition("/")[2] for name in kept} < copied
    machines.use("first")
    engines.next = ScriptedEngine()
    assert "nothing to do" in run(config)
    assert engines.next.drawn == []


def test_what_the_store_does_not_list_is_gone_and_a_damaged_copy_is_fetched_again(
    tiny_model: Path, data_file: Path, engines: Engines, machines: Machines, store: Store
) -> None:
    config = tiny_config(tiny_model, data_file)
    run(config)
    store.remove("test/vstar.parquet")
    machines.use("first")
    assert not run_paths("test").vstar.exists()
    [fragment] = run_paths("test").samples.glob("part-*")
    stat, whole = fragment.stat(), fragment.read_bytes()
    fragment.write_bytes(b"x" * len(whole))
    os.utime(fragment, ns=(stat.st_mtime_ns, stat.st_mtime_ns))
    assert set_aside_damaged(run_paths("test").samples) == []
    assert fragment.read_bytes() == whole
    name = f"test/samples/{fragment.name}"
    store.put(name, whole[:-1])
    machines.use("second")
    [line] = set_aside_damaged(run_paths("test").samples)
    assert "does not match the hash in its name" in line
    assert f"test/samples/damaged/{fragment.name}" in store.names()
    assert name not in store.names()


def test_a_table_that_another_job_has_changed_is_not_overwritten(
    tiny_model: Path, data_file: Path, engines: Engines, machines: Machines, store: Store
) -> None:
    run(tiny_config(tiny_model, data_file))
    vstar = run_paths("test").vstar
    theirs = store.read("test/vstar.parquet") + b"!"
    store.put("test/vstar.parquet", theirs)
    with pytest.raises(UserError, match=rf"another job has changed {store.url}/test/vstar.parquet since"):
        rescore(vstar, vstar, 0.25)
    assert store.read("test/vstar.parquet") == theirs
    machines.use("first")
    new = run_paths("test").root / "jackknife.parquet"
    store.put("test/jackknife.parquet", b"theirs")
    with pytest.raises(UserError, match="has changed"):
        write_text(new, "ours")
    assert store.read("test/jackknife.parquet") == b"theirs"


def test_a_folder_exists_once_its_last_file_is_there_and_its_weights_come_when_they_are_read(
    machines: Machines, store: Store
) -> None:
    def fill(text: str) -> None:
        with new_folder(run_paths("one").model) as temporary:
            (temporary / "config.json").write_text("{}")
            (temporary / "model.safetensors").write_text(text)
            (temporary / text).write_text("")

    fill("first")
    machines.use("second")
    assert not run_paths("one").model.exists(), "its last file is missing"
    machines.use("first")
    fill("again")
    write_text(run_paths("one").trained_with, "{}")
    for machine in ("second", "first"):
        machines.use(machine)
        model = run_paths("one").model
        assert (model / "model.safetensors").exists() == (machine == "first")
        assert (resolve_model(f"{store.url}/one/model", None) / "model.safetensors").read_text() == "again"
        assert sorted(file.name for file in model.iterdir()) == [
            *("again", "astar_po.json", "config.json", "model.safetensors")
        ]
    discard(run_paths("one").model)
    machines.use("second")
    assert not run_paths("one").model.exists()
    assert store.names() == []


def test_a_put_whose_answer_was_lost_counts_when_it_is_repeated(store: Store, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("content")
    version = objects.replace(f"{store.url}/file", tmp_path / "file", None)
    assert objects.replace(f"{store.url}/file", tmp_path / "file", None) == version
    (tmp_path / "file").write_text("other")
    with pytest.raises(UserError, match="another job has changed"):
        objects.replace(f"{store.url}/file", tmp_path / "file", None)
    assert objects.replace(f"{store.url}/file", tmp_path / "file", version) != version


def test_a_store_that_does_not_compare_is_compared_before_each_put(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ASTAR_PO_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("ASTAR_PO_ARTIFACTS", "memory://bucket")
    with exclusive_run(run_paths("one"), "vstar"):
        config = run_paths("one").config
        write_text(config, "{}")
        write_text(config, "changed")
        (tmp_path / "theirs").write_text("their change")
        objects.put("memory://bucket/one/config.json", tmp_path / "theirs")
        with pytest.raises(UserError, match=r"another job has changed memory://bucket/one/config.json"):
            write_text(config, "ours")
    assert objects.read("memory://bucket/one/config.json") == b"their change"
    assert list(objects.listing("memory://bucket")) == ["one/config.json"]


def test_a_run_in_a_folder_needs_no_package_for_stores() -> None:
    script = (
        "import sys\n"
        "import cli, common.store, stage1_vstar.rescore, stage1_vstar.run, common.report\n"
        "assert not {'s3fs', 'botocore', 'gcsfs'} & set(sys.modules)\n"
    )
    result = subprocess.run(
        [sys.executable, "-c", script], cwd=REPOSITORY, capture_output=True, text=True, timeout=120
    )
    assert result.returncode == 0, result.stderr


def test_a_missing_package_is_named_with_the_command_that_installs_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("common.packages.is_installed", lambda package: package != "s3fs")
    with pytest.raises(UserError, match="s3fs is not installed: make setup-s3"):
        objects.listing("s3://bucket/run")


def test_an_unknown_store_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cannot open nosuch://bucket/run: Protocol not known: nosuch"):
        objects.listing("nosuch://bucket/run")


def test_the_second_of_two_jobs_is_refused_on_every_machine(machines: Machines, store: Store) -> None:
    with exclusive_run(run_paths("one"), "vstar", Shard(1, 2)):
        with (
            pytest.raises(UserError, match=rf"another vstar job .*{os.getpid()} on .* is writing to"),
            exclusive_run(run_paths("one"), "vstar"),
        ):
            raise AssertionError("two jobs hold the same run")
        machines.use("second")
        with (
            pytest.raises(
                UserError,
                match=rf"another vstar job \(process {os.getpid()} on .+\) is writing to {store.url}/one;",
            ),
            exclusive_run(run_paths("one"), "vstar"),
        ):
            raise AssertionError("two jobs hold the same run")
        with exclusive_run(run_paths("one"), "train"), exclusive_run(run_paths("one"), "vstar", Shard(2, 2)):
            pass
    with exclusive_run(run_paths("one"), "vstar"):
        pass
    assert store.names() == []


@pytest.mark.parametrize("then", ["gives way", "holds it", "stays"])
def test_of_jobs_that_come_at_the_same_time_one_gets_the_run(
    machines: Machines, store: Store, monkeypatch: pytest.MonkeyPatch, then: str
) -> None:
    rival, pauses = "one/.leases/vstar-1-of-1.rival.json", []

    def asks(is_held: bool) -> None:
        store.put(rival, json.dumps({"holder": "7 elsewhere", "copy": "other", "is_held": is_held}).encode())

    def pause(seconds: float) -> None:
        assert [name for name in store.names() if ".leases" in name] == [rival], "this job gave way"
        pauses.append(seconds)
        if then == "gives way":
            store.remove(rival)
        elif then == "holds it":
            asks(is_held=True)

    asks(is_held=False)
    monkeypatch.setattr(leases, "sleep", pause)
    refusal = pytest.raises(UserError, match=r"another vstar job \(process 7 elsewhere\) is writing to")
    with nullcontext() if then == "gives way" else refusal, exclusive_run(run_paths("one"), "vstar"):
        assert then == "gives way"
    assert len(pauses) == (leases.ATTEMPTS - 1 if then == "stays" else 1)
    assert store.names() == ([] if then == "gives way" else [rival])


@pytest.fixture
def killed_holder(machines: Machines) -> Callable[[], None]:
    """Takes the run "one" on the present machine, in a process that is then killed."""

    def hold_and_die() -> None:
        order = json.dumps({"run": "one", "job": "vstar"})
        job = subprocess.Popen(
            [sys.executable, "-m", "tests.object_store", order],
            cwd=REPOSITORY,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        with job:
            assert job.stdout is not None
            assert job.stdout.readline() == "holding\n"
            job.kill()

    return hold_and_die


def test_the_claim_of_a_killed_job_ends_when_it_has_not_been_renewed(
    killed_holder: Callable[[], None],
    machines: Machines,
    store: Store,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    killed_holder()
    machines.use("second")
    with pytest.raises(UserError, match="is writing to"), exclusive_run(run_paths("one"), "vstar"):
        raise AssertionError("the claim was young")
    monkeypatch.setattr(leases, "SECONDS", 2.0)
    deadline = time.monotonic() + 20
    while True:
        try:
            with exclusive_run(run_paths("one"), "vstar"):
                assert len(store.names()) == 1
                break
        except UserError:
            assert time.monotonic() < deadline
            time.sleep(0.5)
    assert store.names() == []


def test_on_its_own_machine_the_claim_of_a_killed_job_has_ended(
    killed_holder: Callable[[], None], store: Store
) -> None:
    killed_holder()
    with exclusive_run(run_paths("one"), "vstar"):
        pass
    assert store.names() == []


def test_a_job_whose_lease_was_taken_puts_nothing_any_more(
    machines: Machines, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(leases, "SECONDS", 1e9)  # no renewal besides
    with exclusive_run(run_paths("one"), "vstar"):
        write_text(run_paths("one").config, "{}")
        [lease] = [name for name in store.names() if ".leases" in name]
        store.remove(lease)
        monkeypatch.setattr(leases, "SECONDS", 0.0)
        with pytest.raises(UserError, match="another job has taken the run over"):
            write_text(run_paths("one").config, "changed")
    assert store.read("one/config.json") == b"{}"


def test_a_renewal_whose_answer_was_lost_takes_no_lease_away(machines: Machines, store: Store) -> None:
    with exclusive_run(run_paths("one"), "vstar"):
        [name] = [name for name in store.names() if ".leases" in name]
        store.put(name, store.read(name) + b" ")  # what this job has put, as far as the store knows
        [lease] = leases._held
        lease.renew()
        write_text(run_paths("one").config, "{}")
        store.remove(name)
        with pytest.raises(UserError):
            lease.renew()
        with pytest.raises(UserError, match="another job has taken the run over"):
            write_text(run_paths("one").config, "changed")
    assert store.read("one/config.json") == b"{}"


def test_a_store_that_cannot_be_reached_is_named_without_credentials(store: Store, tmp_path: Path) -> None:
    arguments = ["inspect", "--run", "test"]
    closed = {**environment("http://me:hidden@127.0.0.1:9"), "AWS_MAX_ATTEMPTS": "1"}
    result = subprocess.run(
        [sys.executable, REPOSITORY / "cli.py", *arguments],
        env={**os.environ, **closed, "ASTAR_PO_CACHE": str(tmp_path / "cache")},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert result.returncode == 2
    assert result.stderr.startswith(f"error: cannot reach {store.url}/test: ")
    assert result.stderr.count("\n") == 1
    for secret in (KEY, SECRET, "hidden"):
        assert secret not in result.stderr


def test_an_address_that_is_no_url_is_named(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "minio:9000")
    with pytest.raises(
        UserError, match=rf"^cannot reach {store.url}/test: Invalid endpoint: minio:9000; check"
    ):
        objects.listing(f"{store.url}/test")


def test_the_command_line_takes_urls_and_shows_them(
    tiny_model: Path,
    data_file: Path,
    engines: Engines,
    store: Store,
    run_cli: RunCli,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("ASTAR_PO_ARTIFACTS", store.url)
    run(tiny_config(tiny_model, data_file))
    table, other = f"{store.url}/test/vstar.parquet", f"{store.url}/other/vstar.parquet"
    rescored = run_cli("rescore", "--vstar", table, "--beta1", "0.25", "-o", other, warm=True)
    assert rescored.stdout.startswith(f"{other}: {QUESTIONS} prompts, β1 0.5 → 0.25, "), rescored.stderr
    assert {"other/vstar.parquet", "test/vstar.parquet"} < set(store.names())
    inspected = run_cli("inspect", "--vstar", other, "--json", warm=True)
    assert json.loads(inspected.stdout)["prompts"] == QUESTIONS
    refused = run_cli("inspect", "--vstar", "s3://user:hush-hush@bucket/x.parquet", warm=True)
    assert (refused.returncode, refused.stdout) == (2, "")
    assert refused.stderr.startswith("error: the URL of s3://bucket/x.parquet was given with a user")
    assert "hush" not in refused.stderr


def test_no_file_of_a_run_contains_a_credential(
    tiny_model: Path, data_file: Path, engines: Engines, machines: Machines, store: Store, tmp_path: Path
) -> None:
    from common.report import write_report
    from common.terminal.console import Terminal

    printed = run(tiny_config(tiny_model, data_file))
    with (tmp_path / "printed").open("w") as output:
        write_report(run_paths("test"), Terminal(file=output), before_training=["vstar"])
    everything = store.download(tmp_path / "all")
    assert (everything / "test" / "report" / "report.html").exists()
    assert read_vstar(everything / "test" / "vstar.parquet")[0].height == QUESTIONS
    secrets = (KEY.encode(), SECRET.encode())
    for file in [*everything.rglob("*"), *machines.use("first").rglob("*"), tmp_path / "printed"]:
        assert not file.is_file() or not any(secret in file.read_bytes() for secret in secrets), file
    assert not any(secret.decode() in printed for secret in secrets)
