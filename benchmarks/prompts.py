"""From a data set to prompts: tokenizing questions in batches, compared with one call per question.

    make base-model && .venv/bin/python -m benchmarks.prompts
    .venv/bin/python -m benchmarks.prompts --rows 20000 --questions train.jsonl --model path/to/a/model

Both read the same JSONL file and make the same prompts, which is checked; repetitions take turns. "One by one" is how
the project worked before it had batches. Without `--questions` the prompts are word problems; with a file of GSM8K they
are its questions, repeated as needed and numbered so that none is a duplicate. Batches use all cores, so the ratio of
wall-clock times depends on how busy the cores are; the ratio of CPU times does not.
"""

import argparse
import hashlib
import json
import tempfile
import time
from array import array
from collections.abc import Callable
from pathlib import Path

import cli  # noqa: F401  the thread settings of the command line
from benchmarks.processes import rotations
from benchmarks.tables import Column, comparison
from common.config import DataConfig
from common.data.datasets import read_pairs
from common.data.prompts import load_prompts, prompt_id
from common.data.rendering import PromptRenderer
from common.demo import word_problems
from common.model.files import reference_model
from common.rollout import Prompt
from stage2_train.config import Config, load_config

WAYS = ("one by one", "in batches")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=100_000)
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--questions", type=Path, help="a .jsonl file of GSM8K")
    parser.add_argument("--model", default=None, help="a folder with a tokenizer; the demo's by default")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "rows.jsonl"
        write_rows(path, arguments.rows, arguments.questions)
        settings = [f"model.path={arguments.model}"] if arguments.model else []
        data = DataConfig(format="gsm8k", path=str(path), max_prompt_tokens=4096)
        config = load_config(Path("configs/demo.toml"), settings).model_copy(update={"data": data})
        renderer = PromptRenderer(reference_model(config), config.data)
        run: dict[str, Callable[[], list[Prompt]]] = {
            WAYS[0]: lambda: one_by_one(config, renderer),
            WAYS[1]: lambda: load_prompts(config.data, config, renderer),
        }
        expected = run[WAYS[0]]()
        wall: dict[str, list[float | None]] = {way: [] for way in WAYS}
        cpu: dict[str, list[float | None]] = {way: [] for way in WAYS}
        for _, way in rotations(WAYS, arguments.repetitions):
            began = time.perf_counter(), time.process_time()
            prompts = run[way]()
            wall[way].append(time.perf_counter() - began[0])
            cpu[way].append(time.process_time() - began[1])
            assert prompts == expected, f"{way} made other prompts"
            del prompts
    tokens = sum(len(prompt.token_ids) for prompt in expected) / len(expected)
    print(f"{len(expected):,} prompts of {tokens:.0f} tokens, {arguments.repetitions} repetitions\n")
    columns = [
        Column(name=name, digits=2, values=values) for name, values in (("seconds", wall), ("CPU s", cpu))
    ]
    print(comparison("tokenised", columns))


def write_rows(path: Path, rows: int, questions: Path | None) -> None:
    """A JSONL file of GSM8K's form, without duplicates."""
    if questions is None:
        found = [str(row["question"]) for row in word_problems.generate("train", min(rows, 1024), 0)]
    else:
        found = [
            str(json.loads(line)["question"]) for line in questions.read_text(encoding="utf-8").splitlines()
        ]
    with path.open("w", encoding="utf-8") as file:
        for number in range(rows):
            question = f"{found[number % len(found)]} ({number})"
            file.write(json.dumps({"question": question, "answer": f"#### {number}"}) + "\n")


def one_by_one(config: Config, renderer: PromptRenderer) -> list[Prompt]:
    """A call of the tokenizer for each prompt."""
    prompts: dict[str, Prompt] = {}
    for text, answer in read_pairs(config.data, config):
        identifier = prompt_id(text, answer)
        if identifier in prompts:
            continue
        token_ids = array(
            "i", renderer.tokenizer(renderer.in_template(text), add_special_tokens=False).input_ids
        )
        prompts[identifier] = Prompt(
            id=identifier,
            text=text,
            answer=answer,
            token_ids=token_ids,
            token_hash=hashlib.sha256(token_ids.tobytes()).hexdigest()[:16],
        )
    return list(prompts.values())


if __name__ == "__main__":
    main()
