"""Structured ensembles: smaller dense networks, cut out of one that was never trained and then trained apart."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lifelong_ens.accounting.meter import TrainingMeter
from lifelong_ens.convert import BATCH_NORMS
from lifelong_ens.ensembles.ensemble import Ensemble, finished
from lifelong_ens.ensembles.separate import SeparateNetworks
from lifelong_ens.ensembles.training import (
    BuildNetwork,
    Each,
    Progress,
    Training,
    new_network,
    silent,
    train_apart,
    train_network,
)
from lifelong_ens.errors import InputError, UnfitNetworkError
from lifelong_ens.layers.bank import along
from lifelong_ens.networks.channels import Channels, trace_channels
from lifelong_ens.networks.choosing import choose, divergence, mean_importance, member_of_rows
from lifelong_ens.networks.cutting import cut_out
from lifelong_ens.networks.plain import reinitialise as draw_anew
from lifelong_ens.training.data import ImageData
from lifelong_ens.training.fit import Fit
from lifelong_ens.training.losses import member_loss
from lifelong_ens.training.seeding import derived_seed, seeded


def fit_structured(  # noqa: PLR0913 the method has these options
    build_network: BuildNetwork,
    train: ImageData,
    validation: ImageData | None = None,
    *,
    num_members: int = 4,
    prune: float = 0.5,
    scope: Literal["global", "local"] = "global",
    cut: Literal["inner", "all"] = "inner",
    round_to: int = 1,
    mask_epochs: int = 10,
    mask_learning_rate: float = 0.001,
    divergence_weight: float = 0.01,
    reinitialise: bool = False,
    fit: Fit | None = None,
    seed: int = 0,
    device: torch.device | str = "cpu",
    progress: Progress = silent,
    each: Each = map,
) -> Ensemble:
    """Members that are smaller dense networks, each of the channels of one untrained network that matter to it.

    Source: Pomponi, Scardapane and Uncini, Neural Networks 144 (2021), and the authors' code StructuredEnsemble. The
    network stays untrained and frozen while every member learns a scale of each channel, ``s ~ N(0, 1)`` at first, on
    its part of every batch; ``divergence_weight / divergence`` (see ``discrepancy`` for the code's unusual kernel)
    keeps members apart. Then the importance of a channel is ``|dL / ds|``, averaged over the batches of one more pass
    in which every member sees every image and the loss is that of their mean logits. The least important channels are
    cut away, the scales are dropped, and each member is trained by itself.

    As in the code, norms share the batch while scales are learnt, where a norm of each member's own would undo them;
    for the importance, all is in evaluation mode and norms are as new. Where we differ: members' probabilities are
    averaged, as in all our ensembles, where the authors' code averages logits; the scales of the last epoch are used
    (the code means to use the best, but keeps no copy of them); only channels that may be cut are scaled and compared,
    where the code scales a ResNet's stem and classifier too; biases are kept, where the code has none.

    Args:
        build_network: Makes one untrained classifier.
        train: Training images.
        validation: For early stopping alone.
        num_members: How many networks.
        prune: Share of the channels that a member loses, in (0, 1).
        scope: Compare channels of all layers, global, or within their layer, local; each layer keeps at least one.
        cut: inner for layers that no residual sum ties to others, as in the paper: of a residual block the inner
            width; all for the residual stream too.
        round_to: Layers keep a multiple of so many channels, the next above, such as 16: a processor computes so many
            at once, so that fewer would save next to no time.
        mask_epochs: Epochs in which the scales are learnt.
        mask_learning_rate: Of Adam in these epochs.
        divergence_weight: Of the term that keeps members' scales apart.
        reinitialise: Draw members' weights anew, where otherwise they start from those of the untrained network.
        fit: How each member is trained.
        seed: Of the untrained network and of the first member; the others have seeds that follow from it.
        device: Where they are trained.
        progress: Hears of every step.
        each: Calls the training of each network, as ``map`` does; in other processes, for members at once.

    Raises:
        UnfitNetworkError: The network's channels cannot be followed, or none of them can be cut.
    """
    _check_one_of("scope", scope, "global", "local")
    _check_one_of("cut", cut, "inner", "all")
    _check(num_members, prune, round_to, mask_epochs, mask_learning_rate, divergence_weight)
    fit, meter = fit or Fit(), TrainingMeter()
    network = new_network(build_network, seed, device)
    groups = trace_channels(network)
    cuttable = cuttable_channels(groups, cut)
    if not cuttable:
        raise UnfitNetworkError(
            f"{type(network).__name__} has no channels that could be cut; it needs a hidden layer of two units or "
            "more" + (", or cut=all where residual sums tie all there are." if cut == "inner" else ".")
        )
    kept = choose_channels(
        network,
        cuttable,
        train,
        fit.for_scales(mask_learning_rate),
        num_members=num_members,
        prune=prune,
        scope=scope,
        round_to=round_to,
        epochs=mask_epochs,
        divergence_weight=divergence_weight,
        seed=derived_seed(seed, num_members),
        meter=meter,
        progress=progress,
    )

    def train_one(member: int, meter: TrainingMeter) -> nn.Module:
        small = cut_out(network, groups, kept[member])
        if reinitialise:
            # no seed that was used before: the first member's own would give back the untrained network's rows
            with seeded(derived_seed(seed, num_members + 1 + member)):
                draw_anew(small)
        return train_network(
            small,
            train,
            validation,
            fit,
            seed=derived_seed(seed, member),
            meter=meter,
            label=f"structured {member + 1}/{num_members}",
            progress=progress,
        )

    networks, spent = train_apart(train_one, range(num_members), each)
    meter.add(spent)
    widths = [{name: int(keep.sum()) for name, keep in channels.items()} for channels in kept]
    ensemble = SeparateNetworks(networks, "structured", widths=widths)
    return finished(ensemble, build_network, meter, num_members)


def _check_one_of(name: str, value: str, one: str, other: str) -> None:
    if value not in (one, other):
        raise InputError(f"{name} is {one} or {other}, not {value}.")


def _check(
    num_members: int, prune: float, round_to: int, epochs: int, learning_rate: float, weight: float
) -> None:
    if num_members < 1:
        raise InputError(f"an ensemble has at least one member, not {num_members}.")
    if not 0 < prune < 1:
        raise InputError(f"prune is the share of channels that members lose, between 0 and 1, not {prune}.")
    if round_to < 1:
        raise InputError(f"round_to is a number of channels, at least 1, not {round_to}.")
    if epochs < 0 or not learning_rate > 0:
        raise InputError(
            f"mask_epochs is at least 0 and mask_learning_rate above 0, not {epochs} and {learning_rate}."
        )
    if not weight >= 0:
        raise InputError(f"divergence_weight is at least 0, not {weight}.")


def cuttable_channels(groups: Sequence[Channels], cut: str) -> list[Channels]:
    """Groups of which a member may have fewer channels: never the network's outputs; see ``cut`` above."""
    return [
        group
        for group in groups
        if group.size > 1 and not group.features and (cut == "all" or len(group.writers) == 1)
    ]


def choose_channels(
    network: nn.Module,
    groups: Sequence[Channels],
    data: ImageData,
    fit: Fit,
    *,
    num_members: int,
    prune: float,
    scope: str,
    round_to: int,
    epochs: int,
    divergence_weight: float,
    seed: int,
    meter: TrainingMeter,
    progress: Progress = silent,
) -> list[dict[str, Tensor]]:
    """For each member, the channels that it keeps: by group, ``(size,)`` booleans. The network stays as it is.

    Args:
        network: An untrained classifier.
        groups: Its channels that may be cut.
        data: Training images.
        fit: How the scales are trained.
        num_members: How many members choose.
        prune: Share of the channels that are not kept, in (0, 1).
        scope: Compare channels of all groups, ``global``, or within each, ``local``.
        round_to: Of how many channels each group keeps a multiple.
        epochs: In which the scales are learnt.
        divergence_weight: Of the term that keeps members' scales apart.
        seed: Of the scales and of the order of the images.
        meter: Counts what it costs.
        progress: Hears of every step.
    """
    with seeded(seed):
        scaled = ScaledNetwork(network, groups, num_members)
    loss = functools.partial(scaled.loss, divergence_weight=divergence_weight)
    training = Training(scaled, data, fit, seed=seed, meter=meter, epochs=epochs, loss=loss)
    step = progress("structured scales", (epochs + 1) * training.steps_per_epoch)
    training.run(step=step)
    found = channel_importance(scaled, training, step)
    everything = {name: torch.ones_like(rows[0], dtype=torch.bool) for name, rows in found.items()}
    chosen = []
    for member in range(num_members):
        importance = {name: rows[member] for name, rows in found.items()}
        kept = choose(importance, everything, prune, scope=scope)
        chosen.append({name: _filled_up(keep, importance[name], round_to) for name, keep in kept.items()})
    return chosen


def _filled_up(keep: Tensor, importance: Tensor, multiple: int) -> Tensor:
    """With the most important others, up to the next multiple, or all where there is none."""
    count = min(-(-int(keep.sum()) // multiple) * multiple, len(keep))
    order = torch.where(keep, torch.inf, importance).argsort(descending=True, stable=True)
    return torch.zeros_like(keep).index_fill(0, order[:count], True)


class ScaledNetwork(nn.Module):
    """A frozen copy of a network whose channels every member multiplies by numbers of its own.

    Attributes:
        scales: For each group ``s ~ N(0, 1)``, ``(members, size)``; what writes the group is multiplied by it, before
            any norm or activation.

    Args:
        network: A plain network.
        groups: The channels that are scaled.
        num_members: How many members.
    """

    def __init__(self, network: nn.Module, groups: Sequence[Channels], num_members: int) -> None:
        super().__init__()
        self.network, self.groups, self.num_members = copy.deepcopy(network), groups, num_members
        self.network.requires_grad_(False)
        device = next(network.parameters()).device
        self.scales = nn.ParameterList(
            torch.randn(num_members, group.size).to(device)  # the same on every device
            for group in groups
        )
        self._members = torch.empty(0)
        layers = dict(self.network.named_modules())
        for scale, group in zip(self.scales, groups, strict=True):
            for name in group.writers:
                layers[name].register_forward_hook(functools.partial(self._multiply, scale))

    def forward(self, x: Tensor) -> Tensor:
        """Logits ``(rows, classes)``, each row's with the scales of the member that ``member_of_rows`` gives it."""
        self._members = member_of_rows(len(x), self.num_members, x.device)
        return self.network(x)

    def loss(self, images: Tensor, labels: Tensor, divergence_weight: float) -> Tensor:
        """What the scales are trained for: to fit ``(rows, C, H, W)`` and ``(rows,)``, and to be apart."""
        loss = member_loss(self(images), labels)
        if self.num_members == 1 or not divergence_weight:
            return loss
        return loss + divergence_weight / (divergence(list(self.scales)).abs() + 1e-12)

    def mean_logits(self, x: Tensor) -> Tensor:
        """The mean over members of the logits of every row, ``(rows, classes)``."""
        repeated = x.repeat(self.num_members, *[1] * (x.dim() - 1))
        return self(repeated).unflatten(0, (self.num_members, len(x))).mean(dim=0)

    def _multiply(self, scale: Tensor, layer: nn.Module, inputs: Any, output: Tensor) -> Tensor:
        axis = output.dim() - 1 if isinstance(layer, nn.Linear) else 1
        return output * along(scale[self._members], output, axis)


def channel_importance(
    scaled: ScaledNetwork, training: Training, step: Callable[[], object] = lambda: None
) -> dict[str, Tensor]:
    """``|dL / ds|`` of every scale, by group, ``(members, size)``, averaged over the batches of one more pass."""
    scaled.eval()
    for module in scaled.modules():
        if isinstance(module, BATCH_NORMS):
            module.reset_running_stats()
    training.meter.new_phase()

    def losses() -> Iterator[Tensor]:
        with closing(training.counted(step)) as batches:
            for images, labels in batches:
                with training.optimisation.precision(training.device):
                    loss = member_loss(scaled.mean_logits(images), labels)
                yield loss

    names = [group.name for group in scaled.groups]
    with training.meter.timing():
        return mean_importance(losses(), dict(zip(names, scaled.scales, strict=True)))
