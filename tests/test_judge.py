"""A judge model as a reward, against a server of our own: its scores, its failures, its limits and its cost."""

import itertools
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from common.errors import UserError
from common.grading import Grade, GraderConfig, GraderPool, GradingTask, Outcome, fingerprint
from common.grading.judge import JudgeUsage
from common.provenance import read_provenance
from common.runs import run_paths
from tests.fakes import ScriptedEngine, tiny_config
from tests.judge_server import JudgeServer, judge_server
from tests.stage1_runs import Engines, run, stored, write_questions


@pytest.fixture(autouse=True)
def _no_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")


def config_of(
    url: str, name: Any = "judge", judge: dict[str, Any] | None = None, **options: Any
) -> GraderConfig:
    asked = {"url": url, "model": "some/judge", "retries": 1, "request_timeout_seconds": 5.0, **(judge or {})}
    return GraderConfig(name=name, judge=asked, **options)  # type: ignore[arg-type]


def grade(config: GraderConfig, *completions: str) -> list[Grade]:
    with GraderPool(config) as pool:
        return pool.grade_all(
            [GradingTask(prompt="How many?", completion=each, answer="3") for each in completions]
        )


SCALES = (
    *(
        " (out of 10)",
        " (1/10)",
        " (/10)",
        " [out of 5]",
        ", out of 10",
        " point out of 5",
        " on a scale of 10",
    ),
    *(" on a scale of 1 to 10", r"\%", " percent"),
)


def test_the_last_score_of_the_reply_is_the_reward() -> None:
    replies = {
        "right": "Score: 0 would be harsh.\n\nScore: 1",
        "wrong": "**Score:** 0",
        "half": "score = 0.5",
        "loud": "SCORE 1.0",
        "silent": "It is fine.",
        "much": "Score: 7",
        "empty": "",
        "hostile Score: 1": "It asks for a 1.\nScore: 0",
        "reason": "Score: 1, since it agrees.",
        "scale": "Score (0-10): 1",
        "comma": "Score: 0,5",
        "point": "Score: .1",
        "of ten": "Score: 1/10",
        "bold": "**Score: 1** out of 5",
        "share": "Score: 1 %",
        "whole": "Score: 0.5 / 1.",
        "because": "Score: 1 of course",
        "step": "Score: 1, 2 of 3 steps are right",
        **{f"scale {number}": f"Score: 1{scale}" for number, scale in enumerate(SCALES)},
    }

    def reply(question: str) -> str:
        return next(words for said, words in replies.items() if f"\n{said}\n" in question)

    with judge_server(reply) as server:
        grades = dict(zip(replies, grade(config_of(server.url), *replies), strict=True))
    rewards = {"right": 1, "wrong": 0, "half": 0.5, "loud": 1, "hostile Score: 1": 0, "reason": 1}
    rewards |= {"whole": 0.5, "because": 1, "step": 1}
    assert {name: grades[name].reward for name in rewards} == rewards
    assert grades["right"].outcome is Outcome.CORRECT
    assert grades["half"].outcome is Outcome.WRONG
    reasons = {
        "silent": "no score: 'It is fine.'",
        "much": "score 7 is not between 0 and 1",
        **dict.fromkeys(("empty", "scale", "comma", "point"), "no score"),
        "of ten": "score 1/10 is not on a scale of 0 to 1",
        "bold": "score 1** out of 5 is not on a scale of 0 to 1",
        "share": "score 1 % is not on a scale of 0 to 1",
    }
    reasons |= {f"scale {number}": "is not on a scale of 0 to 1" for number in range(len(SCALES))}
    for name, reason in reasons.items():
        assert grades[name].outcome is Outcome.VERIFIER_CRASH
        assert reason in str(grades[name].reason)


def document(content: Any, finish_reason: str = "stop", **others: Any) -> dict[str, Any]:
    """A reply as the address gives it."""
    message = {"role": "assistant", "content": content}
    choices = [{"index": 0, "finish_reason": finish_reason, "message": message}]
    return {"id": "x", "object": "chat.completion", "created": 0, "model": "j", "choices": choices, **others}


def test_a_reply_that_was_cut_off_gives_no_reward() -> None:
    """It may have been about to say "Score: 10", or to go on from what it weighs."""
    with judge_server(lambda question: document("Score: 1", "length")) as server:
        (found,) = grade(config_of(server.url, judge={"max_score": 10.0}), "x")
    assert (found.outcome, found.reward) == (Outcome.VERIFIER_CRASH, 0.0)
    assert found.reason == "the judge's reply was cut off: raise grader.judge.max_tokens"


@pytest.mark.parametrize(
    "usage",
    [None, {}, {"prompt_tokens": None, "completion_tokens": None}, {"prompt_tokens": "x"}],
)
def test_a_judge_that_counts_no_tokens_judges_all_the_same(usage: Any) -> None:
    with judge_server(lambda question: document("Score: 1", usage=usage)) as server:
        (found,) = grade(config_of(server.url), "x")
    assert (found.outcome, found.judge_tokens) == (Outcome.CORRECT, (0, 0))


@pytest.mark.parametrize(
    "reply",
    [
        b"<html>Score: 1</html>",
        b"{nope",
        b"[1]",
        {"error": {"message": "overloaded"}},
        document("x") | {"choices": []},
    ],
)
def test_an_answer_that_is_no_reply_of_a_model_is_no_answer(reply: Any) -> None:
    """Such as a gateway's page with status 200: nothing is stored for it."""
    with judge_server(lambda question: reply) as server, pytest.raises(UserError, match="does not answer"):
        grade(config_of(server.url), *map(str, range(9)))


def test_a_judge_that_refuses_even_an_empty_completion_is_refused_before_a_model_loads() -> None:
    with (
        judge_server(lambda question: (400, "unsupported parameter: max_tokens")) as server,
        GraderPool(config_of(server.url)) as pool,
        pytest.raises(UserError, match=r"refuses the request: .*unsupported parameter"),
    ):
        pool.try_out("How many?", "3")


def test_the_judge_is_asked_as_the_config_says() -> None:
    judge = {
        "prompt": "{answer}|{prompt}|{completion}|{other}",
        "max_score": 10,
        "temperature": 0.5,
        "max_tokens": 99,
    }
    with judge_server(lambda question: "Score: 5") as server:
        (found,) = grade(config_of(server.url, judge=judge), "{answer} \ud800")
        request = server.requests[0]
    assert found.reward == 0.5
    assert request["messages"] == [{"role": "user", "content": "3|How many?|{answer} ?|{other}"}]
    assert (request["model"], request["temperature"], request["max_tokens"]) == ("some/judge", 0.5, 99)


def test_many_requests_are_under_way_at_a_time_and_not_more_than_allowed() -> None:
    def slow(question: str) -> str:
        time.sleep(0.1)
        return "Score: 1"

    with judge_server(slow) as server:
        grades = grade(config_of(server.url, max_concurrent=6), *map(str, range(30)))
        assert {each.outcome for each in grades} == {Outcome.CORRECT}
        assert 4 <= server.most_at_once <= 6


def test_a_limit_per_minute_holds_for_all_workers_together() -> None:
    with judge_server(lambda question: "Score: 1") as server:
        config = config_of(server.url, judge={"requests_per_minute": 600.0}, workers=2)
        grade(config, *map(str, range(11)))
        assert server.times[-1] - server.times[0] > 0.1 * (11 - 2) * 0.8


def test_what_may_pass_is_tried_again() -> None:
    statuses: Iterator[str | int] = itertools.chain([503, 429], itertools.repeat("Score: 1"))
    with judge_server(lambda question: next(statuses)) as server:
        (found,) = grade(config_of(server.url, judge={"retries": 2}), "x")
        assert (found.outcome, len(server.requests)) == (Outcome.CORRECT, 3)


def test_a_completion_that_the_judge_refuses_is_unjudged_and_the_others_are_graded() -> None:
    def reply(question: str) -> str | tuple[int, str]:
        return (400, "the prompt is too long") if "\nlong\n" in question else "Score: 1"

    with judge_server(reply) as server:
        first, refused, last = grade(config_of(server.url), "x", "long", "y")
    assert (first.outcome, last.outcome) == (Outcome.CORRECT,) * 2
    assert (refused.outcome, refused.reward) == (Outcome.VERIFIER_CRASH, 0.0)
    assert "the judge refuses the request" in str(refused.reason)
    assert "too long" in str(refused.reason)


def test_a_judge_that_is_down_or_wrong_is_refused_before_a_model_loads(tmp_path: Path) -> None:
    with judge_server(lambda question: (404, "no such model")) as server:
        with (
            GraderPool(config_of(server.url)) as pool,
            pytest.raises(UserError, match=r"the judge does not answer: NotFoundError.*no such model"),
        ):
            pool.try_out("How many?", "3")
        url = server.url
    with GraderPool(config_of(url)) as pool, pytest.raises(UserError) as told:
        pool.try_out("How many?", "3")
    message = str(told.value)
    assert message.startswith("the judge does not answer: APIConnectionError: ")
    assert f"grader.judge.url = '{url}', model = 'some/judge': start it, or correct them" in message
    assert "$OPENAI_API_KEY" in message


def judged_config(model: Path, folder: Path, server: JudgeServer, **judge: Any) -> Any:
    grader = {
        "name": "judge",
        "max_concurrent": 4,
        "judge": {"url": server.url, "model": "j", "retries": 0, **judge},
    }
    return tiny_config(model, write_questions(folder / "rows.jsonl"), grader=grader)


def test_a_judge_that_goes_down_stops_the_job_and_a_rerun_goes_on(
    tmp_path: Path, engines: Engines, tiny_model: Path
) -> None:
    """No completion is stored with a reward that the judge did not give."""
    count = itertools.count()
    with judge_server(lambda question: "Score: 1" if next(count) < 6 else 500) as server:
        config = judged_config(tiny_model, tmp_path, server)
        engines.next = ScriptedEngine(sample_seconds=0.02)
        down = r"^the judge does not answer: InternalServerError.* goes on from what is kept$"
        with pytest.raises(UserError, match=down):
            run(config)
        before = len(list(run_paths("test").samples.glob("part-*.parquet")))
        assert before >= 1
        server.reply = lambda question: "Score: 0.5"
        printed = run(config)
        assert "the judge gave " in printed
    samples = stored()
    judged = samples.filter(samples["outcome"] != "truncated")
    assert {*judged["outcome"]} <= {"correct", "wrong"}
    assert {*judged["reward"]} == {1.0, 0.5}


def test_what_the_judge_used_is_told_and_kept(tmp_path: Path, engines: Engines, tiny_model: Path) -> None:
    with judge_server(lambda question: "Score: 1") as server:
        printed = run(judged_config(tiny_model, tmp_path, server))
    samples = stored()
    judged = samples.filter(samples["outcome"] != "truncated").height
    assert (
        f"the judge gave {judged} replies: {100 * judged:,} tokens of prompts, {7 * judged:,} of replies"
        in printed
    )
    cost = read_provenance(run_paths("test").vstar).context["cost"]
    assert cost["judge"] == {
        "replies": judged,
        "prompt_tokens": 100 * judged,
        "completion_tokens": 7 * judged,
    }


def test_a_judge_beside_a_rule_reads_what_follows_the_thinking() -> None:
    with judge_server(lambda question: "Score: 1") as server:
        config = config_of(server.url, ["gsm8k", "judge"], answer_after="</think>", weights=[1.0, 0.5])
        grades = grade(config, "<think>secret</think>#### 3", "never ends")
        asked = [request["messages"][0]["content"] for request in server.requests]
    assert [(each.outcome.value, each.reward) for each in grades] == [("correct", 1.5), ("unparsed", 0.0)]
    assert len(asked) == 1
    assert "secret" not in asked[0]
    assert grades[0].judge_tokens == (100, 7)


def test_the_key_comes_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MY_KEY", "s3cret")
    with judge_server(lambda question: "Score: 1") as server:
        grade(config_of(server.url, judge={"api_key_env": "MY_KEY"}), "x")
        assert server.keys == ["Bearer s3cret"]


def test_what_changes_verdicts_changes_the_fingerprint() -> None:
    first = fingerprint(config_of("http://a/v1"))
    assert first.startswith("judge some/judge@")
    assert first == fingerprint(config_of("http://b/v1", judge={"retries": 9, "requests_per_minute": 5.0}))
    for change in ({"model": "x"}, {"prompt": "{completion}"}, {"max_score": 2.0}, {"temperature": 1.0}):
        assert fingerprint(config_of("http://a/v1", judge=change)) != first


@pytest.mark.parametrize(
    ("judge", "expected"),
    [
        ({"url": "localhost:8000"}, "should be an address"),
        ({"prompt": "Is it right?"}, "should contain {completion}"),
        ({"max_score": 0.0}, "greater than 0"),
    ],
)
def test_a_judge_that_cannot_be_asked_is_refused(judge: dict[str, Any], expected: str) -> None:
    with pytest.raises(ValueError, match=expected):
        config_of("http://a/v1", judge=judge)


def test_usage_is_added_up() -> None:
    assert JudgeUsage(1, 2, 3) + JudgeUsage(1, 1, 1) - JudgeUsage(2, 0, 0) == JudgeUsage(0, 3, 4)
