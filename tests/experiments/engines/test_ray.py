"""A grid on a Ray cluster of two nodes comes to what it comes to here, even if one of them is killed."""

from __future__ import annotations

import dataclasses
import json
import socket
import threading
import time
from pathlib import Path

import pytest

from experiments import grid, progress
from experiments.cli import main
from experiments.engines import make_engine
from experiments.plan import Plan, plan_comparison
from lifelong_ens.errors import InputError
from lifelong_ens.report.status import FOLDER

pytest.importorskip("ray")
from ray.cluster_utils import Cluster

from experiments.engines.ray import Ray

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("default")]


@pytest.fixture(scope="module")
def cluster():
    """A head that has room for one task, and a node for two."""
    found = Cluster(initialize_head=True, head_node_args={"num_cpus": 1})
    yield found
    found.shutdown()


def planned(out: Path, strategies: str, seeds: int, epochs: int) -> Plan:
    words = {"strategies": strategies, "seeds": seeds, "device": "cpu", "out": out}
    return plan_comparison(words, ["--epochs", str(epochs), "--weight_decay", "0.001"])


def lasting(folder: Path) -> dict[str, tuple]:
    """What a run learnt and was measured to be, by the name of its record."""
    records = {path.name: json.loads(path.read_text()) for path in (folder / "records").glob("*.json")}
    return {
        name: (
            one["state_sha256"],
            one["accuracy"],
            one["costs"],
            [task["flops_training"] for task in one["tasks"]],
        )
        for name, one in records.items()
    }


def test_all_records_arrive_though_a_node_is_killed_in_the_middle(cluster, tmp_path):
    alone, here = planned(tmp_path / "alone", "finetune,batch_ensemble,pnn,ewc", 3, 5), tmp_path / "ray"
    alone.run()
    node = cluster.add_node(num_cpus=2)
    states: list[str] = []

    def kill() -> None:
        end = time.monotonic() + 120
        while len(list((here / "records").glob("*.json"))) < 3 and time.monotonic() < end:
            time.sleep(0.05)
        states.extend(path.stem for path in (here / FOLDER).glob("*.json"))
        cluster.remove_node(node, allow_graceful=False)

    killer = threading.Thread(target=kill)
    killer.start()
    dataclasses.replace(alone, out=here, engine=Ray(cluster.address)).run()
    killer.join()
    assert states, "the node was killed while runs went on"
    assert len(lasting(here)) == 12
    assert lasting(here) == lasting(tmp_path / "alone")
    assert not (here / FOLDER).exists()


def test_workers_that_do_not_share_the_folder_send_their_files_and_how_far_they_are(
    cluster, tmp_path, monkeypatch
):
    alone = planned(tmp_path / "alone", "finetune,batch_ensemble", 1, 40)
    alone.run()
    monkeypatch.setattr(grid, "write_sign", lambda path: None)
    noted: list[dict] = []
    note = progress.note_status
    monkeypatch.setattr(
        progress, "note_status", lambda cell, written, out: (noted.append(written), note(cell, written, out))
    )
    dataclasses.replace(alone, out=tmp_path / "ray", engine=Ray(cluster.address)).run()
    assert lasting(tmp_path / "ray") == lasting(tmp_path / "alone")
    assert any(written["task"] > 1 for written in noted)
    kept = {path.relative_to(tmp_path / "ray") for path in (tmp_path / "ray" / "checkpoints").rglob("*.*")}
    assert kept == {
        path.relative_to(tmp_path / "alone") for path in (tmp_path / "alone" / "checkpoints").rglob("*.*")
    }


def test_what_no_node_has_is_refused_with_what_there_is(cluster, tmp_path, capsys):
    command = ["compare", "--epochs", "1", "--out", str(tmp_path / "out"), "--ray_address", cluster.address]
    assert main([*command, "--resources", "cpus=1,gpus=2"]) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "error" in line]
    assert "no node has CPU 1, GPU 2; the cluster has 1 node with CPU 1" in line
    assert not (tmp_path / "out" / FOLDER).exists()


@pytest.mark.parametrize("said", [b"", b"HTTP/1.1 404 Not Found\r\n\r\n", None])
def test_an_address_where_no_cluster_answers_is_named(said, tmp_path, capsys, monkeypatch):
    """Somebody listens and says nothing, or is somebody else; or nobody listens."""
    monkeypatch.setattr("experiments.engines.ray.ANSWER", 0.5)
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"127.0.0.1:{server.getsockname()[1]}"

        def speak() -> None:
            connection, _ = server.accept()
            with connection:
                connection.sendall(said)
                connection.recv(64)
                ended.wait(60)

        ended, speaker = threading.Event(), threading.Thread(target=speak)
        if said is None:
            server.close()
        else:
            speaker.start()
        start = time.monotonic()
        assert main(["compare", "--out", str(tmp_path / "out"), "--ray_address", address]) == 2
        assert time.monotonic() - start < 10
        if said is not None:
            ended.set()
            speaker.join()
    assert f"--ray_address {address}: nothing answers there" in capsys.readouterr().err


def test_without_ray_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "experiments.engines.ray", None)
    with pytest.raises(InputError, match=r"pip install 'lifelong-ens\[ray\]'"):
        make_engine({"engine": "ray"})
