# SPDX-License-Identifier: Apache-2.0
"""A rank that disagrees, is late or dies gives an error on the others, within the deadline."""

import weakref

import pytest
import torch
import torch.distributed as dist

from fastkv.distributed import group_of
from helpers.ranks import run_ranks

TIMEOUT = 2.0  # of the workers


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("at_odds")
    return run_ranks("torch_ranks_at_odds", 4, folder, timeout=60, may_die=(3,))


DISAGREE = {
    "rows": ("paged_attention", "expected T = 1, checksum"),
    "window": ("paged_attention", "window = 4.0 as on rank 0, got window = 5.0"),
    "lengths": ("paged_attention", "checksum of the lengths = "),
    "known layers": ("paged_attention", "layer = 0 as on rank 0, got layer = 1"),
    # Their messages would be of other sizes.
    "new and known": ("paged_attention", "scale = None as on rank 0, got scale = 1.0"),
    "heads": ("TensorParallel.all_gather", "T = 1 as on rank 0, got T = 2"),
}


@pytest.mark.parametrize("name", DISAGREE)
def test_all_ranks_say_what_differs(ranks, name):
    op, text = DISAGREE[name]
    for rank in (0, 1):
        (kind, said), seconds = ranks[rank][name]
        assert kind == "RankMismatchError"
        assert said.startswith(f"{op}: the call of rank 1")
        assert text in said
        assert f"This is rank {rank} of 2." in said
        assert seconds < TIMEOUT


@pytest.mark.parametrize("name", ["right", "other layer", "right again"])
def test_a_disagreement_leaves_the_group_in_use(ranks, name):
    assert [ranks[rank][name][0] for rank in (0, 1)] == [None, None]


def test_a_process_outside_the_group_is_told(ranks):
    for rank in (0, 1):
        (kind, said), _ = ranks[rank]["outside"]
        assert (kind, "that this process belongs to" in said) == ("DtypeError", True)


def test_a_late_rank_is_waited_for_until_the_deadline(ranks):
    (kind, said), seconds = ranks[2]["late"]
    assert kind == "CollectiveError"
    assert said.startswith("paged_attention: rank 0 of 2 did not get all ranks' messages: ")
    assert TIMEOUT - 0.5 < seconds < TIMEOUT + 1.5


def test_a_dead_rank_is_noticed(ranks):
    for found in ranks[:3]:
        (kind, said), seconds = found["dead"]
        assert kind == "CollectiveError"
        assert " of 4 did not get" in said
        assert seconds < 20
    assert ranks[3] is None


def test_a_group_is_not_kept_alive_beyond_its_end(tmp_path):
    """What torch's destroy_process_group does not free outlives it, threads and all."""
    store = f"file://{tmp_path}/store"
    dist.init_process_group("gloo", init_method=store, rank=0, world_size=1)
    try:
        kept = weakref.ref(dist.group.WORLD)
        group = group_of(dist.group.WORLD)
        assert [part.tolist() for part in group.all_gather(torch.ones(2), blocking=True)] == [
            [1.0, 1.0]
        ]
    finally:
        dist.destroy_process_group()
    assert kept() is None
    with pytest.raises(RuntimeError, match="the process group was destroyed"):
        group.all_gather(torch.ones(2), blocking=True)
