"""Both stages of the demo from the command line: `vstar`, then `train`, each as a user starts it.

Takes the base model of artifacts/demo, which `make base-model` makes, or makes one. Shows the seconds, how engine,
plain forward and trainer agree, and what the policy learns in some iterations.
"""

import json
import re
import statistics
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from benchmarks.gpu.findings import Findings
from benchmarks.processes import Finished, cli, run
from benchmarks.tiny_model import save_tiny_model, write_questions
from benchmarks.training import DEMO
from common.demo.base_model import build_base_model
from common.files import new_folder
from common.parity import BOUNDS, Gap
from common.runs import RunPaths, run_paths
from common.store import stored_tokens
from common.training_cost import RATE
from common.vstar_file import read_vstar

ITERATIONS = 30
LEAST_GAIN = 0.2
"""Of the held-out pass@1, in that many iterations; 60 on a CPU gain 0.5."""
AGREE = re.compile(r"(.*) agree: (\d+) tokens, (\S+) nats apart on average, (\S+) at most")
"""The line of common/parity.py."""
TINY: dict[str, object] = {
    "sampling.max_completion_tokens": 6,
    "vstar.num_samples": 4,
    "evaluate.data.limit": 8,
    "train.batch_size": 8,
    "train.mini_batch_size": 4,
    "train.iterations": 3,
    "train.evaluate_every": 3,
    "engine.max_num_seqs": 16,
}


def measure(findings: Findings, folder: Path, *, backend: str, dtype: str) -> None:
    """One engine and one number format."""
    values: dict[str, object] = {
        "model.path": base_model(folder, is_tiny=findings.is_tiny),
        "model.dtype": dtype,
        "engine.backend": backend,
        "train.iterations": ITERATIONS,
        "train.evaluate_every": ITERATIONS,
    }
    if findings.is_tiny:
        questions = folder / "questions.jsonl"
        write_questions(questions, 24)
        values |= TINY | {"data.format": "generic", "data.path": questions}
    asleep = {"engine.sleep_while_training": "true"} if backend == "vllm" else {}
    with TemporaryDirectory() as place:
        environment = {"ASTAR_PO_ARTIFACTS": place, "COLUMNS": "400"}
        paths, log = RunPaths(Path(place, "demo")), Path(place, "log")
        finished = run(cli("vstar", DEMO, "demo", values), log, environment)
        _show_stage1(findings, paths, finished)
        _compare_gaps(findings, log.read_text(encoding="utf-8"), dtype)
        finished = run(cli("train", DEMO, "demo", values | asleep), log, environment)
        _show_stage2(findings, paths, finished, dtype)
        _compare_gaps(findings, log.read_text(encoding="utf-8"), dtype)
        findings.holds("the trained model is there", paths.model.is_dir())


def base_model(folder: Path, *, is_tiny: bool) -> Path:
    """The demo's, or one as small as in tests; made if it is not there."""
    if not is_tiny and (ours := run_paths("demo").base_model).exists():
        return ours.absolute()
    place = folder / ("tiny_base_model" if is_tiny else "base_model")
    if not place.exists():
        if is_tiny:
            with new_folder(place) as unfinished:
                save_tiny_model(unfinished, seed=0)
        else:
            build_base_model(place, seed=0)
    return place


def _show_stage1(findings: Findings, paths: RunPaths, finished: Finished) -> None:
    rows, provenance = read_vstar(paths.vstar)
    cost = provenance.context["cost"]
    drawing = cost["seconds"] - cost["loading_seconds"]
    findings.row(
        "Stage 1",
        whole_s=finished.seconds,
        loading_s=cost["loading_seconds"],
        drawing_s=drawing,
        tokens_a_second=stored_tokens(paths.samples) / drawing,
        prompts=rows.height,
        pass_rate=float(rows["pass_rate"].mean()),  # type: ignore[arg-type]
    )


def _show_stage2(findings: Findings, paths: RunPaths, finished: Finished, dtype: str) -> None:
    lines = [json.loads(line) for line in paths.metrics.read_text(encoding="utf-8").splitlines()]
    trained = [line for line in lines if "time/iteration" in line]
    accuracy = [line["evaluate/pass_at_1"] for line in lines if "evaluate/pass_at_1" in line]

    def median(name: str) -> float:
        return float(statistics.median(line[name] for line in trained))

    largest_gap = max(line["engine/logprob_gap"] for line in trained)
    findings.row(
        "Stage 2",
        whole_s=finished.seconds,
        iterations=len(trained),
        iteration_s=median("time/iteration"),
        rollout_s=median("time/rollout"),
        reference_s=median("time/reference"),
        update_s=median("time/update"),
        weights_s=median("time/weight_sync"),
        tokens_a_second=median(RATE),
        first_reward=trained[0]["reward/mean"],
        last_reward=trained[-1]["reward/mean"],
        first_pass_at_1=accuracy[0],
        last_pass_at_1=accuracy[-1],
        largest_gap=largest_gap,
        peak_GiB=max(line["memory/peak_gib"] for line in trained),
    )
    findings.at_most("largest gap in any iteration, nats", largest_gap, BOUNDS[dtype].largest)
    gain = accuracy[-1] - accuracy[0]
    findings.at_least("gain of the held-out pass@1", gain, LEAST_GAIN, of_the_hardware=True)
    skipped: Any = sum(line["train/skipped_steps"] for line in trained)
    findings.at_most("optimizer steps skipped", float(skipped), 0)


def _compare_gaps(findings: Findings, output: str, dtype: str) -> None:
    """The comparisons that a command has printed. It would have ended with an error if one were beyond its bound."""
    found = [match.groups() for match in map(AGREE.search, output.splitlines()) if match]
    findings.at_least("comparisons of log-probs that were printed", len(found), 1)
    for sides, tokens, mean, largest in found:
        gap = Gap(largest=float(largest), mean=float(mean), tokens=int(tokens))
        findings.row("Gaps in nats", between=sides, mean=gap.mean, largest=gap.largest, tokens=gap.tokens)
        findings.holds(f"{sides}: within the bound", gap.is_within(BOUNDS[dtype]))
