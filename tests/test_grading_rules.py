"""The rules: what counts as correct, checked against labels that others made."""

import contextlib
import json
import logging
import random
import re
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from common.grading import (
    GraderConfig,
    GraderPool,
    GradingTask,
    Outcome,
    find_grader,
    reward_of,
    rule_math,
)
from common.grading.outcome import storable
from common.grading.rule_gsm8k import grade as grade_gsm8k
from common.grading.rule_math import grade as grade_math
from common.grading.rule_math import last_box

GRADING_DOC = Path(__file__).parents[1] / "docs" / "grading.md"
AGREEMENT_DOC = Path(__file__).parents[1] / "docs" / "evidence" / "grading.md"
SHARED = Path(__file__).parents[2] / "shared"


def rows(path: str) -> list[dict[str, Any]]:
    file = SHARED / path
    if not file.is_file():
        pytest.skip(f"{file} is not on this machine")
    with file.open(encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]


def gsm8k(completion: str, answer: str) -> Outcome:
    return grade_gsm8k("", completion, answer).outcome


def boxed(prediction: str, answer: str) -> Outcome:
    return grade_math("", rf"so \boxed{{{prediction}}}", answer).outcome


def test_only_a_correct_answer_is_rewarded() -> None:
    assert {outcome: reward_of(outcome) for outcome in Outcome if reward_of(outcome)} == {
        Outcome.CORRECT: 1.0
    }


def test_stored_texts_are_short_and_hold_no_lone_surrogates() -> None:
    assert storable("a\ud800b") == "a?b"
    assert storable("x" * 1000) == "x" * 512
    assert storable(None) is None


@pytest.mark.parametrize(
    ("completion", "answer", "outcome"),
    [
        ("#### 18", "18", Outcome.CORRECT),
        ("#### 18.0", "18", Outcome.CORRECT),
        ("#### $1,234.50.\n", "1234.5", Outcome.CORRECT),
        ("#### -5", "-5", Outcome.CORRECT),
        ("####: **18** dollars", "18", Outcome.CORRECT),
        ("#### 3\nno, #### 4", "4", Outcome.CORRECT),
        ("#### 4\nno, #### 3", "4", Outcome.WRONG),
        ("#### 18.000000000000000000001", "18", Outcome.WRONG),
        ("#### 35/8", "35", Outcome.UNPARSED),
        ("#### 5 + 3 = 8", "5", Outcome.UNPARSED),
        ("#### 5-9", "5", Outcome.UNPARSED),
        ("#### 5 * 2", "5", Outcome.UNPARSED),
        ("#### 5 - the rest is for Tom", "5", Outcome.CORRECT),
        ("the answer is 18", "18", Outcome.UNPARSED),
        ("####", "18", Outcome.UNPARSED),
        ("#### ٤٢", "42", Outcome.UNPARSED),
        ("#### 3 no wait #### 5/2", "3", Outcome.UNPARSED),
        ("#### 5\n#### unknown", "5", Outcome.UNPARSED),
        ("#### 5e3", "5", Outcome.UNPARSED),
        ("#### 1.2.3", "1.2", Outcome.UNPARSED),
        ("#### 12 34", "12", Outcome.UNPARSED),
        ("#### 5 eggs", "5", Outcome.CORRECT),
        ("#### 5\n\n2 more", "5", Outcome.CORRECT),
        ("#### 18", "eighteen", Outcome.GOLD_UNPARSED),
    ],
)
def test_gsm8k_reads_the_last_marked_number(completion: str, answer: str, outcome: Outcome) -> None:
    assert gsm8k(completion, answer) is outcome


def test_gsm8k_agrees_with_every_labelled_model_solution() -> None:
    """The labelled outputs mark their answer with `A:` instead of `####`."""
    agreed = 0
    for row in rows("data/gsm8k/example_model_solutions.jsonl"):
        answer = row["ground_truth"].rpartition("A: ")[2]
        for model in ("6b_finetuning", "6b_verification", "175b_finetuning", "175b_verification"):
            completion = "#### ".join(row[model]["solution"].rsplit("A: ", 1))
            agreed += (gsm8k(completion, answer) is Outcome.CORRECT) == row[model]["is_correct"]
    assert agreed == 5276


@pytest.mark.parametrize(
    "text", ["#### " + " " * 60_000 + "x", "#### 0." + "3" * 60_000, "####" * 16_000, "#### 1" * 10_000]
)
def test_gsm8k_takes_linear_time_on_any_text(text: str) -> None:
    with GraderPool(GraderConfig(name="gsm8k", timeout_seconds=2)) as pool:
        [grade] = pool.grade_all([GradingTask(prompt="", completion=text, answer="7")])
    assert grade.outcome in (Outcome.UNPARSED, Outcome.WRONG)


@pytest.mark.parametrize(
    ("text", "box"),
    [
        (r"\boxed{1} then \boxed{\frac{1}{2}}", r"\frac{1}{2}"),
        (r"\boxed {17}", "17"),
        (r"\boxed 9$.", "9"),
        (r"\boxed{\boxed{3}}", "3"),
        (r"\boxed{{(1,2)}}", "(1,2)"),
        (r"\boxed{\left\{ 1,2 \right.}", r"\left\{ 1,2 \right."),
        (r"\boxed{1} and \boxed{2", None),
        (r"\boxed{}", ""),
        ("no box", None),
    ],
)
def test_the_last_box_is_found_by_counting_braces(text: str, box: str | None) -> None:
    assert last_box(text) == box


@pytest.mark.parametrize(
    ("prediction", "answer"),
    [
        ("0.5", r"\frac{1}{2}"),
        ("x+1", "1+x"),
        ("x=5", "5"),
        ("2+3=5", "5"),
        (r"15\text{ cm}^2", "15"),
        ("15 cm", r"15\mbox{ cm}"),
        (r"\$10{,}000", "10000"),
        (r"90^\circ", "90"),
        ("43_{10}", "43"),
        ("204", "204_5"),
        (r"\{2, 1\}", r"\{1,2\}"),
        (r"\text{(A)}", "A"),
        (r"2007+\frac{\pi}{2}", r"2007 + \frac\pi 2"),
        ("20000", r"20,\!000"),
        ("0.333333", r"\frac{1}{3}"),
    ],
)
def test_equal_answers_in_other_words_are_correct(prediction: str, answer: str) -> None:
    assert boxed(prediction, answer) is Outcome.CORRECT


@pytest.mark.parametrize(
    ("prediction", "answer"),
    [
        ("4=5", "5"),
        ("x=4=5", "5"),
        ("4t", "4"),
        (r"4\text{t}", "4"),
        ("3s", "3t"),
        ("43_5", "43"),
        ("43_6", "43_5"),
        (r"\frac{1}{2^{98}}", r"\frac{1}{2^{99}}"),
        (r"\frac{1}{2006!}", r"\frac{1}{2004!}"),
        ("0.00000001", "0.00000002"),
        ("1,2,3,4,5", "5"),
        (r"4 \text{ or } 5", "5"),
        (r"\pm 5", "5"),
        ("2", r"2007 + \frac\pi 2"),
    ],
)
def test_known_holes_of_math_verify_are_closed(prediction: str, answer: str) -> None:
    assert boxed(prediction, answer) is Outcome.WRONG


@pytest.mark.parametrize(
    ("prediction", "answer", "outcome"),
    [
        ("1-x^{2}-y^{2}=0", "x^2+y^2=1", Outcome.CORRECT),
        ("x^2+y^2-26=0", "x^2+y^2=25", Outcome.WRONG),
        ("y=5", "x=5", Outcome.WRONG),
        (r"x=\frac{1}{2^{98}}", r"x=\frac{1}{2^{99}}", Outcome.WRONG),
        ("1 000", "0", Outcome.WRONG),
        ("1, 234", "1234", Outcome.WRONG),
        ("2 3/4", "23/4", Outcome.WRONG),
        ("2 3/4", "11/4", Outcome.CORRECT),
        (r"2\,\frac{3}{4}", "11/4", Outcome.CORRECT),
        ("1 2", "12", Outcome.UNPARSED),
        (r"1 \quad 2", "12", Outcome.UNPARSED),
        ("1 2", "2", Outcome.UNPARSED),
        ("0.5 5", "0.55", Outcome.UNPARSED),
        ("1 000", "1000", Outcome.CORRECT),
        (r"10\,000", "10000", Outcome.CORRECT),
        (r"\frac 1 2", "0.5", Outcome.CORRECT),
    ],
)
def test_equations_turned_round_are_equal_and_spaced_digits_are_no_product(
    prediction: str, answer: str, outcome: Outcome
) -> None:
    assert boxed(prediction, answer) is outcome


def test_plain_numbers_get_the_verdict_that_math_verify_gives() -> None:
    logging.getLogger("math_verify").setLevel(logging.ERROR)
    chance = random.Random(7)
    shortcuts = 0
    for _ in range(800):
        answer = _number(chance)
        box = _near(chance, answer)
        answer, box = rule_math.read(answer).text, rule_math.read(box).text
        verdict = rule_math._as_numbers(answer, box)
        if verdict is not None:
            shortcuts += 1
            gold, predicted = (rule_math.parsed(text, is_real=True) for text in (answer, box))
            equal = rule_math._equal(answer, gold, box, predicted)
            assert (verdict is Outcome.CORRECT) == equal, (answer, box)
    assert shortcuts > 500


def _number(chance: random.Random) -> str:
    """An integer, decimal, fraction, mixed number or number with thousands, in one of its spellings."""
    a, b, c = (str(chance.randrange(10 ** chance.choice([1, 1, 2, 3, 9, 20]))) for _ in range(3))
    spelling = chance.choice(
        [
            a,
            f"{a}.{b}",
            f"00{a}.",
            rf"\frac{{{a}}}{{1{b}}}",
            rf"{a}\dfrac{{{b}}}{{1{c}}}",
            rf"{a} \tfrac{{{b}}}{{1{c}}}",
            f"{a}/1{b}",
            f"{a[:3]},000",
            rf"{a[:3]},\!125",
            f"{a[:3]}{{,}}500.5",
            f"{a}.0;",
        ]
    )
    return chance.choice(["", "-"]) + spelling


def _near(chance: random.Random, number: str) -> str:
    """The number written in another way, rounded, a little off, or another number."""
    value = rule_math.plain_number(rule_math.read(number).text)
    if value is None:
        return _number(chance)
    off = float(value) * (1 + chance.choice([-1, 1]) * 10 ** -chance.uniform(2, 8))
    ratio = rf"\frac{{{abs(value.numerator)}}}{{{value.denominator}}}"
    return chance.choice(
        [number, _number(chance), str(value), "-" * (value < 0) + ratio]
        + [f"{digits:.{places}f}" for digits in (float(value), off) for places in (3, 6, 12)]
    )


def test_a_box_too_long_to_parse_still_counts_where_it_is_the_gold() -> None:
    long = "+".join("1" * 400)
    assert boxed(long, long.replace("+", " + ")) is Outcome.CORRECT
    assert boxed(long, "400") is Outcome.UNPARSED
    assert boxed("400", long) is Outcome.GOLD_UNPARSED


def test_math_agrees_with_799_of_800_labels_and_the_other_label_is_wrong() -> None:
    disagreements = [
        (row["gt"], grade.extracted)
        for row in rows("data/qwen_math_cot_100/math_cot_100.jsonl")
        for response, label in zip(row["code"], row["score"], strict=True)
        if ((grade := grade_math("", response, row["gt"])).outcome is Outcome.CORRECT) != bool(label)
    ]
    assert disagreements == [("10{,}000", "10000")]


def test_gold_answers_are_read_from_the_field_of_the_dataset() -> None:
    assert find_grader("gsm8k").extract_gold("16 - 3 = 13\n#### 1,300") == "1,300"
    assert find_grader("math").extract_gold(r"thus $\boxed{\frac{1}{2}}$.") == r"\frac{1}{2}"
    assert find_grader("math").extract_gold(r"\boxed{2}, that is \boxed{2.}") == "2."
    assert find_grader("math").extract_gold(r"\frac{1}{2}") == r"\frac{1}{2}"


@pytest.mark.parametrize(
    ("grader", "raw", "message"),
    [
        ("gsm8k", "so #### ", "no reference answer"),
        ("math", r"so \boxed{}", "empty or unclosed"),
        ("math", r"either \boxed{1} or \boxed{2}", "several different boxes"),
        ("math", "word " * 200, "no .boxed"),
        ("math", " ", "empty"),
        ("latex", "1", "unknown grader"),
    ],
)
def test_a_gold_that_cannot_be_used_is_refused_before_generation(grader: str, raw: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        find_grader(grader).extract_gold(raw)


def test_a_gold_that_cannot_be_read_is_named() -> None:
    assert find_grader("gsm8k").validate_gold("1,300") is None
    assert "not a number" in str(find_grader("gsm8k").validate_gold("about 5"))
    assert find_grader("math").validate_gold(r"\frac{1}{2}") is None
    assert "cannot parse" in str(find_grader("math").validate_gold(r"\frac{"))


def test_the_dirty_golds_of_math_train_are_found() -> None:
    """Two empty boxes; 23 solutions with boxes that differ by more than spelling."""
    problems: Counter[str] = Counter()
    for row in rows("data/math/train.jsonl"):
        try:
            find_grader("math").extract_gold(row["solution"])
        except ValueError as error:
            problems[str(error).split(" in the")[0]] += 1
    assert problems == {r"an empty or unclosed \boxed{}": 2, "several different boxes": 23}


def test_the_documentation_lists_every_disagreement_with_other_graders_tests() -> None:
    """docs/evidence/grading.md holds two tables: agreement by source, and each case that differs, by its id."""
    cases = rows("cases/verifier.jsonl")
    agreement: dict[str, list[int]] = {}
    differing = []
    for grader in ("gsm8k", "math"):
        chosen = [case for case in cases if case["kind"] == grader]
        with GraderPool(GraderConfig(name=grader, workers=2, timeout_seconds=3)) as pool:
            grades = pool.grade_all([_task(case) for case in chosen])
        for case, grade in zip(chosen, grades, strict=True):
            agreed = (grade.outcome is Outcome.CORRECT) == case["expected"]
            count = agreement.setdefault(case["source"].split()[0].split("@")[0].split("#")[0], [0, 0])
            count[0] += agreed
            count[1] += 1
            differing += [] if agreed else [case["id"]]
    text = AGREEMENT_DOC.read_text(encoding="utf-8")
    by_source = re.findall(r"^\| (\S+/\S+) \| (\d+) \| (\d+) \|$", text, re.MULTILINE)
    assert {source: [int(agreed), int(total)] for source, agreed, total in by_source} == agreement
    explained = re.findall(r"^\| ([\d, ]+) \| (?:policy|theirs|ours) \| .+ \|$", text, re.MULTILINE)
    assert sorted(int(each) for ids in explained for each in ids.split(", ")) == sorted(differing)


def test_the_documentation_has_one_row_for_each_outcome_with_its_reward() -> None:
    text = GRADING_DOC.read_text(encoding="utf-8")
    documented = re.findall(r"^\| `(\w+)` \| .+ \| ([01]) \|$", text, re.MULTILINE)
    assert [(outcome.value, f"{reward_of(outcome):g}") for outcome in Outcome] == documented


def _task(case: dict[str, Any]) -> GradingTask:
    """A bare answer or text becomes the content of a box, which is all that our rule reads."""
    completion, answer = case["prediction"], case["gold"]
    if case["form"] != "response" and r"\boxed" not in completion:
        completion = rf"\boxed{{{completion.strip()}}}"
    with contextlib.suppress(ValueError):
        answer = find_grader(case["kind"]).extract_gold(answer)
    return GradingTask(prompt="", completion=completion, answer=answer)
