# SPDX-License-Identifier: Apache-2.0
"""Processes with endpoints, from the test's side: start, ask, stop, kill."""

import json
import os
import select
import signal
import subprocess
import sys
import time
from itertools import count
from pathlib import Path

from helpers.transfer import block_bytes, mapped_caches, spec_of

TESTS = Path(__file__).resolve().parents[1]
SIZES = {"num_kv_heads": 3, "head_dim": 16, "page_size": 4}
LARGE = {"num_kv_heads": 8, "head_dim": 128, "page_size": 64}
TCP = {"UCX_TLS": "tcp", "UCX_NET_DEVICES": "lo"}
_seeds = count(1000)


class RefusedError(Exception):
    """The peer raised an error of fastkv."""


class PeerProcess:
    """One process with one cache of random bytes.

    Args:
        folder: for its cache and its log.
        environment: variables beside the test's own: `TCP` forces UCX's TCP.
        options: of `Endpoint`.
    """

    def __init__(
        self,
        folder,
        *,
        quant=("block_wise_fp8", "none"),
        sizes=SIZES,
        num_blocks=64,
        model="m",
        environment=None,
        flip=False,
        **options,
    ):
        seed = next(_seeds)
        path = folder / f"cache-{seed}"
        self.spec = spec_of(quant, **sizes)
        self.caches = mapped_caches(self.spec, num_blocks, path, seed)
        self.num_blocks = num_blocks
        self._numbers, self._answers, self._text = count(), {}, b""
        self.log = folder / f"log-{seed}"
        said = {
            "quant": quant,
            "sizes": sizes,
            "num_blocks": num_blocks,
            "path": str(path),
            "model": model,
            "flip": flip,
            "endpoint": {"linger": 0.5, **options},
        }
        paths = [str(TESTS), *filter(None, [os.environ.get("PYTHONPATH")])]
        own = {**os.environ, **(environment or {}), "PYTHONPATH": os.pathsep.join(paths)}
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "helpers.transfer_peer", json.dumps(said)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                env=own,
            )
        self._port = None

    @property
    def port(self):
        if self._port is None:
            self._port = self.wait(-1, 40)
        return self._port

    def begin(self, do, **arguments):
        """Send a command; returns its number, for `wait`."""
        assert self.port
        number = next(self._numbers)
        self.process.stdin.write(json.dumps({"do": do, "number": number, **arguments}).encode())
        self.process.stdin.write(b"\n")
        self.process.stdin.flush()
        return number

    def wait(self, number, seconds=30):
        """The answer to a command, within a time that no part of the transfer may exceed."""
        end = time.monotonic() + seconds
        while number not in self._answers:
            left = end - time.monotonic()
            ready, _, _ = select.select([self.process.stdout], [], [], max(0, left))
            assert ready, f"no answer within {seconds} s: {self.log.read_text()}"
            data = os.read(self.process.stdout.fileno(), 1 << 16)
            assert data, f"the peer has ended: {self.log.read_text()}"
            *lines, self._text = (self._text + data).split(b"\n")
            for line in lines:
                said = json.loads(line)
                self._answers[said["number"]] = said
        said = self._answers.pop(number)
        if "error" in said:
            raise RefusedError(f"{said['error']}: {said['text']}")
        return said["value"]

    def ask(self, do, within=30, **arguments):
        return self.wait(self.begin(do, **arguments), within)

    def block(self, i):
        return block_bytes(self.caches, i)

    def blocks(self, ids):
        return [self.block(i) for i in ids]

    def signal(self, what):
        self.process.send_signal(what)

    def stop(self):
        self.signal(signal.SIGSTOP)

    def resume(self):
        self.signal(signal.SIGCONT)

    def kill(self):
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
        self.process.stdin.close()
        self.process.stdout.close()


def until(is_so, seconds=10):
    """Wait for what the test has set going; fails if it does not come."""
    end = time.monotonic() + seconds
    while not is_so():
        assert time.monotonic() < end, f"not within {seconds} s"
        time.sleep(0.002)
