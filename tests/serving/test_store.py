"""A folder of tasks: names, sizes, what is refused, and many readers beside a writer."""

from __future__ import annotations

import json
import resource
import statistics
import subprocess
import sys
import time

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lifelong_ens.errors import DamagedFileError, InputError
from lifelong_ens.networks.batch_ensemble import BatchEnsembleNetwork
from lifelong_ens.networks.plain import mlp, resnet18
from lifelong_ens.networks.task import MultiHead
from lifelong_ens.serving import ServedModel, Task, TaskStore, export_network
from lifelong_ens.store import natural, write_json, write_tensors


def test_numbers_in_names_count():
    assert natural(["10", "9", "a10", "a9", "b", "1-2"]) == ["1-2", "9", "10", "a9", "a10", "b"]


@pytest.mark.parametrize("name", ["", ".", "..", "../x", "a/b", "a\\b", ".hidden", "a\nb", "a\0b", "é" * 101])
def test_names_that_are_no_files_of_the_folder(name, exported):
    _, folder = exported()
    store = TaskStore(folder)
    for act in (store.read, store.delete, lambda one: store.write(one, store.read("1"))):
        with pytest.raises(InputError, match="a task cannot be called"):
            act(name)
    assert sorted(path.name for path in folder.rglob("*")) == sorted(
        ["model.json", "base.safetensors", "tasks", "1.safetensors", "2.safetensors", "3.safetensors"]
    )


@pytest.mark.parametrize("name", ["cat-dog", "chat noir", "猫", "a.b", "é" * 100])
def test_names_that_are(name, exported):
    _, folder = exported()
    store = TaskStore(folder)
    store.write(name, store.read("1"))
    assert name in store.names()
    assert ServedModel(folder).labels(name) == ("0", "1", "2")
    store.delete(name)
    assert store.names() == ["1", "2", "3"]


def test_a_task_says_where_it_comes_from(network, tmp_path):
    body = {"name": "resnet20", "options": {"width": 4, "input_shape": [3, 8, 8]}}
    metrics = [{"accuracy": 0.5}, {"accuracy": 0.25}, {}]
    labels = [["a", "b", "c"], ["d", "e"], ["f", "g", "h", "i"]]
    about = {"method": {"name": "batch_ensemble", "options": {}}}
    export_network(
        network(), tmp_path, body=body, labels=labels, about=about, metrics=metrics, tasks={1: "second"}
    )
    model = ServedModel(tmp_path)
    assert model.tasks == ["second"]
    assert model.labels("second") == ("d", "e")
    assert model.about("second") == {**about, "metrics": {"accuracy": 0.25}}


def test_another_model_is_not_written_into_the_folder(exported):
    _, folder = exported()
    with pytest.raises(InputError, match="holds another model; choose another folder"):
        exported(kind=MultiHead)
    assert TaskStore(folder).description.layout.layers == "all"


def refused(folder, match, error=DamagedFileError):
    with pytest.raises(error, match=match) as caught:
        ServedModel(folder)(torch.zeros(1, 3, 8, 8), "1")
    assert "\n" not in str(caught.value)


def test_files_that_are_not_of_this_model(exported, network, tmp_path):
    _, folder = exported()
    path = folder / "tasks/1.safetensors"
    store = TaskStore(folder)
    good = store.read("1")

    def with_task(tensors, labels=good.labels, kind=good.kind, about=good.about):
        store.write("1", Task(kind, labels, tensors, about))

    with_task({name: one for name, one in good.tensors.items() if "bias" not in name})
    refused(folder, r"1\.safetensors does not fit this model at head\.bias")
    with_task({**good.tensors, "more": torch.zeros(1)})
    refused(folder, r"does not fit this model at more")
    with_task({name: one.double() for name, one in good.tensors.items()})
    refused(folder, "does not fit this model")
    with_task(good.tensors, labels=("one", "two"))
    refused(folder, "has 2 labels for a head of 3 classes")
    with_task(good.tensors, kind="other")
    refused(folder, "not a task of this version")
    write_tensors(path, good.tensors, {"kind": "members", "labels": list(good.labels), "about": {}})
    refused(folder, "trained beside another base")
    own = {f"0.{name}": one for name, one in network(kind=MultiHead).export_task(0).state_dict().items()}
    with_task({**own, "1.0.features.0.weight": torch.zeros(1)}, kind="network")
    refused(folder, "more than 1 networks")
    with_task({**own, "0.0.features.0.weight": torch.zeros(5, 3, 3, 3)}, kind="network")
    refused(folder, "does not fit this model")
    path.write_bytes(b"x" * 10)
    refused(folder, "is not a complete safetensors file")
    model = json.loads((folder / "model.json").read_text())
    for change, message in (
        ({"format": 99}, r"has format 99, this version reads up to 1; upgrade"),
        ({"format": "1"}, "does not describe a model"),
        ({"layout": {**model["layout"], "layers": "some"}}, "does not describe a model"),
        ({"layout": {**model["layout"], "more": 1}}, "does not describe a model"),
        ({"images": {**model["images"], "mean": [0]}}, "does not describe a model"),
        ({"members_per_task": 0}, "does not describe a model"),
        ({"base": "0" * 64}, r"is not the base that model\.json names"),
        (
            {"network": {**model["network"], "options": {"width": 5}}},
            "the base in .* does not fit its network at",
        ),
        ({"network": {**model["network"], "options": {"wide": 5}}}, "cannot build resnet20"),
    ):
        write_json(folder / "model.json", {**model, **change})
        refused(folder, message)
    write_json(folder / "model.json", model)
    (folder / "base.safetensors").unlink()
    refused(folder, "base.safetensors is missing")
    refused(tmp_path, "is not a model", InputError)


def small(tasks: int) -> BatchEnsembleNetwork:
    torch.manual_seed(0)
    return BatchEnsembleNetwork(mlp(input_shape=(1, 4, 4), hidden=(16,))).regrow([2] * tasks).eval()


SMALL = {"name": "mlp", "options": {"input_shape": [1, 4, 4], "hidden": [16]}}


def test_a_task_of_resnet18_takes_half_a_percent_of_the_base_and_its_head(tmp_path):
    network = BatchEnsembleNetwork(resnet18()).regrow([10])
    export_network(network, tmp_path, body={"name": "resnet18", "options": {}})
    base, task = ((tmp_path / name).stat().st_size for name in ("base.safetensors", "tasks/1.safetensors"))
    head = 4 * 10 * 513
    assert base > 44e6
    assert task - head <= 0.005 * base


@pytest.mark.slow
def test_task_1000_costs_what_task_10_cost(tmp_path):
    store = export_network(small(1), tmp_path, body=SMALL)
    task, model, x = store.read("1"), ServedModel(tmp_path), torch.zeros(1, 1, 4, 4)
    model(x, "1")
    work, memory = [], []
    for number in range(2, 1002):
        with Work() as done:
            store.write(str(number), task)
            model(x, str(number))
        work.append(done.numbers)
        memory.append(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
    sizes = {path.stat().st_size for path in (tmp_path / "tasks").iterdir()}
    assert len(sizes) == 1
    assert len(model.tasks) == 1001
    # medians: now and then a table is full and doubles. Where the head of each task lies, two numbers, is copied
    assert statistics.median(work[-100:]) <= statistics.median(work[:100]) + 2 * len(model.tasks)
    assert memory[-1] - memory[10] < 64 * 1024  # KiB, of which most is the allocator's


class Work(TorchDispatchMode):
    """Counts the numbers that operations on tensors give."""

    def __init__(self):
        super().__init__()
        self.numbers = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        views = {"view", "slice", "select", "as_strided", "detach", "expand", "t", "transpose", "unsqueeze"}
        if func._overloadpacket.__name__ not in views:
            self.numbers += sum(one.numel() for one in tree_leaves(out) if isinstance(one, torch.Tensor))
        return out


# each reads two rows of the task that is replaced and eight of others: 12,500 reads
CALLS = 1250
READER = """
import json, sys, torch
from lifelong_ens.serving import ServedModel
torch.set_num_threads(1)
folder, reads = sys.argv[1], int(sys.argv[2])
model = ServedModel(folder)
x = torch.linspace(-1, 1, 160).view(10, 1, 4, 4)
others = [str(number) for number in range(2, 1001)]
fixed = {}
for name in others:
    fixed[name] = model(x, name)
names = {}
wrong = 0
print("ready", flush=True)
with torch.no_grad():
    for read in range(reads):
        some = ["1", "1", *(others[(read * 7 + i) % 999] for i in range(8))]
        logits = model(x, some)
        for row in range(2, 10):
            wrong += not torch.allclose(logits[row], fixed[some[row]][row], rtol=1e-5, atol=1e-6)
        answer = [round(one, 4) for one in logits[:2].flatten().tolist()]
        names[str(answer)] = names.get(str(answer), 0) + 1
print(json.dumps({"wrong": wrong, "answers": names}))
"""


@pytest.mark.slow
def test_a_task_is_replaced_again_and_again_while_another_process_reads(tmp_path):
    store = export_network(small(1000), tmp_path, body=SMALL, tasks={i: str(i + 1) for i in range(1000)})
    versions = [store.read(name) for name in ("1", "2", "3", "4")]
    x, allowed = torch.linspace(-1, 1, 160).view(10, 1, 4, 4), set()
    for version in versions:
        store.write("1", version)
        with torch.no_grad():
            logits = ServedModel(tmp_path)(x, ["1"] * 10)[:2]
        allowed.add(str([round(one, 4) for one in logits.flatten().tolist()]))
    assert len(allowed) == 4
    command, written = [sys.executable, "-c", READER, str(tmp_path), str(CALLS)], 0
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as reader:
        assert reader.stdout.readline() == "ready\n"
        while reader.poll() is None:
            store.write("1", versions[written % 4])
            written += 1
            time.sleep(0.005)
        found = json.loads(reader.stdout.read())
    assert reader.returncode == 0
    assert found["wrong"] == 0
    assert sum(found["answers"].values()) == CALLS
    # what was old or new at the time, never a mixture; and it did change in between
    assert set(found["answers"]) <= allowed
    assert len(found["answers"]) > 1
    assert written > 50
