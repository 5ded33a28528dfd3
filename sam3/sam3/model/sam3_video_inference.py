"""Text, boxes and clicks on a video: everything that a text describes is found, followed and handed out per frame.

Names, arguments and returns are those of Meta's SAM 3 package 0.1.4, restated from its public behaviour; no code is
shared.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from sam3.image_input import IMAGE_SUFFIXES, open_image
from sam3.model.detections import image_share
from sam3.model.detector_prompts import parse_boxes, parse_labels, parse_texts, rows_of_one_image, warn_of_cut_texts
from sam3.model.mask_rules import fill_holes_in_mask_scores
from sam3.model.memory_policy import EditRefusedError
from sam3.model.prompt import Prompt
from sam3.model.sam3_image_processor import VISUAL_TEXT
from sam3.model.sam3_tracker import PointInputs
from sam3.model.sam3_video_base import Sam3VideoBase
from sam3.model.video_clicks import is_integer, parse_clicks, require_frame, require_obj_id
from sam3.model.video_detection import EncodedFrame
from sam3.model.video_groups import Scene, TrackedGroup
from sam3.model.video_outputs import FrameResult, HotstartBuffer, VideoSizeResult
from sam3.model.video_state import TextPrompt, VideoState
from sam3.sam.prompts import PromptError, to_array
from sam3.video.frame_source import FrameSource, ListFrames, VideoDecodeError, open_frames
from sam3.video.video_file import DECODERS

_UNKNOWN_LENGTH = 2**40
"""Frames of a live video, for rules that ask: above every index."""
_RELEASED_LOADERS = ("cv2", "torchcodec")
_PICTURE_SUFFIXES = set(IMAGE_SUFFIXES) - {".gif"}
"""A GIF is a video."""


class Sam3VideoInference(Sam3VideoBase):
    """One video after another, or several at once, on one model.

    Example::

        video = build_sam3_video_model("sam3.pt")
        state = video.init_state("street.mp4")
        frame_idx, outputs = video.add_prompt(state, 0, text_str="yellow bus")
        for frame_idx, outputs in video.propagate_in_video(state):
            outputs["out_obj_ids"], outputs["out_binary_masks"]         # (n,), (n, H, W) bool

    ``outputs`` of a frame, sorted by id and without empty masks:

    - ``out_obj_ids``: int64, (n,).
    - ``out_probs``: float32, (n,): the score of an object's first detection; 1 after a click.
    - ``out_boxes_xywh``: float32, (n, 4): fractions of the image, of the masks before overlaps are resolved.
    - ``out_binary_masks``: bool, (n, H, W); a pixel belongs to one object.
    - ``frame_stats``: ``num_obj_tracked`` and ``num_obj_dropped``; None where only some objects were tracked.

    Between its prompts a session remembers of every frame what a click or another propagation may need, unless it was
    opened with an ``edit_window``.
    """

    @torch.inference_mode()
    def init_state(
        self,
        resource_path: Any,
        offload_video_to_cpu: bool = False,
        async_loading_frames: bool = False,
        video_loader_type: str | None = None,
        *,
        edit_window: int | str | None = "auto",
    ) -> VideoState:
        """Open a video.

        Args:
            resource_path: What `sam3.video.frame_source.open_frames` takes, or a picture, which is a video of one
                frame.
            offload_video_to_cpu: Accepted; frames are decoded when they are needed and never kept.
            async_loading_frames: Decode ahead in a thread.
            video_loader_type: ``decord`` or ``av``; None, and the released names ``cv2`` and ``torchcodec``: whichever
                there is.
            edit_window: So many of the last frames may be clicked and propagated from again. 0: the session only
                goes forward (and once backward from where it began). None: everything is kept. With a number, memory
                follows the objects that were ever found, which ``VideoConfig.max_num_objects`` limits, and not the
                length of the video.
                ``auto``: 0 for a live source, which cannot give a frame again, and None for others.

        Raises:
            VideoInputError: If it is no video.
            ValueError: If ``edit_window`` is negative.
        """
        frames = _open_resource(resource_path, video_loader_type, async_loading_frames)
        if edit_window == "auto":
            edit_window = 0 if frames.is_sequential else None
        if edit_window is not None and (not isinstance(edit_window, int) or edit_window < 0):
            raise ValueError(f"edit_window must be a number of frames, None or 'auto', got {edit_window!r}")
        num_frames = _UNKNOWN_LENGTH if frames.num_frames is None else frames.num_frames
        scene = Scene(self.tracker, self.model.preprocess, frames.size_hw, num_frames)
        return VideoState(frames, scene, self.config, edit_window)

    def reset_state(self, inference_state: VideoState) -> None:
        """Forget prompts and objects; the video stays open."""
        inference_state.clear()

    # --- prompts ------------------------------------------------------------------------------------------------------

    @torch.inference_mode()
    def add_prompt(
        self,
        inference_state: VideoState,
        frame_idx: int,
        text_str: str | None = None,
        boxes_xywh: Any = None,
        box_labels: Any = None,
        points: Any = None,
        point_labels: Any = None,
        obj_id: int | None = None,
        rel_coordinates: bool = True,
    ) -> tuple[int, dict[str, Any]]:
        """Say what to find (text, boxes or both), or correct or add one object (points).

        A text or box prompt resets the session. A text is looked for on all frames; boxes are examples on their frame.

        Args:
            inference_state: From `init_state`.
            frame_idx: The frame that is processed at once, and that boxes and points lie on.
            text_str: What to find.
            boxes_xywh: x, y, width, height of examples, (4,) or (n, 4). (The released model takes one.)
            box_labels: 1 for "like this", 0 for "not like this"; one for all or one each. Default: 1.
            points: x, y of clicks, (n, 2). They replace all earlier ones of the object on the frame.
            point_labels: 1 for the object, 0 for what is not, (n,).
            obj_id: Whose points; an id that is not known makes a new object.
            rel_coordinates: Boxes and points are fractions of width and height; otherwise pixels of the video.

        Returns:
            ``frame_idx`` and the frame's outputs.

        Raises:
            PromptError: If there is no prompt, or one is malformed or outside the image.
            FrameRangeError: If there is no such frame.
            EditRefusedError: If the session no longer keeps what a click on the frame needs.
        """
        state = inference_state
        frame_idx = require_frame(state.frames, frame_idx)
        if points is not None or obj_id is not None:
            if text_str is not None or boxes_xywh is not None:
                raise PromptError("a click cannot come with a text or a box: add them in calls of their own")
            return frame_idx, self._click(state, frame_idx, points, point_labels, obj_id, rel_coordinates)
        if text_str is None and boxes_xywh is None:
            raise PromptError("no prompt: give text_str, boxes_xywh, or points with obj_id")
        texts = [VISUAL_TEXT] if text_str is None else parse_texts(text_str)
        if len(texts) != 1:
            raise PromptError(f"a video session follows one text, got {len(texts)}: open a session for each")
        boxes = None
        if boxes_xywh is not None:
            boxes = self._parse_boxes(state, boxes_xywh, box_labels, rel_coordinates)
        if self.model.backbone.language_backbone is not None:
            warn_of_cut_texts(texts, self.model.backbone.language_backbone.tokenizer)
        self._require_eval_mode()
        features = self.model.backbone.forward_text(texts, device=self.model.device)
        self.encode(state, frame_idx, need_detector=True)
        kept = {key: features[key] for key in ("language_features", "language_mask")}
        state.clear()
        state.prompt = TextPrompt(text_str, kept, state.num_edits)
        if boxes is not None:
            state.boxes[frame_idx] = boxes
        result = self.process_frame(state, frame_idx)
        state.prune(frame_idx, reverse=False, is_again=True)
        return frame_idx, self._keep(state, result).outputs(state.scores, state.scores, state.size_hw)

    def _parse_boxes(self, state: VideoState, boxes_xywh: Any, labels: Any, is_relative: bool) -> Prompt:
        values = torch.as_tensor(to_array(boxes_xywh, "box")).clone()
        if is_relative and values.ndim and values.shape[-1] == 4:
            values[..., :2] += values[..., 2:] / 2
        boxes = parse_boxes(values, state.size_hw, "cxcywh" if is_relative else "xywh_px")
        boxes = boxes * boxes.new_tensor(image_share(self.model.preprocess, state.size_hw) * 2)
        box_labels = parse_labels(1 if labels is None else labels, len(boxes), "box")
        prompt = self.model._get_dummy_prompt()
        prompt.append_boxes(*rows_of_one_image(boxes, box_labels, 0, 1, self.model.device))
        return prompt

    def _click(
        self, state: VideoState, frame_idx: int, points: Any, labels: Any, obj_id: int | None, is_relative: bool
    ) -> dict[str, Any]:
        obj_id = require_obj_id(obj_id)
        on_model, marks = parse_clicks(points, labels, is_relative, self.model.preprocess, state.size_hw)
        inputs = on_model.to(self.model.device), marks.to(self.model.device)
        state.require_editable(frame_idx)
        self._require_eval_mode()
        encoded = self.encode(state, frame_idx, need_detector=False)
        group = state.group_of(obj_id)
        if group is None:
            group = TrackedGroup([obj_id], frame_idx)
            state.groups.append(group)
        result = self._refine(state, encoded, group, obj_id, inputs)
        state.add_objects([obj_id], [1.0], frame_idx, is_from_user=True)
        state.touch(obj_id, frame_idx)
        state.num_edits += 1
        if state.last_frame is None:
            state.prune(frame_idx, reverse=False, is_again=True)
        if state.edit_window != 0:
            state.cache.put(result, state.scores)
        return result.outputs(state.scores, state.scores, state.size_hw)

    def _refine(
        self, state: VideoState, encoded: EncodedFrame, group: TrackedGroup, obj_id: int, points: PointInputs
    ) -> VideoSizeResult:
        """Correct an object; the other objects of the frame are as they were."""
        frame_idx, window = encoded.frame_idx, self.config.click_demotion_window
        logits = group.click(state.scene, encoded.tracker, frame_idx, obj_id, points, window)
        enlarged = self.model.preprocess.masks_to_image(logits, state.size_hw)
        mask = fill_holes_in_mask_scores(enlarged, self.config.fill_hole_area)[0, 0] > 0
        result = state.cache.get(frame_idx, state.size_hw)
        record = group.record(frame_idx)
        assert record is not None
        score = record.object_score_logits[group.obj_ids.index(obj_id)].sigmoid()
        result.masks[obj_id] = mask.cpu().numpy()
        result.priorities[obj_id] = float(score)
        result.hidden.discard(obj_id)
        result.stats = None
        return result

    def remove_object(self, inference_state: VideoState, obj_id: int, is_user_action: bool = False) -> None:
        """Forget an object, on all frames.

        The quality of frames by which memory is selected is computed anew for the objects first seen with it, as
        released. With an ``edit_window`` that would reach frames that are no longer kept, and is refused.

        Args:
            inference_state: From `init_state`.
            obj_id: Of the object.
            is_user_action: Accepted; what is removed stays removed either way.

        Raises:
            PromptError: If there is no such object.
            EditRefusedError: If the session no longer keeps what the objects first seen with it would read.
        """
        if (obj_id := require_obj_id(obj_id)) not in inference_state.scores:
            raise PromptError(f"there is no object {obj_id} to remove; there are {inference_state.obj_ids}")
        inference_state.discard_objects({obj_id})
        inference_state.num_edits += 1

    # --- propagation --------------------------------------------------------------------------------------------------

    def propagate_in_video(
        self,
        inference_state: VideoState,
        start_frame_idx: int | None = None,
        max_frame_num_to_track: int | None = None,
        reverse: bool = False,
    ) -> Iterator[tuple[int, dict[str, Any]]]:
        """Follow the objects through the video, and find new ones on the way.

        What is done depends on what happened before: frames that are known and did not change are handed out again;
        after clicks only the clicked objects (and those first seen with them) are tracked anew on such frames, beside
        what is known of the others, until they have come to the last of them; otherwise every frame goes through
        detector and tracker. New objects are on probation for ``hotstart_delay`` frames, and results come out as much
        later; all come out in the end.

        Args:
            inference_state: From `init_state`, with a prompt.
            start_frame_idx: Where to begin; default: the first frame that a prompt was given on. Backward, the frame
                before it is the first.
            max_frame_num_to_track: So many frames beyond the start; default: to the end of the video.
            reverse: Towards the first frame.

        Yields:
            Frame index and outputs, in order.

        Raises:
            PromptError: If there was no prompt.
            FrameRangeError: If there is no such start.
            EditRefusedError: If the session no longer keeps what the start needs; after all that was tracked before, if
                it no longer keeps what the end of a probation on the way back needs.
            RuntimeError: If a prompt is added or an object removed before the end.
            VideoDecodeError: If a frame cannot be decoded, after all that was tracked before it.
        """
        state = inference_state
        if state.first_frame is None:
            raise PromptError("nothing to propagate: add a prompt first")
        start = require_frame(state.frames, state.first_frame if start_frame_idx is None else start_frame_idx)
        if state.num_frames is None and reverse:
            raise PromptError(f"{state.frames.name}: a live source cannot be followed backward")
        last = _last_frame(state.num_frames, start, max_frame_num_to_track, reverse)
        is_known = last is not None and all(state.is_cached(t) for t in _span(start, last, reverse))
        touched = set(state.touched[reverse])
        if state.was_propagated and touched:
            results = self._track_touched(state, start, last, reverse, touched)
        elif state.was_propagated and is_known:
            results = (state.cache.get(t, state.size_hw) for t in _span(start, last, reverse))
        else:
            results = self._track_all(state, start, last, reverse)
        num_edits, reached = state.num_edits, None
        for result in results:
            reached = result.frame_idx
            yield result.frame_idx, result.outputs(state.scores, state.scores, state.size_hw)
            if state.num_edits != num_edits:
                raise RuntimeError("the session was edited while it was propagated: start the propagation again")
        state.was_propagated = True
        if reached is not None:
            state.settle(touched, start - 1 if reverse else start, reached, reverse)

    def _track_all(self, state: VideoState, start: int, last: int | None, reverse: bool) -> Iterator[VideoSizeResult]:
        state.require_startable(start - 1 if reverse else start, reverse)
        buffer = HotstartBuffer(self.config.hotstart_delay)
        fault: BaseException | None = None
        for frame_idx in _existing(state.frames, start, last, reverse):
            try:
                result = self.process_frame(state, frame_idx, reverse)
            except (EditRefusedError, VideoDecodeError, KeyboardInterrupt) as error:
                fault = error  # raised when what was tracked is handed out
                break
            state.prune(frame_idx, reverse)
            for ready in buffer.push(result):
                yield self._keep(state, ready)
        for ready in buffer.flush():
            yield self._keep(state, ready)
        if fault is not None:
            raise fault

    def _track_touched(
        self, state: VideoState, start: int, last: int | None, reverse: bool, touched: set[int]
    ) -> Iterator[VideoSizeResult]:
        state.require_startable(start - 1 if reverse else start, reverse)
        for frame_idx in _existing(state.frames, start, last, reverse):
            if frame_idx not in state.known:  # neither are the other objects
                yield from self._track_all(state, frame_idx + 1 if reverse else frame_idx, last, reverse)
                return
            fresh = self.propagate_groups(state, frame_idx, touched, reverse)
            state.prune(frame_idx, reverse)
            result = fresh.at_video_size(self.model.preprocess, state.size_hw)
            known = state.cache.get(frame_idx, state.size_hw)
            result.masks = known.masks | result.masks
            result.priorities = known.priorities | result.priorities
            result.hidden = known.hidden - fresh.low_res.keys()
            if state.edit_window != 0:
                state.cache.put(result, state.scores)
            yield result

    def _keep(self, state: VideoState, result: FrameResult) -> VideoSizeResult:
        enlarged = result.at_video_size(self.model.preprocess, state.size_hw)
        state.known.add(result.frame_idx, reverse=False)
        if state.edit_window != 0:
            state.cache.put(enlarged, state.scores)
        return enlarged


def _open_resource(resource: Any, loader: str | None, is_async: bool) -> FrameSource:
    if loader not in (None, *DECODERS, *_RELEASED_LOADERS):
        raise ValueError(f"video_loader_type must be one of {(*DECODERS, *_RELEASED_LOADERS)} or None, got {loader!r}")
    is_picture = isinstance(resource, (str, Path)) and Path(resource).suffix.lower() in _PICTURE_SUFFIXES
    if is_picture and Path(resource).is_file():
        return ListFrames([open_image(Path(resource))], str(resource))
    return open_frames(resource, decoder=loader if loader in DECODERS else None, prefetch=8 if is_async else 0)


def _last_frame(num_frames: int | None, start: int, max_frames: int | None, reverse: bool) -> int | None:
    """The last frame of a propagation; None for the unknown end of a live source."""
    if max_frames is not None and (not is_integer(max_frames) or max_frames < 0):
        raise PromptError(f"max_frame_num_to_track must be an integer from 0 on, got {max_frames!r}")
    if reverse:
        return 0 if max_frames is None else max(start - max_frames, 0)
    end = None if num_frames is None else num_frames - 1
    if max_frames is None:
        return end
    return start + max_frames if end is None else min(start + max_frames, end)


def _span(start: int, last: int | None, reverse: bool) -> range:
    """Frames of a propagation whose end is known; backward without the start, as released."""
    assert last is not None
    return range(start - 1, last - 1, -1) if reverse else range(start, last + 1)


def _existing(frames: FrameSource, start: int, last: int | None, reverse: bool) -> Iterator[int]:
    """Frames of a propagation as far as there are any."""
    if reverse or last is not None:
        yield from (t for t in _span(start, last, reverse) if frames.has_frame(t))
        return
    frame_idx = start
    while frames.has_frame(frame_idx):
        yield frame_idx
        frame_idx += 1
