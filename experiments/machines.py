"""What devices can do, as their makers say; importing this loads no torch."""

from __future__ import annotations

from dataclasses import dataclass

from lifelong_ens.errors import InputError, nearest


@dataclass(frozen=True)
class Machine:
    """A device that trains.

    Attributes:
        name: As on the command line.
        flops: Peak in float32 as torch computes it there by default, FLOPs per second, dense: convolutions in TF32
            where there is such a thing.
        flops_amp: Peak with ``amp``: in bfloat16, on a V100 in float16, FLOPs per second, dense.
        memory_bytes: Of the device.
    """

    name: str
    flops: float
    flops_amp: float
    memory_bytes: float

    def peak(self, amp: bool) -> float:
        """FLOPs per second, in mixed precision or not."""
        return self.flops_amp if amp else self.flops


# NVIDIA's data sheets of the V100 (SXM2, 32 GB), A100 (SXM, 80 GB), H100, H200 (SXM) and L4, and its white papers of
# the GA102 and Ada architectures (RTX 3090 and 4090); half of what they state "with sparsity"
MACHINES = {
    name: Machine(name, flops * 1e12, flops_amp * 1e12, memory * 1e9)
    for name, flops, flops_amp, memory in (
        ("v100", 15.7, 125, 32),
        ("a100", 156, 312, 80),
        ("h100", 494, 989, 80),
        ("h200", 494, 989, 141),
        ("l4", 60, 121, 24),
        ("rtx3090", 35.6, 71, 24),
        ("rtx4090", 82.6, 165, 24),
    )
}
# of the peak: ResNet-50 in mixed precision trains at 0.19 of an A100's (2,470 images/s) and 0.23 of a V100's (1,200),
# in TF32 at 0.15 (938): NVIDIA DeepLearningExamples, PyTorch/Classification/ConvNets/resnet50v1.5, with the 24.3 GFLOPs
# of an image that are counted here
EFFICIENCY = 0.2


def machine(name: str) -> Machine:
    """The device of that name.

    Raises:
        InputError: There is none in the table.
    """
    if name not in MACHINES:
        raise InputError(
            f"unknown device {name!r}; {nearest(name, MACHINES)}, or measure the one here with --measure"
        )
    return MACHINES[name]
