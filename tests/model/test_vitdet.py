"""What the trunk does beyond the golden vectors: other sizes, other dtypes, training, saving and loading."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from sam3.config import Sam3Config, TrunkConfig
from sam3.model.necks import Sam3DualViTDetNeck
from sam3.model.vitdet import ViT, apply_rotary, drop_path, join_windows, rotary_table, split_windows
from sam3.model.vl_backbone import SAM3VLBackbone
from sam3.model_builder import assemble_image_model, build_sam3_image_model

TINY = Sam3Config.preset("tiny")


@pytest.fixture
def trunk() -> ViT:
    torch.manual_seed(0)
    return ViT(TINY.trunk, TINY.image_size_px).eval()


def images(side: int = TINY.image_size_px, batch: int = 1) -> torch.Tensor:
    return torch.rand(batch, 3, side, side, generator=torch.Generator().manual_seed(1)) * 2 - 1


@torch.no_grad()
@pytest.mark.parametrize("side", [84, 140, 238, 336])
def test_other_image_sizes(trunk: ViT, side: int) -> None:
    """Also sizes whose grid is no multiple of the window (10 and 17 tokens, window 6)."""
    (features,) = trunk(images(side))
    assert features.shape == (1, TINY.trunk.embed_dim, side // 14, side // 14)
    assert torch.isfinite(features).all()


def test_a_size_between_two_patches_is_refused(trunk: ViT) -> None:
    with pytest.raises(ValueError, match=r"\(250, 250\) is not a multiple of the patch size 14"):
        trunk(images(250))


@torch.no_grad()
def test_another_size_is_what_a_trunk_built_for_it_computes(trunk: ViT) -> None:
    """Rotary positions follow the input, not the size that the trunk was described with."""
    other = ViT(TINY.trunk, 336).eval()
    own = {k: v for k, v in trunk.state_dict().items() if not k.endswith("freqs_cis")}
    other.load_state_dict(own)
    assert torch.equal(trunk(images(336))[0], other(images(336))[0])


@torch.no_grad()
def test_a_batch_is_its_images_one_by_one(trunk: ViT) -> None:
    batch = images(batch=3)
    (together,) = trunk(batch)
    for i in range(3):
        torch.testing.assert_close(trunk(batch[i : i + 1])[0][0], together[i], atol=1e-5, rtol=0)


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_stays_close(trunk: ViT, dtype: torch.dtype) -> None:
    (expected,) = trunk(images())
    (features,) = trunk.to(dtype)(images().to(dtype))
    assert features.dtype == dtype
    error = (features.float() - expected).norm() / expected.norm()
    assert error < (0.02 if dtype == torch.bfloat16 else 0.003)


@torch.no_grad()
def test_casting_does_not_damage_rotary_positions(trunk: ViT) -> None:
    """The original's complex buffer loses its imaginary part under `.to(torch.bfloat16)`."""
    expected = trunk(images())[0]
    weights = dict(trunk.state_dict())
    trunk.to(torch.bfloat16).to(torch.float32)
    table = trunk.state_dict()["blocks.0.attn.freqs_cis"]
    assert table.is_complex()
    assert table.imag.abs().max() > 0.9
    trunk.load_state_dict(weights)
    assert torch.equal(trunk(images())[0], expected)


def test_rotary_forms_agree() -> None:
    """In place without gradients, out of place with them, and the real form that torch.compile gets."""
    table = rotary_table(16, (3, 5), 1.0, 10000.0)
    x = torch.randn(2, 15, 2, 4, 16)
    with_gradient = apply_rotary(x.clone().requires_grad_(), table)
    in_place = apply_rotary(x.clone(), table)
    compiled = torch.compile(apply_rotary, backend="eager", fullgraph=True)(x.clone(), table)
    torch.testing.assert_close(in_place, with_gradient)
    torch.testing.assert_close(compiled, with_gradient)
    angle = table[:, None, None, :].angle()
    expected = x[..., 0::2] * angle.cos() - x[..., 1::2] * angle.sin()
    torch.testing.assert_close(in_place[..., 0::2], expected)


@torch.no_grad()
def test_the_compiled_trunk_computes_the_same(trunk: ViT) -> None:
    expected = trunk(images(84))[0]
    compiled = torch.compile(trunk, backend="eager")
    torch.testing.assert_close(compiled(images(84))[0], expected, atol=1e-5, rtol=0)


def test_windows_are_split_and_joined() -> None:
    x = torch.arange(2 * 7 * 5 * 3, dtype=torch.float32).view(2, 7, 5, 3)
    windows = split_windows(x, 4)
    assert windows.shape == (2 * 2 * 2, 16, 3)
    assert torch.equal(windows[1].view(4, 4, 3)[:, :1], x[0, :4, 4:5])
    assert not windows[1].view(4, 4, 3)[:, 1:].any()
    assert torch.equal(join_windows(windows, 4, (7, 5)), x)


def test_positions_are_tiled_without_the_class_row(trunk: ViT) -> None:
    side = trunk.pretrain_side
    with torch.no_grad():
        trunk.pos_embed.copy_(torch.arange(1 + side * side)[None, :, None].expand_as(trunk.pos_embed))
    tiled = trunk.tiled_positions((10, 18))[0, :, :, 0]
    y, x = torch.meshgrid(torch.arange(10), torch.arange(18), indexing="ij")
    assert torch.equal(tiled, (1 + (y % side) * side + x % side).float())


def test_every_parameter_that_counts_gets_a_gradient() -> None:
    trunk = ViT(TINY.trunk, TINY.image_size_px).train()
    trunk(images(84))[0].square().mean().backward()
    assert [name for name, p in trunk.named_parameters() if p.grad is None] == []
    assert not trunk.pos_embed.grad[:, 0].any()


def test_fresh_weights_follow_the_recipe() -> None:
    trunk = ViT(TINY.trunk, TINY.image_size_px)
    assert trunk.pos_embed.std().item() == pytest.approx(0.02, rel=0.1)
    for name, module in trunk.named_modules():
        if isinstance(module, nn.Linear):
            assert module.weight.std().item() == pytest.approx(0.02, rel=0.05), name
            assert not module.bias.any()
        if isinstance(module, nn.LayerNorm):
            assert (module.weight == 1).all()
            assert module.eps == 1e-5


def test_stochastic_depth_rises_to_the_last_block_and_sleeps_in_eval() -> None:
    config = TrunkConfig(
        pretrain_img_size_px=28,
        embed_dim=16,
        depth=5,
        num_heads=2,
        window_size=2,
        global_blocks=(4,),
        drop_path_rate=0.4,
    )
    trunk = ViT(config, 56)
    assert [block.drop_path_rate for block in trunk.blocks] == pytest.approx([0.0, 0.1, 0.2, 0.3, 0.4])
    x = torch.ones(1000, 2, 2)
    torch.manual_seed(0)
    assert drop_path(x, 0.4, training=False) is x
    dropped = drop_path(x, 0.4, training=True)
    assert dropped.unique().tolist() == pytest.approx([0.0, 1 / 0.6])
    assert (dropped.flatten(1).std(dim=1) == 0).all()
    assert dropped.mean().item() == pytest.approx(1.0, abs=0.1)


def test_a_table_for_other_positions_is_refused(trunk: ViT) -> None:
    weights = dict(trunk.state_dict())
    key = "blocks.2.attn.freqs_cis"
    weights[key] = rotary_table(32, (18, 18), 1.0, 10000.0)
    with pytest.raises(RuntimeError, match=r"blocks\.2\.attn\.freqs_cis: the rotary table differs"):
        trunk.load_state_dict(weights)
    weights[key] = rotary_table(32, (9, 9), 1.0, 10000.0)
    with pytest.raises(RuntimeError, match=r"has shape \(81, 16\), this model's is \(324, 16\)"):
        trunk.load_state_dict(weights)
    weights[key] = trunk.state_dict()[key].real.to(torch.bfloat16)  # what a cast of the whole file leaves
    trunk.load_state_dict(weights)


def test_only_the_necks_and_levels_that_are_asked_for_are_computed() -> None:
    backbone = SAM3VLBackbone(Sam3DualViTDetNeck(ViT(TINY.trunk, TINY.image_size_px), TINY)).eval()
    calls = []
    for name in ("convs", "sam2_convs"):
        for i, branch in enumerate(getattr(backbone.vision_backbone, name)):
            branch.register_forward_hook(lambda *_, key=(name, i): calls.append(key))
    out = backbone.forward_image(images(84), need_detector=False)
    assert calls == [("sam2_convs", 0), ("sam2_convs", 1), ("sam2_convs", 2)]
    assert out["backbone_fpn"] is None
    assert out["vision_features"] is None
    assert [m.shape[-1] for m in out["sam2_backbone_out"]["backbone_fpn"]] == [24, 12, 6]
    calls.clear()
    out = backbone.forward_image(images(84), need_sam2=False)
    assert calls == [("convs", 0), ("convs", 1), ("convs", 2)]
    assert out["sam2_backbone_out"] is None
    assert out["vision_features"] is out["backbone_fpn"][-1]
    assert len(out["vision_pos_enc"]) == 3
    assert [e.shape for e in out["vision_pos_enc"][:]] == [m.shape for m in out["backbone_fpn"]]


def test_position_encodings_of_unread_levels_take_no_memory() -> None:
    backbone = SAM3VLBackbone(Sam3DualViTDetNeck(ViT(TINY.trunk, TINY.image_size_px), TINY, add_sam2_neck=False))
    with torch.no_grad():
        encodings = backbone.forward_image(images(84).to(torch.float32))["vision_pos_enc"]
    assert sum(like.numel() for like in encodings._like) == 0
    assert encodings[2].dtype == torch.float32


def test_training_under_autocast() -> None:
    """bf16 autocast, as on a GPU: gradients are finite and float32, and close to those without autocast."""
    gradients = []
    for enabled in (False, True):
        torch.manual_seed(0)
        model = assemble_image_model(TINY, enable_inst_interactivity=True, enable_detector=False).train()
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            output = model.heads.forward_prompts(
                model.image_features(images(84)), torch.tensor([[[30.0, 40.0]]]), torch.ones(1, 1, dtype=torch.long)
            )
        loss = output.mask_logits.float().square().mean() + output.ious.float().sum()
        loss.backward()
        gradients.append(model.backbone.vision_backbone.trunk.blocks[3].mlp.fc1.weight.grad.flatten())
    plain, low = gradients
    assert low.dtype == torch.float32
    assert torch.cosine_similarity(plain, low, dim=0) > 0.95


def test_the_builder_compiles_the_trunk_on_request() -> None:
    options = {"load_from_HF": False, "config": "tiny", "device": "cpu"}
    for compile in (False, True):
        model = build_sam3_image_model(**options, compile=compile)
        assert (model.backbone.vision_backbone.trunk._compiled_call_impl is not None) is compile
        assert model.state_dict().keys() == build_sam3_image_model(**options).state_dict().keys()
