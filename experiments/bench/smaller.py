"""Members that are smaller or sparser, against the dense networks they were cut out of."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch

from experiments.bench.measuring import Goal, Race
from experiments.bench.shared import ENSEMBLED, NUM_CLASSES, answering, images
from lifelong_ens.accounting.flops import layer_calls
from lifelong_ens.ensembles.sparse_inference import export_csr
from lifelong_ens.ensembles.structured import cuttable_channels
from lifelong_ens.layers.sparse import Masks
from lifelong_ens.networks.channels import trace_channels
from lifelong_ens.networks.cutting import cut_out
from lifelong_ens.networks.plain import mlp, resnet18

DENSE = "the dense network"


def structured(device: torch.device, *, batch_size: int = 32, kept: float = 0.5) -> Iterator[Race]:
    """A structured member, half of its inner channels cut out, against the dense network; time relative to FLOPs.

    Args:
        device: Where.
        batch_size: Images.
        kept: Share of the inner channels that are left.
    """
    networks = {**ENSEMBLED, "ResNet-18": (lambda: resnet18(NUM_CLASSES), (3, 32, 32))}
    for name, (build, shape) in networks.items():
        dense = build().eval()
        groups = trace_channels(dense)
        chosen = {
            group.name: torch.randperm(group.size) < max(round(kept * group.size), 1)
            for group in cuttable_channels(groups, "inner")
        }
        small, dense = cut_out(dense, groups, chosen).to(device), dense.to(device)
        x = images(batch_size, shape, device)[0]
        flops = [sum(call.flops for call in layer_calls(one, x)) for one in (small, dense)]
        share = flops[0] / flops[1]
        yield Race(
            f"{name}, batch {batch_size}, {share:.2f} of the FLOPs",
            {
                "structured member": partial(answering, partial(small, x)),
                DENSE: partial(answering, partial(dense, x)),
            },
            (Goal(DENSE, "<=", 1.25, relative_to=share),),
        )


def sparse(
    device: torch.device,
    *,
    batch_size: int = 64,
    width: int = 1024,
    densities: tuple[float, ...] = (0.1, 0.2),
) -> Iterator[Race]:
    """A sparse MLP after export_csr, against the same network dense with its zeros.

    Args:
        device: The CPU.
        batch_size: Images.
        width: Of its two hidden layers.
        densities: Shares of the weights that are not zero.
    """
    for density in densities:
        dense = mlp(NUM_CLASSES, hidden=(width, width)).eval()
        Masks.by_magnitude(dense, 1 - density)
        x = images(batch_size, (1, 28, 28), device)[0]
        csr = export_csr(dense, max_density=1.0)
        yield Race(
            f"MLP 784-{width}-{width}, density {density:g}, batch {batch_size}",
            {"export_csr": partial(answering, partial(csr, x)), DENSE: partial(answering, partial(dense, x))},
            (Goal(DENSE, ">=", 1.3, same_answer=True),),
        )
