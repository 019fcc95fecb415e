"""The command line: one command per step of the pipeline. Each command imports the heavy libraries that it needs."""

import gc
import json
import os
import re
import shlex
import signal
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from datetime import datetime
from functools import partial
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from common.errors import RankLost, UserError, first_line
from common.files import UNWRITABLE, meaning
from common.lifetime import die_with_launcher
from common.remote.copies import fetched, given
from common.terminal.console import Terminal
from common.terminal.messages import leave, prepare_output, print_json, say_defect

if TYPE_CHECKING:
    from common.engines import EngineSource
    from common.runs import RunPaths
    from stage2_train.config import Config

# torch reads these when it is imported. OpenMP threads that wait by spinning become slow as soon as other processes
# need their cores; a short spin before they sleep keeps small models fast.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("GOMP_SPINCOUNT", "2000")
os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
# Importing torch and vLLM creates a million objects that stay. With Python's default thresholds the garbage collector
# walks them again and again, which takes a noticeable part of the start.
gc.set_threshold(100_000, 50, 100)

app = typer.Typer(
    help="Post-train language models for reasoning with A*-PO: `vstar` (stage 1) samples completions and estimates "
    "V̂* for each prompt, `train` (stage 2) trains on them. The other commands work on a run's files.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
console = Terminal()

ROOM_ON_A_GPU = (
    "What takes less: for the engine, engine.gpu_memory_utilization (beside the trainer, "
    "engine.training_gpu_memory_utilization) and engine.max_num_seqs; for the trainer, train.tokens_per_micro_batch, "
    "train.zero_stage = 3, train.offload_optimizer, train.offload_reference and train.lora. `python cli.py forecast` "
    "says how much a run needs"
)


_chosen: dict[str, list[str]] = {}
"""The options that say which run this command is about, with their values, for the advice in messages."""
_BY_NAME = ("export-data", "export-segments", "filter", "inspect", "report", "rescore", "sweep")
"""The commands that take a run's name and no config."""


def _here(path: Path | None) -> Path | None:
    """The local path of a path or URL that was given as an option."""
    return path and given(str(path))


def _config_here(path: Path) -> Path:
    found = given(str(path))
    if path != DEMO:
        _chosen["--config"] = [str(found)]
    return found


def _run_chosen(run: str | None) -> str | None:
    if run is not None:
        _chosen["--run"] = [run]
    return run


def _overrides_chosen(overrides: list[str] | None) -> list[str] | None:
    _chosen["--set"] = list(overrides or ())
    return overrides


def _run_named(run: str) -> str:
    """Of a command that does not know the config that the run has."""
    if run != "demo":
        _chosen.update({"--config": ["CONFIG.toml"], "--run": [run]})
    return run


def _about_the_same_run(message: str) -> str:
    """A message whose commands, in backquotes and without options, get those that say which run this one is about."""

    def completed(found: re.Match[str]) -> str:
        options = ["--run"] if found[1] in _BY_NAME else ["--config", "--run", "--set"]
        values = [(option, value) for option in options for value in _chosen.get(option, ())]
        return "".join([found[0], *(f" {option} {shlex.quote(value)}" for option, value in values)])

    return re.sub(r"`python cli\.py ([a-z-]+)(?=`)", completed, message)


ConfigFile = Annotated[
    Path,
    typer.Option(
        "--config",
        "-c",
        callback=_config_here,
        help="The run's configuration, a TOML file; configs/ has examples.",
        show_default="configs/demo.toml",
    ),
]
Run = Annotated[
    str | None,
    typer.Option(
        "--run",
        callback=_run_chosen,
        help="Use the folder artifacts/RUN; by default RUN is the config's `run`.",
    ),
]
Overrides = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        callback=_overrides_chosen,
        metavar="KEY=VALUE",
        help="Override a value of the config, such as vstar.beta1=0.25; repeatable.",
    ),
]
VstarFile = Annotated[
    Path | None,
    typer.Option(
        "--vstar", callback=_here, help="The V̂* table to read; by default artifacts/RUN/vstar.parquet."
    ),
]
SegmentsFile = Annotated[
    Path | None,
    typer.Option(
        "--segments",
        callback=_here,
        help="The table of states to read; by default artifacts/RUN/segments.parquet.",
    ),
]
AdvantagesFile = Annotated[
    Path | None,
    typer.Option(
        "--advantages",
        callback=_here,
        help="The table of advantages to read; by default artifacts/RUN/advantages.parquet.",
    ),
]
Where = Annotated[
    list[str] | None,
    typer.Option(
        metavar="EXPR",
        help='Keep only rows that fulfil an SQL condition, such as "vstar_se < 0.1"; repeatable.',
    ),
]
ExecutorName = Annotated[
    Literal["local", "ray"],
    typer.Option("--executor", help="Where engines run: on this machine, or on a Ray cluster."),
]
Address = Annotated[
    str | None,
    typer.Option(
        help="Of the Ray cluster, such as ray-head:6379, or auto; by default $RAY_ADDRESS, or this machine's, which is "
        "started if there is none."
    ),
]
MinGap = Annotated[
    float | None,
    typer.Option(
        help="Of a table of advantages: drop states whose advantages differ by less; by default the table's."
    ),
]
Output = Annotated[
    Path | None,
    typer.Option(
        "--output",
        "-o",
        callback=_here,
        help="Write to this file; by default the table that was read is replaced.",
    ),
]
AllowMismatch = Annotated[
    list[str] | None,
    typer.Option(
        metavar="FIELD",
        help="Continue despite a mismatch: FIELD is the name in the error message, such as versions. Recorded in the "
        "results; repeatable.",
    ),
]
RunName = Annotated[
    str, typer.Option("--run", callback=_run_named, help="The run: its files are in artifacts/RUN.")
]
DEMO = Path(__file__).parent / "configs" / "demo.toml"


@app.command("base-model", short_help="Pre-train the demo's tiny reference model.")
def base_model(config: ConfigFile = DEMO, run: Run = None, overrides: Overrides = None) -> None:
    """Pre-train the demo's tiny reference model from scratch (about a minute, no download)."""
    from common.demo.base_model import build_base_model
    from common.runs import exclusive_run, run_paths
    from stage2_train.config import load_config

    settings = load_config(config, overrides or (), run)
    paths = run_paths(settings.run)
    if not paths.base_model.exists():
        with _libraries_logged(settings.run), exclusive_run(paths, "base-model"):
            if not paths.base_model.exists():  # another job may have made it meanwhile
                build_base_model(paths.base_model, seed=settings.seed, progress=console.print)
                return
    console.print(f"nothing to do: {paths.base_model} exists")


@app.command(short_help="Stage 1: sample completions, grade them, estimate V̂*.")
def vstar(
    config: ConfigFile = DEMO,
    run: Run = None,
    overrides: Overrides = None,
    shard: Annotated[
        str,
        typer.Option(
            metavar="I/N",
            help="For job arrays: sample only part I (from 1) of N parts of the prompts. When all parts are done, "
            "run once without --shard.",
        ),
    ] = "1/1",
    adaptive: Annotated[
        float | None,
        typer.Option(
            metavar="TARGET_SE",
            help="Draw more samples for prompts whose 95 % interval of V* is wider than ±1.96 TARGET_SE. Needs "
            "--budget.",
        ),
    ] = None,
    budget: Annotated[
        int | None,
        typer.Option(
            metavar="SAMPLES", help="With --adaptive: the most samples, all prompts and rounds together."
        ),
    ] = None,
    check: Annotated[
        bool | None,
        typer.Option(
            "--check/--no-check",
            help="Check the engine's log-probs against a plain forward pass before sampling; by default only for "
            "models of up to a billion parameters.",
        ),
    ] = None,
    executor: ExecutorName = "local",
    address: Address = None,
    allow_mismatch: AllowMismatch = None,
) -> None:
    """Stage 1: sample completions, grade them and estimate V̂* for each prompt.

    Writes artifacts/RUN/vstar.parquet. After an interruption the same command continues.
    """
    from common.runs import Shard
    from stage2_train.config import load_config

    part = Shard.parse(shard)
    if (adaptive is None) != (budget is None):
        raise UserError("--adaptive and --budget go together, for example --adaptive 0.05 --budget 100000")
    settings = load_config(config, overrides or (), run)
    with _ending_cleanly(), _libraries_logged(settings.run), _engines(executor, address) as engines:
        from stage1_vstar.adaptive import Rule
        from stage1_vstar.run import run_stage1
        from stage2_train.preflight import foresight

        rule = None if adaptive is None or budget is None else Rule(target_se=adaptive, budget=budget)
        run_stage1(
            settings,
            console,
            shard=part,
            adaptive=rule,
            allow_mismatch=allow_mismatch or (),
            check=check,
            foresee=partial(foresight, settings),
            engines=engines,
        )


@app.command(short_help="Stage 2: train the model.")
def train(
    config: ConfigFile = DEMO,
    run: Run = None,
    overrides: Overrides = None,
    vstar_file: VstarFile = None,
    advantages_file: AdvantagesFile = None,
    allow_mismatch: AllowMismatch = None,
    executor: ExecutorName = "local",
    address: Address = None,
) -> None:
    """Stage 2: train the model, by default with A*-PO. Afterwards it is in artifacts/RUN/model.

    After an interruption the same command continues from the last checkpoint.

    --set train.objective.name=grpo chooses another objective (docs/objectives.md). Objectives that do not use V̂* take
    their prompts from [data] of the config, or with --vstar from that table. The objective direct_advantage reads the
    table that `advantages` writes.
    """
    from common.packages import refuse_missing
    from stage2_train.config import load_config

    settings = load_config(config, overrides or (), run)
    for package in ("deepspeed", "peft", "tensorboard"):
        refuse_missing(package, "this is a command of stage 2", "make setup")
    if executor == "ray" and settings.engine.placement != "own processes":
        raise UserError(
            f'--executor ray: its engines are outside training, found engine.placement "{settings.engine.placement}"; '
            'set it to "own processes", or leave out --executor'
        )
    with (
        _ending_cleanly("what is in the last checkpoint"),
        _libraries_logged(settings.run),
        _engines(executor, address) as engines,
    ):
        from stage2_train.run import run_stage2

        console.outlives_its_reader = True
        run_stage2(
            settings,
            console,
            vstar_file,
            allow_mismatch or (),
            engines.build,
            advantages_file=advantages_file,
        )


@app.command(short_help="Draw solutions, cut them into steps, estimate the value of each state.")
def segments(
    config: ConfigFile = DEMO,
    run: Run = None,
    overrides: Overrides = None,
    executor: ExecutorName = "local",
    address: Address = None,
    allow_mismatch: AllowMismatch = None,
) -> None:
    """Draw solutions, cut some of them into steps, and estimate the value of each state by completions from it.

    Writes artifacts/RUN/segments.parquet. After an interruption the same command continues.
    """
    from stage2_train.config import load_config

    settings = load_config(config, overrides or (), run)
    with _ending_cleanly(), _libraries_logged(settings.run), _engines(executor, address) as engines:
        from stage1_vstar.segments.run import run_segments

        run_segments(settings, console, allow_mismatch=allow_mismatch or (), engines=engines)


@app.command(short_help="Train a critic on the values of states (after `segments`).")
def critic(
    config: ConfigFile = DEMO,
    run: Run = None,
    overrides: Overrides = None,
    segments_file: SegmentsFile = None,
    process_bench: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            callback=_here,
            help="Train nothing: measure how well the trained critic finds the first wrong steps of the solutions in "
            "a file in ProcessBench's format.",
        ),
    ] = None,
    allow_mismatch: AllowMismatch = None,
) -> None:
    """Train the critic V_φ on the Monte-Carlo values of segments.parquet, and test it on held-out prompts.

    Writes artifacts/RUN/critic, see docs/critic.md. After an interruption the same command starts over.
    """
    from common.packages import refuse_missing
    from stage2_train.config import load_config

    if process_bench is not None and (segments_file is not None or allow_mismatch):
        name = "--segments" if segments_file is not None else "--allow-mismatch"
        raise UserError(
            f"--process-bench measures the trained critic and reads no table of states; leave {name} out"
        )
    settings = load_config(config, overrides or (), run)
    for package in ("deepspeed", "peft"):
        refuse_missing(package, "this is a command of stage 2", "make setup")
    with _ending_cleanly("nothing", then="starts over"), _libraries_logged(settings.run):
        if process_bench is None:
            from stage2_train.critic_job.run import run_critic

            console.outlives_its_reader = True
            run_critic(settings, console, segments_file, allow_mismatch or ())
        else:
            from stage2_train.critic_job.process_bench import run_process_bench

            run_process_bench(settings, console, process_bench)


@app.command("needs-stage1", hidden=True)
def needs_stage1(
    config: ConfigFile = DEMO,
    run: Run = None,
    overrides: Overrides = None,
    vstar_file: VstarFile = None,
    advantages_file: AdvantagesFile = None,
    allow_mismatch: AllowMismatch = None,
    missing: Annotated[
        bool, typer.Option("--missing", help="None if the table that they end with is there.")
    ] = False,
) -> None:
    """For `make`: print the commands that make the table that training will read in the run's folder.

    Takes the options of `train`. Exits with status 1 if there are none.
    """
    from common.runs import run_paths
    from stage2_train.config import load_config

    settings = load_config(config, overrides or (), run)
    paths, steps = run_paths(settings.run), settings.before_training
    given, table = (
        (advantages_file, paths.advantages) if settings.train.reads_advantages else (vstar_file, paths.vstar)
    )
    if not steps or given is not None or (missing and table.exists()):
        raise typer.Exit(1)
    print(*steps)


@app.command(short_help="Compute the advantages of next steps.")
def advantages(
    config: ConfigFile = DEMO,
    run: Run = None,
    overrides: Overrides = None,
    segments_file: SegmentsFile = None,
    allow_mismatch: AllowMismatch = None,
) -> None:
    """Compute the advantages of the next steps of states, which the objective direct_advantage trains on.

    Writes artifacts/RUN/advantages.parquet. It keeps the critic's values: other settings of [advantages] then need no
    model. After an interruption the same command continues.
    """
    from stage2_train.config import load_config

    settings = load_config(config, overrides or (), run)

    def load_critic(folder: Path) -> Callable[[Iterable[Sequence[int]]], Sequence[float]]:
        from stage2_train.critic_job.values import TrainedCritic

        return TrainedCritic(folder, settings).values

    with _ending_cleanly("what the critic has valued"), _libraries_logged(settings.run):
        from stage1_vstar.advantages.run import run_advantages

        run_advantages(settings, console, load_critic, segments_file, allow_mismatch or ())


@app.command(short_help="Add the samples of other runs to a run.")
def merge(
    sources: Annotated[list[str], typer.Argument(help="Names of runs, or folders that contain samples/.")],
    run: Annotated[
        str, typer.Option("--run", callback=_run_named, help="The run that receives the samples.")
    ],
    allow_mismatch: Annotated[
        list[str] | None,
        typer.Option(
            metavar="FIELD",
            help="Merge despite a mismatch: FIELD is the name in the error message, such as versions; "
            "repeatable. `vstar` asks for it again.",
        ),
    ] = None,
) -> None:
    """Add the samples of other runs, such as shards from other machines, to a run.

    Samples that the run already has are skipped. `vstar` then computes V̂*.
    """
    from stage1_vstar.merge import merge_runs

    merge_runs(sources, run, console, allow_mismatch or ())


@app.command(short_help="Grade stored completions again; compare the grades.")
def regrade(
    config: ConfigFile = DEMO,
    run: Run = None,
    overrides: Overrides = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the comparison as JSON.")] = False,
) -> None:
    """Grade the stored completions of a run with the config's grader, and compare with the old grades.

    The old grades are kept; the results are in artifacts/RUN/regraded.
    """
    from stage2_train.config import load_config

    settings = load_config(config, overrides or (), run)
    with _ending_cleanly(), _libraries_logged(settings.run):
        from stage1_vstar.regrade import run_regrade

        run_regrade(settings, console, as_json=as_json)


@app.command(short_help="Predict the steps, tokens and GPU memory of stage 2.")
def forecast(
    config: ConfigFile = DEMO,
    run: Run = None,
    overrides: Overrides = None,
    vstar_file: VstarFile = None,
    gpus: Annotated[
        int, typer.Option(min=1, help="The number of GPUs that will train, one process each.")
    ] = 1,
    gpu_gib: Annotated[float, typer.Option("--gpu-memory", min=1, help="Memory of one GPU, in GiB.")] = 80,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document.")] = False,
) -> None:
    """Predict stage 2: steps, tokens, the first iteration's loss and reward, and memory per GPU. Loads no model."""
    from common.runs import run_paths
    from stage2_train.config import load_config

    settings = load_config(config, overrides or (), run)
    source = vstar_file or run_paths(settings.run).vstar
    with _libraries_logged(settings.run):
        from stage2_train.forecast import forecast as forecast_training
        from stage2_train.forecast import show, to_json

        figures = forecast_training(settings, source, gpus=gpus, gpu_gib=gpu_gib)
    if as_json:
        print_json(to_json(figures))
    else:
        show(figures, console)


@app.command(short_help="Measure accuracy and KL on benchmarks.")
def evaluate(
    model: Annotated[
        list[str] | None,
        typer.Option(
            "--model",
            "-m",
            help="A folder, hub name or checkpoint, or `reference` or `trained`, the run's; repeatable. By default "
            "these two.",
        ),
    ] = None,
    benchmark: Annotated[
        list[str] | None,
        typer.Option("--benchmark", "-b", help="A benchmark of the config; repeatable. By default all."),
    ] = None,
    config: ConfigFile = DEMO,
    run: Run = None,
    overrides: Overrides = None,
    executor: ExecutorName = "local",
    address: Address = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document.")] = False,
    lm_eval: Annotated[
        Path | None,
        typer.Option(
            "--lm-eval",
            callback=_here,
            help="Also write the results to this folder, as lm-evaluation-harness does.",
        ),
    ] = None,
) -> None:
    """Measure greedy and sampled accuracy, pass@k and KL to the reference, and compare the models.

    The benchmarks are [evaluate.data] (held_out) and [evaluate.benchmarks.<name>] of the config. Completions are kept
    in artifacts/RUN/evaluations/samples, so that a repeated command draws only missing ones.
    """
    from stage2_train.config import load_config

    settings = load_config(config, overrides or (), run)
    with (
        _ending_cleanly("finished work"),
        _libraries_logged(settings.run),
        _engines(executor, address) as engines,
    ):
        folders = _models(settings, model)
        from common.report.lm_eval import write_lm_eval
        from stage2_train.evaluation.plan import shots_of
        from stage2_train.evaluation.run import evaluate as evaluate_models
        from stage2_train.evaluation.run import show

        results = evaluate_models(
            settings, folders, Terminal(stderr=True), benchmarks=benchmark or (), engines=engines
        )
    if lm_eval is not None:
        write_lm_eval(results.results, lm_eval, datetime.now(), shots_of(settings))
    if as_json:
        print_json(results.model_dump_json(indent=2, exclude_none=True))
    else:
        show(results, console)


def _before_training(paths: "RunPaths") -> Sequence[str]:
    """The commands that make what a run's training reads, by the config in its folder; without one, stage 1."""
    from pydantic import ValidationError

    from stage2_train.config import Config

    try:
        return Config.model_validate_json(paths.config.read_bytes()).before_training
    except (OSError, ValidationError):
        return ["vstar"]


def _models(settings: "Config", names: Sequence[str] | None) -> dict[str, Path]:
    """The folders of the models to evaluate, by the names that results give them."""
    from common.evaluations import REFERENCE, TRAINED
    from common.model.files import reference_model
    from common.runs import run_paths
    from stage2_train.export import loadable_model

    trained = run_paths(settings.run).model
    if (names is None or TRAINED in names) and not trained.is_dir():
        raise UserError(f"there is no {trained}: run `python cli.py train` first, or give a --model")
    folders = {}
    for name in dict.fromkeys(names or (REFERENCE, TRAINED)):
        if name == REFERENCE:
            folders[name] = reference_model(settings)
        else:
            folders[name] = fetched(trained, whole=True) if name == TRAINED else loadable_model(name)
    return folders


@app.command(short_help="Write a run's results as one HTML page.")
def report(run: RunName = "demo") -> None:
    """Write artifacts/RUN/report/report.html: distributions, samples, cost, provenance and training."""
    from common.report import write_report
    from common.runs import existing_run

    paths = existing_run(run)
    write_report(paths, console, before_training=_before_training(paths))


@app.command(short_help="Compare objectives or settings over several seeds.")
def compare(
    study: Annotated[
        Path, typer.Argument(metavar="STUDY.toml", callback=_here, help="The study; see configs/studies/.")
    ],
    results: Annotated[
        Path | None,
        typer.Option(
            callback=_here,
            help="The folder of the finished runs' records; by default artifacts/STUDY/results.",
        ),
    ] = None,
    dry_run: Annotated[
        bool,
        typer.Option("--dry-run", help="List the runs and the steps that each still takes; run nothing."),
    ] = False,
) -> None:
    """Compare objectives or settings over seeds under equal conditions: tables, figures, one page.

    A re-run continues where the last one ended; see docs/compare.md.
    """
    from common.processes import executing_warm
    from common.study import compare as compare_arms
    from stage2_train.config import load_with_inputs

    with _ending_cleanly("what is done"), executing_warm() as execute:
        compare_arms(study, load_with_inputs, console, results=results, dry_run=dry_run, execute=execute)


@app.command("run", short_help="Do all of a run: stage 1, training, evaluation, report.")
def run_all_commands(
    config: ConfigFile = DEMO,
    run: Run = None,
    overrides: Overrides = None,
    nproc: Annotated[int, typer.Option(min=1, help="The processes that train.")] = 1,
) -> None:
    """Run the commands of a run in turn: base-model for the demo, stage 1, train, evaluate where there is data, report.

    torch and vLLM are imported once for all of them. A re-run continues.
    """
    from common.whole_run import run_all
    from stage2_train.config import load_with_inputs

    settings, before_training = load_with_inputs(config, overrides or (), run)
    with _ending_cleanly("what is done"):
        status = run_all(config, settings, before_training, overrides=overrides or (), processes=nproc)
    if status:
        raise typer.Exit(status)


@app.command(short_help="Train in rounds: each trained model is the next reference.")
def rounds(
    count: Annotated[int, typer.Option("--rounds", metavar="K", min=1, help="The rounds to have in all.")],
    config: ConfigFile = DEMO,
    run: Run = None,
    overrides: Overrides = None,
    where: Annotated[
        list[str] | None,
        typer.Option(
            metavar="EXPR",
            help="In each round, train only on the prompts that fulfil an SQL condition, as `filter` takes them; "
            "repeatable.",
        ),
    ] = None,
    nproc: Annotated[int, typer.Option(min=1, help="The processes that train.")] = 1,
) -> None:
    """Train in rounds: a round's model is the reference of the next one, which samples from it and starts at it.

    Round k is the run RUN-round<k>; artifacts/RUN/rounds.html shows them side by side. A re-run continues, and a higher
    K adds rounds; see docs/rounds.md.
    """
    from common.processes import executing_warm
    from common.rounds import run_rounds
    from stage1_vstar.filter import kept_where
    from stage2_train.config import load_with_inputs

    for condition in where or ():
        kept_where(condition)
    with _ending_cleanly("what is done"), executing_warm() as execute:
        run_rounds(
            config,
            load_with_inputs,
            console,
            count=count,
            overrides=overrides or (),
            run=run,
            where=where or (),
            processes=nproc,
            execute=execute,
        )


@app.command(short_help="Recompute V̂*, or advantages, with other settings.")
def rescore(
    beta1: Annotated[
        float | None,
        typer.Option("--beta1", help="The new β1, from 0 (V̂* is the best reward) to inf (the mean)."),
    ] = None,
    run: RunName = "demo",
    vstar_file: VstarFile = None,
    output: Output = None,
    estimator: Annotated[
        str,
        typer.Option(
            help="plugin (the paper's formula), jackknife or beta_binomial; see docs/uncertainty.md."
        ),
    ] = "plugin",
    values: Annotated[
        str | None,
        typer.Option(
            help="Recompute a table of advantages instead: with the values of the `critic`, or `monte_carlo`."
        ),
    ] = None,
    min_gap: MinGap = None,
    advantages_file: AdvantagesFile = None,
) -> None:
    """Recompute V̂* from the stored rewards, with another β1 or another estimator. Loads no model.

    With --values or --min-gap: recompute the advantages of next steps from the stored values.
    """
    from stage1_vstar.rescore import rescore as rescore_file

    own = {"--values": values is not None, "--min-gap": min_gap is not None}
    others = {"--beta1": beta1 is not None, "--estimator": estimator != "plugin"}
    if table := _advantages_path(run, vstar_file, advantages_file, own, others):
        from stage1_vstar.advantages.rescore import rescore_advantages

        with _writing(output or table):
            console.print(rescore_advantages(table, output or table, values, min_gap))
        return
    if beta1 is None:
        raise UserError("give --beta1, such as 0.25, to recompute V̂*; or --values for a table of advantages")
    if not beta1 >= 0:
        raise UserError(f"--beta1 must be 0 or more (inf is the mean), found {beta1}")
    source = _vstar_path(run, vstar_file)
    with _writing(output or source):
        console.print(rescore_file(source, output or source, beta1, estimator))


@app.command("filter", short_help="Choose the prompts to train on.")
def filter_command(
    run: RunName = "demo",
    vstar_file: VstarFile = None,
    output: Output = None,
    drop_unsolved: Annotated[
        bool, typer.Option(help="Drop prompts without a correct sample (pass@N = 0).")
    ] = True,
    drop_solved: Annotated[bool, typer.Option(help="Drop prompts whose samples are all correct.")] = False,
    min_pass_rate: Annotated[float, typer.Option(help="Drop prompts below this pass rate.")] = 0.0,
    max_pass_rate: Annotated[float, typer.Option(help="Drop prompts above this pass rate.")] = 1.0,
    max_interval_width: Annotated[
        float, typer.Option(help="Drop prompts whose 95 % interval of V* is wider than this.")
    ] = float("inf"),
    max_truncated: Annotated[
        float, typer.Option(help="Drop prompts with a larger share of truncated samples than this.")
    ] = 1.0,
    where: Where = None,
    min_gap: MinGap = None,
    max_error: Annotated[
        float | None,
        typer.Option(
            help="Of a table of advantages: drop states with an advantage of a larger standard error."
        ),
    ] = None,
    advantages_file: AdvantagesFile = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the counts as JSON.")] = False,
) -> None:
    """Choose the prompts to train on. Dropped prompts are flagged in the V̂* table; with --output they are left out.

    Each call replaces the flags of the last one.

    With --min-gap, --max-error or --advantages, or if the run has no other table: choose the states of its table of
    advantages, by these options and --where.
    """
    from stage1_vstar.filter import drop_rules, filter_prompts

    own = {"--min-gap": min_gap is not None, "--max-error": max_error is not None}
    others = {
        "--no-drop-unsolved": not drop_unsolved,
        "--drop-solved": drop_solved,
        "--min-pass-rate": min_pass_rate != 0,
        "--max-pass-rate": max_pass_rate != 1,
        "--max-interval-width": max_interval_width != float("inf"),
        "--max-truncated": max_truncated != 1,
    }
    if source := _advantages_path(run, vstar_file, advantages_file, own, others):
        from stage1_vstar.advantages.filter import filter_states

        with _writing(output or source):
            filtered = filter_states(source, output, min_gap=min_gap, max_error=max_error, where=where or ())
    else:
        rules = drop_rules(
            unsolved=drop_unsolved,
            solved=drop_solved,
            min_pass_rate=min_pass_rate,
            max_pass_rate=max_pass_rate,
            max_interval_width=max_interval_width,
            max_truncated=max_truncated,
            where=where or (),
        )
        source = _vstar_path(run, vstar_file)
        with _writing(output or source):
            filtered = filter_prompts(source, output, rules)
    if as_json:
        print_json(json.dumps(filtered.document(), indent=2, ensure_ascii=False))
    else:
        for line in filtered.lines():
            console.print(line)


@app.command(short_help="Export a checkpoint as a Hugging Face model.")
def export(
    checkpoint: Annotated[
        Path,
        typer.Option(
            "--checkpoint", callback=_here, help="The checkpoint: artifacts/RUN/checkpoints/iteration-…."
        ),
    ],
    output: Annotated[Path, typer.Option("--output", "-o", callback=_here, help="Write to this new folder.")],
) -> None:
    """Export a checkpoint as a folder that transformers and vLLM load, with a model card. Needs no GPU."""
    from common.terminal.library_log import libraries_logged
    from stage2_train.export import export_checkpoint, run_of

    with libraries_logged(run_of(checkpoint).libraries_log):
        export_checkpoint(checkpoint, output)
    console.print(f"{output}: the policy of {checkpoint.name} in Hugging Face format")


@app.command("export-data", short_help="Export prompts, pass rates and V̂* for SPO, TRL or verl.")
def export_data(
    output: Annotated[Path, typer.Option("--output", "-o", callback=_here, help="Write to this file.")],
    format_name: Annotated[
        str, typer.Option("--format", help="The other trainer: spo, trl or verl; see docs/export.md.")
    ],
    run: RunName = "demo",
    vstar_file: VstarFile = None,
    dropped_too: Annotated[bool, typer.Option("--all", help="Export dropped prompts too.")] = False,
    in_template: Annotated[
        bool,
        typer.Option(
            "--in-template", help="Write prompts in the run's text template; by default questions only."
        ),
    ] = False,
) -> None:
    """Export prompts, pass rates and V̂* for another trainer: SPO's offline values, or a data set for TRL or verl."""
    from stage1_vstar.export_data import export_data as export

    source = _vstar_path(run, vstar_file)
    with _writing(output):
        lines = export(source, output, format_name, dropped_too=dropped_too, in_template=in_template)
    for line in lines:
        console.print(line)


@app.command("export-segments", short_help="Export solutions with labelled steps for TRL.")
def export_segments(
    output: Annotated[
        Path,
        typer.Option("--output", "-o", callback=_here, help="Write to this file, .jsonl or .parquet."),
    ],
    run: RunName = "demo",
    at_least: Annotated[
        float | None,
        typer.Option(
            "--at-least",
            metavar="VALUE",
            help="A step is correct if the value after it is at least this; by default, above 0.",
        ),
    ] = None,
    soft: Annotated[bool, typer.Option("--soft", help="Write the values as labels.")] = False,
) -> None:
    """Export a run's solutions with a label for each step: TRL's data for stepwise supervision (docs/export.md)."""
    from common.runs import existing_run
    from stage1_vstar.export_segments import export_segments as export

    for line in export(existing_run(run).segments, output, at_least=at_least, soft=soft):
        console.print(line)


@app.command("import-segments", short_help="Take labelled steps of others as a run's states.")
def import_segments(
    file: Annotated[
        Path,
        typer.Argument(
            metavar="FILE", callback=_here, help="Rows of TRL's stepwise format, Math-Shepherd or PRM800K."
        ),
    ],
    config: ConfigFile = DEMO,
    run: Run = None,
    overrides: Overrides = None,
) -> None:
    """Write artifacts/RUN/segments.parquet from a file of solutions with labelled steps, for `critic`.

    The labels are taken for the values of states (docs/export.md). No model is loaded.
    """
    from stage2_train.config import load_config

    settings = load_config(config, overrides or (), run)
    with _libraries_logged(settings.run):
        from stage1_vstar.import_segments import import_segments as import_file

        import_file(settings, file, console)


@app.command(short_help="Compare other values of N and β1.")
def sweep(
    run: RunName = "demo",
    vstar_file: VstarFile = None,
    beta1: Annotated[
        list[str] | None,
        typer.Option("--beta1", metavar="LIST", help="Values of β1 to compare, such as inf,1,0.5,0."),
    ] = None,
    num_samples: Annotated[
        list[str] | None,
        typer.Option(
            metavar="LIST",
            help="Values of N to compare, such as 1,2,4,8; by default powers of two.",
        ),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document.")] = False,
) -> None:
    """Show which V̂* a smaller N or another β1 would have given; also writes JSON and plots into report/."""
    from common.report.sweep_files import sweep_file
    from stage1_vstar.sweep_run import run_sweep
    from stage1_vstar.sweep_view import show

    source = _vstar_path(run, vstar_file)
    swept = run_sweep(source, beta1=beta1 or (), num_samples=num_samples or ())
    if as_json:
        print_json(swept.to_json())
    else:
        show(swept, console)
        console.print(f"{sweep_file(source, 'png')}, .svg and .json: the same as plots, and more figures")


@app.command(short_help="Show the contents of a V̂* table, or of advantages.")
def inspect(
    run: RunName = "demo",
    vstar_file: VstarFile = None,
    advantages_file: AdvantagesFile = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document.")] = False,
) -> None:
    """Show a V̂* table: its contents, its provenance, the precision of V̂* and a histogram of pass rates.

    With --advantages, or if the run has no other table: show its table of advantages.
    """
    from stage1_vstar.describe import describe, show, to_json

    if table := _advantages_path(run, vstar_file, advantages_file):
        from stage1_vstar.advantages import describe as view

        found = view.describe_advantages(table)
        print_json(view.to_json(found)) if as_json else view.show(found, console)
        return
    figures = describe(_vstar_path(run, vstar_file))
    if as_json:
        print_json(to_json(figures))
    else:
        show(figures, console)


def _advantages_path(
    run: str,
    vstar_file: Path | None,
    advantages_file: Path | None,
    own: Mapping[str, bool] = {},
    others: Mapping[str, bool] = {},
) -> Path | None:
    """The table of advantages that a command is about; None if it is about V̂*.

    The options say so: `own` are those for advantages alone, `others` those for V̂* alone, each with whether it is
    given. Without any of them it is the only table that the run has.
    """
    from common.runs import existing_run

    own = {"--advantages": advantages_file is not None, **own}
    others = {"--vstar": vstar_file is not None, **others}
    ours, theirs = ([name for name, is_given in options.items() if is_given] for options in (own, others))
    if ours and theirs:
        raise UserError(
            f"{ours[0]} is for a table of advantages and {theirs[0]} for V̂*; leave one of them out"
        )
    if theirs or advantages_file is not None:
        return advantages_file
    paths = existing_run(run)
    is_only = not paths.vstar.exists() and paths.advantages.exists()
    return paths.advantages if ours or is_only else None


def _vstar_path(run: str, vstar_file: Path | None) -> Path:
    from common.runs import existing_run

    return vstar_file or existing_run(run).vstar


@contextmanager
def _writing(target: Path) -> Iterator[None]:
    """Keep `vstar` or `advantages` from writing the run's table at the same time: that would undo this change."""
    from common.runs import RunPaths, exclusive_run

    place = Path(os.path.realpath(target))  # resolve() raises RuntimeError for a link to itself
    run = RunPaths(place.parent)
    is_a_runs_own = place == run.vstar and target.exists() and run.samples.is_dir()
    writer = "vstar" if is_a_runs_own else None
    if place == run.advantages:
        writer = "advantages"
    with nullcontext() if writer is None else exclusive_run(run, writer):
        yield


@contextmanager
def _ending_cleanly(kept: str = "what was graded", then: str = "continues") -> Iterator[None]:
    """Treat SIGTERM, which schedulers send before they end a job, like Ctrl-C: finished work is kept."""

    def interrupt(signal_number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    except KeyboardInterrupt:
        # Not if another process has reported a mistake and the launcher therefore ends this one.
        leave(130, f"interrupted: {kept} is kept; the same command {then}", unless_said=True)
    finally:
        signal.signal(signal.SIGTERM, before)


@contextmanager
def _engines(executor: str, address: str | None) -> "Iterator[EngineSource]":
    """Where the engines of a job run, as --executor and --address say. Raises UserError."""
    if executor == "local":
        if address is not None:
            raise UserError(f"--address {address} is that of a Ray cluster; give --executor ray with it")
        from common.engines import LOCAL
        from common.engines.count import idle_gpu

        if os.environ.get("RANK", "0") == "0" and (warning := idle_gpu()) is not None:
            Terminal(stderr=True).print(warning)
        yield LOCAL
        return
    from common.packages import refuse_missing

    refuse_missing("ray", "--executor ray was given", "make setup-ray")
    from common.engines.ray_workers import ray_engines

    with ray_engines(address) as engines:
        yield engines


def _libraries_logged(run: str) -> AbstractContextManager[None]:
    """Send the output of libraries to the run's log inside this context."""
    from common.runs import run_paths
    from common.terminal.library_log import libraries_logged

    return libraries_logged(run_paths(run).libraries_log)


def main() -> None:
    """Run a command. A mistake that the user can fix ends it with one line and exit code 2."""
    prepare_output()
    die_with_launcher()
    try:
        try:
            app()
        except SystemExit:
            if sys.stdout is not None:
                sys.stdout.flush()
            raise
    except RankLost as error:
        leave(1, f"error: {error}", unless_said=True)
    except UserError as error:
        leave(2, f"error: {_about_the_same_run(' '.join(str(error).split()))}")
    except BrokenPipeError:  # the reader of the output has closed the pipe
        os._exit(1)
    except OSError as error:
        if error.errno not in UNWRITABLE:
            raise
        place = error.filename or "standard output"
        leave(2, f"error: {place}: {meaning(error.errno)}; make room, or correct the path or its permissions")
    except RuntimeError as error:
        torch = sys.modules.get("torch")
        if torch is None or not isinstance(error, torch.OutOfMemoryError):
            raise
        leave(2, f"error: the GPU's memory is full: {first_line(error)} {ROOM_ON_A_GPU}")
    finally:
        sys.excepthook = say_defect  # typer has replaced it


if __name__ == "__main__":
    main()
