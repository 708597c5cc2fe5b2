"""What sparse training costs by count, in the convention of RigL and FreeTickets: relative to one dense training.

Products of zeros are not counted, biases, norms and activations neither. What really runs is dense: an ensemble's
``spent`` has both numbers of its own training.
"""

from __future__ import annotations

from torch import Tensor, nn

from lifelong_ens.accounting.flops import layer_calls
from lifelong_ens.layers.sparse import erk_densities, maskable


def erk_flops_share(network: nn.Module, x: Tensor, density: float) -> float:
    """FLOPs of ``x`` through a network that ERK makes sparse, relative to the dense one: ``f_S / f_D``.

    More than ``density``, since ERK leaves more of the weights that are used at many positions.

    Args:
        network: Dense; may be on the meta device, as ``x`` then is.
        x: Inputs ``(batch, ...)``.
        density: Share of weights kept, in (0, 1).
    """
    weights = maskable(network)
    densities = erk_densities([weight.shape for weight in weights.values()], density)
    share = {id(weight): kept for weight, kept in zip(weights.values(), densities, strict=True)}
    calls = layer_calls(network, x)
    return sum(call.flops * share.get(id(call.weight), 1.0) for call in calls) / sum(
        call.flops for call in calls
    )


def training_cost(
    flops_share: float, epochs: float, dense_epochs: float, update_every: int | None = None
) -> float:
    """Training FLOPs relative to one dense training, of ``epochs`` in all; a step is three forward passes.

    Args:
        flops_share: ``f_S / f_D``.
        epochs: Of all trainings: ``members * dense_epochs`` for DST, exploration and refinements for EDST.
        dense_epochs: Of the dense training.
        update_every: Steps between growth by gradient, each of which needs the gradients of all weights once:
            ``(3 f_S every + 2 f_S + f_D) / (every + 1)`` (Evci et al. 2020). None for growth at random.
    """
    step = 3 * flops_share
    if update_every is not None:
        step = (step * update_every + 2 * flops_share + 1) / (update_every + 1)
    return step / 3 * epochs / dense_epochs
