"""Compare this trainer with TRL's A2PO and GRPO (2 generations); each run has its own process, interleaved.

    make base-model && .venv/bin/python -m benchmarks.peers demo
    .venv/bin/python -m benchmarks.peers vocabulary
    .venv/bin/python -m benchmarks.peers grpo

`grpo` times nothing: it compares the loss and gradient of GRPO on the same log-probs and rewards, and fails if they
differ. TRL gets an environment of its own on first use, artifacts/peers/venv. Each run's logs and figures stay in
artifacts/peers/<workload>. Use an otherwise idle machine.
"""

import argparse
import os
import shutil
import sys

from benchmarks.peers import demo, grpo, vocabulary
from common.runs import run_paths


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="benchmarks.peers", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("workload", choices=["demo", "vocabulary", "grpo"])
    parser.add_argument("--repetitions", type=int, help="default: 3 for demo, 2 for vocabulary")
    parser.add_argument("--iterations", type=int, help="default: 40 for demo, 1 for vocabulary")
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="demo: a setting for all trainers in place of the demo's",
    )
    parser.add_argument("--write", action="store_true", help=f"grpo: keep TRL's answers in {grpo.GOLDEN}")
    arguments = parser.parse_args()
    if arguments.set and arguments.workload != "demo":
        parser.error(f"--set is for demo alone, not for {arguments.workload}")
    if wrong := [assignment for assignment in arguments.set if "=" not in assignment]:
        parser.error(f"--set takes KEY=VALUE, found {wrong[0]}")
    folder = run_paths("peers").root.resolve() / arguments.workload
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    if arguments.workload == "grpo":
        return 0 if grpo.compare(folder, write=arguments.write) else 1
    before = os.getloadavg()[0]
    if arguments.workload == "demo":
        settings = dict(assignment.split("=", 1) for assignment in arguments.set)
        table = demo.compare(arguments.repetitions or 3, arguments.iterations or 40, folder, settings)
    else:
        table = vocabulary.compare(arguments.repetitions or 2, arguments.iterations or 1, folder)
    print(f"\nload average before: {before:.1f}; median (range), ratio to ours by repetition\n\n{table}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
