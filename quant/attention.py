"""Attention whose two projections are layers.

`torch.nn.MultiheadAttention` hands `in_proj_weight` and `out_proj.weight` to a function as bare
tensors: no forward hook of a projection ever runs, and the input projection is no layer at all.
`expose_attention_` turns it into an `Attention` with the same parameters and the same outputs,
whose projections are Linear layers that are called.

Shapes: N batch, L query positions, S key positions, E embed_dim, H heads, D = E/H.
"""

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from adq.quant.errors import InputError


class Attention(nn.Module):
    """Multi-head attention with the interface of nn.MultiheadAttention, which it is made from.

        q, k, v = in_proj(query)[..., :E], in_proj(key)[..., E:2E], in_proj(value)[..., 2E:]
        output  = out_proj(softmax(q·kᵀ/√D + mask)·v)      per head

    `in_proj` is called once for each different tensor among query, key and value: self-attention
    costs what it did, cross-attention projects twice as much as it needs (three times with a
    value of its own), so that hooks see every input.

    An `Attention` is not constructed: `expose_attention_` changes the class of a module, so that
    references to it, its hooks and its training mode stay.
    """

    embed_dim: int
    num_heads: int
    head_dim: int
    dropout: float
    batch_first: bool
    in_proj: nn.Linear
    out_proj: nn.Linear
    # nn.TransformerEncoderLayer's fast path reads the bare weights, unless this is False
    _qkv_same_embed_dim: bool

    @property
    def in_proj_weight(self) -> Tensor:
        """(3E, E), for code that reads what nn.MultiheadAttention has."""
        return self.in_proj.weight

    @property
    def in_proj_bias(self) -> Tensor | None:
        """(3E,) or None, for code that reads what nn.MultiheadAttention has."""
        return self.in_proj.bias

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """(output, attention weights or None), as nn.MultiheadAttention gives them.

        Query and output are (N, L, E) with `batch_first`, else (L, N, E), or (L, E) unbatched; key
        and value likewise with S. `attn_mask` is (L, S) or (N·H, L, S) and `key_padding_mask` is
        (N, S), or (S,) unbatched: True forbids, a float is added. `is_causal` says that `attn_mask`
        is the causal one. Weights are (N, L, S), or (N, H, L, S) when not averaged, without N
        unbatched; in training they are those after dropout.

        Raises ValueError for masks and inputs of other shapes, and for `is_causal` without a mask.
        """
        if query.is_nested:
            raise InputError(
                "exposed attention takes no nested tensors: call expose_attention_ on the whole "
                "model, where it can turn them off, not on a part"
            )
        if query.dim() not in (2, 3):
            raise ValueError(f"expected a query of 2 or 3 dimensions, got {query.dim()}")
        if key.shape != value.shape or key.dim() != query.dim():
            raise ValueError(
                f"expected a key and a value of one shape, in {query.dim()} dimensions, "
                f"got {tuple(key.shape)} and {tuple(value.shape)}"
            )
        if is_causal and attn_mask is None:
            raise ValueError("is_causal says that attn_mask is causal: give the attn_mask as well")
        q, k, v = (self._heads(x) for x in self._projections(query, key, value))
        dropout = self.dropout if self.training else 0.0
        weights = None
        if need_weights:
            scores = q * math.sqrt(1 / self.head_dim) @ k.transpose(-2, -1)
            mask = _mask(attn_mask, key_padding_mask, q, k)
            weights = (scores if mask is None else scores + mask).softmax(dim=-1)
            weights = F.dropout(weights, dropout) if dropout else weights
            mixed = weights @ v
            weights = weights.mean(dim=1) if average_attn_weights else weights
        elif is_causal and key_padding_mask is None:
            mixed = F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, is_causal=True)
        else:
            mask = _mask(attn_mask, key_padding_mask, q, k)
            mixed = F.scaled_dot_product_attention(q, k, v, mask, dropout)
        mixed = mixed.transpose(1, 2).flatten(2)  # (N, L, E)
        if query.dim() == 2:
            mixed = mixed.squeeze(0)
            weights = None if weights is None else weights.squeeze(0)
        elif not self.batch_first:
            mixed = mixed.transpose(0, 1)
        return self.out_proj(mixed), weights

    def _projections(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, ...]:
        q, k, v = self.in_proj(query).chunk(3, dim=-1)
        if key is not query:
            _, k, v = self.in_proj(key).chunk(3, dim=-1)
        if value is not key:
            _, _, v = self.in_proj(value).chunk(3, dim=-1)
        return q, k, v

    def _heads(self, x: Tensor) -> Tensor:
        """(N, H, positions, D) of a projection in any of the three layouts."""
        if x.dim() == 2:
            x = x.unsqueeze(0)
        elif not self.batch_first:
            x = x.transpose(0, 1)
        return x.unflatten(-1, (self.num_heads, self.head_dim)).transpose(1, 2)

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any
    ) -> None:
        """Read the keys of an nn.MultiheadAttention as well."""
        for kind in ("weight", "bias"):
            old = f"{prefix}in_proj_{kind}"
            if old in state_dict:
                state_dict[f"{prefix}in_proj.{kind}"] = state_dict.pop(old)
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    def extra_repr(self) -> str:
        return f"embed_dim={self.embed_dim}, num_heads={self.num_heads}"


def expose_attention_(model: nn.Module) -> nn.Module:
    """Turn every nn.MultiheadAttention of `model` into an `Attention`; returns `model`.

    Parameters stay the same objects in the same order; `in_proj_weight` is named `in_proj.weight`
    now, and `in_proj_bias` `in_proj.bias`. State dicts with the old names still load. Left alone
    are attentions with other key or value dimensions (kdim, vdim), with add_bias_kv or
    add_zero_attn, with a parametrized or pruned input projection, and subclasses.

    An nn.TransformerEncoder around them no longer packs padded batches into nested tensors, which
    only torch's fast path can take: its outputs at padded positions are then what they are in
    training, not zeros.
    """
    for module in list(model.modules()):
        if type(module) is nn.MultiheadAttention and _supported(module):
            _expose_(module)
    for module in model.modules():
        if isinstance(module, nn.TransformerEncoder) and any(
            isinstance(inner, Attention) for inner in module.modules()
        ):
            module.use_nested_tensor = False
    return model


def _supported(attention: nn.MultiheadAttention) -> bool:
    return (
        attention._parameters.get("in_proj_weight") is not None
        and "in_proj_bias" in attention._parameters
        and attention.bias_k is None
        and attention.bias_v is None
        and not attention.add_zero_attn
    )


def _expose_(attention: nn.MultiheadAttention) -> None:
    weight, bias = attention.in_proj_weight, attention.in_proj_bias
    outputs, inputs = weight.shape
    # on the meta device nothing is allocated and no random number drawn
    in_proj = nn.Linear(inputs, outputs, bias=bias is not None, device="meta")
    in_proj.weight = weight
    if bias is not None:
        in_proj.bias = bias
    out_proj = attention.out_proj
    if type(out_proj) is nn.modules.linear.NonDynamicallyQuantizableLinear:
        out_proj.__class__ = nn.Linear  # type: ignore[assignment]  # it has nothing of its own
    del attention.in_proj_weight, attention.in_proj_bias, attention.out_proj
    attention.in_proj = in_proj.train(attention.training)
    attention.out_proj = out_proj
    attention._qkv_same_embed_dim = False
    attention.__class__ = Attention  # type: ignore[assignment]


def _mask(
    attn_mask: Tensor | None, key_padding_mask: Tensor | None, q: Tensor, k: Tensor
) -> Tensor | None:
    """What to add to the scores (N, H, L, S): both masks, broadcastable; None without any."""
    samples, heads, queries, _ = q.shape
    keys = k.shape[2]
    total: Tensor | None = None
    if attn_mask is not None:
        expected = ((queries, keys), (samples * heads, queries, keys))
        if tuple(attn_mask.shape) not in expected:
            raise ValueError(
                f"expected attn_mask of shape {expected[0]} or {expected[1]}, "
                f"got {tuple(attn_mask.shape)}"
            )
        total = _additive(attn_mask, q)
        if total.dim() == 3:
            total = total.view(samples, heads, queries, keys)
    if key_padding_mask is not None:
        if key_padding_mask.dim() == 1:  # unbatched
            key_padding_mask = key_padding_mask.unsqueeze(0)
        if tuple(key_padding_mask.shape) != (samples, keys):
            raise ValueError(
                f"expected key_padding_mask of shape {(samples, keys)}, "
                f"got {tuple(key_padding_mask.shape)}"
            )
        padding = _additive(key_padding_mask, q)[:, None, None, :]
        total = padding if total is None else total + padding
    return total


def _additive(mask: Tensor, like: Tensor) -> Tensor:
    """0 where a boolean mask allows and −∞ where it forbids; a float mask as it is."""
    if mask.is_floating_point():
        return mask
    if mask.dtype != torch.bool:
        raise ValueError(f"expected a boolean or a float mask, got {mask.dtype}")
    return like.new_zeros(mask.shape).masked_fill(mask, -math.inf)
