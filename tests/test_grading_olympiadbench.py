r"""The OlympiadBench rule: answers in any order, tolerances, units; its authors' examples and all of its answers."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from common.errors import UserError
from common.grading import GraderConfig, GraderPool, Outcome, rule_math
from common.grading.rule_olympiadbench import extract_gold, grade, reference_text, validate_gold

DATA = Path(__file__).parents[2] / "shared" / "data"
EXAMPLES = DATA / "olympiadbench" / "scoring_examples.json"
ANSWERS = DATA / "olympiadbench" / "test.jsonl"
MINERVA = DATA / "minerva_math" / "test.jsonl"
NOT_AS_LABELLED: dict[tuple[str, str], str] = {}
"""Examples that are graded otherwise than their authors label them: reference answer, answer, and why."""

RIGHT = r"""
    1,3 <- 3,1
    1,3 <- 3; 1
    1,3 <- \{1,3\}
    1,3 <- 1 \text{ and } 3
    1,3 <- x=3 \text{ or } x=1
    16,3,1,1 <- 1,1,3,16
    (1,8), (2,7) <- (2,7),(1,8)
    \pm 2 <- 2,-2
    -2,2 <- x=\pm 2
    1\pm\sqrt2 <- 1+\sqrt{2}, 1-\sqrt{2}
    x=1,y=2 <- y=2,x=1
    x=1,y=2 <- 1,2
    f(x)=x, f(x)=2-x <- 2-x, x
    1000 <- 1,000
    1,000 <- 1000
    10,000 <- 10000
    \$12,500 <- 12500
    x=1,000 <- 1000
    1,000, 2 <- 2, 1000
    1000, 2 <- 2, 1,000
    100, 200 <- 200,100
    1,2,100 <- 100,2,1
    3,100,-5 <- 3,-5,100
    3,-5,100 <- 3,100,-5
    3,100, -5 <- 3100, -5
    (100,200),(1,2) <- (1,2),(100,200)
    \pm 1,000 <- 1000, -1000
    \sqrt2 <- 1.41421356237
    x=5 <- 5
    0.6 <- 60\%
    10^{10^{10^{10}}} <- 10^{10^{10^{10}}}
    (-\infty,1]\cup[10,\infty) <- [10,\infty)\cup(-\infty,1]
"""
WRONG = r"""
    1,3 <- 1,3,3
    1,3 <- 1
    1,3 <- 1,1
    16,3,1,1 <- 16,3,1
    \pm 2 <- 2
    x=1,y=2 <- 2,1
    x=5 <- y=5
    1,000 <- 0,1
    1,000 <- 1
    100, 200 <- 100200
    1,2 <- 1,2,\ldots
    5 <- 5\ldots
    \sqrt2 <- 1.414214
    \frac13 <- 0.333333
    2^{-98} <- 0
    0.6 <- 60
    43 <- 43_5
    3.5 <- 3:30
    5 <- 10^{10^{10}}
    1,2 <- 9^{9^9}+5
"""
WITH_UNIT = r"""
    4.2 % 0.1 <- 4.2\%
    4.2 % 0.1 <- 4.25
    4.2\% % 0.1 <- 4.25
    60\% % <- 60
    60\% % <- 60\%
    60 % <- 60\text{ percent}
    60 \% <- 60
    60 $\%$ <- 60
    60 $\%$ <- 60 percent
    60 percent <- 60\%
    \frac{100}{3} % <- 33\frac13\%
    10,20 % <- 20\%,10
    8 min <- 8\text{ minutes}
    8 min <- 8
    166 $cm^2$ <- 166\text{ cm}^2
    90,90 ^{\circ} <- 90^\circ, 90^\circ
    \frac{600}{7} km/h <- \frac{600}{7}\text{ km/h}
"""
OTHER_UNIT = r"""
    4.2 % 0.1 <- 4.4\%
    60\% % <- 0.6
    60 \% <- 61
    60 % <- 60\text{ dollars}
    8 min <- 8\text{ hours}
    166 $cm^2$ <- 166\text{ cm}
"""


def lines(table: str) -> Iterator[tuple[str, str]]:
    for line in table.strip().splitlines():
        gold, _, claim = line.strip().partition(" <- ")
        yield gold, claim


def is_right(claim: str, gold: str) -> bool:
    completion = claim if r"\boxed" in claim else rf"so \boxed{{{claim}}}"
    return grade("", completion, gold).outcome is Outcome.CORRECT


def of_row(row: dict[str, Any]) -> str:
    tolerance = [float(part) for part in (row["error"] or "").split(",") if part]
    return reference_text(row["final_answer"], tolerance, row["unit"])


def read(path: Path) -> Any:
    if not path.is_file():
        pytest.skip(f"{path.name} is not on this machine")
    text = path.read_text(encoding="utf-8")
    return json.loads(text) if path.suffix == ".json" else [json.loads(line) for line in text.splitlines()]


@pytest.mark.parametrize(("gold", "claim"), list(lines(RIGHT)))
def test_right_answers(gold: str, claim: str) -> None:
    assert is_right(claim, gold)
    assert is_right(claim, reference_text([f"${gold}$"], [], None))


@pytest.mark.parametrize(("gold", "claim"), list(lines(WRONG)))
def test_near_misses(gold: str, claim: str) -> None:
    assert not is_right(claim, gold)
    assert not is_right(claim, reference_text([f"${gold}$"], [], None))


@pytest.mark.parametrize(("table", "expected"), [(WITH_UNIT, True), (OTHER_UNIT, False)])
def test_a_unit_may_be_left_out_and_must_not_be_another(table: str, expected: bool) -> None:
    for gold, claim in lines(table):
        answer, unit, *tolerance = gold.split(" ")
        text = reference_text([answer], list(map(float, tolerance)), unit)
        assert is_right(claim, text) == expected, claim


def test_a_tolerance_is_for_all_answers_or_one_for_each() -> None:
    assert is_right("0.61", reference_text(["0.6"], [0.01], None))
    assert not is_right("0.62", reference_text(["0.6"], [0.01], None))
    assert is_right("x=0.61", reference_text(["0.6"], [0.01], None))
    assert is_right("0.2, 10.05", reference_text(["10", "0"], [0.1, 0.3], None))
    assert not is_right("0.2, 10.05", reference_text(["10", "0"], [0.1], None))
    # Taken in order, 1.4 would be 1's, and nothing be left for 0.6.
    assert is_right("1.4, 0.6", reference_text(["1", "2"], [0.6], None))


def test_boxes_in_the_last_line_are_one_answer_each() -> None:
    completion = "First \\boxed{7}.\n\nThe answers are \\boxed{3} and \\boxed{1}.\nDone."
    assert grade("", completion, "1,3").extracted == "3, 1"
    assert is_right(completion, "1,3")
    assert is_right(completion, "1")  # one answer: the last box
    assert not is_right(completion, "7,1")
    assert grade("", "no box: 1, 3", "1,3").outcome is Outcome.UNPARSED


@pytest.mark.parametrize(
    ("gold", "problem"),
    [
        ('{"answers": []}', "its answers are not a list of texts"),
        ('{"answers": [1]}', "its answers are not a list of texts"),
        ('{"answers": ["1"', "not the JSON of a reference answer"),
        (reference_text(["1,2,3"], [1, 2], None), "2 tolerances for 3 answers"),
        (reference_text(["1"], [-1], None), "a tolerance is below 0"),
        (reference_text(["NaN"], [], None), "'NaN' stands for a missing answer"),
        (reference_text(["1", "$ $"], [], None), "'' stands for a missing answer"),
        (reference_text(["1" * 600], [], None), "longer than 512 characters"),
        ("the answer is that we see nothing", "prose, not an answer"),
    ],
)
def test_reference_answers_that_cannot_be_meant_are_refused(gold: str, problem: str) -> None:
    assert problem in str(validate_gold(gold))
    assert grade("", r"\boxed{1}", gold).outcome is not Outcome.CORRECT


def test_a_worked_solution_gives_its_box() -> None:
    assert extract_gold(r"So $x=\boxed{5}$.") == "5"
    assert extract_gold(reference_text(["5"], [], None)) == reference_text(["5"], [], None)
    with pytest.raises(UserError, match="several different boxes"):
        extract_gold(r"\boxed{5} or \boxed{6}")


def test_the_authors_examples_are_graded_as_they_label_them() -> None:
    different, count = {}, 0
    for example in read(EXAMPLES):
        for answer in example["Ans"]:
            precision = answer.get("precision", [])
            tolerance = [float(each) for each in (precision if isinstance(precision, list) else [precision])]
            gold = reference_text([extract_gold(example["GT"])], tolerance, None)
            count += 1
            if is_right(answer["answer"], gold) != answer["equal"]:
                different[example["GT"], answer["answer"]] = answer["equal"]
    assert different.keys() == NOT_AS_LABELLED.keys()
    assert count == 36


def test_all_of_its_answers_are_accepted_and_right_in_any_order() -> None:
    """Also those two that cannot be read as mathematics: a family of functions in words, and a misprint."""
    rows = read(ANSWERS)
    for row in rows:
        gold = of_row(row)
        assert validate_gold(gold) is None, row["id"]
        assert is_right(rf"\boxed{{{row['final_answer'][0]}}}", gold), row["id"]
    assert len(rows) == 675


def test_minervas_answers_are_accepted_and_right_by_the_rule_math() -> None:
    rows = read(MINERVA)
    for row in rows:
        gold = rule_math.extract_gold(row["solution"])
        assert rule_math.validate_gold(gold) is None, gold
        assert rule_math.grade("", rf"\boxed{{{gold}}}", gold).outcome is Outcome.CORRECT, gold
    assert len(rows) == 272


def test_minervas_powers_of_ten_are_right_in_standard_form_and_wrong_with_another_exponent() -> None:
    golds = [rule_math.extract_gold(row["solution"]) for row in read(MINERVA)]
    floats = [match for gold in golds if (match := re.fullmatch(r"(-?[0-9.]+)e(-?[0-9]+)", gold))]
    for each in floats:
        digits, exponent = each[1], int(each[2])
        for power, outcome in ((exponent, Outcome.CORRECT), (exponent + 1, Outcome.WRONG)):
            box = rf"\boxed{{{digits} \times 10^{{{power}}}}}"
            assert rule_math.grade("", box, each[0]).outcome is outcome, (box, each[0])
    assert len(floats) == 58


def test_a_slow_comparison_costs_its_own_grade_alone() -> None:
    gold = reference_text(["5,6"], [0.1], None)
    config = GraderConfig(name="olympiadbench", timeout_seconds=1.0, memory_gib=1)
    hostile = [r"(1+\sqrt{2})^{10^{9}}, 6", r"\binom{10^{12}}{10^{11}}, 6", "((((9!)!)!)!)!, 6", "," * 500]
    hostile += [r"\boxed{" * 8_000 + "5,6" + "}" * 8_000 + r"\boxed{4}", r"\boxed{1}" * 20_000]
    with GraderPool(config) as pool:
        for number, box in enumerate(hostile):
            pool.submit(number, prompt="", completion=rf"\boxed{{{box}}}", answer=gold, truncated=False)
            pool.submit(
                ("next", number), prompt="", completion=r"\boxed{6, 5.05}", answer=gold, truncated=False
            )
        grades = dict(pool.drain())
    assert all(grades["next", number].outcome is Outcome.CORRECT for number in range(len(hostile)))
    assert not any(grades[number].outcome is Outcome.CORRECT for number in range(len(hostile)))
