"""A network's base and tasks as files."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lifelong_ens.errors import DamagedFileError, InputError
from lifelong_ens.networks.batch_ensemble import BatchEnsembleNetwork
from lifelong_ens.networks.plain import resnet20
from lifelong_ens.networks.task_files import load_tasks, save_tasks

OPTIONS = [{}, {"norm": "per_member", "members_per_task": 2}, {"first_task": "shared", "bias": "shared"}]
OPTIONS += [{"rank": 2, "additive": 1}]


def fresh(width: int = 4, **options) -> BatchEnsembleNetwork:
    return BatchEnsembleNetwork(resnet20(width=width, input_shape=(3, 8, 8)), **options)


def trained(seed: int = 0, **options) -> BatchEnsembleNetwork:
    """Three tasks, a few steps each."""
    torch.manual_seed(seed)
    network = fresh(**options)
    for num_classes in (3, 2, 4):
        network.begin_task(num_classes)
        network.train()
        optimizer = torch.optim.SGD([p for p in network.parameters() if p.requires_grad], 0.1, momentum=0.9)
        for _ in range(3):
            x, y = torch.randn(8, 3, 8, 8), torch.randint(0, num_classes, (8,))
            loss = nn.functional.cross_entropy(network(x, network.num_tasks - 1), y)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        network.finish_task()
    return network.eval()


@pytest.mark.parametrize("options", OPTIONS)
def test_loaded_network_answers_the_same_to_the_bit(options, tmp_path):
    network = trained(**options)
    save_tasks(network, tmp_path)
    other = load_tasks(fresh(**options), tmp_path).eval()
    x = torch.randn(5, 3, 8, 8)
    with torch.no_grad():
        for task in range(3):
            assert torch.equal(network(x, task), other(x, task))


def test_a_task_of_another_base_is_refused_by_name(tmp_path):
    save_tasks(trained(0), tmp_path / "a")
    save_tasks(trained(1), tmp_path / "b")
    (tmp_path / "b/tasks/0002.safetensors").replace(tmp_path / "a/tasks/0002.safetensors")
    with pytest.raises(DamagedFileError, match=r"a/tasks/0002\.safetensors was trained beside another base"):
        load_tasks(fresh(), tmp_path / "a")


def test_a_folder_with_another_base_is_not_written_to(tmp_path):
    save_tasks(trained(0), tmp_path)
    with pytest.raises(InputError, match="another network"):
        save_tasks(trained(1), tmp_path)


def test_a_network_with_other_options_is_refused(tmp_path):
    save_tasks(trained(0), tmp_path)
    with pytest.raises(DamagedFileError, match="does not fit"):
        load_tasks(fresh(width=8), tmp_path)


def test_task_files_hold_only_what_the_task_owns(tmp_path):
    network = trained(0)
    save_tasks(network, tmp_path)
    base = (tmp_path / "base.safetensors").stat().st_size
    network_bytes = sum(tensor.numel() * tensor.element_size() for tensor in network.state_dict().values())
    tasks = sum(path.stat().st_size for path in (tmp_path / "tasks").iterdir())
    headers = 16 * 1024 * 4
    assert network_bytes < base + tasks < network_bytes + headers
