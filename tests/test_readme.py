"""The documentation agrees with the code: every path, command, flag, setting and name in it exists."""

from __future__ import annotations

import ast
import contextlib
import functools
import importlib
import io
import json
import re
import runpy
import shlex
from pathlib import Path

import pytest
import torch
import yaml
from settings_reading import setting_names

from sam3 import Sam3Config
from sam3.config import StudentConfig
from sam3.model.student_encoder import build_student
from stage1.config import get_defaults
from stage1_geometry_finetune.config import get_defaults as geometry_defaults
from stage2.config import get_defaults as memory_defaults

ROOT = Path(__file__).resolve().parents[1]
DOCS = [ROOT / "README.md", *sorted((ROOT / "data").glob("**/README.md"))]
# Made by a run or brought by the user: in the documentation, not in the repository.
MADE_LATER = ("output/", "sam3_checkpoints/", "data/sa-1b", "data/sa-v", "data/coco", "photos/", ".venv", "embeddings/")
WORDS_OF_LAUNCHERS = re.compile(r"^([A-Z][A-Z0-9_]*)=(.*)$", re.S)


def fenced_blocks(text: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.M | re.S)


def shell_commands(text: str) -> list[list[str]]:
    """Words of every command in the bash blocks; variables, comments and continued lines are understood."""
    commands = []
    for block in fenced_blocks(text, "bash"):
        for line in block.replace("\\\n", " ").splitlines():
            words = shlex.split(line, comments=True)
            rest: list[str] = []
            for word in [*words, "&&"]:
                if word in {"&&", ";", "&", "|"}:
                    if rest:
                        commands.append(rest)
                    rest = []
                else:
                    rest.append(word)
    return commands


def without_variables(words: list[str]) -> list[str]:
    """A command without the assignments in front of it."""
    index = 0
    while index < len(words) and WORDS_OF_LAUNCHERS.match(words[index]):
        index += 1
    return words[index:]


@functools.cache
def help_text(script: str) -> str:
    """What ``script --help`` prints, without starting a process for each."""
    printed = io.StringIO()
    main = runpy.run_path(str(ROOT / script), run_name="asked_for_help")["main"]
    with contextlib.redirect_stdout(printed), pytest.raises(SystemExit) as stopped:
        main(["--help"])
    assert stopped.value.code in (0, None)
    return printed.getvalue()


def python_behind(launcher: Path) -> str | None:
    """The Python program that a launcher starts."""
    found = re.search(r"[\w/]+\.py", launcher.read_text())
    return found.group(0) if found else None


ALL_TEXT = "\n".join(path.read_text(encoding="utf-8") for path in DOCS)
COMMANDS = [command for command in map(without_variables, shell_commands(ALL_TEXT)) if command]
SCRIPT_COMMANDS = [c for c in COMMANDS if len(c) > 1 and c[0] in {"bash", "python", "python3"} and c[1][0] != "-"]


def test_shell_commands_are_read_with_comments_variables_and_continued_lines():
    text = "```bash\nA=1 python x.py --a 'b c' \\\n  --d   # why\n# nothing\nbash y.sh K=2 && ls\n```\n"
    commands = [without_variables(words) for words in shell_commands(text)]
    assert commands == [["python", "x.py", "--a", "b c", "--d"], ["bash", "y.sh", "K=2"], ["ls"]]


def test_the_two_commands_are_documented():
    assert ["bash", "scripts/demo.sh"] in COMMANDS
    assert ["bash", "scripts/test.sh"] in COMMANDS


@pytest.mark.parametrize("command", SCRIPT_COMMANDS, ids=lambda c: " ".join(c)[:60])
def test_documented_commands_name_real_scripts_flags_and_keys(command):
    """D-68"""
    script = ROOT / command[1]
    assert script.is_file(), f"{command[1]} does not exist"
    words = command[2:]
    program: str | None = command[1]
    if script.suffix == ".sh":
        known = script.read_text() + (ROOT / "scripts" / "launch.sh").read_text()
        for word in words:
            key = WORDS_OF_LAUNCHERS.match(word)
            assert not key or re.search(rf"\b{key.group(1)}\b", known), f"{command[1]} knows no {word}"
        program = python_behind(script)
    flags = [word.split("=")[0] for word in words if word.startswith("--")]
    if flags and program:
        shown = help_text(program)
        for flag in flags:
            assert re.search(rf"(?<![\w-]){re.escape(flag)}(?![\w-])", shown), f"{program} has no flag {flag}"


def test_documented_settings_exist():
    known = {name for stage in (get_defaults, geometry_defaults, memory_defaults) for name in setting_names(stage())}
    sections = "DATA|MODEL|CLIPS|DISTILL|LOSS|PROMPTS|TRAIN|VAL"
    quoted = set(re.findall(rf"\b((?:{sections})(?:\.[A-Z][A-Z0-9_]+)+)\b", ALL_TEXT))
    assert quoted
    for dotted in quoted:
        is_section = any(name.startswith(dotted + ".") for name in known)
        assert dotted in known or is_section, f"no setting {dotted} in the config.py of a stage"


def named_paths() -> set[str]:
    """Everything in backticks that looks like a path of this repository."""
    prose = re.sub(r"^```.*?^```", "", ALL_TEXT, flags=re.M | re.S)
    tops = {path.name for path in ROOT.iterdir()}
    quoted = {word for phrase in re.findall(r"`([^`]+)`", prose) for word in phrase.split()}
    return {word.rstrip(":,.") for word in quoted if "/" in word and word.split("/")[0] in tops}


def expand_braces(pattern: str) -> list[str]:
    found = re.search(r"\{([^{}]*)\}", pattern)
    if not found:
        return [pattern]
    head, tail = pattern[: found.start()], pattern[found.end() :]
    return [full for choice in found.group(1).split(",") for full in expand_braces(head + choice + tail)]


def test_named_paths_exist():
    assert len(named_paths()) > 10
    for name in named_paths():
        for path in expand_braces(name):
            if not path.startswith(MADE_LATER):
                assert list(ROOT.glob(path.rstrip("/"))), f"the documentation names {path}, which does not exist"


def test_the_tree_lists_real_files_and_every_folder():
    """The block that starts with README.md: indentation is nesting, two spaces separate names from remarks."""
    (tree,) = [block for block in fenced_blocks(ALL_TEXT, "text") if block.startswith("README.md")]
    parents: list[tuple[int, Path]] = []
    listed: set[Path] = set()
    for line in tree.splitlines():
        indent = len(line) - len(line.lstrip())
        names = re.split(r"\s{2,}", line.strip())[0].split()
        parents = [entry for entry in parents if entry[0] < indent]
        folder = parents[-1][1] if parents else ROOT
        for name in names:
            matches = list(folder.glob(name.rstrip("/")))
            assert matches, f"the tree lists {name} in {folder.relative_to(ROOT)}, which does not exist"
            listed |= set(matches)
        if names[-1].endswith("/"):
            parents.append((indent, folder / names[-1].rstrip("/")))
    skipped = {"output", "build", "dist", "__pycache__"}
    for folder in ROOT.iterdir():
        if folder.is_dir() and folder.name not in skipped and not folder.name.startswith("."):
            assert folder in listed, f"the tree leaves out {folder.name}/"


@pytest.mark.parametrize(
    ("stage", "base"),
    [
        ("stage1", "base_stage1"),
        ("stage1_geometry_finetune", "base_geometry_finetune"),
        ("stage2", "base_memory"),
    ],
)
def test_the_tree_speaks_of_every_config(stage, base):
    (line,) = re.findall(rf"^  configs/ +({base}.*)$", ALL_TEXT, re.M)
    patterns = [word.rstrip(",") for word in line.split() if ".yaml" in word]
    for path in (ROOT / stage / "configs").glob("*.yaml"):
        assert any(path.match(pattern) for pattern in patterns), f"the tree leaves out {path.name}"


def test_stated_numbers_of_lines_are_right():
    stated = re.findall(r"`([\w/]+\.py)`[^.`]*?, with (\d+) lines", ALL_TEXT)
    assert stated
    for name, count in stated:
        assert len((ROOT / name).read_text().splitlines()) == int(count), name


@pytest.mark.parametrize("path", DOCS, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_lead_somewhere(path):
    text = path.read_text(encoding="utf-8")
    headings = re.findall(r"^#+ (.*)$", text, re.M)
    anchors = {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}
    for target in re.findall(r"\]\(([^)]+)\)", text):
        if target.startswith("#"):
            assert target[1:] in anchors, f"{path.name} has no heading for {target}"
        elif not target.startswith("http"):
            assert (path.parent / target.split("#")[0]).exists(), f"{path.name} links to {target}"


def test_python_in_the_documentation_uses_real_names():
    blocks = fenced_blocks(ALL_TEXT, "python")
    assert blocks
    for block in blocks:
        tree = ast.parse(block)
        imported = {}
        for node in ast.walk(tree):
            if isinstance(node, ast.Import):
                for alias in node.names:
                    imported[alias.asname or alias.name] = importlib.import_module(alias.name)
            elif isinstance(node, ast.ImportFrom):
                for alias in node.names:
                    assert hasattr(importlib.import_module(node.module or ""), alias.name), (
                        f"{node.module}.{alias.name}"
                    )
        for node in ast.walk(tree):
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in imported:
                assert hasattr(imported[node.value.id], node.attr), f"{node.value.id}.{node.attr} does not exist"


def test_the_table_of_students_is_what_the_code_builds():
    """Rows like: | `es_rv_s` | `repvit_m0_9` | 4.72 | 14.55 |"""
    rows = re.findall(r"^\| `(es_\w+)` \| `(\w+)` \| ([\d.]+) \| ([\d.]+) \|", ALL_TEXT, re.M)
    assert len(rows) == 9
    for name, backbone, backbone_m, with_head_m in rows:
        config = yaml.safe_load((ROOT / "stage1" / "configs" / f"{name}.yaml").read_text())
        assert config["MODEL"]["BACKBONE"] == backbone
        with torch.device("meta"):
            student = build_student(Sam3Config().replace(student=StudentConfig(backbone)))
        for module, shown in ((student.backbone, backbone_m), (student, with_head_m)):
            assert f"{sum(p.numel() for p in module.parameters()) / 1e6:.2f}" == shown, name


def test_the_teachers_documented_scores_are_those_of_its_record():
    scores = json.loads((ROOT / "data" / "demo" / "tiny_teacher.json").read_text())["miou"]
    rows = dict(re.findall(r"^\| (box|one click|three clicks) \| ([\d.]+) \|", ALL_TEXT, re.M))
    assert rows == {kind.replace("_", " "): f"{scores[kind]:.3f}" for kind in ("box", "one_click", "three_clicks")}
    assert f"box mIoU of {scores['box']:.3f}" in ALL_TEXT
