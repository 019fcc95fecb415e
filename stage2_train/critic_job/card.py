"""The model card of a critic, README.md: how to read its values, how good they are, what it was trained with.

It names no folder of the machine, so that it can be published as it is.
"""

from typing import Any

from huggingface_hub import ModelCardData

from common.report.page import flat
from stage2_train.critic_job.record import Record
from stage2_train.critic_job.results import CriticFigures, first_wrong_lines, rows_of

USE = """\
```python
import torch
from transformers import AutoModelForTokenClassification

critic = AutoModelForTokenClassification.from_pretrained(folder)
token_ids = [...]  # of the prompt and of the first steps of a solution
with torch.no_grad():
    logits = critic(torch.tensor([token_ids])).logits  # shape (1, tokens, 1)
value = logits[0, -1, 0].sigmoid()
```"""


def critic_card(figures: CriticFigures, record: Record) -> str:
    """The text of README.md."""
    header = ModelCardData(
        pipeline_tag="token-classification",
        library_name="transformers",
        tags=["astar-po", "critic", "reasoning"],
    )
    sections = [
        f"---\n{header.to_yaml()}\n---",
        "# Critic of steps of solutions",
        "V_φ(s) is the probability that the model which completed the states in training reaches a correct answer "
        "from the state s, a prompt with the first steps of a solution. It is the sigmoid of the logit of label 0, "
        "`correct`, at the state's last token. At tokens within a step the critic was not trained. transformers' "
        "pipeline for token classification takes a softmax over the one label, which is always 1: use the logit.",
        USE,
        "A value belongs to that model and is no grade of a text. Compare values of next steps of one state; as a "
        "reward for steps they invite reward hacking (the paper's Remark 3.1).",
        "## How good the values are",
        *_quality(figures),
        "## Training",
        _table([("", "value"), *_settings(record.context), *_settings(record.trained_with)]),
        "Direct Advantage Policy Optimization, [arXiv:2412.18279](https://arxiv.org/abs/2412.18279), Section 3.2.",
    ]
    return "\n\n".join(sections) + "\n"


def _quality(figures: CriticFigures) -> list[str]:
    if not figures.held_out:
        return ["No prompt was held out."]
    return [
        f"On {figures.held_out_prompts:,} held-out prompts. `reliability.png` is a plot of them, and `figures.json` "
        "has all figures.",
        _table(rows_of(figures)),
        "\n".join(f"- {line}" for line in first_wrong_lines(figures.first_wrong_step)),
    ]


def _settings(document: dict[str, Any]) -> list[tuple[str, ...]]:
    return [(name, f"`{', '.join(text.splitlines())}`") for name, text in flat(document)]


def _table(rows: list[tuple[str, ...]]) -> str:
    head, *rest = rows
    return "\n".join(f"| {' | '.join(row)} |" for row in (head, ("---",) * len(head), *rest))
