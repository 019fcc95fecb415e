"""Rollouts: completions of prompts from the weights that an engine holds, graded (Algorithm 1, line 9)."""

from collections.abc import Mapping, Sequence
from threading import Event
from typing import Any

from common.config import SamplingParams
from common.engines import RolloutEngine
from common.grading import Grade, GraderPool, Outcome
from common.rollout import Completion, Prompt, Rollout, SampleRequest
from common.seeds import derive_seed
from stage2_train.sources.batches import Group

LOGPROB_CHECKS = 4
"""Completions per iteration whose log-probs the engine reports, to compare with the trainer's."""


def collect_rollouts(
    prompts: Sequence[Prompt],
    engine: RolloutEngine,
    pool: GraderPool,
    sampling: SamplingParams,
    *,
    seed: int,
    places: Sequence[int],
    group_size: int = 1,
    logprob_checks: int = 0,
    is_ending: Event | None = None,
) -> list[Group]:
    """Sample and grade a group of completions of each prompt, in the order of the prompts.

    `places` number the prompts within the whole job, so that a sample is the same however the job is split over ranks.
    Raises RuntimeError once another thread sets `is_ending`.
    """
    requests = [
        SampleRequest(
            key=(number, index),
            prompt_token_ids=tuple(prompt.token_ids),
            seed=derive_seed(seed, place, prompt.id, index),
            with_logprobs=place < logprob_checks,
        )
        for number, (place, prompt) in enumerate(zip(places, prompts, strict=True))
        for index in range(group_size)
    ]
    completions: dict[object, Completion] = {}
    for completion in engine.generate(requests, sampling):
        if is_ending and is_ending.is_set():
            raise RuntimeError("the job ends")
        assert isinstance(completion.key, tuple)
        completions[completion.key] = completion
        prompt = prompts[completion.key[0]]
        pool.submit(
            completion.key,
            prompt=prompt.text,
            completion=completion.text,
            answer=prompt.answer,
            truncated=completion.truncated,
            token_ids=completion.token_ids,
        )
    grades = dict(pool.drain())
    return [
        [
            Rollout(prompt=prompt, completion=completions[number, index], grade=grades[number, index])
            for index in range(group_size)
        ]
        for number, prompt in enumerate(prompts)
    ]


def as_json(rollout: Rollout) -> dict[str, Any]:
    """A rollout in the format of checkpoints, which refers to its prompt by id."""
    completion, grade = rollout.completion, rollout.graded
    return {
        "prompt_id": rollout.prompt.id,
        "token_ids": list(completion.token_ids),
        "text": completion.text,
        "truncated": completion.truncated,
        **grade.columns(),
        **({"step_rewards": grade.step_rewards} if grade.step_rewards else {}),
        **({"parts": grade.parts} if grade.parts else {}),
    }


def from_json(document: dict[str, Any], prompts: Mapping[str, Prompt]) -> Rollout:
    """The inverse of `as_json`; `prompts` by id."""
    return Rollout(
        prompt=prompts[document["prompt_id"]],
        completion=Completion(
            key=None,
            token_ids=tuple(document["token_ids"]),
            text=document["text"],
            truncated=document["truncated"],
        ),
        grade=Grade(
            outcome=Outcome(document["outcome"]),
            reward=document["reward"],
            extracted=document["extracted"],
            reason=document["reason"],
            step_rewards=_pairs(document.get("step_rewards")),
            parts=_pairs(document.get("parts")),
        ),
    )


def _pairs(values: list[list[Any]] | None) -> tuple[tuple[Any, float], ...] | None:
    return None if values is None else tuple((first, reward) for first, reward in values)
