"""The task of stage 1: its loss, what it trains, what it saves."""

from __future__ import annotations

import math

import pytest
import torch
from stage1_world import TINY, Stage1World, make_store

from sam3.config import StudentConfig
from sam3.model.student_encoder import build_student
from sam3_train.embeddings import CODECS, EmbeddingStore
from sam3_train.errors import UserError
from sam3_train.feature_scale import error_scale, measure_channel_variance
from sam3_train.losses import masked_mse
from sam3_train.optim import parameter_groups
from sam3_train.teacher import online_features, stored_features
from stage1.mask_agreement import MaskAgreement
from stage1.model import LossWeights, Stage1Task, channel_similarity

SHAPE = TINY.embedding_shape


def make_task(weights: LossWeights | None = None, **changes) -> Stage1Task:
    torch.manual_seed(0)
    student = build_student(TINY.replace(student=StudentConfig("demo_cnn")))
    return Stage1Task(student, torch.ones(SHAPE[0]), weights, **changes)


def make_batch(size: int = 2, seed: int = 0) -> dict:
    generator = torch.Generator().manual_seed(seed)
    return {
        "image": torch.randn(size, 3, TINY.image_size_px, TINY.image_size_px, generator=generator),
        "teacher": torch.randn(size, *SHAPE, generator=generator),
        "valid": torch.ones(size, 1, *SHAPE[1:]),
    }


def test_both_terms_matter_and_are_logged_apart():
    """D-04: squared error and cosine lie on one scale; each weight changes the loss as it says."""
    batch = make_batch()
    task = make_task().eval()
    terms = task(batch)
    assert terms["loss"].item() == pytest.approx(terms["mse"].item() + terms["cosine"].item())
    assert 0.05 < terms["cosine"].item() / terms["mse"].item() < 20
    weighted = make_task(LossWeights(mse=2.0, cosine=0.5)).eval()(batch)
    assert weighted["loss"].item() == pytest.approx(2 * terms["mse"].item() + 0.5 * terms["cosine"].item(), rel=1e-5)
    assert weighted["mse"].item() == pytest.approx(terms["mse"].item(), rel=1e-6), "terms are logged without weights"


def test_predicting_the_mean_costs_one_whatever_the_scale_of_the_features():
    """D-04, D-05: the loss has a unit, so a clip norm means the same for every teacher."""
    generator = torch.Generator().manual_seed(0)
    scales = torch.logspace(-0.5, 0.5, SHAPE[0])[None, :, None, None]
    features = 3.0 * scales + scales * torch.randn(8, *SHAPE, generator=generator)
    valid = torch.ones(8, 1, *SHAPE[1:])
    variance_c = measure_channel_variance([(features[:4], valid[:4]), (features[4:], valid[4:])])
    torch.testing.assert_close(variance_c, features.double().var((0, 2, 3), correction=0).float())
    mean = features.mean((0, 2, 3), keepdim=True).expand_as(features)
    for normalization, scale in (("channel", 1.0), ("global", 1.0), ("none", float(variance_c.mean()))):
        value = masked_mse(mean, features, valid, error_scale(variance_c, normalization)).item()
        assert value == pytest.approx(scale, rel=1e-3)
    # A channel that hardly varies must not blow the loss up: its variance is floored.
    assert error_scale(torch.tensor([1e-9, 1.0]), "channel").tolist() == pytest.approx([5e-4, 1.0], rel=1e-3)


def test_the_variance_leaves_padding_out_and_refuses_broken_features():
    features = torch.randn(2, *SHAPE, generator=torch.Generator().manual_seed(0))
    valid = torch.ones(2, 1, *SHAPE[1:])
    valid[..., 9:, :] = 0
    padded = features.clone()
    padded[..., 9:, :] = 1e6
    assert torch.equal(measure_channel_variance([(features, valid)]), measure_channel_variance([(padded, valid)]))
    with pytest.raises(UserError, match="not finite"):
        measure_channel_variance([(torch.full((1, *SHAPE), math.nan), valid[:1])])
    with pytest.raises(UserError, match="constant"):
        error_scale(torch.zeros(4), "channel")
    with pytest.raises(UserError, match="no teacher feature"):
        measure_channel_variance([(features, torch.zeros_like(valid))])


def test_padded_cells_do_not_count():
    """D-65: neither for the loss nor for the metrics."""
    task, batch = make_task().eval(), make_batch()
    batch["valid"][..., 9:, :] = 0
    other = {**batch, "teacher": batch["teacher"].clone()}
    other["teacher"][..., 9:, :] = 1e4
    assert task(batch)["loss"].item() == task(other)["loss"].item()
    assert torch.equal(task.validate(batch)["loss"], task.validate(other)["loss"])


def test_validation_gives_each_image_its_own_value():
    task, batch = make_task().eval(), make_batch(3)
    metrics = task.validate(batch)
    terms = task(batch)
    assert {"loss", "mse", "cosine", "similarity"} <= metrics.keys()
    for name in ("loss", "mse", "cosine"):
        assert metrics[name].shape == (3,)
        assert metrics[name].mean().item() == pytest.approx(terms[name].item(), rel=1e-5)
    torch.testing.assert_close(metrics["similarity"], 1 - metrics["cosine"])


def test_channel_similarity_sees_what_the_cosine_along_channels_does_not():
    """D-49: the mean feature everywhere is similar cell by cell and tells nothing about where things are."""
    teacher = 5.0 + torch.randn(2, *SHAPE, generator=torch.Generator().manual_seed(0))
    valid = torch.ones(2, 1, *SHAPE[1:])
    assert torch.allclose(channel_similarity(3 * teacher + 1, teacher, valid), torch.ones(2), atol=1e-5)
    mean = teacher.mean((2, 3), keepdim=True).expand_as(teacher)
    assert channel_similarity(mean, teacher, valid).abs().max() < 0.05
    assert torch.nn.functional.cosine_similarity(mean, teacher, dim=1).mean() > 0.9
    valid[..., 9:, :] = 0
    spoiled = teacher.clone()
    spoiled[..., 9:, :] = float("inf")
    assert torch.allclose(channel_similarity(spoiled, teacher, valid), torch.ones(2), atol=1e-5)


def test_the_whole_student_is_trained_and_nothing_else():
    """Every student parameter gets a gradient and stands in exactly one optimizer group; the task has no others."""
    task = make_task()
    assert {name.split(".")[0] for name, _ in task.named_parameters()} == {"student"}
    task.train()
    task(make_batch())["loss"].backward()
    without = [name for name, p in task.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    # The bias in front of a BatchNorm has no effect; the student has none such.
    assert not without
    grouped = [name for group in parameter_groups(task, 0.01) for name, _ in group["params"]]
    assert sorted(grouped) == sorted(name for name, _ in task.named_parameters())


def test_saved_names_are_the_published_ones_and_load_strictly():
    task, other = make_task(), make_task()
    state = task.saved_state()
    assert all(key.startswith(("backbone.model.", "head.")) for key in state)
    assert "variance_c" not in state
    with torch.no_grad():
        next(other.parameters()).add_(1.0)
    other.load_saved_state(state, "a file")
    assert all(torch.equal(a, b) for a, b in zip(task.parameters(), other.parameters(), strict=True))
    with pytest.raises(UserError, match=r"a file .*missing, first head.3.bias"):
        other.load_saved_state({k: v for k, v in state.items() if k != "head.3.bias"}, "a file")
    with pytest.raises(UserError, match="a file holds no demo_cnn student"):
        other.load_saved_state({"trunk.blocks.0.weight": torch.ones(1)}, "a file")


@pytest.mark.parametrize("codec", sorted(CODECS))
def test_stored_features_are_decoded_where_the_batch_is(world: Stage1World, tmp_path, codec):
    """D-53: the loader hands over the stored types; float32 exists on the device only."""
    store = EmbeddingStore(make_store(tmp_path, world.data, world.teacher, codec=codec))
    records = [store.read_raw(key)[1] for key in ("sa_0", "sa_1")]
    batch = {"embedding": {name: torch.stack([torch.from_numpy(r[name]) for r in records]) for name in records[0]}}
    assert batch["embedding"]["values"].dtype == {"fp16": torch.float16, "int8": torch.int8}[codec]
    decoded = stored_features(store.codec)(batch)["teacher"]
    assert decoded.dtype == torch.float32
    expected = torch.stack([torch.from_numpy(EmbeddingStore(world.store).read(key)[1]) for key in ("sa_0", "sa_1")])
    torch.testing.assert_close(decoded, expected.float(), atol=0.1, rtol=1e-3)
    assert batch.keys() == {"embedding"}, "the loader's batch is left as it is"


def test_an_online_teacher_sees_the_batch_images():
    batch = make_batch()
    del batch["teacher"]
    assert torch.equal(online_features(lambda images: images * 2)(batch)["teacher"], batch["image"] * 2)


def test_mask_agreement_is_one_for_the_teacher_itself_and_lower_for_noise(world: Stage1World):
    """D-49: the masks that features lead to, through the frozen neck and heads of the teacher's file."""
    agreement = MaskAgreement.from_checkpoint(world.teacher, TINY, torch.device("cpu"), prompts_per_side=2)
    teacher = torch.randn(2, *SHAPE, generator=torch.Generator().manual_seed(0))
    assert torch.equal(agreement(teacher, teacher), torch.ones(2))
    noise = torch.randn(2, *SHAPE, generator=torch.Generator().manual_seed(1))
    values = agreement(noise, teacher)
    assert values.shape == (2,)
    assert (values < 0.999).all()
    assert (values >= 0).all()
    task = make_task(mask_agreement=agreement)
    assert "mask_iou" in task.eval().validate(make_batch())
    assert not any("neck" in name or "sam" in name for name in task.state_dict()), "nothing of it is saved"
