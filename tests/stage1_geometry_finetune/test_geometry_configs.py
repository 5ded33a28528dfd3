"""Every YAML of the fine-tune loads and means what it says, and no setting is without effect."""

from __future__ import annotations

from pathlib import Path

import pytest
from settings_reading import setting_names, unread_settings

from sam3.backbones import student_names
from sam3.preprocess import Preprocess
from sam3_train.config import load_config
from sam3_train.distillation_config import RANDOM_INIT, model_config, preprocess_config, teacher_config
from stage1.config import get_defaults as stage1_defaults
from stage1_geometry_finetune.config import get_defaults
from stage1_geometry_finetune.data import PromptSpec, prompt_spec
from stage1_geometry_finetune.losses import GeometryLossWeights
from stage1_geometry_finetune.matching import MatchOptions
from stage1_geometry_finetune.run import read_config
from stage1_geometry_finetune.train_geometry_finetune import build_parser

ROOT = Path(__file__).resolve().parents[2]
CONFIGS = ROOT / "stage1_geometry_finetune/configs"
YAMLS = sorted(CONFIGS.rglob("*.yaml"))


@pytest.mark.parametrize("path", YAMLS, ids=lambda path: path.stem)
def test_every_yaml_loads(path):
    cfg = load_config(get_defaults(), path)
    assert preprocess_config(cfg) == Preprocess(teacher_config(cfg).image_size_px), "what the deployed model does"
    assert model_config(cfg).student is not None
    prompt_spec(cfg)


@pytest.mark.parametrize(("name", "backbone"), sorted(student_names().items()))
def test_the_nine_students_differ_in_backbone_and_start_alone(name, backbone):
    """D-89: each of them names its starting weights, where the README's merge of stage 1 puts them."""
    cfg = load_config(get_defaults(), CONFIGS / f"{name}.yaml")
    assert (name, backbone, "sam3") == (cfg.MODEL.NAME, cfg.MODEL.BACKBONE, cfg.MODEL.PRESET)
    assert f"output/merged/{name}.safetensors" == cfg.MODEL.PRETRAINED
    base = load_config(get_defaults(), CONFIGS / "base_geometry_finetune.yaml")
    assert not base.MODEL.PRETRAINED and not get_defaults().MODEL.PRETRAINED, "nothing falls back to random weights"
    cfg.MODEL.NAME, cfg.MODEL.BACKBONE, cfg.MODEL.PRETRAINED = base.MODEL.NAME, base.MODEL.BACKBONE, ""
    assert cfg == base


def test_embeddings_are_read_where_stage_1_writes_them():
    for defaults in (get_defaults(), load_config(get_defaults(), CONFIGS / "es_rv_m.yaml")):
        assert defaults.DISTILL.TEACHER_EMBED_PATH == stage1_defaults().DISTILL.TEACHER_EMBED_PATH


def test_defaults_are_those_of_the_parts_that_read_them():
    cfg, weights, match = get_defaults(), GeometryLossWeights(), MatchOptions()
    distill = cfg.DISTILL
    for name in ("embedding", "mask_bce", "mask_dice", "score", "presence", "box"):
        assert distill[name.upper()] == getattr(weights, name), name
    assert (weights.detector, weights.sam) == (distill.ROUTE_DETECTOR, distill.ROUTE_SAM)
    assert (match.max_detections, match.min_score) == (distill.MATCH_TOP, distill.MATCH_SCORE)
    assert match.mask_cost == distill.MATCH_MASK_COST
    assert prompt_spec(cfg) == PromptSpec()
    assert not (cfg.MODEL.TRAIN_NECK or cfg.MODEL.TRAIN_MASK_DECODER or cfg.PROMPTS.FIXED)


def test_the_learning_rate_scales_as_in_stage_1():
    """D-95."""
    assert get_defaults().TRAIN.LR_SCALING == stage1_defaults().TRAIN.LR_SCALING == "sqrt"


def test_every_setting_is_read_somewhere():
    assert len(setting_names(get_defaults())) > 80
    assert not unread_settings(get_defaults(), [ROOT / "stage1_geometry_finetune", ROOT / "sam3/sam3_train"])


def test_every_flag_reaches_the_config():
    """A flag wins over the file; none is parsed and dropped."""
    flags = {
        "--data-path": ("DATA.DATA_PATH", "d"),
        "--output": ("OUTPUT", "o"),
        "--batch-size": ("DATA.BATCH_SIZE", 3),
        "--resume": ("MODEL.RESUME", "r"),
        "--pretrained": ("MODEL.PRETRAINED", RANDOM_INIT),
        "--seed": ("SEED", 9),
        "--max-steps": ("TRAIN.MAX_STEPS", 4),
        "--sam3-checkpoint": ("MODEL.SAM3_CHECKPOINT", "s"),
        "--teacher-embed-path": ("DISTILL.TEACHER_EMBED_PATH", "t"),
        "--accumulation-steps": ("TRAIN.ACCUMULATION_STEPS", 5),
        "--use-sync-bn": ("TRAIN.USE_SYNC_BN", True),
        "--online-teacher": ("DISTILL.ONLINE_TEACHER", True),
    }
    words = [word for flag, (_, value) in flags.items() for word in ([flag] if value is True else [flag, str(value)])]
    cfg = read_config(build_parser().parse_args(["--cfg", str(CONFIGS / "es_rv_m.yaml"), *words]))
    for flag, (key, value) in flags.items():
        node = cfg
        for name in key.split("."):
            node = node[name]
        assert node == value, flag
    known = {action.option_strings[0] for action in build_parser()._actions if action.option_strings}
    assert known == {*flags, "-h", "--cfg", "--opts", "--device", "--dry-run"}


def test_the_run_folder_follows_from_the_config_file():
    cfg = read_config(build_parser().parse_args(["--cfg", str(CONFIGS / "es_tv_s.yaml")]))
    assert cfg.OUTPUT == "output/stage1_geometry/es_tv_s"
