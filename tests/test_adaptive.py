"""Adaptive N: only wide intervals get more samples, within the budget, the same ones however often a job is killed."""

import json
import math
import re
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest

from benchmarks.adaptive import WAYS, compare, from_rewards, prompts_like, stopping_bias
from benchmarks.adaptive import main as benchmark
from common.config import SamplingParams
from common.data.prompts import prompt_id
from common.errors import UserError
from common.provenance import read_provenance
from common.rollout import Completion, SampleRequest
from common.runs import WHOLE, Shard, run_paths
from common.sampling import writer as writer
from common.store import addresses, sample_files
from common.value import Floats
from common.vstar_file import read_vstar, write_vstar
from stage1_vstar.adaptive import (
    Allocation,
    Draw,
    Rule,
    allocate,
)
from stage1_vstar.describe import describe, to_json
from stage1_vstar.uncertainty import interval, plugin_bias
from stage2_train.config import Config
from tests.conftest import RunCli
from tests.fakes import EngineDied, ScriptedEngine, tiny_config
from tests.stage1_runs import Engines, contents, rows_of, run, scripted_engines, stored

QUESTIONS = 24
ANSWERS = {prompt_id(f"How many is {n}?", str(1 + n % 4)): str(1 + n % 4) for n in range(QUESTIONS)}
FIRST = 6
BETA1 = 0.5
RULE = Rule(target_se=0.09, budget=500)
UNLIMITED = 10**9


def kind(prompt: str) -> int:
    """0: the policy nearly always solves it, 1: never, 2: every other time."""
    return int(prompt[:4], 16) % 3


def write(request: SampleRequest) -> str:
    assert isinstance(request.key, tuple)
    prompt = request.key[0]
    right = kind(prompt) == 0 or (kind(prompt) == 2 and request.seed % 2)
    return f"#### {ANSWERS[prompt] if right else 99}"


class DyingEngine(ScriptedEngine):
    """Dies where it would draw one sample more than it may."""

    def __init__(self, samples: int) -> None:
        super().__init__(write)
        self._may_draw = samples

    def generate(self, requests: Iterable[SampleRequest], sampling: SamplingParams) -> Iterator[Completion]:
        for completion in super().generate(requests, sampling):
            if self._may_draw == 0:
                raise EngineDied
            self._may_draw -= 1
            yield completion


@pytest.fixture
def engines(monkeypatch: pytest.MonkeyPatch, artifacts: Path) -> Iterator[Engines]:
    for scripted in scripted_engines(monkeypatch, artifacts):
        scripted.next = ScriptedEngine(write)
        yield scripted


@pytest.fixture
def config(tiny_model: Path, tmp_path: Path) -> Config:
    return configured(tiny_model, tmp_path)


def configured(model: Path, folder: Path, run: str = "test", **sections: Any) -> Config:
    lines = [f'{{"prompt": "How many is {n}?", "answer": "{1 + n % 4}"}}' for n in range(QUESTIONS)]
    (folder / "data.jsonl").write_text("\n".join(lines))
    vstar = {"num_samples": FIRST, "beta1": BETA1, **sections.pop("vstar", {})}
    return tiny_config(model, folder / "data.jsonl", run=run, vstar=vstar, **sections)


def start(config: Config, rule: Rule | None = RULE, shard: Shard = WHOLE) -> str:
    return run(config, shard, adaptive=rule)


def widths(rows: pl.DataFrame, first: int | None = None) -> Floats:
    """The width of each row's interval, from its first samples only if so many are given."""
    rewards = rows["rewards"] if first is None else rows["rewards"].list.head(first)
    counts = rewards.list.len().to_numpy().astype(np.int64)
    found = interval(rewards.explode().to_numpy(), counts, BETA1)
    return np.asarray(found.high_P - found.low_P)


def record(run: str = "test") -> dict[str, Any]:
    return dict(read_provenance(run_paths(run).vstar).context["adaptive"])


# The rule.


def first_of(rewards_PN: Floats) -> Draw:
    """The first of these rewards of each prompt, as `allocate` asks for them."""
    return lambda places_W, sizes_W: np.concatenate(
        [rewards_PN[place, :size] for place, size in zip(places_W, sizes_W, strict=True)]
    )


def simulated(pass_rates: list[float], most: int = 4000) -> Floats:
    """So many rewards of each prompt."""
    random_PN = np.random.default_rng(0).random((len(pass_rates), most))
    return (random_PN < np.array(pass_rates)[:, None]).astype(np.float64)


RATES = [0.0, 0.02, 0.1, 0.3, 0.5, 0.7, 0.9, 1.0] * 5


def step(rewards_N: Floats, rule: Rule) -> int:
    """How many samples a prompt with these gets in the next round, 0 for none; the rule anew, a prompt at a time."""
    size = len(rewards_N)
    found = interval(rewards_N, np.array([size]), BETA1)
    excess = round(float(found.high_P[0] - found.low_P[0]), 9) / round(2 * 1.96 * rule.target_se, 9)
    return math.ceil(min(max(size * (excess**2 - 1), size / 4), size)) if excess > 1 else 0


def size_by_size(rewards_N: Floats, rule: Rule, first: int) -> int:
    """How many samples one prompt ends with when no budget binds."""
    size = first
    while more := step(rewards_N[:size], rule):
        size += more
    return size


def test_each_prompt_is_sampled_until_its_own_interval_is_narrow() -> None:
    rewards_PN, rule = simulated(RATES), Rule(target_se=0.05, budget=UNLIMITED)
    found = allocate(rule, 8, BETA1, first_of(rewards_PN), len(rewards_PN))
    assert found.sizes_P.tolist() == [size_by_size(rewards_N, rule, 8) for rewards_N in rewards_PN]
    assert found.still_wide == 0
    assert found.sizes_P.min() < found.sizes_P.max() / 4
    assert sum(each.samples for each in found.rounds) == found.sizes_P.sum()
    assert [each.left for each in found.rounds][-1] == UNLIMITED - found.sizes_P.sum()


@pytest.mark.parametrize("budget", [320, 321, 350, 640, 1000, 2500])
def test_the_budget_is_used_up_and_never_exceeded_and_goes_to_the_widest_first(budget: int) -> None:
    first = first_of(simulated(RATES))
    found = allocate(Rule(target_se=0.05, budget=budget), 8, BETA1, first, len(RATES))
    assert found.sizes_P.sum() == budget
    assert found.rounds[-1].left == 0
    assert found.still_wide > 0
    if budget == 350:
        sizes_8 = np.full(40, 8)
        there = interval(first(np.arange(40), sizes_8), sizes_8, BETA1)
        width_P = np.round(there.high_P - there.low_P, 9)
        assert width_P[found.sizes_P > 8].min() >= width_P[found.sizes_P == 8].max()


def test_a_first_success_does_not_end_a_prompts_sampling() -> None:
    for place in range(40):
        rewards_N = np.zeros(4000)
        rewards_N[place] = 1.0
        rule = Rule(target_se=0.05, budget=UNLIMITED)
        size = allocate(rule, 8, BETA1, first_of(rewards_N[None]), 1).sizes_P[0]
        assert size > place + 1
        found = interval(rewards_N[:size], np.array([size]), BETA1)
        assert found.high_P[0] - found.low_P[0] <= 2 * 1.96 * 0.05


def test_rewards_of_any_size_are_sampled_until_narrow() -> None:
    random = np.random.default_rng(0)
    rewards_PN = random.choice([-2.0, 0.0, 0.5, 3.0], p=[0.3, 0.3, 0.2, 0.2], size=(20, 8000))
    first = first_of(rewards_PN)
    found = allocate(Rule(target_se=0.1, budget=UNLIMITED), 8, 1.0, first, 20)
    rewards_S = first(np.arange(20), found.sizes_P)
    bounds = interval(rewards_S, found.sizes_P, 1.0, limits=(-2.0, 3.0))
    assert found.still_wide == 0
    assert (bounds.high_P - bounds.low_P <= 2 * 1.96 * 0.1 + 1e-9).all()
    assert found.sizes_P.min() > 8


# What it does to V̂*.


def exact_bias(pass_rate: float, rule: Rule, first: int) -> float:
    """The bias of V̂* under the rule without a budget, summed over all that can happen to one prompt."""
    alive, bias, grow = {(0, 0): (1.0, first)}, 0.0, math.exp(1 / BETA1) - 1
    while alive:
        reached: dict[tuple[int, int], float] = {}
        for (successes, size), (chance, many) in alive.items():
            for more in range(many + 1):
                weight = math.comb(many, more) * pass_rate**more * (1 - pass_rate) ** (many - more)
                place = (successes + more, size + many)
                reached[place] = reached.get(place, 0.0) + chance * weight
        alive = {}
        for (successes, size), chance in reached.items():
            if many := step(np.repeat([1.0, 0.0], [successes, size - successes]), rule):
                alive[successes, size] = (chance, many)
            else:
                estimate = BETA1 * math.log1p(successes / size * grow)
                bias += chance * (estimate - BETA1 * math.log1p(pass_rate * grow))
    return bias


@pytest.mark.parametrize("successes", [6, 20, 44])
def test_the_simulated_bias_is_the_exact_one(successes: int) -> None:
    rewards_S = np.repeat([1.0, 0.0], [successes, 64 - successes])
    prompts = 20_000
    fresh, truth_P = from_rewards(
        rewards_S, np.array([64]), np.zeros(prompts, dtype=np.intp), BETA1, np.random.default_rng(1)
    )
    rule = Rule(target_se=0.1, budget=UNLIMITED)
    found = compare(rule, 8, BETA1, fresh, truth_P)
    p = successes / 64
    even, rest = divmod(int(found.allocation.sizes_P.sum()), prompts)
    share = rest / prompts
    fixed = (1 - share) * plugin_bias(p, even, BETA1) + share * plugin_bias(p, even + 1, BETA1)
    for way, expected in ((WAYS[0], exact_bias(p, rule, 8)), (WAYS[2], float(fixed))):
        errors_P = found.errors[way]
        assert abs(errors_P.mean() - expected) < 4 * errors_P.std() / math.sqrt(prompts), way


def test_where_nothing_is_wide_adaptive_is_fixed() -> None:
    rewards_S = np.repeat([1.0, 0.0], [5, 3])
    found = stopping_bias(Rule(target_se=1.0, budget=8), 8, BETA1, rewards_S, np.array([8]))
    assert set(found.allocation.sizes_P) == {8}
    errors = [errors_P.mean() for errors_P in found.errors.values()]
    spread = found.errors[WAYS[0]].std() / math.sqrt(len(found.allocation.sizes_P))
    assert max(errors) - min(errors) < 6 * spread
    assert max(errors) < 0  # the plug-in's own


@pytest.mark.parametrize("prompts", [1000, 1800, 5000])
def test_the_simulated_prompts_are_like_the_run_even_if_its_rows_are_sorted(prompts: int) -> None:
    # Rewards of three values are simulated by the prompt's own, so that V* is known exactly.
    rewards_S, counts_P = (
        np.repeat([0.0, 0.5, 1.0], [2 * prompts, 4 * prompts, 2 * prompts]),
        np.full(prompts, 8),
    )
    _, truth_P = prompts_like(rewards_S, counts_P, BETA1, 1000, np.random.default_rng(0))
    assert truth_P.mean() == pytest.approx(0.5, abs=4 * math.sqrt(1 / 8 / 1000))
    assert truth_P.std() == pytest.approx(math.sqrt(1 / 8), rel=0.1)


# On a run.


@pytest.mark.usefixtures("engines")
def test_only_the_prompts_whose_interval_is_wide_get_more_samples(config: Config) -> None:
    printed = start(config, Rule(target_se=RULE.target_se, budget=UNLIMITED))
    rows, limit = rows_of(), 2 * 1.96 * RULE.target_se
    more = (rows["num_samples"] > FIRST).to_numpy()
    assert 0 < more.sum() < QUESTIONS
    assert (more == (widths(rows, FIRST) > limit)).all()
    assert (widths(rows) <= limit).all()
    assert stored().height == rows["num_samples"].sum()
    for row in rows.iter_rows(named=True):
        of_prompt = stored().filter(pl.col("prompt_id") == row["prompt_id"])
        assert of_prompt["sample_index"].to_list() == list(range(row["num_samples"]))
        assert of_prompt["reward"].to_list() == row["rewards"]
    assert (
        f"round 1: {more.sum()} of 24 intervals of V* wider than ±0.176; {more.sum()} prompts get" in printed
    )
    assert "no interval is wide" in printed
    found = record()
    assert found["rounds"][1]["wide"] == found["rounds"][1]["prompts"] == more.sum()
    assert found["samples"] == rows["num_samples"].sum()


@pytest.mark.usefixtures("engines")
@pytest.mark.parametrize("budget", [QUESTIONS * FIRST, QUESTIONS * FIRST + 1, 200, 261])
def test_a_run_draws_all_of_its_budget_and_never_more(config: Config, budget: int) -> None:
    printed = start(config, Rule(target_se=0.05, budget=budget))
    assert stored().height == rows_of()["num_samples"].sum() == budget
    assert "the budget is used up" in printed
    assert record()["still_wide"] > 0


def test_killed_again_and_again_at_round_boundaries_and_inside_rounds_a_run_ends_the_same(
    tiny_model: Path, tmp_path: Path, engines: Engines, monkeypatch: pytest.MonkeyPatch
) -> None:
    start(configured(tiny_model, tmp_path, "whole"))
    rounds = record("whole")["rounds"]
    assert len(rounds) >= 4
    monkeypatch.setattr(writer, "FRAGMENT_SAMPLES", 5)
    config, samples = configured(tiny_model, tmp_path), run_paths("test").samples
    boundaries = np.cumsum([each["samples"] for each in rounds])[:-1].tolist()
    for drawn in (1, *(at + offset for at in boundaries for offset in (-3, 0))):
        there = addresses(sample_files(samples)).height if sample_files(samples) else 0
        engines.next = DyingEngine(drawn - there)
        with pytest.raises(EngineDied):
            start(config)
    engines.next = ScriptedEngine(write)
    start(config)
    assert stored().equals(stored("whole"))
    assert rows_of().equals(rows_of("whole"))
    assert record() == record("whole")


def test_a_second_run_and_a_plain_one_do_nothing(config: Config, engines: Engines) -> None:
    start(config)
    before = contents(run_paths("test").root)
    assert "nothing to do" in start(config)
    plain = start(config, None)
    assert "was made with --adaptive 0.09 --budget 500, which stays in force" in plain
    assert "nothing to do" in plain
    assert engines.loaded == 1
    assert contents(run_paths("test").root) == before


@pytest.mark.usefixtures("engines")
def test_the_benchmark_tells_what_a_runs_rule_did_to_vstar(
    config: Config, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    start(config)
    monkeypatch.setattr("sys.argv", ["benchmarks.adaptive", "--run", "test"])
    benchmark()
    line = r"bias of V̂\* by simulation: adaptive [+-]0\.\d{4} ± .* fixed N .* \(RMSE 0\.\d{4}\)"
    assert re.search(line, capsys.readouterr().out)


@pytest.mark.usefixtures("engines")
def test_a_file_that_holds_what_an_earlier_version_simulated_is_read_and_kept(config: Config) -> None:
    start(config)
    path, bias = run_paths("test").vstar, {"adaptive": {"bias": 0.01, "bias_se": 0.001, "rmse": 0.1}}
    rows, provenance = read_vstar(path)
    context = {**provenance.context, "adaptive_bias": bias}
    write_vstar(rows, replace(provenance, context=context), path)
    assert "nothing to do" in start(config)
    assert json.loads(to_json(describe(path)))["context"]["adaptive_bias"] == bias


def test_without_the_file_the_same_samples_give_a_fixed_n_and_again_the_adaptive_one(
    config: Config, engines: Engines
) -> None:
    start(config)
    rows, samples = rows_of(), stored()
    run_paths("test").vstar.unlink()
    assert "stays in force" not in start(config, None)
    assert rows_of()["num_samples"].to_list() == [FIRST] * QUESTIONS
    assert rows_of()["rewards"].to_list() == rows["rewards"].list.head(FIRST).to_list()
    start(config)
    assert rows_of().equals(rows)
    assert stored().equals(samples)
    assert engines.loaded == 1


def test_a_larger_budget_and_a_tighter_target_draw_only_what_is_missing(
    tiny_model: Path, tmp_path: Path, config: Config, engines: Engines
) -> None:
    wider = Rule(target_se=0.07, budget=1500)
    start(configured(tiny_model, tmp_path, "at-once"), wider)
    engines.next = ScriptedEngine(write)
    start(config)
    there = set(engines.next.drawn)
    engines.next = ScriptedEngine(write)
    start(config, wider)
    assert not there & set(engines.next.drawn)
    assert rows_of().equals(rows_of("at-once"))
    assert record() == record("at-once")


@pytest.mark.usefixtures("engines")
def test_the_order_of_the_data_does_not_matter(config: Config, tiny_model: Path, tmp_path: Path) -> None:
    binding = Rule(target_se=0.05, budget=330)
    start(config, binding)
    turned = tmp_path / "turned.jsonl"
    turned.write_text("\n".join(reversed((tmp_path / "data.jsonl").read_text().splitlines())))
    start(configured(tiny_model, tmp_path, "turned", data={"path": str(turned)}), binding)
    assert record()["still_wide"] > 0
    assert rows_of("turned").sort("prompt_id").equals(rows_of().sort("prompt_id"))


def test_prompts_that_the_grader_cannot_use_take_no_part(config: Config, engines: Engines) -> None:
    path = Path(str(config.data.path))
    path.write_text(path.read_text() + '\n{"prompt": "How far?", "answer": "far"}')
    dropping = config.model_copy(update={"data": config.data.model_copy(update={"bad_golds": "drop"})})
    printed = start(dropping)
    assert printed.count("1 prompts dropped") == 1
    assert rows_of().height == QUESTIONS
    assert "nothing to do" in start(dropping)
    assert engines.loaded == 1


@pytest.mark.usefixtures("engines")
def test_a_grader_that_fails_on_just_the_wide_prompts_does_not_end_the_run(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "adaptive_test_reward.py").write_text(
        "def reward(prompt, completion, answer):\n    assert '99' not in completion\n    return 1.0\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    config = configured(tiny_model, tmp_path, grader={"name": "adaptive_test_reward:reward"})
    start(config, Rule(target_se=0.12, budget=UNLIMITED))
    rows = rows_of()
    sampled_more = set(rows.filter(pl.col("num_samples") > FIRST)["prompt_id"].to_list())
    assert any(kind(name) == 1 for name in sampled_more)
    assert (widths(rows) <= 2 * 1.96 * 0.12).all()


# Errors.


@pytest.mark.parametrize(
    ("rule", "vstar", "words"),
    [
        (Rule(target_se=0.0, budget=500), {}, "--adaptive 0: the target is a standard error .* more than 0"),
        (Rule(target_se=-0.1, budget=500), {}, "--adaptive -0.1: .* for example 0.05"),
        (Rule(target_se=math.nan, budget=500), {}, "--adaptive nan: the target"),
        (Rule(target_se=math.inf, budget=500), {}, "--adaptive inf: the target"),
        (Rule(target_se=1e-10, budget=500), {}, "--adaptive 1e-10: the target .* more than 0, in 9 decimal"),
        (
            Rule(target_se=0.1, budget=143),
            {},
            r"--budget 143: the first round alone needs 144 samples \(24 .* 6\)",
        ),
        (Rule(target_se=0.1, budget=-1), {}, "--budget -1: the first round alone"),
        (RULE, {"num_samples": 1}, "vstar.num_samples = 1: .* at least 2"),
        (RULE, {"beta1": 0.0}, "vstar.beta1 = 0: .* a single success would end .* `rescore`"),
    ],
)
def test_a_rule_that_cannot_be_followed_is_refused_before_the_engine_loads(
    tiny_model: Path, tmp_path: Path, engines: Engines, rule: Rule, vstar: dict[str, float], words: str
) -> None:
    with pytest.raises(UserError, match=words):
        start(configured(tiny_model, tmp_path, vstar=vstar), rule)
    assert engines.loaded == 0


def test_a_shard_cannot_be_adaptive_but_can_draw_the_first_round(config: Config, engines: Engines) -> None:
    with pytest.raises(UserError, match=r"--adaptive with --shard 2/3: .* first 6 samples .* without it"):
        start(config, shard=Shard(2, 3))
    assert engines.loaded == 0
    for index in (1, 2, 3):
        engines.next = ScriptedEngine(write)
        start(config, None, Shard(index, 3))
    engines.next = ScriptedEngine(write)
    start(config)
    assert len(engines.next.drawn) == rows_of()["num_samples"].sum() - QUESTIONS * FIRST > 0


@pytest.mark.parametrize("options", [["--adaptive", "0.05"], ["--budget", "100"]])
def test_the_two_options_go_together(run_cli: RunCli, options: list[str]) -> None:
    result = run_cli("vstar", *options)
    assert result.returncode == 2
    assert result.stderr.startswith("error: --adaptive and --budget go together, for example --adaptive 0.05")


def test_an_allocation_is_recorded_in_plain_numbers() -> None:
    found = Allocation(sizes_P=np.array([8, 16]), rounds=[], still_wide=1)
    assert found.record() == {"samples": 24, "still_wide": 1, "rounds": []}
