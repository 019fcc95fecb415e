"""Our whole run of the demo in one job, as `cli.py run` runs it: each stage a fork of one process.

python -m benchmarks.peers.our_job JOB REPORT [OPTION…]. With options, `cli.py vstar` takes them, and its end is noted
in stage1.json beside the report; then stage 2 runs the job.
"""

import sys
import time
from pathlib import Path

import cli  # noqa: F401  the thread settings of the command line
from common.files import write_text
from common.processes import program, show
from common.warm_starts import warm_starts

STAGE1 = "stage1.json"
"""The time when stage 1 ended, in seconds since the epoch."""


def main() -> int:
    job, report, *options = sys.argv[1:]
    with warm_starts() as warm:
        if options:
            if status := show([*program(), "vstar", *options], warm):
                return status
            write_text(Path(report).with_name(STAGE1), str(time.time()))
        return show([sys.executable, "-m", "benchmarks.peers.our_run", job, report], warm)


if __name__ == "__main__":
    sys.exit(main())
