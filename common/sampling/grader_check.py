"""Check whether a grader can judge anything at all."""

from collections import Counter

from common.grading import Grade, Outcome

GRADER_TRIAL = 64
"""A grader that can judge none of this many completions is considered broken."""


class GraderCheck:
    """Finds out whether the grader can judge anything at all.

    If it has judged samples before, failures on the few that are left prove nothing.
    """

    def __init__(self, *, nothing_judged_before: bool, proven: bool = False) -> None:
        self.unjudged: Counter[str] = Counter()
        self.all_there = False
        self._few_are_enough = nothing_judged_before
        self._proven = proven
        self._trials = 0

    def count(self, grade: Grade) -> None:
        self._trials += grade.outcome is not Outcome.TRUNCATED
        if not grade.is_judged:
            self.unjudged[f"{grade.outcome.value}: {grade.reason}"] += 1

    @property
    def broken(self) -> bool:
        enough = self._trials >= GRADER_TRIAL or (self.all_there and self._few_are_enough)
        return enough and not self._proven and self.unjudged.total() == self._trials > 0

    def complaint(self) -> str:
        return (
            f"the grader could judge none of the first {self._trials} completions ({next(iter(self.unjudged))}); "
            "nothing was kept of them. Correct grader.name, or give it more time or memory"
        )
