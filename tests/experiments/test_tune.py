"""Tuning: what it finds, what it may see, how it goes on, what it refuses."""

from __future__ import annotations

import gc
import json
import multiprocessing
import sys
import time
import weakref
from pathlib import Path

import pandas as pd
import pytest
import yaml

from experiments import catalogue
from experiments.cli import main
from experiments.plan import strategy_owner
from experiments.search import DEFAULT_SEARCH, parse_space, spaces
from lifelong_ens.errors import InputError
from lifelong_ens.training.fit import Fit
from streams import split_digits
from streams.benchmark import without_test

QUICK = ["--validation", "0.2", "--epochs", "2", "--hidden", "[16]", "--limit", "60", "--device", "cpu"]

# a stream whose test images say so when they are read, or are all black
WATCHED = """
from dataclasses import replace

from streams import split_digits
from streams.benchmark import make_benchmark


def _read(images):
    raise RuntimeError("a test image was read")


def watched(*, seed: int = 0, black: bool = False):
    plain = split_digits(seed=seed, validation=0.2, limit=60)
    data = {name: [one.dataset.image_data for one in stream] for name, stream in plain.streams.items()}
    change = (lambda images: images * 0) if black else _read
    return make_benchmark(**{**data, "test": [replace(one, transform=change) for one in data["test"]]})
"""


def tune(out: Path, *arguments: object) -> int:
    return main(["tune", *QUICK, "--out", str(out), *map(str, arguments)])


def refused(capsys, *arguments: object) -> str:
    """The one line of a refusal."""
    capsys.readouterr()
    assert main([str(argument) for argument in arguments]) == 2
    (line,) = [
        line for line in capsys.readouterr().err.splitlines() if line.startswith("lifelong-ens: error: ")
    ]
    return line


def trials(out: Path) -> pd.DataFrame:
    """The finished trials in the order in which they ran, without the time they took."""
    table = pd.read_csv(out / "trials.csv")
    table = table[table["state"] != "interrupted"].sort_values(["strategy", "trial"])
    return table.drop(columns=["seconds", "trial"]).reset_index(drop=True)


def records(out: Path) -> list[dict]:
    return [json.loads(path.read_text()) for path in sorted((out / "records").glob("*.json"))]


@pytest.fixture
def watched(tmp_path, monkeypatch) -> str:
    (tmp_path / "watched_stream.py").write_text(WATCHED)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.delitem(sys.modules, "watched_stream", raising=False)
    return "watched_stream:watched"


def test_the_best_is_chosen_and_compare_states_the_protocol(tmp_path, capsys):
    assert tune(tmp_path / "t", "--trials", 6, "--seeds", 2) == 0
    assert "tuned.yaml" in capsys.readouterr().out
    table = pd.read_csv(tmp_path / "t/trials.csv")
    content = yaml.safe_load((tmp_path / "t/tuned.yaml").read_text())
    for strategy in ("finetune", "batch_ensemble"):
        own = table[table["strategy"] == strategy]
        best = own["validation_accuracy"].max()
        assert len(own) == 6
        assert best > own["validation_accuracy"].min() + 0.1
        assert best >= own.loc[own["trial"] == 0, "validation_accuracy"].item()
        assert own["learning_rate"][own["trial"] == 0].item() == Fit().learning_rate
        protocol = content["tuning"][strategy]
        assert protocol["best_validation_accuracy"] == best
        assert content[strategy]["learning_rate"] == protocol["best"]["learning_rate"]
        assert protocol["flops"] == own["flops"].sum() > 0
        assert protocol["seconds"] == pytest.approx(own["seconds"].sum())
    assert main(["compare", "--config", str(tmp_path / "t/tuned.yaml"), "--out", str(tmp_path / "c")]) == 0
    for record in records(tmp_path / "c"):
        assert record["tuning"] == content["tuning"][record["strategy"]["name"]]
        assert (record["tuning"]["trials"], record["tuning"]["num_tasks_used"]) == (6, 3)
        assert record["tuning"]["seeds"] == [0, 1]
        assert record["strategy"]["options"] == record["tuning"]["best"]
    runs = pd.read_csv(tmp_path / "c/runs.csv")
    assert runs["tuning_trials"].tolist() == [6, 6]
    assert runs["setting"].nunique() == 1
    assert runs["ratio_bytes"].notna().all()
    assert "the best of 6 trials" in (tmp_path / "c/summary.md").read_text()


def test_a_trial_is_the_run_that_compare_makes_of_its_options_on_the_first_tasks(tmp_path):
    """The accuracy of a trial, by hand: the same training, measured on the validation images."""
    from lifelong_ens.networks import mlp
    from strategies import finetune
    from strategies.evaluation import accuracy

    assert tune(tmp_path, "--strategies", "finetune", "--trials", 1, "--num_tasks_used", 2) == 0
    benchmark = split_digits(validation=0.2, limit=60)
    # as Run does: initial values follow from the seed
    import torch

    torch.manual_seed(0)
    strategy = finetune(mlp(input_shape=(1, 8, 8), hidden=(16,)), fit=Fit(epochs=2), seed=0)
    for experience in benchmark.train_stream[:2]:
        strategy.train(experience)
    expected = [accuracy(strategy, [experience]) for experience in list(benchmark.streams["valid"])[:2]]
    assert trials(tmp_path)["validation_accuracy"].item() == pytest.approx(sum(expected) / 2, abs=1e-12)


def test_no_test_image_is_read_by_tune(tmp_path, watched, capsys):
    options = ["--stream", watched, "--network", "mlp", "--epochs", "1", "--patience", "1", "--device", "cpu"]
    strategies = "finetune,joint,batch_ensemble,pnn,packnet,supsup"
    assert (
        main(["tune", *options, "--strategies", strategies, "--trials", "2", "--out", str(tmp_path / "t")])
        == 0
    )
    # and compare, which has to measure, does notice
    with pytest.raises(RuntimeError, match="a test image was read"):
        main(["compare", *options, "--strategies", "finetune", "--out", str(tmp_path / "c")])


def test_what_compare_trains_does_not_depend_on_test_images(tmp_path, watched):
    options = ["--epochs", "4", "--patience", "1", "--network", "mlp", "--device", "cpu"]
    strategies = ["--strategies", "finetune,batch_ensemble"]
    streams = {"black": ["--stream", watched, "--black"], "real": ["--validation", "0.2", "--limit", "60"]}
    for name, stream in streams.items():
        assert main(["compare", *stream, *strategies, *options, "--out", str(tmp_path / name)]) == 0
    for black, real in zip(records(tmp_path / "black"), records(tmp_path / "real"), strict=True):
        real = next(
            one for one in records(tmp_path / "real") if one["strategy"]["name"] == black["strategy"]["name"]
        )
        assert black["state_sha256"] == real["state_sha256"]
        assert black["accuracy"] != real["accuracy"]


def test_nothing_of_a_benchmark_without_test_leads_to_test_data():
    whole = split_digits(validation=0.2)
    tests = [weakref.ref(experience.dataset) for experience in whole.test_stream]
    held_out = [experience.dataset for experience in whole.streams["valid"]]
    part = without_test(whole, 2)
    del whole
    gc.collect()
    assert [one() for one in tests] == [None] * 5
    assert [len(stream) for stream in part.streams.values()] == [2, 2, 2]
    for name in ("test", "valid"):
        for experience, expected in zip(part.streams[name], held_out, strict=False):
            assert experience.dataset.image_data.rows.equal(expected.image_data.rows)
    assert part.classes == split_digits(validation=0.2).classes[:2]


def test_goes_on_to_the_number_of_trials_and_ends_where_one_run_does(tmp_path):
    assert tune(tmp_path / "parts", "--trials", 2) == 0
    # as text, for a column that is empty after two trials may hold names after four
    first = pd.read_csv(tmp_path / "parts/trials.csv", dtype=str)
    assert tune(tmp_path / "parts", "--trials", 4) == 0
    both = pd.read_csv(tmp_path / "parts/trials.csv", dtype=str)
    assert len(both) == 8
    key = ["strategy", "trial"]
    # to the bit, the seconds too: they were not repeated
    again = both[both["trial"].astype(int) < 2].sort_values(key).reset_index(drop=True)
    pd.testing.assert_frame_equal(again, first.sort_values(key).reset_index(drop=True))
    assert tune(tmp_path / "whole", "--trials", 4) == 0
    pd.testing.assert_frame_equal(trials(tmp_path / "whole"), trials(tmp_path / "parts"), check_dtype=False)
    before = (tmp_path / "parts/study.journal").read_text().count('"state"')
    assert tune(tmp_path / "parts", "--trials", 4) == 0
    assert (tmp_path / "parts/study.journal").read_text().count('"state"') == before


def test_killed_in_a_trial_it_ends_where_one_does_that_was_not(tmp_path):
    out = tmp_path / "killed"
    arguments = ["--strategies", "finetune", "--trials", 12, "--epochs", "6"]
    fork = multiprocessing.get_context("fork")
    process = fork.Process(target=tune, args=(out, *arguments))
    process.start()
    journal, deadline = out / "study.journal", time.monotonic() + 60
    while not (journal.exists() and journal.read_text().count("validation_accuracy") >= 3):
        assert process.is_alive()
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.kill()
    process.join()
    assert not (out / "tuned.yaml").exists()
    with journal.open("ab") as file:
        file.write(b'{"op_code":')  # a kill in the middle of a line
    assert tune(out, *arguments) == 0
    assert tune(tmp_path / "whole", *arguments) == 0
    # an interrupted trial has no FLOPs, which makes the column one of floats
    pd.testing.assert_frame_equal(trials(tmp_path / "whole"), trials(out), check_dtype=False)
    found, expected = (
        yaml.safe_load((folder / "tuned.yaml").read_text()) for folder in (out, tmp_path / "whole")
    )
    for content in (found, expected):
        del content["tuning"]["finetune"]["seconds"]
    assert found == expected


def test_interrupted_by_hand_it_says_so_and_goes_on(tmp_path, capsys, monkeypatch):
    from strategies.base import Strategy

    original, calls = Strategy.fit_task, []

    def stop(self, validation):
        calls.append(1)
        if len(calls) == 5:
            raise KeyboardInterrupt
        original(self, validation)

    monkeypatch.setattr(Strategy, "fit_task", stop)
    assert tune(tmp_path, "--strategies", "finetune", "--trials", 3) == 130
    assert "goes on" in capsys.readouterr().err
    assert tune(tmp_path, "--strategies", "finetune", "--trials", 3) == 0
    states = pd.read_csv(tmp_path / "trials.csv")["state"]
    assert states.value_counts().to_dict() == {"finished": 3, "interrupted": 1}
    # one trial finished, then two: three tasks each, and two that were lost
    assert len(calls) == 3 + 2 + 2 * 3


def test_a_trial_that_diverges_is_the_worst_and_not_the_end(tmp_path, capsys):
    arguments = ["--strategies", "finetune", "--trials", 3]
    assert tune(tmp_path / "o", *arguments, "--search", "learning_rate=log:1e-2:1e35") == 0
    table = pd.read_csv(tmp_path / "o/trials.csv")
    assert (table["state"] == "diverged").any()
    assert (table.loc[table["state"] == "diverged", "validation_accuracy"] == 0).all()
    best = yaml.safe_load((tmp_path / "o/tuned.yaml").read_text())["tuning"]["finetune"]["best"]
    assert best == {"learning_rate": 0.05}
    out = tmp_path / "n"
    line = refused(
        capsys, "tune", *QUICK, *arguments, "--search", "learning_rate=log:1e30:1e35", "--out", out
    )
    assert "every trial of finetune failed" in line
    assert not (out / "tuned.yaml").exists()


def test_given_options_are_not_searched_and_stand_in_the_yaml(tmp_path):
    options = [
        "--strategies",
        "batch_ensemble",
        "--trials",
        2,
        "--init",
        "ones",
        "--batch_ensemble.momentum",
        0.5,
    ]
    assert tune(tmp_path, *options, "--num_tasks", 4) == 0
    content = yaml.safe_load((tmp_path / "tuned.yaml").read_text())
    assert content["tuning"]["batch_ensemble"]["search"].keys() == {"learning_rate", "fast_learning_rate"}
    assert content["init"] == "ones"
    assert content["num_tasks"] == 4
    assert content["batch_ensemble"]["momentum"] == 0.5


def test_search_from_yaml_and_command_line(tmp_path):
    config = tmp_path / "e.yaml"
    config.write_text(
        "strategies: [finetune, packnet]\nsearch:\n  optimizer: [sgd, adam]\n"
        "  packnet:\n    prune: '0.3:0.6'\n  epochs: '1:2'\ntrials: 3\nvalidation: 0.2\nlimit: 60\n"
    )
    assert main(["tune", "--config", str(config), "--device", "cpu", "--out", str(tmp_path / "a")]) == 0
    table = pd.read_csv(tmp_path / "a/trials.csv")
    assert len(table) == 6
    assert set(table["optimizer"]) <= {"sgd", "adam"}
    assert set(table["epochs"]) <= {1, 2}
    assert table["prune"][table["strategy"] == "packnet"].between(0.3, 0.6).all()
    assert table["prune"][table["strategy"] == "finetune"].isna().all()
    # compare takes the same file and leaves alone what is for tune
    compare = ["compare", "--config", str(config), "--epochs", "1", "--out", str(tmp_path / "c")]
    assert main(compare) == 0
    assert {record["tuning"] for record in records(tmp_path / "c")} == {None}


def test_a_finished_run_learns_that_its_options_were_tuned_and_no_other_claims_it(tmp_path, caplog):
    assert tune(tmp_path / "t", "--strategies", "finetune", "--trials", 2) == 0
    content = yaml.safe_load((tmp_path / "t/tuned.yaml").read_text())
    rate = content["finetune"]["learning_rate"]
    common = ["compare", *QUICK, "--strategies", "finetune", "--out", str(tmp_path / "c")]
    assert main([*common, "--finetune.learning_rate", str(rate)]) == 0
    (by_hand,) = records(tmp_path / "c")
    assert by_hand["tuning"] is None
    assert main(["compare", "--config", str(tmp_path / "t/tuned.yaml"), "--out", str(tmp_path / "c")]) == 0
    (tuned,) = records(tmp_path / "c")
    assert tuned == by_hand | {"tuning": content["tuning"]["finetune"]}
    assert (
        main([*common, "--config", str(tmp_path / "t/tuned.yaml"), "--finetune.learning_rate", "0.011"]) == 0
    )
    assert "not the tuned ones" in caplog.text
    other = [one for one in records(tmp_path / "c") if one["strategy"]["options"]["learning_rate"] == 0.011]
    assert [one["tuning"] for one in other] == [None]


def test_training_options_of_one_strategy_are_its_own(tmp_path):
    common = ["compare", *QUICK, "--strategies"]
    own = [*common, "finetune,independent", "--independent.learning_rate", "0.2"]
    assert main([*own, "--out", str(tmp_path / "own")]) == 0
    assert main([*common, "independent", "--learning_rate", "0.2", "--out", str(tmp_path / "all")]) == 0
    (expected,) = records(tmp_path / "all")
    finetune, independent = sorted(records(tmp_path / "own"), key=lambda record: record["strategy"]["name"])
    assert independent["state_sha256"] == expected["state_sha256"]
    assert independent["strategy"]["options"] == {"learning_rate": 0.2}
    assert finetune["setting"] == independent["setting"] != expected["setting"]


CHANGES = {
    "strategy option": (["--bias", "shared"], "strategy.options.bias"),
    "training": (["--epochs", "3"], "fit.epochs is 2, here it is 3"),
    "stream": (["--num_tasks", "4"], "stream.options.num_tasks"),
    "network": (["--hidden", "[8]"], "network.options.hidden"),
    "tasks": (["--num_tasks_used", "2"], "num_tasks_used is 3, here it is 2"),
    "seeds": (["--seeds", "2"], "seeds"),
    "search": (["--search", "learning_rate=0.01:0.1"], "search.learning_rate"),
    "stream, other strategy": (["--strategies", "finetune", "--num_tasks", "4"], "stream.options.num_tasks"),
}


@pytest.fixture(scope="module")
def studied(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("studied")
    assert tune(out, "--strategies", "batch_ensemble", "--trials", 1) == 0
    return out


@pytest.mark.parametrize(("arguments", "difference"), CHANGES.values(), ids=CHANGES.keys())
def test_a_study_of_another_space_is_refused(studied, capsys, arguments, difference):
    common = ["tune", *QUICK, "--strategies", "batch_ensemble", "--trials", "2", "--out", studied]
    line = refused(capsys, *common, *arguments)
    assert difference in line
    assert "study.journal" in line
    assert "--out" in line


@pytest.mark.parametrize("content", ["not a study\n", '{"schema": 1}\n', '{"op_code":99}\n', "\n"])
def test_a_file_that_is_no_study_is_refused_and_left_alone(tmp_path, capsys, content):
    path = tmp_path / "study.journal"
    path.write_text(content)
    assert str(path) in refused(capsys, "tune", *QUICK, "--out", tmp_path)
    assert path.read_text() == content


BAD = {
    "no number": (["--search", "learning_rate=abc"], "log:LOW:HIGH"),
    "no space": (["--search", "learning_rate"], "OPTION=SPACE"),
    "one value": (["--search", "learning_rate=0.1"], "two different"),
    "three bounds": (["--search", "learning_rate=0.1:0.2:0.3"], "LOW:HIGH"),
    "order": (["--search", "learning_rate=0.2:0.1"], "LOW is below HIGH"),
    "log of zero": (["--search", "learning_rate=log:0:1"], "above 0"),
    "range of words": (["--search", "optimizer=adam:sgd"], "only numbers"),
    "unknown": (["--search", "learning_rat=0.1:1"], "learning_rate"),
    "of the network": (["--search", "hidden=1,2"], "no option of training"),
    "given too": (["--search", "epochs=1:3"], "given and searched"),
    "trials": (["--trials", "0"], "--trials 0"),
    "too many tasks": (["--num_tasks_used", "6"], "split_digits has 5 tasks"),
    "misspelt": (["--trails", "3"], "trials"),
    "out of range in a trial": (
        ["--strategies", "packnet", "--search", "prune=1.5:2.0"],
        "packnet with prune=",
    ),
}


@pytest.mark.parametrize(("arguments", "hint"), BAD.values(), ids=BAD.keys())
def test_bad_input_is_one_line_that_says_what_to_do(tmp_path, capsys, arguments, hint):
    assert hint in refused(capsys, "tune", *QUICK, "--out", tmp_path, *arguments)
    # and none of them spoils the folder
    assert not (tmp_path / "tuned.yaml").exists()


def test_without_validation_images_it_says_how_to_get_them(tmp_path, capsys):
    assert "--validation 0.1" in refused(capsys, "tune", "--out", tmp_path)
    assert tune(tmp_path, "--strategies", "finetune", "--trials", 1) == 0


def test_without_optuna_it_says_how_to_install_it(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "optuna", None)
    assert "pip install 'lifelong-ens[tune]'" in refused(capsys, "tune", *QUICK, "--out", tmp_path)


@pytest.mark.parametrize("tuning", ["5", "{finetune: 5}", "{finetune: {trials: 3}}"])
def test_compare_refuses_a_protocol_that_is_none(tmp_path, capsys, tuning):
    (tmp_path / "e.yaml").write_text(f"tuning: {tuning}\n")
    assert "`tuning" in refused(capsys, "compare", "--config", tmp_path / "e.yaml", "--out", tmp_path / "o")


def test_every_default_is_searched_where_it_exists_and_holds_the_default_value():
    owners = {name: strategy_owner(name) for name in catalogue.KINDS["strategy"]}
    found = spaces(None, owners, {})
    for name in DEFAULT_SEARCH:
        strategy, _, option = name.rpartition(".")
        for one in [strategy] if strategy else owners:
            assert option in found[one]
            known = vars(Fit()) | owners[one].defaults()
            assert found[one][option].holds(known[option])


def test_spaces_are_read_as_their_option_s_type():
    assert parse_space("epochs", "1:5", int).high == 5
    assert parse_space("x", "log:1e-3:1", float | None).log
    assert parse_space("x", ["null", 0.1], float | None).choices == (None, 0.1)
    assert parse_space("x", [True, False], bool).choices == (True, False)
    with pytest.raises(InputError, match="quotes"):
        parse_space("x", 90, int)
