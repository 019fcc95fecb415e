"""Adding an objective is one file and one line in the union: the example of CONTRIBUTING.md, followed to the letter."""

import json
import os
import shutil
from pathlib import Path

from safetensors.torch import load_file

from tests import warm
from tests.conftest import ROOT
from tests.stage2_runs import as_toml, tiny_config

UNION = "AStarPO | "


def example() -> str:
    """The file that CONTRIBUTING.md shows."""
    _, _, rest = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8").partition("```python\n")
    return rest.partition("```")[0]


def test_a_toy_objective_is_one_file_and_one_line_and_trains(tmp_path: Path, tiny_model: Path) -> None:
    checkout = tmp_path / "checkout"
    for name in ("cli.py", "common", "stage1_vstar", "stage2_train"):
        source = ROOT / name
        copy = shutil.copytree if source.is_dir() else shutil.copy2
        checkout.mkdir(exist_ok=True)
        copy(source, checkout / name)
    objectives = checkout / "stage2_train" / "objectives"
    (objectives / "toy.py").write_text(example(), encoding="utf-8")
    union = (objectives / "__init__.py").read_text(encoding="utf-8")
    assert union.count(UNION) == 1
    with_toy = union.replace(UNION, f"{UNION}Toy | ")
    imports = "from stage2_train.objectives.toy import Toy\n"
    (objectives / "__init__.py").write_text(
        with_toy.replace("__all__", f"{imports}\n__all__"), encoding="utf-8"
    )

    train = {"objective": {"name": "astar_po"}, "iterations": 2}
    config = tiny_config(tmp_path, tiny_model, train=train, engine={"backend": "transformers"})
    text = as_toml(config)
    section = text[text.index("[train.objective]") :].partition("\n[")[0]
    (tmp_path / "run.toml").write_text(
        text.replace(section, '[train.objective]\nname = "toy"\nstrength = 2.0\n'), encoding="utf-8"
    )
    finished = warm.run(
        [checkout / "cli.py", "train", "--config", tmp_path / "run.toml"],
        cwd=tmp_path,
        env={**os.environ, "ASTAR_PO_ARTIFACTS": str(tmp_path), "HF_HUB_OFFLINE": "1"},
        timeout=120,
    )
    assert finished.returncode == 0, finished.stderr[-4000:]
    rows = [json.loads(line) for line in (tmp_path / "tiny" / "metrics.jsonl").read_text().splitlines()]
    assert [row["iteration"] for row in rows] == [0, 1, 2]
    assert "loss/toy" in rows[1]
    assert "kl/sequence" not in rows[1]
    trained = load_file(tmp_path / "tiny" / "model" / "model.safetensors")
    start = load_file(tiny_model / "model.safetensors")
    assert any((weight != start[name]).any() for name, weight in trained.items())
