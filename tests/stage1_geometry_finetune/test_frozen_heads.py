"""The frozen path is the deployed one: same level, same token, same masks; gradients pass through, not into it."""

from __future__ import annotations

import pytest
import torch
from geometry_world import CPU, SIDE, TEACHER_FILE, TINY, deployed_model, load_heads, make_prompts, scene

from sam3.checkpoint_io import CheckpointError, read_state_dict, write_merged
from sam3.model.data_misc import FindStage
from sam3.model.sam3_image_processor import Sam3Processor
from sam3_train.errors import UserError
from stage1_geometry_finetune.frozen_heads import FrozenHeads, trained_part_sizes
from stage1_geometry_finetune.prompt_formats import layouts, to_geometric_prompt, to_sam_prompt


def encode(image_index: int) -> dict:
    """A processor's state of one of the scene's images, encoded as `Sam3Processor.set_image` does."""
    images = scene()[0][image_index : image_index + 1]
    with torch.no_grad():
        backbone_out = deployed_model().backbone.forward_image(images)
    size = TINY.image_size_px
    return {"backbone_out": backbone_out, "original_height": size, "original_width": size}


@pytest.mark.parametrize("kind", ["b", "c", "x"])
def test_the_teachers_own_embedding_gives_the_deployed_detectors_masks_exactly(kind):
    """D-81, D-82: bit for bit what `Sam3Processor` computes for the same box or click."""
    heads, prompts = load_heads(), make_prompts(kind * 5)
    processor = Sam3Processor(deployed_model(), for_clicks=False)
    for index in (1, 4):  # one of each image
        image = int(prompts.image_of_object[index])
        one = prompts.select(torch.tensor([index]))
        boxes = None if kind == "c" else one.boxes_cxcywh
        points = None if kind == "b" else one.points_xy[0]
        state = processor.set_prompts(encode(image), boxes=boxes, points=points)
        with torch.no_grad():
            maps = heads.detector_maps(scene()[1][image : image + 1])
            answer = heads.detect(maps, one._replace(image_of_object=torch.zeros(1, dtype=torch.long)))
        raw = state["raw_outputs"]
        assert torch.equal(answer.mask_logits, raw["pred_masks"])
        assert torch.equal(answer.boxes, raw["pred_boxes"])
        assert torch.equal(answer.logits, raw["pred_logits"][..., 0])
        assert torch.equal(answer.presence, raw["presence_logit_dec"][:, 0])


@pytest.mark.parametrize("kind", ["b", "c", "x"])
def test_the_teachers_own_embedding_gives_the_deployed_predictors_masks_exactly(kind):
    """The same for the SAM heads, through ``predict_inst``."""
    heads, prompts = load_heads(), make_prompts(kind * 5)
    for index in (1, 4):  # one of each image
        image = int(prompts.image_of_object[index])
        one = prompts.select(torch.tensor([index]))._replace(image_of_object=torch.zeros(1, dtype=torch.long))
        points, labels = to_sam_prompt(one, TINY.image_size_px)
        box = None if kind == "c" else points[0, :2].flatten().numpy()
        clicks = None if kind == "b" else points[0, -1:].numpy()
        multimask = kind == "c"
        _, ious, low_res = deployed_model().predict_inst(
            encode(image),
            point_coords=clicks,
            point_labels=None if clicks is None else labels[0, -1:].numpy(),
            box=box,
            multimask_output=multimask,
        )
        with torch.no_grad():
            output = heads.segment(heads.sam_maps(scene()[1][image : image + 1]), one)
            shown = heads.model.heads.select(output, multimask)
        assert torch.equal(shown.mask_logits[0].clamp(-32, 32), torch.from_numpy(low_res))
        assert torch.equal(shown.ious[0], torch.from_numpy(ious))


def test_a_batch_of_objects_gives_what_each_alone_does():
    """D-83: objects of one image, and of several, do not see each other."""
    heads, prompts = load_heads(), make_prompts("bcxbc")
    with torch.no_grad():
        maps = heads.detector_maps(scene()[1])
        together = heads.detect(maps, prompts)
        for index in range(prompts.num_objects):
            alone = heads.detect(maps, prompts.select(torch.tensor([index])))
            for name, of_all, of_one in zip(alone._fields, together, alone, strict=True):
                torch.testing.assert_close(of_all[index : index + 1], of_one, rtol=1e-3, atol=2e-3, msg=name)


def test_the_level_and_the_number_of_tokens_are_those_of_deployment(monkeypatch):
    """D-81: one level more, or features of another grid, is an error and not another answer."""
    heads, features = load_heads(), scene()[1]
    grid = TINY.grid_size
    maps = heads.detector_maps(features)
    assert [level.shape[-1] for level in maps.levels] == [4 * grid, 2 * grid, grid]
    assert heads.mask_side == SIDE == 4 * grid
    with pytest.raises(ValueError, match="not those of a trunk"):
        heads.detector_maps(features[..., :-1])
    with pytest.raises(ValueError, match="not those of a trunk"):
        heads.sam_maps(features[:, :-1])
    seen = []
    hook = heads.model.transformer.encoder.register_forward_hook(lambda m, i, out: seen.append(out.memory.shape[0]))
    with torch.no_grad():
        heads.detect(maps, make_prompts())
    hook.remove()
    assert seen == [grid * grid]
    monkeypatch.setattr(heads.model.backbone.vision_backbone, "num_levels", 4)
    with pytest.raises(ValueError, match=f"from {grid} x {grid} = {grid * grid} tokens"):
        heads.detector_maps(features)


def test_sam3_reads_5184_tokens():
    """D-81: the released size, from its description alone."""
    from sam3.config import Sam3Config

    config = Sam3Config.preset("sam3")
    assert config.grid_size**2 == 5184
    assert config.embedding_shape == (1024, 72, 72)


def test_the_visual_token_is_part_of_every_prompt():
    """D-82: without it, or with another word, the answers are other ones."""
    heads, prompts = load_heads(), make_prompts("bbbbb")
    with torch.no_grad():
        maps = heads.detector_maps(scene()[1])
        visual = heads.detect(maps, prompts)
        words = deployed_model().backbone.forward_text(["visual", "circle"])
    text, mask = heads._text, heads._text_mask
    assert torch.equal(text, words["language_features"][:, :1])
    assert torch.equal(mask, words["language_mask"][:1])
    stage = FindStage(prompts.image_of_object, torch.ones(5, dtype=torch.long))
    with torch.no_grad():
        other = heads.model.forward_grounding(
            {"backbone_fpn": list(maps.levels), "vision_pos_enc": maps.positions, **words},
            stage,
            None,
            to_geometric_prompt(prompts),
        )
    assert not torch.allclose(other["pred_logits"][..., 0], visual.logits, atol=1e-3)


def test_neither_trunk_nor_text_encoder_is_resident():
    """D-90: of the released model's 860 M parameters, the trunk's 446 M and the text encoder's 354 M are never held."""
    heads = load_heads()
    names = [name for name, _ in heads.model.named_parameters()]
    assert names
    assert not [name for name in names if ".trunk." in name or "language_backbone" in name]
    assert not [name for name in names if "maskmem" in name], "the tracker's memory is not read either"
    whole = sum(p.numel() for p in deployed_model().parameters())
    held = sum(p.numel() for p in heads.model.parameters())
    text = sum(p.numel() for p in deployed_model().backbone.language_backbone.parameters())
    trunk = sum(p.numel() for p in deployed_model().backbone.vision_backbone.trunk.parameters())
    assert held == whole - text - trunk


def test_a_route_that_does_not_run_is_not_resident():
    detector, sam = load_heads(sam=False), load_heads(detector=False)
    assert not detector.has_sam
    assert detector.model.backbone.vision_backbone.sam2_convs is None
    assert sam.model.transformer is None
    assert sam.model.segmentation_head is None
    assert not len(sam.model.backbone.vision_backbone.convs)
    with pytest.raises(ValueError, match="without the detector"):
        sam.detect(detector.detector_maps(scene()[1]), make_prompts())
    with pytest.raises(ValueError, match="SAM heads"):
        detector.sam_maps(scene()[1])
    with pytest.raises(ValueError, match="without a route"):
        FrozenHeads.from_checkpoint(TEACHER_FILE, TINY, CPU, detector=False, sam=False)


def test_a_file_without_the_detector_is_refused(tmp_path):
    state, _ = read_state_dict(TEACHER_FILE)
    path = tmp_path / "heads.safetensors"
    kept = {k: v for k, v in state.items() if "geometry_encoder" not in k and "detector.transformer" not in k}
    write_merged(path, kept, {"variant": "tiny", "model": TINY.to_dict()})
    with pytest.raises(CheckpointError, match=r"geometry_encoder|transformer"):
        FrozenHeads.from_checkpoint(path, TINY, CPU)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradients_pass_through_frozen_parts_and_stay_out_of_them(checkpointing):
    heads = load_heads(checkpointing=checkpointing)
    features = scene()[1].clone().requires_grad_(True)
    answer = heads.detect(heads.detector_maps(features), make_prompts())
    (by_detector,) = torch.autograd.grad(answer.mask_logits.square().mean() + answer.logits.square().mean(), features)
    output = heads.segment(heads.sam_maps(features), make_prompts("ccccc"))
    (by_sam,) = torch.autograd.grad(output.mask_logits.square().mean(), features)
    for gradient in (by_detector, by_sam):
        assert gradient.isfinite().all()
        assert (gradient.flatten(1).abs().sum(1) > 0).all(), "both images are asked about"
    assert not [name for name, p in heads.model.named_parameters() if p.requires_grad or p.grad is not None]
    assert not [name for name, module in heads.model.named_modules() if module.training]


def test_recomputing_activations_changes_neither_answers_nor_gradients():
    results = []
    for checkpointing in (False, True):
        heads = load_heads(checkpointing=checkpointing)
        features = scene()[1].clone().requires_grad_(True)
        answer = heads.detect(heads.detector_maps(features), make_prompts())
        output = heads.segment(heads.sam_maps(features), make_prompts("bbbbb"))
        (gradient,) = torch.autograd.grad(answer.mask_logits.square().mean() + output.mask_logits.mean(), features)
        results.append((answer.mask_logits, output.mask_logits, gradient))
    for plain, recomputed in zip(*results, strict=True):
        assert torch.equal(plain, recomputed)


def test_answers_with_gradients_are_those_without():
    """Without gradients the deployed model takes shortcuts; they must mean the same."""
    heads, prompts = load_heads(), make_prompts()
    features = scene()[1]
    with torch.no_grad():
        fast = heads.detect(heads.detector_maps(features), prompts)
    slow = heads.detect(heads.detector_maps(features.clone().requires_grad_(True)), prompts)
    for name, a, b in zip(fast._fields, fast, slow, strict=True):
        torch.testing.assert_close(a, b.detach(), rtol=1e-3, atol=2e-3, msg=name)


def test_prompts_of_one_pass_through_the_sam_heads_have_one_layout():
    """The SAM heads attend to padding, which deployment never has."""
    prompts = make_prompts("bcxbc")
    groups = layouts(prompts)
    assert sorted(sorted(group.tolist()) for group in groups) == [[0, 3], [1, 4], [2]]
    for group in groups:
        points, labels = to_sam_prompt(prompts.select(group), TINY.image_size_px)
        assert points.shape[:2] == labels.shape
        assert (labels >= 0).all()
    with pytest.raises(ValueError, match="same layout"):
        to_sam_prompt(prompts, TINY.image_size_px)
    nothing = prompts.select(torch.tensor([0]))._replace(has_box=torch.tensor([False]))
    with pytest.raises(ValueError, match="neither box nor point"):
        to_sam_prompt(nothing, TINY.image_size_px)


def test_padding_points_do_not_change_the_detectors_answer():
    heads, prompts = load_heads(), make_prompts("ccccc")
    pad = torch.nn.functional.pad
    wide = prompts._replace(
        points_xy=pad(prompts.points_xy, (0, 0, 0, 2)),
        point_labels=pad(prompts.point_labels, (0, 2)),
        is_point=pad(prompts.is_point, (0, 2)),
    )
    with torch.no_grad():
        maps = heads.detector_maps(scene()[1])
        assert torch.equal(heads.detect(maps, prompts).mask_logits, heads.detect(maps, wide).mask_logits)


def test_a_copy_to_train_shares_all_but_what_is_trained():
    heads = load_heads()
    assert heads.trainable_copy() == (heads, {})
    copy, trained = heads.trainable_copy(neck=True, mask_decoder=True)
    own = dict(heads.model.named_parameters())
    assert trained
    for name, parameter in copy.model.named_parameters():
        is_trained = name in trained
        assert parameter.requires_grad == is_trained
        assert (parameter is own[name]) != is_trained, name
        assert torch.equal(parameter, own[name])
    assert not any(p.requires_grad for p in own.values()), "the teacher's stay frozen"
    unread = [n for n in trained if ".convs.3." in n or "semantic_seg_head" in n or "conv_layers.2" in n]
    assert not unread, "weights that no answer depends on are not trained"


def test_the_size_of_trained_parts_is_known_beforehand():
    expected = {
        (True, False): {"detector.backbone.vision_backbone.convs.", "detector.backbone.vision_backbone.sam2_convs."},
        (False, True): {"detector.segmentation_head.", "tracker.sam_mask_decoder."},
    }
    for (neck, decoder), prefixes in expected.items():
        sizes = trained_part_sizes(TINY, detector=True, sam=True, neck=neck, mask_decoder=decoder)
        assert set(sizes) == prefixes
        copy, trained = load_heads().trainable_copy(neck=neck, mask_decoder=decoder)
        saved = copy.released_parts(trained)
        for prefix, size in sizes.items():
            assert size == sum(v.numel() for k, v in saved.items() if k.startswith(prefix)) > 0
        assert sum(sizes.values()) == sum(v.numel() for v in saved.values())
    assert trained_part_sizes(TINY, detector=True, sam=True, neck=False, mask_decoder=False) == {}
    assert not load_heads().released_parts(())


def test_trained_parts_of_another_run_are_refused():
    copy, trained = load_heads().trainable_copy(neck=True)
    saved = {name: value.clone() for name, value in copy.released_parts(trained).items()}
    more = {**saved, "detector.segmentation_head.semantic_seg_head.bias": torch.zeros(1)}
    first = next(iter(saved))
    for wrong in (more, {k: v for k, v in saved.items() if k != first}, {**saved, first: saved[first][:1]}):
        with pytest.raises(UserError, match=r"run\.pth: the trained parts are not those of this run"):
            copy.load_released_parts(trained, wrong, "run.pth")
    changed = {name: value + 1 for name, value in saved.items()}
    copy.load_released_parts(trained, changed, "run.pth")
    assert all(torch.equal(v, changed[k]) for k, v in copy.released_parts(trained).items())
    assert torch.equal(load_heads().released_parts(trained)[first], saved[first]), "the teacher keeps its own"
