"""The command line: one command a step of the pipeline. Heavy libraries load inside the commands that need them."""

import json
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Annotated

import typer
from rich.console import Console

from common.errors import UserError

# Read when torch is imported. OpenMP threads that wait by spinning crawl as soon as anything else wants their cores;
# a short spin before they sleep keeps small models fast.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("GOMP_SPINCOUNT", "2000")
os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")

app = typer.Typer(
    help="A*-PO: post-train language models for reasoning by regressing on optimal advantages.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
console = Console(highlight=False, markup=False)  # model and data text may look like markup

ConfigFile = Annotated[Path, typer.Option("--config", "-c", help="The run's TOML file; see configs/.")]
Run = Annotated[
    str | None, typer.Option("--run", help="Artifacts go to artifacts/RUN; by default the config's run.")
]
Overrides = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Override a value, e.g. vstar.beta1=0.25."),
]
VstarFile = Annotated[
    Path | None, typer.Option("--vstar", help="The artifact to read; by default artifacts/RUN/vstar.parquet.")
]
Output = Annotated[
    Path | None,
    typer.Option("--output", "-o", help="Write to this file; by default the artifact is replaced."),
]
AllowMismatch = Annotated[
    list[str] | None,
    typer.Option(metavar="FIELD", help="Accept a difference that was refused, by its name; it is recorded."),
]
RunName = Annotated[str, typer.Option("--run", help="The run whose artifact is read.")]
DEMO = Path(__file__).parent / "configs" / "demo.toml"


@app.command("base-model")
def base_model(config: ConfigFile = DEMO, run: Run = None, overrides: Overrides = None) -> None:
    """Pre-train the demo's tiny reference model from scratch (about a minute, no download)."""
    from common.artifacts import run_paths
    from common.config import load_config
    from common.demo.base_model import build_base_model

    settings = load_config(config, overrides or (), run)
    path = run_paths(settings.run).base_model
    if path.exists():
        console.print(f"nothing to do: {path} exists")
        return
    build_base_model(path, seed=settings.seed, progress=console.print)


@app.command()
def vstar(
    config: ConfigFile = DEMO,
    run: Run = None,
    overrides: Overrides = None,
    shard: Annotated[
        str,
        typer.Option(
            metavar="I/N",
            help="Draw part I (from 1) of N of the prompts only, for job arrays; then run once without it.",
        ),
    ] = "1/1",
    allow_mismatch: AllowMismatch = None,
) -> None:
    """Stage 1: sample, grade and estimate V̂* for each prompt. A re-run continues where the last one ended."""
    from common.artifacts import Shard
    from common.config import load_config

    part = Shard.parse(shard)
    settings = load_config(config, overrides or (), run)
    from stage1_vstar.run import run_stage1

    with _ending_cleanly():
        run_stage1(settings, console, shard=part, allow_mismatch=allow_mismatch or ())


@app.command()
def train(
    config: ConfigFile = DEMO,
    run: Run = None,
    overrides: Overrides = None,
    vstar_file: VstarFile = None,
    allow_mismatch: AllowMismatch = None,
) -> None:
    """Stage 2: on-policy regression on the optimal advantages. A re-run continues from the last checkpoint."""
    from common.config import load_config

    settings = load_config(config, overrides or (), run)
    from stage2_train.run import run_stage2

    run_stage2(settings, console, vstar_file, allow_mismatch or ())


@app.command()
def merge(
    sources: Annotated[list[str], typer.Argument(help="Runs by name, or folders that hold samples/.")],
    run: Annotated[str, typer.Option("--run", help="The run that the samples are added to.")],
    allow_mismatch: Annotated[
        list[str] | None,
        typer.Option(
            metavar="FIELD", help="Accept a difference by its name; `vstar` asks again and records it."
        ),
    ] = None,
) -> None:
    """Add the samples of other runs, such as shards from other machines, to a run: each sample once."""
    from stage1_vstar.merge import merge_runs

    merge_runs(sources, run, console, allow_mismatch or ())


@app.command()
def regrade(
    config: ConfigFile = DEMO,
    run: Run = None,
    overrides: Overrides = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the comparison as JSON.")] = False,
) -> None:
    """Grade a run's cached completions with the config's grader, beside the old grades, and compare the two."""
    from common.config import load_config

    settings = load_config(config, overrides or (), run)
    from stage1_vstar.regrade import run_regrade

    with _ending_cleanly():
        run_regrade(settings, console, as_json=as_json)


@app.command()
def evaluate(
    model: Annotated[
        Path | None,
        typer.Option(
            "--model",
            "-m",
            help="A model's folder or hub name; by default the reference and the trained one.",
        ),
    ] = None,
    config: ConfigFile = DEMO,
    run: Run = None,
    overrides: Overrides = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Greedy accuracy, sampled pass@1 and pass@k, and KL to the reference on held-out prompts."""
    from common.artifacts import reference_model, run_paths, write_text
    from common.config import load_config

    settings = load_config(config, overrides or (), run)
    paths = run_paths(settings.run)
    from stage2_train.evaluate import evaluate as evaluate_models
    from stage2_train.evaluate import show

    if model is None and not paths.model.is_dir():
        raise UserError(f"there is no {paths.model}: run `python cli.py train` first, or give a --model")
    models = (
        {"reference": reference_model(settings), "trained": paths.model}
        if model is None
        else {"model": model}
    )
    results = evaluate_models(
        settings, list(models.values()), Console(stderr=True, highlight=False, markup=False)
    )
    if model is None:
        for name, result in zip(models, results, strict=True):
            write_text(paths.evaluations / f"{name}.json", json.dumps(result, indent=2) + "\n")
    if as_json:
        print(json.dumps(results if model is None else results[0], indent=2))
    else:
        for result in results:
            show(result, console)


@app.command()
def report(run: RunName = "demo") -> None:
    """Table and plots of a run: before and after, and the training curves."""
    from common.artifacts import run_paths
    from common.report import write_report

    write_report(run_paths(run), console)


@app.command()
def rescore(
    beta1: Annotated[float, typer.Option("--beta1", help="β1 from 0 (best reward) to inf (mean).")],
    run: RunName = "demo",
    vstar_file: VstarFile = None,
    output: Output = None,
) -> None:
    """V̂* under a new β1, from the cached rewards: no model, no generation."""
    from stage1_vstar.rescore import rescore as rescore_file

    if not beta1 >= 0:
        raise UserError(f"--beta1 must be 0 or more (inf is the mean), found {beta1}")
    source = _vstar_path(run, vstar_file)
    console.print(rescore_file(source, output or source, beta1))


@app.command("filter")
def filter_command(
    run: RunName = "demo",
    vstar_file: VstarFile = None,
    output: Output = None,
    drop_unsolved: Annotated[bool, typer.Option(help="Drop prompts with pass@N = 0.")] = True,
    drop_solved: Annotated[bool, typer.Option(help="Drop prompts whose samples are all correct.")] = False,
    min_pass_rate: Annotated[float, typer.Option(help="Drop prompts below this pass rate.")] = 0.0,
    max_pass_rate: Annotated[float, typer.Option(help="Drop prompts above this pass rate.")] = 1.0,
) -> None:
    """Choose the prompts to train on: as flags in the artifact, or with --output into a new file."""
    from stage1_vstar.filter import drop_rules, filter_prompts

    rules = drop_rules(
        unsolved=drop_unsolved, solved=drop_solved, min_pass_rate=min_pass_rate, max_pass_rate=max_pass_rate
    )
    for line in filter_prompts(_vstar_path(run, vstar_file), output, rules):
        console.print(line)


@app.command()
def inspect(
    run: RunName = "demo",
    vstar_file: VstarFile = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document.")] = False,
) -> None:
    """What is in an artifact, from what it was made, and its histogram of pass rates."""
    from stage1_vstar.describe import describe, show, to_json

    figures = describe(_vstar_path(run, vstar_file))
    if as_json:
        print(to_json(figures))
    else:
        show(figures, console)


def _vstar_path(run: str, vstar_file: Path | None) -> Path:
    from common.artifacts import run_paths

    return vstar_file or run_paths(run).vstar


@contextmanager
def _ending_cleanly() -> Iterator[None]:
    """Schedulers announce an eviction with SIGTERM: end as on Ctrl-C, which keeps what has been graded."""

    def interrupt(signal_number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    except KeyboardInterrupt:
        print("interrupted: what was graded is kept; the same command continues", file=sys.stderr)
        sys.stdout.flush()
        os._exit(130)
    finally:
        signal.signal(signal.SIGTERM, before)


@contextmanager
def _one_line_errors() -> Iterator[None]:
    try:
        yield
    except UserError as error:
        if os.environ.get("RANK", "0") == "0":  # under torchrun each rank finds the same mistake
            print("error:", " ".join(str(error).split()), file=sys.stderr)
        sys.stdout.flush()
        # Engines and grader processes may still be up: leave without waiting for their threads.
        os._exit(2)


if __name__ == "__main__":
    with _one_line_errors():
        app()
