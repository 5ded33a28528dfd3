"""Geometric prompts: padded sequences, checks, and the encoder against Hugging Face's and against plain arithmetic.

The numbers of the original, points included, are in test_golden_detector (case B).
"""

from __future__ import annotations

import copy
import hashlib
import math

import pytest
import torch
from golden import detector_value, table
from torch import Tensor

from sam3.config import Sam3Config
from sam3.hf_keys import released_to_hf
from sam3.model.geometry import SequenceGeometryEncoder, pool_boxes, sample_points
from sam3.model.prompt import Prompt, concat_padded_sequences

TINY = Sam3Config.preset("tiny")
SIDE, DIM = TINY.grid_size, TINY.hidden_dim
POINTS = torch.tensor([[[0.25, 0.75], [0.5, 0.5]], [[0.9, 0.1], [0.0, 0.0]]])  # (2, B = 2, 2)
POINT_LABELS = torch.tensor([[1, 0], [0, 0]])
POINT_MASK = torch.tensor([[False, False], [False, True]])
BOXES = torch.tensor(
    [[[0.3, 0.4, 0.2, 0.25], [0.7, 0.3, 0.15, 0.35]], [[0.6, 0.55, 0.3, 0.2], [0.95, 0.9, 0.3, 0.4]], [[0.5] * 4] * 2]
)
BOX_LABELS = torch.tensor([[1, 1], [0, 1], [0, 1]])
BOX_MASK = torch.tensor([[False, False, True], [False, False, False]])


def make_prompt(points: bool = True, boxes: bool = True) -> Prompt:
    prompt = Prompt(box_embeddings=torch.zeros(0, 2, 4))
    if points:
        prompt.append_points(POINTS, POINT_LABELS, POINT_MASK)
    if boxes:
        prompt.append_boxes(BOXES, BOX_LABELS, BOX_MASK)
    return prompt


@pytest.fixture(scope="module")
def encoder() -> SequenceGeometryEncoder:
    encoder = SequenceGeometryEncoder(TINY)
    values = {k: detector_value(f"geometry_encoder.{k}", v.shape) for k, v in encoder.state_dict().items()}
    encoder.load_state_dict(values)
    return encoder.eval()


@pytest.fixture(scope="module")
def features() -> Tensor:
    return 2 * table("input.features", (2, DIM, SIDE, SIDE))


@pytest.fixture(scope="module")
def positions() -> Tensor:
    return table("input.positions", (1, DIM, SIDE, SIDE))


def encode(
    encoder: SequenceGeometryEncoder, prompt: Prompt, features_bchw: Tensor, positions_bchw: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    sequences = [None if x is None else [x.flatten(2).permute(2, 0, 1)] for x in (features_bchw, positions_bchw)]
    return encoder(prompt, sequences[0], [(SIDE, SIDE)], sequences[1])


# ---------------------------------------------------------------------------------------------------- padded sequences


def test_concatenation_of_the_specification() -> None:
    joined, mask = concat_padded_sequences(
        torch.tensor([[1.0], [2.0], [-1.0]]),
        torch.tensor([[False, False, True]]),
        torch.tensor([[10.0], [-1.0]]),
        torch.tensor([[False, True]]),
    )
    assert joined[:3].flatten().tolist() == [1, 2, 10]
    assert mask.tolist() == [[False, False, False, True, True]]


@pytest.mark.parametrize("trailing", [(), (3,), (2, 4)])
def test_concatenation_keeps_every_valid_value(trailing: tuple[int, ...]) -> None:
    generator = torch.Generator().manual_seed(0)
    lengths1, lengths2 = torch.tensor([0, 2, 4, 1]), torch.tensor([3, 0, 3, 1])
    seq1 = torch.randn(4, 4, *trailing, generator=generator)
    seq2 = torch.randn(3, 4, *trailing, generator=generator).double()
    mask1, mask2 = torch.arange(4) >= lengths1[:, None], torch.arange(3) >= lengths2[:, None]
    joined, mask = concat_padded_sequences(seq1, mask1, seq2, mask2)
    assert joined.shape == (7, 4, *trailing) and joined.dtype == torch.float64
    for i, (n1, n2) in enumerate(zip(lengths1, lengths2, strict=True)):
        assert (~mask[i]).sum() == n1 + n2 and not mask[i, : n1 + n2].any()
        assert torch.equal(joined[: n1 + n2, i], torch.cat((seq1[:n1, i].double(), seq2[:n2, i])))


def test_concatenation_of_empty_sequences_and_gradients() -> None:
    empty, no_mask = torch.zeros(0, 2, 3), torch.zeros(2, 0, dtype=torch.bool)
    seq = torch.randn(2, 2, 3, requires_grad=True)
    mask = torch.tensor([[False, True], [False, False]])
    for joined, joined_mask in (
        concat_padded_sequences(empty, no_mask, seq, mask),
        concat_padded_sequences(seq, mask, empty, no_mask),
    ):
        assert torch.equal(joined, seq) and torch.equal(joined_mask, mask)
    joined, _ = concat_padded_sequences(seq, mask, torch.ones(1, 2, 3), torch.zeros(2, 1, dtype=torch.bool))
    joined[:2].sum().backward()
    assert seq.grad is not None and seq.grad[:, :, 0].tolist() == [[1, 1], [0, 1]]


# -------------------------------------------------------------------------------------------------------------- prompts


def test_what_is_missing_is_filled_in() -> None:
    prompt = Prompt(box_embeddings=BOXES)
    assert prompt.point_embeddings.shape == (0, 2, 2) and prompt.point_mask.shape == (2, 0)
    assert prompt.box_labels.tolist() == [[1, 1]] * 3 and prompt.box_labels.dtype == torch.long
    assert not prompt.box_mask.any()
    assert Prompt(point_embeddings=POINTS).box_embeddings.shape == (0, 2, 4)
    assert Prompt(point_embeddings=POINTS, point_labels=POINT_LABELS.bool()).point_labels.tolist() == [[1, 0], [0, 0]]
    null = Prompt()
    assert null.is_null and all(value is None for value in vars(null).values())


def test_appending_joins_what_is_valid() -> None:
    prompt = make_prompt(boxes=False)
    prompt.append_points(torch.full((1, 2, 2), 0.125), torch.ones(1, 2), None)
    assert prompt.point_mask.tolist() == [[False, False, False], [False, False, True]]
    assert prompt.point_embeddings[:, 0, 0].tolist() == pytest.approx([0.25, 0.9, 0.125])
    assert prompt.point_embeddings[:2, 1, 0].tolist() == pytest.approx([0.5, 0.125])
    assert prompt.point_labels[:, 0].tolist() == [1, 0, 1] and prompt.point_labels[:2, 1].tolist() == [0, 1]
    fresh = Prompt()
    fresh.append_boxes(BOXES)
    assert fresh.box_embeddings.shape == (3, 2, 4) and fresh.point_embeddings.shape == (0, 2, 2)


def test_masks_are_kept_but_only_one() -> None:
    prompt = Prompt(mask_embeddings=torch.ones(1, 2, 1, 8, 8))
    assert prompt.mask_mask.tolist() == [[False], [False]] and prompt.mask_labels.tolist() == [[1, 1]]
    assert prompt.box_embeddings.shape == (0, 2, 4)
    with pytest.raises(ValueError, match="one mask prompt"):
        prompt.append_masks(torch.ones(1, 2, 1, 8, 8))


def test_clone_shares_nothing() -> None:
    prompt = make_prompt()
    copied = prompt.clone()
    copied.box_embeddings.zero_()
    copied.append_points(POINTS)
    assert prompt.box_embeddings.abs().sum() > 0 and len(prompt.point_embeddings) == 2
    assert Prompt().clone().is_null


NAN = torch.full((1, 1, 4), math.nan)
REFUSALS = {
    "boxes in pixels": ({"box_embeddings": torch.tensor([[[500.0, 300, 200, 100]]])}, "100 to 500. Divide pixels"),
    "points in pixels": ({"point_embeddings": torch.tensor([[[3.0, 3.0]]])}, "points are normalised"),
    "NaN": ({"box_embeddings": NAN}, "boxes are normalised"),
    "a label of SAM": (
        {"point_embeddings": torch.rand(1, 1, 2), "point_labels": torch.tensor([[2]])},
        r"labels of points are 1 \(positive\) or 0 \(negative\); got \[2\]",
    ),
    "batch-first boxes": ({"box_embeddings": torch.rand(1, 3, 4), "box_labels": torch.ones(3, 1)}, r"\(1, 3\)"),
    "mask of another shape": (
        {"box_embeddings": torch.rand(2, 1, 4), "box_mask": torch.zeros(2, 1, dtype=torch.bool)},
        r"mask of boxes must have shape \(1, 2\), got \(2, 1\)",
    ),
    "corners": ({"box_embeddings": torch.rand(1, 1, 2)}, r"boxes must have shape \(1, 1, 4\)"),
    "no batch axis": ({"box_embeddings": torch.rand(2, 4)}, r"\(n, B, ...\), got shape \(2, 4\)"),
    "different batches": ({"box_embeddings": torch.rand(1, 2, 4), "point_embeddings": torch.rand(1, 1, 2)}, "points"),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_impossible_prompts_are_refused(case: str) -> None:
    arguments, message = REFUSALS[case]
    with pytest.raises(ValueError, match=message):
        Prompt(**arguments)


def test_appending_for_other_queries_is_refused() -> None:
    with pytest.raises(ValueError, match="for 2 queries, what is added is for 1"):
        make_prompt().append_boxes(torch.rand(1, 1, 4))


def test_nothing_odd_hides_in_padding() -> None:
    boxes, labels = BOXES.clone(), BOX_LABELS.clone()
    boxes[2, 0], labels[2, 0] = math.nan, -10
    prompt = Prompt(box_embeddings=boxes, box_labels=labels, box_mask=BOX_MASK)
    assert not prompt.box_embeddings[2, 0].any() and prompt.box_labels[2, 0] == 0


# -------------------------------------------------------------------------------------------------------------- pooling


def _ramp(height: int, width: int) -> Tensor:
    """Channel 0 holds the column of a cell, channel 1 its row."""
    rows, columns = torch.meshgrid(torch.arange(height) * 1.0, torch.arange(width) * 1.0, indexing="ij")
    return torch.stack((columns, rows))[None]


def test_points_are_sampled_between_cell_centres() -> None:
    points = torch.tensor([[[0.5, 0.5]], [[0.3, 0.6]], [[0.05, 0.5]]])
    sampled = sample_points(_ramp(8, 10), points)
    assert sampled[0, 0].tolist() == pytest.approx([4.5, 3.5])
    assert sampled[1, 0].tolist() == pytest.approx([0.3 * 10 - 0.5, 0.6 * 8 - 0.5])
    # At the left edge the half cell outside counts as zero.
    constant = sample_points(torch.ones(1, 1, 8, 10), torch.tensor([[[0.0, 0.5]], [[0.05, 0.5]]]))
    assert constant.flatten().tolist() == pytest.approx([0.5, 1.0])


def test_boxes_are_pooled_without_the_half_pixel() -> None:
    """On a ramp a bin's mean is its centre; unaligned ROI-align takes coordinate 2.0 for the centre of cell 2."""
    boxes = torch.tensor([[[0.5, 0.5, 0.4, 0.5]]])  # columns 3..7, rows 2..6 of 8 x 10 cells
    pooled = pool_boxes(_ramp(8, 10), boxes, size=4)
    assert pooled.shape == (1, 2, 4, 4)
    assert pooled[0, 0, 0].tolist() == pytest.approx([3.5, 4.5, 5.5, 6.5])
    assert pooled[0, 1, :, 0].tolist() == pytest.approx([2.5, 3.5, 4.5, 5.5])
    point = pool_boxes(_ramp(8, 10), torch.tensor([[[0.5, 0.5, 0.0, 0.0]]]), size=1)  # at least one cell wide
    assert point.flatten().tolist() == pytest.approx([5.5, 4.5])


def test_boxes_read_the_image_of_their_query() -> None:
    maps = torch.arange(3.0)[:, None, None, None].expand(3, 1, 6, 6)
    pooled = pool_boxes(maps, torch.full((2, 3, 4), 0.5), size=2)
    assert pooled[:, 0, 0, 0].tolist() == [0, 1, 2, 0, 1, 2]


# -------------------------------------------------------------------------------------------------------------- encoder


def test_names_and_shapes_of_the_released_file() -> None:
    with torch.device("meta"):
        state_dict = SequenceGeometryEncoder(Sam3Config()).state_dict()
    assert len(state_dict) == 76
    assert sum(v.numel() for v in state_dict.values()) == 8_215_808
    lines = sorted(f"{key} {tuple(value.shape)}" for key, value in state_dict.items())
    digest = hashlib.sha256("\n".join(lines).encode()).hexdigest()
    assert digest == "4cfae4868f88ddfcadceb0c1f421827cc1d34b94ab6be416a0e88db8508c90db"


@torch.no_grad()
def test_equals_the_one_of_hugging_face(encoder: SequenceGeometryEncoder, features: Tensor, positions: Tensor) -> None:
    """Boxes with padding; it has no points."""
    pytest.importorskip("transformers")
    from transformers.models.sam3 import configuration_sam3, modeling_sam3

    geometry = TINY.geometry_encoder
    config = configuration_sam3.Sam3GeometryEncoderConfig(
        hidden_size=DIM,
        num_layers=geometry.num_layers,
        num_attention_heads=geometry.num_heads,
        intermediate_size=geometry.mlp_dim,
        roi_size=geometry.roi_size,
        layer_norm_eps=1e-5,  # its default is 1e-6, the original's is 1e-5
        attn_implementation="eager",  # without a choice, a part on its own ignores padding
    )
    hf = modeling_sam3.Sam3GeometryEncoder(config).eval()
    released = {f"detector.geometry_encoder.{key}": value for key, value in encoder.state_dict().items()}
    prefix = "detector_model.geometry_encoder."
    weights = released_to_hf({k: v for k, v in released.items() if ".points_" not in k})
    hf.load_state_dict({key.removeprefix(prefix): value for key, value in weights.items()})
    expected = hf(BOXES.transpose(0, 1), ~BOX_MASK, BOX_LABELS.T, (features,), (positions.expand_as(features),))
    tokens, mask = encode(encoder, make_prompt(points=False), features, positions)
    theirs, valid = expected.last_hidden_state, expected.attention_mask.bool()
    assert torch.equal(valid, ~mask)
    assert 0.1 < tokens.std() < 10
    torch.testing.assert_close(tokens.transpose(0, 1)[~mask], theirs[valid], atol=1e-4, rtol=0)


@torch.no_grad()
def test_queries_do_not_depend_on_padding_or_on_each_other(
    encoder: SequenceGeometryEncoder, features: Tensor, positions: Tensor
) -> None:
    tokens, mask = encode(encoder, make_prompt(), features, positions)
    assert tokens.shape == (6, 2, DIM)
    assert mask.tolist() == [[False] * 5 + [True], [False] * 5 + [True]]
    for i, (num_points, num_boxes) in enumerate(((2, 2), (1, 3))):
        alone = Prompt(
            point_embeddings=POINTS[:num_points, i : i + 1],
            point_labels=POINT_LABELS[:num_points, i : i + 1],
            box_embeddings=BOXES[:num_boxes, i : i + 1],
            box_labels=BOX_LABELS[:num_boxes, i : i + 1],
        )
        expected, expected_mask = encode(encoder, alone, features[i : i + 1], positions)
        assert not expected_mask.any()
        torch.testing.assert_close(tokens[:5, i], expected[:, 0], atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_without_points_and_boxes_only_the_class_token_is_left(
    encoder: SequenceGeometryEncoder, features: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: object) -> None:
        raise AssertionError("pooled for nothing")

    for name in ("sample_points", "pool_boxes"):
        monkeypatch.setattr(f"sam3.model.geometry.{name}", fail)
    monkeypatch.setattr(encoder.img_pre_norm, "forward", fail)
    tokens, mask = encode(encoder, make_prompt(points=False, boxes=False), features)
    assert tokens.shape == (1, 2, DIM) and not mask.any()
    assert not torch.allclose(tokens[:, 0], tokens[:, 1]), "it has read its image"


@torch.no_grad()
def test_labels_coordinates_and_image_matter(
    encoder: SequenceGeometryEncoder, features: Tensor, positions: Tensor
) -> None:
    before, _ = encode(encoder, make_prompt(), features, positions)
    changed = []
    for attribute in ("point_labels", "box_labels"):
        prompt = make_prompt()
        setattr(prompt, attribute, 1 - getattr(prompt, attribute))
        changed.append(encode(encoder, prompt, features, positions)[0])
    for attribute in ("point_embeddings", "box_embeddings"):
        prompt = make_prompt()
        setattr(prompt, attribute, getattr(prompt, attribute) * 0.9)
        changed.append(encode(encoder, prompt, features, positions)[0])
    changed.append(encode(encoder, make_prompt(), features)[0])
    changed.append(encode(encoder, make_prompt(), features.flip(-1), positions)[0])
    for after in changed:
        assert (after[:5] - before[:5]).abs().max() > 1e-2


@torch.no_grad()
def test_the_layers_read_features_that_are_not_normalised(encoder: SequenceGeometryEncoder, features: Tensor) -> None:
    """Pooling reads normalised ones: it does not change when an image's features are scaled and shifted."""
    points = Prompt(point_embeddings=POINTS, point_labels=POINT_LABELS, point_mask=POINT_MASK)
    pooled: list[Tensor] = []
    hook = encoder.points_pool_project.register_forward_pre_hook(lambda module, args: pooled.append(args[0]))
    tokens = [encode(encoder, points, x)[0] for x in (features, 3 * features + 1)]
    hook.remove()
    torch.testing.assert_close(pooled[0], pooled[1], atol=1e-3, rtol=1e-3)
    assert (tokens[0] - tokens[1])[0].abs().max() > 1e-2


def test_every_weight_learns(encoder: SequenceGeometryEncoder, features: Tensor) -> None:
    encoder.zero_grad()
    image = features.clone().requires_grad_()
    tokens, mask = encode(encoder, make_prompt(), image)
    (tokens.transpose(0, 1)[~mask] * torch.linspace(-1, 1, DIM)).sum().backward()
    assert image.grad is not None and image.grad.isfinite().all()
    assert not [name for name, p in encoder.named_parameters() if p.grad is None or not p.grad.any()]


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_dtypes(
    encoder: SequenceGeometryEncoder, features: Tensor, positions: Tensor, dtype: torch.dtype
) -> None:
    exact, _ = encode(encoder, make_prompt(), features, positions)
    other, _ = encode(copy.deepcopy(encoder).to(dtype), make_prompt(), features.to(dtype), positions.to(dtype))
    assert other.dtype == dtype
    bound = {torch.bfloat16: 0.1, torch.float16: 0.02, torch.float64: 1e-4}[dtype]
    assert (other[:5].float() - exact[:5]).abs().max() < bound * exact[:5].abs().max()


def test_dropout_acts_in_training_alone(features: Tensor) -> None:
    torch.manual_seed(0)
    config = Sam3Config.preset("tiny")
    geometry = type(config.geometry_encoder)(num_layers=1, num_heads=4, mlp_dim=64, roi_size=5, dropout=0.1)
    encoder = SequenceGeometryEncoder(config.replace(geometry_encoder=geometry))
    prompt = make_prompt()
    assert not torch.equal(encode(encoder, prompt, features)[0], encode(encoder, prompt, features)[0])
    encoder.eval()
    assert torch.equal(encode(encoder, prompt, features)[0], encode(encoder, prompt, features)[0])


def test_a_null_prompt_is_refused(encoder: SequenceGeometryEncoder, features: Tensor) -> None:
    with pytest.raises(ValueError, match=r"null: give it zero boxes"):
        encode(encoder, Prompt(), features)
