"""Multi-head attention whose four projections are rank-1 layers."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lifelong_ens.layers.linear import Rank1Linear


class Rank1MultiheadAttention(nn.Module):
    """``nn.MultiheadAttention`` (batch first) with a rank-1 layer for each of q, k, v and the output.

    Torch's own module reads ``out_proj.weight`` without ever calling ``out_proj.forward``, so swapping that
    child alone would change nothing; the whole attention is replaced. Weights are named after their
    projection.

    Args:
        attention: The plain attention, whose weights are kept.
        num_members: How many members.
        **options: As in ``Rank1Layer.add_members``.

    Raises:
        ValueError: The attention is not batch first, or has ``add_bias_kv`` or ``add_zero_attn``.
    """

    # torch's fused encoder path reads packed weights behind the module's back: these three keep it off
    in_proj_bias = None
    _qkv_same_embed_dim = False
    batch_first = True

    q_proj: Rank1Linear
    k_proj: Rank1Linear
    v_proj: Rank1Linear

    def __init__(self, attention: nn.MultiheadAttention, num_members: int, **options: Any) -> None:
        super().__init__()
        if not attention.batch_first:
            raise ValueError("nn.MultiheadAttention has its rows on axis 1; build it with batch_first=True.")
        if attention.bias_k is not None or attention.add_zero_attn:
            raise ValueError(
                "nn.MultiheadAttention with add_bias_kv or add_zero_attn has no rank-1 form here."
            )
        self.embed_dim, self.num_heads = attention.embed_dim, attention.num_heads
        self.head_dim, self.dropout = attention.head_dim, attention.dropout
        self.kdim, self.vdim = attention.kdim, attention.vdim
        for name, plain in zip(("q_proj", "k_proj", "v_proj"), _input_projections(attention), strict=True):
            setattr(self, name, Rank1Linear.of(plain, num_members, **options))
        self.out_proj = Rank1Linear.of(attention.out_proj, num_members, **options)
        self.train(attention.training)

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
        """As in torch: ``(batch, L, E)`` and, if needed, weights ``(batch, [heads,] L, S)``."""
        if query.dim() != 3:
            raise ValueError(f"Rank1MultiheadAttention: expected (batch, L, E), not {tuple(query.shape)}.")
        if is_causal and attn_mask is None:
            raise ValueError("Rank1MultiheadAttention: is_causal is a hint beside attn_mask; pass the mask.")
        q, k, v = (
            projection(x).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
            for projection, x in ((self.q_proj, query), (self.k_proj, key), (self.v_proj, value))
        )
        mask = self._mask(attn_mask, key_padding_mask, q)
        dropout = self.dropout if self.training else 0.0
        weights = None
        if need_weights:
            scores = q @ k.transpose(-2, -1) * self.head_dim**-0.5
            weights = torch.softmax(scores if mask is None else scores + mask, dim=-1)
            weights = F.dropout(weights, dropout)
            mixed = weights @ v
            weights = weights.mean(dim=1) if average_attn_weights else weights
        else:
            mixed = F.scaled_dot_product_attention(q, k, v, mask, dropout)
        return self.out_proj(mixed.transpose(1, 2).flatten(2)), weights

    def _mask(self, attn_mask: Tensor | None, padding: Tensor | None, q: Tensor) -> Tensor | None:
        """Both masks as one to add to the scores, broadcastable to ``(batch, heads, L, S)``."""
        parts = []
        if attn_mask is not None:
            per_head = attn_mask.dim() == 3
            parts.append(attn_mask.unflatten(0, (-1, self.num_heads)) if per_head else attn_mask)
        if padding is not None:
            parts.append(padding[:, None, None, :])
        additive = [
            torch.zeros_like(part, dtype=q.dtype).masked_fill_(part, -torch.inf)
            if part.dtype == torch.bool
            else part.to(q.dtype)
            for part in parts
        ]
        return sum(additive[1:], additive[0]) if additive else None

    def export(self, member: int) -> nn.MultiheadAttention:
        """One member as torch's plain attention."""
        q, k, v, out = (
            layer.export(member) for layer in (self.q_proj, self.k_proj, self.v_proj, self.out_proj)
        )
        plain = nn.MultiheadAttention(
            self.embed_dim,
            self.num_heads,
            self.dropout,
            bias=out.bias is not None,
            kdim=self.kdim,
            vdim=self.vdim,
            batch_first=True,
            device=out.weight.device,
            dtype=out.weight.dtype,
        )
        with torch.no_grad():
            for target, source in zip(_input_projections(plain), (q, k, v), strict=True):
                target.weight.copy_(source.weight)
                if source.bias is not None:
                    target.bias.copy_(source.bias)
            plain.out_proj.weight.copy_(out.weight)
            if out.bias is not None:
                plain.out_proj.bias.copy_(out.bias)
        return plain.train(self.training)


def _input_projections(attention: nn.MultiheadAttention) -> list[nn.Linear]:
    """The q, k and v projections as layers whose tensors are views of the attention's own."""
    if attention.in_proj_weight is not None:
        weights = attention.in_proj_weight.detach().chunk(3)
        trained = attention.in_proj_weight.requires_grad
    else:
        weights = [getattr(attention, f"{name}_proj_weight").detach() for name in "qkv"]
        trained = attention.q_proj_weight.requires_grad
    biases = [None] * 3 if attention.in_proj_bias is None else attention.in_proj_bias.detach().chunk(3)
    layers = []
    for weight, bias in zip(weights, biases, strict=True):
        layer = nn.Linear(weight.shape[1], weight.shape[0], bias is not None, device="meta")
        layer.weight = nn.Parameter(weight, requires_grad=trained)
        if bias is not None:
            layer.bias = nn.Parameter(bias)
        layers.append(layer.train(attention.training))
    return layers
