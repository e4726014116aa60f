# SPDX-License-Identifier: Apache-2.0
import pytest

from helpers.peers import TCP, PeerProcess

TRANSPORTS = {"default": {}, "tcp": TCP}


@pytest.fixture
def start(tmp_path):
    """Start processes that end with the test."""
    started = []

    def begin(**options):
        started.append(PeerProcess(tmp_path, **options))
        return started[-1]

    yield begin
    for peer in started:
        peer.resume() if peer.process.poll() is None else None
        peer.kill()


@pytest.fixture(scope="module", params=TRANSPORTS)
def pair(request, tmp_path_factory):
    """Two connected processes that the tests of a module share: `(a, b)`, a's session is 0."""
    folder = tmp_path_factory.mktemp(request.param)
    peers = [PeerProcess(folder, environment=TRANSPORTS[request.param]) for _ in range(2)]
    a, b = peers
    assert a.port
    assert a.ask("connect", port=b.port) == 0
    assert b.ask("accept") == 0
    yield a, b
    for peer in peers:
        peer.kill()
