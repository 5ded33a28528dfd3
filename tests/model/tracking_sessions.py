"""A tiny tracker that sees its objects, and two sessions of it that are told the same story."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
import torch
from golden import table, tracker_value
from torch import Tensor

from sam3.config import Sam3Config
from sam3.model.memory_policy import EditRefusedError, KeepEverything
from sam3.model.sam3_image import Sam3Image
from sam3.model.sam3_tracker import TrackerFeatures
from sam3.model.sam3_tracking_predictor import Sam3TrackerPredictor
from sam3.model.tracker_state import TrackerState
from sam3.model_builder import assemble_image_model

VIDEO_HW = (24, 32)


def noise_frames(num_frames: int) -> list[np.ndarray]:
    """Noise, the same whenever it is asked for, as uint8 (H, W, 3)."""
    return list(np.random.default_rng(0).integers(0, 256, (num_frames, *VIDEO_HW, 3), dtype=np.uint8))


def small_config(**tracker: Any) -> Sam3Config:
    """The tiny preset on an 8 x 8 grid."""
    tiny = Sam3Config.preset("tiny")
    trunk = dataclasses.replace(tiny.trunk, depth=2, global_blocks=(1,), window_size=4)
    return tiny.replace(name="small", image_size_px=112, trunk=trunk, tracker=tiny.tracker.replace(**tracker))


def small_model(**tracker: Any) -> Sam3Image:
    """A model whose weights depend on their names alone; what it is shown counts as an object that is there."""
    torch.manual_seed(0)
    model = assemble_image_model(small_config(**tracker), enable_detector=False, enable_tracker=True).eval()
    weights = {k: tracker_value(k, tuple(v.shape)) for k, v in model.tracker.state_dict().items()}
    model.tracker.load_state_dict(weights)
    return model.requires_grad_(False)


class HandedInFeatures(Mapping):
    """Features of any frame, made when they are asked for: as a trunk would give them, without its time."""

    def __init__(self, config: Sam3Config, num_frames: int) -> None:
        self._config, self._num_frames = config, num_frames
        self._made: dict[int, TrackerFeatures] = {}

    def __getitem__(self, frame_idx: int) -> TrackerFeatures:
        if not 0 <= frame_idx < self._num_frames:
            raise KeyError(frame_idx)
        if frame_idx not in self._made:
            dim, side = self._config.hidden_dim, self._config.grid_size
            shapes = ((1, dim // 8, 4 * side, 4 * side), (1, dim // 4, 2 * side, 2 * side), (1, dim, side, side))
            maps = (table(f"input.frame{frame_idx}.level{i}", shape) for i, shape in enumerate(shapes))
            self._made[frame_idx] = TrackerFeatures(*maps)
        return self._made[frame_idx]

    def __iter__(self) -> Iterator[int]:
        return iter(range(self._num_frames))

    def __len__(self) -> int:
        return self._num_frames


class TwinSessions:
    """A session that keeps everything beside one with a policy; each step's results must be equal to the last bit."""

    def __init__(self, predictor: Sam3TrackerPredictor, policy: KeepEverything, num_frames: int, seed: int = 0) -> None:
        features = HandedInFeatures(predictor.model.config, num_frames)
        self.predictor, self.num_frames = predictor, num_frames
        self.chance = random.Random(seed)
        self.num_refused = self.num_compared = 0
        self.pruned, self.full = (
            predictor.init_state(*VIDEO_HW, num_frames, cached_features=features, memory_policy=memory_policy)
            for memory_policy in (policy, None)
        )

    def both(self, step: Callable[[TrackerState], Any]) -> bool:
        """Do something in both sessions, unless the policy refuses it; returns whether it was done."""
        try:
            found = step(self.pruned)
        except EditRefusedError:
            self.num_refused += 1
            return False
        self.compare(found, step(self.full))
        return True

    def compare(self, found: Any, wanted: Any) -> None:
        """Check that two results of a step are the same."""
        if isinstance(wanted, Tensor):
            assert torch.equal(found, wanted)
            self.num_compared += 1
        elif isinstance(wanted, (tuple, list)):
            assert len(found) == len(wanted)
            for one, other in zip(found, wanted, strict=True):
                self.compare(one, other)
        else:
            assert found == wanted

    def click(self, frame_idx: int, obj_id: int) -> bool:
        """Click somewhere, on the object or off it."""
        point = [[round(self.chance.random(), 3), round(self.chance.random(), 3)]]
        label = [int(self.chance.random() < 0.7)]
        add = self.predictor.add_new_points_or_box
        return self.both(lambda state: add(state, frame_idx, obj_id, point, label, clear_old_points=False))

    def box(self, frame_idx: int, obj_id: int) -> bool:
        """Draw a box somewhere."""
        x, y = self.chance.random() * 0.5, self.chance.random() * 0.5
        box = [x, y, x + 0.4, y + 0.3]
        return self.both(lambda state: self.predictor.add_new_points_or_box(state, frame_idx, obj_id, box=box))

    def mask(self, frame_idx: int, obj_id: int) -> bool:
        """Draw a mask somewhere."""
        top, left = self.chance.randrange(12), self.chance.randrange(16)
        mask = torch.zeros(VIDEO_HW, dtype=torch.bool)
        mask[top : top + 10, left : left + 12] = True
        return self.both(lambda state: self.predictor.add_new_mask(state, frame_idx, obj_id, mask))

    def prompt(self, frame_idx: int, obj_id: int) -> bool:
        """One of them."""
        return self.chance.choice((self.click, self.box, self.mask))(frame_idx, obj_id)

    def clear(self, frame_idx: int, obj_id: int) -> bool:
        """Take an object's prompts on a frame back."""
        return self.both(lambda state: self.predictor.clear_all_points_in_frame(state, frame_idx, obj_id))

    def remove(self, obj_id: int) -> bool:
        """Remove an object."""
        return self.both(lambda state: self.predictor.remove_object(state, obj_id))

    def track(self, start: int, stop: int, reverse: bool = False) -> bool:
        """Track from a frame to another one, both included, frame by frame; stops where the policy refuses."""
        for frame_idx in range(start, stop + (-1 if reverse else 1), -1 if reverse else 1):
            done = self.both(lambda state, t=frame_idx: list(self.predictor.propagate_in_video(state, t, 0, reverse)))
            if not done:
                return False
        return True
