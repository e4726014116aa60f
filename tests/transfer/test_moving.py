# SPDX-License-Identifier: Apache-2.0
"""Blocks between two processes, when nothing goes wrong but the caller."""

import random

import pytest

from helpers.peers import RefusedError


def all_free(*peers):
    return all(set(peer.ask("states")) == {"free"} for peer in peers)


def test_a_push_arrives_whole_and_in_order_and_touches_no_other_block(pair):
    a, b = pair
    ids = random.Random(1).sample(a.ask("allocate", count=40), 11)
    before = b.blocks(range(64))
    outcome = a.ask("push", session=0, request="push", blocks=ids, seconds=10)
    assert (outcome["state"], outcome["reason"], outcome["blocks"]) == ("done", "", ids)
    received = b.ask("receive", request="push", seconds=5)
    assert b.blocks(received["blocks"]) == a.blocks(ids)
    others = [i for i in range(64) if i not in received["blocks"]]
    assert b.blocks(others) == [before[i] for i in others]
    assert {b.ask("states")[i] for i in received["blocks"]} == {"in use"}
    assert {b.ask("states")[i] for i in others} == {"free"}
    b.ask("free", blocks=received["blocks"])
    a.ask("free", blocks=sorted(range(40)))
    assert all_free(a, b)


def test_a_pull_arrives_whole_and_in_order(pair):
    a, b = pair
    ids = random.Random(2).sample(a.ask("allocate", count=30), 13)
    a.ask("offer", request="pull", blocks=ids)
    outcome = b.ask("pull", session=0, request="pull", seconds=10)
    assert (outcome["state"], outcome["reason"]) == ("done", "")
    assert b.blocks(outcome["blocks"]) == a.blocks(ids)
    b.ask("free", blocks=outcome["blocks"])
    a.ask("withdraw", request="pull")
    a.ask("free", blocks=list(range(30)))
    while a.ask("lent"):
        pass
    assert all_free(a, b)


def test_many_transfers_both_ways_at_once(pair):
    a, b = pair
    both = {}
    for peer in pair:
        for i in range(8):
            both[peer, i] = peer.ask("allocate", count=2)
    begun = [
        (peer, peer.begin("push", session=0, request=f"{i}", blocks=ids, seconds=20))
        for (peer, i), ids in both.items()
    ]
    assert {peer.wait(number)["state"] for peer, number in begun} == {"done"}
    for (peer, i), ids in both.items():
        other = b if peer is a else a
        received = other.ask("receive", request=f"{i}", seconds=1)["blocks"]
        assert other.blocks(received) == peer.blocks(ids)
        other.ask("free", blocks=received)
        peer.ask("free", blocks=ids)
    assert all_free(a, b)


def test_counters_tell_what_was_moved(pair):
    a, b = pair
    before, ids = a.ask("stats"), a.ask("allocate", count=3)
    there = b.ask("stats")
    assert a.ask("push", session=0, request="count", blocks=ids, seconds=9)["state"] == "done"
    after, nbytes = a.ask("stats"), 3 * len(a.block(0))
    grown = {name: after[name] - before[name] for name in after}
    assert (grown["done"], grown["blocks_sent"], grown["bytes_sent"]) == (1, 3, nbytes)
    assert grown["seconds"] > 0
    assert grown["in_use"] == 3
    taken = b.ask("stats")
    assert taken["blocks_published"] - there["blocks_published"] == 3
    assert taken["bytes_published"] - there["bytes_published"] == nbytes
    b.ask("free", blocks=b.ask("receive", request="count", seconds=1)["blocks"])
    a.ask("free", blocks=ids)


@pytest.mark.parametrize(
    ("blocks", "says"),
    [
        ([0, 64], r"BlockIdError: Session.push: blocks\[1\]: expected integers from 0 to 63"),
        ([1, 1], "BlockIdError: Session.push: blocks: expected each block once"),
        ([0, 5], "BlockIdError: .* expected blocks in use, got block 5 free"),
    ],
)
def test_ids_that_cannot_be_are_refused_before_anything_is_sent(pair, blocks, says):
    a, b = pair
    ids = a.ask("allocate", count=2)
    assert ids == [0, 1]
    stats = b.ask("stats")
    with pytest.raises(RefusedError, match=says):
        a.ask("push", session=0, request="bad", blocks=blocks, seconds=5)
    a.ask("free", blocks=ids)
    assert b.ask("stats") == stats
    assert all_free(a, b)


def test_more_blocks_than_the_peer_has_free_are_refused(pair):
    a, b = pair
    taken, ids = b.ask("allocate", count=62), a.ask("allocate", count=3)
    outcome = a.ask("push", session=0, request="full", blocks=ids, seconds=5)
    assert outcome["state"] == "failed"
    assert "3 blocks asked for, 2 of 64 free" in outcome["reason"]
    b.ask("free", blocks=taken)
    a.ask("free", blocks=ids)
    assert all_free(a, b)


def test_a_name_that_waits_to_be_received_is_refused(pair):
    a, b = pair
    ids = a.ask("allocate", count=2)
    assert a.ask("push", session=0, request="twice", blocks=ids, seconds=5)["state"] == "done"
    outcome = a.ask("push", session=0, request="twice", blocks=ids, seconds=5)
    assert outcome["state"] == "failed"
    assert "waits to be received already" in outcome["reason"]
    first = b.ask("receive", request="twice", seconds=1)["blocks"]
    assert b.blocks(first) == a.blocks(ids)
    b.ask("free", blocks=first)
    a.ask("free", blocks=ids)
    assert all_free(a, b)


def test_what_is_not_offered_cannot_be_pulled(pair):
    a, b = pair
    outcome = b.ask("pull", session=0, request="nothing", seconds=5)
    assert (outcome["state"], outcome["blocks"]) == ("failed", [])
    assert "no request of this name is offered" in outcome["reason"]
    assert all_free(a, b)


def test_sixteen_thousand_blocks_at_once(start):
    sizes = {"num_kv_heads": 1, "head_dim": 16, "page_size": 2}
    a, b = (start(num_blocks=16_400, sizes=sizes) for _ in range(2))
    assert a.ask("connect", port=b.port) == 0
    ids = a.ask("allocate", count=16_384)
    random.Random(3).shuffle(ids)
    outcome = a.ask("push", session=0, request="many", blocks=ids, seconds=20)
    assert (outcome["state"], outcome["reason"]) == ("done", "")
    received = b.ask("receive", request="many", seconds=1)["blocks"]
    assert b.blocks(received) == a.blocks(ids)
