# SPDX-License-Identifier: Apache-2.0
"""An engine within one process that moves real bytes when the test says so, and not before.

Like the engines that fastkv uses it cannot be stopped: what was posted can still move after its
handle was released.
"""

import ctypes
from itertools import count

from fastkv.errors import TransferError
from fastkv.transfer import Progress

_engines = {}
_numbers = count()


class Move:
    """One posted transfer."""

    def __init__(self, pairs):
        self.pairs = pairs  # (from, to, bytes)
        self.progress = Progress.MOVING

    def step(self, runs=1):
        """Move some of the runs; the last one ends it."""
        for _ in range(runs):
            if self.pairs and self.progress is Progress.MOVING:
                source, target, nbytes = self.pairs.pop(0)
                ctypes.memmove(target, source, nbytes)
        if not self.pairs and self.progress is Progress.MOVING:
            self.progress = Progress.DONE

    def finish(self):
        self.step(len(self.pairs))

    def fail(self):
        if self.progress is Progress.MOVING:
            self.progress = Progress.FAILED
            self.pairs.clear()

    def corrupt(self):
        """Leave a run out: its bytes never arrive, and the engine calls that a success."""
        if self.pairs:
            self.pairs.pop()


class SteeredEngine:
    name = "steered"

    def __init__(self, at_once=True):
        self.at_once = at_once  # move all bytes when posted
        self.refuse = False
        self.moves = []
        self._address = f"engine {next(_numbers)}".encode()
        self.extents = []

    def register(self, extents):
        self.extents += extents
        _engines[self._address] = self

    def address(self):
        return self._address

    def connect(self, address):
        if address not in _engines:
            raise TransferError("steered: connect", "no such engine")
        return _engines[address]

    def post(self, peer, write, local, remote):
        if self.refuse:
            raise TransferError("steered: post", "refused")
        for engine, runs in ((self, local), (peer, remote)):
            for at, nbytes in runs.tolist():
                assert any(s <= at and at + nbytes <= s + n for s, n in engine.extents)
        pairs = [
            (a, b, n) if write else (b, a, n)
            for (a, n), (b, m) in zip(local.tolist(), remote.tolist(), strict=True)
            if n == m
        ]
        assert len(pairs) == len(local)
        move = Move(pairs)
        self.moves.append(move)
        if self.at_once:
            move.finish()
        return move

    def poll(self, handle):
        return handle.progress

    def release(self, handle):
        pass

    def disconnect(self, peer):
        pass

    def close(self):
        _engines.pop(self._address, None)
