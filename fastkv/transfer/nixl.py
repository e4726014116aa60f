# SPDX-License-Identifier: Apache-2.0
"""NIXL (nixl-cu12, nixl-cu13) as an engine, over UCX, for memory of the CPU."""

import os
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from importlib.util import find_spec
from secrets import token_hex
from typing import TYPE_CHECKING, Any

import numpy as np

from fastkv.errors import MissingDependencyError, TransferError
from fastkv.optional import require
from fastkv.transfer.engine import Progress

if TYPE_CHECKING:
    from numpy.typing import NDArray

INSTALL = "pip install --no-deps nixl-cu12==1.5.1"
_PACKAGES = ("nixl_cu12", "nixl_cu13")
_PROGRESS = {"DONE": Progress.DONE, "PROC": Progress.MOVING}


class NixlPeer:
    """One connection to an agent; an agent may have several."""

    def __init__(self, agent: str) -> None:
        self.agent = agent


class NixlEngine:
    """One NIXL agent.

    Raises:
        MissingDependencyError: neither nixl-cu12 nor nixl-cu13 is installed.
        TransferError: the agent cannot start.
    """

    name = "nixl"

    def __init__(self) -> None:
        package = next((name for name in _PACKAGES if find_spec(name)), None)
        if package is None:
            raise MissingDependencyError("The engine nixl", "nixl-cu12", INSTALL)
        os.environ.setdefault("NIXL_LOG_LEVEL", "FATAL")  # what fails is raised or returned here
        api = require(f"{package}._api", "The engine nixl", INSTALL)
        bindings = require(f"{package}._bindings", "The engine nixl", INSTALL)
        self._errors = tuple(
            value
            for name, value in vars(bindings).items()
            if name.startswith("nixl") and name.endswith("Error")
        )
        self._memory: list[Any] = []
        self._peers: Counter[str] = Counter()  # connections to each agent
        with self._named("start"):
            # A random name: a restarted process must not be taken for the one before it.
            self._agent = api.nixl_agent(f"fastkv-{token_hex(8)}", api.nixl_agent_config())

    @contextmanager
    def _named(self, what: str) -> Iterator[None]:
        try:
            yield
        except (*self._errors, RuntimeError, ValueError) as error:
            raise TransferError(f"nixl: {what}", f"{type(error).__name__}: {error}") from error

    def register(self, extents: Sequence[tuple[int, int]]) -> None:
        """See `Engine.register`."""
        with self._named("register"):
            rows = [(address, nbytes, 0, "") for address, nbytes in extents]
            self._memory.append(self._agent.register_memory(rows, "DRAM"))

    def address(self) -> bytes:
        """See `Engine.address`."""
        with self._named("address"):
            return bytes(self._agent.get_agent_metadata())

    def connect(self, address: bytes) -> NixlPeer:
        """See `Engine.connect`."""
        with self._named("connect"):
            found = self._agent.add_remote_agent(address)
        agent = found.decode() if isinstance(found, bytes) else str(found)
        self._peers[agent] += 1
        return NixlPeer(agent)

    def post(
        self, peer: NixlPeer, write: bool, local: "NDArray[np.uint64]", remote: "NDArray[np.uint64]"
    ) -> Any:
        """See `Engine.post`."""
        with self._named("post"):
            here, there = (
                self._agent.get_xfer_descs(_rows(runs), "DRAM") for runs in (local, remote)
            )
            what = "WRITE" if write else "READ"
            handle = self._agent.initialize_xfer(what, here, there, peer.agent)
            if self._agent.transfer(handle) == "ERR":
                raise TransferError("nixl: post", "the transfer did not start")
        return handle

    def poll(self, handle: Any) -> Progress:
        """See `Engine.poll`."""
        try:
            return _PROGRESS.get(self._agent.check_xfer_state(handle), Progress.FAILED)
        except self._errors:  # a peer that is gone is one of them
            return Progress.FAILED

    def release(self, handle: Any) -> None:
        """See `Engine.release`."""
        with suppress(*self._errors):
            self._agent.release_xfer_handle(handle)

    def disconnect(self, peer: NixlPeer) -> None:
        """See `Engine.disconnect`."""
        self._peers[peer.agent] -= 1
        if not self._peers[peer.agent]:
            del self._peers[peer.agent]
            with suppress(*self._errors):
                self._agent.remove_remote_agent(peer.agent)

    def close(self) -> None:
        """See `Engine.close`."""
        for agent in self._peers:
            with suppress(*self._errors):
                self._agent.remove_remote_agent(agent)
        for memory in self._memory:
            with suppress(*self._errors):
                self._agent.deregister_memory(memory)
        self._memory.clear()
        del self._agent


def _rows(runs: "NDArray[np.uint64]") -> "NDArray[np.uint64]":
    """`[n, 3]`: address, bytes, device 0."""
    return np.concatenate([runs, np.zeros((len(runs), 1), np.uint64)], axis=1)
