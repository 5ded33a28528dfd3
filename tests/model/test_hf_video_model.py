"""The text-prompted video model beside Hugging Face's `Sam3VideoModel`: same random weights, frames and text.

Where theirs leaves the behaviour of the released model, ours is changed for the comparison:

- they give the tracker the detection as a low-resolution mask cut at logit 0.5 and blurred to the input's size; the
  released model enlarges it to the memory encoder's mask size and cuts it at 0 there
- the pointer of a mask prompt comes from the best of three candidates; in the released model from the single mask
- they enlarge the masks of a prompt before they make zeros and ones of them for the memory; the released model after
- they compare areas, for masks that others cover, at low resolution; the released model on the enlarged masks
- every object has a memory bank of its own; in the released model those first seen on one frame share one and own no
  pixel together there
- a detection that renews an object makes the frame a conditioning frame and is shown there, and nothing else; in the
  released model the object also takes pointer and score from it, and the tracked mask is shown
- they have no memory selection, and neither NMS nor hole filling without an extra package of CUDA kernels
- they leave out the token that the geometry encoder always adds (see ``test_hf_detector.py``)
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from golden import fill
from test_hf_detector import WithoutTokens
from torch import Tensor, nn

import sam3.model.sam3_video_base as video_base
from sam3.config import Sam3Config
from sam3.hf_keys import released_to_hf
from sam3.model.mask_rules import suppress_object_pw_area_shrinkage
from sam3.model.memory_bank import FrameRecord, MemoryBank
from sam3.model.sam3_image import Sam3Image
from sam3.model.sam3_tracker import TrackerFeatures
from sam3.model.sam3_video_inference import Sam3VideoInference
from sam3.model.video_config import VideoConfig
from sam3.model.video_groups import Scene, TrackedGroup, resize
from sam3.model.video_outputs import FrameResult
from sam3.model.video_state import VideoState
from sam3.model_builder import assemble_image_model
from sam3.released_names import released_state_dict
from sam3.tracker_config import MemoryEncoderConfig

transformers = pytest.importorskip("transformers")
hf_video = pytest.importorskip("transformers.models.sam3_video.modeling_sam3_video")
from hf_models import hf_image_config, hf_tracker_video_config  # noqa: E402 (needs transformers)

TINY = Sam3Config.preset("tiny")
SMALL = TINY.replace(
    image_size_px=84, tracker=TINY.tracker.replace(memory_encoder=MemoryEncoderConfig(mask_channels=(4, 16, 64, 256)))
)
"""Their memory encoder has no other channels."""
Models = tuple[Sam3Image, Any]
TEXT = "red circle"
NUM_FRAMES = 20
CONFIG = VideoConfig(
    score_threshold_detection=0.0,
    new_det_thresh=1.0,
    det_nms_thresh=1.0,
    fill_hole_area=0,
    hotstart_delay=0,
    hotstart_unmatch_thresh=0,
    hotstart_dup_thresh=0,
    recondition_every_nth_frame=0,
)
"""All 24 queries are detections on every frame; the limit of objects says how many begin where nothing is tracked."""
PROBATION = CONFIG.replace(hotstart_delay=10, hotstart_unmatch_thresh=8, hotstart_dup_thresh=60)
"""No detection confirms an object, and all detections lie on all objects: the first of them ends on its eighth frame,
the others on their third, with 72 shared detections. No decision is near a threshold, so rounding changes none."""


def make_frames() -> list[np.ndarray]:
    """Coarse noise that moves and flickers, (60, 80, 3)."""
    rng = np.random.default_rng(0)
    base = rng.normal(128, 60, (15, 20, 3))
    flicker = (rng.normal(0, 12, base.shape) for _ in range(NUM_FRAMES))
    coarse = (np.roll(base, t // 2, 1) + noise for t, noise in enumerate(flicker))
    return [np.clip(np.kron(c, np.ones((4, 4, 1))), 0, 255).astype(np.uint8) for c in coarse]


def build_hf_video_model(model: Sam3Image) -> nn.Module:
    """Their video model with our weights."""
    hf = transformers.Sam3VideoModel(
        transformers.Sam3VideoConfig(
            detector_config=hf_image_config(model.config).to_dict(),
            tracker_config=hf_tracker_video_config(model.config).to_dict(),
            low_res_mask_size=model.config.grid_size * 4,
        )
    )
    for layer in hf.tracker_model.memory_attention.layers:  # made for memories of 64 channels
        sizes = model.config.tracker.mem_dim, model.config.hidden_dim
        layer.cross_attn_image.k_proj, layer.cross_attn_image.v_proj = nn.Linear(*sizes), nn.Linear(*sizes)
    hf.load_state_dict(released_to_hf(released_state_dict(model)))
    return hf.eval()


def run_theirs(models: Models, frames: list[np.ndarray], config: VideoConfig, reverse: bool) -> tuple[list[Any], Any]:
    """Results of all frames, and their session."""
    model, hf = models
    for name, value in vars(config).items():
        if hasattr(hf, name):
            setattr(hf, name, value)
    height, width = frames[0].shape[:2]
    video = torch.stack([model.preprocess(frame) for frame in frames])
    session = hf_video.Sam3VideoInferenceSession(
        video=video, video_height=height, video_width=width, dtype=torch.float32
    )
    ids = model.backbone.language_backbone.tokenize([TEXT])
    prompt_id = session.add_prompt(TEXT)
    session.prompt_input_ids[prompt_id] = ids
    session.prompt_attention_masks[prompt_id] = (ids != 0).long()
    start = len(frames) if reverse else 0  # backward, they begin before it
    with torch.no_grad():
        return list(hf.propagate_in_video_iterator(session, start_frame_idx=start, reverse=reverse)), session


def their_new_group(
    scene: Scene, features: TrackerFeatures, frame_idx: int, obj_ids: list[int], mask_logits: Tensor
) -> TrackedGroup:
    """`new_group` as theirs does it."""
    tracker, low_res = scene.tracker, (mask_logits > 0.5).to(torch.float32)
    size = tracker.config.image_size_px
    masks = F.interpolate(low_res, (size, size), mode="bilinear", align_corners=False, antialias=True)
    output = tracker.use_mask_as_output(features, masks)
    prompt = tracker.mask_downsample(masks)
    decoded = tracker.decode(features, features.coarse, len(masks), mask_logits=prompt, multimask_output=True)
    present = (masks > 0).flatten(1).any(dim=1, keepdim=True)
    logits = resize(masks * 20 - 10, tracker.mask_prompt_size)
    memory = tracker.encode_memory(features, logits, output.object_score_logits, is_mask_from_points=True)
    record = FrameRecord(
        pred_masks=output.pred_masks,
        obj_ptr=tracker.blend_pointers(decoded.obj_ptr, present),
        object_score_logits=output.object_score_logits,
        maskmem_features=memory,
        is_from_points=True,
    )
    return TrackedGroup(list(obj_ids), frame_idx, MemoryBank(cond={frame_idx: record}))


def their_tracked_memory(tracker: Any, features: TrackerFeatures, low_res: Tensor) -> Tensor:
    """`encode_tracked_memory` as theirs does it."""
    masks = suppress_object_pw_area_shrinkage(low_res)
    present = (masks > 0).flatten(1).any(dim=1, keepdim=True)
    scores = torch.where(present, 10.0, -10.0)
    return tracker.encode_memory(features, resize(masks, tracker.mask_prompt_size), scores, is_mask_from_points=False)


@pytest.fixture(scope="module")
def models() -> Models:
    """Our model, without the token that theirs leaves out, and theirs."""
    model = fill(assemble_image_model(SMALL, enable_tracker=True))
    hf = build_hf_video_model(model)
    model.geometry_encoder = WithoutTokens()
    return model, hf


@pytest.mark.parametrize(
    ("count", "config", "reverse"),
    [(1, CONFIG, False), (1, PROBATION, False), (3, CONFIG, False), (3, PROBATION, False), (3, PROBATION, True)],
    ids=["1-all_stay", "1-some_end", "3-all_stay", "3-some_end", "3-some_end-backward"],
)
def test_same_masks_scores_and_pointers(
    models: Models, count: int, config: VideoConfig, reverse: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Logits within 1e-3, scores and pointers within 1e-4, and the same objects come and go; memories in bfloat16."""
    monkeypatch.setattr(video_base, "new_group", their_new_group)
    monkeypatch.setattr(video_base, "encode_tracked_memory", their_tracked_memory)
    frames = make_frames()
    config = config.replace(max_num_objects=count)
    theirs, session = run_theirs(models, frames, config, reverse)
    state, results = run_ours(models[0], frames, config, reverse)
    for (ours, living), expected in zip(results, theirs, strict=True):
        compare_frame(ours, living, expected)
    assert state.next_obj_id - len(state.scores) == (2 * count if config.hotstart_delay else 0)  # so many ended
    assert set(session.obj_ids) == set(state.scores)
    for obj_id in state.scores:
        compare_records(state.group_of(obj_id), obj_id, session.output_dict_per_obj[session.obj_id_to_idx(obj_id)])


def run_ours(
    model: Sam3Image, frames: list[np.ndarray], config: VideoConfig, reverse: bool
) -> tuple[VideoState, list[tuple[FrameResult, set[int]]]]:
    """For each frame the result, and the objects that live after it."""
    settings = model.tracker.settings.replace(use_memory_selection=False)
    video = Sam3VideoInference(model, config, tracker_settings=settings)
    state = video.init_state(frames)
    prompted = video.init_state(frames)
    video.add_prompt(prompted, 0, text_str=TEXT)  # ours processes the prompted frame a second time, theirs does not
    state.prompt, state.num_edits = prompted.prompt, 1
    order = range(len(frames))[:: -1 if reverse else 1]
    return state, [(video.process_frame(state, t, reverse), set(state.scores)) for t in order]


def compare_frame(ours: FrameResult, living: set[int], theirs: Any) -> None:
    """Objects that end on a frame are not in their results."""
    assert ours.frame_idx == theirs.frame_idx
    assert ours.low_res.keys() & living == theirs.obj_id_to_mask.keys()
    assert ours.low_res.keys() == theirs.obj_id_to_tracker_score.keys()
    for obj_id, mask in theirs.obj_id_to_mask.items():
        torch.testing.assert_close(ours.low_res[obj_id], mask.squeeze(), rtol=0, atol=1e-3)
        score = float(theirs.obj_id_to_tracker_score[obj_id])
        assert ours.priorities[obj_id] == pytest.approx(score, abs=1e-4)


def test_renewed_objects_are_the_same(models: Models, monkeypatch: pytest.MonkeyPatch) -> None:
    """Frames on which a detection renews the object, for one object, whose memory bank is its own on both sides."""
    detections: dict[int, Tensor] = {}

    def their_renewal(
        group: TrackedGroup, scene: Scene, features: TrackerFeatures, frame_idx: int, masks: dict[int, Tensor]
    ) -> None:
        group.bank.cond[frame_idx] = group.bank.non_cond.pop(frame_idx)
        detections[frame_idx] = masks[0]

    monkeypatch.setattr(video_base, "new_group", their_new_group)
    monkeypatch.setattr(video_base, "encode_tracked_memory", their_tracked_memory)
    monkeypatch.setattr(TrackedGroup, "recondition", their_renewal)
    frames = make_frames()[:11]
    config = CONFIG.replace(
        max_num_objects=1, recondition_every_nth_frame=4, high_conf_thresh=0.2, high_iou_thresh=0.05
    )
    theirs, session = run_theirs(models, frames, config, reverse=False)
    state, results = run_ours(models[0], frames, config, reverse=False)
    assert list(detections) == [4, 8]
    for (ours, living), expected in zip(results, theirs, strict=True):
        ours.low_res[0] = detections.get(ours.frame_idx, ours.low_res[0])
        compare_frame(ours, living, expected)
    compare_records(state.group_of(0), 0, session.output_dict_per_obj[0])


def compare_records(group: TrackedGroup | None, obj_id: int, theirs: dict[str, Any]) -> None:
    """Pointers of all frames."""
    assert group is not None
    row = group.obj_ids.index(obj_id)
    for ours, name in ((group.bank.cond, "cond_frame_outputs"), (group.bank.non_cond, "non_cond_frame_outputs")):
        assert set(ours) == set(theirs[name])
        for t, record in ours.items():
            pointer = theirs[name][t]["object_pointer"].flatten()
            torch.testing.assert_close(record.obj_ptr[row], pointer, rtol=0, atol=1e-4)


@torch.inference_mode()
def test_the_released_way_to_prepare_masks_differs_from_theirs(models: Models) -> None:
    """So that the changes above cannot hide that nothing is compared."""
    model, _ = models
    video = Sam3VideoInference(model, CONFIG, memory_dtype=torch.float32)
    state = video.init_state(make_frames())
    video.add_prompt(state, 0, text_str=TEXT)
    assert state.encoded is not None
    masks = next(iter(state.encoded.detections.values())).masks[:1, None]
    ours, theirs = (
        make(state.scene, state.encoded.tracker, 0, [0], masks).bank.cond[0]
        for make in (video_base.new_group, their_new_group)
    )
    assert (ours.obj_ptr - theirs.obj_ptr).abs().max() > 1e-2
