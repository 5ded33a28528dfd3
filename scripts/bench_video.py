"""The tracker at its real size beside Hugging Face's video session: one object, the same random weights and frames.

Each side runs in a process of its own, one after the other, as in ``bench_image.py``. Both read every frame through the
whole model: trunk, neck, memory attention, mask decoder, memory encoder. Ours also turns the frame's pixels into the
model's input, and drops what no later frame reads. Our settings are those under which the two agree:
``resize_before_squashing`` (the released tracker squashes first).
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from bench_model import PeakMemory
from hf_models import build_hf_tracker_video_model
from run_apart import run_apart
from torch import Tensor

from sam3.config import Sam3Config
from sam3.model.sam3_image import Sam3Image
from sam3.model.sam3_tracking_predictor import Sam3TrackerPredictor
from sam3.model_builder import assemble_image_model
from sam3.tracker_config import MemoryAttentionConfig, TrackerConfig

Row = dict[str, Any]
POINT_XY = (0.4, 0.5)
_PRESENCE_BIAS = 4.0
"""Added to the object score: with random weights, the object would be absent and its masks all the same."""
PARTS = {"frame_features": "trunk and neck", "condition": "memory attention", "decode": "mask decoder"}
PARTS["encode_memory"] = "memory encoder"


def choose_config(name: str) -> Sam3Config:
    """A preset, or ``quick``: as small as theirs can be built."""
    if name != "quick":
        return Sam3Config.preset(name)
    tiny = Sam3Config.preset("tiny")
    attention = MemoryAttentionConfig(num_layers=2, mlp_dim=128, dropout=0.0)
    heads = dataclasses.replace(tiny.sam_heads, head_hidden_dim=128)
    tracker = TrackerConfig(memory_attention=attention)
    return tiny.replace(name="quick", image_size_px=84, hidden_dim=128, sam_heads=heads, tracker=tracker)


def build_model(config: Sam3Config, device: torch.device) -> Sam3Image:
    """The model with random weights, the same in every process; what it is shown counts as an object that is there."""
    torch.manual_seed(0)
    model = assemble_image_model(config, device=device, enable_detector=False, enable_tracker=True)
    model.eval().requires_grad_(False)
    last_bias = list(model.tracker.sam_mask_decoder.pred_obj_score_head.parameters())[-1]
    last_bias.fill_(_PRESENCE_BIAS)
    return model


class Ours:
    """Our session."""

    def __init__(self, model: Sam3Image, frames: Tensor) -> None:
        """``frames``: uint8, (T, 3, S, S)."""
        self.seconds: defaultdict[str, float] = defaultdict(float)
        self._device = model.device
        predictor = Sam3TrackerPredictor(
            model, objects="independent", memory_policy="no_late_edits", resize_before_squashing=True
        )
        self._time(predictor, "frame_features")
        for name in ("condition", "decode", "encode_memory"):
            self._time(predictor.tracker, name)
        self._predictor = predictor
        self._state = predictor.init_state(video_path=frames)

    def _time(self, owner: Any, name: str) -> None:
        method = getattr(owner, name)

        def timed(*args: Any, **kwargs: Any) -> Any:
            start = now(self._device)
            result = method(*args, **kwargs)
            self.seconds[name] += now(self._device) - start
            return result

        setattr(owner, name, timed)

    def run(self) -> Iterator[Tensor]:
        """Low-resolution logits of each frame."""
        self._predictor.add_new_points_or_box(self._state, 0, 1, points=[POINT_XY], labels=[1], need_output=False)
        for _, _, low_res, _, _ in self._predictor.propagate_in_video(self._state, 0):
            yield low_res


class Theirs:
    """Hugging Face's session."""

    def __init__(self, model: Sam3Image, frames: Tensor) -> None:
        import transformers
        from transformers.models.sam3_tracker_video import modeling_sam3_tracker_video as module

        self.seconds: dict[str, float] = {}
        self._num_frames, size = len(frames), model.config.image_size_px
        self._hf: Any = build_hf_tracker_video_model(model).requires_grad_(False)
        video = torch.stack([model.preprocess(frame) for frame in frames])
        device = str(model.device)
        self._session = module.Sam3TrackerVideoInferenceSession(
            video=video,
            video_height=size,
            video_width=size,
            inference_device=device,
            inference_state_device=device,
            dtype=torch.float32,
        )
        processor = transformers.Sam3TrackerVideoProcessor
        prompts = processor.__new__(processor)  # prompts need none of its image processing
        prompts.target_size, prompts.point_pad_value = size, -10
        point = [c * size for c in POINT_XY]
        prompts.process_new_points_or_boxes_for_video_frame(
            self._session, 0, [1], input_points=[[[point]]], input_labels=[[[1]]]
        )

    def run(self) -> Iterator[Tensor]:
        """Low-resolution logits of each frame."""
        self._hf(self._session, frame_idx=0)
        for output in self._hf.propagate_in_video_iterator(
            self._session, start_frame_idx=0, max_frame_num_to_track=self._num_frames
        ):
            yield output.pred_masks


SIDES: dict[str, Callable[[Sam3Image, Tensor], Any]] = {"ours": Ours, "HF": Theirs}


def now(device: torch.device) -> float:
    """Seconds, after all work on a GPU is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def make_runner(side: str, config: Sam3Config, device: torch.device, num_frames: int) -> Any:
    """A side with its frames."""
    model = build_model(config, device)
    generator = torch.Generator().manual_seed(1)
    size = config.image_size_px
    frames = torch.randint(0, 256, (num_frames, 3, size, size), generator=generator, dtype=torch.uint8)
    return SIDES[side](model, frames)


@torch.inference_mode()
def measure(side: str, config_name: str, device: torch.device, num_frames: int, output: Path) -> dict[str, Any]:
    """One side in this process: seconds of each frame and of parts, bytes; the masks go to ``output``."""
    list(make_runner(side, choose_config("quick"), device, 2).run())  # packages and threads that start at first use
    runner = make_runner(side, choose_config(config_name), device, num_frames)
    seconds: list[float] = []
    masks: list[Tensor] = []
    with PeakMemory(device) as memory:
        start = now(device)
        for low_res in runner.run():
            seconds.append(now(device) - start)
            if not masks:
                runner.seconds.clear()  # of the prompted frame
            masks.append(low_res.to("cpu", copy=True))
            start = now(device)
    torch.save(torch.stack(masks), output)
    parts = {PARTS[name]: value / (num_frames - 1) for name, value in runner.seconds.items()}
    return {"seconds": seconds, "parts": parts, "peak_bytes": memory.bytes}


def compare(config_name: str, device: torch.device, num_frames: int) -> list[Row]:
    """Rows of both sides."""
    with tempfile.TemporaryDirectory() as folder:
        files = {side: Path(folder) / f"{side}.pt" for side in ("HF", "ours")}
        found = {side: run_apart(__file__, side, config_name, device, num_frames, path) for side, path in files.items()}
        masks = {side: torch.load(path, weights_only=True) for side, path in files.items()}
    label = f"{config_name} {choose_config(config_name).image_size_px} px float32, 1 object"
    times = {side: (r["seconds"][0], statistics.mean(r["seconds"][1:]), r["seconds"][-1]) for side, r in found.items()}
    rows: list[Row] = []
    for i, what in enumerate(("click and first frame", f"each of {num_frames - 1} tracked frames", "the last of them")):
        rows += _pair(f"{label}: {what}", times["ours"][i], times["HF"][i], "s", is_judged=i == 1)
    for what, seconds in found["ours"]["parts"].items():
        rows.append({"name": f"{label}: of a tracked frame, {what}, ours", "value": seconds, "unit": "s"})
    peaks = [found[side]["peak_bytes"] for side in ("ours", "HF")]
    if None not in peaks:
        ours, theirs = (peak / 2**20 for peak in peaks)
        rows += _pair(f"{label}: peak memory beyond weights and frames", ours, theirs, "MiB", is_judged=True)
    difference = float((masks["ours"] - masks["HF"]).abs().max())
    rows.append(
        {
            "name": f"{label}: largest difference of mask logits",
            "value": difference,
            "unit": "",
            "target": "<= 1e-3",
            "note": f"largest logit {float(masks['HF'].abs().max()):.3g}",
            "met": difference <= 1e-3,
        }
    )
    return rows


def _pair(name: str, ours: float, theirs: float, unit: str, is_judged: bool) -> list[Row]:
    row: Row = {"name": f"{name}, ours", "value": ours, "unit": unit}
    if is_judged:
        row |= {"target": f"<= {theirs:.4g} (HF)", "met": ours <= theirs}
    return [{"name": f"{name}, HF", "value": theirs, "unit": unit}, row]


def bench(quick: bool, device: torch.device) -> list[Row]:
    """Rows for ``scripts/bench.py``; ``quick`` takes the smallest model."""
    return compare("quick", device, 5) if quick else compare("sam3", device, 10)


def _main() -> None:
    parser = argparse.ArgumentParser(description="One side of the comparison; called by bench().")
    parser.add_argument("side", choices=sorted(SIDES))
    parser.add_argument("config_name")
    parser.add_argument("device", type=torch.device)
    parser.add_argument("num_frames", type=int)
    parser.add_argument("output", type=Path)
    print(json.dumps(measure(**vars(parser.parse_args()))))


if __name__ == "__main__":
    _main()
