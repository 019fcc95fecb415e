"""Procedural word problems of one to five additions and subtractions, with rows like GSM8K's.

`generate` gives the questions and clean worked solutions of a split; `demonstration` gives the text on which the base
model is pre-trained, in which some writers guess and some make mistakes. No torch, no model: see base_model.py.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

Split = Literal["train", "test"]

PROMPT_TEMPLATE = "{question}\n"

MAX_CHANGES = 5
MAX_NUMBER = 99
MAX_TOTAL = 20

PEOPLE = (
    *(("He", "him", name) for name in ("Tom", "Ben", "Sam", "Omar", "Leo", "Ivan", "Raj", "Max")),
    *(("She", "her", name) for name in ("Anna", "Mia", "Lucy", "Zoe", "Nora", "Eva", "Mei", "Ruth")),
)
OBJECTS = (
    *("apples", "pears", "books", "coins", "cards", "pens"),
    *("stamps", "shells", "balls", "eggs", "cups", "toys"),
)
OPENINGS = (
    "{name} has {number} {objects}.",
    "{name} starts with {number} {objects}.",
    "{name} owns {number} {objects}.",
)
# What makes the next number of a solution quick to find: each sentence is six tokens long, as is each step of a
# solution, and the verb before a number says whether it is gained or lost.
GAINS = (
    "{subject} buys {number} more {objects}.",
    "{subject} finds {number} new {objects}.",
    "{subject} gets {number} from {friend}.",
    "{subject} wins {number} from {friend}.",
    "{friend} brings {number} to {object}.",
)
LOSSES = (
    "{subject} loses {number} old {objects}.",
    "{subject} sells {number} old {objects}.",
    "{subject} gives {number} to {friend}.",
    "{subject} lends {number} to {friend}.",
    "{friend} takes {number} of them.",
)
ENDINGS = (
    "How many {objects} does {name} have now?",
    "How many {objects} does {name} have left?",
    "How many {objects} does {name} own now?",
)

# What the demonstrations get wrong, and by how much.
GUESS_PROBABILITY = 0.4
SLIP_PROBABILITY = 0.09
SLIPS = (-10, -2, -1, 1, 2, 10)
GUESS_STANDARD_DEVIATION = 4.0


@dataclass(frozen=True, slots=True, kw_only=True)
class WordProblem:
    """A question and the arithmetic behind it: a start, and signed changes that keep the total in range."""

    question: str
    start: int
    changes: tuple[int, ...]

    @property
    def total(self) -> int:
        return self.start + sum(self.changes)

    @property
    def worked_solution(self) -> str:
        """`12+3=15, 15-4=11 #### 11`."""
        totals = [self.start]
        for change in self.changes:
            totals.append(totals[-1] + change)
        return _solution(self.changes, totals[:-1], totals[1:])

    @property
    def split(self) -> Split:
        """One question in sixteen is held out, by the hash of its text, so no seed lets the splits meet."""
        return "test" if hashlib.sha256(self.question.encode()).digest()[0] % 16 == 0 else "train"


def generate(split: Split, count: int, seed: int) -> list[dict[str, str]]:
    """Distinct rows of a split, each a `question` and an `answer` (worked solution ending in `#### 11`)."""
    rng = random.Random(f"{split} rows {seed}")
    problems: dict[str, WordProblem] = {}
    for problem in stream(split, rng):
        if len(problems) >= count:
            break
        problems.setdefault(problem.question, problem)
    return [
        {"question": problem.question, "answer": problem.worked_solution} for problem in problems.values()
    ]


def stream(split: Split, rng: random.Random, max_changes: int = MAX_CHANGES) -> Iterator[WordProblem]:
    """An endless stream of a split's problems; a short question may come twice."""
    while True:
        problem = _draw(rng, max_changes)
        if problem.split == split:
            yield problem


def demonstration(problem: WordProblem, rng: random.Random) -> str:
    """One writer's completion: a guess at once, or a worked solution whose steps may slip.

    A slip is carried on: later steps follow from the wrong value. Every total stays a whole number in range.
    """
    if rng.random() < GUESS_PROBABILITY:
        guess = round(problem.total + rng.gauss(0.0, GUESS_STANDARD_DEVIATION))
        return f"#### {min(max(guess, 0), MAX_NUMBER)}"
    total, before, after = problem.start, [], []
    for index, change in enumerate(problem.changes):
        before.append(total)
        total += change
        if rng.random() < SLIP_PROBABILITY:
            ahead = list(_running_totals(total, problem.changes[index + 1 :]))
            lowest, highest = min(ahead), max(ahead)
            slips = [slip for slip in SLIPS if lowest + slip >= 0 and highest + slip <= MAX_NUMBER]
            total += rng.choice(slips)
        after.append(total)
    return _solution(problem.changes, before, after)


def vocabulary_text() -> Iterator[str]:
    """Every word and whole number that the questions and solutions can hold, for a tokenizer to learn."""
    yield from (str(number) for number in range(MAX_NUMBER + 1))
    names = [name for _, _, name in PEOPLE]
    for name, friend in zip(names, names[1:] + names[:1], strict=True):
        for subject, object_, _ in PEOPLE[:: len(PEOPLE) // 2]:
            fillers = {"subject": subject, "object": object_, "name": name, "friend": friend, "number": "1"}
            for objects in OBJECTS:
                fillers["objects"] = objects
                yield " ".join(text.format(**fillers) for text in (*OPENINGS, *GAINS, *LOSSES, *ENDINGS))
    yield "1+1=2, 2-1=1 #### 1"
    yield "#### 1"


def _draw(rng: random.Random, max_changes: int) -> WordProblem:
    subject, object_, name = rng.choice(PEOPLE)
    friend = rng.choice([other for _, _, other in PEOPLE if other != name])
    objects = rng.choice(OBJECTS)
    # All different, so that the number just used tells where in the question the next one follows.
    sizes = rng.sample(range(2, 10), rng.randint(1, max_changes))
    start = total = rng.choice([number for number in range(2, 13) if number not in sizes])
    sentences = [rng.choice(OPENINGS).format(name=name, number=start, objects=objects)]
    changes: list[int] = []
    for size in sizes:
        gain = total < size or (total + size <= MAX_TOTAL and rng.random() < 0.5)
        sentence = rng.choice(GAINS if gain else LOSSES)
        sentences.append(
            sentence.format(subject=subject, object=object_, friend=friend, objects=objects, number=size)
        )
        changes.append(size if gain else -size)
        total += changes[-1]
    sentences.append(rng.choice(ENDINGS).format(name=name, objects=objects))
    return WordProblem(question=" ".join(sentences), start=start, changes=tuple(changes))


def _running_totals(total: int, changes: tuple[int, ...]) -> Iterator[int]:
    yield total
    for change in changes:
        total += change
        yield total


def _solution(changes: tuple[int, ...], before: list[int], after: list[int]) -> str:
    steps = ", ".join(f"{b}{c:+d}={a}" for b, c, a in zip(before, changes, after, strict=True))
    return f"{steps} #### {after[-1]}"
