"""One batch with rows of many tasks."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor, nn

from experiments.bench.measuring import Call, Goal, Race
from experiments.bench.shared import CIFAR, DIGITS, NUM_CLASSES, answering, images
from lifelong_ens.layers.bank import banks
from lifelong_ens.networks.batch_ensemble import BatchEnsembleNetwork
from lifelong_ens.networks.plain import mlp, resnet18
from lifelong_ens.networks.task import by_task

OURS, ONE_TASK, LOOP = "one pass", "a batch of one task", "a pass for every task"
BODIES, PEFT = "one pass, no heads", "peft, adapter_names, LoRA of rank 1"
WIDTHS = (512, 512)


def mixed_tasks(device: torch.device, *, batch_size: int = 256, num_tasks: int = 100) -> Iterator[Race]:
    """The answers of a batch_ensemble to rows of many tasks, against a one-task batch, a loop over tasks and peft.

    Args:
        device: Where.
        batch_size: Rows.
        num_tasks: Whose rows they are, evenly.
    """
    tasks = (torch.arange(batch_size, device=device) % num_tasks)[torch.randperm(batch_size, device=device)]
    what = f"batch {batch_size} of {num_tasks} tasks"
    x = images(batch_size, DIGITS, device)[0]
    network = _learnt(mlp(hidden=WIDTHS), num_tasks, device)
    yield _race(f"MLP 784-512-512, {what}", network, x, tasks)
    yield Race(
        f"MLP 784-512-512, {what}",
        {
            BODIES: partial(answering, partial(network.member_features, x, tasks)),
            PEFT: partial(_peft, x, tasks.tolist(), num_tasks),
        },
        (Goal(PEFT, ">=", 5.0),),
    )
    x = images(batch_size, CIFAR, device)[0]
    yield _race(f"ResNet-18, width 20, {what}", _learnt(resnet18(width=20), num_tasks, device), x, tasks)


def _race(case: str, network: BatchEnsembleNetwork, x: Tensor, tasks: Tensor) -> Race:
    contestants: dict[str, Callable[[], Call]] = {
        OURS: partial(answering, partial(network, x, tasks)),
        ONE_TASK: partial(answering, partial(network, x, 0)),
        LOOP: partial(answering, partial(by_task, x, tasks, network)),
    }
    return Race(case, contestants, (Goal(ONE_TASK, "<=", 1.3), Goal(LOOP, ">=", 10.0, same_answer=True)))


def _learnt(body: nn.Module, num_tasks: int, device: torch.device) -> BatchEnsembleNetwork:
    """A network that knows so many tasks, in evaluation, with statistics of each task's own."""
    network = BatchEnsembleNetwork(body)
    network.to(device)
    network.regrow([NUM_CLASSES] * num_tasks).eval()
    for bank in banks(network):
        if not bank.learned:
            bank.committed.uniform_(0.5, 1.5)
    return network


def _peft(x: Tensor, tasks: list[int], num_tasks: int) -> Call:
    """The same body with as many LoRA adapters of rank 1, which have the numbers of r and s."""
    from peft import LoraConfig, get_peft_model  # pyright: ignore

    body = mlp(hidden=WIDTHS)
    linear = [name for name, module in body.named_modules() if isinstance(module, nn.Linear)]
    config = LoraConfig(r=1, target_modules=linear, init_lora_weights=False)
    model = get_peft_model(body, config, adapter_name="task0")  # pyright: ignore
    for task in range(1, num_tasks):
        model.add_adapter(f"task{task}", config)
    model.to(x.device).eval()
    names = [f"task{task}" for task in tasks]
    return answering(partial(model, x, adapter_names=names))
