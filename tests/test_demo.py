"""The demo as a list of steps: each goes through its own launcher, and mistakes are clear."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import demo
import pytest
import yaml
from step_runner import Step, run_steps, step_key
from step_sources import sources_of

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
    assert list(commands) == [
        "world",
        "export",
        "train",
        "merge",
        "finetune",
        "convert",
        "memory",
        "remember",
        "report",
    ]
    assert commands["export"].startswith("bash stage1/scripts/save_stage1_embeddings.sh ")
    assert commands["train"].startswith("bash stage1/scripts/train_stage1_student.sh ")
    assert commands["merge"].startswith("python stage1/convert_stage1_weights.py ")
    assert commands["finetune"].startswith("bash stage1_geometry_finetune/scripts/train_geometry_finetune.sh ")
    assert commands["convert"].startswith("python stage1_geometry_finetune/convert_geometry_finetune.py ")
    assert commands["memory"].startswith("bash stage2/scripts/train_memory.sh ")
    assert commands["remember"].startswith("python stage2/convert_memory_weights_stage2.py ")
    for name in ("export", "train", "finetune", "memory"):
        assert "DEVICE=cpu" in commands[name]


def test_the_training_config_reaches_the_student_the_demo_merges():
    for path in (demo.STUDENT_CFG, demo.FINETUNE_CFG):
        config = yaml.safe_load((ROOT / path).read_text())
        assert config["MODEL"]["BACKBONE"] == demo.STUDENT
        assert config["MODEL"]["PRESET"] == "tiny"


def test_the_fine_tune_goes_on_from_what_stage_1_left():
    """Its checkpoint, its embeddings and its merged file; the report shows both students."""
    commands = {step.name: step.command_line for step in steps()}
    results = {step.name: [str(path) for path in step.results] for step in steps()}
    (student,), (embeddings,), (merged,) = results["train"], results["export"], results["merge"]
    assert f"PRETRAINED={student}" in commands["finetune"]
    assert f"TEACHER_EMBED_PATH={embeddings}" in commands["finetune"]
    (tuned,), (output,) = results["finetune"], results["convert"]
    assert f"--finetune-ckpt {tuned} --pretrained {merged} --output {output}" in commands["convert"]
    assert f"--student {merged}" in commands["report"] and f"--finetuned {output}" in commands["report"]


def test_the_memory_is_trained_and_merged_behind_the_fine_tuned_student():
    """And shown with it; its features are cached in the run's own folder."""
    commands = {step.name: step.command_line for step in steps()}
    results = {step.name: [str(path) for path in step.results] for step in steps()}
    (tuned,), (trained,), (merged,) = results["convert"], results["memory"], results["remember"]
    assert f"SAM3_CHECKPOINT={tuned}" in commands["memory"]
    assert f"DATA.FEATURE_CACHE {Path(trained).parent / 'features'}" in commands["memory"]
    assert f"--trained_checkpoint {trained} --sam3_checkpoint {tuned} --output_path {merged}" in commands["remember"]
    assert f"--memory {merged} --memory-run {Path(trained).parent}" in commands["report"]
    assert SETTINGS["WORLD"]["train-clips"] > 0 and SETTINGS["WORLD"]["val-clips"] > 0


def test_every_config_that_a_step_inherits_from_is_an_input():
    """A changed base repeats the step."""
    inputs = {step.name: step.inputs for step in steps()}
    configs = {"export": demo.TEACHER_CFG, "train": demo.STUDENT_CFG, "finetune": demo.FINETUNE_CFG}
    configs["memory"] = demo.MEMORY_CFG
    for name, config in configs.items():
        base = config.parent / yaml.safe_load((ROOT / config).read_text())["BASE"][0]
        assert config in inputs[name] and base in inputs[name]


def test_steps_that_resume_own_a_folder_of_their_own():
    """So that a changed setting does not go on from what another setting has made."""
    owned = {step.name: list(step.owned) for step in steps()}
    assert owned["world"] and owned["export"] and owned["train"] and owned["finetune"] and owned["memory"]
    paths = [path for found in owned.values() for path in found]
    for path in paths:
        assert path.is_relative_to("output/demo")
        assert not [other for other in paths if other is not path and other.is_relative_to(path)]


def test_the_world_is_made_again_when_any_of_its_modules_changes():
    read = {path.stem for path in steps()[0].inputs if path.parent == Path("data/demo")}
    needed = {"demo_world"}
    while True:
        sources = [(ROOT / "data/demo" / f"{name}.py").read_text() for name in needed]
        found = {name for text in sources for name in re.findall(r"^from (demo_\w+) import", text, re.M)} | needed
        if found == needed:
            break
        needed = found
    assert read == needed


def test_the_code_behind_a_step_is_among_its_inputs():
    """Of the stage, the model (through its lazy exports and plug-ins too), the launcher and the loop."""
    read = {step.name: {str(path) for path in step.inputs} for step in steps()}
    for name, expected in {
        "export": ["stage1/export.py", "sam3/sam3/model/vitdet.py", "sam3/sam3_train/torchrun.py", "scripts/launch.sh"],
        "train": ["stage1/model.py", "sam3/sam3/backbones/demo_cnn.py", "sam3/sam3_train/trainer.py"],
        "merge": ["stage1/merge.py", "sam3/sam3/backbones/folding.py", "sam3/sam3_train/merged_proof.py"],
        "finetune": ["stage1_geometry_finetune/task.py", "stage1_geometry_finetune/data/prompt_drawing.py"],
        "convert": ["stage1_geometry_finetune/merge.py", "sam3/sam3/checkpoint_merge.py"],
        "memory": ["stage2/task.py", "stage2/data/clip_sampler.py", "sam3/sam3/model/perceiver.py"],
        "remember": ["stage2/memory_proof.py", "sam3/sam3/efficient_keys.py"],
        "report": ["data/demo/demo_eval.py", "sam3/sam3/loading.py", "sam3/sam3/sam/mask_decoder.py"],
    }.items():
        assert read[name] >= set(expected), set(expected) - read[name]
    assert not [path for path in read["world"] if path.startswith(("stage1/", "sam3/sam3/"))]
    assert "stage1/merge.py" not in read["train"] and "stage1/train_stage1.py" not in read["export"]
    assert not [path for path in read["finetune"] if path.startswith("stage1/")]
    assert not [path for paths in read.values() for path in paths if path.startswith("tests/")]


def test_a_changed_source_repeats_the_first_step_that_runs_it(tmp_path, monkeypatch):
    """And not those before."""
    script, module = tmp_path / "merge.py", tmp_path / "lib" / "splice.py"
    (tmp_path / "lib").mkdir()
    (tmp_path / "lib/__init__.py").write_text('_EXPORTS = {"splice": "lib.splice"}\n')
    script.write_text("def main():\n    from lib import splice\n")
    module.write_text("import json\n")
    other = tmp_path / "world.py"
    other.write_text("import json\n")
    assert sources_of(Path("merge.py"), tmp_path) == [Path("lib/__init__.py"), Path("lib/splice.py"), Path("merge.py")]
    ran = []
    monkeypatch.setattr("step_runner.run_command", lambda command, root, env: ran.append(command[-1]) or 0)

    def run() -> list[str]:
        ran.clear()
        scripts = ["world.py", "merge.py"]
        steps = [Step(s, s, ["python", s], sources_of(Path(s), tmp_path)) for s in scripts]
        run_steps(steps, tmp_path / "stamps", tmp_path)
        return list(ran)

    assert run() == ["world.py", "merge.py"] and run() == []
    module.write_text("import json, math\n")
    assert run() == ["merge.py"]
    other.write_text("import math\n")
    assert run() == ["world.py", "merge.py"]


def test_a_changed_photo_prompt_repeats_only_the_report(tmp_path):
    cfg = tmp_path / "demo.yaml"
    cfg.write_text((ROOT / "configs" / "demo.yaml").read_text())
    before = keys_of(demo.demo_steps(cfg, SETTINGS, Path("output/demo")))
    cfg.write_text(cfg.read_text() + "# changed\n")
    after = keys_of(demo.demo_steps(cfg, SETTINGS, Path("output/demo")))
    assert [a == b for a, b in zip(before, after, strict=True)] == [True] * (len(before) - 1) + [False]


def keys_of(steps: list[Step]) -> list[str]:
    found, previous = [], ""
    for step in steps:
        previous = step_key(step, previous, ROOT)
        found.append(previous)
    return found


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
