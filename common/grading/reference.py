"""A prompt's reference answer, together with the columns of its row that reward functions read.

Every file of ours has one text per answer. Where a reward function takes columns, that text is a JSON object of the
answer and these columns. So samples, `regrade` and stage 2 carry them along and know nothing of them.
"""

import json
import math
from dataclasses import dataclass, field
from decimal import Decimal
from typing import Any

BEGINNING = '{"answer": '
KEYS = ["answer", "raw", "columns", "is_messages"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Reference:
    """A reference answer with the rest of its row."""

    answer: str
    raw: Any = None
    """The answer as the data set's file holds it, where it is no text, or the JSON text of a list."""
    columns: dict[str, Any] = field(default_factory=dict)
    """Cells by column name, as the file has them."""
    is_messages: bool = False
    """Whether the data set's prompt is a list of messages."""

    @property
    def given(self) -> Any:
        """The answer as the data set's file holds it."""
        return self.answer if self.raw is None else self.raw

    def to_text(self) -> str:
        """The answer as our files hold it; the answer alone where there is nothing else to hold."""
        if self == reference_of(self.answer):
            return self.answer
        values = (self.answer, self.raw, self.columns, self.is_messages)
        return json.dumps(storable_cell(dict(zip(KEYS, values, strict=True))), ensure_ascii=False)


def reference_of(text: str) -> Reference:
    """The reference that a prompt's answer holds; without columns where it is the answer alone."""
    if text.startswith(BEGINNING):
        try:
            found = json.loads(text)
        except (ValueError, RecursionError):
            found = None  # an answer that only begins so
        if isinstance(found, dict) and list(found) == KEYS and isinstance(found["columns"], dict):
            return Reference(
                answer=str(found["answer"]),
                raw=found["raw"],
                columns=found["columns"],
                is_messages=bool(found["is_messages"]),
            )
    return Reference(answer=text)


def json_number(value: Decimal) -> int | float | None:
    """The same number as JSON can hold it; None if a float would round it."""
    if not value.is_finite():
        return None
    if value == value.to_integral_value():
        return int(value)
    return float(value) if Decimal(repr(float(value))) == value else None


def storable_cell(value: Any) -> Any:
    """A cell as JSON can hold it: a date as its text, NaN as nothing."""
    if isinstance(value, dict):
        return {storable_cell(str(key)): storable_cell(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [storable_cell(inner) for inner in value]
    if isinstance(value, float | Decimal):
        return float(value) if math.isfinite(value) else None
    if isinstance(value, str):
        return value.encode("utf-8", "replace").decode("utf-8")
    return value if value is None or isinstance(value, int) else str(value)
