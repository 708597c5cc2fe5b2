"""Who of the processes of one run is still there, and what the others say when one is not."""

from __future__ import annotations

import json
import os
import secrets
import selectors
import socket
import sys
import threading
from typing import Any, NoReturn

from lifelong_ens.errors import InputError
from lifelong_ens.training.devices import Devices, LostDeviceError

# seconds: to connect, and for the main thread to come to its own end before it is ended
CONNECT, GRACE = 120.0, 3.0


class Lifeline:
    """A connection of every process to the first, over which nothing is sent while all goes well.

    When a process dies its connections close, whatever the others are waiting for: they end at once, with one line from
    one of them. Collectives alone would hang until their timeout (NCCL), or fail in a way that says nothing.

    Args:
        devices: Of the run; the processes have been brought together.
    """

    def __init__(self, devices: Devices) -> None:
        self.devices = devices
        self.leaving = threading.Event()
        self.peers = self._accept() if devices.first else self._connect()
        threading.Thread(target=self._watch, name="lifeline", daemon=True).start()

    def leave(self) -> None:
        """All that was to be done together is done."""
        self.leaving.set()
        self._tell({"done": True})

    def fail(self, error: BaseException) -> None:
        """Leave with an error: in the first process it goes on from here, in the others it is the first's to say.

        Raises:
            SystemExit: In another process than the first, unless the error is a defect whose traceback is wanted.
        """
        if isinstance(error, LostDeviceError):
            # the watching thread knows who was lost, says so and ends the process
            self.leaving.wait(4 * GRACE)
        self.leaving.set()
        self._tell({"error": _line(error)})
        if not self.devices.first and isinstance(error, (InputError, OSError)):
            raise SystemExit(2) from None

    def _tell(self, message: dict[str, Any]) -> None:
        for peer in self.peers.values():
            try:
                peer.sendall(json.dumps(message).encode() + b"\n")
            except OSError:  # it has gone already
                continue

    def _watch(self) -> None:
        """Until all peers are done; ends the process when one is lost or has failed."""
        with selectors.DefaultSelector() as selector:
            for rank, peer in self.peers.items():
                selector.register(peer, selectors.EVENT_READ, rank)
            while selector.get_map():
                for key, _ in selector.select():
                    rank: int = key.data
                    message = _read(self.peers[rank])
                    if message is not None and "done" in message:
                        selector.unregister(self.peers[rank])
                    elif self.leaving.wait(0 if message is None else GRACE):
                        return  # this process is at its end too, perhaps with the same error, and says so itself
                    else:
                        self._end(rank, message)

    def _end(self, rank: int, message: dict[str, Any] | None) -> NoReturn:
        """The process of a rank is gone, or says in a message why it is going."""
        if not self.devices.first and message is not None:
            os._exit(2)
        if message is None:
            text = (
                f"the process of device {rank} of {self.devices.count} has died; the same command goes on after "
                "what is finished"
            )
        else:
            text = f"device {rank} of {self.devices.count}: {message['error']}"
        self._tell({"error": text})
        if self.devices.rank <= 1 or _local_rank() == 0:
            bar = "\n" if sys.stderr.isatty() else ""
            sys.stderr.write(f"{bar}lifelong-ens: error: {text}\n")
            sys.stderr.flush()
        os._exit(1)

    def _accept(self) -> dict[int, socket.socket]:
        token = secrets.token_hex(16)
        peers: dict[int, socket.socket] = {}
        with socket.create_server(("", 0)) as server:
            server.settimeout(CONNECT)
            self.devices.same((server.getsockname()[1], token))
            while len(peers) < self.devices.count - 1:
                peer, _ = server.accept()
                peer.settimeout(CONNECT)
                hello = _read(peer)
                if hello is None or hello.get("token") != token:
                    peer.close()
                    continue
                peer.settimeout(None)
                peers[int(hello["rank"])] = peer
        return peers

    def _connect(self) -> dict[int, socket.socket]:
        port, token = self.devices.same((0, ""))
        peer = socket.create_connection((os.environ["MASTER_ADDR"], port), timeout=CONNECT)
        peer.settimeout(None)
        peer.sendall(json.dumps({"rank": self.devices.rank, "token": token}).encode() + b"\n")
        return {0: peer}


def _read(peer: socket.socket) -> dict[str, Any] | None:
    """The next message; None where there is none any more."""
    line = b""
    try:
        while not line.endswith(b"\n"):
            byte = peer.recv(1)
            if not byte:
                return None
            line += byte
        return json.loads(line)
    except (OSError, ValueError):
        return None


def _line(error: BaseException) -> str:
    """An error in one line."""
    # the message of others says little by itself
    kind = "" if isinstance(error, InputError) else f"{type(error).__name__}: "
    return " ".join(f"{kind}{error}".split())


def _local_rank() -> int:
    return int(os.environ.get("LOCAL_RANK", os.environ.get("SLURM_LOCALID", "0")))
