"""vLLM and transformers as rollout engines: the trainer's distribution, independent of the rest of the batch.

The model folder carries a generation config with a temperature, top-k and a repetition penalty, as instruction-tuned
models do: none of it may touch what is sampled.
"""

import json
import os
import random
import shutil
import weakref
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from common.config import SamplingParams
from common.data.rendering import PromptRenderer
from common.demo.base_model import build_tokenizer
from common.engines import RolloutEngine, build_engine
from common.errors import UserError
from common.rollout import Completion, SampleRequest
from stage2_train.batch import TokenSequence, token_batches
from stage2_train.config import Config
from stage2_train.logprobs import LogprobModel, token_logprobs
from tests import warm
from tests.conftest import ROOT
from tests.rollout_ranks import requests
from tests.stage2_runs import tiny_config

pytestmark = pytest.mark.filterwarnings(
    r"ignore::DeprecationWarning:(torch|vllm)\..*",
    "ignore:`torch.distributed.reduce_op` is deprecated:FutureWarning",
)

TOLERANCE = 1e-4
"""Between the engine's and the trainer's log-prob of a token, both in float32 (required; measured: below 1e-5)."""
SAMPLING = SamplingParams(temperature=1.0, top_p=1.0, max_completion_tokens=16)
GREEDY = SAMPLING.model_copy(update={"temperature": 0.0})
BACKENDS = ["vllm", "transformers"]


@pytest.fixture(scope="module")
def folder(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("engines") / "model"
    shutil.copytree(tiny_model, folder)
    path = folder / "generation_config.json"
    document = json.loads(path.read_text())
    document |= {"do_sample": True, "temperature": 0.3, "top_k": 2, "top_p": 0.5, "repetition_penalty": 3.0}
    path.write_text(json.dumps(document))
    return folder


@pytest.fixture(scope="module")
def config(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Config:
    return tiny_config(tmp_path_factory.mktemp("config"), folder)


@pytest.fixture(scope="module", params=BACKENDS)
def engine(request: pytest.FixtureRequest, config: Config, folder: Path) -> Iterator[RolloutEngine]:
    engine = new_engine(config, folder, request.param, max_num_seqs=16)
    yield engine
    engine.close()


def new_engine(config: Config, folder: Path, backend: str, max_num_seqs: int) -> RolloutEngine:
    section = config.engine.model_copy(update={"backend": backend, "max_num_seqs": max_num_seqs})
    return build_engine(
        config.model_copy(update={"engine": section}),
        folder,
        PromptRenderer(folder, config.data),
        beside_trainer=True,
    )


def sample(
    engine: RolloutEngine, batch: list[SampleRequest], sampling: SamplingParams = SAMPLING
) -> dict[object, Completion]:
    completions = list(engine.generate(batch, sampling))
    assert len(completions) == len(batch)
    return {completion.key: completion for completion in completions}


def tokens(completions: dict[object, Completion]) -> dict[object, tuple[int, ...]]:
    return {key: completion.token_ids for key, completion in completions.items()}


def trainer_gap(
    module: LogprobModel, batch: list[SampleRequest], completions: dict[object, Completion]
) -> float:
    """The largest difference between the engine's and the trainer's log-prob of any token."""
    sequences = [
        TokenSequence(
            row=place,
            prompt_token_ids=request.prompt_token_ids,
            completion_token_ids=completions[request.key].token_ids,
        )
        for place, request in enumerate(batch)
    ]
    worst = 0.0
    for slice_ in token_batches([[sequence] for sequence in sequences], 400, pad_token_id=0):
        with torch.no_grad():
            ours_K = token_logprobs(module, slice_).logprobs_K
        theirs = [completions[batch[place].key].sampled_logprobs for place in slice_.rows]
        theirs_K = torch.tensor([value for values in theirs for value in values or ()])
        assert theirs_K.shape == ours_K.shape
        worst = max(worst, float((ours_K - theirs_K).abs().max()))
    return worst


def load(folder: Path, temperature: float) -> LogprobModel:
    return LogprobModel(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32), temperature)


def test_every_request_is_answered_under_its_key_and_samples_differ(
    engine: RolloutEngine, folder: Path, config: Config
) -> None:
    completions = sample(engine, requests(PromptRenderer(folder, config.data)))
    assert completions.keys() == set(range(24))
    assert len(set(tokens(completions).values())) > 5
    assert list(engine.generate([], SAMPLING)) == []


def test_a_sample_depends_on_its_seed_and_prompt_alone(
    engine: RolloutEngine, folder: Path, config: Config
) -> None:
    batch = requests(PromptRenderer(folder, config.data))
    together = sample(engine, batch)
    shuffled = batch.copy()
    random.Random(0).shuffle(shuffled)
    assert tokens(sample(engine, shuffled)) == tokens(together)
    for request in batch[:3]:
        assert tokens(sample(engine, [request])) == {request.key: together[request.key].token_ids}
    other_seeds = [replace(request, seed=request.seed + 1) for request in batch]
    assert tokens(sample(engine, other_seeds)) != tokens(together)


def test_an_ended_completion_holds_its_end_token_and_only_a_cut_one_lacks_it(
    engine: RolloutEngine, folder: Path, config: Config
) -> None:
    renderer = PromptRenderer(folder, config.data)
    (end,) = renderer.eos_token_ids
    short = SAMPLING.model_copy(update={"max_completion_tokens": 4})
    completions = sample(engine, requests(PromptRenderer(folder, config.data)), short).values()
    assert {completion.truncated for completion in completions} == {True, False}
    for completion in completions:
        assert end not in completion.token_ids[:-1]
        assert completion.truncated == (completion.token_ids[-1] != end)
        assert len(completion.token_ids) == 4 or not completion.truncated
        assert completion.text == renderer.decode(completion.token_ids)
        assert "<|" not in completion.text
        assert completion.sampled_logprobs is not None
        assert len(completion.sampled_logprobs) == len(completion.token_ids)


def test_log_probs_come_only_where_asked_for(engine: RolloutEngine, folder: Path, config: Config) -> None:
    batch = [
        replace(request, with_logprobs=request.key == 1)
        for request in requests(PromptRenderer(folder, config.data), 3)
    ]
    completions = sample(engine, batch)
    assert [completions[key].sampled_logprobs is None for key in range(3)] == [True, False, True]


def test_greedy_takes_the_most_likely_token_whatever_the_seed(
    engine: RolloutEngine, folder: Path, config: Config
) -> None:
    model = load(folder, 1.0).model
    batch = requests(PromptRenderer(folder, config.data), 6)
    greedy = sample(engine, batch, GREEDY)
    for request in batch:
        ids = list(request.prompt_token_ids)
        for token in greedy[request.key].token_ids:
            with torch.no_grad():
                logits = model(input_ids=torch.tensor([ids])).logits[0, -1]
            assert int(logits.argmax()) == token
            ids.append(token)
    reseeded = [replace(request, seed=request.seed + 1) for request in batch]
    assert tokens(sample(engine, reseeded, GREEDY)) == tokens(greedy)


def test_samples_follow_the_models_distribution(engine: RolloutEngine, folder: Path, config: Config) -> None:
    """The first token's frequencies over 2,000 seeds, against the model's probabilities."""
    one = requests(PromptRenderer(folder, config.data), 1)[0]
    draws = 2000
    batch = [replace(one, key=number, seed=number, with_logprobs=False) for number in range(draws)]
    first = SAMPLING.model_copy(update={"max_completion_tokens": 1})
    drawn = torch.tensor([token for (token,) in tokens(sample(engine, batch, first)).values()])
    model = load(folder, 1.0).model
    with torch.no_grad():
        probability_V = (
            model(input_ids=torch.tensor([one.prompt_token_ids])).logits[0, -1].double().softmax(-1)
        )
    frequency_V = torch.bincount(drawn, minlength=len(probability_V)) / draws
    error_V = (probability_V * (1 - probability_V) / draws).sqrt()
    likely_V = probability_V > 0.01
    assert int(likely_V.sum()) >= 5
    assert float(((frequency_V - probability_V).abs() / error_V)[likely_V].max()) < 4


STOP = ("7", "3", "#1", "# 1", "#4", "# 4")


def at_stop_string(completion: Completion, renderer: PromptRenderer) -> Completion | None:
    """What is left of a completion up to its first stop string, found token by token; None where it has none."""
    for length in range(1, len(completion.token_ids) + 1):
        text = renderer.decode(completion.token_ids[:length])
        ends = sorted((text.index(each) + len(each), text.index(each)) for each in STOP if each in text)
        if ends:
            assert completion.sampled_logprobs is not None
            return replace(
                completion,
                token_ids=completion.token_ids[:length],
                text=text[: ends[0][1]],
                truncated=False,
                sampled_logprobs=completion.sampled_logprobs[:length],
            )
    return None


@pytest.mark.parametrize("sampling", [SAMPLING, GREEDY], ids=["sampled", "greedy"])
def test_a_completion_ends_with_the_token_that_completes_a_stop_string_and_its_text_before_it(
    engine: RolloutEngine, folder: Path, config: Config, sampling: SamplingParams
) -> None:
    """What either engine draws without stop strings says where it has to end with them."""
    renderer = PromptRenderer(folder, config.data)
    batch = requests(renderer)
    free = sample(engine, batch, sampling)
    stopped = sample(engine, batch, sampling.model_copy(update={"stop": STOP}))
    cut = {key: at_stop_string(completion, renderer) for key, completion in free.items()}
    assert any(cut.values())
    for key, completion in free.items():
        expected = cut[key] or completion
        assert stopped[key].token_ids == expected.token_ids
        assert (stopped[key].text, stopped[key].truncated) == (expected.text, expected.truncated)
        assert stopped[key].sampled_logprobs == pytest.approx(expected.sampled_logprobs, abs=TOLERANCE)
    if sampling is SAMPLING:
        assert not all(cut.values())
        lengths = {len(each.token_ids) for each in cut.values() if each}
        assert len(lengths) > 1
        # One whose stop string is complete with its last token has ended by itself.
        shortest = min(lengths)
        limited = sampling.model_copy(update={"stop": STOP, "max_completion_tokens": shortest})
        at_limit = sample(engine, batch, limited)
        assert all(
            not at_limit[key].truncated
            for key, each in cut.items()
            if each and len(each.token_ids) == shortest
        )
        assert any(each.truncated for each in at_limit.values())


@pytest.mark.parametrize("limit", [2, 16])
def test_a_completion_goes_on_from_its_prefix_to_the_same_limit(
    engine: RolloutEngine, folder: Path, config: Config, limit: int
) -> None:
    """Greedy completions say how each of their prefixes goes on, beside requests without one."""
    greedy = GREEDY.model_copy(update={"max_completion_tokens": limit})
    batch = requests(PromptRenderer(folder, config.data))
    whole = sample(engine, batch, greedy)
    given = [
        replace(request, prefix=whole[request.key].token_ids[: place % 3], with_logprobs=False)
        for place, request in enumerate(batch)
        if place % 3 < len(whole[request.key].token_ids)
    ]
    assert {len(request.prefix) for request in given} == set(range(min(limit, 3)))
    assert any(completion.truncated for completion in whole.values()) == (limit == 2)
    for key, completion in sample(engine, given, greedy).items():
        assert completion.token_ids == whole[key].token_ids
        assert (completion.text, completion.truncated) == (whole[key].text, whole[key].truncated)


def test_prefixes_of_any_length_fit_into_a_context_for_prompt_and_limit(tmp_path: Path) -> None:
    """GPT-2 has no position beyond its context, where a long prefix beside a short one would lead."""
    engine, batch = tiny_gpt2(tmp_path, context=40)
    greedy = GREEDY.model_copy(update={"max_completion_tokens": 30})
    whole = tokens(sample(engine, batch, greedy))
    assert {len(token_ids) for token_ids in whole.values()} == {30}, "it never ends by itself"
    given = [
        replace(request, key=(request.key, length), prefix=whole[request.key][:length])
        for request in batch
        for length in (0, 25, 1, 29, 14)
    ]
    found = sample(engine, given, greedy)
    assert {request.key: found[request.key].token_ids for request in given} == {
        (request.key, length): whole[request.key] for request in batch for length in (0, 25, 1, 29, 14)
    }


def test_a_batch_ends_once_each_row_is_at_its_own_limit(tmp_path: Path) -> None:
    engine, batch = tiny_gpt2(tmp_path, context=128)
    greedy = GREEDY.model_copy(update={"max_completion_tokens": 30})
    first, last = sample(engine, batch[:1], greedy)[0].token_ids, batch[1]
    engine._renderer.eos_token_ids = first[:1]
    at_limit = replace(last, prefix=tuple(token for token in range(30, 60) if token != first[0])[:29])
    steps = 0

    def counted(module: torch.nn.Module, arguments: tuple[Any, ...]) -> None:
        nonlocal steps
        steps += 1

    with engine._model.register_forward_pre_hook(counted):
        found = sample(engine, [batch[0], at_limit], greedy)
    assert [len(found[request.key].token_ids) for request in batch[:2]] == [1, 30]
    assert steps == 1


def tiny_gpt2(folder: Path, *, context: int) -> tuple[Any, list[SampleRequest]]:
    """An engine with a GPT-2, and requests of 10 tokens."""
    from transformers import GPT2Config, GPT2LMHeadModel

    tokenizer = build_tokenizer()
    ids = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("eos", "pad")}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = GPT2LMHeadModel(
            GPT2Config(
                vocab_size=len(tokenizer),
                n_positions=context,
                n_embd=16,
                n_layer=1,
                n_head=2,
                bos_token_id=None,
                **ids,
            )
        )
    model.save_pretrained(folder / "gpt2")
    tokenizer.save_pretrained(folder / "gpt2")
    numbers = random.Random(0)
    prompts = [tuple(numbers.choices(range(20, 40), k=10)) for _ in range(4)]
    engine = new_engine(
        tiny_config(folder, folder / "gpt2"), folder / "gpt2", "transformers", max_num_seqs=16
    )
    return engine, [SampleRequest(key=key, prompt_token_ids=ids, seed=key) for key, ids in enumerate(prompts)]


def test_a_stop_string_may_begin_in_the_prefix(engine: RolloutEngine, folder: Path, config: Config) -> None:
    renderer = PromptRenderer(folder, config.data)
    request, *_ = requests(renderer)
    free = sample(engine, [request], GREEDY)[request.key]
    first, second = renderer.decode(free.token_ids[:1]), renderer.decode(free.token_ids[:2])
    stopping = GREEDY.model_copy(update={"stop": (first[-1] + second[len(first)],)})
    given = replace(request, prefix=free.token_ids[:1], with_logprobs=False)
    found = sample(engine, [given], stopping)[request.key]
    assert found.token_ids == free.token_ids[:2]
    assert (found.text, found.truncated) == (first[:-1], False)


CUTS: dict[str, dict[str, float]] = {
    "top_k": {"top_k": 3},
    "min_p": {"min_p": 0.1},
    "all": {"min_p": 0.05, "top_k": 4, "top_p": 0.9},
}


@pytest.mark.parametrize("name", CUTS)
def test_log_probs_under_a_cut_are_those_of_the_tokens_that_are_left(
    engine: RolloutEngine, folder: Path, config: Config, name: str
) -> None:
    """In vLLM's order: temperature, min-p, top-k, top-p. The first token of 300 seeds."""
    cut = CUTS[name]
    one = requests(PromptRenderer(folder, config.data), 1)[0]
    batch = [replace(one, key=number, seed=number) for number in range(300)]
    first = SAMPLING.model_copy(update={"max_completion_tokens": 1, "temperature": 1.5, **cut})
    found = {each.token_ids[0]: each.sampled_logprobs or () for each in sample(engine, batch, first).values()}

    with torch.no_grad():
        logits_V = load(folder, 1.0).model(input_ids=torch.tensor([one.prompt_token_ids])).logits[0, -1]
    chance_V = (logits_V / 1.5).double().softmax(-1)
    chance_V[chance_V < cut.get("min_p", 0.0) * chance_V.max()] = 0
    order = chance_V.argsort(descending=True)
    chance_V[order[int(cut.get("top_k", len(order))) :]] = 0
    chance_V /= chance_V.sum()
    before_V = chance_V[order].cumsum(-1) - chance_V[order]
    chance_V[order[before_V >= cut.get("top_p", 2.0)]] = 0
    chance_V /= chance_V.sum()

    assert 1 < len(found) < 10
    assert set(found) == set(chance_V.nonzero()[:, 0].tolist())
    for token, (logprob,) in found.items():
        assert logprob == pytest.approx(float(chance_V[token].log()), abs=TOLERANCE)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_log_probs_agree_with_the_trainers_before_training(
    engine: RolloutEngine, folder: Path, config: Config, temperature: float
) -> None:
    batch = requests(PromptRenderer(folder, config.data))
    completions = sample(engine, batch, SAMPLING.model_copy(update={"temperature": temperature}))
    assert trainer_gap(load(folder, temperature), batch, completions) < TOLERANCE


def test_log_probs_agree_after_every_weight_synchronisation(
    engine: RolloutEngine, folder: Path, config: Config
) -> None:
    """The last set of weights is the first again: the engine's other tests need it, and its samples must return."""
    module, batch = load(folder, 1.0), requests(PromptRenderer(folder, config.data))
    original = {name: weight.clone() for name, weight in module.model.named_parameters()}
    before = sample(engine, batch)
    generator = torch.Generator().manual_seed(0)
    for _ in range(3):
        with torch.no_grad():
            for weight in module.model.parameters():
                weight.add_(0.1 * torch.randn(weight.shape, generator=generator))
        stale = trainer_gap(module, batch, before)
        engine.load_weights((name, weight.detach()) for name, weight in module.model.named_parameters())
        completions = sample(engine, batch)
        assert stale > 100 * TOLERANCE
        assert trainer_gap(module, batch, completions) < TOLERANCE
        assert tokens(completions) != tokens(before)
    engine.load_weights(original.items())
    again = sample(engine, batch)
    assert again == before


@pytest.mark.parametrize("engine", ["vllm"], indirect=True)
def test_no_more_than_a_layer_of_new_weights_is_held_at_a_time(engine: RolloutEngine, folder: Path) -> None:
    """Of the layers. The vocabulary's size is no multiple of 64 here, and vLLM keeps what it pads to the end."""
    module = load(folder, 1.0).model
    sizes = {name: weight.numel() for name, weight in module.named_parameters() if ".layers." in name}
    held: dict[str, int] = {}
    most = 0

    def gathered() -> Iterator[tuple[str, torch.Tensor]]:
        nonlocal most
        for name, weight in module.named_parameters():
            copy = weight.detach().clone()
            if name in sizes:
                held[name] = sizes[name]
                weakref.finalize(copy, held.pop, name)
                most = max(most, sum(held.values()))
            yield name, copy
            del copy

    engine.load_weights(gathered())
    assert not held
    assert 0 < most <= sum(sizes.values()) / module.config.num_hidden_layers


def test_an_engine_goes_on_after_its_caller_lost_interest(
    engine: RolloutEngine, folder: Path, config: Config
) -> None:
    batch = requests(PromptRenderer(folder, config.data))
    stream = engine.generate(batch, SAMPLING)
    first = next(stream)
    stream.close()  # type: ignore[attr-defined]
    completions = sample(engine, batch)
    assert completions[first.key] == first


def test_what_vllm_raises_while_it_samples_is_one_line_and_its_traceback_is_kept(
    folder: Path, config: Config, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    engine: Any = new_engine(config, folder, "vllm", max_num_seqs=16)
    core = engine.llm.llm_engine

    def fails() -> None:
        raise ValueError("no kernel\nfor heads of 6")

    monkeypatch.setattr(core, "step", fails)
    message = r"vLLM failed while it sampled \(ValueError: no kernel for heads of 6\); start .*engine.backend"
    with pytest.raises(UserError, match=message):
        list(engine.generate(requests(PromptRenderer(folder, config.data)), SAMPLING))
    (record,) = caplog.records
    assert record.exc_info is not None
    monkeypatch.undo()
    sample(engine, requests(PromptRenderer(folder, config.data)))
    engine.close()


def test_a_held_out_prompt_may_be_longer_than_a_training_prompt(tmp_path: Path, tiny_model: Path) -> None:
    """The engine is one for both, and the longest of either fits if it fits the model."""
    from common.engines.vllm_engine import context_length

    config = tiny_config(tmp_path, tiny_model)
    longer = (
        config.evaluate.data.model_copy(update={"max_prompt_tokens": 100}) if config.evaluate.data else None
    )
    evaluate = config.evaluate.model_copy(update={"data": longer})
    assert context_length(config.model_copy(update={"evaluate": evaluate}), tiny_model) == 106
    sampling = config.sampling.model_copy(update={"max_completion_tokens": 500})
    assert context_length(config.model_copy(update={"sampling": sampling}), tiny_model) == 512


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_size_of_the_engine_changes_no_sample(backend: str, folder: Path, config: Config) -> None:
    """One engine after the other: a vLLM engine that closes takes the process's groups along."""
    found = []
    for max_num_seqs in (5, 64):
        engine = new_engine(config, folder, backend, max_num_seqs)
        found.append(tokens(sample(engine, requests(PromptRenderer(folder, config.data)))))
        engine.close()
    assert found[0] == found[1]


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_tied_output_layer_follows_the_embedding_at_every_weight_synchronisation(
    backend: str, tied_model: Path, config: Config
) -> None:
    """Its weights come once, under the embedding's name."""
    engine = new_engine(config, tied_model, backend, max_num_seqs=16)
    module, batch = load(tied_model, 1.0), requests(PromptRenderer(tied_model, config.data))
    assert module.model.lm_head.weight is module.model.get_input_embeddings().weight
    completions = sample(engine, batch)
    assert trainer_gap(module, batch, completions) < TOLERANCE
    generator = torch.Generator().manual_seed(0)
    for _ in range(3):
        with torch.no_grad():
            for weight in module.model.parameters():
                weight.add_(0.1 * torch.randn(weight.shape, generator=generator))
        assert trainer_gap(module, batch, completions) > 100 * TOLERANCE
        weights = {name: weight.detach() for name, weight in module.model.named_parameters()}
        assert "model.embed_tokens.weight" in weights
        assert "lm_head.weight" not in weights
        engine.load_weights(weights.items())
        completions = sample(engine, batch)
        assert trainer_gap(module, batch, completions) < TOLERANCE
    engine.close()


FREED = """
import sys, weakref
from pathlib import Path
import torch.distributed as dist
from common.data.rendering import PromptRenderer
from common.engines import build_engine
from tests.stage2_runs import tiny_config

folder, scratch, kind = sys.argv[1:]
if kind != "alone":
    dist.init_process_group("gloo", init_method=f"file://{scratch}/store", rank=0, world_size=1)
if kind == "compiled":
    import vllm
    plain = vllm.LLM
    vllm.LLM = lambda **options: plain(
        **options | {"enforce_eager": False, "compilation_config": {"mode": 2, "backend": "eager"}}
    )
config = tiny_config(Path(scratch), Path(folder))
held = []
for _ in range(3):
    engine = build_engine(config, Path(folder), PromptRenderer(Path(folder), config.data), beside_trainer=True)
    runner = engine.llm.llm_engine.engine_core.engine_core.model_executor.driver_worker.worker.model_runner
    print([ref().shape for ref in held if ref() is not None])
    assert (getattr(runner.model.model, "_bytecode_hook_handle", None) is not None) == (kind == "compiled")
    large = [*runner.model.parameters(), *runner.kv_caches]
    held = [weakref.ref(tensor) for tensor in large if tensor.ndim > 1]
    assert len(held) > 3
    del runner, large
    engine.close()
    assert not any(each().ndim > 2 for each in held if each() is not None), "the cache goes at once"
"""


@pytest.mark.parametrize("kind", ["alone", "beside a trainer", "compiled"])
def test_a_closed_engine_has_freed_its_memory_when_the_next_is_there(
    kind: str, folder: Path, tmp_path: Path
) -> None:
    (tmp_path / "program.py").write_text(FREED)
    ended = warm.run(
        [tmp_path / "program.py", folder, tmp_path, kind], env={**os.environ, "PYTHONPATH": str(ROOT)}
    )
    assert ended.stdout.splitlines() == ["[]"] * 3, ended.stderr
