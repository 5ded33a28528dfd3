"""The demo world: what it draws, what it writes, and what it reuses."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import demo_world
import numpy as np
import pytest
from demo_backgrounds import PHOTOS, SPLITS
from demo_scenes import TRAINING_STYLE, WORLD_STYLE, SceneStyle, make_scene, outline_area_px
from demo_shapes import COLOURS, SHAPES, Pose, Shape, draw_sprite, sample_shape
from demo_world import WorldSettings, main, make_world
from PIL import Image

from sam3_train.data.image_index import build_image_index
from sam3_train.data.sa1b import load_sa1b_annotation

SMALL = WorldSettings(num_scenes=(5, 2, 2), num_clips=(1, 0, 0), frames_per_clip=5)


def tree_hashes(root: Path) -> dict[str, str]:
    """Every file below a folder and the hash of its bytes."""
    files = (path for path in sorted(root.rglob("*")) if path.is_file())
    return {str(path.relative_to(root)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("demo") / "world"
    assert make_world(root, SMALL)
    return root


def test_same_settings_give_the_same_bytes(world: Path, tmp_path: Path):
    make_world(tmp_path / "again", SMALL)
    assert tree_hashes(tmp_path / "again") == tree_hashes(world)


def test_another_seed_gives_other_scenes():
    assert not np.array_equal(make_scene(0, "train", 3).image, make_scene(1, "train", 3).image)


@pytest.mark.parametrize("style", [WORLD_STYLE, TRAINING_STYLE])
def test_masks_are_exact_visible_and_do_not_overlap(style: SceneStyle):
    for index in range(12):
        scene = make_scene(0, "train", index, style=style)
        assert 1 <= len(scene.masks) == len(scene.objects)
        assert scene.masks.sum(axis=0).max() == 1
        for i, item in enumerate(scene.objects):
            alone = np.zeros_like(scene.masks[0])
            alone[item.sprite.area] = item.sprite.mask
            for later in scene.objects[i + 1 :]:
                alone[later.sprite.area] &= ~later.sprite.mask
            assert np.array_equal(scene.masks[i], alone)
            assert alone.sum() >= style.min_visible_share * item.full_area_px
            x, y = scene.point_coords[i]
            assert scene.masks[i][y, x]


@pytest.mark.parametrize("kind", sorted(SHAPES))
def test_drawn_area_is_that_of_the_outline(kind: str):
    rng = np.random.default_rng(5)
    tone = np.zeros(3, np.float32)
    shape = Shape(kind, "red", "plain", SHAPES[kind](rng), (tone, tone), 0)
    pose = Pose(100.0, 100.0, 60.0, 0.7)
    sprite = draw_sprite(shape, pose, (200, 200))
    assert sprite is not None
    assert sprite.mask.sum() == pytest.approx(outline_area_px(shape, pose), rel=0.03)


def test_a_shape_is_cut_at_the_border_and_absent_beyond_it():
    shape = sample_shape(np.random.default_rng(0))
    corner = draw_sprite(shape, Pose(0.0, 0.0, 30.0, 0.0), (50, 60))
    assert corner is not None and (corner.top, corner.left) == (0, 0)
    assert draw_sprite(shape, Pose(-200.0, 10.0, 30.0, 0.0), (50, 60)) is None


def test_colours_are_what_their_names_say():
    rng = np.random.default_rng(1)
    for _ in range(200):
        shape = sample_shape(rng)
        red, green, blue = shape.rgb[0]
        if shape.colour == "red":
            assert red > 2 * max(green, blue)
        if shape.colour == "green":
            assert green > 1.2 * max(red, blue)
        if shape.colour in ("white", "gray", "black"):
            assert max(shape.rgb[0]) - min(shape.rgb[0]) < 25
        assert shape.category == f"{shape.colour} {shape.kind}"
        assert shape.colour in COLOURS


def test_splits_share_no_photo_and_no_shape():
    for first, second in (("train", "val"), ("train", "test"), ("val", "test")):
        assert not set(PHOTOS[first]) & set(PHOTOS[second])
    seen: dict[str, str] = {}
    for split in SPLITS:
        for index in range(25):
            scene = make_scene(0, split, index)
            assert scene.background in PHOTOS[split]
            for item in scene.objects:
                assert seen.setdefault(item.shape.instance_id, f"{split} {index}") == f"{split} {index}"
    assert {place.split()[0] for place in seen.values()} == set(SPLITS)


def test_teacher_pools_are_drawn_from_other_scene_numbers_than_any_world():
    from teacher_data import FIRST_INDEX

    assert min(FIRST_INDEX.values()) > max(WorldSettings().num_scenes)


def test_layout_is_read_as_sa1b(world: Path):
    for split, count in zip(SPLITS[:2], SMALL.num_scenes, strict=False):
        index = build_image_index(world, "sa1b", split)
        assert len(index) == count
        for i in range(count):
            image = index.open_image(i)
            objects = load_sa1b_annotation(world / "annotations" / split / f"{index.key(i)}.json")
            for one in objects:
                mask = one.mask()
                rows, columns = np.nonzero(mask)
                x, y = (int(value) for value in one.points_xy_px[0])
                assert mask.shape == (image.height, image.width)
                assert mask[y, x]
                assert one.area_px == mask.sum()
                assert one.bbox_xywh_px == (
                    columns.min(),
                    rows.min(),
                    columns.max() - columns.min() + 1,
                    rows.max() - rows.min() + 1,
                )


def test_annotations_say_what_an_object_is(world: Path):
    path = next((world / "annotations/test").glob("*.json"))
    record = json.loads(path.read_text())
    for one in record["annotations"]:
        colour, kind = one["category"].split(" ", 1)
        assert (one["colour"], one["shape"]) == (colour, kind)
        assert kind in SHAPES and colour in COLOURS
    assert record["background"] in PHOTOS["test"]
    assert record["image"]["file_name"] == f"{path.stem}.jpg"


def test_photos_are_written_and_held_out_ones_named(world: Path):
    listing = json.loads((world / "photos/photos.json").read_text())
    for name in listing["split"]:
        with Image.open(world / "photos" / name) as photo:
            assert photo.mode == "RGB"
    assert "chelsea.jpg" in listing["held_out"]
    assert not {Path(name).stem for name in listing["held_out"]} & {Path(name).stem for name in PHOTOS["train"]}


def test_a_second_run_reuses_the_world_and_an_interrupted_one_is_continued(world: Path, tmp_path: Path):
    root = tmp_path / "world"
    settings = WorldSettings(num_scenes=(3, 1, 1), num_clips=(0, 0, 0))
    assert make_world(root, settings)
    before = {path: path.stat().st_mtime_ns for path in root.rglob("*.jpg")}
    assert not make_world(root, settings)
    lost = root / "images/train/sa_1000001.jpg"
    bytes_before = lost.read_bytes()
    lost.unlink()
    assert make_world(root, settings)
    assert lost.read_bytes() == bytes_before
    changed = {path for path, stamp in before.items() if path.stat().st_mtime_ns != stamp}
    assert changed == {lost}


def test_other_settings_replace_the_world(tmp_path: Path):
    root = tmp_path / "world"
    make_world(root, WorldSettings(num_scenes=(2, 1, 1), num_clips=(0, 0, 0)))
    make_world(root, WorldSettings(seed=1, num_scenes=(1, 1, 1), num_clips=(0, 0, 0)))
    assert [path.name for path in (root / "images/train").iterdir()] == ["sa_1000000.jpg"]
    assert json.loads((root / "world.json").read_text())["settings"]["seed"] == 1


def test_workers_do_not_change_the_bytes(world: Path, tmp_path: Path):
    make_world(tmp_path / "world", SMALL, num_workers=2)
    assert tree_hashes(tmp_path / "world") == tree_hashes(world)


def test_dry_run_writes_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert main(["--output", str(tmp_path / "w"), "--train", "7", "--dry-run"]) == 0
    assert not (tmp_path / "w").exists()
    assert "MB" in capsys.readouterr().out


def test_bad_input_is_refused_with_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/letter.txt").write_text("keep me")
    assert main(["--output", str(tmp_path / "mine")]) == 2
    assert "world.json" in capsys.readouterr().err
    assert (tmp_path / "mine/letter.txt").read_text() == "keep me"
    assert main(["--output", str(tmp_path / "mine/letter.txt")]) == 2
    assert "is a file" in capsys.readouterr().err
    none = [part for split in SPLITS for part in (f"--{split}", "0", f"--{split}-clips", "0")]
    assert main(["--output", str(tmp_path / "w"), *none]) == 2
    assert "nothing to make" in capsys.readouterr().err
    with pytest.raises(SystemExit) as stopped:
        main(["--train", "-3"])
    assert stopped.value.code == 2
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken/world.json").write_text("{")
    assert main(["--output", str(tmp_path / "broken")]) == 2
    assert "world.json" in capsys.readouterr().err
    monkeypatch.setattr(demo_world, "write_photos", lambda folder: (_ for _ in ()).throw(OSError(28, "No space left")))
    assert main(["--output", str(tmp_path / "full"), "--train", "1"]) == 2
    assert "No space left" in capsys.readouterr().err
