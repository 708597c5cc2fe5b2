"""SupSup: a mask over fixed random weights for every task (Wortsman et al., NeurIPS 2020, arXiv 2006.14769)."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any, Literal

import torch
from avalanche.core import SupervisedPlugin
from torch import Tensor, nn

from lifelong_ens.errors import InputError
from lifelong_ens.layers.bank import Bank, Selection
from lifelong_ens.layers.bits import pack, unpack
from lifelong_ens.layers.masked import MaskedLayer, largest
from lifelong_ens.networks.member_body import MemberBody, mask_layers, member_norms
from lifelong_ens.networks.plain import without_classifier
from lifelong_ens.training.fit import Fit
from strategies.base import Strategy

Norm = Literal["statistics_only", "per_member"]
Bias = Literal["shared", "per_member"]


def supsup(
    body: nn.Module,
    *,
    density: float = 0.5,
    norm: Norm = "statistics_only",
    bias: Bias = "shared",
    score_learning_rate: float | None = None,
    fit: Fit | None = None,
    seed: int = 0,
    device: torch.device | str = "cpu",
    plugins: Sequence[SupervisedPlugin] = (),
) -> Strategy:
    """Random weights that are never trained; every task learns which of them it uses, and a head.

    Args:
        body: The network; a classifier's last linear layer is taken off, and of its weights only the signs are kept.
        density: Share of each layer's weights that a task uses, above 0 and at most 1.
        norm: What norms keep per task: statistics_only (affine as it starts: the paper) or per_member (affine too).
        bias: shared biases are zero, as the paper has none; per_member trains one for each task.
        score_learning_rate: Of the scores that masks are chosen by; the common learning rate if not given.
        fit: How each task is trained.
        seed: Of all randomness.
        device: Where it is trained.
        plugins: Avalanche plugins.
    """
    network = SupermaskNetwork(body, density=density, norm=norm, bias=bias)
    options: dict[str, Any] = {} if score_learning_rate is None else {"lr": score_learning_rate}
    return Strategy(
        network=network, fit=fit, seed=seed, device=device, overrides={"mask": options}, plugins=plugins
    )


class SupermaskNetwork(MemberBody):
    """Task t uses ``W * m_t`` in every layer: fixed random W, a binary mask of its own, and a head.

    Source: Wortsman et al. 2020, section 3.2 (scenario GG: the task is known in training and at test time). Masks are
    found by edge-popup (Ramanujan et al., CVPR 2020): those of a layer's weights with the largest scores are used,
    and the gradient of the mask passes straight through to the scores; the released code ranks absolute scores. There
    the last layer is masked too; here, as for all methods that are compared, every task has a trained linear head.

    A committed mask takes a bit per weight, component ``mask``. W stays in the state, component ``shared``. FLOPs are
    those of dense execution.

    Args:
        body: Its shape, and the signs of its weights.
        density: Share of each layer's weights that a task uses.
        norm: What norms keep per task.
        bias: ``shared``, zero, or trained ``per_member``.
    """

    mixed_rows = False

    def __init__(
        self,
        body: nn.Module,
        *,
        density: float = 0.5,
        norm: Norm = "statistics_only",
        bias: Bias = "shared",
    ) -> None:
        if not 0 < density <= 1:
            raise InputError(f"density is above 0 and at most 1, not {density}.")
        members, selection, _ = member_norms(without_classifier(body), norm)
        masked = mask_layers(members, lambda layer: SupermaskLayer(layer, selection, density, bias))
        super().__init__(masked, selection)
        for module in self.body.modules():
            if not isinstance(module, Bank):
                for parameter in module._parameters.values():
                    if parameter is not None:
                        parameter.requires_grad_(False)

    def add_task(self, num_classes: int) -> None:
        """Give the task fresh scores, its norms and a head; everything else is frozen."""
        self._commit_masks()
        super().add_task(num_classes)
        for layer in self._layers():
            layer.masks.start(layer.weight)

    def finish_task(self) -> None:
        """Commit the task's masks as bits; its scores are dropped."""
        self._commit_masks()
        super().finish_task()

    def _commit_masks(self) -> None:
        for layer in self._layers():
            layer.masks.commit()

    def _layers(self) -> Iterator[SupermaskLayer]:
        return (module for module in self.body.modules() if isinstance(module, SupermaskLayer))


class SupermaskLayer(MaskedLayer):
    """A layer of fixed weights ``+-c`` of which each task uses those in its mask.

    ``c = sqrt(2 / (fan_in * density))``: the signed Kaiming constant, scaled so that the masked layer keeps the
    variance of its input (Ramanujan et al. 2020, "scaled Kaiming"). The signs are those of the layer's own
    random initial weights.
    """

    def __init__(self, layer: nn.Module, selection: Selection, density: float, bias: str) -> None:
        super().__init__(layer, selection, bias)
        with torch.no_grad():
            weight = self.weight
            constant = math.sqrt(2 / (weight[0].numel() * density))
            weight.copy_(torch.where(weight < 0, -constant, constant))
            own = self.private_bias.active if self.private_bias is not None else layer.bias
            if isinstance(own, Tensor):
                own.zero_()
        self.masks = Supermasks(weight.shape, max(round(density * weight.numel()), 1))

    def task_weight(self, task: int) -> Tensor:
        """``W * m_t``; gradients of the newest task's pass straight through to its scores."""
        return self.weight * self.masks(task)


class Supermasks(nn.Module):
    """The masks of one layer: committed ones as bits, and the scores of the task in training.

    Attributes:
        packed: Committed masks, uint8 ``(tasks, ceil(n / 8))``.
        scores: Of the task in training, in the shape of the weight; None when every mask is committed.

    Args:
        shape: Of the layer's weight.
        count: How many weights a task uses.
    """

    component = "mask"
    packed: Tensor
    scores: nn.Parameter | None

    def __init__(self, shape: torch.Size, count: int) -> None:
        super().__init__()
        self.shape, self.count = shape, count
        self.register_buffer("packed", torch.zeros(0, math.ceil(shape.numel() / 8), dtype=torch.uint8))
        self.register_parameter("scores", None)

    def start(self, weight: Tensor) -> None:
        """Fresh scores, drawn as torch draws the weights of a layer (as the released code does)."""
        scores = torch.empty(self.shape)
        nn.init.kaiming_uniform_(scores, a=math.sqrt(5))
        self.scores = nn.Parameter(scores.to(weight.device))

    def commit(self) -> None:
        """Keep the mask of the task in training, drop its scores."""
        if self.scores is not None:
            mask = largest(self.scores.detach(), self.count)
            self.packed = torch.cat([self.packed, pack(mask.view(1, -1))])
            self.scores = None

    def forward(self, task: int) -> Tensor:
        """The mask of a task as numbers 0 and 1; -1 is the newest."""
        # -1 is asked for first: compiled code knows no number of a task then
        in_training = self.scores is not None and (task < 0 or task == len(self.packed))
        if not in_training and task < len(self.packed):
            return unpack(self.packed[task], self.shape.numel()).view(self.shape).float()
        if self.scores is None or not in_training:
            raise IndexError(f"task {task} has no mask: there are {len(self.packed)}.")
        mask = largest(self.scores.detach(), self.count).to(self.scores.dtype)
        # the value of the mask to the bit, and the gradient of the scores
        return mask + (self.scores - self.scores.detach()) if self.scores.requires_grad else mask

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any, **kwargs: Any) -> None:
        # how many masks there are is part of the state
        packed = state_dict.get(f"{prefix}packed")
        if packed is not None and packed.shape[1:] == self.packed.shape[1:]:
            self.packed = self.packed.new_zeros(packed.shape)
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)
