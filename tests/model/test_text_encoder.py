"""The text encoder: numbers of the original and of Hugging Face's CLIP, names of the released file, the cache."""

from __future__ import annotations

import copy
import hashlib
import pickle
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from golden import check, detector_value
from torch import Tensor, nn

from sam3.config import Sam3Config, TextConfig
from sam3.hf_keys import released_to_hf
from sam3.model.necks import Sam3DualViTDetNeck
from sam3.model.text_cache import TextFeatureCache
from sam3.model.text_encoder import VETextEncoder
from sam3.model.vitdet import ViT
from sam3.model.vl_backbone import SAM3VLBackbone

PREFIX = "backbone.language_backbone."
TINY = Sam3Config.preset("tiny")
TEXTS = ["a cat", "", "yellow school bus", "红色的圆", " ".join(["dog"] * 50)]


def fill(encoder: VETextEncoder) -> VETextEncoder:
    """Every weight its deterministic value."""
    values = {key: detector_value(PREFIX + key, value.shape) for key, value in encoder.state_dict().items()}
    encoder.load_state_dict(values)
    return encoder.eval()


def make_backbone(encoder: VETextEncoder | None) -> SAM3VLBackbone:
    trunk = ViT(TINY.trunk, TINY.image_size_px)
    return SAM3VLBackbone(Sam3DualViTDetNeck(trunk, TINY, add_sam2_neck=False), encoder).eval()


@pytest.fixture(scope="module")
def encoder() -> VETextEncoder:
    return fill(VETextEncoder(TINY.text, TINY.hidden_dim))


@pytest.fixture
def backbone(encoder: VETextEncoder) -> SAM3VLBackbone:
    return make_backbone(copy.deepcopy(encoder))


@torch.no_grad()
def test_numbers_of_the_original() -> None:
    encoder = fill(VETextEncoder(TextConfig(width=64, depth=2, num_heads=4), 256))
    mask, memory, embeds = encoder(["a cat", "yellow school bus"])
    samples = {(0, 0, 0): -0.16533, (3, 0, 100): -1.45297, (4, 1, 255): -0.94763, (31, 1, 0): 1.09921}
    check(memory, (32, 2, 256), 0.11910, 1.08096, samples)
    assert mask.sum(1).tolist() == [28, 27]
    assert embeds.shape == (32, 2, 64)
    assert torch.equal(embeds[2, 0], encoder.encoder.token_embedding.weight[2368])


def test_names_and_shapes_of_the_released_file() -> None:
    with torch.device("meta"):
        state_dict = VETextEncoder(TextConfig(), 256).state_dict()
    assert len(state_dict) == 295
    assert sum(v.numel() for v in state_dict.values()) == 353_724_672
    lines = sorted(f"{key} {tuple(value.shape)}" for key, value in state_dict.items())
    digest = hashlib.sha256("\n".join(lines).encode()).hexdigest()
    assert digest == "d2202921d97fe5ad76495fb3cfb06aafd04847481983fed6caab7738525e3197"


@torch.no_grad()
def test_equals_clip_of_hugging_face(encoder: VETextEncoder) -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.CLIPTextConfig(
        vocab_size=TINY.text.vocab_size,
        hidden_size=TINY.text.width,
        intermediate_size=int(TINY.text.width * TINY.text.mlp_ratio),
        projection_dim=TINY.text.projection_dim,
        num_hidden_layers=TINY.text.depth,
        num_attention_heads=TINY.text.num_heads,
        max_position_embeddings=TINY.text.context_length,
        hidden_act="gelu",
    )
    hf = transformers.CLIPTextModelWithProjection(config).eval()
    weights = released_to_hf({f"detector.{PREFIX}{key}": value for key, value in encoder.state_dict().items()})
    prefix = "detector_model.text_encoder."
    hf.load_state_dict({k.removeprefix(prefix): v for k, v in weights.items() if k.startswith(prefix)})
    resizer = nn.Linear(TINY.text.width, TINY.hidden_dim)
    prefix = "detector_model.text_projection."
    resizer.load_state_dict({k.removeprefix(prefix): v for k, v in weights.items() if k.startswith(prefix)})

    ids = encoder.tokenize(TEXTS)
    mask, memory, _ = encoder(TEXTS)
    ours, theirs = memory.transpose(0, 1), resizer(hf(input_ids=ids).last_hidden_state)
    assert 0.1 < ours.std() < 10
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=0)
    masked = resizer(hf(input_ids=ids, attention_mask=(~mask).long()).last_hidden_state)
    torch.testing.assert_close(ours[~mask], masked[~mask], atol=1e-4, rtol=0)


@torch.no_grad()
def test_padding_and_order(encoder: VETextEncoder) -> None:
    mask, memory, _ = encoder(TEXTS)
    assert (~mask).sum(1).tolist() == [4, 2, 5, 13, 32]
    for i, text in enumerate(TEXTS):
        alone_mask, alone, _ = encoder(text)
        assert torch.equal(alone_mask[0], mask[i])
        torch.testing.assert_close(alone[:, 0], memory[:, i], atol=1e-5, rtol=1e-5)
    # A token reads what stands before it, nothing after it.
    _, prefix, _ = encoder(["yellow school", "yellow"])
    torch.testing.assert_close(prefix[:3, 0], memory[:3, 2], atol=1e-5, rtol=1e-5)
    assert (prefix[3, 0] - memory[3, 2]).abs().max() > 1e-2


def test_fresh_weights_are_finite_and_can_be_trained() -> None:
    encoder = VETextEncoder(TINY.text, TINY.hidden_dim)
    assert all(p.isfinite().all() for p in encoder.parameters())
    assert 0.008 < encoder.encoder.positional_embedding.std() < 0.012
    assert 0.2 < encoder.encoder.text_projection.std() < 0.3  # 1 / sqrt(16)
    encoder(["red circle"])[1].square().mean().backward()
    without = {name for name, p in encoder.named_parameters() if p.grad is None or not p.grad.any()}
    assert without == {"encoder.text_projection"}


def test_half_precision(encoder: VETextEncoder) -> None:
    half = copy.deepcopy(encoder).to(torch.bfloat16)
    with torch.no_grad():
        ours, exact = half(TEXTS)[1], encoder(TEXTS)[1]
    assert ours.dtype == torch.bfloat16
    assert (ours.float() - exact).abs().max() < 0.1 * exact.abs().max()


# ------------------------------------------------------------------------------------------------------ the combiner


@torch.no_grad()
def test_forward_text(backbone: SAM3VLBackbone, encoder: VETextEncoder) -> None:
    mask, memory, embeds = encoder(TEXTS)
    out = backbone.forward_text(TEXTS[:3], additional_text=TEXTS[3:])
    assert out.keys() == {
        "language_features", "language_mask", "language_embeds", "additional_text_features", "additional_text_mask"
    }  # fmt: skip
    torch.testing.assert_close(out["language_features"], memory[:, :3], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(out["additional_text_features"], memory[:, 3:], atol=1e-5, rtol=1e-5)
    assert torch.equal(out["language_mask"], mask[:3]) and torch.equal(out["additional_text_mask"], mask[3:])
    assert torch.equal(out["language_embeds"], embeds[:, :3])
    assert backbone.forward_text(["a cat"]).keys() == {"language_features", "language_mask", "language_embeds"}
    assert backbone.forward_text("a cat", device="meta")["language_features"].is_meta


@torch.no_grad()
def test_both_backbones_in_one_dict(backbone: SAM3VLBackbone) -> None:
    out = backbone(torch.zeros(1, 3, 252, 252), ["a cat"])
    assert out["backbone_fpn"][-1].shape == (1, 64, 18, 18) and out["language_features"].shape == (32, 1, 64)


def test_what_cannot_be_encoded(backbone: SAM3VLBackbone) -> None:
    with pytest.raises(ValueError, match="captions is empty"):
        backbone.forward_text([])
    with pytest.raises(TypeError, match=r"text 1 is 5 \(int\)"):
        backbone.forward_text(["a", 5])  # type: ignore[list-item]
    with pytest.raises(ValueError, match=r"no text encoder.*enable_text_encoder=True.*language_features"):
        make_backbone(None).forward_text(["a cat"])


# --------------------------------------------------------------------------------------------------------- the cache


class Counter:
    """Counts the texts that an encoder's transformer really sees."""

    def __init__(self, backbone: SAM3VLBackbone) -> None:
        self.texts = 0
        backbone.language_backbone.encoder.register_forward_pre_hook(self._count)

    def _count(self, module: nn.Module, args: tuple[Tensor]) -> None:
        self.texts += len(args[0])

    def take(self) -> int:
        texts, self.texts = self.texts, 0
        return texts


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_a_text_is_encoded_once(backbone: SAM3VLBackbone, context: Callable) -> None:
    counter = Counter(backbone)
    with context():
        first = backbone.forward_text(["a cat", "a dog", "A  cat"])["language_features"]
        assert counter.take() == 2
        again = backbone.forward_text(["bird", "a dog", "a cat"])["language_features"]
        assert counter.take() == 1
        assert torch.equal(again[:, 1], first[:, 1]) and torch.equal(again[:, 2], first[:, 0])
        again.zero_()  # the caller's own tensor
        assert torch.equal(backbone.forward_text(["a cat"])["language_features"][:, 0], first[:, 0])
        assert counter.take() == 0


def test_gradients_training_and_cache_do_not_mix(backbone: SAM3VLBackbone) -> None:
    counter = Counter(backbone)
    with torch.inference_mode():
        backbone.forward_text(["a cat"])
    counter.take()
    for _ in range(2):
        backbone.forward_text(["a cat"])["language_features"].square().sum().backward()
        assert counter.take() == 1
    assert backbone.language_backbone.resizer.weight.grad.abs().sum() > 0
    backbone.train()
    assert len(backbone.text_cache) == 0
    with torch.no_grad():
        backbone.forward_text(["a cat"])
    assert counter.take() == 1 and len(backbone.text_cache) == 0


def _step(backbone: SAM3VLBackbone) -> None:
    optimizer = torch.optim.SGD(backbone.language_backbone.parameters(), lr=0.1)
    with torch.enable_grad():
        backbone.language_backbone(["x"])[1].square().sum().backward()
    optimizer.step()


def _load(backbone: SAM3VLBackbone, assign: bool) -> None:
    scale = {True: 0.9, False: 1.0}
    values = {key: value * scale[key.startswith("language")] for key, value in backbone.state_dict().items()}
    backbone.load_state_dict(values, assign=assign)


CHANGES: dict[str, Callable[[SAM3VLBackbone], object]] = {
    "an optimizer's step": _step,
    "loading in place": lambda b: _load(b, assign=False),
    "loading by assignment": lambda b: _load(b, assign=True),
    "one weight in place": lambda b: b.language_backbone.resizer.bias.add_(1.0),
    "another dtype": lambda b: b.to(torch.float64),
    "another dtype of the encoder alone": lambda b: b.language_backbone.to(torch.float64),
    "another encoder": lambda b: setattr(b, "language_backbone", VETextEncoder(TINY.text, TINY.hidden_dim).eval()),
}


@torch.no_grad()
@pytest.mark.parametrize("change", CHANGES)
def test_changed_weights_empty_the_cache(backbone: SAM3VLBackbone, change: str) -> None:
    before = backbone.forward_text(TEXTS)["language_features"]
    CHANGES[change](backbone)
    after = backbone.forward_text(TEXTS[:1])["language_features"]
    expected = backbone.language_backbone(TEXTS[:1])[1]
    assert after.dtype == expected.dtype
    torch.testing.assert_close(after, expected)
    if "dtype" not in change:
        assert not torch.allclose(after, before[:, :1])
    assert len(backbone.text_cache) == 1


@torch.no_grad()
def test_precisions_are_kept_apart(backbone: SAM3VLBackbone) -> None:
    exact = backbone.forward_text(["a cat"])["language_features"]
    with torch.autocast("cpu", torch.bfloat16):
        assert backbone.forward_text(["a cat"])["language_features"].dtype == torch.bfloat16
    assert torch.equal(backbone.forward_text(["a cat"])["language_features"], exact)


@torch.no_grad()
def test_cache_is_bounded_and_keeps_what_was_used_last(backbone: SAM3VLBackbone) -> None:
    backbone.text_cache.max_entries = 3
    counter = Counter(backbone)
    backbone.forward_text(["one", "two", "three", "four", "five"])  # more at once than it holds
    assert counter.take() == 5 and len(backbone.text_cache) == 3
    backbone.forward_text(["three"])
    backbone.forward_text(["six"])
    assert counter.take() == 1
    backbone.forward_text(["three", "five", "six"])
    assert counter.take() == 0
    backbone.forward_text(["four"])
    assert counter.take() == 1


@torch.no_grad()
def test_an_entry_holds_its_own_text_alone(backbone: SAM3VLBackbone) -> None:
    backbone.forward_text(TEXTS)
    sizes = {entry.untyped_storage().nbytes() for entry in backbone.text_cache._entries.values()}
    assert sizes == {32 * TINY.hidden_dim * 4}


def test_threads_share_it(backbone: SAM3VLBackbone) -> None:
    backbone.text_cache.max_entries = 2
    texts = [f"number {i}" for i in range(5)]
    with torch.no_grad():
        expected = backbone.language_backbone(texts)[1]

    @torch.no_grad()
    def ask(turn: int) -> float:
        order = [(turn + i) % 5 for i in range(3)]
        features = backbone.forward_text([texts[i] for i in order])["language_features"]
        return (features - expected[:, order]).abs().max().item()

    with ThreadPoolExecutor(4) as pool:
        assert max(pool.map(ask, range(60))) < 1e-5


@torch.no_grad()
def test_copies_of_a_model_start_empty(backbone: SAM3VLBackbone) -> None:
    backbone.text_cache.max_entries = 7
    backbone.forward_text(["a cat"])
    for copied in (copy.deepcopy(backbone.text_cache), pickle.loads(pickle.dumps(backbone.text_cache))):
        assert isinstance(copied, TextFeatureCache) and len(copied) == 0 and copied.max_entries == 7
    assert "text_cache" not in "".join(backbone.state_dict())
