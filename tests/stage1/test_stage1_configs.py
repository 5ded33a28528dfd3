"""Every YAML of stage 1 loads and means what it says; bad settings are refused before anything is computed."""

from __future__ import annotations

import importlib
from pathlib import Path

import pytest
from settings_reading import setting_names, settings_read, unread_settings

from sam3.backbones import student_names
from sam3.preprocess import Preprocess
from sam3_train.config import apply_flags, load_config
from sam3_train.distillation_config import model_config, preprocess_config, teacher_config
from sam3_train.errors import UserError
from stage1.config import get_defaults
from stage1.train_stage1 import main

CONFIGS = Path(__file__).resolve().parents[2] / "stage1/configs"
YAMLS = sorted(CONFIGS.rglob("*.yaml"))


@pytest.mark.parametrize("path", YAMLS, ids=lambda path: path.stem)
def test_every_yaml_loads(path):
    cfg = load_config(get_defaults(), path)
    assert teacher_config(cfg).name == cfg.MODEL.PRESET
    assert preprocess_config(cfg) == Preprocess(teacher_config(cfg).image_size_px), (
        "what the deployed model does (D-01)"
    )
    assert model_config(cfg).student is not None


@pytest.mark.parametrize(("name", "backbone"), sorted(student_names().items()))
def test_the_nine_students_differ_in_their_backbone_alone(name, backbone):
    cfg = load_config(get_defaults(), CONFIGS / f"{name}.yaml")
    assert (name, backbone, "sam3") == (cfg.MODEL.NAME, cfg.MODEL.BACKBONE, cfg.MODEL.PRESET)
    assert len((CONFIGS / f"{name}.yaml").read_text().splitlines()) <= 10
    base = load_config(get_defaults(), CONFIGS / "base_stage1.yaml")
    cfg.MODEL.NAME, cfg.MODEL.BACKBONE = base.MODEL.NAME, base.MODEL.BACKBONE
    assert cfg == base


def test_the_released_students_start_from_imagenet_weights():
    """D-03: random initialisation has to be asked for by name."""
    assert get_defaults().MODEL.PRETRAINED == "timm"
    for name in student_names():
        assert load_config(get_defaults(), CONFIGS / f"{name}.yaml").MODEL.PRETRAINED == "timm"


def test_training_reads_where_the_export_writes():
    """D-41: one default for both."""
    teacher = load_config(get_defaults(), CONFIGS / "teacher/sam_vit_huge_sa1b.yaml")
    student = load_config(get_defaults(), CONFIGS / "es_rv_m.yaml")
    assert Path(student.DISTILL.TEACHER_EMBED_PATH) == Path("output/stage1_teacher/embeddings")
    assert teacher.DISTILL.TEACHER_EMBED_PATH == student.DISTILL.TEACHER_EMBED_PATH


def test_reads_of_settings_are_told_from_assignments_and_namesakes():
    source = "def f(cfg, train):\n    s = cfg.A.B\n    cfg.A.SET = 1\n    return s.C, train.D, cfg.OTHER.E"
    assert settings_read(source) == {"A", "A.B", "A.B.C", "TRAIN.D", "OTHER", "OTHER.E"}


def test_every_setting_is_read_somewhere():
    """D-59: no setting is accepted and ignored."""
    root = CONFIGS.parents[1]
    assert len(setting_names(get_defaults())) > 60
    assert not unread_settings(get_defaults(), [root / "stage1", root / "sam3/sam3_train"])


@pytest.mark.parametrize("module", ["stage1.train_stage1", "stage1.save_embedding_stage1"])
def test_every_common_flag_reaches_the_config_of_the_real_command(module):
    """D-59: each flag has a key in this command's own tree, so none is parsed and dropped."""
    parser = importlib.import_module(module).build_parser()
    flags = {
        "data_path": "d",
        "output": "o",
        "batch_size": 3,
        "resume": "r",
        "pretrained": "p",
        "seed": 9,
        "max_steps": 4,
    }
    words = [word for flag, value in flags.items() for word in ("--" + flag.replace("_", "-"), str(value))]
    cfg = get_defaults()
    apply_flags(cfg, parser.parse_args(["--cfg", "x.yaml", *words]))
    assert (cfg.DATA.DATA_PATH, cfg.OUTPUT, cfg.DATA.BATCH_SIZE, cfg.SEED) == ("d", "o", 3, 9)
    assert (cfg.MODEL.RESUME, cfg.MODEL.PRETRAINED, cfg.TRAIN.MAX_STEPS) == ("r", "p", 4)


def test_no_yaml_names_an_output():
    """D-43: the run folder follows from the config's name unless somebody chooses another."""
    for path in CONFIGS.glob("es_*.yaml"):
        assert load_config(get_defaults(), path).OUTPUT == ""


def test_an_impossible_preset_or_preprocessing_is_one_clear_error():
    cfg = get_defaults()
    cfg.MODEL.PRESET = "huge"
    with pytest.raises(UserError, match=r"MODEL.PRESET: unknown model preset 'huge'"):
        teacher_config(cfg)
    cfg = get_defaults()
    cfg.DATA.PREPROCESS.MODE = "squash"
    with pytest.raises(UserError, match=r"DATA.PREPROCESS: preprocessing mode 'squash' is not one of"):
        preprocess_config(cfg)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--opts", "TRAIN.EPOCS", "3"], "--opts: unknown key 'TRAIN.EPOCS'; did you mean TRAIN.EPOCHS"),
        (["--opts", "TRAIN.EPOCHS", "many"], "TRAIN.EPOCHS must be of type int"),
        (["--opts", "MODEL.PRESET", "huge"], "MODEL.PRESET: unknown model preset 'huge'"),
        (["--opts", "MODEL.BACKBONE", "repvit_m1"], "unknown student or backbone 'repvit_m1' (did you mean"),
        (["--opts", "DISTILL.NORMALIZE", "both"], "DISTILL.NORMALIZE 'both' is not one of channel, global, none"),
        (["--opts", "DISTILL.MSE", "0", "DISTILL.COSINE", "0"], "DISTILL.MSE + DISTILL.COSINE: 0 is out of range"),
        (["--opts", "TRAIN.LR_SCALING", "cubic"], "TRAIN.LR_SCALING 'cubic' is not one of"),
        (
            ["--opts", "VAL.MASK_AGREEMENT", "True", "MODEL.SAM3_CHECKPOINT", ""],
            "name its file in MODEL.SAM3_CHECKPOINT",
        ),
        (["--batch-size", "0"], "DATA.BATCH_SIZE: 0 is out of range"),
        (["--batch-size", "500"], "DATA.BATCH_SIZE 500 over 1 processes is more than the 12 training images"),
        (["--data-path", "nowhere"], "nowhere"),
        (["--teacher-embed-path", "nowhere"], "nowhere: no such folder; export the teacher's embeddings first"),
        (["--resume", "nowhere.pth"], "MODEL.RESUME: there is no checkpoint nowhere.pth"),
        (["--pretrained", "nowhere.pth"], "MODEL.PRETRAINED: there is no file nowhere.pth"),
        (["--pretrained", ""], "MODEL.PRETRAINED is empty: say timm, random, or name a file"),
        (["--device", "tpu9"], "--device 'tpu9' is not a device"),
    ],
    ids=lambda value: " ".join(value)[:40] if isinstance(value, list) else "",
)
def test_a_bad_setting_ends_with_exit_2_and_one_clear_line(world, tmp_path, capfd, words, message):
    cfg = world.config("bad_setting")
    words = words if "--device" in words else [*words, "--device", "cpu"]
    assert main(["--cfg", str(cfg), "--output", str(tmp_path / "run"), *words]) == 2
    stderr = capfd.readouterr().err
    assert message in stderr
    assert "Traceback" not in stderr
    assert len(stderr.strip().splitlines()) <= 5
    assert not (tmp_path / "run").exists(), "nothing may be written before the preflight has passed"


def test_all_problems_are_reported_at_once(world, tmp_path, capfd):
    """D-137: not one per attempt."""
    cfg = world.config("many_problems")
    words = ["--data-path", "no_photos", "--teacher-embed-path", "no_store", "--resume", "no.pth", "--device", "cpu"]
    assert main(["--cfg", str(cfg), "--output", str(tmp_path), "--opts", "DISTILL.COSINE", "-1", *words]) == 2
    stderr = capfd.readouterr().err
    for message in ("no_photos", "no_store", "no.pth", "DISTILL.COSINE: -1.0 is out of range"):
        assert message in stderr
