"""Attention and the shared transformer layer against torch's own modules."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from sam3.model.attention_layers import MultiheadAttention, TransformerLayer

DIM, HEADS = 32, 4


@pytest.fixture
def attention() -> tuple[MultiheadAttention, nn.MultiheadAttention]:
    torch.manual_seed(0)
    ours, reference = MultiheadAttention(DIM, HEADS), nn.MultiheadAttention(DIM, HEADS, batch_first=True)
    with torch.no_grad():
        for parameter in ours.parameters():
            parameter.normal_(std=0.3)
    reference.load_state_dict(ours.state_dict())  # strict: the names are torch's
    return ours, reference


def tokens(seed: int, length: int, batch: int = 2) -> Tensor:
    return torch.randn(batch, length, DIM, generator=torch.Generator().manual_seed(seed))


def padding(*valid: int, length: int) -> Tensor:
    return torch.arange(length)[None] >= torch.tensor(valid)[:, None]


SHARING = {
    "all the same": lambda q, k, v: (q, q, q),
    "queries and keys the same": lambda q, k, v: (q, q, tokens(7, 5)),
    "keys and values the same": lambda q, k, v: (q, k, k),
    "all different": lambda q, k, v: (q, k, v),
}


@pytest.mark.parametrize("sharing", SHARING)
def test_equals_torch_whatever_is_shared(attention, sharing: str) -> None:
    ours, reference = attention
    q, k, v = SHARING[sharing](tokens(1, 5), tokens(2, 9), tokens(3, 9))
    mask = padding(3, k.shape[1], length=k.shape[1])
    expected = reference(q, k, v, key_padding_mask=mask, need_weights=False)[0]
    torch.testing.assert_close(ours(q, k, v, mask), expected)
    assert not torch.allclose(ours(q, k, v), expected)


def test_key_and_value_default_to_what_is_left_of_them(attention) -> None:
    ours, _ = attention
    q, k = tokens(1, 5), tokens(2, 9)
    assert torch.equal(ours(q), ours(q, q, q))
    assert torch.equal(ours(q, k), ours(q, k, k))


def test_bias_and_padding_together(attention) -> None:
    ours, reference = attention
    q, k = tokens(1, 5), tokens(2, 9)
    bias = torch.randn(2, HEADS, 5, 9, generator=torch.Generator().manual_seed(4)).requires_grad_()
    mask = padding(3, 9, length=9)
    as_floats = torch.zeros(2, 9).masked_fill(mask, float("-inf"))
    expected = reference(q, k, k, key_padding_mask=as_floats, attn_mask=bias.flatten(0, 1), need_weights=False)[0]
    out = ours(q, k, k, mask, bias)
    torch.testing.assert_close(out, expected)
    out.square().sum().backward()
    assert bias.grad is not None and bias.grad.abs().sum() > 0
    assert not bias.grad[0, ..., 3:].any(), "padding takes no gradient"


def test_causal_tokens_do_not_read_later_ones(attention) -> None:
    ours, reference = attention
    x = tokens(1, 6)
    later = torch.ones(6, 6, dtype=torch.bool).triu(1)
    torch.testing.assert_close(ours(x, is_causal=True), reference(x, x, x, attn_mask=later, need_weights=False)[0])


def test_dropout_acts_in_training_alone() -> None:
    torch.manual_seed(0)
    attention, x = MultiheadAttention(DIM, HEADS, dropout=0.5), tokens(1, 6)
    assert not torch.equal(attention(x), attention(x))
    attention.eval()
    assert torch.equal(attention(x), attention(x))


def test_half_precision_takes_a_float32_bias() -> None:
    attention = MultiheadAttention(DIM, HEADS).to(torch.bfloat16)
    out = attention(tokens(1, 5).bfloat16(), attn_bias=torch.randn(1, HEADS, 5, 5))
    assert out.dtype == torch.bfloat16


def test_heads_must_divide_the_width() -> None:
    with pytest.raises(ValueError, match="width 30 is no multiple of 4 heads"):
        MultiheadAttention(30, 4)


def test_layer_is_three_pre_norm_steps() -> None:
    """The same steps written with torch's attention."""
    torch.manual_seed(0)
    layer = TransformerLayer(DIM, HEADS, mlp_dim=64, dropout=0.1).eval()
    names = {"self_attn", "cross_attn_image", "linear1", "linear2", "norm1", "norm2", "norm3"}
    assert {key.split(".")[0] for key in layer.state_dict()} == names
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.2)
    read: dict[str, nn.MultiheadAttention] = {}
    for name in ("self_attn", "cross_attn_image"):
        read[name] = nn.MultiheadAttention(DIM, HEADS, batch_first=True)
        read[name].load_state_dict(getattr(layer, name).state_dict())
    x, context, pos, context_pos = tokens(1, 5), tokens(2, 9), tokens(3, 5), tokens(4, 9)
    mask, context_mask = padding(5, 2, length=5), padding(9, 4, length=9)

    h = layer.norm1(x)
    y = x + read["self_attn"](h + pos, h + pos, h, key_padding_mask=mask)[0]
    y = y + read["cross_attn_image"](layer.norm2(y), context + context_pos, context, key_padding_mask=context_mask)[0]
    y = y + layer.linear2(layer.linear1(layer.norm3(y)).relu())
    torch.testing.assert_close(layer(x, context, pos, context_pos, mask, context_mask), y)
    without = layer(x, context, None, None, mask, context_mask)
    torch.testing.assert_close(without, layer(x, context, 0 * pos, 0 * context_pos, mask, context_mask))
    assert not torch.allclose(without, y)
