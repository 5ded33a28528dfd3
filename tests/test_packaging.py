"""pyproject.toml and constraints.txt: what is imported is declared, what is pinned installs, what is shipped works."""

from __future__ import annotations

import ast
import importlib.metadata
import re
import sys
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).resolve().parents[1]
STAGES = ("stage1", "stage1_geometry_finetune", "stage2")
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
PYTHONS = ("3.10", "3.11", "3.12", "3.13")
# The lowest Python of each pinned release, from its own metadata; the test below compares those that are installed.
LOWEST_PYTHON = {
    "torch==2.11.0": "3.10",
    "torchvision==0.26.0": "3.10",
    "timm==1.0.31": "3.10",
    "scipy==1.17.1": "3.11",
    "scipy==1.15.3": "3.10",
    "open-clip-torch==3.3.0": "3.9",
    "av==18.1.0": "3.11",
    "av==17.1.0": "3.10",
    "decord==0.6.0": None,
    "nbclient==0.11.0": "3.10",
    "nbformat==5.11.1": "3.10",
    "ipykernel==7.3.0": "3.10",
    "matplotlib==3.11.2": "3.11",
    "matplotlib==3.10.9": "3.10",
    "transformers==5.23.0": "3.11",
    "transformers==5.20.2": "3.10",
    "huggingface-hub==2.4.0": "3.10",
    "safetensors==0.8.0": "3.10",
    "pyyaml==6.0.3": "3.8",
    "yacs==0.1.8": None,
    "pycocotools==2.0.11": "3.9",
    "tensorboard==2.21.0": "3.9",
    "tqdm==4.70.1": "3.8",
    "isal==1.9.1": "3.9",
    "scikit-image==0.26.0": "3.11",
    "scikit-image==0.25.2": "3.10",
    "pytest==9.2.0": "3.10",
    "pytest-xdist==3.8.0": "3.9",
    "ruff==0.17.5": "3.7",
    "mypy==2.4.1": "3.10",
    "hatchling==1.33.0": "3.10",
}


def pins() -> list[Requirement]:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    return [Requirement(line) for line in lines if line.strip() and not line.startswith("#")]


def pin_name(pin: Requirement) -> str:
    """The pin without its marker, under the name's canonical spelling."""
    return f"{canonicalize_name(pin.name)}{pin.specifier}"


def declared(*groups: list[str]) -> set[str]:
    return {canonicalize_name(Requirement(line).name) for group in groups for line in group}


def as_numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split("."))


@pytest.mark.parametrize("python", PYTHONS)
def test_every_pin_can_be_installed_by_every_python_of_the_project(python):
    chosen: dict[str, list[str]] = {canonicalize_name(pin.name): [] for pin in pins()}
    for pin in pins():
        if pin.marker is None or pin.marker.evaluate({"python_version": python, "python_full_version": f"{python}.0"}):
            chosen[canonicalize_name(pin.name)].append(pin_name(pin))
    for name, found in chosen.items():
        assert len(found) == 1, f"{name} on Python {python}: {found}; one pin must apply"
        lowest = LOWEST_PYTHON[found[0]]
        assert lowest is None or as_numbers(lowest) <= as_numbers(python), f"{found[0]} needs Python >= {lowest}"


def test_the_lowest_pythons_are_those_of_the_installed_releases():
    compared = 0
    for pin in pins():
        try:
            held = importlib.metadata.distribution(pin.name)
        except importlib.metadata.PackageNotFoundError:
            continue
        if pin_name(pin) == f"{canonicalize_name(pin.name)}=={held.version.split('+')[0]}":
            bound = re.search(r">=\s*(\d+\.\d+)", held.metadata["Requires-Python"] or "")
            assert LOWEST_PYTHON[pin_name(pin)] == (bound and bound[1]), pin_name(pin)
            compared += 1
    if not compared:
        pytest.skip("no pinned release is installed here")


def test_every_pin_is_of_something_the_project_asks_for():
    project = PYPROJECT["project"]
    asked = declared(project["dependencies"], *project["optional-dependencies"].values())
    unused = {canonicalize_name(pin.name) for pin in pins()} - asked - declared(PYPROJECT["build-system"]["requires"])
    assert not unused, f"pinned but never asked for: {sorted(unused)}"


def top_level_imports(folder: Path) -> dict[str, str]:
    """Imported top-level module -> a file that imports it."""
    found: dict[str, str] = {}
    for path in sorted(folder.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and node.level == 0:
                names = [node.module or ""]
            else:
                continue
            found.update({name.split(".")[0]: str(path.relative_to(ROOT)) for name in names})
    return found


def test_every_package_that_is_imported_is_declared():
    """D-67: what `pip install` brings is what the code imports."""
    project = PYPROJECT["project"]
    extras = {"sam3/sam3": [], **{folder: ["stage1"] for folder in ("sam3/sam3_train", *STAGES)}}
    holders = importlib.metadata.packages_distributions()
    assert "yaml" in top_level_imports(ROOT / "sam3/sam3_train")
    for folder, names in extras.items():
        asked = declared(project["dependencies"], *(project["optional-dependencies"][name] for name in names))
        for module, path in top_level_imports(ROOT / folder).items():
            if module in sys.stdlib_module_names or module in {"sam3", "sam3_train", *STAGES}:
                continue
            names_of_module = {canonicalize_name(name) for name in holders.get(module, [module])}
            assert names_of_module & asked, f"{path} imports {module}, which pyproject.toml does not declare"


@pytest.fixture(scope="module")
def wheel_files(tmp_path_factory) -> set[str]:
    wheel = pytest.importorskip("hatchling.builders.wheel")
    folder = tmp_path_factory.mktemp("wheel")
    (built,) = wheel.WheelBuilder(str(ROOT)).build(directory=str(folder), versions=["standard"])
    with zipfile.ZipFile(built) as archive:
        return set(archive.namelist())


def test_the_wheel_holds_the_packages_and_their_data(wheel_files):
    folders = {"sam3/sam3": "sam3", "sam3/sam3_train": "sam3_train", **{stage: stage for stage in STAGES}}
    for folder, package in folders.items():
        for path in (ROOT / folder).rglob("*.py"):
            assert f"{package}/{path.relative_to(ROOT / folder).as_posix()}" in wheel_files
    assert "stage1/configs/es_rv_m.yaml" in wheel_files
    assert "stage1/configs/teacher/sam_vit_huge_sa1b.yaml" in wheel_files
    assert "stage1_geometry_finetune/configs/es_rv_m.yaml" in wheel_files


def test_the_wheel_holds_nothing_that_needs_a_clone(wheel_files):
    """The launchers source scripts/launch.sh, the demo's settings name data/demo; neither is in a wheel."""
    assert not [name for name in wheel_files if name.endswith(".sh")]
    assert not [name for name in wheel_files if "/demo_" in name and name.endswith(".yaml")]
    assert {name.split("/")[0].split("-")[0] for name in wheel_files} == {
        *("sam3", "sam3_train", *STAGES, "efficientsam3")
    }
