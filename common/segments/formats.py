"""Step-level data of others: solutions whose steps have labels, in three formats that are told apart by their columns.

    TRL             prompt, completions: list[str], labels: list[bool] (or numbers from 0 to 1)
    Math-Shepherd   input: the question and its steps, each with `ки` after it; label: the same with + or - for `ки`
    PRM800K         question.problem; label.steps, each with rated alternatives, of which one is gone on from

A label is taken for the value of the state after its step.
"""

import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from decimal import Decimal
from typing import Any

TAG = "ки"
"""Math-Shepherd's mark at the end of each step."""

_MARKS = {"+": 1.0, "-": 0.0}
_FIRST_STEP = re.compile("step 1:", re.IGNORECASE)

RATINGS = {1: 1.0, 0: 1.0, -1: 0.0}
"""Values of PRM800K's ratings. A neutral step, 0, is correct and leads nowhere: a solution can still follow."""


class WrongRow(ValueError):
    """A row that cannot be read; its message says what is wrong with it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LabelledStep:
    """A step of a solution. `value` is that of the state after it, None if the row does not give it here."""

    text: str
    value: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class LabelledSolution:
    """A question with the steps of a solution, or of its beginning."""

    question: str
    answer: str
    """The reference answer, empty if the format has none."""
    steps: Sequence[LabelledStep]
    is_whole: bool
    """Whether the solution is known to end with the last step."""


@dataclass(slots=True)
class Labelled:
    """The solutions of a data set, and how many of its rows are wrong in which way."""

    solutions: list[LabelledSolution] = field(default_factory=list)
    rows: int = 0
    wrong: Counter[str] = field(default_factory=Counter)
    first_wrong: str = ""
    """The place of the first wrong row, and what is wrong with it."""


def read_labelled(rows: Iterable[Mapping[str, Any]]) -> Labelled:
    """Read rows of any of the formats."""
    found = Labelled()
    for row in rows:
        found.rows += 1
        try:
            found.solutions += _solutions_of(row)
        except WrongRow as error:
            found.first_wrong = found.first_wrong or f"row {found.rows}: {error}"
            found.wrong[str(error)] += 1
    return found


def _solutions_of(row: Mapping[str, Any]) -> list[LabelledSolution]:
    """The labelled solutions of a row. Raises WrongRow."""
    for columns, read in _FORMATS.items():
        if row.keys() >= set(columns):
            solutions = list(read(row))
            if not all(solution.steps for solution in solutions):
                raise WrongRow("it has no step with a label")
            return solutions
    known = "; ".join(", ".join(columns) for columns in _FORMATS)
    raise WrongRow(
        f"it has the columns {', '.join(map(str, row)) or 'of no row'}, not those of a format ({known})"
    )


def _of_trl(row: Mapping[str, Any]) -> Iterator[LabelledSolution]:
    texts, labels = row["completions"], row["labels"]
    if not isinstance(texts, list) or not isinstance(labels, list):
        raise WrongRow("completions and labels should be lists")
    if len(texts) != len(labels):
        raise WrongRow(f"it has {len(labels)} labels for {len(texts)} steps")
    answer = row.get("answer")
    yield LabelledSolution(
        question=_text(row["prompt"], "prompt"),
        answer=answer if isinstance(answer, str) else "",
        steps=[
            LabelledStep(text=_step(text, number), value=_share(label, number))
            for number, (text, label) in enumerate(zip(texts, labels, strict=True), start=1)
        ],
        is_whole=False,
    )


def _of_math_shepherd(row: Mapping[str, Any]) -> Iterator[LabelledSolution]:
    text, marked = _text(row["input"], "input"), _text(row["label"], "label")
    ends = [match.start() for match in re.finditer(TAG, text)]
    if not ends:
        raise WrongRow(f"its input has no {TAG}")
    values = _marks(text.split(TAG), marked)
    begin = _begin_of_steps(text, ends[0])
    steps: list[LabelledStep] = []
    start = begin
    for end, value in zip(ends, values, strict=True):
        if end >= begin:
            steps.append(LabelledStep(text=_step(text[start:end], len(steps) + 1), value=value))
            start = end + len(TAG)
    yield LabelledSolution(
        question=_text(text[:begin].replace(TAG, "").strip(), "the question in its input"),
        answer="",
        steps=steps,
        is_whole=not text[start:].strip(),
    )


def _marks(pieces: Sequence[str], marked: str) -> list[float]:
    """The values of the steps that `pieces` of the input end with, from the same text with + or - between them."""
    values, place = [], 0
    for number, piece in enumerate(pieces[:-1], start=1):
        place += len(piece)
        mark = marked[place : place + 1]
        if not marked.startswith(piece, place - len(piece)) or mark not in _MARKS:
            raise WrongRow(f"its label is not its input with + or - for each {TAG}, from the {number}. on")
        values.append(_MARKS[mark])
        place += 1
    return values


def _begin_of_steps(text: str, first_end: int) -> int:
    """Where the question ends: before `Step 1:`, or else after the only question mark before the first step's end."""
    if (match := _FIRST_STEP.search(text)) is not None:
        return match.start()
    if text.count("?", 0, first_end) != 1:
        raise WrongRow(
            "its input does not show where the question ends: by `Step 1:` or a single question mark"
        )
    return text.index("?") + 1


def _of_prm800k(row: Mapping[str, Any]) -> Iterator[LabelledSolution]:
    """The labeller's solution, and each alternative to one of its steps as a solution that ends there."""
    question, label = row["question"], row["label"]
    if (
        not isinstance(question, dict)
        or not isinstance(label, dict)
        or not isinstance(label.get("steps"), list)
    ):
        raise WrongRow("question and label should be objects, and label.steps a list")
    problem = _text(question.get("problem"), "question.problem")
    answer = str(question.get("ground_truth_answer") or "")
    along: list[LabelledStep] = []
    is_whole, found = label.get("finish_reason") == "solution", 0
    for number, step in enumerate(label["steps"], start=1):
        alternatives, chosen = _alternatives(step, number)
        before = [LabelledStep(text=each.text, value=None) for each in along]
        for alternative in alternatives:
            if alternative is not chosen and alternative.value is not None:
                found += 1
                yield LabelledSolution(
                    question=problem, answer=answer, steps=[*before, alternative], is_whole=False
                )
        if chosen is None:
            is_whole = False
            break
        along.append(chosen)
    if any(step.value is not None for step in along):
        yield LabelledSolution(question=problem, answer=answer, steps=along, is_whole=is_whole)
    elif not found:
        raise WrongRow("none of its steps has a rating")


def _alternatives(step: Any, number: int) -> tuple[list[LabelledStep], LabelledStep | None]:
    """The alternatives of a step, and the one that the solution goes on from, if any: a labeller's own is correct."""
    if not isinstance(step, dict) or not isinstance(step.get("completions") or [], list):
        raise WrongRow(f"its step {number} is not an object with completions")
    alternatives = []
    for each in step.get("completions") or []:
        if not isinstance(each, dict) or each.get("rating") not in (*RATINGS, None):
            raise WrongRow(
                f"its step {number} has a completion without a text, or with a rating other than -1, 0 or 1"
            )
        rating = each.get("rating")
        value = None if rating is None else RATINGS[rating]
        alternatives.append(LabelledStep(text=_step(each.get("text"), number), value=value))
    place, own = step.get("chosen_completion"), step.get("human_completion")
    if place is not None:
        if not isinstance(place, int) or not 0 <= place < len(alternatives):
            raise WrongRow(f"the chosen completion of its step {number} is {place}, of {len(alternatives)}")
        return alternatives, alternatives[place]
    if own is None:
        return alternatives, None
    text = own.get("text") if isinstance(own, dict) else own
    return alternatives, LabelledStep(text=_step(text, number), value=1.0)


def _text(value: Any, name: str) -> str:
    if not isinstance(value, str) or not value.strip():
        raise WrongRow(f"{name} should be a text that is not blank")
    return value


def _step(value: Any, number: int) -> str:
    if not isinstance(value, str) or not value.strip():
        raise WrongRow(f"its step {number} should be a text that is not blank")
    return value.strip()


def _share(label: Any, number: int) -> float:
    if not isinstance(label, int | float | Decimal) or not 0 <= label <= 1:
        raise WrongRow(f"the label of its step {number} should be true, false or a number from 0 to 1")
    return float(label)


_FORMATS: dict[tuple[str, ...], Callable[[Mapping[str, Any]], Iterator[LabelledSolution]]] = {
    ("prompt", "completions", "labels"): _of_trl,
    ("input", "label"): _of_math_shepherd,
    ("question", "label"): _of_prm800k,
}
