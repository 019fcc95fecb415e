"""Everything that is to be measured on a GPU, in parts of at most 100 seconds.

    python -m benchmarks.gpu --list
    python -m benchmarks.gpu --part reload update-1.5b --out /tmp/gpu --together gpu.json
    python -m benchmarks.gpu --report gpu.json /tmp/gpu > docs/evidence/gpu-figures.md

Each part runs in a process of its own; one that fails or takes too long is reported and does not stop the others. What
a part finds goes to DIR/<part>.json as it comes, and is printed as Markdown when the part has ended. The exit status is
the number of parts that did not finish and of checks that missed their aim.

It works with this checkout and what a bare machine has: `python`, torch, transformers, and vLLM, DeepSpeed and polars
wherever they come from. With --tiny parts run the same code on models of some thousand parameters, also on a CPU; aims
of speed and memory are then not judged. `demo` parts take the base model of artifacts/demo, or make one.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from benchmarks.gpu.comparison import compare
from benchmarks.gpu.findings import FORMAT, Device, Findings
from benchmarks.gpu.machine import has_gpu
from benchmarks.gpu.parts import LIMIT_SECONDS, PARTS, chosen_parts
from benchmarks.gpu.running import run
from benchmarks.tables import markdown
from common.errors import UserError
from common.files import write_text

LARGEST_STATUS = 125
"""A shell gives higher ones a meaning of its own."""


def main(arguments: list[str]) -> int:
    """Run what the arguments say; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--part", nargs="+", action="extend", default=[], help="by default all")
    parser.add_argument("--list", action="store_true", help="show the parts")
    parser.add_argument("--out", type=Path, default=Path("artifacts/gpu"), metavar="DIR")
    parser.add_argument(
        "--together", type=Path, metavar="FILE", help="put what all parts have found into one file, too"
    )
    parser.add_argument("--device", choices=["cpu", "cuda"], help="by default what the machine has")
    parser.add_argument("--tiny", action="store_true", help="the smallest models, to try the script itself")
    parser.add_argument(
        "--report", nargs="+", type=Path, metavar="PATH", help="print what such folders or files hold"
    )
    chosen = parser.parse_args(arguments)
    try:
        if chosen.list:
            rows = ([part.name, part.what] for part in PARTS.values())
            print(f"at most {LIMIT_SECONDS} s each\n\n{markdown(['part', 'what'], rows)}")
            return 0
        if chosen.report:
            print(report(read(chosen.report)))
            return 0
        parts = chosen_parts(chosen.part)
    except UserError as error:
        parser.error(str(error))
    device: Device = chosen.device or ("cuda" if has_gpu() else "cpu")
    chosen.out.mkdir(parents=True, exist_ok=True)
    done = []
    for part in parts:
        done.append(run(part, device, chosen.out, is_tiny=chosen.tiny))
        print(f"{done[-1].markdown()}\n", flush=True)
        if chosen.together:
            write_text(chosen.together, together(done))
    if compared := compare({one.part: one for one in done}):
        done.append(compared)
        print(f"{compared.markdown()}\n")
        compared.file = chosen.out / f"{compared.part}.json"
        compared.write()
        if chosen.together:
            write_text(chosen.together, together(done))
    failures = sum(one.missed for one in done)
    print(f"{failures} failed or missed, of {len(done)} parts in {sum(one.seconds for one in done):.0f} s")
    return min(failures, LARGEST_STATUS)


def together(found: list[Findings]) -> str:
    """One JSON document of them all."""
    return json.dumps([one.document() for one in found], indent=1, ensure_ascii=False, allow_nan=False)


def read(paths: list[Path]) -> dict[str, Findings]:
    """What these folders and files of JSON hold, by part; of a part that is there twice the last. Raises UserError."""
    found: dict[str, Findings] = {}
    for path in paths:
        files = sorted(path.glob("*.json")) if path.is_dir() else [path]
        if not files:
            raise UserError(f"--report {path}: there is no JSON in it")
        for file in files:
            for document in _documents(file):
                found[document["part"]] = Findings.of(document)
    return found


def _documents(file: Path) -> list[dict[str, Any]]:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        documents = content if isinstance(content, list) else [content]
        is_ours = all(document["format"] == FORMAT and "part" in document for document in documents)
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise UserError(f"--report {file}: it is not what benchmarks.gpu writes ({error})") from error
    if not is_ours:
        raise UserError(f"--report {file}: it is not what this version of benchmarks.gpu writes")
    return documents


def report(found: dict[str, Findings]) -> str:
    """Markdown of them all, in the order of the parts, under what they were measured on."""
    if compared := compare(found):
        found = {**found, compared.part: compared}
    order = [*(name for name in PARTS if name in found), *(name for name in found if name not in PARTS)]
    machines: dict[str, list[str]] = {}
    for name in order:
        one = found[name]
        described = ", ".join(f"{key} {value}" for key, value in one.machine.items() if value is not None)
        described += f"; on the {one.device}" + (", tiny models" if one.is_tiny else "")
        machines.setdefault(described, []).append(name)
    missed = [
        [name, check.what, str(check.value), check.aim]
        for name in order
        for check in found[name].checks
        if check.verdict == "missed"
    ] + [[name, found[name].status, "", "finished"] for name in order if found[name].status != "finished"]
    blocks = [f"Measured on: {described}: {', '.join(names)}." for described, names in machines.items()]
    blocks.append(
        f"Missed or failed:\n\n{markdown(['part', 'check', 'found', 'aim'], missed)}"
        if missed
        else "No check was missed."
    )
    return "\n\n".join([*blocks, *(found[name].markdown() for name in order)])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
