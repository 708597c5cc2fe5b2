"""Avalanche's own strategies in a comparison, named as anybody's are: ``module:function``.

    lifelong-ens compare --strategies finetune,experiments.avalanche_strategies:ewc

A builder takes the network's body and those of ``fit``, ``seed`` and ``device`` that it has a use for; its other
arguments are options on the command line.
"""

from __future__ import annotations

from typing import Any

import torch
from avalanche.training.plugins import LRSchedulerPlugin
from avalanche.training.supervised import EWC, Replay
from avalanche.training.templates import SupervisedTemplate
from torch import nn

from lifelong_ens.networks.task import MultiHead
from lifelong_ens.training.fit import Fit
from strategies.base import silent_evaluator
from strategies.model import TaskModel


def ewc(body: nn.Module, *, fit: Fit, device: torch.device, ewc_lambda: float = 1000.0) -> SupervisedTemplate:
    """Avalanche's Elastic Weight Consolidation (Kirkpatrick et al. 2017) on our network.

    Args:
        body: The network.
        fit: How each task is trained: epochs, batch_size, SGD's options and the cosine schedule are used.
        device: Where it is trained.
        ewc_lambda: Strength of the penalty.
    """
    return EWC(ewc_lambda=ewc_lambda, **_common(body, fit, device))


def replay(body: nn.Module, *, fit: Fit, device: torch.device, memory_size: int = 200) -> SupervisedTemplate:
    """Avalanche's experience replay on our network.

    Args:
        body: The network.
        fit: How each task is trained: epochs, batch_size, SGD's options and the cosine schedule are used.
        device: Where it is trained.
        memory_size: Samples kept, over all tasks.
    """
    return Replay(mem_size=memory_size, **_common(body, fit, device))


def _common(body: nn.Module, fit: Fit, device: torch.device) -> dict[str, Any]:
    model = TaskModel(MultiHead(body))
    optimizer = torch.optim.SGD(
        model.parameters(), fit.learning_rate, momentum=fit.momentum, weight_decay=fit.weight_decay
    )
    plugins = []
    if fit.schedule == "cosine":
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, fit.epochs)
        plugins.append(LRSchedulerPlugin(schedule, reset_scheduler=True, reset_lr=True))
    return {
        "model": model,
        "optimizer": optimizer,
        "criterion": nn.CrossEntropyLoss(),
        "train_mb_size": fit.batch_size,
        "train_epochs": fit.epochs,
        "eval_mb_size": 256,
        "device": device,
        "plugins": plugins,
        "evaluator": silent_evaluator(),
    }
