"""Layers whose members' weights are functions of hyper-parameters (hyper-batch ensembles).

Wenzel, Snoek, Tran and Jenatton, "Hyperparameter ensembles for robustness and uncertainty quantification", NeurIPS
2020, equation 7. With ``out`` on the first axis, as in torch, member k's weight and bias at hyper-parameters
``lambda`` are

    ``W * (s_k r_k^T) + diag(e(lambda)) (D * (v_k u_k^T))``  and  ``b_k + d_k * e'(lambda)``

with W and D shared. ``e`` and ``e'`` are linear in the scaled logarithms of ``lambda``, without a bias, one map for
each layer and shared by the members, so that every row of a batch may have hyper-parameters of its own. A self-tuning
network (MacKay et al., ICLR 2019) is the case of one member.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from lifelong_ens.layers.bank import Bank, Selection, along, per_row, scale_and_shift
from lifelong_ens.layers.rank1 import Rank1Layer

# the authors' code
EMBEDDING_STD = 1e-4


class HyperSelection(Selection):
    """Which members the rows of the call in progress belong to, and their hyper-parameters.

    Rows of hyper-parameters follow the rule of members: one for each block, or one for each row of the batch.
    """

    def __init__(self) -> None:
        super().__init__()
        self._values: Tensor | None = None
        self._scaled: Tensor | None = None

    @contextmanager
    def at(self, values: Tensor, scaled: Tensor) -> Iterator[None]:
        """Hyper-parameters inside a with-block, as they are and as embeddings read them: ``(K, hyper-parameters)``."""
        before = self._values, self._scaled
        self._values, self._scaled = values, scaled
        try:
            yield
        finally:
            self._values, self._scaled = before

    @property
    def values(self) -> Tensor:
        """The hyper-parameters, ``(K, hyper-parameters)``."""
        return _given(self._values)

    @property
    def scaled(self) -> Tensor:
        """Their scaled logarithms, ``(K, hyper-parameters)``."""
        return _given(self._scaled)


def _given(tensor: Tensor | None) -> Tensor:
    if tensor is None:
        raise RuntimeError(
            "a layer that reads hyper-parameters ran without any; give them with HyperSelection.at."
        )
    return tensor


class HyperLayer(nn.Module):
    """A linear layer or convolution with members whose weights are functions of hyper-parameters.

    Attributes:
        base: The rank-1 layer with ``W``, ``r``, ``s`` and ``b``.
        response: The rank-1 layer with ``D``, ``u`` and ``v``, without a bias.
        response_bias: ``d``, one row per member, or None where the layer has no bias.
        embedding: ``e``, and after it ``e'`` where there is a bias: ``hyper-parameters`` to ``out`` or ``2 out``.

    Args:
        base: A rank-1 layer with one pair of vectors per member and, if any, biases of their own.
        selection: What ``base`` reads too.
        num_hyper: How many hyper-parameters there are.
        init: How ``u`` and ``v`` start, as in ``batch_ensemble``.
        tied: ``u = r`` and ``v = s``, as in the authors' code for Wide ResNets.

    D starts as He et al. (2015) have it and embeddings near zero, both as in that code: members start as without a
    response, and it is the size of D that says how fast the response is learnt.
    """

    base: Rank1Layer
    response: Rank1Layer

    def __init__(
        self,
        base: Rank1Layer,
        selection: HyperSelection,
        num_hyper: int,
        *,
        init: str = "gaussian",
        tied: bool = True,
    ) -> None:
        super().__init__()
        # its output is not all that a norm behind it reads
        base.norm = ()
        self.base, self.selection = base, selection
        self.response, bias = copy.deepcopy(base), base.private_bias
        weight = base.get_parameter("weight")
        self.response.weight = nn.Parameter(torch.empty_like(weight))  # pyright: ignore
        nn.init.kaiming_normal_(self.response.weight, nonlinearity="relu")  # pyright: ignore
        self.response.add_members(base.r.num_members, init=init, selection=selection)
        self.response.component = "response"  # pyright: ignore
        if tied:
            del self.response.r, self.response.s
            # beside the modules: a state dict would hold registered ones twice
            self.response.__dict__.update(r=base.r, s=base.s)
        self.response_bias = None if bias is None else Bank(torch.zeros_like(bias.table()), "bias")
        num_out = base.member_sizes()[1]
        self.embedding = nn.Linear(num_hyper, num_out * (1 if bias is None else 2), bias=False)
        self.embedding.component = "embedding"  # pyright: ignore
        nn.init.normal_(self.embedding.weight, std=EMBEDDING_STD)
        self.to(weight.device, weight.dtype).train(base.training)

    @property
    def tied(self) -> bool:
        """Whether the response has the fast weights of the base."""
        return self.response.r is self.base.r

    def embed(self, scaled: Tensor) -> tuple[Tensor, Tensor | None]:
        """``e`` and ``e'``, each ``(..., out)``, from scaled logarithms ``(..., hyper-parameters)``."""
        # in bfloat16 neighbouring hyper-parameters would be the same
        with torch.autocast(scaled.device.type, enabled=False):
            embedded = self.embedding(scaled)
        if self.response_bias is None:
            return embedded, None
        kernel, bias = embedded.chunk(2, dim=-1)
        return kernel, bias

    def forward(self, x: Tensor) -> Tensor:
        """As the plain layer, each row with its member's weight at its hyper-parameters."""
        y, response = self.base(x), self.response(x)
        kernel, bias = self.embed(self.selection.scaled)
        axis = self.base.channel_axis
        y = scale_and_shift(response, along(per_row(kernel, len(x), self), y, axis), y)
        if bias is None or self.response_bias is None:
            return y
        rows = per_row(self.response_bias.rows(self.selection.members), len(x), self)
        return y + along(rows * per_row(bias, len(x), self), y, axis)

    def l2(self, scaled: Tensor, kernel: Tensor, bias: Tensor, fast_weights: bool = False) -> Tensor:
        """The mean over members and examples of coefficient times squared norm of what an example is computed with.

        Exact, in closed form in the moments of coefficients and embeddings over examples, so that no example's
        weight is ever made (appendix B of the paper). A scalar.

        Args:
            scaled: Scaled logarithms of hyper-parameters, ``(members, examples, hyper-parameters)``.
            kernel: Coefficients of the weight, ``(members, examples)``.
            bias: Coefficients of the bias, ``(members, examples)``.
            fast_weights: Whether norms are those of the members' weights, or of ``W + diag(e) D`` without fast
                weights.
        """
        embedded, embedded_bias = self.embed(scaled)
        base, response = _half(self.base, fast_weights), _half(self.response, fast_weights)
        own, mixed, slope = (
            self._products(*pair) for pair in ((base, base), (base, response), (response, response))
        )
        total = _moments(own, mixed, slope, kernel, embedded)
        if (
            embedded_bias is not None
            and self.response_bias is not None
            and self.base.private_bias is not None
        ):
            own, slope = self.base.private_bias.table(), self.response_bias.table()
            total = total + _moments(own * own, own * slope, slope * slope, bias, embedded_bias)
        return total / len(scaled)

    def _products(self, one: _Half, other: _Half) -> Tensor:
        """Sums over all inputs of the products of two dense weights, per member and output: ``(members or 1, out)``."""
        weights = (one[0] * other[0]).flatten(2).sum(dim=2) if one[0].dim() > 2 else one[0] * other[0]
        if one[1] is None or one[2] is None or other[1] is None or other[2] is None:
            return weights.sum(dim=1).unsqueeze(0)
        groups = getattr(self.base, "groups", 1)
        by_group = weights.view(groups, -1, weights.shape[1])
        inputs = (one[1] * other[1]).view(-1, groups, weights.shape[1])
        return torch.einsum("goi,kgi->kgo", by_group, inputs).flatten(1) * one[2] * other[2]

    def member_weight(self, member: int, embedded: Tensor) -> Tensor:
        """One member's dense weight where its embedding is ``e``, ``(out,)``; in the shape of ``W``."""
        response = self.response.member_weight(member)
        return self.base.member_weight(member) + embedded.view(-1, *[1] * (response.dim() - 1)) * response

    def member_bias(self, member: int, embedded: Tensor) -> Tensor | None:
        """One member's bias where its embedding is ``e'``, ``(out,)``, or None where the layer has none."""
        own = self.base.member_bias(member)
        if own is None or self.response_bias is None:
            return own
        return own + self.response_bias.row(member) * embedded

    def export(self, member: int) -> nn.Module:
        """One member as torch's plain layer, at its row of the hyper-parameters that are selected for all members."""
        kernel, bias = self.embed(self.selection.scaled[member])
        plain: nn.Module = self.base.export(member)  # pyright: ignore
        with torch.no_grad():
            plain.get_parameter("weight").copy_(self.member_weight(member, kernel))
            if bias is not None:
                plain.get_parameter("bias").copy_(self.member_bias(member, bias))  # pyright: ignore
        return plain


class HyperDropout(nn.Module):
    """Dropout at a rate of each row's own, one of its hyper-parameters; nothing in evaluation.

    Args:
        plain: What it stands for; torch's dropouts of 1, 2 and 3 dimensions drop whole channels of ``(batch, C, ...)``.
        selection: The network's selection.
        coordinate: Which hyper-parameter is the rate.
    """

    def __init__(self, plain: nn.Module, selection: HyperSelection, coordinate: int) -> None:
        super().__init__()
        self.plain_type, self.selection, self.coordinate = type(plain), selection, coordinate
        self.train(plain.training)

    def forward(self, x: Tensor) -> Tensor:
        """Zero each number with its row's rate and divide the others by what is left, ``1 - rate``."""
        if not self.training:
            return x
        rates = per_row(self.selection.values[:, self.coordinate : self.coordinate + 1], len(x), self)
        keep = (1 - rates).view(-1, *[1] * (x.dim() - 1))
        whole = self.plain_type is not nn.Dropout
        shape = (*x.shape[:2], *[1] * (x.dim() - 2)) if whole else x.shape
        mask = torch.rand(shape, device=x.device) < keep
        return x * (mask / keep).to(x.dtype)

    def export(self, rate: float) -> nn.Module:
        """The plain dropout with a rate."""
        plain: Any = self.plain_type
        return plain(rate).train(self.training)


_Half = tuple[Tensor, Tensor | None, Tensor | None]


def _half(layer: Rank1Layer, fast_weights: bool) -> _Half:
    """A layer's shared weight, with the members' vectors or without."""
    weight: Tensor = layer.weight  # pyright: ignore
    return (weight, layer.r.table(), layer.s.table()) if fast_weights else (weight, None, None)


def _moments(own: Tensor, mixed: Tensor, slope: Tensor, coefficients: Tensor, embedded: Tensor) -> Tensor:
    """Sum over members of the mean over examples of ``coefficient * |A + D diag(e)|^2``.

    Args:
        own: ``|A|^2`` for every output, ``(members or 1, out)``.
        mixed: ``A D`` for every output.
        slope: ``|D|^2`` for every output.
        coefficients: ``(members, examples)``.
        embedded: ``(members, examples, out)``.
    """
    weighted = coefficients.unsqueeze(-1) * embedded
    zeroth = coefficients.mean(dim=1, keepdim=True)
    first, second = weighted.mean(dim=1), (weighted * embedded).mean(dim=1)
    return (own * zeroth + 2 * mixed * first + slope * second).sum()
