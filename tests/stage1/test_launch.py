"""scripts/launch.sh: KEY=VALUE words in, a torchrun command line out."""

from __future__ import annotations

import itertools
import os
import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
LAUNCHER = "stage1/scripts/save_stage1_embeddings.sh"
TRAIN = "stage1/scripts/train_stage1_student.sh"
GEOMETRY = "stage1_geometry_finetune/scripts/train_geometry_finetune.sh"
MEMORY = "stage2/scripts/train_memory.sh"
KEYS = (
    *("CFG", "DATA_PATH", "OUTPUT", "BATCH_SIZE", "GPUS", "NPROC", "DEVICE", "MASTER_PORT", "NNODES", "NODE_RANK"),
    *("RDZV_BACKEND", "RDZV_ENDPOINT", "RDZV_ID", "TEACHER_EMBED_PATH", "PRETRAINED", "SAM3_CHECKPOINT"),
    "SUBSET_FRACTION",
)


@pytest.fixture
def launch(tmp_path):
    """Runs the launcher with an interpreter that prints its arguments, one a line, instead of starting anything."""
    fake = tmp_path / "fake python"
    fake.write_text('#!/usr/bin/env bash\n[ "$1" = -c ] && exit 0\nprintf "%s\\n" "$@"\n')
    fake.chmod(0o755)
    clean = {name: value for name, value in os.environ.items() if name not in KEYS}

    def run(*words: str, script: str = LAUNCHER, **env: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            ["bash", script, *words],
            cwd=ROOT,
            env={**clean, "CUDA_VISIBLE_DEVICES": "", "PYTHON": str(fake), **env},
            capture_output=True,
            text=True,
            timeout=30,
        )

    return run


def test_a_bare_call_starts_one_process_with_the_teacher_config(launch):
    """D-69: no empty array is expanded under set -u."""
    words = launch().stdout.splitlines()
    assert words[:4] == ["-m", "sam3_train.torchrun", "--nproc_per_node", "1"]
    assert words[-2] == "--cfg" and words[-1].endswith("configs/teacher/sam_vit_huge_sa1b.yaml")
    assert "--device" not in words


def test_words_and_environment_set_flags_and_the_rest_goes_through(launch):
    done = launch("DATA_PATH=a b", "--check-saved-embed", "4", "BATCH_SIZE=2", "--", "A=b", OUTPUT="o", BATCH_SIZE="9")
    words = done.stdout.splitlines()
    script = next(i for i, word in enumerate(words) if word.endswith("save_embedding_stage1.py"))
    assert words[script + 3 :] == [
        *("--data-path", "a b", "--output", "o", "--batch-size", "2"),
        *("--check-saved-embed", "4", "A=b"),
    ]


@pytest.mark.parametrize(
    ("words", "processes", "device"),
    [
        (["GPUS=0"], "1", "cpu"),
        (["NPROC=2", "DEVICE=cpu"], "2", "cpu"),
        (["GPUS=3"], "3", "cuda"),
        (["GPUS=8", "NPROC=2"], "2", "cuda"),
    ],
)
def test_processes_and_device(launch, words, processes, device):
    done = launch(*words).stdout.splitlines()
    assert done[done.index("--nproc_per_node") + 1] == processes
    assert done[done.index("--device") + 1] == device


def test_visible_gpus_are_counted(launch):
    words = launch(CUDA_VISIBLE_DEVICES="0,2,3").stdout.splitlines()
    assert words[words.index("--nproc_per_node") + 1] == "3"


def flags_of(words: list[str], flag: str) -> list[str]:
    return [value for name, value in itertools.pairwise(words) if name == flag]


def test_a_node_rank_is_kept_by_a_static_rendezvous(launch):
    """With c10d torch numbers the nodes by their addresses and a given rank would mean nothing."""
    words = launch("NNODES=2", "NODE_RANK=1", "RDZV_ENDPOINT=host:29501", "GPUS=0").stdout.splitlines()
    given = {"--nnodes": "2", "--node_rank": "1", "--rdzv_endpoint": "host:29501", "--rdzv_backend": "static"}
    for flag, value in given.items():
        assert flags_of(words, flag) == [value]
    assert "--standalone" not in words


def test_nodes_without_a_rank_number_themselves(launch):
    words = launch("NNODES=2", "RDZV_ENDPOINT=host", "MASTER_PORT=29502", "GPUS=0").stdout.splitlines()
    assert flags_of(words, "--rdzv_backend") == ["c10d"]
    assert flags_of(words, "--rdzv_endpoint") == ["host:29502"]
    assert "--node_rank" not in words


def test_a_node_rank_that_has_no_effect_is_told(launch):
    done = launch("NNODES=2", "NODE_RANK=1", "RDZV_BACKEND=c10d", "RDZV_ENDPOINT=host:1", "GPUS=0")
    assert flags_of(done.stdout.splitlines(), "--rdzv_backend") == ["c10d"]
    assert "--node_rank" not in done.stdout
    assert done.stderr == "note: RDZV_BACKEND=c10d numbers the nodes itself: NODE_RANK=1 has no effect\n"


@pytest.mark.parametrize(
    ("words", "configs"),
    [
        ([], ["stage1/configs/es_rv_m.yaml"]),
        (["CFG=my own.yaml"], ["my own.yaml"]),
        (["CFG=a.yaml,b c.yaml"], ["a.yaml", "b c.yaml"]),
        (["--cfg", "a.yaml"], ["a.yaml"]),
        (["--seed", "1", "--", "--cfg=a.yaml"], ["a.yaml"]),
        (["CFG=a.yaml", "--cfg", "b.yaml"], ["a.yaml", "b.yaml"]),
    ],
)
def test_training_gets_the_configs_that_were_asked_for_and_no_other(launch, words, configs):
    done = launch(*words, script=TRAIN)
    assert done.returncode == 0, done.stderr
    given = [word.removeprefix("--cfg=") for word in done.stdout.splitlines()]
    given = [value for flag, value in zip(["", *given], given, strict=False) if flag == "--cfg" or value == "a.yaml"]
    assert [value.removeprefix(f"{ROOT}/") for value in given] == configs


def test_training_gets_its_keys_and_the_words_of_the_user(launch):
    done = launch("TEACHER_EMBED_PATH=some store", "--opts", "TRAIN.EPOCHS", "1", "GPUS=0", script=TRAIN, CFG="a.yaml")
    words = done.stdout.splitlines()
    script = next(i for i, word in enumerate(words) if word.endswith("stage1/train_stage1.py"))
    assert words[script + 1 :] == [
        *("--device", "cpu", "--cfg", "a.yaml", "--teacher-embed-path", "some store"),
        *("--opts", "TRAIN.EPOCHS", "1"),
    ]


def test_the_fine_tune_starts_with_a_config_that_exists(launch):
    """D-88."""
    done = launch(script=GEOMETRY)
    cfg = Path(done.stdout.splitlines()[-1])
    assert cfg.is_file() and cfg.is_relative_to(ROOT / "stage1_geometry_finetune/configs"), done


def test_the_fine_tune_gets_its_keys_and_the_words_of_the_user(launch):
    keys = ("PRETRAINED=a merged.pt", "SAM3_CHECKPOINT=sam3.pt", "BATCH_SIZE=2", "OUTPUT=o", "GPUS=0")
    done = launch(*keys, "--opts", "TRAIN.EPOCHS", "1", script=GEOMETRY, CFG="a.yaml", TEACHER_EMBED_PATH="store")
    words = done.stdout.splitlines()
    script = next(i for i, word in enumerate(words) if word.endswith("/train_geometry_finetune.py"))
    assert words[script + 1 :] == [
        *("--device", "cpu", "--cfg", "a.yaml", "--output", "o", "--batch-size", "2"),
        *("--pretrained", "a merged.pt", "--sam3-checkpoint", "sam3.pt", "--teacher-embed-path", "store"),
        *("--opts", "TRAIN.EPOCHS", "1"),
    ]
    assert launch("--cfg", "b.yaml", script=GEOMETRY).stdout.splitlines()[-2:] == ["--cfg", "b.yaml"]
    refused = launch("PRETRAIND=a", script=GEOMETRY)
    assert refused.returncode == 2 and "unknown key PRETRAIND" in refused.stderr


def unguarded_arrays(text: str) -> list[str]:
    """Arrays that may be empty and are expanded as they are: an unbound variable for bash before 4.4 under set -u."""
    code = re.sub(r"^\s*#.*$", "", text, flags=re.M)
    bare = re.sub(r"\$\{(\w+)\[@\]\+\"\$\{\1\[@\]\}\"\}", "", code)
    used = set(re.findall(r"\$\{(\w+)\[[@*]\]\}", bare))
    return sorted(
        name
        for name in used
        if not re.search(rf"\b{name}=\([^)]", code) or re.search(rf"\b{name}=\(\)|-a {name}\b", code)
    )


def test_no_array_that_may_be_empty_is_expanded_unguarded():
    """D-69: macOS has bash 3.2."""
    assert unguarded_arrays('x=()\nrun "${x[@]}"') == ["x"]
    assert unguarded_arrays('read -r -a x\nrun "${x[@]}"') == ["x"]
    assert not unguarded_arrays('x=()\nrun ${x[@]+"${x[@]}"}\ny=(a)\nrun "${y[@]}"')
    scripts = [*(ROOT / "scripts").glob("*.sh"), *ROOT.glob("stage*/scripts/*.sh"), ROOT / ".ci/run"]
    assert len(scripts) >= 6
    for path in scripts:
        assert not unguarded_arrays(path.read_text()), path


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["FOO=1"], "unknown key FOO in 'FOO=1'; known keys: CFG DATA_PATH"),
        (["GPUS=x"], "GPUS=x must be a whole number"),
        (["GPUS=0", "DEVICE=cuda"], "no GPU to run on"),
        (["NNODES=2", "NODE_RANK=2"], "NODE_RANK=2 must be below NNODES=2"),
        (["NNODES=2", "NODE_RANK=0"], "NNODES=2 needs RDZV_ENDPOINT=host:port, the same on all nodes"),
        (["NNODES=2", "RDZV_BACKEND=static", "RDZV_ENDPOINT=a:1"], "RDZV_BACKEND=static needs NODE_RANK"),
        (["NPROC=0"], "NPROC=0 must be at least 1"),
        (["PYTHON=no-such-python"], "no-such-python cannot import this project"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(launch, words, message):
    done = launch(*words)
    assert done.returncode == 2 and not done.stdout
    assert message in done.stderr and len(done.stderr.splitlines()) == 1


@pytest.mark.parametrize(
    "words",
    [
        ["0", "2", "my videos", "0.1", "SAM3_CHECKPOINT=s.pt"],
        ["GPUS=0", "BATCH_SIZE=2", "DATA_PATH=my videos", "SUBSET_FRACTION=0.1", "SAM3_CHECKPOINT=s.pt"],
        ["0", "2", "SUBSET_FRACTION=0.1", "DATA_PATH=my videos", "SAM3_CHECKPOINT=s.pt"],
    ],
)
def test_the_memory_s_launcher_takes_its_words_by_name_or_in_order(launch, words):
    """7.6 (28): GPUS=0 is a run on the CPU."""
    done = launch(*words, "PRETRAINED=m.pth", "--max-steps", "3", script=MEMORY).stdout.splitlines()
    assert done[:4] == ["-m", "sam3_train.torchrun", "--nproc_per_node", "1"]
    script = next(i for i, word in enumerate(done) if word.endswith("stage2/train_memory_stage2.py"))
    assert done[script + 1 : script + 4] == ["--device", "cpu", "--cfg"]
    assert done[script + 4].endswith("stage2/configs/base_memory.yaml")
    assert done[script + 5 :] == [
        *("--data-path", "my videos", "--batch-size", "2", "--subset-fraction", "0.1"),
        *("--sam3-checkpoint", "s.pt", "--pretrained", "m.pth", "--max-steps", "3"),
    ]


def test_the_memory_s_launcher_knows_flags_and_wrong_keys(launch):
    words = launch("--cfg", "c.yaml", "--dry-run", script=MEMORY).stdout.splitlines()
    assert flags_of(words, "--cfg") == ["c.yaml"] and words[-1] == "--dry-run"
    done = launch("0", "SUBSET=0.1", script=MEMORY)
    assert done.returncode == 2 and "unknown key SUBSET in 'SUBSET=0.1'" in done.stderr
