# SPDX-License-Identifier: Apache-2.0
"""Random sequences of transfers and faults between two endpoints, on an engine that obeys.

The control channel is real, the engine moves real bytes when the test says so: early, late, in
part, or after its transfer has been given up.
"""

import asyncio
import os

import numpy as np
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from fastkv.errors import FastKVError
from fastkv.transfer import BlockState, Endpoint, Fingerprint, Progress, Regions, TransferState
from helpers.steered_engine import SteeredEngine
from helpers.transfer import block_bytes, random_caches, spec_of

BLOCKS = 24
PAUSE = 0.004  # seconds that messages get between two rules
DEADLINES = (0.01, 0.05, 5.0)
LINGER = 0.02


class Side:
    """One endpoint, and what the test knows of its blocks."""

    def __init__(self, seed):
        self.spec = spec_of(num_kv_heads=1, head_dim=8, page_size=2)
        self.caches = random_caches(self.spec, BLOCKS, seed)
        self.engine = SteeredEngine(at_once=False)
        self.owned = {}  # id -> bytes that nobody may change
        self.endpoint = Endpoint(
            Regions(self.spec, self.caches),
            Fingerprint.of(
                self.spec,
                model="m",
                scales=dict.fromkeys(range(4), _scales()),
            ),
            engine=self.engine,
            linger=LINGER,
            part_bytes=1,
        )

    def bytes_of(self, ids):
        return [block_bytes(self.caches, int(i)) for i in ids]

    def own(self, ids):
        for i, content in zip(ids, self.bytes_of(ids), strict=True):
            assert int(i) not in self.owned, "a block was given out twice"
            self.owned[int(i)] = content

    def refill(self, ids, rng):
        for array in self.caches:
            raw = array.view(np.uint8)
            raw[ids] = rng.integers(0, 256, raw[ids].shape, np.uint8)

    def block_at(self, address):
        """The block that holds an address; None where it is the other side's."""
        for region in self.endpoint.regions.regions:
            i, inside = divmod(address - region.address, region.stride)
            if 0 <= i < BLOCKS and inside < region.nbytes:
                return i
        return None

    def free(self, ids):
        for i in ids:
            del self.owned[int(i)]
        self.endpoint.ledger.free(ids)


def _scales():
    from fastkv import StaticScales

    return StaticScales(*(np.full((1, 8), 2.0, np.float32) for _ in range(6)))


def moving(move):
    return move.progress is Progress.MOVING


class Faults(RuleBasedStateMachine):
    def __init__(self):
        super().__init__()
        self.loop = asyncio.new_event_loop()
        self.sides = Side(1), Side(2)
        self.session = None
        self.tasks = {}  # request -> (task, kind, source bytes, ids of the source)
        self.count = 0

    def run(self, work):
        return self.loop.run_until_complete(asyncio.wait_for(work, 10))

    def pause(self, seconds=PAUSE):
        self.run(asyncio.sleep(seconds))

    @initialize(seed=st.integers(0, 2**32 - 1))
    def begin(self, seed):
        self.rng = np.random.default_rng(seed)
        for side in self.sides:
            self.run(side.endpoint.__aenter__())
        self.port = self.run(self.sides[1].endpoint.listen())
        self.connect()

    def connect(self):
        self.session = self.run(self.sides[0].endpoint.connect("127.0.0.1", self.port))
        self.pause()

    def take(self, side, count):
        """Blocks of a side, with new content; None where too few are free."""
        try:
            ids = side.endpoint.ledger.allocate(count)
        except FastKVError:
            return None
        side.refill(ids, self.rng)
        side.own(ids)
        return ids

    @rule(count=st.integers(1, 6), seconds=st.sampled_from(DEADLINES))
    def push(self, count, seconds):
        ids = self.take(self.sides[0], count)
        if ids is None or not self.session.connected:
            return
        self.count += 1
        name = f"push {self.count}"
        work = self.session.push(name, ids, seconds=seconds)
        content = self.sides[0].bytes_of(ids)
        self.tasks[name] = (self.loop.create_task(work), "push", content, ids)
        self.pause()

    @rule(count=st.integers(1, 6), seconds=st.sampled_from(DEADLINES))
    def pull(self, count, seconds):
        ids = self.take(self.sides[1], count)
        if ids is None or not self.session.connected:
            return
        self.count += 1
        name = f"pull {self.count}"
        self.sides[1].endpoint.offer(name, ids)
        work = self.session.pull(name, seconds=seconds)
        content = self.sides[1].bytes_of(ids)
        self.tasks[name] = (self.loop.create_task(work), "pull", content, ids)
        self.pause()

    def moves(self):
        return [move for side in self.sides for move in side.engine.moves if moving(move)]

    @rule(which=st.integers(0, 50), how=st.sampled_from(["step", "finish", "fail", "corrupt"]))
    def engine_does(self, which, how):
        moves = self.moves()
        if moves:
            getattr(moves[which % len(moves)], how)()
            self.pause()

    @rule(corrupt=st.booleans())
    def all_lands(self, corrupt):
        """Every transfer runs to its end, whole or with bytes that never came."""
        for _ in range(100):
            moves = self.moves()
            if not moves:
                break
            for move in moves:
                if corrupt:
                    move.corrupt()
                    corrupt = False
                move.finish()
            self.pause(0.002)

    @rule(seconds=st.sampled_from([0.01, 0.06, 0.35]))
    def time_passes(self, seconds):
        self.pause(seconds)

    @rule()
    def hang_up(self):
        """What is under way lands or fails within `linger`: so long fastkv waits for it."""
        self.run(self.session.close())
        self.pause(LINGER / 10)
        for move in self.moves():
            self.rng.choice([move.step, move.finish, move.fail])()
            move.fail()
        self.pause(LINGER / 10)
        assert not self.moves(), "more was posted to a peer that is gone"
        self.pause(2 * LINGER)

    @precondition(lambda self: self.session is not None and not self.session.connected)
    @rule()
    def come_back(self):
        self.connect()

    @rule(which=st.integers(0, 50))
    def done_with(self, which):
        """The owner frees the source of a transfer that has ended, on whatever terms."""
        ended = [name for name, (task, *_) in self.tasks.items() if task.done()]
        if not ended:
            return
        name = ended[which % len(ended)]
        task, kind, content, ids = self.tasks.pop(name)
        outcome = task.result()
        source, target = self.sides if kind == "push" else self.sides[::-1]
        if kind == "pull":
            source.endpoint.withdraw(name)
            if outcome.state is TransferState.DONE:
                assert target.bytes_of(outcome.blocks) == content
                target.own(outcome.blocks)
                target.free(outcome.blocks)
            else:
                assert outcome.blocks == ()
        elif outcome.state is TransferState.DONE:
            self.receive(name, content)
        source.free(ids)

    def receive(self, name, content):
        target = self.sides[1]
        received = self.run(target.endpoint.receive(name, seconds=1))
        assert target.bytes_of(received.blocks) == content, "other bytes were published"
        target.own(received.blocks)
        target.free(received.blocks)

    @invariant()
    def what_is_owned_is_untouched(self):
        for side in self.sides:
            for i, content in side.owned.items():
                assert block_bytes(side.caches, i) == content, "a late write hit an owned block"

    @invariant()
    def what_may_still_be_written_is_not_free(self):
        for side in self.sides:
            free = {i for i in range(BLOCKS) if side.endpoint.ledger.state(i) is BlockState.FREE}
            assert not free & set(side.owned)

    @invariant()
    def what_the_engine_still_touches_is_not_free(self):
        for move in self.moves():
            for pair in move.pairs:
                for side in self.sides:
                    for address in pair[:2]:
                        i = side.block_at(address)
                        assert i is None or side.endpoint.ledger.state(i) is not BlockState.FREE

    def teardown(self):
        try:
            for _ in range(400):  # the next part is posted when one has landed
                for move in self.moves():
                    move.finish()
                self.pause(0.005)
                if all(task.done() for task, *_ in self.tasks.values()):
                    break
            for name in list(self.tasks):
                assert self.tasks[name][0].done(), "a transfer outlived its deadline"
                self.done_with(list(self.tasks).index(name))
            self.pause(2 * LINGER)
            self.nothing_leaked()
        finally:
            for side in self.sides:
                self.run(side.endpoint.close())
            self.loop.close()

    def nothing_leaked(self):
        """Blocks come back: all but those that were published and never fetched."""
        for side in self.sides:
            ledger = side.endpoint.ledger
            assert self.run(side.endpoint.quiet(seconds=5)), "quarantined for ever"
            kept = {i for r in side.endpoint._received.values() for i in r.blocks}
            used = {i for i in range(BLOCKS) if ledger.state(i) is not BlockState.FREE}
            assert used == kept | set(side.owned)


Faults.TestCase.settings = settings(
    max_examples=int(os.environ.get("FASTKV_FAULT_SEQUENCES", "25")),
    stateful_step_count=20,
    deadline=None,
    suppress_health_check=list(HealthCheck),
)
TestFaults = Faults.TestCase
