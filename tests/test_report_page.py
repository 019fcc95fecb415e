"""The page of a run: its content, and that model output stays text in it, in a real browser too."""

import io
import json
import re
import shutil
from collections.abc import Iterator
from html import unescape
from itertools import pairwise
from pathlib import Path
from typing import Any

import polars as pl
import pytest

from common.errors import DamagedFile
from common.provenance import Allowance, Provenance
from common.report import write_report
from common.report.browser import SAMPLES_SHOWN, read_samples
from common.report.cost import stage2_cost
from common.report.page import duration, flat
from common.report.stage1 import PROMPTS_SHOWN, read_stage1
from common.report.text import CHARACTERS_SHOWN, visible
from common.rollout import SampleRequest
from common.runs import RunPaths, run_paths
from common.store import SampleStore, completion_hash, sample_files
from common.terminal.console import Terminal
from stage1_vstar.filter import Rule, filter_prompts
from stage1_vstar.sweep_run import run_sweep
from tests.chromium import Browser, needs_chromium
from tests.fakes import (
    CONTEXT,
    IDENTITY,
    ScriptedEngine,
    change_json,
    sample_rows,
    tiny_config,
    write_artifact,
)
from tests.stage1_runs import Engines, rows_of, run, write_questions

RAW = (
    "<script>document.title='owned'</script> #### 1",
    "</textarea><img src=x onerror=\"document.title='owned'\"> #### 2",
    "</pre></details></section><h1>mine</h1><style>body{display:none}</style><base href='http://x/'>",
    "{{ 7 * 191 }} {% include 'page.css' %} &lt;b&gt;",
)
UNSEEN = "\u202etxet\u2066 \x1b[31mred\x00\x07\x7f\u200b\ufeff\U000e0041"
MEGABYTE = "long " * 200_000
WRITTEN = (*RAW, UNSEEN, MEGABYTE, "half \ud800 a pair", "W" * 3000)


@pytest.fixture(scope="module")
def hostile(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunPaths]:
    """A run whose model writes each of WRITTEN once to every prompt, with its page."""
    folder = tmp_path_factory.mktemp("hostile")

    def write(request: SampleRequest) -> str:
        assert isinstance(request.key, tuple)
        return WRITTEN[request.key[1]]

    engines = Engines()
    engines.next = ScriptedEngine(write)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ASTAR_PO_ARTIFACTS", str(folder / "artifacts"))
        patch.setattr("tests.stage1_runs.engine_builder", engines.build)
        config = tiny_config(
            tiny_model, write_questions(folder / "data.jsonl"), vstar={"num_samples": len(WRITTEN)}
        )
        run(config)
        yield reported(run_paths("test"))


@pytest.fixture
def copy(hostile: RunPaths, tmp_path: Path) -> RunPaths:
    """That run, to do things to."""
    return RunPaths(Path(shutil.copytree(hostile.root, tmp_path / "copy")))


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with Browser(tmp_path_factory.mktemp("profile")) as opened:
        yield opened


def reported(paths: RunPaths) -> RunPaths:
    write_report(paths, Terminal(file=io.StringIO(), width=80))
    return paths


def html(paths: RunPaths) -> str:
    return (paths.report / "report.html").read_text(encoding="utf-8")


def text_of(paths: RunPaths) -> str:
    """The page's text without tags, every run of blanks as one."""
    body = re.sub(r"<style>.*</style>", "", html(paths), flags=re.DOTALL)
    return " ".join(unescape(re.sub(r"<[^>]*>", " ", body)).split())


def open_everything(browser: Browser) -> None:
    browser.evaluate("document.querySelectorAll('details').forEach(each => each.open = true)")


@needs_chromium
def test_what_models_wrote_is_text_in_a_browser(hostile: RunPaths, browser: Browser) -> None:
    browser.open(hostile.report / "report.html")
    assert browser.evaluate("document.title") == "test · astar-po run"
    assert browser.evaluate("document.querySelectorAll('script, textarea, base, [onerror]').length") == 0
    assert browser.evaluate("document.querySelectorAll('h1, style').length") == 2
    assert browser.evaluate("[...document.images].every(each => each.src.startsWith('data:'))")
    shown = browser.evaluate("[...document.querySelectorAll('.sample pre')].map(each => each.textContent)")
    assert set(RAW) <= set(shown)


@needs_chromium
@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_the_page_fits_a_phone_loads_nothing_and_has_no_errors(
    hostile: RunPaths, browser: Browser, dark: bool
) -> None:
    browser.open(hostile.report / "report.html", width=360, dark=dark)
    open_everything(browser)
    assert browser.content_width() == 360
    assert browser.requests() == []
    assert browser.complaints() == []
    channels = re.findall(r"\d+", browser.evaluate("getComputedStyle(document.body).backgroundColor"))
    assert (max(map(int, channels)) < 64) is dark
    assert browser.evaluate("[...document.images].every(each => each.complete && each.naturalWidth > 0)")


@needs_chromium
def test_the_page_looks_the_same_without_scripts(hostile: RunPaths, browser: Browser, tmp_path: Path) -> None:
    for scripts in (True, False):
        browser.open(hostile.report / "report.html", scripts=scripts)
        browser.screenshot(tmp_path / f"{scripts}.png")
    assert (tmp_path / "True.png").read_bytes() == (tmp_path / "False.png").read_bytes()


@needs_chromium
def test_the_policy_stops_what_escaping_would_let_through(copy: RunPaths, browser: Browser) -> None:
    page = copy.report / "report.html"
    slipped = (
        "<script>document.title='owned'</script><img src='file:///x.png'><style>body{display:none}</style>"
    )
    page.write_text(html(copy).replace("</header>", f"{slipped}</header>"), encoding="utf-8")
    browser.open(page)
    assert browser.evaluate("document.title") == "test · astar-po run"
    assert browser.evaluate("getComputedStyle(document.body).display") == "block"
    assert len([line for line in browser.complaints() if "Content Security Policy" in line]) == 3


@needs_chromium
def test_a_prompt_opens_from_the_keyboard(hostile: RunPaths, browser: Browser) -> None:
    browser.open(hostile.report / "report.html")
    browser.evaluate("document.querySelector('summary').focus()")
    assert not browser.evaluate("document.querySelector('details').open")
    for kind in ("keyDown", "keyUp"):
        browser("Input.dispatchKeyEvent", type=kind, key="Enter", text="\r", windowsVirtualKeyCode=13)
    assert browser.evaluate("document.querySelector('details').open")


@needs_chromium
def test_paper_shows_what_is_folded_away_on_the_screen(hostile: RunPaths, browser: Browser) -> None:
    browser.open(hostile.report / "report.html")
    is_visible = "document.querySelector('.sample pre').checkVisibility()"
    height = "document.querySelector('details').getBoundingClientRect().height"
    assert not browser.evaluate(is_visible)
    folded = browser.evaluate(height)
    browser("Emulation.setEmulatedMedia", media="print")
    assert browser.evaluate(is_visible)
    assert browser.evaluate(height) > 10 * folded


@needs_chromium
def test_headings_go_down_step_by_step_and_pictures_have_words(hostile: RunPaths, browser: Browser) -> None:
    browser.open(hostile.report / "report.html")
    levels = browser.evaluate("[...document.querySelectorAll('h1,h2,h3,h4')].map(each => +each.tagName[1])")
    assert levels[:2] == [1, 2]
    assert all(below - above <= 1 for above, below in pairwise(levels))
    words = browser.evaluate("[...document.images].map(each => each.alt)")
    assert all(each.endswith("prompts are kept for training.") for each in words)
    links = browser.evaluate("[...document.querySelectorAll('nav a')].map(each => each.hash.slice(1))")
    assert links == browser.evaluate("[...document.querySelectorAll('section')].map(each => each.id)")


def test_unseen_characters_are_marked_and_lines_stay_lines() -> None:
    assert visible("a<b\n\tc") == "a&lt;b\n\tc"
    signs = re.findall(r'<span class="unseen">(.*?)</span>', visible(UNSEEN))
    assert signs == [
        "U+202E",
        "U+2066",
        "U+001B",
        "U+0000",
        "U+0007",
        "U+007F",
        "U+200B",
        "U+FEFF",
        "U+E0041",
    ]
    assert re.sub(r"<span.*?</span>", "", visible(UNSEEN)) == "txet [31mred"


def test_a_long_completion_is_cut_with_a_note_and_a_lone_surrogate_is_mentioned(hostile: RunPaths) -> None:
    assert f"Cut: the first {CHARACTERS_SHOWN:,} of {len(MEGABYTE):,} characters." in text_of(hostile)
    assert "half ��� a pair" in text_of(hostile)
    assert "It held lone surrogates" in text_of(hostile)
    assert len(html(hostile)) < 1_500_000


def test_the_outcome_table_counts_every_completion(hostile: RunPaths) -> None:
    expected = rows_of()["outcomes"].explode().value_counts()
    rows = re.findall(r"<tr><th scope=\"row\">(\w+)<small>.*?</small></th><td[^>]*>(\d+)</td>", html(hostile))
    assert {name: int(count) for name, count in rows} == dict(expected.iter_rows())


def test_the_same_run_gives_the_same_page(copy: RunPaths) -> None:
    before = html(reported(copy))
    assert html(reported(copy)) == before


def test_all_of_the_provenance_is_there(hostile: RunPaths) -> None:
    provenance = read_stage1(hostile.vstar).provenance
    everything = [*flat(provenance.identity), *flat(provenance.context)]
    assert len(everything) > 20
    for name, value in everything:
        assert f"{name} {' '.join(value.split())}" in text_of(hostile)


def test_stage_one_says_what_it_cost(hostile: RunPaths) -> None:
    provenance = read_stage1(hostile.vstar).provenance
    recorded = provenance.context["cost"]
    tokens = int(rows_of()["completion_tokens"].list.sum().sum())
    store = SampleStore(hostile.samples, provenance)
    assert recorded == {
        "seconds": store.seconds(),
        "loading_seconds": store.loading_seconds(),
        "devices": 1,
    }
    assert 0 < recorded["loading_seconds"] < recorded["seconds"]
    assert recorded["seconds"] > 0
    assert f"stage 1 {duration(recorded['seconds'])} {tokens:,}" in text_of(hostile)


def test_stage_two_costs_what_its_iterations_and_evaluations_took() -> None:
    metrics: list[dict[str, float]] = [{"iteration": 0, "time/evaluate": 10.0, "evaluate/pass_at_1": 0.5}]
    step = {"time/rollout": 20.0, "time/update": 30.0, "throughput/completion_tokens_per_second": 8.0}
    metrics += [{"iteration": n, "time/iteration": 55.0, "train/processes": 4.0, **step} for n in (1, 2)]
    cost = stage2_cost(metrics)
    assert (cost.seconds, cost.tokens, cost.devices) == (120.0, 880, 4)
    assert cost.device_hours == pytest.approx(120 * 4 / 3600)
    assert cost.parts == [("rollouts, with grading", 40.0), ("updates", 60.0), ("evaluations", 10.0)]
    del metrics[1]["train/processes"]
    assert stage2_cost(metrics).device_hours is None


@pytest.mark.parametrize(
    ("seconds", "words"),
    [(0.04, "0.0 s"), (59.94, "59.9 s"), (3599.4, "59 min 59 s"), (90061, "25 h 01 min")],
)
def test_durations_have_the_units_that_a_reader_would_choose(seconds: float, words: str) -> None:
    assert duration(seconds) == words


def test_a_machine_without_the_samples_shows_the_prompts_alone(copy: RunPaths) -> None:
    shutil.rmtree(copy.samples)
    text = text_of(reported(copy))
    assert "Its completions are not on this machine." in text
    assert "How many is 3?" in text


def test_samples_that_cannot_be_read_are_mentioned_and_the_rest_is_there(copy: RunPaths) -> None:
    for file in sample_files(copy.samples):
        file.write_bytes(b"PAR1 no more")
    text = text_of(reported(copy))
    assert "The samples could not be read:" in text
    assert "How completions ended" in text


def artifact_of(folder: Path, outcomes: dict[str, list[str]], **options: Any) -> RunPaths:
    paths = RunPaths(folder)
    write_artifact(paths.vstar, outcomes, **options)
    return paths


def test_prompts_are_chosen_for_their_reason(tmp_path: Path) -> None:
    outcomes = {f"p{solved}": ["correct"] * solved + ["wrong"] * (8 - solved) for solved in range(9)}
    outcomes["q1"] = ["unparsed"] * 3 + ["wrong"] * 5
    outcomes["q2"] = ["verifier_timeout"] + ["wrong"] * 7
    paths = artifact_of(tmp_path, outcomes)
    chosen = {reason.title: rows["prompt_id"].to_list() for reason, rows in read_stage1(paths.vstar).chosen}
    assert chosen == {
        "Most disputed": ["p4", "p3", "p5", "p2", "p6"],
        "Worst": ["p0", "q1", "q2", "p1", "p2"],
        "Best": ["p8", "p7", "p6", "p5", "p4"],
        "Grader problems": ["q2", "q1"],
    }


def test_a_table_read_in_parts_is_summed_up_as_one_read_whole(
    hostile: RunPaths, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = read_stage1(hostile.vstar)
    monkeypatch.setattr("common.contract.BATCH_ROWS", 2)
    parts = read_stage1(hostile.vstar)
    assert parts.prompts.equals(whole.prompts)
    assert parts.outcomes.equals(whole.outcomes)
    for (_, some), (_, same) in zip(parts.chosen, whole.chosen, strict=True):
        assert some.equals(same)
        assert 0 < some.height <= PROMPTS_SHOWN


def test_dropped_prompts_are_counted_by_their_rule(tmp_path: Path) -> None:
    paths = artifact_of(
        tmp_path, {f"p{solved}": ["correct"] * solved + ["wrong"] * (4 - solved) for solved in range(5)}
    )
    rules = [
        Rule(name="<none>", drops=pl.col("pass_rate") == 0),
        Rule(name="hard", drops=pl.col("pass_rate") < 0.6),
    ]
    filter_prompts(paths.vstar, None, rules)
    text = text_of(reported(paths))
    assert "dropped by prompts hard 2 <none> 1" in text
    assert "kept for training 2" in text


def test_only_the_chosen_prompts_samples_are_read(tmp_path: Path) -> None:
    provenance = Provenance(identity=IDENTITY, context=CONTEXT)
    SampleStore(tmp_path, provenance).append(
        sample_rows({f"p{number}": ["wrong", "correct"] for number in range(50)}).to_dicts()
    )
    found = read_samples(tmp_path, provenance, {"p7", "p31"})
    assert {name: [each.outcome for each in some] for name, some in found.items()} == {
        "p7": ["wrong", "correct"],
        "p31": ["wrong", "correct"],
    }


def test_of_many_completions_the_best_and_the_worst_are_shown(tmp_path: Path) -> None:
    rewards = [float(number * 7 % 40) for number in range(40)]
    paths = artifact_of(tmp_path, {"p": ["wrong"] * 40}, rewards={"p": rewards})
    store = SampleStore(paths.samples, Provenance(identity=IDENTITY, context=CONTEXT))
    store.append(sample_rows({"p": ["wrong"] * 40}, {"p": rewards}).to_dicts())
    shown = {float(reward) for reward in re.findall(r"reward (\d+)", text_of(reported(paths)))}
    half = SAMPLES_SHOWN // 2
    assert shown == {*map(float, range(half)), *map(float, range(40 - half, 40))}
    assert f"{SAMPLES_SHOWN} of its 40 completions are shown." in text_of(paths)


def test_grades_are_those_of_the_tables_grader(tmp_path: Path) -> None:
    """After `regrade` and a new `vstar` the samples' own grades are not the ones that V̂* was made of."""
    identity = {**IDENTITY, "grader": "math/1"}
    paths = artifact_of(tmp_path, {"p": ["correct", "wrong"]}, identity=identity)
    first = SampleStore(paths.samples, Provenance(identity=IDENTITY, context=CONTEXT))
    first.append(sample_rows({"p": ["unparsed", "wrong"]}).to_dicts())
    judged = completion_hash("#### 0", None)
    verdict = {
        "completion_hash": judged,
        "outcome": "correct",
        "extracted": "half",
        "reward": 1.0,
        "reason": None,
    }
    second = read_stage1(paths.vstar).provenance
    SampleStore(paths.samples, second, Allowance(["grader"])).add_grades(
        [{"prompt_id": "p", "sample_index": 0, **verdict}]
    )
    [one, two] = read_samples(paths.samples, second, {"p"})["p"]
    assert (one.outcome, one.extracted, one.reward) == ("correct", "half", 1.0)
    assert two.outcome == "wrong"


def test_regrades_and_a_sweep_have_their_sections(copy: RunPaths) -> None:
    assert "sweep" not in html(copy)
    run_sweep(copy.vstar)
    summary = {
        "before": "gsm8k/1",
        "after": "<b>math/1",
        "prompts": 6,
        "changed_prompts": 2,
        "changed_outcomes": {"wrong → correct": 1234},
        "pass_rate": {"before": 0.25, "after": 0.5},
        "mean_vstar": {"before": 0.3, "after": 0.6},
        "mean_absolute_delta_vstar": 0.1,
    }
    folder = copy.root / "regraded" / "math-1"
    folder.mkdir(parents=True)
    (folder / "summary.json").write_text(json.dumps(summary))
    text = text_of(reported(copy))
    assert "gsm8k/1 → <b>math/1 2 of 6 prompts change." in text
    assert "wrong → correct 1,234" in text
    assert html(copy).count("<img") == 3
    assert "If prompts with pass@N = 0 are dropped" in text


@pytest.mark.parametrize("content", ["", "[]", '{"samples": 3}', '{"by_num_samples": {', "of these samples"])
def test_a_damaged_sweep_is_named(tmp_path: Path, content: str) -> None:
    paths = artifact_of(tmp_path / "mine", {"p": ["correct", "wrong"]})
    run_sweep(paths.vstar, beta1=["inf"])
    document = paths.report / "sweep.json"
    if content == "of these samples":
        change_json(document, by_num_samples=[{"num_samples": 1}])
    else:
        document.write_text(content)
    with pytest.raises(
        DamagedFile, match=r"report/sweep\.json is damaged: .*; .* `python cli\.py sweep --run mine`"
    ):
        reported(paths)


@pytest.mark.parametrize("content", ["", "null", '{"before": "gsm8k/1"}'])
def test_a_damaged_summary_of_a_regrade_is_named(tmp_path: Path, content: str) -> None:
    paths = artifact_of(tmp_path, {"p": ["correct", "wrong"]})
    folder = paths.regraded / "math-1"
    folder.mkdir(parents=True)
    (folder / "summary.json").write_text(content)
    with pytest.raises(
        DamagedFile, match=r"math-1/summary\.json is damaged: .*; .* `python cli\.py regrade`"
    ):
        reported(paths)


def test_a_config_that_is_no_text_is_shown_as_far_as_it_is(tmp_path: Path) -> None:
    paths = artifact_of(tmp_path, {"p": ["correct", "wrong"]})
    paths.config.write_bytes(b'{"run": "\xff mine"}')
    assert '{"run": "� mine"}' in text_of(reported(paths))


@pytest.mark.parametrize(
    ("left", "renewed"),
    [
        ("of other samples", True),
        ("by an older program", True),
        ("without its drawing", True),
        ("with another drawing", True),
        ("of another file", False),
        ("then filtered", False),
    ],
)
def test_a_sweep_of_other_samples_is_not_shown_as_the_runs_own(
    tmp_path: Path, left: str, renewed: bool
) -> None:
    outcomes = {"p": ["correct", "wrong"], "q": ["wrong", "wrong"]}
    paths = artifact_of(tmp_path / "mine", outcomes)
    other = write_artifact(paths.root / "other.parquet", {"p": ["correct", "correct"]})
    run_sweep(other if left == "of another file" else paths.vstar, beta1=["inf"])
    document, drawing = paths.report / "sweep.json", paths.report / "sweep.svg"
    if left == "of other samples":
        write_artifact(paths.vstar, {**outcomes, "q": ["wrong", "correct"]})
    elif left == "by an older program":
        document.write_text(
            json.dumps({"by_num_samples": json.loads(document.read_text())["by_num_samples"]})
        )
    elif left == "without its drawing":
        drawing.unlink()
    elif left == "with another drawing":
        drawing.write_text(drawing.read_text().replace("</svg>", "<!-- --></svg>"))
    elif left == "then filtered":
        filter_prompts(paths.vstar, None, [Rule(name="unsolved", drops=pl.col("pass_at_n") == 0)])
    text = text_of(reported(paths))
    assert ("To renew it: python cli.py sweep --run mine" in text) is renewed
    assert ("Other β₁ and N, from the same samples" in text) is (left == "then filtered")
    assert html(paths).count("<img") == (3 if left == "then filtered" else 2)
