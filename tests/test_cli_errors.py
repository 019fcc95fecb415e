"""Users' mistakes: one line that starts with `error:` and names the fix, exit code 2, no model loaded."""

import json
import os
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests import warm
from tests.fakes import IDENTITY, change_json, write_artifact

ROOT = Path(__file__).parents[1]

TOML = """
run = "test"
[model]
path = "model"
dtype = "float32"
[data]
format = "generic"
path = "data.jsonl"
template = "line"
max_prompt_tokens = 64
[sampling]
max_completion_tokens = 12
[grader]
name = "gsm8k"
"""


@dataclass(frozen=True, slots=True)
class Mistake:
    """A command line, run in a folder where everything it does not name is right, and what the error must say."""

    command: str
    says: tuple[str, ...]
    without: tuple[str, ...] = ()
    """Advice that would be for another mistake."""


VSTAR = "vstar --config run.toml"
MISTAKES = {
    "an unknown key": Mistake(
        "vstar --config unknown_key.toml",
        ("unknown_key.toml: unknown key vstar.num_sample; use one of num_samples, beta1, drop_unsolved",),
    ),
    "an unknown section in --set": Mistake(
        f"{VSTAR} --set stage1.beta1=1", ("unknown key stage1; use one of run, seed, model, data",)
    ),
    "a --set without a value": Mistake(f"{VSTAR} --set vstar.beta1", ("write it as section.key=value",)),
    "a missing config": Mistake(
        "vstar --config none.toml", ("cannot read the config none.toml", "configs/*.toml")
    ),
    "a study in place of a config": Mistake(
        "vstar --config study.toml",
        ("study.toml is a study, not a run's config; use `python cli.py compare study.toml`",),
    ),
    "a config in place of a study": Mistake(
        "compare run.toml",
        (
            "run.toml is a run's config, not a study; give one of configs/studies/*.toml",
            "run --config run.toml",
        ),
    ),
    "a missing study": Mistake(
        "compare none.toml", ("cannot read the config none.toml", "give one of configs/studies/*.toml")
    ),
    "a study without seeds": Mistake(
        "compare no_seeds.toml", ("no_seeds.toml: seeds should have at least 1 item, found 0",)
    ),
    "invalid TOML": Mistake("vstar --config broken.toml", ("broken.toml is not valid TOML", "line 1")),
    "no samples": Mistake(
        f"{VSTAR} --set vstar.num_samples=0",
        ("vstar.num_samples should be greater than or equal to 1, found 0",),
    ),
    "a negative beta1": Mistake(
        f"{VSTAR} --set vstar.beta1=-0.5", ("vstar.beta1 should be greater than or equal to 0, found -0.5",)
    ),
    "a beta1 that is no number": Mistake(f"{VSTAR} --set vstar.beta1=nan", ("vstar.beta1", "found nan")),
    "rescoring under a negative beta1": Mistake(
        "rescore --run filtered --beta1 -1", ("--beta1 must be 0 or more", "inf is the mean", "found -1")
    ),
    "rescoring under nan": Mistake(
        "rescore --run filtered --beta1 nan", ("--beta1 must be 0 or more", "found nan")
    ),
    "a filter that leaves nothing": Mistake(
        "filter --run filtered --min-pass-rate 0.4 --max-pass-rate 0.45",
        ("would be left", "Loosen the rules"),
    ),
    "an empty range": Mistake(
        "filter --run filtered --min-pass-rate 0.9 --max-pass-rate 0.1", ("min ≤ max ≤ 1",)
    ),
    **{
        f"no run for {command.partition(' ')[0]}": Mistake(
            f"{command} --run none",
            (
                "there is no run none in ",
                "; use one of filtered, other",
                "or make it with `python cli.py vstar --config CONFIG.toml --run none`",
            ),
        )
        for command in (
            *("inspect", "sweep", "rescore --beta1 1", "rescore --min-gap 1", "filter", "report"),
            *("export-data --format trl -o new.jsonl", "export-segments -o new.jsonl"),
        )
    },
    "no artifact to inspect": Mistake(
        "inspect --run begun",
        (
            "there is no ",
            "/begun/vstar.parquet; make it with `python cli.py vstar --config CONFIG.toml --run begun`",
        ),
    ),
    "no artifact to forecast": Mistake(
        "forecast --config run.toml --run new",
        ("/new/vstar.parquet; make it with `python cli.py vstar --config run.toml --run new`",),
    ),
    "a run outside the artifacts": Mistake(
        "inspect --run ../../x", ("run should be of letters, digits", "found '../../x'")
    ),
    "an output that is no file": Mistake(
        "rescore --run filtered --beta1 1 -o /dev/stdout",
        ("cannot write /dev/stdout: it is a device", "--json"),
    ),
    "an output that is a link to itself": Mistake(
        "rescore --run filtered --beta1 1 -o loop",
        ("cannot write loop: Too many levels of symbolic links; correct the path",),
    ),
    "an output below a file": Mistake(
        "filter --run filtered -o data.jsonl/new.parquet",
        ("cannot write data.jsonl/new.parquet: a file stands where the path has a folder",),
    ),
    "an output where no file can be": Mistake(
        "rescore --run filtered --beta1 1 -o /proc/new.parquet",
        ("cannot write /proc/new.parquet: no file can be made in its folder",),
    ),
    **{
        f"a pipe to {command.partition(' ')[0]}": Mistake(
            f"{command} --vstar pipe", ("cannot read pipe: it is a device, a pipe or a socket; give the",)
        )
        for command in (
            *("inspect", "sweep", "rescore --beta1 1", "filter"),
            *("forecast --config run.toml", "train --config run.toml"),
        )
    },
    "an artifact that is a link to itself": Mistake(
        "rescore --beta1 1 --vstar loop", ("cannot read loop: Too many levels of symbolic links",)
    ),
    "an artifact that is a folder": Mistake(
        "filter --vstar empty", ("cannot read empty: it is a folder; give the path of a file",)
    ),
    "an artifact that is no Parquet file": Mistake(
        "inspect --vstar data.jsonl",
        ("data.jsonl is not a readable Parquet file", "; make it again with `python cli.py vstar`"),
    ),
    "a missing data file": Mistake(
        f"{VSTAR} --set data.path=none.jsonl", ("there is no data file none.jsonl; check data.path",)
    ),
    "an empty data set": Mistake(
        f"{VSTAR} --set data.path=empty.jsonl", ("the data set empty.jsonl is empty",)
    ),
    "data without the field": Mistake(
        f"{VSTAR} --set data.format=gsm8k",
        (
            "data.jsonl has no field question, it has prompt, answer",
            "set data.prompt_field and data.answer_field",
        ),
    ),
    "a prompt that is too long": Mistake(
        f"{VSTAR} --set data.max_prompt_tokens=4",
        ("tokens, more than data.max_prompt_tokens = 4", 'raise the limit or set data.long_prompts = "drop"'),
    ),
    "a completion that the context cannot hold": Mistake(
        f"{VSTAR} --set sampling.max_completion_tokens=512",
        (
            "more than the model's context of 512",
            "sampling.max_completion_tokens (512)",
            "lower",
        ),
    ),
    "a tokenizer without EOS": Mistake(
        f"{VSTAR} --set model.path=no_eos", ("config.json names an EOS token", "set eos_token")
    ),
    "a missing model": Mistake(
        f"{VSTAR} --set model.path=./nowhere/model",
        ("there is no model at ./nowhere/model; check model.path",),
        without=("base-model",),
    ),
    "a model that the hub does not have": Mistake(
        f"{VSTAR} --set model.path=nobody/no-such-model",
        ("no model nobody/no-such-model", "check model.path"),
    ),
    "a model without a name": Mistake(
        "evaluate --config run.toml --model=", ("the path of a model is empty; give a folder, or a name",)
    ),
    "a folder that is no model": Mistake(
        f"{VSTAR} --set model.path=./empty",
        ("empty is not a model in Hugging Face format: it has no config.json",),
    ),
    "a model without weights": Mistake(
        f"{VSTAR} --set model.path=no_weights", ("holds no *.safetensors weights; convert the model",)
    ),
    "a reference answer that cannot be read": Mistake(
        f"{VSTAR} --set data.path=bad_gold.jsonl",
        ("1 of 2 reference answers of bad_gold.jsonl", "not a number: 'far'", 'set data.bad_golds = "drop"'),
    ),
    "an unknown grader": Mistake(
        f"{VSTAR} --set grader.name=exact",
        ("unknown grader 'exact': use one of gsm8k, math, olympiadbench, code, judge, or 'package.module:",),
    ),
    "a reward function that is not there": Mistake(
        f"{VSTAR} --set grader.name=no_module:reward",
        ("grader.name = 'no_module:reward': no module 'no_module'",),
    ),
    "a reward function of two arguments": Mistake(
        f"{VSTAR} --set grader.name=rewards:by_two",
        (
            "grader.name = 'rewards:by_two' takes (question, answer)",
            "docs/rewards.md lists the functions that can be called",
        ),
    ),
    "a reward that is a text": Mistake(
        f"{VSTAR} --set grader.name=rewards:text",
        ("grader.name = 'rewards:text' returns what is no reward: the reward is a str, not a number",),
    ),
    "a line that is no JSON": Mistake(
        f"{VSTAR} --set data.path=cut.jsonl", ("cannot read cut.jsonl: line 2 is no JSON: Unterminated",)
    ),
    "the split of a local file": Mistake(
        f"{VSTAR} --set data.split=test",
        ("data: split = 'test' would have no effect: data.jsonl is a local file",),
    ),
    "a forecast of what draws nothing": Mistake(
        "forecast --config run.toml --set train.objective.name=direct_advantage",
        ("`python cli.py inspect --advantages ", "/artifacts/test/advantages.parquet`"),
    ),
    "no artifact to train on": Mistake(
        "train --config run.toml --run new --set data.template={prompt}",
        (
            "there is no ",
            "/new/vstar.parquet, which the objective astar_po needs; make it with "
            "`python cli.py vstar --config run.toml --run new --set 'data.template={prompt}'`, or choose an objective",
        ),
    ),
    "no samples to grade": Mistake(
        "regrade --config run.toml", ("draw them with `python cli.py vstar --config run.toml`",)
    ),
    "no base model": Mistake(
        "vstar --config run.toml --run new --set model.path={run}/base_model",
        (
            "there is no model at ",
            "/new/base_model; make it with `python cli.py base-model --config run.toml --run new --set "
            "'model.path={run}/base_model'`",
        ),
    ),
    "an artifact of another model, template and grader": Mistake(
        "train --config run.toml --run other",
        (
            'model.weights is "wwwww',
            r'prompt.template is "Q: {prompt}" there and "{prompt}\n" here',
            'grader is "math/0" there and "gsm8k/',
            "make it again with another --run",
        ),
    ),
}


@pytest.fixture(scope="module")
def folder(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A working folder with a config, data and models, right and wrong."""
    root = tmp_path_factory.mktemp("mistakes")
    (root / "run.toml").write_text(TOML)
    (root / "unknown_key.toml").write_text(TOML + "[vstar]\nnum_sample = 4\n")
    (root / "broken.toml").write_text("run =\n")
    study = 'study = "s"\nconfig = "run.toml"\nseeds = [0]\n[[arms]]\nname = "a"\n'
    (root / "study.toml").write_text(study)
    (root / "no_seeds.toml").write_text(study.replace("[0]", "[]"))
    (root / "data.jsonl").write_text('{"prompt": "How many apples has Tom?", "answer": "3"}\n')
    (root / "empty.jsonl").write_text("")
    rows = (root / "data.jsonl").read_text() + '{"prompt": "How far?", "answer": "far"}\n'
    (root / "bad_gold.jsonl").write_text(rows)
    (root / "cut.jsonl").write_text((root / "data.jsonl").read_text() + '{"prompt": "How')
    (root / "rewards.py").write_text(
        "def by_two(question, answer): return 1.0\ndef text(prompt, completion, answer): return '1'\n"
    )
    (root / "empty").mkdir()
    (root / "loop").symlink_to("loop")
    os.mkfifo(root / "pipe")
    shutil.copytree(tiny_model, root / "model")
    shutil.copytree(tiny_model, root / "no_weights", ignore=shutil.ignore_patterns("*.safetensors"))
    shutil.copytree(tiny_model, root / "no_eos", ignore=shutil.ignore_patterns("generation_config.json"))
    settings = json.loads((root / "no_eos" / "tokenizer_config.json").read_text())
    settings["eos_token"] = None
    (root / "no_eos" / "tokenizer_config.json").write_text(json.dumps(settings))
    change_json(root / "no_eos" / "config.json", eos_token_id=None)

    outcomes = {"p1": ["correct", "wrong"], "p2": ["wrong", "wrong"]}
    write_artifact(root / "artifacts" / "filtered" / "vstar.parquet", outcomes)
    (root / "artifacts" / "begun").mkdir()
    prompt = {**IDENTITY["prompt"], "template": "Q: {prompt}"}
    other = {**IDENTITY, "prompt": prompt, "grader": "math/0"}
    write_artifact(root / "artifacts" / "other" / "vstar.parquet", outcomes, identity=other)
    return root


@pytest.fixture(scope="module")
def finished(folder: Path, request: pytest.FixtureRequest) -> dict[str, subprocess.CompletedProcess[str]]:
    """Each mistake that this session asks for, made once."""
    asked = {item.name.partition("[")[2].removesuffix("]") for item in request.session.items}
    environment = {
        **os.environ,
        "ASTAR_PO_ARTIFACTS": str(folder / "artifacts"),
        "HF_HUB_OFFLINE": "1",
        "PYTHONPATH": str(folder),
    }

    def make(name: str) -> subprocess.CompletedProcess[str]:
        command = MISTAKES[name].command.split()
        return warm.run([ROOT / "cli.py", *command], cwd=folder, env=environment, timeout=120)

    return {name: make(name) for name in MISTAKES if name in asked}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_ends_in_one_line_that_names_the_fix(
    name: str, finished: dict[str, subprocess.CompletedProcess[str]]
) -> None:
    result = finished[name]
    assert result.returncode == 2, result.stderr
    lines = result.stderr.splitlines()
    assert len(lines) == 1, result.stderr
    assert lines[0].startswith("error: ")
    for part in MISTAKES[name].says:
        assert part in lines[0]
    assert not [part for part in MISTAKES[name].without if part in lines[0]]
    # Stage 1 says so before it loads a model.
    assert "loading" not in result.stdout


def test_mistakes_change_no_artifact(
    folder: Path, finished: dict[str, subprocess.CompletedProcess[str]]
) -> None:
    assert all(result.returncode == 2 for result in finished.values())
    files = {
        path.relative_to(folder / "artifacts").as_posix() for path in (folder / "artifacts").rglob("*.*")
    }
    artifacts = {f"{run}/vstar.parquet" for run in ("filtered", "other")}
    hidden = {name for name in files if name.endswith((".lock", ".weights.json"))}
    assert artifacts <= files
    assert files - artifacts - hidden <= {"test/config.json"}
