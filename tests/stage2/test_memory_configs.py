"""Every YAML of stage 2 loads and means what it says, and no setting is without effect."""

from __future__ import annotations

from pathlib import Path

import pytest
from settings_reading import setting_names, unread_settings

from sam3.config import EfficientMemoryConfig
from sam3.model.clip_forward import ClipPrompting
from sam3_train.config import load_config
from stage2.config import get_defaults
from stage2.data.clip_choice import ClipSpec
from stage2.data.clip_look import LookSpec
from stage2.distill import DistillWeights
from stage2.losses import Stage2LossWeights
from stage2.run import read_config
from stage2.settings import clip_spec, curriculum, look_spec, memory_config, task_options, val_clip_spec
from stage2.task import Stage2Options
from stage2.train_memory_stage2 import DEFAULT_CONFIG, build_parser

ROOT = Path(__file__).resolve().parents[2]
YAMLS = sorted((ROOT / "stage2/configs").rglob("*.yaml"))


@pytest.mark.parametrize("path", YAMLS, ids=lambda path: path.stem)
def test_every_yaml_loads(path: Path) -> None:
    cfg = load_config(get_defaults(), path)
    assert clip_spec(cfg).lengths == curriculum(cfg) and val_clip_spec(cfg).is_fixed
    look_spec(cfg)
    task_options(cfg)
    assert memory_config(cfg, "sam3").num_tokens > 0


def test_defaults_are_those_of_the_parts_that_read_them() -> None:
    """And these are SAM 2's recipe: D-123, D-124."""
    cfg = get_defaults()
    options = task_options(cfg)
    assert options.losses == Stage2LossWeights() and options.distill == DistillWeights()
    assert options == Stage2Options()
    assert options.prompting == ClipPrompting()
    assert (options.prompting.mask_share, options.prompting.box_share, options.prompting.clicks_per_frame) == (
        0.5,
        0.25,
        7,
    )
    assert look_spec(cfg) == LookSpec()
    assert memory_config(cfg, "sam3") == EfficientMemoryConfig() and memory_config(cfg, "sam3").num_latents == 64
    spec = clip_spec(cfg)
    assert (spec.max_objects, spec.min_area, spec.strides) == (
        ClipSpec().max_objects,
        ClipSpec().min_area,
        ClipSpec().strides,
    )
    assert (spec.gap_share, spec.max_gap) == (0.25, 4), "objects vanish for a while"


def test_the_curriculum_grows_by_epoch() -> None:
    """4, 8 and 16 frames, in equal parts of the run or from the epochs that are named."""
    cfg = get_defaults()
    assert curriculum(cfg) == ((0, 4), (3, 8), (6, 16))
    cfg.TRAIN.EPOCHS = 2
    assert curriculum(cfg) == ((0, 8), (1, 16)), "a run shorter than the curriculum ends with its longest clips"
    cfg.CLIPS.LENGTH_EPOCHS = [0, 1, 5]
    assert clip_spec(cfg).length_at(1) == 8 and clip_spec(cfg).length_at(7) == 16


def test_sizes_of_the_memory_are_the_preset_s_unless_they_are_given() -> None:
    opts = ["MODEL.MEMORY.NUM_LATENTS", "16", "MODEL.MEMORY.ATTENTION", "linear", "MODEL.MEMORY.DROPOUT", "0"]
    cfg = load_config(get_defaults(), None, opts)
    expected = EfficientMemoryConfig(
        num_latents=16, attention="linear", perceiver_head_dim=16, num_heads=4, mlp_dim=128
    )
    assert memory_config(cfg, "tiny") == expected
    own = ["MODEL.MEMORY.NUM_LATENTS", "-1", "MODEL.MEMORY.NUM_LATENTS_2D", "-1"]
    cfg = load_config(get_defaults(), DEFAULT_CONFIG, ["MODEL.MEMORY.COMPAT", "published", *own])
    assert memory_config(cfg, "sam3") == EfficientMemoryConfig().published()
    assert memory_config(load_config(get_defaults(), DEFAULT_CONFIG), "sam3").num_tokens == 64


def test_every_setting_is_read_somewhere() -> None:
    assert len(setting_names(get_defaults())) > 100
    assert not unread_settings(get_defaults(), [ROOT / "stage2", ROOT / "sam3/sam3_train"])


def test_every_flag_reaches_the_config() -> None:
    """A flag wins over the file; none is parsed and dropped."""
    flags = {
        "--data-path": ("DATA.DATA_PATH", "d"),
        "--output": ("OUTPUT", "o"),
        "--batch-size": ("DATA.BATCH_SIZE", 3),
        "--resume": ("MODEL.RESUME", "r"),
        "--pretrained": ("MODEL.PRETRAINED", "p"),
        "--seed": ("SEED", 9),
        "--max-steps": ("TRAIN.MAX_STEPS", 4),
        "--sam3-checkpoint": ("MODEL.SAM3_CHECKPOINT", "s"),
        "--subset-fraction": ("DATA.SUBSET_FRACTION", 0.25),
    }
    words = [str(word) for flag, (_, value) in flags.items() for word in (flag, value)]
    cfg = read_config(build_parser().parse_args(words))
    for flag, (key, value) in flags.items():
        node = cfg
        for name in key.split("."):
            node = node[name]
        assert node == value, flag
    assert read_config(build_parser().parse_args(["--output-dir", "there"])).OUTPUT == "there"
    known = {action.option_strings[0] for action in build_parser()._actions if action.option_strings}
    assert known == {*flags, "-h", "--cfg", "--opts", "--device", "--dry-run", "--output-dir"}


def test_the_run_folder_follows_from_the_config_file() -> None:
    assert f"output/stage2/{DEFAULT_CONFIG.stem}" == read_config(build_parser().parse_args([])).OUTPUT
