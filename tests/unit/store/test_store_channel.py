# SPDX-License-Identifier: Apache-2.0
"""Deadlines and the circuit breaker, on backends that hang, fail and recover."""

import gc
import logging
import threading
import time
import weakref

import pytest

from fastkv.store.breaker import Breaker, State
from fastkv.store.channel import Channel, NoAnswerError
from fastkv.store.counters import Tally
from fastkv.store.worker import Worker

#: Seconds that a test waits for what must come; far more than any machine needs.
PATIENCE = 20.0


class Switched:
    """A backend that answers while `answers` is set, and raises `error` if there is one."""

    def __init__(self):
        self.answers = threading.Event()
        self.answers.set()
        self.error = None
        self.calls = 0
        self.closed = threading.Event()

    def exists(self, names):
        self.calls += 1
        assert self.answers.wait(PATIENCE)
        if self.error is not None:
            raise self.error
        return [True] * len(names)

    def close(self):
        self.closed.set()


def ask(backend):
    return backend.exists([b"x"])


def make(deadline=PATIENCE, cool_down=1000.0, **options):
    backend, tally = Switched(), Tally()
    return backend, Channel(backend, deadline, cool_down, tally, **options), tally


def failure(channel, deadline=PATIENCE):
    with pytest.raises(NoAnswerError) as caught:
        list(channel.run([ask], deadline))
    return caught.value.reason


def eventually(condition):
    until = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.002)


def test_results_come_in_the_order_of_tasks():
    _, channel, _ = make()
    tasks = [lambda _, i=i: i * i for i in range(20)]
    assert list(channel.run(tasks, PATIENCE)) == [i * i for i in range(20)]


def test_two_batches_exist_at_a_time():
    _, channel, _ = make()
    made = []

    def tasks():
        for i in range(6):
            made.append(i)
            yield lambda _, i=i: i

    for read, _ in enumerate(channel.run(tasks(), PATIENCE)):
        assert len(made) == min(read + 2, 6)


def test_one_runs_while_the_caller_reads_the_last():
    _, channel, _ = make()
    second = threading.Event()
    tasks = [lambda _: 1, lambda _: second.set() or 2, lambda _: 3]
    results = channel.run(tasks, PATIENCE)
    assert next(results) == 1
    assert second.wait(PATIENCE)  # without a further next()
    assert list(results) == [2, 3]


def test_a_store_that_hangs_costs_one_deadline():
    backend, channel, tally = make()
    backend.answers.clear()
    began = time.monotonic()
    assert failure(channel, 0.2) == "timeout"
    assert 0.2 <= time.monotonic() - began < 5
    for _ in range(100):
        assert failure(channel, PATIENCE) == "unavailable"
    assert time.monotonic() - began < 5
    assert backend.calls == 1
    counted = tally.snapshot(channel.state.value)
    assert (counted.outages, counted.state) == (1, "open")
    assert counted.last_error == "no answer within the deadline"
    backend.answers.set()


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (TimeoutError("late"), "timeout"),
        (ConnectionError("gone"), "error"),
        (ValueError("odd"), "error"),
    ],
)
def test_an_error_opens_the_breaker(error, reason):
    backend, channel, tally = make()
    backend.error = error
    assert failure(channel) == reason
    assert failure(channel) == "unavailable"
    assert backend.calls == 1
    assert str(error) in tally.snapshot("").last_error


def test_an_outage_is_logged_once(caplog):
    backend, channel, _ = make()
    backend.error = ConnectionError("gone")
    with caplog.at_level(logging.WARNING, "fastkv.store"):
        failure(channel)
        failure(channel)
    assert len(caplog.records) == 1
    assert "gone" in caplog.text


def test_a_store_that_is_back_is_found_in_the_background():
    clock = [0.0]
    backend, channel, tally = make(cool_down=5.0, clock=lambda: clock[0])
    backend.error = ConnectionError("gone")
    failure(channel)
    clock[0] = 4.9
    assert failure(channel) == "unavailable"
    assert backend.calls == 1
    clock[0] = 5.1
    assert failure(channel) == "unavailable"  # starts a probe, which fails
    eventually(lambda: backend.calls == 2 and channel.state is State.OPEN)
    clock[0] = 9.9  # the cool-down began anew
    assert failure(channel) == "unavailable"
    backend.error = None
    clock[0] = 10.2
    assert failure(channel) == "unavailable"
    eventually(lambda: channel.state is State.CLOSED)
    assert list(channel.run([ask], PATIENCE)) == [[True]]
    assert tally.snapshot("").outages == 1


def test_no_caller_waits_for_a_probe_that_hangs():
    clock = [0.0]
    backend, channel, _ = make(cool_down=5.0, clock=lambda: clock[0])
    backend.error = ConnectionError("gone")
    failure(channel)
    backend.answers.clear()
    clock[0] = 6.0
    for _ in range(50):
        assert failure(channel) == "unavailable"
    eventually(lambda: backend.calls == 2)
    assert channel.state is State.PROBING
    backend.answers.set()


def test_a_late_answer_to_a_probe_is_none():
    clock = [0.0]
    backend, channel, _ = make(deadline=1.0, cool_down=5.0, clock=lambda: clock[0])
    backend.error = ConnectionError("gone")
    failure(channel)
    backend.error = None
    backend.answers.clear()
    clock[0] = 6.0
    failure(channel)
    eventually(lambda: backend.calls == 2)
    clock[0] = 7.5
    backend.answers.set()
    eventually(lambda: channel.state is not State.PROBING)
    assert channel.state is State.OPEN


def test_a_call_behind_another_threads_is_late_and_opens_nothing():
    backend, channel, _ = make()
    backend.answers.clear()
    other = threading.Thread(target=lambda: list(channel.run([ask], PATIENCE)))
    other.start()
    eventually(lambda: backend.calls == 1)
    assert failure(channel, 0.05) == "timeout"
    assert channel.state is State.CLOSED
    backend.answers.set()
    other.join()
    assert list(channel.run([ask], PATIENCE)) == [[True]]
    assert backend.calls == 2  # the late one was never begun


def test_what_failed_while_a_probe_ran_keeps_it_open():
    breaker = Breaker(1.0, clock := iter(range(0, 100, 10)).__next__)
    assert clock() == 0
    assert breaker.trip()
    assert breaker.claim_probe()
    assert not breaker.claim_probe()  # one caller only
    assert not breaker.trip()
    breaker.mend()
    assert breaker.state is State.OPEN


def test_closing_waits_for_what_is_queued():
    backend, channel, _ = make()
    backend.answers.clear()
    thread = threading.Thread(target=lambda: list(channel.run([ask], PATIENCE)))
    thread.start()
    eventually(lambda: backend.calls == 1)
    channel.close()
    channel.close()
    assert not backend.closed.is_set()
    backend.answers.set()
    assert backend.closed.wait(PATIENCE)
    thread.join()
    with pytest.raises(RuntimeError, match="closed"):
        list(channel.run([ask], PATIENCE))


def test_closing_before_the_first_call_closes_at_once():
    backend, channel, _ = make()
    channel.close()
    assert backend.closed.is_set()


def test_an_idle_worker_holds_no_batch():
    class Batch:
        pass

    batch = Batch()
    gone = weakref.ref(batch)
    worker = Worker("test")
    future = worker.submit(lambda held=batch: isinstance(held, Batch))
    assert future.result(PATIENCE)
    del batch, future
    eventually(lambda: gc.collect() >= 0 and gone() is None)
    worker.close(lambda: None)


def test_a_process_ends_while_its_store_hangs(run_python):
    done = run_python(
        """
import time
from fastkv.store.channel import Channel, NoAnswerError
from fastkv.store.counters import Tally

class Hangs:
    def exists(self, names):
        time.sleep(1000)

try:
    list(Channel(Hangs(), 1, 1, Tally()).run([lambda backend: backend.exists([])], 0.05))
except NoAnswerError as missing:
    print(missing.reason)
"""
    )
    assert done.stdout.strip() == "timeout"
