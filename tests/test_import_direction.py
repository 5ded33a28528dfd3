"""Imports point one way: stages -> sam3_train -> sam3, and no stage knows another."""

from __future__ import annotations

import ast
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
STAGES = ("stage1", "stage1_geometry_finetune", "stage2")
PACKAGES = {"sam3": "sam3/sam3", "sam3_train": "sam3/sam3_train", **{name: name for name in STAGES}}
# What the model library may import beyond Python itself: a script that only predicts installs no training package.
SAM3_MAY_IMPORT = {
    *("sam3", "torch", "torchvision", "timm", "numpy", "PIL", "safetensors", "huggingface_hub"),
    *("open_clip", "scipy", "tqdm", "av", "decord"),
}
# The oracle of the tests and of the benchmark; no run of ours may depend on it.
ORACLES = {"transformers"}


def imported_modules(source: str) -> set[str]:
    """Dotted names of all absolute imports in a module, also those inside functions."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            names.add(node.module or "")
    return names


def top_levels(path: Path) -> set[str]:
    return {name.split(".")[0] for name in imported_modules(path.read_text(encoding="utf-8"))}


def python_files(package: str) -> list[Path]:
    return sorted((ROOT / PACKAGES[package]).rglob("*.py"))


def test_imports_inside_functions_are_seen():
    source = "import a.b\ndef f():\n    from c.d import e\n    from . import g\n"
    assert imported_modules(source) == {"a.b", "c.d"}


def test_the_model_library_imports_no_training_code_and_few_packages():
    assert len(python_files("sam3")) > 5
    for path in python_files("sam3"):
        foreign = top_levels(path) - SAM3_MAY_IMPORT - set(sys.stdlib_module_names)
        assert not foreign, f"{path.relative_to(ROOT)} imports {sorted(foreign)}"


def test_the_training_plumbing_imports_no_stage():
    for path in python_files("sam3_train"):
        wrong = top_levels(path) & ({*STAGES} | ORACLES)
        assert not wrong, f"{path.relative_to(ROOT)} imports {sorted(wrong)}"


@pytest.mark.parametrize("stage", STAGES)
def test_a_stage_imports_no_other_stage(stage):
    for path in python_files(stage):
        wrong = top_levels(path) & (({*STAGES} - {stage}) | ORACLES)
        assert not wrong, f"{path.relative_to(ROOT)} imports {sorted(wrong)}"


def test_packages_import_no_script_and_no_test():
    scripts = {path.stem for folder in ("scripts", "data", "data/demo") for path in (ROOT / folder).glob("*.py")}
    scripts |= {"conftest", "tests", "scripts"}
    for package in PACKAGES:
        for path in python_files(package):
            wrong = {name for name in imported_modules(path.read_text(encoding="utf-8")) if name in scripts}
            assert not wrong, f"{path.relative_to(ROOT)} imports {sorted(wrong)}"


@pytest.mark.parametrize("stage", STAGES)
def test_no_stage_file_hides_a_module_of_python(stage):
    """Stage scripts run by path, so their folder comes first on the path: logging.py there would replace Python's."""
    for path in (ROOT / stage).glob("*.py"):
        assert path.stem not in sys.stdlib_module_names, f"{path.relative_to(ROOT)} hides Python's {path.stem}"
        assert path.stem not in {"torch", "torchvision", "numpy", "timm", "sam3", "sam3_train"}
