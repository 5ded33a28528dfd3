"""Encodings of coordinates; the order of the coordinates is the trap. Encodings of maps are in test_golden_vectors."""

from __future__ import annotations

import math

import torch

from sam3.model.position_encoding import PositionEmbeddingSine, box_sine_embedding

BOX = torch.tensor([0.30, 0.40, 0.20, 0.25])


def test_reference_boxes_by_the_numbers_of_the_original() -> None:
    encoding = box_sine_embedding(BOX, 256)
    assert encoding.shape == (512,)
    expected = torch.tensor([0.5878, -0.8090, 0.8222, 0.9511, -0.3090, 0.9511, 1.0000])
    torch.testing.assert_close(encoding[[0, 1, 2, 128, 129, 256, 384]], expected, atol=1e-4, rtol=0)


def test_reference_boxes_of_any_shape() -> None:
    boxes = torch.rand(3, 5, 4)
    encoding = box_sine_embedding(boxes, 64)
    assert encoding.shape == (3, 5, 128)
    torch.testing.assert_close(encoding[2, 4], box_sine_embedding(boxes[2, 4], 64))


def test_points_give_x_and_y_apart() -> None:
    encoding = PositionEmbeddingSine(256)
    x, y = torch.tensor([0.1, 0.25]), torch.tensor([0.5, 0.75])
    pos_x, pos_y = encoding.encode_xy(x, y)
    assert pos_x.shape == pos_y.shape == (2, 128)
    for position, coordinate in ((pos_x, x), (pos_y, y)):
        slower = coordinate * 2 * math.pi / 10000 ** (2 / 128)  # channels 2 and 3
        torch.testing.assert_close(position[:, 0], (coordinate * 2 * math.pi).sin())
        torch.testing.assert_close(position[:, 1], (coordinate * 2 * math.pi).cos())
        torch.testing.assert_close(position[:, 2:4], torch.stack((slower.sin(), slower.cos()), 1))


def test_prompt_boxes_are_y_x_then_raw_h_w() -> None:
    encoding = PositionEmbeddingSine(256)
    boxes = encoding.encode_boxes(*BOX[:, None])
    pos_x, pos_y = encoding.encode_xy(BOX[:1], BOX[1:2])
    assert boxes.shape == (1, 258)
    torch.testing.assert_close(boxes, torch.cat((pos_y, pos_x, BOX[None, [3, 2]]), 1))


def test_coordinates_are_encoded_in_float32() -> None:
    """Half a float's digits would move a wave of full frequency by percents."""
    coordinate = torch.tensor([0.625], dtype=torch.bfloat16)  # has an exact value in bfloat16; times 2 pi it has not
    encoding = PositionEmbeddingSine(64)
    exact = encoding.encode_xy(coordinate.float(), coordinate.float())[0]
    assert torch.equal(encoding.encode_xy(coordinate, coordinate)[0], exact)
    assert box_sine_embedding(coordinate.expand(4), 64).dtype == torch.float32
    assert torch.equal(box_sine_embedding(coordinate.expand(4), 64)[:32], exact[0])
