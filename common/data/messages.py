"""Stores prompts that are lists of messages as texts.

All our files store a prompt as a text. A list with one user turn becomes the text of that turn. Any other list becomes
its JSON text, always spelled in the same way, and is turned back into messages for the chat template.
"""

import json
from collections.abc import Sequence
from typing import Any

ROLES = ("system", "user", "assistant")
BEGINNING = '[{"role": "'
UNSAID: tuple[object, ...] = ({}, [], "", "message", None)
"""Values of further keys that carry no information; NeMo Gym writes `"type": "message"`."""

Turns = list[dict[str, str]]


def is_messages(cell: Any) -> bool:
    """Whether a cell is a list of messages, even one that cannot be used."""
    return (
        isinstance(cell, list)
        and bool(cell)
        and all(isinstance(turn, dict) and "role" in turn for turn in cell)
    )


def usable_turns(messages: Sequence[dict[str, Any]], *, drops_last_answer: bool = False) -> Turns:
    """The turns of a list of messages; the last one is the user's.

    Raises ValueError or TypeError, which names the problem.
    """
    if drops_last_answer and messages[-1]["role"] == "assistant":
        messages = messages[:-1]
    turns = [_turn(number, message) for number, message in enumerate(messages, start=1)]
    if not turns or turns[-1]["role"] != "user":
        raise ValueError(f"ends with a turn of {turns[-1]['role'] if turns else 'nobody'}, not of the user")
    return turns


def _turn(number: int, message: dict[str, Any]) -> dict[str, str]:
    role, content = message["role"], message.get("content")
    if role not in ROLES:
        raise ValueError(f"has a turn {number} of {role!r}, not of {', '.join(ROLES)}")
    if not isinstance(content, str):
        raise TypeError(f"has a turn {number} whose content is a {type(content).__name__}, not a text")
    if others := [key for key in message if key not in ("role", "content") and message[key] not in UNSAID]:
        raise ValueError(f"has a turn {number} with {', '.join(others)}, which would not reach the model")
    return {"role": role, "content": content}


def text_of_turns(turns: Turns) -> str:
    """The text that stores the turns."""
    return turns[0]["content"] if len(turns) == 1 else json.dumps(turns, ensure_ascii=False)


def turns_of(text: str) -> Turns:
    """The messages that a prompt's text stands for: those of a stored list, otherwise one user turn."""
    if text.startswith(BEGINNING):
        try:
            turns = usable_turns(json.loads(text))
        except (ValueError, TypeError, KeyError, RecursionError):
            turns = []  # a question that only begins like a list
        if len(turns) > 1 and text_of_turns(turns) == text:
            return turns
    return [{"role": "user", "content": text}]
