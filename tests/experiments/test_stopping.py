"""A command that is stopped by a signal keeps what is finished, says so, and goes on to the same end."""

from __future__ import annotations

import contextlib
import json
import logging
import multiprocessing
import os
import random
import signal
import sys
import time
from pathlib import Path

import pytest

from experiments.cli import main
from experiments.stopping import Stopping

COMMAND = [
    "compare",
    "--stream",
    "split_digits",
    "--strategies",
    "finetune,batch_ensemble",
    "--device",
    "cpu",
]
COMMAND += ["--epochs", "10", "--weight_decay", "0.001"]


def command(out: Path, *more: str) -> None:
    """What the installed command does, in a forked process; it never returns."""
    logging.getLogger().handlers.clear()  # pytest's
    # a job in the background of a script has it ignored
    signal.signal(signal.SIGINT, signal.default_int_handler)
    sys.stdin, sys.stdout, sys.stderr = (os.fdopen(n, mode, closefd=False) for n, mode in enumerate("rww"))
    os._exit(main([*COMMAND, *more, "--out", str(out)]))


def run(out: Path) -> None:
    """The command; what it says goes into ``OUT.log``."""
    log = os.open(out.with_suffix(".log"), os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    command(out)


def start(out: Path) -> multiprocessing.process.BaseProcess:
    process = multiprocessing.get_context("fork").Process(target=run, args=(out,))
    process.start()
    return process


def lasting(record: dict) -> dict:
    """A record without times and dates."""
    kept = {name: value for name, value in record.items() if name not in ("started", "finished")}
    rows = [
        {name: value for name, value in row.items() if not name.startswith("seconds")}
        for row in kept["tasks"]
    ]
    return kept | {"tasks": rows}


def records(out: Path) -> dict[str, dict]:
    return {path.name: lasting(json.loads(path.read_text())) for path in (out / "records").glob("*.json")}


def test_stopped_at_random_moments_equals_uninterrupted_to_the_bit(tmp_path):
    whole = start(tmp_path / "whole")
    begin = time.monotonic()
    whole.join()
    duration = time.monotonic() - begin
    assert whole.exitcode == 0
    moments, out, stopped = random.Random(0), tmp_path / "stopped", 0
    for number, code in [(signal.SIGINT, 130), (signal.SIGTERM, 143)] * 2:
        process = start(out)
        process.join(moments.uniform(0.02, 0.6) * duration)
        if process.is_alive():
            os.kill(process.pid, number)
        process.join()
        assert process.exitcode in (code, 0)
        stopped += process.exitcode == code
    said = out.with_suffix(".log").read_text()
    assert stopped > 1
    assert said.count("the same command goes on") == stopped
    assert "Traceback" not in said
    assert not list(out.rglob("*.tmp"))
    last = start(out)
    last.join()
    assert last.exitcode == 0
    assert records(out) == records(tmp_path / "whole")
    assert not (out / "unfinished").exists()


def test_a_stopped_run_says_what_is_kept_and_writes_the_report(tmp_path, capsys, monkeypatch, caplog):
    from strategies.batch_ensemble import BatchEnsemble

    fit_task = BatchEnsemble.fit_task

    def stop_at_third(self, validation):
        if self.network.num_tasks == 3:
            raise KeyboardInterrupt
        fit_task(self, validation)

    monkeypatch.setattr(BatchEnsemble, "fit_task", stop_at_third)
    assert main([*COMMAND, "--out", str(tmp_path)]) == 130
    (line,) = [line for line in caplog.messages if line.startswith("stopped")]
    assert line == (
        "stopped; 1 of 2 runs are finished, batch_ensemble seed 0 is kept after 2 of 5 tasks; "
        "the same command goes on from there"
    )
    page = (tmp_path / "report.html").read_text()
    assert "stopped in task 3 of 5" in page
    assert "2 of 5 tasks are kept" in page
    assert "finetune" in (tmp_path / "summary.md").read_text()


def in_a_process(target) -> int:
    process = multiprocessing.get_context("fork").Process(target=target)
    process.start()
    process.join(20)
    assert process.exitcode is not None
    return process.exitcode


def test_a_second_signal_ends_the_process_while_the_first_is_handled():
    def tidies_up_for_long():
        with Stopping():
            try:
                os.kill(os.getpid(), signal.SIGINT)
                time.sleep(10)
            finally:
                time.sleep(0.3)  # in which an interrupt that is being handled is not raised again
                os.kill(os.getpid(), signal.SIGINT)
                time.sleep(10)

    begin = time.monotonic()
    assert in_a_process(tidies_up_for_long) == 130
    assert time.monotonic() - begin < 8


def test_an_interrupt_that_somebody_swallows_comes_again():
    def swallows():
        with Stopping() as stopping, contextlib.suppress(KeyboardInterrupt):
            with contextlib.suppress(KeyboardInterrupt):
                os.kill(os.getpid(), signal.SIGTERM)
                time.sleep(10)
            time.sleep(10)
        os._exit(stopping.exit_code)

    begin = time.monotonic()
    assert in_a_process(swallows) == 143
    assert time.monotonic() - begin < 8


def test_handlers_are_put_back():
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM), sys.unraisablehook
    with Stopping():
        assert signal.getsignal(signal.SIGINT) != before[0]
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM), sys.unraisablehook) == before


def test_what_the_parent_told_to_be_ignored_stays_ignored():
    def ignoring():
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        with Stopping() as stopping:
            os.kill(os.getpid(), signal.SIGINT)
            assert stopping.signal is None
        os._exit(7)

    assert in_a_process(ignoring) == 7


@pytest.mark.skipif(not hasattr(os, "openpty"), reason="needs a terminal")
def test_in_a_terminal_a_run_is_drawn_in_place_and_leaves_the_cursor_visible(tmp_path):
    import pty

    pid, terminal = pty.fork()
    if pid == 0:
        import experiments.progress

        experiments.progress.LOOK = 0.05
        os.environ["TERM"] = "xterm-256color"
        command(tmp_path, "--epochs", "40")
    seen, sent = b"", False
    with contextlib.suppress(OSError):  # how Linux says that the other side has closed it
        while part := os.read(terminal, 65536):
            seen += part
            if not sent and b"images/s" in seen:
                os.write(terminal, b"\x03")
                sent = True
    _, status = os.waitpid(pid, 0)
    os.close(terminal)
    assert os.waitstatus_to_exitcode(status) == 130
    assert b"finetune seed 0" in seen
    assert seen.rindex(b"\x1b[?25h") > seen.rindex(b"\x1b[?25l")
    assert b"the same command goes on" in seen
    assert b"Traceback" not in seen
