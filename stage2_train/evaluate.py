"""Evaluate a model: greedy accuracy, pass@1, pass@k, and its distance from the reference, KL(π‖π_ref).

Shapes: _P prompt, _N sample.
"""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from common.config import SamplingParams
from common.data.held_out import remarks_beside_data
from common.data.prompts import check_fit, load_prompts, refuse_none_usable, usable_prompts
from common.data.rendering import PromptRenderer
from common.doubts import ALL_TRUNCATED
from common.engines import RolloutEngine, build_engine
from common.errors import UserError
from common.grading import GraderPool, Outcome
from common.model.files import model_identity, network_hash, reference_model, resolve_model
from common.model.trainable import read_trainable
from common.model.weights import read_weights, stored_weights, weights_hash
from common.parity import COMPLETIONS, Gap, engine_logprobs, judged
from common.provenance import STRICT, Provenance, read_provenance
from common.rollout import Prompt, Rollout
from common.runs import run_paths
from common.seeds import derive_seed
from common.terminal.console import Terminal
from stage2_train.batch import TokenSequence, token_batches
from stage2_train.config import Config
from stage2_train.logprobs import load_model, token_logprobs
from stage2_train.sources.rollouts import collect_rollouts

BOOTSTRAP_RESAMPLES = 2000


def evaluate(config: Config, models: Sequence[Path], console: Terminal) -> list[dict[str, Any]]:
    """Evaluate models on the config's held-out prompts, one after the other.

    Raises UserError before any model is loaded.
    """
    data = config.held_out
    if data is None:
        raise UserError("the config has no [evaluate.data] section: say which held-out prompts to use")
    reference = reference_model(config)
    _refuse_other_reference(reference, config)
    folders = [resolve_model(str(model), None) for model in models]
    renderer = PromptRenderer(reference, data)
    for folder in folders:
        read_trainable(folder, config)
        weights_hash(read_weights(folder), run_paths(config.run).known_weights)  # refuses what is not finite
        if PromptRenderer(folder, data).identity() != renderer.identity():
            raise UserError(
                f"{folder} and the reference {reference} render prompts differently, so KL would mean nothing; "
                "evaluate a model that was trained from this reference"
            )
    prompts = load_prompts(data, config, renderer)
    check_fit(prompts, config, reference, data)
    engine: RolloutEngine | None = None
    network = ""
    results = []
    with GraderPool(config.grader) as pool:
        prompts = usable_prompts(prompts, data, pool)
        refuse_none_usable(prompts, data)
        for line in remarks_beside_data(config, [prompt.text for prompt in prompts]):
            console.print(line)
        for folder in folders:
            console.print(f"evaluating {folder} on {len(prompts):,} prompts")
            # Its workers may be other processes, which weights in memory do not reach.
            before, network = network, network_hash(folder)
            takes_weights = network == before and config.engine.tensor_parallel_size == 1
            if engine is not None and not takes_weights:
                engine.close()
                engine = None
            if engine is None:
                engine = build_engine(config, folder, renderer, beside_trainer=False)
            else:
                engine.load_weights(stored_weights(folder))
            greedy, sampled = sample_both_ways(config, prompts, engine, pool)
            refuse_unjudged(sampled)
            if all(rollout.completion.truncated for rollout in (*greedy, *sampled)):
                console.print(f"warning: {ALL_TRUNCATED}")
            results.append(summarise(config, folder, greedy, sampled))
        for line in pool.usage_lines():
            console.print(line)
    if engine is not None:
        engine.close()
    for result, sampled in results:
        result |= kl_to_reference(sampled, Path(result["model"]), reference, config, console)
    return [result for result, _ in results]


def _refuse_other_reference(reference: Path, config: Config) -> None:
    """Raise UserError if the reference is no longer the model that the run's stage 1 sampled from."""
    paths = run_paths(config.run)
    if not paths.vstar.is_file():
        return
    here = Provenance(identity={"model": model_identity(reference, paths.known_weights)}, context={})
    there = Provenance(identity={"model": read_provenance(paths.vstar).identity["model"]}, context={})
    if refused := here.refused(there.identity, STRICT):
        raise UserError(
            f"{reference} is not the model that {paths.vstar} is of: {'; '.join(refused.values())}; KL to it would "
            "mean nothing: bring the reference back, or choose another --run"
        )


def sample_both_ways(
    config: Config, prompts: Sequence[Prompt], engine: RolloutEngine, pool: GraderPool
) -> tuple[list[Rollout], list[Rollout]]:
    """A greedy completion of each prompt, and num_samples from the training distribution."""
    sampled = config.sampling
    greedy = SamplingParams(
        temperature=0.0, max_completion_tokens=sampled.max_completion_tokens, stop=sampled.stop
    )
    seed = derive_seed(config.seed, "evaluate")
    places = range(len(prompts))
    return (
        collect_rollouts(prompts, engine, pool, greedy, seed=seed, places=places),
        collect_rollouts(
            prompts,
            engine,
            pool,
            sampled,
            seed=seed,
            places=places,
            group_size=config.evaluate.num_samples,
            logprob_checks=0 if sampled.cut_by else COMPLETIONS,
        ),
    )


def refuse_unjudged(rollouts: Sequence[Rollout]) -> None:
    """Raise UserError if the grader could judge none of the completions: all would count as wrong."""
    grades = [rollout.grade for rollout in rollouts if not rollout.completion.truncated]
    if grades and not any(grade.is_judged for grade in grades):
        raise UserError(
            f"the grader could judge none of {len(grades):,} completions, such as {grades[0].outcome.value}: "
            f"{grades[0].reason or 'no reason given'}; correct grader.name, or give it more time or memory"
        )


def summarise(
    config: Config, folder: Path, greedy: list[Rollout], sampled: list[Rollout]
) -> tuple[dict[str, Any], list[Rollout]]:
    """The figures that need no model, and the sampled rollouts that KL is measured on."""
    count = config.evaluate.num_samples
    solved_PN = np.array([rollout.is_solved for rollout in sampled]).reshape(-1, count)
    return {
        "model": str(folder),
        "prompts": len(solved_PN),
        "samples_per_prompt": count,
        "greedy_accuracy": float(np.mean([rollout.is_solved for rollout in greedy])),
        "pass_at_1": float(solved_PN.mean()),
        "pass_at_1_interval_95": bootstrap_interval(solved_PN.mean(axis=1), seed=config.seed),
        "pass_at_k": {str(k): pass_at_k(solved_PN.sum(axis=1), count, k) for k in _powers_of_two(count)},
        "completion_tokens_mean": float(np.mean([len(rollout.completion.token_ids) for rollout in sampled])),
        "truncated": float(np.mean([rollout.completion.truncated for rollout in sampled])),
        "outcomes": {
            outcome.value: number
            for outcome in Outcome
            if (number := sum(rollout.grade.outcome == outcome for rollout in sampled))
        },
    }, sampled


def _powers_of_two(most: int) -> list[int]:
    return [2**power for power in range(most.bit_length())]


def pass_at_k(solved_P: NDArray[np.int64], samples: int, k: int) -> float:
    """The unbiased estimate of the chance that one of k samples is correct: 1 − C(n − c, k)/C(n, k), mean over prompts.

    `solved_P` counts each prompt's correct samples among `samples` (n). (Chen et al. 2021, arXiv:2107.03374, Eq. 1.)
    """
    total = math.comb(samples, k)
    return float(np.mean([1 - math.comb(samples - int(solved), k) / total for solved in solved_P]))


def bootstrap_interval(values_P: NDArray[np.float64], *, seed: int) -> tuple[float, float]:
    """The 95 % percentile interval of the mean, resampling prompts; a single prompt cannot be resampled."""
    from scipy.stats import bootstrap

    if len(values_P) == 1:
        return float(values_P[0]), float(values_P[0])
    random = np.random.default_rng(seed)
    low, high = bootstrap(
        (values_P,), np.mean, n_resamples=BOOTSTRAP_RESAMPLES, batch=100, method="percentile", rng=random
    ).confidence_interval
    return float(low), float(high)


def kl_to_reference(
    rollouts: Sequence[Rollout], model: Path, reference: Path, config: Config, console: Terminal
) -> dict[str, float]:
    """KL(π‖π_ref) from completions of π: the mean of ln π/π_ref, its standard error (over prompts), and KL per token.

    Warns if the engine that drew them has other log-probs of π. Under top-p, top-k or min-p it has, and is not asked.
    """
    sequences = [TokenSequence.of(row, rollout) for row, rollout in enumerate(rollouts)]
    ours = completion_logprobs(sequences, model, config)
    theirs = completion_logprobs(sequences, reference, config)
    if config.sampling.cut_by:
        names = ", ".join(f"sampling.{key}" for key in config.sampling.cut_by)
        console.print(f"KL is of the models whole, without {names}, on completions that were drawn with it")
    else:
        _say_whether_engine_agrees(rollouts, ours, model, config, console)
    log_ratio = np.array([float((mine - other).sum()) for mine, other in zip(ours, theirs, strict=True)])
    tokens = sum(len(sequence.completion_token_ids) for sequence in sequences)
    by_prompt_P = log_ratio.reshape(-1, config.evaluate.num_samples).mean(axis=1)
    return {
        "kl_sequence": float(log_ratio.mean()),
        "kl_sequence_se": float(by_prompt_P.std(ddof=1) / math.sqrt(len(by_prompt_P)))
        if len(by_prompt_P) > 1
        else 0.0,
        "kl_token": float(log_ratio.sum() / tokens),
    }


def _say_whether_engine_agrees(
    rollouts: Sequence[Rollout],
    ours: Sequence[NDArray[np.float64]],
    model: Path,
    config: Config,
    console: Terminal,
) -> None:
    checked = [row for row, rollout in enumerate(rollouts) if rollout.completion.sampled_logprobs]
    gap = Gap.between(
        [engine_logprobs(rollouts[row].completion) for row in checked],
        [ours[row].tolist() for row in checked],
    )
    sides = f"the engine ({config.engine.backend}) and a forward pass by transformers of {model}"
    agrees, line = judged(gap, sides, dtype=config.model.dtype, temperature=config.sampling.temperature)
    console.print(
        line if agrees else f"warning: {line}: the figures above are of another network than its KL"
    )


@torch.no_grad()
def completion_logprobs(
    sequences: Sequence[TokenSequence], folder: Path, config: Config
) -> list[NDArray[np.float64]]:
    """The log-probs of each sequence's completion tokens under the model in `folder`, B arrays of shape (K,)."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    module = load_model(folder, config).to(device).eval()
    found: dict[int, NDArray[np.float64]] = {}
    for batch in token_batches(
        [[sequence] for sequence in sequences], config.train.tokens_per_micro_batch, pad_token_id=0
    ):
        tokens = batch.to(device)
        logprobs_K = token_logprobs(module, tokens).logprobs_K.double().cpu()
        parts = logprobs_K.split([len(sequences[row].completion_token_ids) for row in batch.rows])
        found |= {row: part.numpy() for row, part in zip(batch.rows, parts, strict=True)}
    return [found[row] for row in range(len(sequences))]


def show(result: dict[str, Any], console: Terminal) -> None:
    """The figures in a few lines."""
    low, high = result["pass_at_1_interval_95"]
    console.print(
        f"{result['model']}: {result['prompts']:,} prompts × {result['samples_per_prompt']} samples"
    )
    console.print(f"  greedy accuracy  {result['greedy_accuracy']:.4f}")
    console.print(f"  pass@1 sampled   {result['pass_at_1']:.4f}  (95 % interval {low:.4f} to {high:.4f})")
    others = [f"pass@{k} {value:.4f}" for k, value in result["pass_at_k"].items() if k != "1"]
    if others:
        console.print(f"  {'  '.join(others)}")
    console.print(
        f"  KL(π‖π_ref)      {result['kl_sequence']:.4f} ± {result['kl_sequence_se']:.4f} nats per completion, "
        f"{result['kl_token']:.5f} per token"
    )
    console.print(
        f"  completions      {result['completion_tokens_mean']:.1f} tokens, {result['truncated']:.1%} truncated"
    )
