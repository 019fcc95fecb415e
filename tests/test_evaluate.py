"""Evaluation figures against brute force, and a whole evaluation with an engine that follows a script."""

import io
import itertools
import json
import math
import shutil
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import pandas
import polars as pl
import pytest
import scipy.stats
import torch
from safetensors.torch import load_file, save_file

from benchmarks.tiny_model import save_tiny_model
from common.config import DataConfig, SamplingParams
from common.data.prompts import load_prompts
from common.data.rendering import PromptRenderer
from common.engines import LOCAL
from common.errors import UserError
from common.evaluations import PROMPTS, Figures
from common.model.files import model_identity
from common.provenance import read_provenance
from common.rollout import Completion, Prompt, SampleRequest
from common.runs import run_paths
from common.store import SAMPLES, add_fragment
from common.terminal.console import Terminal
from stage2_train.batch import TokenSequence
from stage2_train.config import Config, load_config
from stage2_train.evaluation import figures
from stage2_train.evaluation.divergence import Scoring
from stage2_train.evaluation.figures import bootstrap_interval, compare, pass_at_k, sign_flip_p_value
from stage2_train.evaluation.plan import benchmarks_of
from stage2_train.evaluation.run import evaluate, show
from tests.conftest import ROOT
from tests.fakes import IDENTITY, change_json, write_artifact
from tests.quantised import save_quantised
from tests.stage2_runs import tiny_config


@pytest.mark.parametrize("samples", [1, 2, 5, 8])
def test_pass_at_k_is_the_share_of_all_subsets_that_hold_a_correct_sample(samples: int) -> None:
    for k in range(1, samples + 1):
        for solved in range(samples + 1):
            correct = [place < solved for place in range(samples)]
            subsets = list(itertools.combinations(correct, k))
            expected = sum(map(any, subsets)) / len(subsets)
            assert pass_at_k(np.array([solved]), samples, k) == pytest.approx(expected, abs=1e-12)


def test_pass_at_k_is_averaged_over_prompts() -> None:
    assert pass_at_k(np.array([0, 1, 4]), 4, 1) == pytest.approx((0 + 0.25 + 1) / 3)
    assert pass_at_k(np.array([0, 1, 4]), 4, 2) == pytest.approx((0 + 0.5 + 1) / 3)


def test_the_bootstrap_interval_covers_the_mean_as_often_as_it_says(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(figures, "RESAMPLES", 400)
    truth, prompts, trials = 0.4, 60, 100
    random = np.random.default_rng(0)
    covered = 0
    for seed in range(trials):
        values_P = random.binomial(4, truth, size=prompts) / 4
        low, high = bootstrap_interval(values_P, seed=seed)
        assert low <= values_P.mean() <= high
        covered += low <= truth <= high
    # 95 % less 3 standard errors of 100 trials.
    assert 0.885 < covered / trials <= 1.0


def test_the_bootstrap_interval_has_the_width_of_the_normal_one_and_repeats() -> None:
    values_P = np.random.default_rng(1).random(400)
    low, high = bootstrap_interval(values_P, seed=0)
    width = 2 * 1.96 * values_P.std(ddof=1) / math.sqrt(len(values_P))
    assert high - low == pytest.approx(width, rel=0.06)
    assert bootstrap_interval(values_P, seed=0) == (low, high)
    for prompts in (1, 10):
        assert bootstrap_interval(np.full(prompts, 0.25), seed=0) == (0.25, 0.25)


def held_out_of(config: Config) -> DataConfig:
    assert config.held_out is not None
    return config.held_out


class ExamEngine:
    """Greedily answers the first question right and nothing else; of four samples of a question, two are right.

    The questions' answers are 1, 2, 3, 4, 1. A fourth sample is cut off although it says the right thing.
    """

    def __init__(self, renderer: PromptRenderer, config: Config) -> None:
        self._renderer = renderer
        prompts = load_prompts(held_out_of(config), config, renderer)
        self._numbers = {prompt.id: number for number, prompt in enumerate(prompts)}
        self.loaded: list[dict[str, torch.Tensor]] = []
        self.drawn: list[Any] = []
        self.closed = False

    def generate(self, requests: Iterable[SampleRequest], sampling: SamplingParams) -> Iterator[Completion]:
        for request in reversed(list(requests)):
            number, index = 0, 0
            if isinstance(request.key, tuple):  # else it compares engine and model
                number, index = self._numbers[request.key[0]], request.key[1]
                self.drawn.append((sampling.temperature, *request.key))
            answer = (1, 2, 3, 4, 1)[number]
            if sampling.temperature == 0:
                answer += number > 0
            elif index == 2:
                answer += 1
            truncated = sampling.temperature > 0 and index == 3
            body = self._renderer.tokenizer.encode(f"7 #### {answer}")
            token_ids = (*body, *(() if truncated else self._renderer.eos_token_ids))
            yield Completion(
                key=request.key,
                token_ids=token_ids,
                text=self._renderer.decode(token_ids),
                truncated=truncated,
            )

    def load_weights(self, named_tensors: Iterable[tuple[str, torch.Tensor]]) -> None:
        self.loaded.append(dict(named_tensors))

    def sleep(self) -> None:
        raise AssertionError("nothing is trained here")

    def close(self) -> None:
        self.closed = True


@pytest.fixture
def config(tmp_path: Path, tiny_model: Path, artifacts: Path) -> Config:
    return tiny_config(tmp_path, tiny_model)


def engines_are(monkeypatch: pytest.MonkeyPatch, build: Any) -> None:
    """Have `evaluate` use engines that `build` builds."""
    defaults = evaluate.__kwdefaults__
    assert defaults is not None
    monkeypatch.setitem(defaults, "engines", LOCAL.built_by(build))


@pytest.fixture
def engine(config: Config, tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> ExamEngine:
    exam = ExamEngine(PromptRenderer(tiny_model, config.data), config)
    engines_are(monkeypatch, lambda *_, **__: exam)
    return exam


def quiet() -> Terminal:
    return Terminal(file=io.StringIO())


def evaluate_one(config: Config, model: Path, **options: Any) -> dict[str, Any]:
    (result,) = evaluate(config, {"model": model}, quiet(), **options).results
    return result.model_dump()


def evaluate_all(config: Config, *models: Path) -> list[Figures]:
    return evaluate(config, {str(model): model for model in models}, quiet()).results


def test_the_reference_is_no_distance_from_itself_and_the_exam_is_marked_right(
    config: Config, tiny_model: Path, engine: ExamEngine
) -> None:
    result = evaluate_one(config, tiny_model)
    low, high = result.pop("pass_at_1_interval_95")
    assert low == high == 0.5
    low, high = result.pop("greedy_accuracy_interval_95")
    assert 0 <= low < 0.2 < high <= 1
    assert result == {
        "model": "model",
        "path": str(tiny_model),
        "benchmark": "held_out",
        "grader": "gsm8k/4",
        "sampling": {"temperature": 1.0, "top_p": 1.0, "max_completion_tokens": 6},
        "reward_mean": 0.5,
        "prompts": 5,
        "samples_per_prompt": 4,
        "greedy_accuracy": 0.2,
        "pass_at_1": 0.5,
        "pass_at_k": {"1": 0.5, "2": pytest.approx(1 - 1 / 6), "4": 1.0},
        # Three of four have their end token.
        "completion_tokens_mean": len(PromptRenderer(tiny_model, config.data).tokenizer.encode("7 #### 1"))
        + 0.75,
        "truncated": 0.25,
        "outcomes": {"correct": 10, "wrong": 5, "truncated": 5},
        "kl_sequence": 0.0,
        "kl_sequence_se": 0.0,
        "kl_token": 0.0,
    }
    assert engine.closed


def test_another_models_distance_is_the_mean_log_ratio_of_its_completions(
    config: Config, tiny_model: Path, engine: ExamEngine, tmp_path: Path
) -> None:
    save_tiny_model(tmp_path / "other", seed=1)
    result = evaluate_one(config, tmp_path / "other")
    renderer = PromptRenderer(tiny_model, config.data)
    assert config.evaluate.data is not None
    questions = [json.loads(line) for line in Path(str(config.evaluate.data.path)).read_text().splitlines()]
    bodies = [[int(row["answer"]) + (index == 2) for index in range(4)] for row in questions]
    sequences = [
        TokenSequence(
            row=4 * number + index,
            prompt_token_ids=renderer.render(questions[number]["prompt"]),
            completion_token_ids=(
                *renderer.tokenizer.encode(f"7 #### {answer}"),
                *(() if index == 3 else renderer.eos_token_ids),
            ),
        )
        for number, row in enumerate(bodies)
        for index, answer in enumerate(row)
    ]
    ours, theirs = (
        np.array([each.sum() for each in Scoring(folder, config).by_token(sequences)])
        for folder in (tmp_path / "other", tiny_model)
    )
    ratio = ours - theirs
    assert abs(ratio.mean()) > 1e-3
    assert result["kl_sequence"] == pytest.approx(ratio.mean(), rel=1e-9)
    tokens = sum(len(sequence.completion_token_ids) for sequence in sequences)
    assert result["kl_token"] == pytest.approx(ratio.sum() / tokens, rel=1e-9)
    assert result["kl_sequence_se"] > 0
    assert not engine.loaded


def test_a_second_model_is_loaded_into_the_engine_of_the_first(
    config: Config, tiny_model: Path, engine: ExamEngine, tmp_path: Path
) -> None:
    save_tiny_model(tmp_path / "other", seed=1)
    first, second = evaluate_all(config, tiny_model, tmp_path / "other")
    assert (first.kl_sequence, first.path) == (0.0, str(tiny_model))
    assert second.kl_sequence != 0.0
    (weights,) = engine.loaded
    expected = load_file(tmp_path / "other" / "model.safetensors")
    assert weights.keys() == expected.keys()
    assert all(torch.equal(weights[name], weight) for name, weight in expected.items())


def test_weights_go_into_an_engine_of_their_own_network_alone(
    config: Config, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The third model is the first one's network, and the engine by then the second one's."""
    save_tiny_model(tmp_path / "other", seed=1)
    change_json(tmp_path / "other" / "config.json", rope_theta=500.0)
    save_tiny_model(tmp_path / "trained", seed=2)
    exams: list[ExamEngine] = []

    def build(*_: Any, **__: Any) -> ExamEngine:
        exams.append(ExamEngine(PromptRenderer(tiny_model, config.data), config))
        return exams[-1]

    engines_are(monkeypatch, build)
    evaluate_all(config, tiny_model, tmp_path / "other", tmp_path / "trained")
    assert [len(exam.loaded) for exam in exams] == [0, 0, 0]
    assert all(exam.closed for exam in exams)


def test_a_quantised_model_has_an_engine_of_its_own_and_no_kl(
    config: Config, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_tiny_model(tmp_path / "other", seed=1)
    models = [
        save_quantised(model, tmp_path / f"{model.name}-int8") for model in (tiny_model, tmp_path / "other")
    ]
    exams: list[ExamEngine] = []

    def build(*_: Any, **__: Any) -> ExamEngine:
        exams.append(ExamEngine(PromptRenderer(tiny_model, config.data), config))
        return exams[-1]

    engines_are(monkeypatch, build)
    own = config.model_copy(update={"engine": config.engine.model_copy(update={"backend": "vllm"})})
    found = evaluate_all(own, *models)
    assert [each.kl_sequence for each in found] == [None, None]
    assert [each.greedy_accuracy for each in found] == [0.2, 0.2]
    assert [len(exam.loaded) for exam in exams] == [0, 0]
    transformers = config.model_copy(
        update={"engine": config.engine.model_copy(update={"backend": "transformers"})}
    )
    with pytest.raises(UserError, match=r"which only vLLM samples from here; set engine\.backend = \"vllm\""):
        evaluate_all(transformers, *models)


def test_a_quantised_reference_is_refused(
    config: Config, tiny_model: Path, tmp_path: Path, engine: ExamEngine
) -> None:
    model = save_quantised(tiny_model, tmp_path / "int8")
    own = config.model_copy(update={"model": config.model.model_copy(update={"path": str(model)})})
    with pytest.raises(UserError, match=r"is quantised .*: it cannot be trained"):
        evaluate_all(own, tiny_model)


class SpeakingEngine(ExamEngine):
    """Reports log-probs as the vLLM engine does: those of the model in `folder`."""

    def __init__(self, renderer: PromptRenderer, folder: Path, config: Config) -> None:
        super().__init__(renderer, config)
        self.scoring = Scoring(folder, config)

    def generate(self, requests: Iterable[SampleRequest], sampling: SamplingParams) -> Iterator[Completion]:
        requests = list(requests)
        prompts = {request.key: request for request in requests}
        for completion in super().generate(requests, sampling):
            request = prompts[completion.key]
            sequence = TokenSequence(
                row=0,
                prompt_token_ids=request.prompt_token_ids,
                completion_token_ids=completion.token_ids,
            )
            logprobs = None
            if request.with_logprobs:
                (found,) = self.scoring.by_token([sequence])
                logprobs = tuple(found.tolist())
            yield replace(completion, sampled_logprobs=logprobs)


@pytest.mark.parametrize("is_same", [True, False])
def test_an_engine_that_evaluated_another_network_is_warned_of(
    is_same: bool, config: Config, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_tiny_model(tmp_path / "trained", seed=2)
    save_tiny_model(tmp_path / "other", seed=1)
    of = tmp_path / ("trained" if is_same else "other")
    speaking = SpeakingEngine(PromptRenderer(tiny_model, config.data), of, config)
    engines_are(monkeypatch, lambda *_, **__: speaking)
    printed = io.StringIO()
    evaluate(config, {"trained": tmp_path / "trained"}, Terminal(file=printed, width=400))
    lines = [line for line in printed.getvalue().splitlines() if "forward pass by transformers" in line]
    assert len(lines) == 1
    assert lines[0].startswith("warning: parity: the engine (") == (not is_same)
    assert (" agree: " in lines[0]) == is_same


def test_a_reference_that_was_edited_since_stage_1_is_refused(
    config: Config, tiny_model: Path, engine: ExamEngine, tmp_path: Path, artifacts: Path
) -> None:
    folder = Path(shutil.copytree(tiny_model, tmp_path / "copy"))
    own = config.model_copy(update={"model": config.model.model_copy(update={"path": str(folder)})})
    paths = run_paths(own.run)
    identity = {**IDENTITY, "model": model_identity(folder)}
    write_artifact(paths.vstar, {"p1": ["correct", "wrong"]}, identity=identity)
    assert evaluate_one(own, folder)["kl_sequence"] == 0.0
    change_json(folder / "config.json", rope_parameters={"rope_type": "default", "rope_theta": 5.0})
    with pytest.raises(UserError, match=r"is not the model that .*vstar\.parquet is of: model\.config is"):
        evaluate_one(own, folder)


def test_a_model_that_never_ends_is_warned_of(
    config: Config, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Endless(ExamEngine):
        def generate(
            self, requests: Iterable[SampleRequest], sampling: SamplingParams
        ) -> Iterator[Completion]:
            return (replace(each, truncated=True) for each in super().generate(requests, sampling))

    endless = Endless(PromptRenderer(tiny_model, config.data), config)
    engines_are(monkeypatch, lambda *_, **__: endless)
    printed = io.StringIO()
    evaluate(config, {"model": tiny_model}, Terminal(file=printed, width=400))
    assert (
        "warning: model on held_out: every completion was cut off at sampling.max_completion_tokens"
        in printed.getvalue()
    )


def test_a_sharded_model_is_loaded_whole(
    config: Config, tiny_model: Path, engine: ExamEngine, tmp_path: Path
) -> None:
    weights = load_file(tiny_model / "model.safetensors")
    sharded = tmp_path / "sharded"
    shutil.copytree(tiny_model, sharded)
    (sharded / "model.safetensors").unlink()
    names = sorted(weights)
    shards = {"model-1.safetensors": names[::2], "model-2.safetensors": names[1::2]}
    for file, part in shards.items():
        save_file({name: weights[name] for name in part}, sharded / file, metadata={"format": "pt"})
    index = {"metadata": {}, "weight_map": {name: file for file, part in shards.items() for name in part}}
    (sharded / "model.safetensors.index.json").write_text(json.dumps(index))
    _, second = evaluate_all(config, tiny_model, sharded)
    assert second.kl_sequence is not None
    assert abs(second.kl_sequence) < 1e-6


def test_a_model_without_safetensors_is_refused(
    config: Config, tiny_model: Path, engine: ExamEngine, tmp_path: Path
) -> None:
    shutil.copytree(tiny_model, tmp_path / "empty")
    (tmp_path / "empty" / "model.safetensors").unlink()
    with pytest.raises(UserError, match="safetensors"):
        evaluate_all(config, tiny_model, tmp_path / "empty")
    assert not engine.drawn


def test_a_model_that_ends_elsewhere_has_an_accuracy_and_no_kl(
    config: Config, tiny_model: Path, engine: ExamEngine, tmp_path: Path
) -> None:
    shutil.copytree(tiny_model, tmp_path / "other")
    path = tmp_path / "other" / "generation_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"eos_token_id": [0, 7]}))
    result = evaluate_one(config, tmp_path / "other")
    assert result["kl_sequence"] is None
    assert result["pass_at_1"] == 0.5


def test_without_held_out_prompts_there_is_nothing_to_evaluate_on(config: Config, tiny_model: Path) -> None:
    bare = config.model_copy(update={"evaluate": config.evaluate.model_copy(update={"data": None})})
    with pytest.raises(UserError, match=r"\[evaluate\.data\]"):
        evaluate_one(bare, tiny_model)


def test_the_figures_are_shown_as_text(config: Config, tiny_model: Path, engine: ExamEngine) -> None:
    console = Terminal(file=io.StringIO(), width=200)
    show(evaluate(config, {"model": tiny_model}, quiet()), console)
    assert isinstance(console.file, io.StringIO)
    text = console.file.getvalue()
    for words in ("greedy accuracy  0.2000", "pass@1, avg@4    0.5000", "pass@4 1.0000", "25.0% truncated"):
        assert words in text
    assert engine.closed


def test_a_grader_that_can_judge_nothing_is_no_accuracy_of_zero(
    config: Config,
    tiny_model: Path,
    engine: ExamEngine,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (tmp_path / "evaluate_test_rewards.py").write_text("def reward(p, c, a):\n    raise KeyError(c[:1])\n")
    monkeypatch.syspath_prepend(tmp_path)
    broken = config.model_copy(
        update={"grader": config.grader.model_copy(update={"name": "evaluate_test_rewards:reward"})}
    )
    with pytest.raises(
        UserError, match=r"could judge none of the first \d completions \(verifier_crash: KeyError"
    ):
        evaluate_one(broken, tiny_model)


def test_held_out_prompts_that_were_trained_on_are_counted(
    config: Config, tiny_model: Path, engine: ExamEngine
) -> None:
    assert config.evaluate.data is not None
    training = Path(str(config.data.path))
    held_out = Path(str(config.evaluate.data.path)).read_text(encoding="utf-8").splitlines(keepends=True)
    training.write_text(training.read_text(encoding="utf-8") + "".join(held_out[:2]), encoding="utf-8")
    console = Terminal(file=io.StringIO(), width=80)
    evaluate(config, {"model": tiny_model}, console)
    assert isinstance(console.file, io.StringIO)
    assert "2 of 5 held-out prompts are also training prompts" in console.file.getvalue()


# Benchmarks, and completions that are kept.


def with_benchmarks(config: Config, **benchmarks: Any) -> Config:
    document = config.model_dump(mode="json", exclude_none=True)
    document["evaluate"]["benchmarks"] = benchmarks
    return Config.model_validate(document)


def test_nothing_is_drawn_twice_and_more_samples_draw_the_missing_ones(
    config: Config, tiny_model: Path, engine: ExamEngine
) -> None:
    first = evaluate_one(config, tiny_model)
    assert len(engine.drawn) == len(set(engine.drawn)) == 5 + 5 * 4
    assert evaluate_one(config, tiny_model) == first
    assert len(engine.drawn) == 25
    more = config.model_copy(update={"evaluate": config.evaluate.model_copy(update={"num_samples": 6})})
    assert evaluate_one(more, tiny_model)["samples_per_prompt"] == 6
    assert len(engine.drawn) == len(set(engine.drawn)) == 25 + 5 * 2
    assert evaluate_one(config, tiny_model) == first


def test_a_second_grader_grades_the_same_completions(
    config: Config, tiny_model: Path, engine: ExamEngine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    evaluate_one(config, tiny_model)
    drawn = list(engine.drawn)
    (tmp_path / "second_rewards.py").write_text("def reward(prompt, completion, answer):\n    return 0.25\n")
    monkeypatch.syspath_prepend(tmp_path)
    other = config.model_copy(
        update={"grader": config.grader.model_copy(update={"name": "second_rewards:reward"})}
    )
    result = evaluate_one(other, tiny_model)
    assert engine.drawn == drawn
    assert (result["pass_at_1"], result["greedy_accuracy"]) == (0.0, 0.0)
    assert result["reward_mean"] == pytest.approx(0.25 * 15 / 20), "a truncated completion has 0"


def test_a_grader_that_reads_a_column_draws_its_own_prompts_and_leaves_the_others(
    config: Config, tiny_model: Path, engine: ExamEngine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Prompts with the column are other prompts; the completions of the old ones are not graded again."""
    evaluate_one(config, tiny_model)
    count = len(engine.drawn)
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "column_rewards.py").write_text(
        "def reward(prompt, completion, answer, level):\n    return 0.25 * level\n"
    )
    path = tmp_path / "levels.jsonl"
    rows = [json.loads(line) for line in Path(str(held_out_of(config).path)).read_text().splitlines()]
    path.write_text("\n".join(json.dumps(row | {"level": 2}) for row in rows))
    other = config.model_copy(
        update={
            "grader": config.grader.model_copy(update={"name": "column_rewards:reward"}),
            "evaluate": config.evaluate.model_copy(
                update={"data": held_out_of(config).model_copy(update={"path": str(path)})}
            ),
        }
    )
    exam = ExamEngine(PromptRenderer(tiny_model, other.data), other)
    engines_are(monkeypatch, lambda *_, **__: exam)
    assert evaluate_one(other, tiny_model)["reward_mean"] == pytest.approx(0.5 * 15 / 20)
    assert len(exam.drawn) == count


def test_a_benchmark_has_data_a_grader_and_a_sampling_of_its_own(
    config: Config, tiny_model: Path, engine: ExamEngine, tmp_path: Path
) -> None:
    path = config.evaluate.data.path if config.evaluate.data else ""
    data = {"format": "generic", "path": str(path)}
    both = with_benchmarks(
        config,
        hot={
            "data": data,
            "greedy": False,
            "num_samples": 2,
            "sampling": {"temperature": 0.6, "top_p": 0.95},
        },
        math={"data": data, "grader": {"name": "math"}},
    )
    results = evaluate(both, {"model": tiny_model}, quiet()).results
    assert [each.benchmark for each in results] == ["held_out", "hot", "math"]
    _, hot, math_figures = results
    assert (hot.greedy_accuracy, hot.samples_per_prompt, hot.pass_at_1) == (None, 2, 1.0)
    assert hot.sampling["temperature"] == 0.6
    assert (math_figures.greedy_accuracy, math_figures.pass_at_1) == (0.0, None), "there is no box"
    assert math_figures.grader.startswith("math/")
    assert {temperature for temperature, *_ in engine.drawn} == {0.0, 1.0, 0.6}
    rows, _ = PROMPTS.read(run_paths(both.run).results("parquet"))
    assert rows.height == 15
    only = evaluate(both, {"model": tiny_model}, quiet(), benchmarks=["hot"]).results
    assert [each.benchmark for each in only] == ["hot"]
    document = json.loads(run_paths(both.run).results("json").read_text())
    assert {each["benchmark"] for each in document["results"]} == {"held_out", "hot", "math"}
    table = run_paths(both.run).results("md").read_text()
    assert "| model | held_out | hot | math | KL, nats per completion, held_out |" in table
    with pytest.raises(UserError, match="no benchmark 'cold'; use one of held_out, hot, math"):
        evaluate(both, {"model": tiny_model}, quiet(), benchmarks=["cold"])


def test_kl_is_measured_on_completions_drawn_as_in_training_whatever_the_benchmark_samples_with(
    config: Config, tiny_model: Path, engine: ExamEngine, tmp_path: Path
) -> None:
    save_tiny_model(tmp_path / "other", seed=1)
    path = config.evaluate.data.path if config.evaluate.data else ""
    data = {"format": "generic", "path": str(path)}
    both = with_benchmarks(
        config, hot={"data": data, "num_samples": 2, "sampling": {"temperature": 0.6}}, greedy={"data": data}
    )
    held_out, hot, greedy = evaluate(both, {"other": tmp_path / "other"}, quiet()).results
    drawn = [each for each in engine.drawn if each[0] == 1.0]
    assert len(drawn) == 5 * 4 + 5 + 5
    assert hot.kl_sequence == greedy.kl_sequence != 0.0
    assert held_out.kl_sequence is not None
    count = len(engine.drawn)
    (ours,) = evaluate(both, {"reference": tiny_model}, quiet(), benchmarks=["hot"]).results
    assert ours.kl_sequence == 0.0
    assert len(engine.drawn) == count + 5 + 10, "no completions for the reference's KL"


def test_results_keep_their_places_and_kl_is_of_one_benchmark(
    config: Config, tiny_model: Path, engine: ExamEngine, tmp_path: Path
) -> None:
    save_tiny_model(tmp_path / "other", seed=1)
    data = {"format": "generic", "path": str(held_out_of(config).path)}
    both = with_benchmarks(config, hot={"data": data, "num_samples": 2, "sampling": {"temperature": 0.6}})
    models = {"reference": tiny_model, "other": tmp_path / "other"}
    evaluate(both, {"other": models["other"]}, quiet(), benchmarks=["hot"])
    evaluate(both, models, quiet())
    paths = run_paths(both.run)
    document = json.loads(paths.results("json").read_text())
    rows, _ = PROMPTS.read(paths.results("parquet"))
    evaluate(both, {"reference": tiny_model}, quiet(), benchmarks=["hot"])
    assert json.loads(paths.results("json").read_text()) == document
    assert PROMPTS.read(paths.results("parquet"))[0].equals(rows)
    kl = {(each["model"], each["benchmark"]): each["kl_sequence"] for each in document["results"]}
    assert kl["other", "hot"] != kl["other", "held_out"]
    lines = paths.results("md").read_text().splitlines()
    cells = {line.split(" | ")[0]: line.split(" | ")[-1] for line in lines if " | " in line}
    assert cells["| model"] == "KL, nats per completion, held_out |"
    assert cells["| other"] == f"{kl['other', 'held_out']:.3f} |"


def test_two_models_are_compared_on_the_same_prompts(
    config: Config, tiny_model: Path, engine: ExamEngine, tmp_path: Path
) -> None:
    save_tiny_model(tmp_path / "other", seed=1)
    found = evaluate(config, {"reference": tiny_model, "trained": tmp_path / "other"}, quiet())
    (pair,) = found.comparisons
    assert (pair.first, pair.second, pair.prompts) == ("reference", "trained", 5)
    assert (pair.difference, pair.interval_95, pair.p_value) == (0.0, (0.0, 0.0), 1.0)


def frame(model: str, correct: Sequence[Sequence[bool]]) -> pl.DataFrame:
    return pl.DataFrame(
        {
            "model": model,
            "prompt_id": [str(number) for number in range(len(correct))],
            "outcomes": [["correct" if each else "wrong" for each in some] for some in correct],
            "greedy_outcome": ["correct"] * len(correct),
        }
    )


def test_a_comparison_is_paired_and_agrees_with_scipy() -> None:
    random = np.random.default_rng(0)
    first = random.random((200, 4)) < 0.4
    second = first | (random.random((200, 4)) < 0.1)
    found = compare("b", frame("a", first.tolist()), frame("z", second.tolist())[::-1], seed=0)
    assert found is not None
    differences = second.mean(1) - first.mean(1)
    assert found.difference == pytest.approx(differences.mean())
    expected = scipy.stats.ttest_rel(second.mean(1), first.mean(1))
    low, high = expected.confidence_interval()
    assert found.interval_95 == pytest.approx((low, high), abs=0.005)
    assert found.p_value == pytest.approx(2 / 10_000, abs=2e-4)
    noise = random.normal(size=40)
    ours = sign_flip_p_value(noise - noise.mean() + 0.3, seed=1)
    assert ours == pytest.approx(scipy.stats.ttest_1samp(noise - noise.mean() + 0.3, 0).pvalue, abs=0.02)
    assert (
        compare("b", frame("a", [[True]]), frame("z", [[True]]).with_columns(prompt_id=pl.lit("9")), seed=0)
        is None
    )


def test_models_that_were_graded_or_sampled_otherwise_are_not_compared(
    config: Config, tiny_model: Path, engine: ExamEngine, tmp_path: Path
) -> None:
    save_tiny_model(tmp_path / "other", seed=1)
    models = {"reference": tiny_model, "trained": tmp_path / "other"}
    data = {"format": "generic", "path": str(held_out_of(config).path)}

    def compared(**benchmark: Any) -> list[str]:
        """The benchmarks on which the trained model is compared, after it alone was evaluated with these settings."""
        own = with_benchmarks(config, exam={"data": data, "num_samples": 2} | benchmark)
        now = {"trained": models["trained"]}
        assert not evaluate(own, now, quiet(), benchmarks=["exam"]).comparisons
        stored = json.loads(run_paths(own.run).results("json").read_text())
        return [each["benchmark"] for each in stored["comparisons"]]

    both = with_benchmarks(config, exam={"data": data, "num_samples": 2})
    assert len(evaluate(both, models, quiet()).comparisons) == 2
    (only,) = evaluate(both, models, quiet(), benchmarks=["exam"]).comparisons
    assert only.benchmark == "exam", "the other one is not of this command"
    assert compared(num_samples=4) == ["held_out", "exam"]
    assert compared(sampling={"temperature": 0.5}) == ["held_out"]
    assert compared(grader={"name": "math"}) == ["held_out"]
    assert compared(num_samples=0) == ["held_out"]


def test_kl_can_be_measured_on_samples_that_were_not_drawn_for_it(
    config: Config, tiny_model: Path, engine: ExamEngine, tmp_path: Path
) -> None:
    """The training temperature becomes the one that a benchmark was sampled with."""
    save_tiny_model(tmp_path / "other", seed=1)
    data = {"format": "generic", "path": str(held_out_of(config).path)}
    cold = {"data": data, "greedy": False, "num_samples": 2, "sampling": {"temperature": 0.5}}
    before = with_benchmarks(config, cold=cold)
    models = {"other": tmp_path / "other"}
    evaluate(before, models, quiet(), benchmarks=["cold"])
    count = len(engine.drawn)
    sampling = before.sampling.model_copy(update={"temperature": 0.5})
    now = before.model_copy(update={"sampling": sampling})
    (result,) = evaluate(now, models, quiet(), benchmarks=["cold"]).results
    assert result.kl_sequence
    assert len(engine.drawn) == count
    store = run_paths(now.run).evaluations / "samples"
    (part,) = (file for folder in store.glob("cold-sampled-*") for file in folder.glob("part-*.parquet"))
    rows = SAMPLES.read(part)[0].to_dicts()
    provenance = read_provenance(part)
    part.unlink()
    add_fragment(part.parent, "part", [row | {"completion_ids": None} for row in rows], SAMPLES, provenance)
    with pytest.raises(UserError, match=r"cold-sampled-.* holds completions without their token ids"):
        evaluate(now, models, quiet(), benchmarks=["cold"])


def test_a_prompt_that_is_too_long_for_one_model_is_not_kept_from_another(
    config: Config, tiny_model: Path, engine: ExamEngine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = Path(shutil.copytree(tiny_model, tmp_path / "other"))
    change_json(other / "tokenizer_config.json", of_another_tokenizer=True)

    def shortened(data: DataConfig, settings: Config, renderer: PromptRenderer) -> list[Prompt]:
        renderers.append(renderer)
        return load_prompts(data, settings, renderer)[len(renderers) == 1 :]

    renderers: list[PromptRenderer] = []
    monkeypatch.setattr("stage2_train.evaluation.plan.load_prompts", shortened)
    found = evaluate(config, {"one": tiny_model, "other": other}, quiet())
    assert [each.prompts for each in found.results] == [4, 5]
    assert [each.prompts for each in found.comparisons] == [4]


def test_the_papers_benchmarks_are_those_of_its_appendix(tmp_path: Path) -> None:
    """A.6: greedy decoding, but for the competitions 32 samples at temperature 0.6 and top-p 0.95."""
    (tmp_path / "run.toml").write_text(
        f"include = [{json.dumps(str(ROOT / 'configs' / 'benchmarks' / 'paper.toml'))}]\n"
        'run = "x"\nmodel = { path = "m" }\ngrader = { name = "gsm8k" }\ndata = { path = "b.jsonl" }\n'
    )
    found = {each.name: each for each in benchmarks_of(load_config(tmp_path / "run.toml"))}
    greedy = {"math500": "math", "minerva": "math", "olympiadbench": "olympiadbench", "gsm8k": "gsm8k"}
    competitions = ["amc2023", "aime2024", "aime2025", "hmmt_feb_2024", "hmmt_feb_2025"]
    assert list(found) == [*greedy, *competitions]
    assert {name: found[name].grader.name for name in greedy} == greedy
    assert all(set(found[name].draws) == {"greedy", "policy"} for name in greedy)
    distilled = benchmarks_of(load_config(ROOT / "configs" / "openr1-r1-distill-qwen-1.5b.toml"))
    table_2 = {each.name: each for each in distilled if each.name != "held_out"}
    assert list(table_2) == competitions[1:]
    for each in [*(found[name] for name in competitions), *table_2.values()]:
        draw = each.draws["sampled"]
        assert set(each.draws) == {"sampled", "policy"}
        assert (draw.num_samples, draw.sampling.temperature, draw.sampling.top_p) == (32, 0.6, 0.95)
    for name, each in table_2.items():
        shown = found[name].data.model_copy(update={"template": "openr1"})
        assert each.data == shown, "the same data, shown as in training (Table 4)"


def test_an_included_file_gives_benchmarks_to_a_config(tmp_path: Path) -> None:
    (tmp_path / "suites").mkdir()
    (tmp_path / "suites" / "paper.toml").write_text(
        '[evaluate.benchmarks.gsm8k]\ngreedy = true\n[evaluate.benchmarks.gsm8k.data]\npath = "a.jsonl"\n'
        "[sampling]\ntemperature = 0.5\ntop_p = 0.9\n"
    )
    (tmp_path / "run.toml").write_text(
        'include = ["suites/paper.toml"]\nrun = "x"\nmodel = { path = "m" }\ngrader = { name = "gsm8k" }\n'
        'data = { path = "b.jsonl" }\nsampling = { temperature = 0.7 }\n'
    )
    config = load_config(tmp_path / "run.toml")
    assert list(config.evaluate.benchmarks) == ["gsm8k"]
    assert (config.sampling.temperature, config.sampling.top_p) == (0.7, 0.9)
    (tmp_path / "suites" / "paper.toml").write_text('include = ["../run.toml"]\n')
    with pytest.raises(UserError, match="include leads back to"):
        load_config(tmp_path / "run.toml")
    (tmp_path / "suites" / "paper.toml").unlink()
    with pytest.raises(
        UserError, match=r"cannot read the config .*paper\.toml: .*, which .*run\.toml includes"
    ):
        load_config(tmp_path / "run.toml")


@pytest.mark.parametrize(
    ("benchmarks", "expected"),
    [
        ({"held_out": {"data": {"path": "a.jsonl"}}}, 'other than "held_out"'),
        ({"a/b": {"data": {"path": "a.jsonl"}}}, "a benchmark should have a name of letters"),
        ({"a": {"data": {"path": "a.jsonl"}, "greedy": False}}, "draw nothing"),
        ({"a": {}}, "data"),
        ({"a": {"data": {"path": "a.jsonl"}, "samples": 3}}, "samples"),
    ],
)
def test_a_benchmark_that_cannot_be_meant_is_refused(
    config: Config, benchmarks: dict[str, Any], expected: str
) -> None:
    with pytest.raises(ValueError, match=expected):
        with_benchmarks(config, **benchmarks)


def test_a_benchmark_in_a_format_of_its_own_works_by_its_fields_and_others_read_the_results(
    config: Config, tiny_model: Path, engine: ExamEngine, tmp_path: Path
) -> None:
    questions = Path(str(held_out_of(config).path)).read_text().splitlines()
    rows = [
        {"item": {"stem": row["prompt"], "id": number}, "key": [row["answer"]]}
        for number, row in enumerate(map(json.loads, questions))
    ]
    path = tmp_path / "exam.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = {"path": str(path), "prompt_field": "item.stem", "answer_field": "key", "template": "plain"}
    exam = with_benchmarks(config, exam={"data": data, "num_samples": 4})
    (result,) = evaluate(exam, {"model": tiny_model}, quiet(), benchmarks=["exam"]).results
    assert (result.prompts, result.greedy_accuracy, result.pass_at_1) == (5, 0.2, 0.5)
    file = run_paths(exam.run).results("parquet")
    relation = duckdb.sql(f"select model, benchmark, len(outcomes) as n from '{file}' order by prompt_id")
    assert relation is not None
    assert relation.fetchall() == [("model", "exam", 4)] * 5
    assert pandas.read_parquet(file)["greedy_outcome"].eq("correct").sum() == 1


def test_the_references_weights_in_another_network_have_a_kl(
    config: Config, tiny_model: Path, engine: ExamEngine, tmp_path: Path
) -> None:
    shutil.copytree(tiny_model, tmp_path / "other")
    change_json(
        tmp_path / "other" / "config.json", rope_parameters={"rope_type": "default", "rope_theta": 5.0}
    )
    result = evaluate_one(config, tmp_path / "other")
    assert result["kl_sequence"] is not None
    assert abs(result["kl_sequence"]) > 1e-6
