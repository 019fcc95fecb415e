"""Frames a question as [data] says: with a system prompt, examples, an instruction and a prefill."""

from collections.abc import Mapping
from typing import Any

from common.config import DataConfig
from common.data.messages import Turns, turns_of


def text_prompt(template: str, text: str, data: DataConfig) -> str:
    """A question in a text template, after the examples, which end with a blank line each, and before the prefill."""
    examples = (
        f"{_in_template(template, each.prompt, data)}{each.completion}\n\n" for each in data.few_shot or ()
    )
    return f"{''.join(examples)}{_in_template(template, text, data)}{data.prefill or ''}"


def chat_turns(text: str, data: DataConfig) -> Turns:
    """The messages of a question for a chat template: a system prompt, the examples, then the question's own."""
    *earlier, question = turns_of(text)
    system: Turns = []
    if earlier and earlier[0]["role"] == "system":
        system, earlier = earlier[:1], earlier[1:]
    elif data.system_prompt is not None:
        system = [{"role": "system", "content": data.system_prompt}]
    examples: Turns = []
    for each in data.few_shot or ():
        examples += [
            {"role": "user", "content": _instructed(each.prompt, data)},
            {"role": "assistant", "content": each.completion},
        ]
    return [*system, *examples, *earlier, {**question, "content": _instructed(question["content"], data)}]


def framing_identity(data: DataConfig) -> dict[str, Any]:
    """The settings of the framing, as JSON values; empty if only the template surrounds the question."""
    framing = data.model_dump(mode="json", include=set(data.shown) - {"template"})
    if framing["chat_template_kwargs"]:
        framing["chat_template_kwargs"] = sorted(map(list, framing["chat_template_kwargs"].items()))
    return {key: value for key, value in framing.items() if value}


def recorded_framing(prompt_identity: Mapping[str, Any]) -> DataConfig:
    """The framing that an artifact's identity records; the other settings of [data] keep their defaults."""
    found = {
        key: value for key, value in prompt_identity.items() if key in set(DataConfig.shown) - {"template"}
    }
    if "chat_template_kwargs" in found:
        found["chat_template_kwargs"] = dict(found["chat_template_kwargs"])
    return DataConfig.model_validate(found)


def _in_template(template: str, text: str, data: DataConfig) -> str:
    return template.replace("{prompt}", _instructed(text, data))


def _instructed(text: str, data: DataConfig) -> str:
    return text if data.instruction is None else f"{text}\n{data.instruction}"
