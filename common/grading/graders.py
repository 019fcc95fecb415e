"""The graders: the built-in rules by name, and a run's grader of one or more rules, reward functions and a judge."""

import asyncio
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial, reduce
from operator import or_
from typing import Protocol

from common.errors import UserError
from common.grading import rule_code, rule_custom, rule_gsm8k, rule_math, rule_olympiadbench
from common.grading.conventions import NOT_APPLICABLE, Judged, Needs, RewardFunction
from common.grading.judge import JUDGE, Judge
from common.grading.outcome import Grade, Outcome, graded, storable
from common.grading.reference import reference_of
from common.grading.spec import GraderSpec

_DOTTED_PATH = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*")


@dataclass(frozen=True, slots=True, kw_only=True)
class Rule:
    """A built-in grader. `warm_up` loads what the first grade would otherwise load on its own deadline.

    `own_seconds` is the time that it gives a completion itself.
    """

    name: str
    version: str
    grade: Callable[[str, str, str], Grade]
    extract_gold: Callable[[str], str]
    validate_gold: Callable[[str], str | None]
    warm_up: Callable[[], object]
    max_completion_characters: int
    own_seconds: float = 0.0


RULES: dict[str, Rule] = {
    "gsm8k": Rule(
        name="gsm8k",
        version=rule_gsm8k.VERSION,
        grade=rule_gsm8k.grade,
        extract_gold=rule_gsm8k.extract_gold,
        validate_gold=rule_gsm8k.validate_gold,
        warm_up=partial(rule_gsm8k.validate_gold, "1"),
        max_completion_characters=rule_gsm8k.MAX_COMPLETION_CHARACTERS,
    ),
    "math": Rule(
        name="math",
        version=rule_math.VERSION,
        grade=rule_math.grade,
        extract_gold=rule_math.extract_gold,
        validate_gold=rule_math.validate_gold,
        warm_up=partial(rule_math.grade, "", r"\boxed{x+1}", r"\frac{1}{2}"),
        max_completion_characters=rule_math.MAX_COMPLETION_CHARACTERS,
    ),
    "olympiadbench": Rule(
        name="olympiadbench",
        version=rule_olympiadbench.VERSION,
        grade=rule_olympiadbench.grade,
        extract_gold=rule_olympiadbench.extract_gold,
        validate_gold=rule_olympiadbench.validate_gold,
        warm_up=partial(rule_olympiadbench.grade, "", r"\boxed{x+1}", r"\frac{1}{2}"),
        max_completion_characters=rule_olympiadbench.MAX_COMPLETION_CHARACTERS,
    ),
    "code": Rule(
        name="code",
        version=rule_code.VERSION,
        grade=rule_code.grade,
        extract_gold=rule_code.extract_gold,
        validate_gold=rule_code.validate_gold,
        warm_up=rule_code.warm_up,
        max_completion_characters=rule_code.MAX_COMPLETION_CHARACTERS,
        own_seconds=rule_code.SECONDS,
    ),
}

KNOWN = ", ".join([*RULES, JUDGE])


def is_grader_name(name: str) -> bool:
    """Whether it names a rule, the judge or a function."""
    return name in RULES or name == JUDGE or is_function(name)


def is_function(name: str) -> bool:
    """Whether it is the dotted path of a reward function."""
    return _DOTTED_PATH.fullmatch(name) is not None


class Part(Protocol):
    """One of the things that a grader is made of."""

    @property
    def version(self) -> str:
        """Pins its verdicts."""
        ...

    def load(self) -> Needs:
        """Gets ready to grade, in this process, and returns the parts of a row that it reads. Raises UserError."""
        ...

    @property
    def is_async(self) -> bool:
        """Whether its grades have to be waited for; known once it is loaded."""
        ...

    def grade(self, judged: Judged) -> Grade:
        """The grade of a completion."""
        ...

    async def grade_async(self, judged: Judged) -> Grade:
        """The same, of a part that is async."""
        ...


@dataclass(frozen=True, slots=True)
class RulePart:
    """A rule, which reads what follows the thinking."""

    rule: Rule
    answer_after: str | None

    @property
    def version(self) -> str:
        return self.rule.version + (f" after {self.answer_after}" if self.answer_after else "")

    def load(self) -> Needs:
        self.rule.warm_up()
        return Needs()

    @property
    def is_async(self) -> bool:
        return False

    def grade(self, judged: Judged) -> Grade:
        completion = judged.completion
        if self.answer_after:
            _, mark, completion = completion.rpartition(self.answer_after)
            if not mark:
                return graded(Outcome.UNPARSED, reason=f"there is no {self.answer_after}")
        completion = completion[-self.rule.max_completion_characters :]
        return self.rule.grade(judged.prompt, completion, judged.reference.answer)

    async def grade_async(self, judged: Judged) -> Grade:
        raise NotImplementedError("a rule is not waited for")


@dataclass(slots=True)
class FunctionPart:
    """A reward function of the user's, which gets the whole completion."""

    name: str
    convention: str | None
    timeout_seconds: float
    function: RewardFunction | None = field(default=None, init=False)

    @property
    def version(self) -> str:
        return rule_custom.version(self.name, self.convention)

    @property
    def loaded(self) -> RewardFunction:
        """The function."""
        if self.function is None:
            self.function = rule_custom.load(self.name, self.convention)
        return self.function

    def load(self) -> Needs:
        return self.loaded.needs

    @property
    def is_async(self) -> bool:
        return self.loaded.is_async

    def grade(self, judged: Judged) -> Grade:
        return rule_custom.grade(self.loaded, judged)

    async def grade_async(self, judged: Judged) -> Grade:
        under_way = asyncio.ensure_future(rule_custom.grade_async(self.loaded, judged))
        done, _ = await asyncio.wait([under_way], timeout=self.timeout_seconds)
        if done:
            return under_way.result()
        under_way.cancel()  # and nobody waits for it: it may go on all the same
        return graded(Outcome.VERIFIER_TIMEOUT, reason=f"over {self.timeout_seconds:g} s")


class Grader:
    """A run's grader: the weighted sum of its parts. The first part says whether a completion is correct."""

    def __init__(self, spec: GraderSpec) -> None:
        """Name the parts; `load` makes them ready. Raises UserError for an unknown name."""
        self.spec = spec
        self._rules = [RULES[name] for name in spec.names if name in RULES]
        self._parts = [_part(name, spec) for name in spec.names]
        self._weights = spec.weights or (1.0,) * len(spec.names)
        self._turn = asyncio.Lock()

    @property
    def version(self) -> str:
        """Two artifacts with equal versions were graded alike. Raises UserError for a function without a module."""
        versions = [part.version for part in self._parts]
        if not self.spec.weights and len(versions) == 1:
            return versions[0]
        return " + ".join(
            f"{repr(weight).removesuffix('.0')} {version}"
            for weight, version in zip(self._weights, versions, strict=True)
        )

    @property
    def max_completion_characters(self) -> int | None:
        """The number of characters read from a completion's end; None if all of it may be read."""
        if self.spec.answer_after or len(self._rules) < len(self._parts):
            return None
        return max(rule.max_completion_characters for rule in self._rules)

    def load(self) -> Needs:
        """Gets ready to grade, in this process, and returns the parts of a row that are read. Raises UserError."""
        return reduce(or_, [part.load() for part in self._parts])

    @property
    def is_async(self) -> bool:
        """Whether grades have to be waited for, so that many should be under way at a time."""
        return any(part.is_async for part in self._parts)

    def extract_gold(self, raw: str) -> str:
        """The reference answer in a data set's own field; UserError where there is none, or not just one."""
        return self._rules[0].extract_gold(raw) if self._rules else raw

    def validate_gold(self, answer: str) -> str | None:
        """The problem with a reference answer, or None."""
        gold = reference_of(answer).answer
        problems = (rule.validate_gold(gold) for rule in self._rules)
        return next((problem for problem in problems if problem is not None), None)

    def grade(
        self, prompt: str, completion: str, answer: str, token_ids: Sequence[int] | None = None
    ) -> Grade:
        """The grade of a completion; `answer` is as our files hold it."""
        judged = _judged(prompt, completion, answer, token_ids)
        return self._sum([part.grade(judged) for part in self._parts])

    async def grade_async(
        self, prompt: str, completion: str, answer: str, token_ids: Sequence[int] | None = None
    ) -> Grade:
        """The same; what has to be waited for is waited for together."""
        judged = _judged(prompt, completion, answer, token_ids)
        grades: dict[int, Grade] = {}
        for place, part in enumerate(self._parts):
            if not part.is_async:
                async with self._turn:
                    await asyncio.sleep(
                        0
                    )  # between two that keep the process busy, those that wait have a turn
                    grades[place] = part.grade(judged)
        waiting = [place for place in range(len(self._parts)) if place not in grades]
        awaited = await asyncio.gather(*(self._parts[place].grade_async(judged) for place in waiting))
        grades |= zip(waiting, awaited, strict=True)
        return self._sum([grades[place] for place in range(len(self._parts))])

    def _sum(self, grades: Sequence[Grade]) -> Grade:
        """One grade of those of the parts; a part that does not apply is left out, one that failed fails all."""
        if not self.spec.weights and len(grades) == 1:
            return grades[0]
        named = list(zip(self.spec.names, self._weights, grades, strict=True))
        applying = [each for each in named if each[2].reason != NOT_APPLICABLE] or named
        for name, _, grade in applying:
            if not grade.is_judged:
                return graded(grade.outcome, reason=f"{grade.reason} ({name})")
        reward = math.fsum(weight * grade.reward for _, weight, grade in applying)
        if not math.isfinite(reward):
            return graded(Outcome.VERIFIER_CRASH, reason=f"the sum of the rewards is {reward}")
        first = applying[0][2]
        parts = [(name, grade.reward) for name, _, grade in applying]
        return Grade(
            outcome=first.outcome,
            reward=reward,
            extracted=first.extracted,
            reason=storable(", ".join(f"{name} {reward:g}" for name, reward in parts)),
            parts=tuple(parts),
            judge_tokens=next((each.judge_tokens for each in grades if each.judge_tokens), None),
        )


def _judged(prompt: str, completion: str, answer: str, token_ids: Sequence[int] | None) -> Judged:
    return Judged(prompt=prompt, completion=completion, reference=reference_of(answer), token_ids=token_ids)


def _part(name: str, spec: GraderSpec) -> Part:
    if name in RULES:
        return RulePart(RULES[name], spec.answer_after)
    if name == JUDGE:
        assert spec.judge is not None, "the config has looked"
        return Judge(spec.judge, spec.answer_after)
    if not is_function(name):
        raise UserError(
            f"unknown grader {name!r}: use one of {KNOWN} or a function as 'package.module:function'"
        )
    return FunctionPart(name, spec.convention, spec.timeout_seconds)


def find_grader(name: str) -> Grader:
    """The grader of one name: a rule, or the reward function at a dotted path."""
    return Grader(GraderSpec(names=(name,)))
