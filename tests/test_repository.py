"""Habits that hold for every file of the repository."""

from __future__ import annotations

import ast
import os
import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
MAX_FILE_LINES = 420
MAX_FUNCTION_LINES = 75


def repository_files() -> list[Path]:
    """What git tracks or would track, or every file outside hidden and build folders where there is no git."""
    listed = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    if listed.returncode == 0 and listed.stdout:
        paths = [ROOT / line for line in listed.stdout.splitlines()]
    else:
        skipped = {".git", ".venv", "output", "build", "dist", "__pycache__"}
        paths = [path for path in ROOT.rglob("*") if not skipped & set(path.relative_to(ROOT).parts)]
    return sorted(path for path in paths if path.is_file())


FILES = repository_files()
PYTHON = [path for path in FILES if path.suffix == ".py"]
SHELL = [path for path in FILES if path.suffix == ".sh" or path == ROOT / ".ci/run"]
TEXT_SUFFIXES = {".py", ".sh", ".md", ".toml", ".yaml", ".yml", ".txt", ".json"}
TEXT = [path for path in FILES if path.suffix in TEXT_SUFFIXES or path in SHELL]
LIBRARY = [path for path in PYTHON if "tests" not in path.relative_to(ROOT).parts]


def offenders(pattern: str, paths: list[Path]) -> list[str]:
    """``file:line`` of every line that matches, this file excepted (it holds the patterns)."""
    found = []
    for path in paths:
        if path == Path(__file__).resolve():
            continue
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
            if re.search(pattern, line):
                found.append(f"{path.relative_to(ROOT)}:{number}: {line.strip()}")
    return found


def test_files_were_found():
    assert len(PYTHON) > 20
    assert len(SHELL) >= 3


@pytest.mark.parametrize(
    ("pattern", "reason"),
    [
        (r"sys\.path\b", "the installed project, or PYTHONPATH=sam3, finds the packages"),
        (r"\.cuda\(\)", "a device is an argument: .to(device)"),
        (r"device\s*=\s*[\"']cuda", "a device is chosen at run time"),
        (r"weights_only\s*=\s*False", "a checkpoint is data: unpickling runs code"),
        (r"except[^:]*:\s*pass\b", "catch only what can be repaired"),
        (r"\b(TODO|FIXME|XXX)\b", "finish it or file it"),
        (r"\b(import pdb|breakpoint\(\))", "a debugger stops an unattended run"),
    ],
)
def test_no_python_file_uses(pattern, reason):
    found = offenders(pattern, PYTHON)
    assert not found, f"{reason}:\n" + "\n".join(found)


def test_no_machine_path_is_written_down():
    """Absolute paths of one machine fail on every other (D-135)."""
    found = offenders(r"(?<![\w.])/(work|root|home|Users|mnt|lustre|scratch|gpfs)/\w", TEXT)
    assert not found, "\n".join(found)


def test_no_bare_except_and_no_swallowed_exception():
    for path in LIBRARY:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.ExceptHandler):
                continue
            where = f"{path.relative_to(ROOT)}:{node.lineno}"
            assert node.type is not None, f"{where}: bare except"
            is_broad = isinstance(node.type, ast.Name) and node.type.id in {"Exception", "BaseException"}
            only_passes = all(isinstance(statement, ast.Pass) for statement in node.body)
            assert not (is_broad and only_passes), f"{where}: every exception is swallowed"


def test_files_and_functions_fit_on_a_few_pages():
    long = []
    for path in PYTHON:
        text = path.read_text(encoding="utf-8")
        if len(text.splitlines()) > MAX_FILE_LINES:
            long.append(f"{path.relative_to(ROOT)} has {len(text.splitlines())} lines")
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                num_lines = (node.end_lineno or node.lineno) - node.lineno + 1
                if num_lines > MAX_FUNCTION_LINES:
                    long.append(f"{path.relative_to(ROOT)}:{node.lineno} {node.name} has {num_lines} lines")
    assert not long, "\n".join(long)


def test_every_module_says_what_it_is_for():
    for path in LIBRARY:
        text = path.read_text(encoding="utf-8")
        if text.strip():
            assert ast.get_docstring(ast.parse(text)), f"{path.relative_to(ROOT)} opens without a docstring"


def test_file_names_say_something():
    for path in PYTHON:
        assert path.stem not in {"utils", "util", "misc", "helpers", "common_utils"}, path
        assert not re.search(r"(^my_|_v2$|_final$|_new$|_old$)", path.stem), path


def test_test_files_have_names_of_their_own():
    """pytest imports test files by their base name: of two alike, one is never run."""
    names = [path.name for path in PYTHON if "tests" in path.relative_to(ROOT).parts]
    assert sorted({name for name in names if names.count(name) > 1} - {"__init__.py", "conftest.py"}) == []


@pytest.mark.parametrize("path", SHELL, ids=lambda path: str(path.relative_to(ROOT)))
def test_shell_scripts_parse_and_fail_on_the_first_error(path):
    subprocess.run(["bash", "-n", str(path)], check=True, timeout=20)
    text = path.read_text(encoding="utf-8")
    is_sourced = not text.startswith("#!")
    assert is_sourced or re.search(r"^set -euo pipefail$", text, re.M), "a launcher must stop at the first error"
    assert is_sourced or os.access(path, os.X_OK), f"{path} has a #! line and is not executable"


def test_nothing_large_or_generated_is_tracked():
    for path in FILES:
        assert path.stat().st_size < 10 * 2**20, f"{path.relative_to(ROOT)} has {path.stat().st_size / 2**20:.1f} MiB"
        assert path.suffix not in {".pyc", ".log"}, path.relative_to(ROOT)


def test_the_tested_pair_of_torch_and_torchvision_is_pinned():
    """torchvision is compiled against exactly one torch: 0.(m + 15) goes with 2.m."""
    pins = dict(re.findall(r"^([\w-]+)==([\d.]+)", (ROOT / "constraints.txt").read_text(), re.M))
    torch_minor = int(pins["torch"].split(".")[1])
    assert pins["torchvision"].split(".")[:2] == ["0", str(torch_minor + 15)]
