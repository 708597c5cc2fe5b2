"""A BatchEnsemble whose members' weights are functions of hyper-parameters, and what it is trained and tuned by.

Source: Wenzel, Snoek, Tran and Jenatton, "Hyperparameter ensembles for robustness and uncertainty quantification",
NeurIPS 2020, equations 7-9.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Self

import torch
from torch import Tensor, nn

from lifelong_ens.convert import Norms, convert, export, replace_modules
from lifelong_ens.ensembles.ensemble import Ensemble
from lifelong_ens.ensembles.space import LABEL_SMOOTHING, Space, hyper_space
from lifelong_ens.ensembles.training import BuildNetwork
from lifelong_ens.layers.hyper import HyperDropout, HyperLayer, HyperSelection
from lifelong_ens.layers.log_uniform import LogUniform
from lifelong_ens.layers.rank1 import Rank1Layer
from lifelong_ens.replication import replicate
from lifelong_ens.training.data import channels_last


class HyperBatchEnsemble(Ensemble):
    """A BatchEnsemble whose members' weights are functions of hyper-parameters; each answers at the mean of its own.

    Attributes:
        body: The network, with ``HyperLayer`` and ``HyperDropout`` in place of torch's layers.
        bounds: The distribution of the members' hyper-parameters.
        space: What the hyper-parameters are.

    Args:
        network: What is converted; it stays as it is.
        num_members: How many members.
        method: What makes it.
        ranges: Of the hyper-parameters, as ``hyper_space`` has them.
        num_images: Training images.
        init: How fast weights start, as in ``batch_ensemble``.
        norm: As in ``batch_ensemble``.
        tied: One pair of fast weights per member and layer for W and D, and the L2 norm is that of ``W + diag(e) D``;
            else a pair each, and the norm is that of the members' weights.
    """

    kind = "hyper_batch"

    def __init__(
        self,
        network: nn.Module,
        num_members: int,
        method: str,
        *,
        ranges: Mapping[str, Any],
        num_images: int,
        init: str = "gaussian",
        norm: Norms = "per_member",
        tied: bool = True,
    ) -> None:
        super().__init__(num_members, method)
        self.space = hyper_space(network, num_images, **ranges)
        self.tied = tied
        self._plan = {"ranges": dict(ranges), "num_images": num_images, "norm": norm, "tied": tied}
        self.selection = HyperSelection()
        self.body = with_hyper_members(
            network, num_members, self.space, self.selection, init=init, norm=norm, tied=tied
        )
        self.bounds = LogUniform(num_members, self.space.low, self.space.high)
        self.to(next(network.parameters()).device)

    def forward(self, x: Tensor) -> Tensor:
        """``(batch, ...)`` to ``(members, batch, classes)``."""
        return self.logits_at(x, self.bounds.mean())

    def logits_at(self, x: Tensor, values: Tensor) -> Tensor:
        """Every member's logits for every row, ``(members, batch, classes)``, at given hyper-parameters.

        Args:
            x: Inputs, ``(batch, ...)``.
            values: Of every member, ``(members, hyper-parameters)``, or of every member and row, ``(members, batch,
                hyper-parameters)``.
        """
        scaled = self.bounds.scaled(values)
        rows = replicate(channels_last(x), self.num_members)
        # one member's dense weight may be cheaper than scaling activations
        members = 0 if self.num_members == 1 else None
        with self.selection.of(members), self.selection.at(values.flatten(0, -2), scaled.flatten(0, -2)):
            return self.body(rows).unflatten(0, (self.num_members, len(x)))

    def training_loss(self, x: Tensor, labels: Tensor) -> Tensor:
        """Mean of the members' losses at hyper-parameters drawn for every member and example (equation 8).

        Cross entropy with the example's label smoothing, computed with its dropout rates, plus its L2 norms divided
        by the number of training images. No gradient reaches the distribution.
        """
        with torch.no_grad():
            values = self.bounds.sample(len(x))
        log_probs = self.logits_at(x, values).float().log_softmax(dim=-1)
        loss = -log_probs.gather(2, labels.expand(self.num_members, -1).unsqueeze(-1)).squeeze(-1)
        if LABEL_SMOOTHING in self.space.ranges:
            smoothing = values[..., self.space.index(LABEL_SMOOTHING)].to(loss.dtype)
            loss = torch.lerp(loss, -log_probs.mean(dim=-1), smoothing)
        return loss.mean() + self.l2(values)

    def l2(self, values: Tensor) -> Tensor:
        """The L2 term of the loss at hyper-parameters ``(members, examples, hyper-parameters)``, exactly; a scalar."""
        scaled, total = self.bounds.scaled(values), values.new_zeros(())
        # products of what is in float32, not under autocast
        with torch.autocast(values.device.type, enabled=False):
            for name, groups in self.space.layers.items():
                layer = self.body.get_submodule(name)
                if isinstance(layer, HyperLayer):
                    kernel, bias = (values[..., self.space.index(group)] for group in groups)
                    total = total + layer.l2(scaled, kernel, bias, fast_weights=not self.tied)
        return total / self.space.num_images

    def tuning_loss(self, x: Tensor, labels: Tensor, entropy_weight: float) -> Tensor:
        """The ensemble's negative log-likelihood at drawn hyper-parameters, less their entropy (equation 9).

        The entropy is the mean over members and hyper-parameters, as in the authors' code; the paper writes the sum.
        """
        log_probs = self.logits_at(x, self.bounds.sample(len(x))).float().log_softmax(dim=-1)
        mixed = torch.logsumexp(log_probs, dim=0) - math.log(self.num_members)
        return -mixed.gather(1, labels.unsqueeze(1)).mean() - entropy_weight * self.bounds.entropy().mean()

    def hyper_parameters(self) -> dict[str, list[float]]:
        """What each member answers at, by name."""
        means = self.bounds.mean().detach().T.tolist()
        return dict(zip(self.space.ranges, means, strict=True))

    def export_member(self, member: int) -> nn.Module:
        """See ``Ensemble.export_member``: the network it was converted from, at the member's hyper-parameters."""
        self._check_member(member)
        with torch.no_grad():
            means = self.bounds.mean()
            with self.selection.at(means, self.bounds.scaled(means)):
                body = export(self.body, member)
        dropouts = [module for module in body.modules() if isinstance(module, HyperDropout)]
        return replace_modules(
            body, {one: one.export(float(means[member, one.coordinate])) for one in dropouts}
        )

    def plan(self) -> dict[str, Any]:
        """How it is converted and what its hyper-parameters are."""
        return {"num_members": self.num_members, **self._plan}

    @classmethod
    def rebuild(cls, plan: Mapping[str, Any], build_network: BuildNetwork) -> Self:
        """The same conversion of the same network."""
        options = {**plan}
        return cls(build_network(), options.pop("num_members"), "", **options)


def with_hyper_members(
    model: nn.Module,
    num_members: int,
    space: Space,
    selection: HyperSelection,
    *,
    init: str = "gaussian",
    norm: Norms = "per_member",
    tied: bool = True,
) -> nn.Module:
    """A copy of any network whose linear layers and convolutions are functions of hyper-parameters, with members.

    Attention stays as it is and shared. Trained weights are kept, as W.

    Args:
        model: The network.
        num_members: How many members.
        space: The hyper-parameters.
        selection: What all layers will read.
        init: As in ``batch_ensemble``.
        norm: As in ``batch_ensemble``.
        tied: As in ``HyperLayer``.

    Raises:
        UnfitNetworkError: No layer can be converted.
    """
    body, _ = convert(
        model, num_members, exclude=[nn.MultiheadAttention], init=init, norm=norm, selection=selection
    )
    options: dict[str, Any] = {"init": init, "tied": tied}
    replacements: dict[nn.Module, nn.Module] = {
        module: HyperLayer(module, selection, len(space.ranges), **options)
        for module in body.modules()
        if isinstance(module, Rank1Layer)
    }
    for name, coordinate in space.dropouts.items():
        module = body.get_submodule(name)
        replacements[module] = HyperDropout(module, selection, space.index(coordinate))
    return replace_modules(body, replacements)
