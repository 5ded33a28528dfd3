"""Objects followed through a video from clicks, boxes and masks.

Example::

    predictor = Sam3TrackerPredictor(model)
    state = predictor.init_state(video_path="clip.mp4")
    predictor.add_new_points_or_box(state, frame_idx=0, obj_id=1, points=[[0.4, 0.6]], labels=[1])
    for frame_idx, obj_ids, low_res_masks, masks, scores in predictor.propagate_in_video(state):
        is_object = masks > 0    # (number of objects, 1, height, width)
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from sam3.model.sam3_image import Sam3Image
from sam3.model.tracker_engine import TrackerEngine
from sam3.model.tracker_prompts import (
    limit_points,
    parse_mask,
    parse_points,
    require_count,
    require_frame,
    require_object_id,
    require_same_video,
)
from sam3.model.tracker_state import MemoryPolicy, ObjectGroup, PointPrompt, TrackerState, make_policy, require_state
from sam3.sam.prompts import PromptError

Prompted = tuple[int, list[int], None, Tensor]
"""Frame index, object ids, None, mask logits (B, 1, H, W) of all objects."""


class Sam3TrackerPredictor(TrackerEngine):
    """Sessions of interactive tracking on one model.

    It has no weights, and all that belongs to a video is in its state: any number of sessions can run side by side.
    Objects that are added before tracking starts are tracked together as one batch; those added later form another
    batch, so that they change nothing for the objects that are there.
    """

    def __init__(
        self,
        model: Sam3Image,
        *,
        objects: Literal["joint", "independent"] = "joint",
        memory_policy: MemoryPolicy | str | None = None,
        memory_dtype: torch.dtype = torch.bfloat16,
        max_point_num_in_prompt_enc: int = 16,
        clear_non_cond_mem_around_input: bool = True,
        non_overlap_masks_for_output: bool = False,
        fill_hole_area: float = 0,
        resize_before_squashing: bool = False,
        max_cached_features: int = 2,
    ) -> None:
        """
        Args:
            model: With a tracker.
            objects: ``joint`` as released: a frame that is prompted for one object is a conditioning frame for all of
                a batch, and no two of them own a pixel there. ``independent``: each object is a batch of its own.
            memory_policy: What sessions keep: a policy, a name as `sam3.model.memory_policy.parse` takes it, or None
                for everything.
            memory_dtype: Memories are stored in it; bfloat16 as released.
            max_point_num_in_prompt_enc: Of more points for one object on one frame, the first and the last half count.
            clear_non_cond_mem_around_input: As released: after a prompt on an object that is tracked alone, clicks
                within a memory's reach of that frame do not start from the mask that tracking gave.
            non_overlap_masks_for_output: Give each pixel of the results to one object.
            fill_hole_area: Fill holes and remove islands of at most this many pixels in the results.
            resize_before_squashing: Resize mask logits to the memory encoder's size first, then threshold or squash
                them, as Hugging Face's tracker does; the released one squashes first.
            max_cached_features: Frames whose features are kept for the next prompt on them.

        Raises:
            ValueError: If the model has no tracker, or a setting is unknown.
        """
        if objects not in ("joint", "independent"):
            raise ValueError(f"objects must be 'joint' or 'independent', got {objects!r}")
        if max_point_num_in_prompt_enc < 2 or max_cached_features < 1:
            given = f"{max_point_num_in_prompt_enc} and {max_cached_features}"
            raise ValueError(f"max_point_num_in_prompt_enc must be at least 2, max_cached_features 1; got {given}")
        super().__init__(
            model,
            memory_dtype=memory_dtype,
            clear_non_cond_mem_around_input=clear_non_cond_mem_around_input,
            non_overlap_masks_for_output=non_overlap_masks_for_output,
            fill_hole_area=fill_hole_area,
            resize_before_squashing=resize_before_squashing,
        )
        self.objects = objects
        self.memory_policy = make_policy(memory_policy)
        self.max_points = max_point_num_in_prompt_enc
        self.max_cached_features = max_cached_features

    # --- a session ----------------------------------------------------------------------------------------------------

    def init_state(
        self,
        video_height: int | None = None,
        video_width: int | None = None,
        num_frames: int | None = None,
        video_path: Any = None,
        cached_features: Mapping[int, Any] | None = None,
        offload_video_to_cpu: bool = False,
        offload_state_to_cpu: bool = False,
        async_loading_frames: bool = False,
        *,
        memory_policy: MemoryPolicy | str | None = None,
    ) -> TrackerState:
        """Open a video. Frames are read when they are needed, and only the features of the last few are kept.

        Args:
            video_height: In pixels; read from the video, if there is one.
            video_width: As ``video_height``.
            num_frames: As ``video_height``; None without a video: unknown.
            video_path: A video file or its bytes, a folder of pictures, a list or array of frames, an iterator over
                frames, or a `sam3.video.frame_source.FrameSource`. None if all features are handed in. Of an iterator,
                frames are kept as the policy needs: all, compressed, but for RecentEdits and NoLateEdits, under which
                prompts must not run ahead of tracking.
            cached_features: By frame, what the tracker reads of it: `TrackerFeatures`, or as released a pair (image,
                dict) whose ``backbone_fpn`` (in ``tracker_backbone_out``, if that is there) holds the three maps. Read
                in place of the video's frames; the mapping may change while the session runs.
            offload_video_to_cpu: Accepted; frames never are anywhere else.
            offload_state_to_cpu: Keep records in the CPU's memory.
            async_loading_frames: Decode a few frames ahead in a thread.
            memory_policy: In place of the predictor's.

        Raises:
            VideoInputError: If the video cannot be used.
            ValueError: If neither a video nor its size is given.
        """
        source = None
        if video_path is not None:
            from sam3.video.frame_source import open_frames

            source = open_frames(video_path, prefetch=2 if async_loading_frames else 0)
            require_same_video(source, video_height, video_width, num_frames)
            (video_height, video_width), num_frames = source.size_hw, source.num_frames
        hint = "; give height and width, or a video as video_path=..."
        size_hw = require_count(video_height, "video_height", hint), require_count(video_width, "video_width", hint)
        if num_frames is not None:
            num_frames = require_count(num_frames, "num_frames")
        policy = self.memory_policy if memory_policy is None else make_policy(memory_policy)
        if source is not None:
            source.keep_frames(None if policy is None else policy.num_frames_read)
        return TrackerState(
            engine=self,
            size_hw=size_hw,
            num_frames=num_frames,
            device=self.model.device,
            source=source,
            cached_features=cached_features,
            max_cached_features=self.max_cached_features,
            policy=policy,
            offload_video_to_cpu=offload_video_to_cpu,
            offload_state_to_cpu=offload_state_to_cpu,
        )

    def reset_state(self, inference_state: TrackerState) -> None:
        """Forget all objects, prompts and results; the video and the features of its last frames stay."""
        require_state(inference_state).reset()

    clear_all_points_in_video = reset_state

    # --- prompts ------------------------------------------------------------------------------------------------------

    def add_new_points_or_box(
        self,
        inference_state: TrackerState,
        frame_idx: int,
        obj_id: int,
        points: Any = None,
        labels: Any = None,
        clear_old_points: bool = True,
        rel_coordinates: bool = True,
        use_prev_mem_frame: bool = False,
        normalize_coords: bool = True,
        box: Any = None,
        *,
        need_output: bool = True,
    ) -> Prompted | None:
        """Click on an object, or box it; on a frame that was tracked, the clicks correct what is there.

        Args:
            inference_state: From `init_state`.
            frame_idx: Any frame of the video.
            obj_id: A number of your choice; a new one adds an object, also after tracking has started.
            points: x, y of P clicks, (P, 2).
            labels: 1 for a click on the object, 0 for one off it, (P,).
            clear_old_points: Replace this object's points on this frame; otherwise they are kept, and these added.
            rel_coordinates: Coordinates are fractions of the video's width and height, else pixels of the model input.
            use_prev_mem_frame: On a tracked frame, read the memory too and not only the mask that is corrected.
            normalize_coords: Accepted and without effect, as released.
            box: x0, y0, x1, y1; with ``clear_old_points`` alone.
            need_output: Whether to put the masks of all objects together at the video's size.

        Returns:
            Frame index, object ids, None, and mask logits at the video's size for all objects, float32 (B, 1, H, W),
            -1024 for objects without anything on this frame; None without ``need_output``.

        Raises:
            PromptError: If an argument cannot be used; the state is as it was.
        """
        state, frame_idx, obj_id = self._check_edit(inference_state, frame_idx, obj_id)
        if box is not None and not clear_old_points:
            raise PromptError("a box replaces the points of its object on this frame: set clear_old_points=True")
        prompt = parse_points(points, labels, box, rel_coordinates, self.model.preprocess, state.size_hw)
        self._require_editable(state, frame_idx)
        group = state.find_group(obj_id)
        if not clear_old_points and group is not None and frame_idx in group.points[obj_id]:
            old = group.points[obj_id][frame_idx]
            prompt = PointPrompt(
                torch.cat([old.coords_px, prompt.coords_px], dim=1), torch.cat([old.labels, prompt.labels], dim=1)
            )
        prompt = limit_points(prompt, self.max_points)
        answer = self.answer_points(state, group, frame_idx, obj_id, prompt, use_prev_mem_frame)
        group = group or self._add_object(state, obj_id)
        group.mask_frames[obj_id].discard(frame_idx)
        group.points[obj_id][frame_idx] = prompt
        group.pending.setdefault(frame_idx, {})[obj_id] = answer
        return self._prompted(state, frame_idx) if need_output else None

    add_new_points = add_new_points_or_box

    def add_new_mask(
        self,
        inference_state: TrackerState,
        frame_idx: int,
        obj_id: int,
        mask: Any,
        add_mask_to_memory: bool = False,
        *,
        need_output: bool = True,
    ) -> Prompted | None:
        """Say where an object is on a frame; other masks given for this frame lose the pixels it takes.

        Args:
            inference_state: From `init_state`.
            frame_idx: Any frame of the video.
            obj_id: As for `add_new_points_or_box`.
            mask: bool, or numbers from 0 to 1, (h, w) of any size. An empty one says that an object that is known from
                another frame is not in this one.
            add_mask_to_memory: Accepted and without effect, as released.
            need_output: As for `add_new_points_or_box`.

        Returns:
            As `add_new_points_or_box`.

        Raises:
            PromptError: If an argument cannot be used; the state is as it was.
        """
        state, frame_idx, obj_id = self._check_edit(inference_state, frame_idx, obj_id)
        masks = parse_mask(mask)
        group = state.find_group(obj_id)
        if not masks.any() and (group is None or not group.prompted_frames(obj_id) - {frame_idx}):
            raise PromptError(
                f"the mask of object {obj_id} is empty, and the object is known from no other frame: give a mask with "
                "a pixel above 0"
            )
        self._require_editable(state, frame_idx)
        answer = self.answer_mask(state, frame_idx, masks)
        group = group or self._add_object(state, obj_id)
        group.points[obj_id].pop(frame_idx, None)
        group.mask_frames[obj_id].add(frame_idx)
        assert answer.video_mask is not None
        for other in [group] if self.objects == "independent" else state.groups:
            other.give_up_pixels(frame_idx, answer.video_mask)
        group.pending.setdefault(frame_idx, {})[obj_id] = answer
        return self._prompted(state, frame_idx) if need_output else None

    def clear_all_points_in_frame(
        self, inference_state: TrackerState, frame_idx: int, obj_id: int, need_output: bool = True
    ) -> Prompted | None:
        """Take back all prompts of an object on a frame; without prompts of others, the frame counts as tracked.

        Returns:
            As `add_new_points_or_box`.

        Raises:
            PromptError: If there is no such frame or object.
        """
        state, frame_idx, obj_id = self._check_edit(inference_state, frame_idx, obj_id)
        group = state.group_of(obj_id)
        self._require_editable(state, frame_idx)
        group.take_back(frame_idx, obj_id)
        return self._prompted(state, frame_idx) if need_output else None

    def remove_object(
        self, inference_state: TrackerState, obj_id: int, strict: bool = False, need_output: bool = True
    ) -> tuple[list[int], list[tuple[int, Tensor]]]:
        """Forget an object; the others keep their results.

        Args:
            inference_state: From `init_state`.
            obj_id: The object.
            strict: An unknown object is an error; otherwise nothing happens.
            need_output: Whether to put masks together.

        Returns:
            Ids of the objects that are left, and for each frame on which the object had a prompt (frame index, mask
            logits (B, 1, H, W) of the others).

        Raises:
            PromptError: If there is no such object and ``strict``; `EditRefusedError` if the memory policy cannot keep
                the others exact, or has dropped masks that are asked for.
        """
        state, obj_id = require_state(inference_state), require_object_id(obj_id)
        if obj_id not in state.obj_ids and not strict:
            return state.obj_ids, []
        group = state.group_of(obj_id)
        frames = sorted(group.prompted_frames(obj_id))
        if state.obj_ids == [obj_id]:
            state.reset()
            return [], []
        if state.policy is not None:
            state.policy.require_removable(state, obj_id, frames if need_output else [])
        for frame_idx in frames:
            group.take_back(frame_idx, obj_id)
        settings = self.tracker.settings
        group.remove_object(obj_id, settings.shared_iou_score if settings.use_memory_selection else None)
        state.groups = [group for group in state.groups if group.obj_ids]
        return state.obj_ids, [(t, self._prompted(state, t)[3]) for t in frames] if need_output else []

    # --- tracking -----------------------------------------------------------------------------------------------------

    def propagate_in_video(
        self,
        inference_state: TrackerState,
        start_frame_idx: int | None = None,
        max_frame_num_to_track: int | None = None,
        reverse: bool = False,
        tqdm_disable: bool = False,
        obj_ids: Sequence[int] | None = None,
        run_mem_encoder: bool = True,
        propagate_preflight: bool = False,
    ) -> Iterator[tuple[int, list[int], Tensor, Tensor, Tensor]]:
        """Follow all objects from frame to frame. Prompts given meanwhile count from the next frame on.

        Args:
            inference_state: From `init_state`.
            start_frame_idx: Default: the first prompted frame.
            max_frame_num_to_track: Frames after the first one; default: to the end of the video.
            reverse: Towards the beginning of the video.
            tqdm_disable: Accepted; no progress is drawn here (``python -m sam3.track`` does).
            obj_ids: Must be None: all objects are tracked.
            run_mem_encoder: Store memories. False is for a single frame: later ones cannot be tracked without them.
            propagate_preflight: Accepted; prompts that wait are always taken in first.

        Yields:
            Frame index, object ids, low-resolution logits (B, 1, 4 G, 4 G), logits at the video's size (B, 1, H, W)
            (above 0: the object), and object scores (B, 1) as logits (above 0: the object is in the frame).

        Raises:
            PromptError: If the start is no frame of the video, or several frames are to do without memories.
            RuntimeError: If there is no prompt at all.
            VideoDecodeError: If a frame cannot be decoded; what was tracked stays in the state.
        """
        state = require_state(inference_state)
        if not run_mem_encoder and max_frame_num_to_track != 0:
            raise PromptError("run_mem_encoder=False keeps no memory for later frames: set max_frame_num_to_track=0")
        if obj_ids is not None:
            raise PromptError(f"obj_ids must be None, got {obj_ids!r}: all objects are tracked; use remove_object")
        if max_frame_num_to_track not in (None, 0):
            require_count(max_frame_num_to_track, "max_frame_num_to_track")
        if start_frame_idx is not None:
            start_frame_idx = require_frame(state, start_frame_idx, "start_frame_idx")
        state.require_trackable()
        return self._propagate(state, start_frame_idx, max_frame_num_to_track, reverse, run_mem_encoder)

    def _propagate(
        self, state: TrackerState, start: int | None, max_frames: int | None, reverse: bool, run_mem_encoder: bool
    ) -> Iterator[tuple[int, list[int], Tensor, Tensor, Tensor]]:
        frame_idx = state.first_prompted_frame if start is None else start
        assert frame_idx is not None
        last = None if max_frames is None else frame_idx + (-max_frames if reverse else max_frames)
        while state.has_frame(frame_idx) and state.is_trackable:
            tracked = self.track_frame(state, frame_idx, reverse, run_mem_encoder)
            masks = self.masks_at_video_size(state, tracked.low_res_masks)
            yield frame_idx, tracked.obj_ids, tracked.low_res_masks, masks, tracked.object_score_logits
            if frame_idx == last:
                break
            frame_idx += -1 if reverse else 1

    # --- helpers ------------------------------------------------------------------------------------------------------

    def _check_edit(self, state: Any, frame_idx: Any, obj_id: Any) -> tuple[TrackerState, int, int]:
        state, obj_id = require_state(state), require_object_id(obj_id)
        return state, require_frame(state, frame_idx, is_prompt=True), obj_id

    def _require_editable(self, state: TrackerState, frame_idx: int) -> None:
        if state.policy is not None:
            state.policy.require_editable(state, frame_idx)

    def _add_object(self, state: TrackerState, obj_id: int) -> ObjectGroup:
        if self.objects == "independent" or not state.groups or state.groups[-1].has_started:
            state.groups.append(ObjectGroup())
        state.groups[-1].add_object(obj_id)
        return state.groups[-1]

    def _prompted(self, state: TrackerState, frame_idx: int) -> Prompted:
        return frame_idx, state.obj_ids, None, self.known_masks(state, frame_idx)
