"""Prompts drawn from annotations: where they lie, what makes them repeat, and which images cannot be used."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from annotated_photos import make_photos, photo_of, record, shape

from sam3.preprocess import Preprocess
from sam3_train.data.augmentation import AugmentSpec, View, view_of_seed
from sam3_train.data.decode import UnreadableImageError
from stage1_geometry_finetune.data.object_mask import mask_in_view, mask_on_model
from stage1_geometry_finetune.data.prompt_drawing import POINT_SAMPLINGS, PromptSpec, draw_points, draw_prompt
from stage1_geometry_finetune.data.prompt_extras import PromptExtras

HW = (150, 220)
STRETCH, LETTERBOX = Preprocess(336), Preprocess(336, "letterbox")
VIEWS = [View(), View(is_flipped=True), View(True, 0.2, 0.1, 0.7), view_of_seed(AugmentSpec(0.5, 0.5), 77)]
SIDE = 96
BOTH = PromptSpec(box_share=0, point_share=0, both_share=1, num_points=(1, 4))


def extras(spec: PromptSpec = BOTH, preprocess: Preprocess = STRETCH, seed: int = 0) -> PromptExtras:
    return PromptExtras(spec, preprocess, SIDE, seed)


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


BLOBS = [shape(HW, "blob", seed) for seed in range(20)]
KINDS = [shape(HW, kind) for kind in ("corner", "disc", "ring", "hairs")]


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    return make_photos(tmp_path_factory.mktemp("photos"), {"sa_1": record(BLOBS), "sa_2": record(KINDS)})


def shown(mask: np.ndarray, view: View) -> np.ndarray:
    """The view of a mask, by the pixels' own path."""
    return view.apply(torch.from_numpy(mask)[None])[0].numpy()


def in_view_px(coords: torch.Tensor, preprocess: Preprocess, view_hw: tuple[int, int]) -> np.ndarray:
    scale_y, scale_x = preprocess.valid_hw(view_hw)
    return (coords.numpy().astype(np.float64) * preprocess.size_px) / (scale_x, scale_y)


def corners(boxes_cxcywh: torch.Tensor) -> torch.Tensor:
    """(K, 2, 2): both corners' x and y."""
    centre, size = boxes_cxcywh[:, :2], boxes_cxcywh[:, 2:]
    return torch.stack([centre - size / 2, centre + size / 2], 1)


def edges_of(mask: np.ndarray) -> np.ndarray:
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    return np.array([[columns[0], rows[0]], [columns[-1] + 1, rows[-1] + 1]], np.float64)


@pytest.mark.parametrize("preprocess", [STRETCH, LETTERBOX], ids=["stretch", "letterbox"])
@pytest.mark.parametrize("view", VIEWS, ids=["whole", "flip", "flip-crop", "drawn"])
@pytest.mark.parametrize("sampling", POINT_SAMPLINGS)
def test_points_lie_inside_their_masks_in_every_view(photos, sampling, view, preprocess):
    spec = PromptSpec(32, 0, 0, 1, num_points=(3, 3), point_sampling=sampling, min_area=0)
    for position, masks in enumerate((BLOBS, KINDS)):
        visible = [mask for mask in (shown(mask, view) for mask in masks) if mask.any()]
        prompts = extras(spec, preprocess).load(photo_of(photos, position, view))["prompts"]
        assert prompts.num_objects == len(visible) and prompts.is_point.all() and prompts.points_xy.shape[1] == 3
        places = np.floor(in_view_px(prompts.points_xy, preprocess, visible[0].shape)).astype(int)
        for mask, points in zip(visible, places, strict=True):
            assert all(mask[y, x] for x, y in points)


@pytest.mark.parametrize("preprocess", [STRETCH, LETTERBOX], ids=["stretch", "letterbox"])
@pytest.mark.parametrize("view", VIEWS, ids=["whole", "flip", "flip-crop", "drawn"])
def test_boxes_without_jitter_are_the_edges_of_what_the_view_shows(photos, view, preprocess):
    spec = PromptSpec(32, 1, 0, 0, box_jitter=0.0, min_area=0)
    prompts = extras(spec, preprocess).load(photo_of(photos, 1, view))["prompts"]
    visible = [mask for mask in (shown(mask, view) for mask in KINDS) if mask.any()]
    found = in_view_px(corners(prompts.boxes_cxcywh), preprocess, visible[0].shape)
    np.testing.assert_allclose(found, np.stack([edges_of(mask) for mask in visible]), atol=2e-4)
    assert prompts.has_box.all() and not prompts.is_point.any()


def test_jittered_boxes_stay_in_the_picture_and_within_their_bounds(photos):
    exact = extras(PromptSpec(32, 1, 0, 0, box_jitter=0, min_area=0)).load(photo_of(photos, 1))["prompts"]
    before = in_view_px(corners(exact.boxes_cxcywh), STRETCH, HW)
    side = before[:, 1] - before[:, 0]
    for limit in (20.0, 3.0):
        shifts = []
        for epoch in range(25):
            spec = PromptSpec(32, 1, 0, 0, min_area=0, box_max_shift_px=limit)
            after = corners(extras(spec).load(photo_of(photos, 1, epoch=epoch))["prompts"].boxes_cxcywh)
            assert after.min() >= 0 and after.max() <= 1 and (after[:, 1] > after[:, 0]).all()
            shifts.append(in_view_px(after, STRETCH, HW) - before)
        moved = np.abs(np.stack(shifts))  # (epochs, objects, corners, xy)
        assert (moved <= np.minimum(0.2 * side, limit)[:, None] + 1e-3).all()
        if limit == 20.0:
            free = np.stack(shifts)[:, 1] / np.minimum(side[1], 1e9)  # the disc: nothing clips it but the two sigmas
            assert 0.07 < free.std() < 0.115


def test_an_object_in_the_last_corner_gets_legal_prompts():
    mask = np.zeros(HW, bool)
    mask[-1, -1] = True
    found = mask_in_view(mask, View())
    assert found is not None
    for preprocess in (STRETCH, LETTERBOX):
        for seed in range(20):
            box, points = draw_prompt(found, np.zeros((0, 2)), BOTH, preprocess, generator(seed))
            assert box is not None and (box[2:] > 0).all() and (box[:2] + box[2:] / 2 <= 1 + 1e-6).all()
            assert (points < 1).all() and len(points) >= 1  # the only pixel, as often as points are asked for
    assert mask_in_view(mask, View(side=0.5)) is None
    assert mask_on_model(found, STRETCH, SIDE)[-1, -1]


@pytest.mark.parametrize("kind", ["corner", "disc", "ring", "hairs"])
def test_flipping_the_view_mirrors_the_exact_prompts_and_the_mask(kind):
    mask = shape(HW, kind)
    whole, flipped = mask_in_view(mask, View()), mask_in_view(mask[:, ::-1], View(is_flipped=True))
    assert whole is not None and flipped is not None
    np.testing.assert_array_equal(whole.inside, flipped.inside)
    assert whole[1:] == flipped[1:]
    mirrored = mask_in_view(mask, View(is_flipped=True))
    assert mirrored is not None
    for preprocess in (STRETCH, LETTERBOX):
        grid, other = (mask_on_model(each, preprocess, SIDE) for each in (whole, mirrored))
        width = round(preprocess.resized_hw(HW)[1] * SIDE / 336)
        assert (grid[:, :width] != other[:, :width][:, ::-1]).mean() < 0.005  # ties of exactly half a cell


@pytest.mark.parametrize("preprocess", [STRETCH, LETTERBOX], ids=["stretch", "letterbox"])
@pytest.mark.parametrize("hw", [(150, 220), (31, 47), (700, 433)])
def test_masks_are_where_the_preprocessing_puts_the_pixels(hw, preprocess):
    for kind in ("corner", "disc", "ring"):
        mask = shape(hw, kind)
        found = mask_in_view(mask, View())
        assert found is not None
        grid = mask_on_model(found, preprocess, SIDE)
        pixels = torch.from_numpy(mask * np.uint8(255)).expand(3, *hw)
        image = Preprocess(336, preprocess.mode, (0.0,) * 3, (1.0,) * 3)(pixels)[:1]
        expected = torch.nn.functional.adaptive_avg_pool2d(image, SIDE)[0] >= 0.5
        found_there = torch.from_numpy(grid)
        iou = (found_there & expected).sum() / (found_there | expected).sum()
        assert iou > 0.93, (kind, hw)  # a shift by one cell: 0.9 and less


def test_a_mask_smaller_than_any_cell_still_has_one():
    mask = np.zeros((900, 1400), bool)
    mask[457:460, 801:803] = True
    found = mask_in_view(mask, View())
    assert found is not None
    grid = mask_on_model(found, STRETCH, SIDE)
    assert 1 <= grid.sum() <= 2 and grid[int(458.5 / 900 * SIDE), int(802 / 1400 * SIDE)]


def test_distance_sampling_prefers_the_middle_and_uniform_does_not():
    mask = mask_in_view(shape(HW, "disc"), View())
    assert mask is not None
    radius = min(HW) / 4
    means = {}
    for sampling in ("distance", "uniform", "centre"):
        places = np.stack([draw_points(mask, np.zeros((0, 2)), sampling, 1, generator(i))[0] for i in range(400)])
        means[sampling] = np.hypot(places[:, 0] - HW[1] / 2, places[:, 1] - HW[0] / 2).mean() / radius
    assert abs(means["uniform"] - 2 / 3) < 0.04  # of a disc's points
    assert abs(means["distance"] - 1 / 2) < 0.04  # of a cone's
    assert means["centre"] < 0.05


def test_points_of_an_object_differ_while_it_has_pixels():
    mask = np.zeros(HW, bool)
    mask[10, 20:24] = True
    found = mask_in_view(mask, View())
    assert found is not None
    for sampling in POINT_SAMPLINGS:
        points = draw_points(found, np.zeros((0, 2)), sampling, 6, generator(0))
        assert len({tuple(point) for point in points[:4].tolist()}) == 4 and len(points) == 6


def test_stored_clicks_are_used_where_they_are_inside(tmp_path):
    masks = [shape(HW, "disc"), shape(HW, "ring")]
    index = make_photos(tmp_path, {"sa_1": record(masks, [(112.5, 70.25), (112.5, 70.25)])})
    spec = PromptSpec(8, 0, 1, 0, num_points=(2, 2), point_sampling="stored")
    for view, expected in ((View(), 112.5), (View(is_flipped=True), HW[1] - 112.5)):
        places = in_view_px(extras(spec).load(photo_of(index, view=view))["prompts"].points_xy, STRETCH, HW)
        np.testing.assert_allclose(places[0, 0], (expected, 70.25), atol=1e-4)
        assert np.abs(places[1] - (expected, 70.25)).max(1).min() > 20  # the ring's lies in its hole


def test_the_same_seed_and_epoch_give_the_same_prompts_and_others_do_not(photos):
    first = extras().load(photo_of(photos, 0, epoch=3))["prompts"]
    torch.manual_seed(99)
    again = extras().load(photo_of(photos, 0, epoch=3))["prompts"]
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    for other in (extras().load(photo_of(photos, 0, epoch=4)), extras(seed=1).load(photo_of(photos, 0, epoch=3))):
        assert not set(other["prompts"].prompt_ids.tolist()) & set(first.prompt_ids.tolist())


def test_fixed_prompts_repeat_in_every_epoch(photos):
    spec = PromptSpec(4, num_points=(1, 3), is_fixed=True)
    batches = [extras(spec).load(photo_of(photos, 0, epoch=epoch))["prompts"] for epoch in range(3)]
    assert all(torch.equal(a, b) for batch in batches[1:] for a, b in zip(batches[0], batch, strict=True))


def test_ids_tell_views_and_cut_down_prompts_apart(photos):
    spec = PromptSpec(4, 0, 0, 1, is_fixed=True)
    whole, flipped = (extras(spec).load(photo_of(photos, 0, View(flip)))["prompts"] for flip in (False, True))
    ids = [whole.prompt_ids, flipped.prompt_ids, whole.boxes_only().prompt_ids, whole.points_only().prompt_ids]
    assert len({int(i) for each in ids for i in each}) == 16 and all((each >= 0).all() for each in ids)
    assert not whole.boxes_only().is_point.any() and whole.boxes_only().has_box.all()
    assert not whole.points_only().has_box.any() and (whole.points_only().boxes_cxcywh == 0).all()


def test_an_object_is_asked_the_same_whatever_else_is_chosen(photos):
    def points_by_mask(max_objects: int) -> dict[bytes, list]:
        spec = PromptSpec(max_objects, 0, 1, 0, min_area=0)
        batch = extras(spec).load(photo_of(photos, 0))["prompts"]
        return {m.numpy().tobytes(): p.tolist() for m, p in zip(batch.masks, batch.points_xy, strict=True)}

    few, many = points_by_mask(5), points_by_mask(20)
    assert len(few) == 5 and len(many) == 20 and all(many[mask] == points for mask, points in few.items())


def test_which_objects_are_chosen_is_uniform_over_epochs(photos):
    spec = PromptSpec(5, min_area=0)
    full = extras(PromptSpec(20, min_area=0)).load(photo_of(photos, 0))["prompts"].masks
    chosen = torch.zeros(20)
    for epoch in range(60):
        masks = extras(spec).load(photo_of(photos, 0, epoch=epoch))["prompts"].masks
        chosen += (masks[:, None] == full[None]).flatten(2).all(2).any(0)
    assert chosen.sum() == 300 and chosen.min() > 4 and chosen.max() < 29


def test_the_kind_of_prompt_is_drawn_per_object_in_the_given_shares(photos):
    """D-93: a coin per object, not one per batch, and each object is a query of its own (D-83)."""
    spec = PromptSpec(20, box_share=2, point_share=1, both_share=1, num_points=(1, 3), min_area=0)
    kinds, counts = torch.zeros(3), torch.zeros(4)
    for epoch in range(30):
        batch = extras(spec).load(photo_of(photos, 0, epoch=epoch))["prompts"]
        has_points = batch.is_point.any(1)
        kinds += torch.stack(
            [(batch.has_box & ~has_points), (~batch.has_box & has_points), batch.has_box & has_points]
        ).sum(1)
        counts += torch.bincount(batch.is_point.sum(1), minlength=4)
        assert len(set((batch.has_box + 2 * has_points.int()).tolist())) > 1
        assert (batch.has_box | has_points).all() and (batch.point_labels == batch.is_point).all()
    torch.testing.assert_close(kinds / kinds.sum(), torch.tensor([0.5, 0.25, 0.25]), atol=0.06, rtol=0)
    torch.testing.assert_close(counts[1:] / counts[1:].sum(), torch.full((3,), 1 / 3), atol=0.08, rtol=0)


def test_objects_below_the_smallest_area_are_left_out(photos):
    areas = sorted(mask.sum() / mask.size for mask in BLOBS)
    batch = extras(PromptSpec(32, min_area=float(areas[8]))).load(photo_of(photos, 0))["prompts"]
    assert batch.num_objects == 12


def test_images_without_a_shown_object_stay_without_a_prompt(photos, tmp_path):
    mask = np.zeros(HW, bool)
    mask[2:9, 3:9] = True
    index = make_photos(tmp_path, {"sa_1": record([mask])})
    empty = extras().load(photo_of(index, view=View(left=0.5, top=0.5, side=0.5)))
    assert empty["prompts"].num_objects == 0
    full = extras().load(photo_of(photos, 1))
    batch = extras().collate([full, empty, full])
    assert batch["prompts"].image_of_object.tolist() == [0] * 4 + [2] * 4
    assert batch["prompts"].masks.shape == (8, SIDE, SIDE) and batch["damaged"] == []
    assert extras().collate([empty])["prompts"].num_objects == 0


def broken(objects: int, **changes) -> dict:
    content = record(KINDS)
    for entry in content["annotations"][:objects]:
        entry.update(changes)
    return content


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "no annotation"),
        (record([np.zeros(HW, bool)]), "no valid mask"),
        (broken(4, segmentation={"size": [150, 220], "counts": [3]}), "no valid mask.*do not fill the image"),
        (broken(4, bbox="?"), "no valid object.*object 0 is malformed"),
        (broken(4, segmentation={"size": [10, 10], "counts": [100]}), "no valid mask"),
        ({"image": {"width": 60, "height": 40}, "annotations": []}, "annotations is empty"),
    ],
    ids=["missing", "empty-mask", "cut-off", "malformed", "other-size", "no-object"],
)
def test_an_annotation_with_no_valid_mask_leaves_the_image_out(tmp_path, content, message):
    index = make_photos(tmp_path, {"sa_1": content})
    with pytest.raises(UnreadableImageError, match=f"sa_1.json.*{message}"):
        extras().load(photo_of(index))


def test_an_annotation_of_another_image_is_refused(tmp_path):
    index = make_photos(tmp_path, {"sa_1": record(KINDS)})
    path = tmp_path / "annotations/train/sa_1.json"
    content = json.loads(path.read_text())
    content["image"]["width"] = 221
    path.write_text(json.dumps(content))
    with pytest.raises(UnreadableImageError, match="150 x 221 pixels, but this one has 150 x 220"):
        extras().load(photo_of(index))


NO_RUNS = {"size": list(HW), "counts": [HW[0] * HW[1]]}


@pytest.mark.parametrize(
    "changes", [{"segmentation": [[1.0]]}, {"bbox": None}, {"segmentation": NO_RUNS}], ids=["polygon", "box", "empty"]
)
def test_a_malformed_object_alone_is_passed_over_and_named_once(tmp_path, changes, caplog):
    index = make_photos(tmp_path, {"sa_1": broken(1, **changes)})
    found = extras(PromptSpec(32, min_area=0))
    item = found.load(photo_of(index))
    assert item["prompts"].num_objects == 3 and len(item["damaged"]) == 1
    for _ in range(2):
        batch = found.collate([item])
        found.report(batch)
        assert "damaged" not in batch
    assert len(found.damaged) == 1 and len(caplog.records) == 1 and "object 0" in caplog.text


def test_ten_malformed_objects_are_named_and_no_more_are_remembered(caplog):
    """A data set may have millions of them."""
    found = extras()
    for batch in range(5):
        found.report({"damaged": [f"sa_{batch}.json: object {i}: the mask is empty" for i in range(7)]})
    assert len(caplog.records) == len(found.damaged) == 10
    assert caplog.records[-1].getMessage().endswith("further ones are left out without a word")


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"max_objects": 0}, "MAX_OBJECTS"),
        ({"box_share": 0, "point_share": 0, "both_share": 0}, "POINT_SHARE"),
        ({"point_share": -1}, "POINT_SHARE"),
        ({"num_points": (2, 1)}, "NUM_POINTS"),
        ({"num_points": (0, 1)}, "NUM_POINTS"),
        ({"point_sampling": "edge"}, "'edge' is not one of"),
        ({"box_jitter": 0.3}, "BOX_JITTER"),
        ({"box_max_shift_px": -1.0}, "BOX_MAX_SHIFT_PX"),
        ({"min_area": 1.0}, "MIN_AREA"),
    ],
)
def test_impossible_settings_are_refused(setting, message):
    with pytest.raises(ValueError, match=message):
        PromptSpec(**setting)
