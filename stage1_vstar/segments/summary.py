"""What a user should know of a table of states."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stage1_vstar.segments.states import Sample, State


@dataclass(slots=True)
class Summary:
    """Counts over all prompts."""

    prompts: int = 0
    without_solution: int = 0
    one_sided: int = 0
    solutions: int = 0
    uncut: int = 0
    states: int = 0
    open_states: int = 0
    unjudged: int = 0
    single: int = 0
    completions: int = 0
    actions: int = 0
    value: float = 0.0

    def count(self, drawn: Sequence[Sample], states: Sequence[State], rows: Sequence[dict[str, Any]]) -> None:
        """Add a prompt: its solutions, their states, and the rows of these."""
        self.prompts += 1
        self.without_solution += not states
        chosen = [state.solutions[0] for state in states if state.is_terminal]
        self.solutions += len(chosen)
        self.one_sided += len({sample.outcome == "correct" for sample in drawn if sample.is_judged}) == 1
        self.uncut += sum(state.is_terminal and state.step == 1 for state in states)
        self.states += len(rows)
        self.unjudged += len(states) - len(rows)
        for row in rows:
            if row["is_terminal"]:
                continue
            self.open_states += 1
            self.completions += row["num_completions"]
            self.actions += len(row["action_texts"])
            self.single += len(row["action_texts"]) == 1
            self.value += row["value"]

    def lines(self, path: Path) -> list[str]:
        """Lines for the user."""
        found = []
        if self.without_solution:
            found.append(f"{self.without_solution:,} prompts left out: the grader could judge no solution")
        if self.one_sided:
            found.append(
                f"{self.one_sided:,} of {self.prompts:,} prompts have only correct or only wrong solutions; they are "
                "cut all the same"
            )
        if self.uncut:
            found.append(
                f"{self.uncut:,} of {self.solutions:,} chosen solutions are of one step: segments.split cuts nothing "
                "in them"
            )
        if self.unjudged:
            found.append(f"{self.unjudged:,} states left out: the grader could judge no completion")
        if self.single:
            found.append(
                f"{self.single:,} of {self.open_states:,} states have one next step only, and teach nothing"
            )
        if self.open_states:
            found.append(
                f"{path}: {self.states:,} states of {self.solutions:,} solutions of {self.prompts:,} prompts; from "
                f"{self.open_states:,} of them {self.completions:,} completions, mean value "
                f"{self.value / self.open_states:.3f}, {self.actions / self.open_states:.1f} next steps each"
            )
        return found
