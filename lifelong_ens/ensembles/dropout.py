"""Monte-Carlo dropout: the members are one network under different dropout masks."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Self

import torch
from torch import Tensor, nn

from lifelong_ens.accounting.meter import TrainingMeter
from lifelong_ens.convert import replace_modules
from lifelong_ens.ensembles.ensemble import Ensemble, finished
from lifelong_ens.ensembles.training import BuildNetwork, Progress, new_network, silent, train_network
from lifelong_ens.errors import InputError, UnfitNetworkError
from lifelong_ens.layers.structured import UNIT_LAYERS
from lifelong_ens.replication import replicate
from lifelong_ens.training.data import ImageData, channels_last
from lifelong_ens.training.fit import Fit
from lifelong_ens.training.seeding import seeded

DROPOUTS = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout, nn.FeatureAlphaDropout)
DEFAULT_RATE = 0.1


class DropoutNetwork(Ensemble):
    """A network whose dropout stays on: member ``m`` is what it answers under the ``m``-th draw.

    The draws come from ``seed``, so that the same batch always gets the same answer.

    Args:
        network: A network with dropout layers.
        num_members: How many draws.
        rate: The rate that ``with_dropout`` was given, to build the network again.
        seed: Of the draws.
    """

    kind = "dropout"

    def __init__(self, network: nn.Module, num_members: int, rate: float | None, seed: int) -> None:
        super().__init__(num_members, "mc_dropout")
        self.network, self.rate, self.seed = network, rate, seed

    def forward(self, x: Tensor) -> Tensor:
        """``(batch, ...)`` to ``(members, batch, classes)``: as many copies of the batch, in one pass."""
        dropouts = [module for module in self.network.modules() if isinstance(module, DROPOUTS)]
        modes = [module.training for module in dropouts]
        for module in dropouts:
            module.train()
        try:
            with seeded(self.seed):
                logits = self.network(replicate(channels_last(x), self.num_members))
        finally:
            for module, mode in zip(dropouts, modes, strict=True):
                module.train(mode)
        return logits.unflatten(0, (self.num_members, len(x)))

    def export_member(self, member: int) -> nn.Module:
        """Refused: a member is a draw of masks for one batch, not a network.

        Raises:
            InputError: Always; the line says what to use.
        """
        raise InputError(
            "members of mc_dropout are draws of dropout masks, no networks of their own; take ensemble.network, leave "
            "its dropout layers in training mode and ask it several times."
        )

    def plan(self) -> dict[str, Any]:
        """How many draws, from which seed, at which rate."""
        return {"num_members": self.num_members, "rate": self.rate, "seed": self.seed}

    @classmethod
    def rebuild(cls, plan: Mapping[str, Any], build_network: BuildNetwork) -> Self:
        """The network with its dropout layers."""
        network = with_dropout(build_network(), plan["rate"])
        return cls(network, plan["num_members"], plan["rate"], plan["seed"])


def with_dropout(network: nn.Module, rate: float | None = None) -> nn.Module:
    """The network with dropout at this rate, changed in place: its own dropout layers, or where it has none new ones.

    New ones stand before every linear and convolution layer but the first. Before a convolution they drop whole
    channels, as in the improved MC dropout of Uncertainty Baselines.

    Args:
        network: Any network.
        rate: The share that is dropped; None leaves own layers at their rates, and is 0.1 for new ones.

    Raises:
        InputError: ``rate`` is not in (0, 1).
        UnfitNetworkError: There is no place for dropout.
    """
    if rate is not None and not 0 < rate < 1:
        raise InputError(f"a dropout rate is above 0 and below 1, not {rate}.")
    own = [module for module in network.modules() if isinstance(module, DROPOUTS)]
    if own:
        for module in own:
            module.p = module.p if rate is None else rate
        return network
    layers = [module for module in network.modules() if isinstance(module, UNIT_LAYERS)]
    if len(layers) < 2:
        raise UnfitNetworkError(
            f"{type(network).__name__} has fewer than two linear or convolution layers: no place for dropout."
        )
    kinds = {nn.Linear: nn.Dropout, nn.Conv1d: nn.Dropout1d, nn.Conv2d: nn.Dropout2d, nn.Conv3d: nn.Dropout3d}
    replacements: dict[nn.Module, nn.Module] = {}
    for layer in layers[1:]:
        kind = next(dropout for base, dropout in kinds.items() if isinstance(layer, base))
        replacements[layer] = nn.Sequential(kind(rate or DEFAULT_RATE), layer)
    return replace_modules(network, replacements)


def fit_mc_dropout(
    build_network: BuildNetwork,
    train: ImageData,
    validation: ImageData | None = None,
    *,
    num_members: int = 4,
    fit: Fit | None = None,
    seed: int = 0,
    device: torch.device | str = "cpu",
    progress: Progress = silent,
    rate: float | None = None,
) -> Ensemble:
    """Monte-Carlo dropout: one network trained with dropout and asked several times with dropout on.

    Source: Gal and Ghahramani, ICML 2016.

    Args:
        build_network: Makes one untrained classifier.
        train: Training images.
        validation: For early stopping alone.
        num_members: How many draws of dropout masks answer.
        fit: How it is trained.
        seed: Of its initial weights, of the order of the data and of the draws.
        device: Where it is trained.
        progress: Hears of every step.
        rate: Share of activations that is dropped; the network's own dropout layers, or 0.1 if not given.
    """
    meter = TrainingMeter()

    def build() -> nn.Module:
        return with_dropout(build_network(), rate)

    network = train_network(
        new_network(build, seed, device),
        train,
        validation,
        fit or Fit(),
        seed=seed,
        meter=meter,
        label="mc_dropout",
        progress=progress,
    )
    return finished(DropoutNetwork(network, num_members, rate, seed), build_network, meter, 1)
