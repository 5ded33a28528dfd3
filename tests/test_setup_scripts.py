"""scripts/setup_env.sh, test.sh and .ci/run with a stand-in for Python whose pip only writes down what it is asked."""

from __future__ import annotations

import importlib.metadata
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

# Answers -m venv and -m pip itself; everything else goes to the real interpreter.
FAKE_PYTHON = """#!/usr/bin/env bash
if [ "${1:-}" = -m ] && [ "${2:-}" = venv ]; then
    echo "venv $3" >>"$CALLS"
    mkdir -p "$3/bin" && cp "$0" "$3/bin/python"
elif [ "${1:-}" = -m ] && [ "${2:-}" = pip ]; then
    echo "$PWD: $*" >>"$CALLS"
    [ ! -e "$PIP_FAILS" ]
elif [ "${1:-}" = -c ] && [[ "$2" = *find_spec* ]]; then
    false
else
    exec "$REAL_PYTHON" "$@"
fi
"""


class Clone:
    """A clone with only what the set-up reads, and a way to run it."""

    def __init__(self, folder: Path) -> None:
        self.root = folder / "clone"
        (self.root / "scripts").mkdir(parents=True)
        for name in ("pyproject.toml", "constraints.txt", "scripts/setup_env.sh"):
            (self.root / name).write_text((ROOT / name).read_text())
        self.calls = folder / "calls.txt"
        self.pip_fails = folder / "pip-fails"
        self.bin = folder / "bin"
        self.bin.mkdir()
        self.tool("fake-python", FAKE_PYTHON)
        self.env = {
            "PATH": f"{self.bin}:{os.environ['PATH']}",
            "HOME": str(folder),
            "PYTHON": "fake-python",
            "REAL_PYTHON": sys.executable,
            "CALLS": str(self.calls),
            "PIP_FAILS": str(self.pip_fails),
            "EFFICIENTSAM3_DISK_GB": "0",
        }

    def tool(self, name: str, text: str) -> None:
        (self.bin / name).write_text(text)
        (self.bin / name).chmod(0o755)

    def setup(self, extras: str = "dev", **env: str) -> subprocess.CompletedProcess[str]:
        """Runs setup_env in a new shell, from another folder, and forgets the calls of earlier runs."""
        self.calls.write_text("")
        script = f'set -euo pipefail; source "{self.root}/scripts/setup_env.sh"; setup_env {extras}; echo "VENV $VENV"'
        return subprocess.run(
            ["bash", "-c", script], env={**self.env, **env}, cwd=self.bin, capture_output=True, text=True, timeout=60
        )

    def pip_calls(self) -> list[str]:
        return [line for line in self.calls.read_text().splitlines() if " pip " in line]


@pytest.fixture
def clone(tmp_path: Path) -> Clone:
    return Clone(tmp_path)


def test_first_run_makes_the_environment_and_installs_with_the_constraints(clone):
    done = clone.setup("dev")
    assert done.returncode == 0, done.stderr
    assert done.stdout.endswith(f"VENV {clone.root}/.venv\n")
    (call,) = clone.pip_calls()
    state = f"{clone.root}/.venv/efficientsam3-state"
    assert call == f"{clone.root}: -m pip install -c {state}/constraints.txt -e .[dev]"
    assert Path(state, "constraints.txt").read_text() == (ROOT / "constraints.txt").read_text()
    assert "index" not in call


def test_second_run_installs_nothing(clone):
    clone.setup("dev")
    done = clone.setup("dev")
    assert done.returncode == 0
    assert clone.calls.read_text() == ""


def test_dev_holds_demo_but_not_the_other_way_round(clone):
    clone.setup("demo")
    assert clone.pip_calls()[0].endswith(".[demo]")
    clone.setup("dev")
    assert clone.pip_calls()[0].endswith(".[dev]")
    clone.setup("demo")
    assert clone.pip_calls() == []


@pytest.mark.parametrize("name", ["pyproject.toml", "constraints.txt"])
def test_changed_dependencies_are_installed_again(clone, name):
    clone.setup("dev")
    with (clone.root / name).open("a") as file:
        file.write("# changed\n")
    clone.setup("dev")
    assert len(clone.pip_calls()) == 1


def test_a_cut_short_install_is_not_reused(clone):
    clone.pip_fails.touch()
    failed = clone.setup("dev")
    assert failed.returncode == 2
    assert "pip could not install efficientsam3[dev]" in failed.stderr
    clone.pip_fails.unlink()
    done = clone.setup("dev")
    assert done.returncode == 0
    assert "half made" in done.stdout
    assert f"venv {clone.root}/.venv" in clone.calls.read_text()
    assert len(clone.pip_calls()) == 1


def test_an_environment_that_others_made_is_used_and_what_it_holds_stays(clone, tmp_path):
    named = tmp_path / "named"
    (named / "bin").mkdir(parents=True)
    (named / "bin" / "python").write_text(FAKE_PYTHON)
    (named / "bin" / "python").chmod(0o755)
    done = clone.setup("dev", EFFICIENTSAM3_VENV=str(named))
    assert done.returncode == 0, done.stderr
    assert "venv" not in clone.calls.read_text().split()[0]
    assert len(clone.pip_calls()) == 1
    constraints = (named / "efficientsam3-state" / "constraints.txt").read_text()
    assert f"torch=={importlib.metadata.version('torch')}\n" in constraints
    # A failed install must never delete what is not ours.
    (named / "efficientsam3-state" / "unfinished").touch()
    (named / "keep.txt").touch()
    clone.setup("dev", EFFICIENTSAM3_VENV=str(named))
    assert (named / "keep.txt").exists()


def add_distribution(site: Path, name: str, version: str) -> None:
    record = site / f"{name}-{version}.dist-info" / "METADATA"
    record.parent.mkdir(parents=True)
    record.write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")


@pytest.mark.parametrize(
    ("held", "expected"),
    [
        ({"torch": "2.9.1+cu128"}, {"torch": "2.9.1+cu128", "torchvision": "0.24.*"}),
        ({"torchvision": "0.25.0"}, {"torch": "2.10.*", "torchvision": "0.25.0"}),
        ({"torch": "2.8.0", "torchvision": "0.23.0"}, {"torch": "2.8.0", "torchvision": "0.23.0"}),
        ({"transformers": "5.1.0"}, {"transformers": "5.1.0"}),
    ],
)
def test_what_is_missing_beside_a_held_torch_is_its_own_pair(clone, tmp_path, held, expected):
    """torchvision is compiled against one torch: our pin of it would contradict the torch that stays."""
    named, site = tmp_path / "named", tmp_path / "site"
    (named / "bin").mkdir(parents=True)
    # -S hides what the real interpreter holds: this environment holds what the test says.
    (named / "bin" / "python").write_text(FAKE_PYTHON.replace('exec "$REAL_PYTHON"', 'exec "$REAL_PYTHON" -S'))
    (named / "bin" / "python").chmod(0o755)
    for name, version in held.items():
        add_distribution(site, name, version)
    done = clone.setup("dev", EFFICIENTSAM3_VENV=str(named), PYTHONPATH=str(site))
    assert done.returncode == 0, done.stderr
    lines = (named / "efficientsam3-state" / "constraints.txt").read_text().splitlines()
    pins = [line.split("==", 1) for line in lines]
    for name, version in expected.items():
        assert [pin for wanted, pin in pins if wanted == name] == [version]
    assert any(name == "pytest-xdist" for name, _ in pins), "what is missing is pinned as ever"


@pytest.mark.skipif(shutil.which("flock") is None, reason="there is no lock without flock")
def test_a_lock_that_cannot_be_written_is_one_clear_line(clone, tmp_path):
    (tmp_path / "env.lock").mkdir()
    done = clone.setup("dev", EFFICIENTSAM3_VENV=str(tmp_path / "env"))
    assert done.returncode == 2
    assert done.stderr == f"error: cannot write {tmp_path}/env.lock: name another place with EFFICIENTSAM3_VENV\n"


def test_an_environment_kept_outside_the_clone_is_pointed_at_the_new_clone(clone, tmp_path):
    env = {"EFFICIENTSAM3_VENV": str(tmp_path / "kept" / "env")}
    clone.setup("dev", **env)
    moved = tmp_path / "another"
    clone.root.rename(moved)
    clone.root = moved
    done = clone.setup("dev", **env)
    assert done.returncode == 0, done.stderr
    (call,) = clone.pip_calls()
    assert call == f"{moved}: -m pip install --quiet --no-deps -e ."
    clone.setup("dev", **env)
    assert clone.pip_calls() == []


def test_python_too_old_is_one_clear_line(clone):
    clone.tool("old-python", '#!/bin/sh\n[ "$1" = --version ] && echo Python 3.8.10 && exit 0\nexit 1\n')
    done = clone.setup("dev", PYTHON="old-python")
    assert done.returncode == 2
    assert done.stderr == "error: PYTHON=old-python is Python 3.8.10: this project needs Python >= 3.10\n"


def test_python_that_is_not_there_is_one_clear_line(clone):
    done = clone.setup("dev", PYTHON="no-such-python")
    assert done.returncode == 2
    assert done.stderr == "error: PYTHON=no-such-python is not a command: name a Python >= 3.10\n"


def test_no_venv_module_names_the_package_to_install(clone):
    refuses = FAKE_PYTHON.replace("*find_spec*", '*"import venv"*')
    clone.tool("bare-python", refuses)
    done = clone.setup("dev", PYTHON="bare-python")
    assert done.returncode == 2
    assert "has no venv module" in done.stderr
    assert "python3-venv" in done.stderr


def test_a_full_disk_is_told_before_the_download(clone):
    clone.tool("df", "#!/bin/sh\necho header\necho /dev/disk 9999999 9000000 1500000 90% /\n")
    done = clone.setup("dev", EFFICIENTSAM3_DISK_GB="6")
    assert done.returncode == 2
    assert "error: 1 GB free at" in done.stderr
    assert "6 GB needed" in done.stderr
    assert clone.pip_calls() == []


def test_a_folder_that_is_no_environment_is_refused(clone, tmp_path):
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "a.jpg").touch()
    done = clone.setup("dev", EFFICIENTSAM3_VENV=str(tmp_path / "photos"))
    assert done.returncode == 2
    assert "is not empty and no environment" in done.stderr
    assert (tmp_path / "photos" / "a.jpg").exists()


def test_test_sh_runs_every_check_and_names_those_that_failed(clone):
    (clone.root / "scripts" / "test.sh").write_text((ROOT / "scripts/test.sh").read_text())
    clone.setup("dev")
    venv_bin = clone.root / ".venv" / "bin"
    for name, status in (("ruff", 0), ("mypy", 1)):
        (venv_bin / name).write_text(f'#!/bin/sh\necho "{name} $*" >>"$CALLS"\nexit {status}\n')
        (venv_bin / name).chmod(0o755)
    (venv_bin / "python").write_text(
        FAKE_PYTHON.replace("if [", 'if [ "${2:-}" = pytest ]; then\n    echo "$*" >>"$CALLS"\nelif [', 1)
    )
    clone.calls.write_text("")
    done = subprocess.run(
        ["bash", str(clone.root / "scripts/test.sh"), "-k", "two words"],
        env={**clone.env, "TEST_WORKERS": "3"},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 1
    assert done.stderr == "failed: mypy\n"
    calls = clone.calls.read_text().splitlines()
    assert calls[:3] == ["ruff check .", "ruff format --check .", "mypy "]
    assert calls[3] == "-m pytest -n 3 --dist loadgroup --durations 15 -k two words"


def test_ci_keeps_one_environment_for_each_set_of_dependencies(clone, tmp_path):
    (clone.root / ".ci").mkdir()
    (clone.root / ".ci" / "run").write_text((ROOT / ".ci/run").read_text())
    report = 'echo "$EFFICIENTSAM3_VENV" "$PYTHONPATH" "$@"\nmkdir -p "$EFFICIENTSAM3_VENV/efficientsam3-state"\n'
    (clone.root / "scripts" / "test.sh").write_text(report)

    def ci(*words: str) -> list[str]:
        command = ["bash", str(clone.root / ".ci/run"), *words]
        done = subprocess.run(command, env=clone.env, capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, done.stderr
        return done.stdout.split()

    first, path, *words = ci("-x")
    assert Path(first).parent == tmp_path / ".cache" / "efficientsam3"
    assert path == f"{clone.root}:{clone.root}/sam3"
    assert words == ["-x"]
    assert ci()[0] == first
    with (clone.root / "constraints.txt").open("a") as file:
        file.write("# changed\n")
    second = ci()[0]
    assert second != first
    assert Path(first).exists(), "a run that uses the older environment may still be going on"
    os.utime(Path(first, "efficientsam3-state"), (0, 0))
    assert "removing" in ci()
    assert not Path(first).exists()
    assert Path(second).exists()
