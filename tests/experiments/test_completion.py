"""What the shell completes, asked of the shells themselves."""

from __future__ import annotations

import shutil
import subprocess
import sys

import pytest

from experiments.cli import main

pytestmark = pytest.mark.skipif(shutil.which("bash") is None, reason="no bash here")


@pytest.fixture(scope="module")
def script(tmp_path_factory):
    """The script for bash."""
    path = tmp_path_factory.mktemp("completion") / "script.bash"
    command = [sys.executable, "-m", "experiments.cli", "completion", "bash"]
    path.write_text(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    return path


def completed(script, *words: str) -> list[str]:
    """What bash offers for the last word."""
    code = (
        f'source "{script}"; COMP_WORDS=("$@"); COMP_CWORD=$(($# - 1)); '
        "$(complete -p lifelong-ens | sed 's/.*-F \\([^ ]*\\) .*/\\1/'); printf '%s\\n' \"${COMPREPLY[@]}\""
    )
    command = ["bash", "--norc", "-c", code, "bash", "lifelong-ens", *words]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()


CASES = {
    "command": (["com"], ["compare", "completion"]),
    "option": (["compare", "--strat"], ["--strategies"]),
    "name": (["compare", "--strategies", "batch"], ["batch_ensemble"]),
    "name behind a comma": (["tune", "--strategies", "finetune,batch"], ["finetune,batch_ensemble"]),
    "stream": (["compare", "--stream", "split_ci"], ["split_cifar10", "split_cifar100"]),
    "network": (["ensemble", "--network", "wr"], ["wrn28_10"]),
    "method": (["ensemble", "--methods", "deep,ed"], ["deep,edst"]),
    "data": (["ensemble", "--data", "cifar10"], ["cifar10", "cifar100"]),
    "option of training": (["compare", "--weight_d"], ["--weight_decay"]),
    "option of a strategy": (["compare", "--quant"], ["--quantile"]),
    "choice of such an option": (["compare", "--optimizer", "a"], ["adam", "adamw"]),
    "reproduction": (["reproduce", "be_"], ["be_cost_table"]),
    "name to list": (["list", "synap"], ["synaptic_intelligence"]),
}


@pytest.mark.parametrize(("words", "expected"), CASES.values(), ids=CASES.keys())
def test_bash_completes(script, words, expected):
    assert completed(script, *words) == expected


def test_folders_are_completed(script, tmp_path):
    (tmp_path / "results").mkdir()
    assert completed(script, "report", str(tmp_path / "re")) == [str(tmp_path / "results")]


@pytest.mark.skipif(shutil.which("zsh") is None, reason="no zsh here")
def test_zsh_reads_its_script(tmp_path, capsys):
    assert main(["completion", "zsh"]) == 0
    path = tmp_path / "_lifelong-ens"
    path.write_text(capsys.readouterr().out)
    subprocess.run(["zsh", "-n", str(path)], check=True)
    assert path.read_text().startswith("#compdef lifelong-ens")


def test_it_is_printed_without_torch():
    code = (
        "import sys\nfrom experiments.cli import main\nmain(['completion', 'bash'])\n"
        "print(sorted({'torch', 'avalanche', 'pandas'} & set(sys.modules)))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.splitlines()[-1] == "[]"
