"""What is served equals what was trained, whatever happens to the folder meanwhile."""

from __future__ import annotations

import copy
import threading
import time

import pytest
import torch

from lifelong_ens.errors import DamagedFileError, InputError, UnfitNetworkError
from lifelong_ens.networks.plain import resnet20
from lifelong_ens.networks.structured import StructuredNetwork
from lifelong_ens.networks.task import Independent, MultiHead
from lifelong_ens.serving import ServedModel, Task, TaskStore, export_network

BODY = {"name": "resnet20", "options": {"width": 4, "input_shape": [3, 8, 8]}}
OPTIONS = {
    "batch_ensemble": {},
    "norms of its own, two members": {"norm": "per_member", "members_per_task": 2},
    "first task shared": {"first_task": "shared", "bias": "shared"},
    "more pairs": {"rank": 2, "additive": 1},
    "frozen norms": {"norm": "shared_frozen"},
    "heads alone": {"kind": MultiHead},
    "networks of their own": {"kind": Independent},
}


def images(rows: int = 7) -> torch.Tensor:
    return torch.randn(rows, 3, 8, 8, generator=torch.Generator().manual_seed(rows))


@torch.no_grad()
def same(one: torch.Tensor, other: torch.Tensor) -> bool:
    return torch.allclose(one, other, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_served_equals_trained_task_by_task_and_mixed(options, exported):
    trained, folder = exported(**options)
    model, x = ServedModel(folder), images()
    assert model.tasks == ["1", "2", "3"]
    for task in range(3):
        assert same(model(x, str(task + 1)), trained(x, task))
        assert same(model(x, task), trained(x, task))
        assert same(model.member_logits(x, str(task + 1)), trained.member_logits(x, task))
    ids = torch.tensor([2, 0, 0, 1, 2, 1, 0])
    assert same(model(x, ids), trained(x, ids))
    assert torch.equal(model(x, ids), model(x, [model.tasks[i] for i in ids.tolist()]))
    assert model.num_classes(ids).tolist() == [4, 3, 3, 2, 4, 2, 3]
    assert model.num_classes("2", 2).tolist() == [2, 2]
    assert (model(x, ids) > -torch.inf).sum(dim=1).tolist() == model.num_classes(ids).tolist()
    narrow = model(x[:2], torch.tensor([0, 1]))
    assert narrow.shape == (2, 3)


def test_tasks_of_both_kinds_in_one_folder(exported, network):
    trained, folder = exported()
    other = network(classes=[5], kind=Independent)
    store = TaskStore(folder)
    own = {f"0.{name}": one for name, one in other.export_task(0).state_dict().items()}
    store.write("own", Task("network", tuple("abcde"), own))
    model, x = ServedModel(folder), images()
    mixed = model(x, ["own", "1", "own", "3", "2", "own", "1"])
    assert same(mixed[[0, 2, 5]], other(x[[0, 2, 5]], 0))
    ids = torch.tensor([0, 2, 1, 0])
    assert same(mixed[[1, 3, 4, 6], :4], trained(x[[1, 3, 4, 6]], ids))
    assert mixed.shape == (7, 5)
    assert same(model(x, ["1", "3", "1", "2", "own", "own", "own"])[4:], other(x[4:], 0))
    store.write("own", store.read("1"))  # the same name, now of the other kind
    assert same(model(x, "own"), trained(x, 0))
    store.write("own", Task("network", tuple("abcde"), own))
    assert same(model(x, "own"), other(x, 0))


def test_a_network_that_was_narrowed_or_widened_is_as_wide_as_its_tensors(randomise, tmp_path):
    trained = StructuredNetwork(resnet20(width=4, input_shape=(3, 8, 8)), grow=0.5)
    for size in (3, 2):
        trained.begin_task(size)
        trained.start_scales()
        chosen = {}
        for name, layer in trained.layers():
            free = layer.free_units(trained.num_tasks - 1)
            chosen[name] = (free & (free.cumsum(0) <= max(int(free.sum()) // 2, 1))).unsqueeze(0)
        trained.choose_units(chosen)
        trained.finish_task()
    trained = randomise(trained).eval()
    export_network(trained, tmp_path, body=BODY)
    model = ServedModel(tmp_path)
    for task in range(2):
        torch.testing.assert_close(model(images(), task), trained(images(), task), rtol=1e-5, atol=1e-5)


def test_tasks_are_read_when_they_are_asked_for(exported, monkeypatch):
    _, folder = exported()
    read = []
    monkeypatch.setattr(
        TaskStore,
        "read",
        lambda self, name, *a, real=TaskStore.read: read.append(name) or real(self, name, *a),
    )
    model = ServedModel(folder)
    assert read == []
    model(images(), "2")
    model(images(), "2")
    assert read == ["2"] or set(read) == {"2"}  # once more, while the file is young


def test_the_base_is_mapped_not_copied(exported):
    _, folder = exported()
    model = ServedModel(folder)
    mapped = model._network.body.features[0].weight
    with open("/proc/self/maps") as file:
        maps = [line.split() for line in file if "base.safetensors" in line]
    ranges = [tuple(int(end, 16) for end in line[0].split("-")) for line in maps]
    assert any(start <= mapped.data_ptr() < stop for start, stop in ranges)


def test_added_replaced_and_deleted_while_it_serves(exported):
    trained, folder = exported()
    store, model, x = TaskStore(folder), ServedModel(folder), images()
    before = model(x, "1")
    with pytest.raises(InputError, match=r"has no task '4'; choose from 1, 2, 3"):
        model(x, "4")
    store.write("4", store.read("3"))
    assert same(model(x, "4"), trained(x, 2))
    assert model.tasks == ["1", "2", "3", "4"]
    store.write("1", store.read("2"))
    assert same(model(x, "1"), trained(x, 1))
    store.delete("2")
    with pytest.raises(InputError, match="no task '2'"):
        model(x, ["1", "2", "1", "1", "1", "1", "1"])
    assert same(model(x, torch.full((7,), 3)), trained(x, 2))  # positions mean what they meant
    with pytest.raises(InputError, match="no task '2'"):
        model(x, 1)
    store.write("5", store.read("3"))  # takes the slot that is free
    assert same(model(x, "5"), trained(x, 2))
    assert model._network.body.features[0].r.num_members <= 4
    with pytest.raises(InputError, match="no task '2'"):
        store.delete("2")
    assert not same(model(x, "1")[:, :2], before[:, :2])


def test_a_damaged_file_in_place_of_a_good_one_is_refused_until_it_is_mended(exported):
    trained, folder = exported()
    model, x = ServedModel(folder), images()
    model(x, "1")
    path = folder / "tasks/1.safetensors"
    good = path.read_bytes()
    path.write_bytes(good[:-5])
    time.sleep(0.11)
    for _ in range(2):
        with pytest.raises(DamagedFileError, match=r"1\.safetensors is not a complete"):
            model(x, "1")
    assert same(model(x, "2"), trained(x, 1))
    path.write_bytes(good)
    assert same(model(x, "1"), trained(x, 0))


def test_threads_wait_for_each_other(exported):
    trained, folder = exported()
    model, x = ServedModel(folder), images()
    expected = [trained(x, task).detach() for task in range(3)]
    wrong = []

    def ask(task: int) -> None:
        for _ in range(20):
            if not same(model(x, task), expected[task]):
                wrong.append(task)

    threads = [threading.Thread(target=ask, args=(task % 3,)) for task in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_export_and_serving_change_nothing(exported):
    trained, folder = exported()
    state, random = copy.deepcopy(trained.state_dict()), torch.get_rng_state()
    export_network(trained, folder.with_name("other"), body=BODY)
    model = ServedModel(folder)
    model(images(), "1")
    assert torch.equal(torch.get_rng_state(), random)
    assert all(torch.equal(one, state[name]) for name, one in trained.state_dict().items())


def test_gradients_reach_the_images(exported):
    _, folder = exported()
    x = images().requires_grad_(True)
    ServedModel(folder)(x, torch.tensor([0, 1, 2, 0, 1, 2, 0]))[:, 0].sum().backward()
    assert bool((x.grad != 0).any())


def test_task_is_inferred_by_the_surest(exported):
    trained, folder = exported()
    model, x = ServedModel(folder), images(40)
    logits = [trained(x, task).log_softmax(-1) for task in range(3)]
    surest = torch.stack([one.max(-1).values for one in logits]).argmax(0)
    assert model.infer_task(x, "max_probability") == [model.tasks[i] for i in surest.tolist()]
    entropy = torch.stack(
        [-(one * one.exp()).sum(-1) / torch.log(torch.tensor(one.shape[1])) for one in logits]
    )
    assert model.infer_task(x) == [model.tasks[i] for i in entropy.argmin(0).tolist()]


def test_what_is_no_task(exported):
    _, folder = exported()
    model = ServedModel(folder)
    for task, message in (
        (["1", "2"], "2 tasks were given for 7 rows"),
        (torch.tensor([0, 1]), "2 tasks were given for 7 rows"),
        (torch.zeros(7), "int64"),
        ([], "0 tasks"),
        (3, "no task at position 3"),
        (torch.full((7,), -1), "no task at position -1"),
        ("../1", "cannot be called"),
    ):
        with pytest.raises(InputError, match=message):
            model(images(), task)


class Louder(MultiHead):
    """Computes otherwise than its base class."""

    def forward(self, x, task):
        return 2 * super().forward(x, task)


def test_networks_that_cannot_be_exported(network, tmp_path):
    with pytest.raises(UnfitNetworkError, match="answers otherwise"):
        export_network(network(kind=Louder), tmp_path / "a", body=BODY)
    assert TaskStore(tmp_path / "a").names() == []
    with pytest.raises(InputError, match="as many labels"):
        export_network(network(), tmp_path / "b", body=BODY, labels=[["x"]] * 3)
    with pytest.raises(InputError, match="name at least one of the 3 tasks"):
        export_network(network(), tmp_path / "b", body=BODY, tasks={3: "four"})
    with pytest.raises(InputError, match="a task cannot be called"):
        export_network(network(), tmp_path / "b", body=BODY, tasks={0: "a/b"})
    assert not (tmp_path / "b").exists()


def test_a_network_of_ones_own_is_built_by_its_owner(network, tmp_path):
    trained = network()
    mine = {"name": "mine:net", "options": {}}
    with pytest.raises(InputError, match=r"'mine:net' is no network of ours; give build_network="):
        ServedModel(export_network(trained, tmp_path, body=mine).folder)
    model = ServedModel(tmp_path, build_network=lambda: resnet20(width=4, input_shape=(3, 8, 8)))
    assert same(model(images(), "1"), trained(images(), 0))
