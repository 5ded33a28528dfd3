"""Sessions of Hugging Face's `Sam3TrackerVideoModel` give the same masks, scores and pointers (random weights, CPU).

Theirs differs from the released tracker, which the golden sessions stand for, in five ways. The first three are
settings of ours. The last two are how the released predictor is meant to be, so there sessions are edited for the
comparison, and everything else is tested:

- objects never share a conditioning frame: ``objects="independent"``;
- masks are resized to the memory encoder before they are thresholded: ``resize_before_squashing=True``;
- a mask prompt enters at the size of the model input, and its pointer comes from three candidates:
  ``hugging_face_rules=True``;
- the record of a mask prompt is what the tracker made of it, its mask cut at 0 for the memory; the released predictor
  first makes -1024 and 1024 of the mask at low resolution: the tracker's own record takes the place of that one;
- a click on a tracked frame does not start from the mask there. It reads the memory, and the frame does not become a
  conditioning frame; unless the session forgets that it tracked the frame, as it is made to for one correction here. A
  correction on the next frame, and the answer to a click that reads the memory, are compared as they are.
"""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from golden import fill, table
from torch import Tensor

from sam3.config import Sam3Config
from sam3.model.sam3_image import Sam3Image
from sam3.model.sam3_tracker import TrackerFeatures
from sam3.model.sam3_tracking_predictor import Sam3TrackerPredictor
from sam3.model_builder import assemble_image_model
from sam3.tracker_config import MemoryAttentionConfig, TrackerConfig

transformers = pytest.importorskip("transformers")
from hf_models import build_hf_tracker_video_model  # noqa: E402 (needs transformers)
from transformers.models.sam3_tracker_video import modeling_sam3_tracker_video as hf_module  # noqa: E402

TINY = Sam3Config.preset("tiny")
CONFIG = TINY.replace(
    name="tiny with their memory",
    image_size_px=168,
    hidden_dim=128,
    sam_heads=dataclasses.replace(TINY.sam_heads, head_hidden_dim=128),
    tracker=TrackerConfig(
        memory_attention=MemoryAttentionConfig(num_layers=2, mlp_dim=128, dropout=0.0), hugging_face_rules=True
    ),
)
NUM_FRAMES, HEIGHT, WIDTH = 20, 90, 120
MASK = np.zeros((HEIGHT, WIDTH), dtype=bool)
MASK[20:60, 30:80] = True


@pytest.fixture(scope="module")
def model() -> Sam3Image:
    return fill(assemble_image_model(CONFIG, enable_tracker=True, enable_detector=False))


@pytest.fixture(scope="module")
def hf(model: Sam3Image):
    return build_hf_tracker_video_model(model)


@pytest.fixture(scope="module")
def video() -> Tensor:
    size = CONFIG.image_size_px
    return torch.stack([table(f"video.{t}", (3, size, size)) for t in range(NUM_FRAMES)])


@pytest.fixture(scope="module")
@torch.no_grad()
def features(model: Sam3Image, video: Tensor) -> dict[int, TrackerFeatures]:
    return {t: model.tracker_features(image[None]) for t, image in enumerate(video)}


class PairedSessions:
    """The same prompts to both; object i of theirs is object i of ours."""

    def __init__(self, model: Sam3Image, hf, video: Tensor, features: dict[int, TrackerFeatures]) -> None:
        self.hf = hf
        self.theirs = hf_module.Sam3TrackerVideoInferenceSession(
            video=video.clone(), video_height=HEIGHT, video_width=WIDTH, dtype=torch.float32
        )
        processor = transformers.Sam3TrackerVideoProcessor
        self.processor = processor.__new__(processor)  # prompts need none of its image processing
        self.processor.target_size, self.processor.point_pad_value = CONFIG.image_size_px, -10
        self.predictor = Sam3TrackerPredictor(model, objects="independent", resize_before_squashing=True)
        self.ours = self.predictor.init_state(HEIGHT, WIDTH, NUM_FRAMES, cached_features=features)
        self.num_compared = 0

    def click(self, frame: int, obj: int, points: list, labels: list, **options) -> None:
        self.processor.process_new_points_or_boxes_for_video_frame(
            self.theirs, frame, [obj], input_points=[[points]], input_labels=[[labels]]
        )
        points_xy = np.array(points) / [WIDTH, HEIGHT]
        self.predictor.add_new_points_or_box(self.ours, frame, obj, points=points_xy, labels=labels, **options)

    def box(self, frame: int, obj: int, box: list) -> None:
        self.processor.process_new_points_or_boxes_for_video_frame(self.theirs, frame, [obj], input_boxes=[[box]])
        sides = [WIDTH, HEIGHT, WIDTH, HEIGHT]
        self.predictor.add_new_points_or_box(self.ours, frame, obj, box=np.array(box) / sides)

    def mask(self, frame: int, obj: int, mask: np.ndarray) -> None:
        self.processor.process_new_mask_for_video_frame(self.theirs, frame, [obj], [mask])
        self.predictor.add_new_mask(self.ours, frame, obj, mask)
        self.predictor.propagate_in_video_preflight(self.ours)
        prompt = self.theirs.mask_inputs_per_obj[self.theirs.obj_id_to_idx(obj)][frame]
        tracker, features = self.predictor.tracker, self.ours.cached_features[frame]
        record = tracker.make_record(features, tracker.use_mask_as_output(features, prompt), prompt, True)
        self.ours.group_of(obj).condition_on(frame, record)

    def start_afresh(self, frame: int, obj: int) -> None:
        """Before a click: neither side corrects what tracking gave."""
        row = self.theirs.obj_id_to_idx(obj)
        self.theirs.frames_tracked_per_obj[row].pop(frame)
        self.theirs.output_dict_per_obj[row]["non_cond_frame_outputs"].pop(frame)
        self.ours.group_of(obj).unread.add(frame)

    def answer(self, frame: int) -> None:
        self.hf(self.theirs, frame_idx=frame)
        self.predictor.propagate_in_video_preflight(self.ours)
        self.compare(frame)

    def track(self, start: int, count: int, reverse: bool = False) -> list[int]:
        theirs = self.hf.propagate_in_video_iterator(
            self.theirs, start_frame_idx=start, max_frame_num_to_track=count, reverse=reverse
        )
        frames = []
        for output in self.predictor.propagate_in_video(self.ours, start, count, reverse):
            frame_idx, obj_ids, low_res, _, scores = output
            expected = next(theirs)
            assert (frame_idx, obj_ids) == (expected.frame_idx, list(expected.object_ids))
            assert_close(low_res, expected.pred_masks, 1e-3)
            assert_close(scores, expected.object_score_logits.view_as(scores), 1e-4)
            self.compare(frame_idx)
            frames.append(frame_idx)
        assert next(theirs, None) is None
        return frames

    def compare(self, frame: int) -> None:
        """The records of a frame, for all objects that have one."""
        for group in self.ours.groups:
            stores = self.theirs.output_dict_per_obj[self.theirs.obj_id_to_idx(group.obj_ids[0])]
            is_prompted = frame in group.bank.cond
            expected = stores["cond_frame_outputs" if is_prompted else "non_cond_frame_outputs"].get(frame)
            record = (group.bank.cond if is_prompted else group.bank.non_cond).get(frame)
            if expected is None or record is None:
                continue
            assert record.pred_masks is not None and record.maskmem_features is not None
            assert_close(record.pred_masks, expected["pred_masks"], 1e-3)
            assert_close(record.obj_ptr, expected["object_pointer"].flatten(0, 1), 1e-4)
            assert_close(record.object_score_logits.flatten(), expected["object_score_logits"].flatten(), 1e-4)
            assert record.maskmem_features.dtype == expected["maskmem_features"].dtype == torch.bfloat16
            self.num_compared += 1


def assert_close(ours: Tensor, theirs: Tensor, tolerance: float) -> None:
    assert ours.shape == theirs.shape
    assert (ours - theirs).abs().max().item() <= tolerance


@pytest.fixture
def pair(model: Sam3Image, hf, video: Tensor, features: dict[int, TrackerFeatures]):
    with torch.no_grad():
        yield PairedSessions(model, hf, video, features)


CLICKS = ([[48.0, 45.0], [20.0, 20.0]], [1, 0])


@pytest.mark.parametrize("kind", ["click", "box", "mask"])
def test_one_object_through_twenty_frames(pair: PairedSessions, kind: str) -> None:
    if kind == "mask":
        pair.mask(0, 7, MASK)
    elif kind == "box":
        pair.box(0, 7, [10, 20, 60, 70])
    else:
        pair.click(0, 7, [[48.0, 45.0]], [1])
    pair.answer(0)
    assert pair.track(0, NUM_FRAMES) == list(range(NUM_FRAMES))
    assert pair.num_compared == NUM_FRAMES + 1


def test_three_objects_a_correction_and_the_way_back(pair: PairedSessions) -> None:
    pair.click(0, 1, *CLICKS)
    pair.answer(0)
    pair.box(3, 2, [10, 20, 60, 70])  # an object that appears later
    pair.answer(3)
    pair.mask(0, 3, MASK)
    pair.answer(0)
    assert pair.track(0, 11) == list(range(12))
    pair.start_afresh(8, 2)
    pair.click(8, 2, [[80.0, 30.0], [30.0, 50.0]], [0, 1])
    pair.answer(8)
    assert pair.track(8, NUM_FRAMES) == list(range(8, NUM_FRAMES))
    assert pair.track(10, NUM_FRAMES, reverse=True) == list(range(10, -1, -1))
    assert {t for group in pair.ours.groups for t in group.bank.cond} == {0, 3, 8}


def test_a_correction_ahead_of_tracking(pair: PairedSessions) -> None:
    """In the middle, on the first frame that is not tracked yet: neither session is edited."""
    pair.click(0, 7, *CLICKS)
    pair.answer(0)
    assert pair.track(0, 8) == list(range(9))
    pair.click(9, 7, [[80.0, 30.0], [30.0, 50.0]], [0, 1])
    pair.answer(9)
    assert pair.track(9, NUM_FRAMES) == list(range(9, NUM_FRAMES))
    assert pair.track(9, NUM_FRAMES, reverse=True) == list(range(9, -1, -1))
    assert set(pair.ours.group_of(7).bank.cond) == {0, 9}


def test_a_click_that_reads_the_memory(pair: PairedSessions) -> None:
    """What they show for a click on a tracked frame."""
    pair.click(0, 7, *CLICKS)
    pair.answer(0)
    pair.track(0, 5)
    pair.ours.group_of(7).unread.add(4)
    pair.click(4, 7, [[80.0, 30.0]], [0], use_prev_mem_frame=True)
    expected = pair.hf(pair.theirs, frame_idx=4)
    answer = pair.ours.group_of(7).pending[4][7].record
    assert answer.pred_masks is not None
    assert_close(answer.pred_masks, expected.pred_masks, 1e-3)
    assert_close(answer.object_score_logits, expected.object_score_logits, 1e-4)
