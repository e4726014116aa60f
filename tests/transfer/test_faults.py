# SPDX-License-Identifier: Apache-2.0
"""Faults between processes: no wrong block is published, no wait is endless, no block leaks."""

import time

import numpy as np
import pytest

from helpers.peers import LARGE, TCP, RefusedError, until

# Over TCP, 135 MB take about half a second: time to strike in the middle.
COUNT = 250


def large(start, **options):
    """A process with a cache whose transfer takes a while."""
    return start(sizes=LARGE, num_blocks=COUNT + 20, environment=TCP, **options)


def connected(start, **options):
    a, b = large(start, **options), large(start, **options)
    assert a.ask("connect", port=b.port) == 0
    assert b.ask("accept") == 0
    return a, b


def under_way(a, b, seconds, do="push"):
    """Begin to move COUNT blocks from a to b; returns when some bytes have arrived."""
    ids = a.ask("allocate", count=COUNT)
    where = b.caches[0].view(np.uint8)
    before = where[0].copy()
    if do == "push":
        number = a.begin("push", session=0, request="r", blocks=ids, seconds=seconds)
    else:
        a.ask("offer", request="r", blocks=ids)
        number = b.begin("pull", session=0, request="r", seconds=seconds)
    until(lambda: not np.array_equal(where[0], before))
    assert not np.array_equal(where[COUNT - 1], a.caches[0].view(np.uint8)[COUNT - 1])
    return ids, number


def counts(peer):
    states = peer.ask("states")
    return {name: states.count(name) for name in set(states)}


def nothing_was_published(peer):
    assert peer.ask("stats")["blocks_published"] == 0
    with pytest.raises(RefusedError, match=r"TransferError: Endpoint\.receive: 'r' not within"):
        peer.ask("receive", request="r", seconds=0.05)


ALL = COUNT + 20


@pytest.mark.parametrize("do", ["push", "pull"])
def test_receiver_killed_in_the_middle(start, do):
    a, b = connected(start)
    ids, number = under_way(a, b, 20, do)
    b.kill()
    began = time.monotonic()
    if do == "push":
        outcome = a.wait(number, 10)
        assert outcome["state"] in {"failed", "in doubt"}
        assert time.monotonic() - began < 8
    else:
        a.ask("withdraw", request="r")
    assert a.ask("quiet", seconds=10) is True
    a.ask("free", blocks=ids)
    until(lambda: counts(a) == {"free": ALL})


@pytest.mark.parametrize("do", ["push", "pull"])
def test_sender_killed_in_the_middle(start, do):
    a, b = connected(start)
    _, number = under_way(a, b, 20, do)
    a.kill()
    if do == "pull":
        outcome = b.wait(number, 10)
        assert outcome["state"] in {"failed", "in doubt"}
        assert outcome["blocks"] == []
    until(lambda: counts(b) == {"free": ALL})
    nothing_was_published(b)


def test_receiver_stopped_and_resumed(start):
    a, b = connected(start)
    ids, number = under_way(a, b, 2)
    b.stop()
    began = time.monotonic()
    outcome = a.wait(number, 10)
    assert time.monotonic() - began < 4
    assert (outcome["state"], outcome["reason"]) == ("in doubt", "not done within 2 s")
    assert counts(a) == {"quarantined": COUNT, "free": 20}
    a.ask("free", blocks=ids)  # given back, and still nobody's
    assert counts(a) == {"quarantined": COUNT, "free": 20}
    with pytest.raises(RefusedError, match="21 blocks asked for, 20 of 270 free"):
        a.ask("allocate", count=21)
    b.resume()
    until(lambda: counts(a) == {"free": ALL})
    until(lambda: counts(b) == {"free": ALL})
    nothing_was_published(b)


def test_late_writes_hit_quarantined_blocks_alone(start):
    a, b = connected(start)
    ids, number = under_way(a, b, 1.5)
    a.stop()
    until(lambda: counts(b) == {"quarantined": COUNT, "free": 20})
    own = b.ask("allocate", count=20)
    quarantined = [i for i in range(ALL) if i not in own]
    kept, touched = b.blocks(own), b.blocks(quarantined)
    time.sleep(0.2)
    touched = b.blocks(quarantined)
    a.resume()
    outcome = a.wait(number, 10)
    assert outcome["state"] in {"in doubt", "failed"}
    until(lambda: counts(b) == {"free": COUNT, "in use": 20})
    assert b.blocks(quarantined) != touched  # there were late writes
    assert b.blocks(own) == kept
    nothing_was_published(b)
    a.ask("free", blocks=ids)
    until(lambda: counts(a) == {"free": ALL})


def test_puller_of_a_stopped_peer_keeps_its_deadline(start):
    a, b = connected(start)
    ids, number = under_way(a, b, 2, "pull")
    a.stop()
    began = time.monotonic()
    outcome = b.wait(number, 10)
    assert time.monotonic() - began < 4
    assert (outcome["state"], outcome["blocks"]) == ("in doubt", [])
    assert counts(b) == {"quarantined": COUNT, "free": 20}
    a.resume()
    until(lambda: counts(b) == {"free": ALL})
    a.ask("withdraw", request="r")
    a.ask("free", blocks=ids)
    until(lambda: counts(a) == {"free": ALL})
    nothing_was_published(b)


def test_a_retry_takes_new_blocks_and_is_the_one_published(start):
    a, b = (large(start) for _ in range(2))
    a.ask("connect", port=b.port)
    b.ask("accept")
    ids = a.ask("allocate", count=100)
    outcome = a.ask("push", session=0, request="r", blocks=ids, seconds=0.05)
    assert outcome["state"] in {"in doubt", "failed"}
    again = []
    for _ in range(20):
        again.append(a.ask("push", session=0, request="r", blocks=ids, seconds=10))
        if again[-1]["state"] == "done":
            break
    assert again[-1]["state"] == "done", again
    assert again[-1]["generation"] > outcome["generation"]
    received = b.ask("receive", request="r", seconds=2)["blocks"]
    assert b.ask("quiet", seconds=10) is True
    assert b.blocks(received) == a.blocks(ids)
    b.ask("free", blocks=received)
    until(lambda: counts(b) == {"free": ALL})
    assert b.ask("stats")["blocks_published"] == 100


def test_restart_and_reconnect(start):
    a = large(start)
    b = large(start)
    a.ask("connect", port=b.port)
    ids, number = under_way(a, b, 20)
    b.kill()
    assert a.wait(number, 10)["state"] != "done"
    assert a.ask("push", session=0, request="r", blocks=ids[:5], seconds=5)["reason"] == (
        "the peer is gone"
    )
    again = large(start)
    session = a.ask("connect", port=again.port)
    assert a.ask("quiet", seconds=10) is True
    outcome = a.ask("push", session=session, request="r", blocks=ids[:50], seconds=20)
    assert (outcome["state"], outcome["reason"]) == ("done", "")
    received = again.ask("receive", request="r", seconds=2)["blocks"]
    assert again.blocks(received) == a.blocks(ids[:50])


def test_hanging_up_in_the_middle(start):
    a, b = connected(start)
    ids, number = under_way(a, b, 20)
    b.ask("hang_up", session=0)
    assert a.wait(number, 10)["state"] != "done"
    until(lambda: counts(b) == {"free": ALL})
    assert a.ask("quiet", seconds=10) is True
    a.ask("free", blocks=ids)
    until(lambda: counts(a) == {"free": ALL})
    nothing_was_published(b)


@pytest.mark.parametrize("do", ["push", "pull"])
def test_one_flipped_bit_in_a_scale_is_found(start, do):
    flip = {"push": (True, False), "pull": (False, True)}[do]
    a, b = (start(flip=found) for found in flip)
    a.ask("connect", port=b.port)
    b.ask("accept")
    ids = a.ask("allocate", count=9)[::-1]
    if do == "push":
        outcome = a.ask("push", session=0, request="r", blocks=ids, seconds=10)
        assert "1 of 9 blocks arrived with other bytes" in outcome["reason"]
    else:
        a.ask("offer", request="r", blocks=ids)
        outcome = b.ask("pull", session=0, request="r", seconds=10)
        assert "1 of 9 blocks came with other bytes" in outcome["reason"]
    assert outcome["state"] == "failed"
    found = b.blocks(range(9))
    differ = [(x, y) for x, y in zip(a.blocks(ids), found, strict=True) if x != y]
    ((sent, came),) = differ  # the fault was there, in one block
    (at,) = [i for i, (x, y) in enumerate(zip(sent, came, strict=True)) if x != y]
    assert 2 * 192 <= at < 2 * 192 + 48  # behind K and V: in the K scales
    assert b.ask("stats")["checksum_errors"] == 1
    nothing_was_published(b)
    until(lambda: counts(b) == {"free": 64})
