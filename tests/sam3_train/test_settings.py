"""Settings: what wins, what is refused, and what is recorded."""

from __future__ import annotations

import argparse
import json

import pytest
from yacs.config import CfgNode

from sam3_train.config import (
    add_common_args,
    apply_flags,
    config_changes,
    config_to_dict,
    load_config,
    training_defaults,
    write_run_record,
)
from sam3_train.errors import UserError


@pytest.fixture
def defaults() -> CfgNode:
    cfg = training_defaults()
    cfg.DATA = CfgNode({"DATA_PATH": "", "BATCH_SIZE": 8})
    cfg.MODEL = CfgNode({"RESUME": "", "PRETRAINED": "", "NAME": ""})
    return cfg


def write(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


def test_a_file_overrides_its_bases_and_opts_override_the_file(tmp_path, defaults):
    write(tmp_path / "base" / "a.yaml", "TRAIN: {EPOCHS: 3, BASE_LR: 0.5}\nSEED: 1\n")
    write(tmp_path / "base" / "b.yaml", "TRAIN: {BASE_LR: 0.25}\n")
    path = write(tmp_path / "run.yaml", "BASE: [base/a.yaml, base/b.yaml]\nTRAIN: {WEIGHT_DECAY: 0.1}\nSEED: 2\n")
    cfg = load_config(defaults, path, ["SEED", "3"])
    assert (cfg.TRAIN.EPOCHS, cfg.TRAIN.BASE_LR, cfg.TRAIN.WEIGHT_DECAY, cfg.SEED) == (3, 0.25, 0.1, 3)
    assert defaults.TRAIN.EPOCHS == 50, "the defaults must not be changed"


def test_all_mistakes_are_reported_at_once_with_the_nearest_names(tmp_path, defaults):
    path = write(tmp_path / "run.yaml", "TRAIN: {BASE_RL: 1.0, EPOCHS: many}\n")
    with pytest.raises(UserError) as caught:
        load_config(defaults, path, ["BATCH_SIZE", "4"])
    text = str(caught.value)
    assert f"{path}: unknown key 'TRAIN.BASE_RL'; did you mean TRAIN.BASE_LR" in text
    assert f"{path}: TRAIN.EPOCHS must be of type int (default 50), got 'many'" in text
    assert "--opts: unknown key 'BATCH_SIZE'; did you mean DATA.BATCH_SIZE?" in text


@pytest.mark.parametrize("text", ["1", "1e-3", "1.0e-3", ".5"])
def test_a_float_may_be_written_as_an_integer_or_without_a_dot(tmp_path, defaults, text):
    path = write(tmp_path / "run.yaml", f"TRAIN: {{BASE_LR: {text}}}\n")
    for cfg in (load_config(defaults, path), load_config(defaults, None, ["TRAIN.BASE_LR", text])):
        assert float(text) == cfg.TRAIN.BASE_LR and isinstance(cfg.TRAIN.BASE_LR, float)


@pytest.mark.parametrize(
    "key, value",
    [
        ("TRAIN.EPOCHS", "1.5"),
        ("TRAIN.EPOCHS", "True"),
        ("AMP_ENABLE", "1"),
        ("TRAIN.OPTIMIZER.BETAS", "0.9"),
        ("TRAIN.BASE_LR", "fast"),
        ("TRAIN", "3"),
    ],
)
def test_a_value_of_another_kind_is_refused(defaults, key, value):
    with pytest.raises(UserError, match=key.replace(".", r"\.")):
        load_config(defaults, None, [key, value])


def test_text_settings_keep_what_was_typed(defaults):
    cfg = load_config(
        defaults, None, ["MODEL.NAME", "1.10", "OUTPUT", "output/a b", "TRAIN.OPTIMIZER.BETAS", "(0.8, 1)"]
    )
    assert cfg.MODEL.NAME == "1.10" and cfg.OUTPUT == "output/a b" and cfg.TRAIN.OPTIMIZER.BETAS == [0.8, 1.0]


def test_missing_circular_and_broken_files_are_named(tmp_path, defaults):
    with pytest.raises(UserError, match=r"no file .*none\.yaml"):
        load_config(defaults, tmp_path / "none.yaml")
    path = write(tmp_path / "run.yaml", "BASE: other.yaml\n")
    with pytest.raises(UserError, match=r"other\.yaml \(BASE of .*run\.yaml\)"):
        load_config(defaults, path)
    write(tmp_path / "other.yaml", "BASE: run.yaml\n")
    with pytest.raises(UserError, match=r"inherits from itself: run\.yaml -> other\.yaml -> run\.yaml"):
        load_config(defaults, path)
    with pytest.raises(UserError, match=r"bad\.yaml is not valid YAML"):
        load_config(defaults, write(tmp_path / "bad.yaml", "TRAIN: [1\n"))
    with pytest.raises(UserError, match=r"must hold KEY: value"):
        load_config(defaults, write(tmp_path / "list.yaml", "- 1\n"))
    with pytest.raises(UserError, match="odd number"):
        load_config(defaults, None, ["SEED"])


def test_a_flag_that_is_not_given_leaves_the_yaml_value(tmp_path, defaults):
    """D-43: OUTPUT of a YAML file holds unless --output is given."""
    path = write(tmp_path / "run.yaml", "OUTPUT: output/mine\nSEED: 4\n")
    parser = add_common_args(argparse.ArgumentParser())
    cfg = load_config(defaults, path)
    apply_flags(cfg, parser.parse_args(["--cfg", str(path), "--batch-size", "3"]))
    assert (cfg.OUTPUT, cfg.SEED, cfg.DATA.BATCH_SIZE) == ("output/mine", 4, 3)
    apply_flags(cfg, parser.parse_args(["--cfg", str(path), "--output", "x", "--seed", "0", "--max-steps", "2"]))
    assert (cfg.OUTPUT, cfg.SEED, cfg.TRAIN.MAX_STEPS) == ("x", 0, 2)


def test_every_flag_does_something_or_is_an_error(defaults):
    """D-59: a flag whose key this command's config lacks is refused and not ignored."""
    del defaults["MODEL"]
    parser = add_common_args(argparse.ArgumentParser())
    with pytest.raises(UserError, match=r"--pretrained: unknown key"):
        apply_flags(defaults, parser.parse_args(["--cfg", "x", "--pretrained", "w.pth"]))


def test_config_json_is_json_with_the_environment(tmp_path, defaults):
    """D-26, D-60: versions, command, git state, seed and world size; a resumed run keeps the old record."""
    path = write_run_record(tmp_path / "run", defaults, {"world_size": 2})
    record = json.loads(path.read_text())
    assert record["config"] == config_to_dict(defaults) and record["world_size"] == 2
    assert record["environment"]["versions"]["torch"] and record["environment"]["command"]
    assert "git" in record["environment"] and record["config"]["SEED"] == 0
    defaults.SEED = 5
    record = json.loads(write_run_record(tmp_path / "run", defaults).read_text())
    assert record["config"]["SEED"] == 5 and [old["config"]["SEED"] for old in record["previous"]] == [0]


def test_changes_between_two_configs_are_listed_by_dotted_key(defaults):
    mine, theirs = config_to_dict(defaults), config_to_dict(defaults)
    theirs["TRAIN"]["EPOCHS"] = 1
    del theirs["SEED"]
    assert config_changes(mine, theirs) == {"TRAIN.EPOCHS": (50, 1), "SEED": (0, None)}
