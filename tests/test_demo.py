"""The demo as a list of steps: each goes through its own launcher, and mistakes are clear."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import demo
import pytest
import yaml

ROOT = Path(__file__).resolve().parents[1]
SETTINGS = yaml.safe_load((ROOT / "configs" / "demo.yaml").read_text())


def steps():
    return demo.demo_steps(Path("configs/demo.yaml"), SETTINGS, Path("output/demo"))


def test_steps_name_files_that_exist():
    for step in steps():
        for path in step.inputs:
            assert (ROOT / path).is_file(), f"{step.name} reads {path}"
        script = step.command[1]
        assert (ROOT / script).is_file(), f"{step.name} runs {script}"


def test_stages_go_through_their_own_launchers_on_the_cpu():
    commands = {step.name: step.command_line for step in steps()}
    assert list(commands) == ["world", "export", "train", "merge", "report"]
    assert commands["export"].startswith("bash stage1/scripts/save_stage1_embeddings.sh ")
    assert commands["train"].startswith("bash stage1/scripts/train_stage1_student.sh ")
    assert commands["merge"].startswith("python stage1/convert_stage1_weights.py ")
    for name in ("export", "train"):
        assert "DEVICE=cpu" in commands[name]


def test_the_training_config_reaches_the_student_the_demo_merges():
    config = yaml.safe_load((ROOT / demo.STUDENT_CFG).read_text())
    assert config["MODEL"]["BACKBONE"] == demo.STUDENT
    assert config["MODEL"]["PRESET"] == "tiny"


def test_every_config_that_a_step_inherits_from_is_an_input():
    """A changed base repeats the step."""
    inputs = {step.name: step.inputs for step in steps()}
    for name, config in (("export", demo.TEACHER_CFG), ("train", demo.STUDENT_CFG)):
        base = config.parent / yaml.safe_load((ROOT / config).read_text())["BASE"][0]
        assert config in inputs[name] and base in inputs[name]


def test_steps_that_resume_own_a_folder_of_their_own():
    """So that a changed setting does not go on from what another setting has made."""
    owned = {step.name: list(step.owned) for step in steps()}
    assert owned["world"] and owned["export"] and owned["train"]
    paths = [path for found in owned.values() for path in found]
    for path in paths:
        assert path.is_relative_to("output/demo")
        assert not [other for other in paths if other is not path and other.is_relative_to(path)]


def test_the_world_is_made_again_when_any_of_its_modules_changes():
    read = {path.stem for path in steps()[0].inputs}
    needed = {"demo_world"}
    while True:
        sources = [(ROOT / "data/demo" / f"{name}.py").read_text() for name in needed]
        found = {name for text in sources for name in re.findall(r"^from (demo_\w+) import", text, re.M)} | needed
        if found == needed:
            break
        needed = found
    assert read == needed


def test_a_changed_photo_prompt_repeats_only_the_report(tmp_path):
    from step_runner import step_key

    cfg = tmp_path / "demo.yaml"
    cfg.write_text((ROOT / "configs" / "demo.yaml").read_text())

    def keys() -> list[str]:
        found, previous = [], ""
        for step in demo.demo_steps(cfg, SETTINGS, Path("output/demo")):
            previous = step_key(step, previous, ROOT)
            found.append(previous)
        return found

    before = keys()
    cfg.write_text(cfg.read_text() + "# changed\n")
    assert [a == b for a, b in zip(before, keys(), strict=True)] == [True, True, True, True, False]


def test_a_wrong_settings_file_is_one_clear_line(tmp_path, capsys):
    assert demo.main(["--cfg", str(tmp_path / "none.yaml")]) == 2
    assert "none.yaml does not exist" in capsys.readouterr().err
    (tmp_path / "half.yaml").write_text("WORLD: {}\n")
    assert demo.main(["--cfg", str(tmp_path / "half.yaml")]) == 2
    assert "half.yaml has no section REPORT" in capsys.readouterr().err


def test_fresh_deletes_only_what_the_demo_made(tmp_path, capsys):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "photo.jpg").touch()
    assert demo.main(["--fresh", "--output", str(tmp_path / "mine")]) == 2
    assert "was not made by the demo" in capsys.readouterr().err
    assert (tmp_path / "mine" / "photo.jpg").exists()


def test_a_failing_step_ends_the_demo_with_its_exit_code(tmp_path, capsys, monkeypatch):
    from step_runner import Step

    broken = Step("world", "Make the demo world", ["bash", "-c", "echo no photos >&2; exit 2"])
    monkeypatch.setattr(demo, "demo_steps", lambda *_: [broken])
    assert demo.main(["--output", str(tmp_path / "demo")]) == 2
    assert "[1/1] Make the demo world: failed with exit code 2" in capsys.readouterr().err


@pytest.mark.skipif(shutil.which("git") is None, reason="needs git")
def test_what_the_demo_makes_is_not_tracked():
    done = subprocess.run(["git", "check-ignore", "-q", "output/demo/index.html"], cwd=ROOT, check=False)
    assert done.returncode == 0
