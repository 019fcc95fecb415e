"""Evaluation figures against brute force, and a whole evaluation with an engine that follows a script."""

import io
import itertools
import json
import math
import shutil
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import cli
from common.config import SamplingParams
from common.data.rendering import PromptRenderer
from common.errors import UserError
from common.model.files import model_identity
from common.rollout import Completion, SampleRequest
from common.runs import run_paths
from common.terminal.console import Terminal
from stage2_train import evaluate as module
from stage2_train.batch import TokenSequence
from stage2_train.config import Config
from stage2_train.evaluate import bootstrap_interval, completion_logprobs, evaluate, pass_at_k, show
from tests.conftest import save_tiny_model
from tests.fakes import IDENTITY, change_json, write_artifact
from tests.stage2_runs import as_toml, tiny_config


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
    monkeypatch.setattr(module, "BOOTSTRAP_RESAMPLES", 400)
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


class ExamEngine:
    """Greedily answers the first question right and nothing else; of four samples of a question, two are right.

    The questions' answers are 1, 2, 3, 4, 1. A fourth sample is cut off although it says the right thing.
    """

    def __init__(self, renderer: PromptRenderer) -> None:
        self._renderer = renderer
        self.loaded: list[dict[str, torch.Tensor]] = []
        self.closed = False

    def generate(self, requests: Iterable[SampleRequest], sampling: SamplingParams) -> Iterator[Completion]:
        for request in reversed(list(requests)):
            assert isinstance(request.key, tuple)
            number, index = request.key
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
def config(tmp_path: Path, tiny_model: Path) -> Config:
    return tiny_config(tmp_path, tiny_model)


@pytest.fixture
def engine(config: Config, tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> ExamEngine:
    exam = ExamEngine(PromptRenderer(tiny_model, config.data))
    monkeypatch.setattr(module, "build_engine", lambda *_, **__: exam)
    return exam


def quiet() -> Terminal:
    return Terminal(file=io.StringIO())


def evaluate_one(config: Config, model: Path) -> dict[str, Any]:
    (result,) = evaluate(config, [model], quiet())
    return result


def test_the_reference_is_no_distance_from_itself_and_the_exam_is_marked_right(
    config: Config, tiny_model: Path, engine: ExamEngine
) -> None:
    result = evaluate_one(config, tiny_model)
    low, high = result.pop("pass_at_1_interval_95")
    assert low == high == 0.5
    assert result == {
        "model": str(tiny_model),
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
        np.array([each.sum() for each in completion_logprobs(sequences, folder, config)])
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
    first, second = evaluate(config, [tiny_model, tmp_path / "other"], quiet())
    assert (first["kl_sequence"], first["model"]) == (0.0, str(tiny_model))
    assert second["kl_sequence"] != 0.0
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
        exams.append(ExamEngine(PromptRenderer(tiny_model, config.data)))
        return exams[-1]

    monkeypatch.setattr(module, "build_engine", build)
    evaluate(config, [tiny_model, tmp_path / "other", tmp_path / "trained"], quiet())
    assert [len(exam.loaded) for exam in exams] == [0, 0, 0]
    assert all(exam.closed for exam in exams)


class SpeakingEngine(ExamEngine):
    """Reports log-probs as the vLLM engine does: those of the model in `folder`."""

    def __init__(self, renderer: PromptRenderer, folder: Path, config: Config) -> None:
        super().__init__(renderer)
        self.folder, self.config = folder, config

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
                (found,) = completion_logprobs([sequence], self.folder, self.config)
                logprobs = tuple(found.tolist())
            yield replace(completion, sampled_logprobs=logprobs)


@pytest.mark.parametrize("is_same", [True, False])
def test_an_engine_that_evaluated_another_network_is_warned_of(
    is_same: bool, config: Config, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_tiny_model(tmp_path / "other", seed=1)
    of = tiny_model if is_same else tmp_path / "other"
    speaking = SpeakingEngine(PromptRenderer(tiny_model, config.data), of, config)
    monkeypatch.setattr(module, "build_engine", lambda *_, **__: speaking)
    printed = io.StringIO()
    evaluate(config, [tiny_model], Terminal(file=printed))
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

    endless = Endless(PromptRenderer(tiny_model, config.data))
    monkeypatch.setattr(module, "build_engine", lambda *_, **__: endless)
    printed = io.StringIO()
    evaluate(config, [tiny_model], Terminal(file=printed))
    assert "warning: every completion was cut off at sampling.max_completion_tokens" in printed.getvalue()


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
    _, second = evaluate(config, [tiny_model, sharded], quiet())
    assert engine.loaded[0].keys() == weights.keys()
    assert second["kl_sequence"] == 0.0


def test_a_model_without_safetensors_is_refused(
    config: Config, tiny_model: Path, engine: ExamEngine, tmp_path: Path
) -> None:
    shutil.copytree(tiny_model, tmp_path / "empty")
    (tmp_path / "empty" / "model.safetensors").unlink()
    with pytest.raises(UserError, match="safetensors"):
        evaluate(config, [tiny_model, tmp_path / "empty"], quiet())
    assert not engine.loaded


def test_a_model_that_ends_elsewhere_is_refused(config: Config, tiny_model: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny_model, tmp_path / "other")
    path = tmp_path / "other" / "generation_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"eos_token_id": [0, 7]}))
    with pytest.raises(UserError, match="render prompts differently"):
        evaluate_one(config, tmp_path / "other")


def test_without_held_out_prompts_there_is_nothing_to_evaluate_on(config: Config, tiny_model: Path) -> None:
    bare = config.model_copy(update={"evaluate": config.evaluate.model_copy(update={"data": None})})
    with pytest.raises(UserError, match=r"\[evaluate\.data\]"):
        evaluate_one(bare, tiny_model)


def test_the_figures_are_shown_as_text(config: Config, tiny_model: Path, engine: ExamEngine) -> None:
    console = Terminal(file=io.StringIO(), width=200)
    show(evaluate_one(config, tiny_model), console)
    assert isinstance(console.file, io.StringIO)
    text = console.file.getvalue()
    for words in ("greedy accuracy  0.2000", "pass@1 sampled   0.5000", "pass@4 1.0000", "25.0% truncated"):
        assert words in text
    assert engine.closed


@pytest.mark.parametrize("as_json", [False, True], ids=["text", "JSON"])
def test_the_figures_are_printed_although_they_cannot_be_written(
    config: Config,
    tmp_path: Path,
    artifacts: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    as_json: bool,
) -> None:
    run, toml = artifacts / config.run, tmp_path / "run.toml"
    (run / "model").mkdir(parents=True)
    (run / "evaluations").touch()
    toml.write_text(as_toml(config), encoding="utf-8")
    figures = dict.fromkeys(("greedy_accuracy", "pass_at_1", "kl_sequence", "kl_sequence_se"), 0.25)
    figures |= {"kl_token": 0.5, "completion_tokens_mean": 7.0, "truncated": 0.0}
    shown = {**figures, "pass_at_1_interval_95": [0.0, 1.0], "pass_at_k": {"1": 0.25}}
    results = [
        {**shown, "model": name, "prompts": 5, "samples_per_prompt": 1} for name in ("first", "second")
    ]
    monkeypatch.setattr(module, "evaluate", lambda *_: results)
    with pytest.raises(UserError, match=r"^cannot write .*evaluations/reference\.json: a file stands where"):
        cli.evaluate(config=toml, as_json=as_json)
    printed = capsys.readouterr().out
    assert (
        (json.loads(printed) == results) if as_json else all(name in printed for name in ("first", "second"))
    )


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
        UserError, match=r"could judge none of 15 completions, such as verifier_crash: KeyError"
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
    evaluate(config, [tiny_model], console)
    assert isinstance(console.file, io.StringIO)
    assert "2 of 5 held-out prompts are also training prompts" in console.file.getvalue()
