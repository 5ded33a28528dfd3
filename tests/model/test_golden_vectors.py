"""Numbers of the original SAM 3 (fp32, CPU) on deterministic weights; tolerance 1e-4 as its authors' code allows."""

from __future__ import annotations

import pytest
import torch
from golden import SMALL, check, detector_value, fill, table, tracker_value

from sam3.config import Sam3Config
from sam3.model.position_encoding import PositionEmbeddingSine
from sam3.model.sam3_image import Sam3Image
from sam3.model.vitdet import rotary_table
from sam3.model_builder import assemble_image_model
from sam3.sam.heads import SamFeatures, SamHeads


@pytest.fixture(scope="module")
def detector() -> Sam3Image:
    return fill(assemble_image_model(SMALL, enable_inst_interactivity=True, enable_detector=False))


@pytest.fixture(scope="module")
def backbone_out(detector: Sam3Image) -> dict:
    with torch.no_grad():
        return detector.backbone.forward_image(table("input.image", (1, 3, 336, 336)))


def test_generator_gives_the_published_first_values() -> None:
    patch = detector_value("backbone.vision_backbone.trunk.patch_embed.proj.weight", (64, 3, 14, 14)).flatten()
    torch.testing.assert_close(patch[:3], torch.tensor([-0.0084997, -0.0396102, -0.0449483]), atol=1e-7, rtol=0)
    image = table("input.image", (1, 3, 336, 336)).flatten()
    torch.testing.assert_close(image[:3], torch.tensor([-0.4206232, -0.6968812, -0.7305917]), atol=1e-7, rtol=0)
    level2 = table("input.frame0.level2", (1, 256, 16, 16)).flatten()
    torch.testing.assert_close(level2[:3], torch.tensor([-0.8137857, 0.6941919, 0.9357535]), atol=1e-7, rtol=0)


def test_rotary_table_of_a_window_and_of_the_global_grid() -> None:
    expected = torch.tensor([0.5403 + 0.8415j, 0.8460 + 0.5332j, 0.5403 + 0.8415j, 0.8460 + 0.5332j])
    window = rotary_table(64, (24, 24), 1.0, 10000.0)
    torch.testing.assert_close(window[25, [0, 1, 16, 17]], expected, atol=1e-4, rtol=0)
    expected = torch.tensor([0.9450 + 0.3272j, 0.9825 + 0.1864j, 0.9450 + 0.3272j, 0.9825 + 0.1864j])
    whole = rotary_table(64, (72, 72), 24 / 72, 10000.0)
    torch.testing.assert_close(whole[73, [0, 1, 16, 17]], expected, atol=1e-4, rtol=0)


def test_sine_encoding_of_the_released_grid() -> None:
    encoding = PositionEmbeddingSine(256).encode_map((72, 72))[0]
    first = torch.tensor([0.0872, 0.9962, 0.0755, 0.9971, 0.0872])
    torch.testing.assert_close(encoding[[0, 1, 2, 3, 128], 0, 0], first, atol=1e-4, rtol=0)
    torch.testing.assert_close(
        encoding[[0, 1, 128, 129], 71, 35], torch.tensor([0.0, 1.0, 0.0, -1.0]), atol=1e-6, rtol=0
    )


def test_trunk_output(detector: Sam3Image) -> None:
    with torch.no_grad():
        (features,) = detector.backbone.vision_backbone.trunk(table("input.image", (1, 3, 336, 336)))
    samples = {(0, 0, 0, 0): -2.87773, (0, 5, 3, 17): -1.45854, (0, 63, 23, 23): 1.20620}
    check(features, (1, 64, 24, 24), -0.19530, 1.78953, samples)


@pytest.mark.parametrize(
    ("level", "side", "mean", "std", "samples"),
    [
        (0, 96, 0.00368, 0.61178, (0.92829, 1.00213, 1.02951)),
        (1, 48, -0.00936, 1.26979, (-1.26790, 0.39003, 2.09912)),
        (2, 24, -0.01898, 1.79179, (0.04656, 1.34540, -0.59535)),
    ],
)
def test_detector_neck(backbone_out: dict, level: int, side: int, mean: float, std: float, samples: tuple) -> None:
    places = [(0, 0, 0, 0), (0, 100, 7, 11), (0, 255, 23, 23)]
    expected = dict(zip(places, samples, strict=True))
    check(backbone_out["backbone_fpn"][level], (1, 256, side, side), mean, std, expected)


def test_sam2_neck(backbone_out: dict) -> None:
    features = backbone_out["sam2_backbone_out"]["backbone_fpn"][2]
    check(features, (1, 256, 24, 24), -0.04170, 1.78109, {(0, 0, 0, 0): 0.39845, (0, 100, 7, 11): 1.92468})


def test_position_encoding_of_the_backbone(backbone_out: dict) -> None:
    samples = {
        (0, 0, 0, 0): 0.25882,
        (0, 1, 0, 0): 0.96593,
        (0, 10, 7, 11): 0.85206,
        (0, 138, 7, 11): 0.99916,
        (0, 255, 23, 23): 1.0,
    }
    check(backbone_out["vision_pos_enc"][2], (1, 256, 24, 24), 0.49392, 0.50601, samples)


@pytest.fixture(scope="module")
def heads() -> SamHeads:
    heads = SamHeads(Sam3Config(image_size_px=224)).eval()
    heads.load_state_dict({key: tracker_value(key, value.shape) for key, value in heads.state_dict().items()})
    return heads


def test_mask_decoder_after_one_click_each_on_two_objects(heads: SamHeads) -> None:
    fine, middle, coarse = (
        table(f"input.frame0.level{level}", shape)
        for level, shape in enumerate([(1, 32, 64, 64), (1, 64, 32, 32), (1, 256, 16, 16)])
    )
    features = SamFeatures(coarse + heads.no_mem_embed.transpose(1, 2)[..., None], fine, middle)
    clicks = torch.tensor([[[60.0, 80.0]], [[150.0, 40.0]]])
    with torch.no_grad():
        output = heads.select(heads.forward_prompts(features, clicks, torch.ones(2, 1, dtype=torch.long)), True)
    best = output.ious.argmax(dim=1)
    masks = output.mask_logits[torch.arange(2), best][:, None]
    samples = {(0, 0, 0, 0): 0.11280, (0, 0, 30, 20): -1.55735, (1, 0, 63, 63): -1.55253}
    check(masks, (2, 1, 64, 64), -1.47258, 1.42246, samples, unbiased=True)
    assert output.object_score_logits.flatten().tolist() == pytest.approx([2.20019, 2.23967], abs=1e-4)
    assert output.ious.amax(dim=1).tolist() == pytest.approx([0.46548, 0.42257], abs=1e-4)
