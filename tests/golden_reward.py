"""The reward of the run in tests/golden/31beced, which is kept as commit 31beced wrote it. Do not change this file."""


def reward(prompt: str, completion: str, answer: str) -> float:
    """A number from 0 to 1 that most completions differ in."""
    return sum(map(ord, completion)) % 7 / 6
