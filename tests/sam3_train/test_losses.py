"""Losses on scales that do not depend on channels, padding or batch."""

from __future__ import annotations

import pytest
import torch

from sam3_train.losses import dice_loss, iou_l1_loss, masked_cosine, masked_mse, sigmoid_focal_loss
from sam3_train.metrics import RunningMean, mask_iou


def features(batch=2, channels=3, size=4, seed=0):
    return torch.randn(batch, channels, size, size, generator=torch.Generator().manual_seed(seed))


def test_mse_is_a_mean_over_channels_and_cells():
    """D-04: an error of 1 everywhere costs 1, with 3 channels as with 300."""
    for channels in (3, 300):
        teacher = features(channels=channels)
        assert masked_mse(teacher + 1.0, teacher).item() == pytest.approx(1.0, rel=1e-5)


def test_mse_and_cosine_have_comparable_scales():
    """D-04: unrelated features of unit variance cost about 2 and about 1; neither term vanishes beside the other."""
    student, teacher = features(4, 64, 8, seed=1), features(4, 64, 8, seed=2)
    assert masked_mse(student, teacher).item() == pytest.approx(2.0, abs=0.2)
    assert masked_cosine(student, teacher).item() == pytest.approx(1.0, abs=0.2)


@pytest.mark.parametrize("loss", [masked_mse, masked_cosine])
def test_padding_counts_in_no_way(loss):
    """D-65: cells outside the mask change neither value nor gradient, whatever they hold."""
    student, teacher = features(seed=1), features(seed=2)
    valid = torch.ones(2, 1, 4, 4)
    valid[0, :, 2:] = 0
    expected = (loss(student[:1, :, :2], teacher[:1, :, :2]) + loss(student[1:], teacher[1:])) / 2
    student[0, :, 2:] = 1e6
    student.requires_grad_()
    teacher[0, :, 2:] = -1e6
    value = loss(student, teacher, valid)
    value.backward()
    torch.testing.assert_close(value, expected)
    assert student.grad[0, :, 2:].eq(0).all() and student.grad[1].abs().sum() > 0


@pytest.mark.parametrize("loss", [masked_mse, masked_cosine])
def test_a_full_mask_is_no_mask(loss):
    student, teacher = features(seed=1), features(seed=2)
    torch.testing.assert_close(loss(student, teacher, torch.ones(2, 1, 4, 4)), loss(student, teacher))


def test_each_image_weighs_the_same_whatever_its_valid_area():
    teacher = torch.zeros(2, 1, 4, 4)
    student = torch.stack([torch.ones(1, 4, 4), torch.full((1, 4, 4), 2.0)])
    valid = torch.ones(2, 1, 4, 4)
    valid[1, :, 1:] = 0
    assert masked_mse(student, teacher, valid).item() == pytest.approx((1 + 4) / 2)


def test_mse_divided_by_the_channel_variance_treats_loud_and_quiet_channels_alike():
    variance = torch.tensor([100.0, 1.0, 0.01])
    teacher = torch.zeros(1, 3, 2, 2)
    student = variance.sqrt()[None, :, None, None].expand(1, 3, 2, 2)
    assert masked_mse(student, teacher, channel_var_c=variance).item() == pytest.approx(1.0)
    with pytest.raises(ValueError, match=r"\(3,\)"):
        masked_mse(student, teacher, channel_var_c=variance[:2])


def test_cosine_ignores_length_and_sees_direction():
    teacher = features()
    assert masked_cosine(5.0 * teacher, teacher).item() == pytest.approx(0.0, abs=1e-5)
    assert masked_cosine(-teacher, teacher).item() == pytest.approx(2.0, abs=1e-5)


def test_feature_losses_compute_in_float32_and_leave_the_teacher_alone():
    student, teacher = features(seed=1).half().requires_grad_(), features(seed=2).half().requires_grad_()
    loss = masked_mse(student, teacher) + masked_cosine(student, teacher)
    assert loss.dtype == torch.float32
    loss.backward()
    assert teacher.grad is None and student.grad is not None


def test_wrong_shapes_and_an_image_without_valid_cells_are_errors():
    with pytest.raises(ValueError, match="same"):
        masked_mse(features(), features(channels=4))
    with pytest.raises(ValueError, match="valid mask must be"):
        masked_cosine(features(), features(), torch.ones(2, 4, 4))
    valid = torch.ones(2, 1, 4, 4)
    valid[1] = 0
    with pytest.raises(ValueError, match="image 1"):
        masked_mse(features(), features(), valid)


def test_dice_is_0_for_a_perfect_and_near_1_for_a_wrong_mask():
    target = torch.zeros(2, 8, 8)
    target[:, :4] = 1
    perfect = (target * 2 - 1) * 50
    torch.testing.assert_close(dice_loss(perfect, target), torch.zeros(2), atol=1e-4, rtol=0)
    assert (dice_loss(-perfect, target) > 0.97).all()
    assert dice_loss(torch.full((1, 8, 8), -50.0), torch.zeros(1, 8, 8)).item() == pytest.approx(0.0, abs=1e-4)


def test_focal_loss_follows_the_paper():
    logits, target = torch.tensor([[[2.0, -1.0]]]), torch.tensor([[[1.0, 0.0]]])
    p = logits.sigmoid()
    expected = (0.25 * (1 - p[..., 0]) ** 2 * -p[..., 0].log() + 0.75 * p[..., 1] ** 2 * -(1 - p[..., 1]).log()) / 2
    torch.testing.assert_close(sigmoid_focal_loss(logits, target), expected.flatten())
    cross_entropy = torch.nn.functional.binary_cross_entropy_with_logits(logits, target)
    torch.testing.assert_close(sigmoid_focal_loss(logits, target, alpha=-1, gamma=0), cross_entropy.reshape(1))


def test_iou_loss_compares_with_the_iou_of_the_mask():
    logits, target = torch.full((1, 2, 2), -1.0), torch.ones(1, 2, 2)
    logits[0, 0] = 1.0
    predicted = torch.tensor([0.9], requires_grad=True)
    loss = iou_l1_loss(predicted, logits, target)
    assert loss.item() == pytest.approx(0.4)
    loss.sum().backward()
    assert predicted.grad.item() == 1.0


def test_mask_iou():
    a = torch.tensor([[[True, True], [False, False]], [[False, False], [False, False]]])
    b = torch.tensor([[[True, False], [True, False]], [[False, False], [False, False]]])
    torch.testing.assert_close(mask_iou(a, b), torch.tensor([1 / 3, 1.0]))


def test_a_running_mean_weighs_images_and_skips_what_does_not_apply():
    mean = RunningMean()
    mean.add({"iou": torch.tensor([1.0, float("nan"), 0.0]), "loss": torch.tensor(2.0)}, weight=3)
    mean.add({"iou": torch.tensor([0.5]), "loss": 6.0}, weight=1)
    assert mean.means() == {"iou": pytest.approx(0.5), "loss": pytest.approx(3.0)}
    mean.reset()
    assert mean.means() == {}
    mean.add({"iou": torch.tensor([float("nan")])})
    assert mean.means()["iou"] != mean.means()["iou"]


def test_a_mean_over_many_values_keeps_its_digits():
    mean = RunningMean()
    for _ in range(2000):
        mean.add({"x": torch.full((50,), 0.1)})
    assert mean.means()["x"] == pytest.approx(0.1, rel=1e-5)
