"""The checks of ``verify_training_pipeline.py``: each looks at a training on generated clips and says what it saw."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from sam3.efficient_keys import own_weights
from sam3.loading import load_model
from sam3.model.clip_forward import ClipPlan
from sam3.model.efficient_sam3_tracker import EfficientSam3Tracker
from sam3.model.efficient_sam3_train import is_trained
from sam3.model.sam3_tracking_predictor import Sam3TrackerPredictor
from sam3_train.checkpoint import load_checkpoint, state_dict_sha256
from stage2.generated_clips import SIDE_PX, SIZE_HW
from stage2.merge import MergeRequest, merge_files
from stage2.run import FINAL_NAME
from stage2.verification import NUM_CLIPS, NUM_FRAMES, VIDEO_NAMES, Verification

_STEPS = 8
_FALL = 0.9
"""The loss of the same clips after `_STEPS` steps, as a share of the first one, must be below this."""


class CheckError(Exception):
    """Something is not as it should be."""


def require(is_fine: bool, problem: str) -> None:
    """Raise a `CheckError` unless something is as it should be."""
    if not is_fine:
        raise CheckError(problem)


def check_clips(v: Verification) -> str:
    """Shapes, and masks that fit their frames."""
    clips, side = v.clips, v.model.config.image_size_px
    cells = 4 * v.model.config.grid_size
    require(tuple(clips.pixels.shape) == (NUM_CLIPS, NUM_FRAMES, 3, side, side), f"pixels {clips.pixels.shape}")
    require(clips.coverage.shape[0] == NUM_FRAMES, f"masks of {clips.coverage.shape[0]} frames")
    require(tuple(clips.coverage.shape[2:]) == (cells, cells), f"masks {tuple(clips.coverage.shape)}")
    require(bool((clips.coverage.flatten(2).amax(2) > 0).all()), "an object is missing on a frame that shows it")
    steps = clips.frame_numbers.diff(dim=1).abs()
    require(bool((steps % 4 == 0).all()), f"frames {clips.frame_numbers.tolist()} are not the annotated ones")
    return f"{NUM_CLIPS} x {NUM_FRAMES} frames of {side} px, {clips.num_objects} objects, masks {cells} x {cells}"


def check_features(v: Verification) -> str:
    """What the frozen backbone hands over, without a gradient."""
    config = v.model.config
    frames = v.model.clip_features(v.clips.images(v.model.preprocess), 1)
    grid, dim = config.grid_size, config.hidden_dim
    expected = [(dim // 8, 4 * grid), (dim // 4, 2 * grid), (dim, grid)]
    for frame in frames:
        shapes = [tuple(level.shape) for level in frame]
        require(shapes == [(NUM_CLIPS, c, s, s) for c, s in expected], f"maps are {shapes}")
        require(not any(level.requires_grad for level in frame), "the backbone's features carry a gradient")
        require(all(bool(level.isfinite().all()) for level in frame), "a feature is not finite")
    return f"{len(frames)} frames, coarse maps {dim} x {grid} x {grid}, no gradient"


def check_tokens(v: Verification) -> str:
    """How many tokens of a frame are stored, and that each knows where it looks."""
    memory, model = v.model.memory, v.model
    dense = model.config.grid_size**2
    with torch.no_grad():
        stored = v.play(ClipPlan("mask", (0,))).bank.cond[0].maskmem_features
        codes = model.token_codes((model.config.grid_size, model.config.grid_size))
    require(stored is not None, "the first frame left no memory")
    assert stored is not None
    wanted = (v.clips.num_objects, memory.num_tokens or dense, model.settings.mem_dim)
    require(tuple(stored.shape) == wanted, f"a frame stores {tuple(stored.shape)}, not {wanted}")
    if memory.is_compressed and memory.initial_frames != "zero_token":  # the published rules have no positions
        _check_positions(v, codes)
    return f"{wanted[1]} of {wanted[2]} numbers instead of {dense} ({dense / wanted[1]:.0f}x), {len(codes)} codes"


def _check_positions(v: Verification, codes: Tensor) -> None:
    """Tokens of windows must have codes of their own; tokens of the whole frame must notice where its cells are."""
    memory, grid = v.model.memory, v.model.config.grid_size
    windows = codes[memory.num_latents :]
    require(len(windows.unique(dim=0)) == len(windows), "the tokens of some windows have the same position")
    generator = torch.Generator().manual_seed(0)
    dense = torch.randn(1, v.model.settings.mem_dim, grid * grid, generator=generator).to(codes)
    order = torch.randperm(grid * grid, generator=generator).to(codes.device)
    with torch.no_grad():
        found = [v.model.compress(cells.unflatten(-1, (grid, grid))) for cells in (dense, dense[..., order])]
    first, second = (tokens[:, : memory.num_latents] for tokens in found)
    is_blind = bool(memory.num_latents) and torch.allclose(first, second, atol=1e-3 * float(first.abs().max()))
    require(not is_blind, "the tokens are the same wherever things are: keys have no spatial position")


def check_clicks(v: Verification) -> str:
    """An object in the bottom right corner is clicked and boxed there, in pixels of the model's input."""
    side, model = v.model.config.image_size_px, v.model
    is_corner = (v.clips.object_ids == 1).to(v.run.device)
    require(bool(is_corner.any()), "the batch does not show the object in the corner")
    seen: list[Tensor] = []
    decode = model.decode

    def watched(features: Any, conditioned: Tensor, num: int, points: Any = None, *rest: Any) -> Any:
        if points is not None:
            seen.append(points[0][is_corner, -1].detach())
        return decode(features, conditioned, num, points, *rest)

    model.decode = watched  # type: ignore[method-assign, assignment]
    try:
        with torch.no_grad():
            for kind in ("click", "box"):
                v.play(ClipPlan(kind, (0,)))
    finally:
        del model.decode
    require(len(seen) == 2, f"{len(seen)} of 2 prompts arrived at the decoder")
    shares = torch.tensor([1 - SIDE_PX / SIZE_HW[1], 1 - SIDE_PX / SIZE_HW[0]], device=v.run.device)
    least = (shares - 0.05) * side  # a box is jittered
    for points in seen:
        require(bool((points >= least).all()), f"points {points.tolist()} are not in the corner of {side} px")
    x, y = seen[0][0].tolist()
    return f"a click at ({x:.0f}, {y:.0f}) and a box in the corner of {side} x {side} px"


def check_modes(v: Verification) -> str:
    """In training mode nothing frozen trains, and all that is trained does."""
    v.task.train()
    modules = {name: module for name, module in v.model.named_modules() if name}
    awake = [name for name, module in modules.items() if module.training and not is_trained(f"{name}.")]
    asleep = [name for name, module in modules.items() if not module.training and is_trained(f"{name}.")]
    require(not awake, f"{len(awake)} frozen modules are in training mode, such as {awake[:1]}")
    require(not asleep, f"{len(asleep)} trained modules are in eval mode, such as {asleep[:1]}")
    loose = [name for name, p in v.model.named_parameters() if p.requires_grad != is_trained(name)]
    require(not loose, f"{len(loose)} parameters are frozen and trainable or the reverse, such as {loose[:1]}")
    num_trained = sum(module.training for module in modules.values())
    return f"{num_trained} modules train, {len(modules) - num_trained} do not"


def check_gradients(v: Verification) -> str:
    """Every trained parameter gets a finite gradient, no other one any."""
    v.task.train()
    torch.manual_seed(0)
    v.task.zero_grad(set_to_none=True)
    v.task(v.batch)["loss"].backward()
    parameters = dict(v.model.named_parameters())
    frozen = [n for n, p in parameters.items() if p.grad is not None and not is_trained(n)]
    without = [n for n, p in parameters.items() if is_trained(n) and p.grad is None]
    broken = [n for n, p in parameters.items() if p.grad is not None and not bool(p.grad.isfinite().all())]
    zero = [n for n, p in parameters.items() if p.grad is not None and not bool(p.grad.any())]
    # Its row is read where an object was away on a remembered frame, and these squares never are.
    zero = [name for name in zero if name != "no_obj_embed_spatial"]
    for names, problem in (
        (frozen, "frozen parameters have a gradient"),
        (without, "trained parameters have none"),
        (broken, "gradients are not finite"),
        (zero, "gradients are zero"),
    ):
        require(not names, f"{len(names)} {problem}, such as {names[:1]}")
    trained = sum(p.grad is not None for p in parameters.values())
    return f"{trained} of {len(parameters)} parameters, all finite, none of a frozen one"


def check_step(v: Verification) -> str:
    """Each trained parameter is in one group and moves; nothing else does."""
    optimizer = v.optimizer()
    grouped = [id(p) for group in optimizer.param_groups for p in group["params"]]
    trained = [p for p in v.task.parameters() if p.requires_grad]
    require(len(grouped) == len(set(grouped)), "a parameter is in two optimizer groups")
    require(set(grouped) == {id(p) for p in trained}, "the optimizer's parameters are not the trained ones")
    names = v.model.state_dict().keys()
    frozen = {name: value for name, value in v.model.state_dict().items() if not is_trained(name)}
    before, memory = state_dict_sha256(frozen), {n: v.clone() for n, v in v.model.trained_state().items()}
    v.step(optimizer)
    require(state_dict_sha256(frozen) == before, "a frozen weight or buffer changed")
    moved = [name for name, value in v.model.trained_state().items() if not torch.equal(value, memory[name])]
    require(len(moved) >= len(memory) - 1, f"only {len(moved)} of {len(memory)} trained tensors moved")
    return f"{len(moved)} of {len(memory)} trained tensors moved, {len(names) - len(memory)} others did not"


def check_loss(v: Verification) -> str:
    """The loss of the same clips falls."""
    optimizer = v.optimizer()
    losses = [v.step(optimizer) for _ in range(_STEPS)]
    text = f"{losses[0]:.4f} to {losses[-1]:.4f} in {_STEPS} steps on the same clips"
    require(losses[-1] < _FALL * losses[0], f"from {text}")
    return text


def check_save(v: Verification) -> str:
    """A run through the loop ends with a checkpoint of what was trained alone, and the final file."""
    whole = v.train("whole")
    state = load_checkpoint(whole / "ckpt_epoch_0.pth")
    memory = v.model.trained_state().keys()
    require(memory <= state["model"].keys(), "the checkpoint lacks trained tensors")
    backbone = [name for name in state["model"] if name.startswith("backbone.")]
    require(not backbone, f"the checkpoint holds the backbone: {backbone[:1]}")
    require((whole / FINAL_NAME).is_file(), f"there is no {FINAL_NAME}")
    size_mb = (whole / FINAL_NAME).stat().st_size / 1e6
    return f"{len(memory)} trained tensors after {state['step']} steps; {FINAL_NAME} has {size_mb:.1f} MB"


def check_resume(v: Verification) -> str:
    """A run that was stopped and continued ends with the same weights."""
    v.train("parts", "--max-steps", "1")
    v.train("parts")
    whole, parts = (load_checkpoint(v.folder / name / "ckpt_epoch_0.pth") for name in ("whole", "parts"))
    differing = [name for name, value in whole["model"].items() if not torch.equal(value, parts["model"][name])]
    if v.run.device.type == "cpu":
        require(not differing, f"{len(differing)} tensors differ, such as {differing[:1]}")
        return f"stopped after step 1 of {whole['step']}, continued: bit for bit the same"
    worst = max(float((whole["model"][n] - parts["model"][n]).abs().max()) for n in whole["model"])
    require(worst < 1e-2, f"weights differ by up to {worst:.1e}")
    return f"stopped after step 1 of {whole['step']}, continued: the same to {worst:.0e} ({v.run.device.type})"


def check_merge(v: Verification) -> str:
    """Every trained tensor arrives beside what was there."""
    result = merge_files(MergeRequest(v.folder / "whole" / FINAL_NAME, v.base, v.merged))
    report = result.report
    require(report.num_trained == len(v.model.trained_state()), f"{report.num_trained} tensors were merged")
    new = f"{report.num_trained} trained tensors, {report.num_new} of them new to SAM 3"
    return f"{new}, beside {report.num_kept} kept ones"


def check_reload(v: Verification) -> str:
    """The merged file opens strictly and tracks with the memory that was trained."""
    opened = load_model(v.merged, v.run.device)
    require(isinstance(opened.tracker, EfficientSam3Tracker), "the merged file opens without its compressed memory")
    assert opened.tracker is not None
    found = own_weights(opened.tracker.state_dict())
    trained = load_checkpoint(v.folder / "whole" / FINAL_NAME)["model"]
    wanted = own_weights(trained)
    worst = max(float((found[n].cpu() - wanted[n]).abs().max()) for n in wanted)
    require(found.keys() == wanted.keys() and worst < 1e-2, f"its memory differs by up to {worst:.1e}")
    return f"{_tracked(v, opened)} (weights to {worst:.0e})"


def check_full_memory(v: Verification) -> str:
    """The same file still holds SAM 3's own memory, and a click on a fresh frame works with it."""
    opened, before = (load_model(path, v.run.device, memory="full") for path in (v.merged, v.base))
    assert opened.tracker is not None and before.tracker is not None
    mine, theirs = opened.tracker.state_dict(), before.tracker.state_dict()
    require(all(torch.equal(mine[n], v) for n, v in theirs.items()), "SAM 3's own tracker was changed")
    return f"{len(theirs)} tensors of the tracker bit for bit; {_tracked(v, opened)}"


def _tracked(v: Verification, model: Any) -> str:
    """Follow the object in the corner from one click through a session."""
    frames = sorted((v.folder / "videos" / VIDEO_NAMES[0]).glob("*.jpg"))[:NUM_FRAMES]
    predictor = Sam3TrackerPredictor(model)
    state = predictor.init_state(video_path=[Image.open(path) for path in frames])
    predictor.add_new_points_or_box(state, 0, 1, points=[[0.92, 0.9]], labels=[1])
    masks = [masks for *_, masks, _ in predictor.propagate_in_video(state)]
    require(len(masks) == NUM_FRAMES, f"a session gave {len(masks)} of {NUM_FRAMES} frames")
    require(all(bool(each.isfinite().all()) for each in masks), "a session's masks are not finite")
    return f"a session tracks {len(masks)} frames from one click"


CHECKS: tuple[tuple[str, Callable[[Verification], str]], ...] = (
    ("clips", check_clips),
    ("features", check_features),
    ("tokens of a frame", check_tokens),
    ("click coordinates", check_clicks),
    ("frozen modes", check_modes),
    ("gradients", check_gradients),
    ("one step", check_step),
    ("loss falls", check_loss),
    ("save", check_save),
    ("resume", check_resume),
    ("merge", check_merge),
    ("reload, compressed", check_reload),
    ("reload, SAM 3's own", check_full_memory),
)
"""In this order: later ones read what earlier ones wrote."""
