"""The architecture: imports go one way, and heavy libraries are imported in one place."""

import ast
import re
import subprocess
import sys
from collections.abc import Collection, Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ("common", "stage1_vstar", "stage2_train")
SOURCES = [ROOT / "cli.py", *(file for name in PACKAGES for file in sorted((ROOT / name).rglob("*.py")))]


def place(file: Path) -> str:
    return file.relative_to(ROOT).as_posix()


def imports(file: Path, *, at_runtime_only: bool = False, top_level_only: bool = False) -> set[str]:
    """The full names of the modules that a file imports; those for the type checker only can be left out."""
    names: set[str] = set()
    for node in walk(ast.parse(file.read_text(encoding="utf-8")), at_runtime_only, top_level_only):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{place(file)} has a relative import"
            assert node.module is not None
            names.add(node.module)
    return names


def walk(node: ast.AST, at_runtime_only: bool, top_level_only: bool) -> Iterator[ast.AST]:
    for child in ast.iter_child_nodes(node):
        if at_runtime_only and isinstance(child, ast.If) and ast.unparse(child.test) == "TYPE_CHECKING":
            continue
        if top_level_only and isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            continue
        yield child
        yield from walk(child, at_runtime_only, top_level_only)


def packages(names: set[str]) -> set[str]:
    return {name.partition(".")[0] for name in names}


def test_there_is_something_to_look_at() -> None:
    assert {"cli.py", "common/contract.py", "stage1_vstar/run.py", "stage2_train/train.py"} <= set(
        map(place, SOURCES)
    )
    assert "polars" in packages(imports(ROOT / "common" / "contract.py"))
    assert "vllm" in packages(imports(ROOT / "common" / "engines" / "vllm_engine.py"))


@pytest.mark.parametrize("file", SOURCES, ids=place)
def test_imports_go_from_the_command_line_over_the_stages_to_common(file: Path) -> None:
    forbidden = {
        "cli.py": set(),
        "common": {"cli", "stage1_vstar", "stage2_train", "tests"},
        "stage1_vstar": {"cli", "stage2_train", "deepspeed", "tests"},
        "stage2_train": {"cli", "stage1_vstar", "tests"},
    }[place(file).partition("/")[0]]
    assert not packages(imports(file)) & forbidden


@pytest.mark.parametrize(
    ("package", "homes"),
    [
        (
            "vllm",
            [f"common/engines/vllm_{name}.py" for name in ("adapter", "engine", "repairs")],
        ),
        ("ray", ["common/engines/ray_workers.py"]),
        ("deepspeed", ["stage2_train/learner.py"]),
    ],
)
def test_a_heavy_package_is_imported_in_one_place(package: str, homes: list[str]) -> None:
    importers = [place(file) for file in SOURCES if package in packages(imports(file))]
    assert importers == homes


def test_no_imports_run_in_a_circle() -> None:
    """Not even those for the type checker."""
    names = {
        place(file).removesuffix(".py").removesuffix("/__init__").replace("/", "."): file for file in SOURCES
    }
    graph = {name: resolved(file, names) - {name} for name, file in names.items()}
    TopologicalSorter(graph).prepare()  # raises CycleError with the files of a circle


def resolved(file: Path, names: Collection[str]) -> set[str]:
    """The modules of this project that a file imports: `from package import module` is that module."""
    found = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            parts = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= parts if parts <= set(names) else {node.module}
    return found & set(names)


def test_the_command_line_imports_nothing_heavy_before_a_command_runs() -> None:
    loaded = packages(imports(ROOT / "cli.py", at_runtime_only=True, top_level_only=True))
    assert loaded - set(sys.stdlib_module_names) == {"typer", "common"}
    script = "import sys, cli; print(sorted({name.partition('.')[0] for name in sys.modules}))"
    result = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=60, cwd=ROOT
    )
    modules = set(ast.literal_eval(result.stdout))
    assert not modules & {"torch", "vllm", "polars", "pyarrow", "numpy", "transformers", "deepspeed", "sympy"}


def test_what_stage_one_is_made_of_runs_without_a_training_library() -> None:
    stage1 = [file for file in SOURCES if place(file).startswith("stage1_vstar/")]
    used = set().union(*(packages(imports(file, at_runtime_only=True)) for file in stage1))
    assert used - set(sys.stdlib_module_names) == {
        "common",
        "stage1_vstar",
        "matplotlib",
        "numpy",
        "polars",
        "pyarrow",
        "rich",
        "scipy",
    }


def test_the_readme_names_every_module_and_package() -> None:
    tree = (ROOT / "README.md").read_text(encoding="utf-8").partition("## Where things are")[2]
    parts = [part for part in re.split(r"\n    (?=\S)", tree) if part.partition("/")[0] in PACKAGES]
    assert len(parts) == len(PACKAGES)
    for part in parts:
        words = set(re.split(r"[\s,]+", part))
        for file in (ROOT / part.partition("/")[0]).iterdir():
            if not file.name.startswith("__"):
                assert (file.name if file.suffix else f"{file.name}/") in words, place(file)
