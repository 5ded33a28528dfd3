"""The image model at its real size beside Hugging Face's: one image with text and box, then many texts on that image.

Both get the same random weights. Each runs in a process of its own, one after the other, so that neither the memory of
one counts for the other nor two models of 3.4 GB have to fit at once.

Peak memory is judged against "weights + activations": the bytes of all parameters and buffers, plus the most bytes of
live tensors at any moment of the forward pass, counted operation by operation. What a process needs beyond that is
overhead: scratch space of kernels, fragments, copies that are no tensors. The target allows 20 % of it. The counting
takes both sides some milliseconds.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
import weakref
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from bench_model import PeakMemory
from hf_models import build_hf_image_model
from run_apart import run_apart
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from sam3.config import Sam3Config
from sam3.model.data_misc import FindStage
from sam3.model.prompt import Prompt
from sam3.model.sam3_image import Sam3Image
from sam3.model_builder import assemble_image_model

Row = dict[str, Any]
TEXT = "a yellow school bus"
BOX_CXCYWH = (0.4, 0.5, 0.3, 0.2)
COMPARED = ("masks", "boxes", "logits", "presence")


class LiveTensors(TorchDispatchMode):
    """Counts the bytes of all tensors that are made while it is active, and their peak. Views cost nothing."""

    def __init__(self, known: Iterable[Tensor]) -> None:
        """``known``: tensors that do not count, such as weights."""
        super().__init__()
        self._seen: weakref.WeakSet[torch.UntypedStorage] = weakref.WeakSet(t.untyped_storage() for t in known)
        self._known = list(self._seen)
        self.bytes = 0
        self.peak_bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                self._count(tensor.untyped_storage())
        self.peak_bytes = max(self.peak_bytes, self.bytes)
        return result

    def _count(self, storage: torch.UntypedStorage) -> None:
        if storage in self._seen:
            return
        self._seen.add(storage)
        self.bytes += storage.nbytes()
        weakref.finalize(storage, self._forget, storage.nbytes())

    def _forget(self, num_bytes: int) -> None:
        self.bytes -= num_bytes


class Ours:
    """Our model behind the three calls that are measured."""

    def __init__(self, model: Sam3Image) -> None:
        self.model: nn.Module = model
        self._model = model

    def encode(self, image: Tensor) -> Any:
        """Everything that the prompts on an image share."""
        return self._model.backbone.forward_image(image)

    def find(self, features: Any, text: str, box: bool) -> dict[str, Tensor]:
        """One prompt on an encoded image."""
        model = self._model
        backbone_out = features | model.backbone.forward_text([text])
        prompt = None
        if box:
            prompt = Prompt(box_embeddings=torch.tensor([[BOX_CXCYWH]], device=model.device))
        out = model.forward_grounding(backbone_out, FindStage.of([0], [0], model.device), geometric_prompt=prompt)
        return {
            "masks": out["pred_masks"],
            "boxes": out["pred_boxes_xyxy"],
            "logits": out["pred_logits"].squeeze(-1),
            "presence": out["presence_logit_dec"],
        }


class Theirs:
    """Hugging Face's model behind the same calls."""

    def __init__(self, model: Sam3Image) -> None:
        assert model.backbone.language_backbone is not None
        self._tokenize = model.backbone.language_backbone.tokenizer
        self._device = model.device
        self.model: Any = build_hf_image_model(model).requires_grad_(False)

    def encode(self, image: Tensor) -> Any:
        """Everything that the prompts on an image share."""
        return self.model.get_vision_features(image)

    def find(self, features: Any, text: str, box: bool) -> dict[str, Tensor]:
        """One prompt on an encoded image."""
        ids = self._tokenize([text]).to(self._device)
        boxes: dict[str, Tensor] = {}
        if box:
            boxes["input_boxes"] = torch.tensor([[BOX_CXCYWH]], device=self._device)
            boxes["input_boxes_labels"] = torch.ones(1, 1, dtype=torch.long, device=self._device)
        out = self.model(vision_embeds=features, input_ids=ids, attention_mask=(ids != 0).long(), **boxes)
        return {
            "masks": out.pred_masks,
            "boxes": out.pred_boxes,
            "logits": out.pred_logits,
            "presence": out.presence_logits,
        }


SIDES: dict[str, Callable[[Sam3Image], Any]] = {"ours": Ours, "HF": Theirs}


def seconds_of(call: Callable[[], Any], device: torch.device) -> tuple[float, Any]:
    """Wall time of a call, and what it returns."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    result = call()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start, result


def make_runner(side: str, preset: str, device: torch.device) -> tuple[Any, Tensor]:
    """A side with random weights, the same for both, and an image."""
    config = Sam3Config.preset(preset)
    model = assemble_image_model(config, device="meta").to_empty(device=device).eval().requires_grad_(False)
    torch.manual_seed(0)
    for name, weight in model.named_parameters():
        if weight.ndim > 1:  # as PyTorch begins, without the slower distributions of a real beginning
            weight.uniform_(-1, 1).mul_((3 / weight[0].numel()) ** 0.5)
        else:
            weight.fill_(float(name.endswith("weight")))
    image = torch.rand(1, 3, config.image_size_px, config.image_size_px, device=device) * 2 - 1
    return SIDES[side](model), image


@torch.inference_mode()
def measure(side: str, preset: str, device: torch.device, num_prompts: int, output: Path) -> dict[str, Any]:
    """One side in this process: seconds and bytes; the results of text and box go to ``output``."""
    warm_up, image = make_runner(side, "tiny", device)  # packages that are imported at their first use, threads
    warm_up.find(warm_up.encode(image), TEXT, box=True)
    runner, image = make_runner(side, preset, device)
    if device.type == "cuda":
        runner.find(runner.encode(image), TEXT, box=True)
    weights = [*runner.model.parameters(), *runner.model.buffers()]
    with PeakMemory(device) as memory, LiveTensors([*weights, image]) as live:
        encode_s, features = seconds_of(lambda: runner.encode(image), device)
        prompt_s, found = seconds_of(lambda: runner.find(features, TEXT, box=True), device)
    encode_again_s, _ = seconds_of(lambda: runner.encode(image) and None, device)
    torch.save({name: value.cpu() for name, value in found.items()}, output)
    del found
    texts = [f"thing number {i}" for i in range(num_prompts)]
    many_s, _ = seconds_of(lambda: [runner.find(features, text, box=False) and None for text in texts], device)
    again_s, _ = seconds_of(lambda: runner.find(features, texts[0], box=False), device)
    return {
        "encode_s": min(encode_s, encode_again_s),
        "prompt_s": prompt_s,
        "per_prompt_s": many_s / num_prompts,
        "again_s": again_s,
        "peak_bytes": memory.bytes,
        "weight_bytes": sum({t.data_ptr(): t.nbytes for t in weights}.values()),
        "activation_bytes": live.peak_bytes,
    }


def compare(preset: str, device: torch.device, num_prompts: int) -> list[Row]:
    """Rows of both sides."""
    with tempfile.TemporaryDirectory() as folder:
        files = {side: Path(folder) / f"{side}.pt" for side in ("HF", "ours")}
        results = {side: run_apart(__file__, side, preset, device, num_prompts, path) for side, path in files.items()}
        found = {side: torch.load(path, weights_only=True) for side, path in files.items()}
    label = f"{preset} {Sam3Config.preset(preset).image_size_px} px float32"
    rows: list[Row] = []
    for side, result in results.items():
        result["total_s"] = result["encode_s"] + result["prompt_s"]
        rows.append({"name": f"{label}: weights, {side}", "value": result["weight_bytes"] / 2**20, "unit": "MiB"})
    for field, what in (
        ("total_s", "one image with text and box"),
        ("encode_s", "encoding the image"),
        ("prompt_s", "its first prompt, text and box"),
        ("per_prompt_s", f"each of {num_prompts} further texts on the encoded image"),
        ("again_s", "a text that was asked before"),
    ):
        ours, theirs = results["ours"][field], results["HF"][field]
        rows.append({"name": f"{label}: {what}, HF", "value": theirs, "unit": "s"})
        row = {"name": f"{label}: {what}, ours", "value": ours, "unit": "s"}
        rows.append(row | {"target": f"<= {theirs:.4g} (HF)", "met": ours <= theirs})
    rows += [row for side in results for row in _memory_rows(label, side, results[side])]
    difference = max(float((found["ours"][name] - found["HF"][name]).abs().max()) for name in COMPARED)
    rows.append(
        {
            "name": f"{label}: largest difference of masks, boxes and scores",
            "value": difference,
            "unit": "",
            "target": "<= 1e-4",
            "note": f"largest mask logit {float(found['HF']['masks'].abs().max()):.3g}",
            "met": difference <= 1e-4,
        }
    )
    return rows


def _memory_rows(label: str, side: str, result: dict[str, Any]) -> list[Row]:
    weights, activations, peak = (result[key] for key in ("weight_bytes", "activation_bytes", "peak_bytes"))
    rows: list[Row] = [
        {"name": f"{label}: live tensors at the peak, {side}", "value": activations / 2**20, "unit": "MiB"}
    ]
    if peak is not None:
        share = (weights + peak) / (weights + activations)
        rows.append({"name": f"{label}: peak memory beyond weights, {side}", "value": peak / 2**20, "unit": "MiB"})
        row = {"name": f"{label}: peak memory / (weights + live tensors), {side}", "value": share, "unit": "x"}
        rows.append(row | ({"target": "<= 1.2", "met": share <= 1.2} if side == "ours" else {}))
    return rows


def import_rows(runs: int) -> list[Row]:
    """Seconds to import torch alone and this package, each in fresh processes; the best of ``runs``."""
    statements = {
        "torch": "import torch",
        "sam3": "import torch, sam3",
        "sam3 with everything that building and loading needs": "import sam3; sam3.load_model; sam3.Sam3Processor",
    }
    best: dict[str, float] = {}
    for _ in range(runs):
        for name, statement in statements.items():
            start = time.perf_counter()
            subprocess.run([sys.executable, "-c", statement], check=True)
            best[name] = min(best.get(name, float("inf")), time.perf_counter() - start)
    rows: list[Row] = [{"name": "import torch", "value": best.pop("torch"), "unit": "s"}]
    limit = 1.5 * rows[0]["value"]
    for name, seconds in best.items():
        row = {"name": f"import {name}", "value": seconds, "unit": "s"}
        is_judged = name == "sam3"
        rows.append(row | ({"target": f"< {limit:.3g} (1.5x torch)", "met": seconds < limit} if is_judged else {}))
    return rows


def bench(quick: bool, device: torch.device) -> list[Row]:
    """Rows for ``scripts/bench.py``; ``quick`` takes the tiny preset."""
    rows = compare("tiny" if quick else "sam3", device, num_prompts=3 if quick else 100)
    return rows + import_rows(runs=1 if quick else 5)


def _main() -> None:
    parser = argparse.ArgumentParser(description="One side of the comparison; called by bench().")
    parser.add_argument("side", choices=sorted(SIDES))
    parser.add_argument("preset")
    parser.add_argument("device", type=torch.device)
    parser.add_argument("num_prompts", type=int)
    parser.add_argument("output", type=Path)
    print(json.dumps(measure(**vars(parser.parse_args()))))


if __name__ == "__main__":
    _main()
