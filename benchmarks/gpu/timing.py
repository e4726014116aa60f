# SPDX-License-Identifier: Apache-2.0
"""Time by replays of CUDA graphs, all contenders of one row interleaved.

A contender is a list of closures, one for each set of inputs that it rotates through. They are
captured into one graph, enough calls of them that a replay lasts about a millisecond: then the
resolution of the events and the start of the graph do not count.
"""

import gc
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from math import ceil
from statistics import median, quantiles
from time import perf_counter
from typing import Any, Protocol

import torch

Calls = Sequence[Callable[[], Any]]

WARM_UP, REPLAYS = 3, 20
REPLAY_US = 1000.0
MOST_CALLS = 512


@dataclass(frozen=True, slots=True)
class Timing:
    """Median and interquartile range of one call, in microseconds."""

    us: float
    iqr: float
    mode: str


class Timer(Protocol):
    """What the benchmarks ask of a clock; tests bring their own."""

    def measure(self, contenders: Mapping[str, Calls]) -> dict[str, Timing | Exception]:
        """Times of all contenders, or why one has none."""

    def host_cost(self, call: Callable[[], Any], calls: int) -> Timing:
        """Time of the host in one eager call."""


class GraphTimer:
    """The real clock."""

    def __init__(self, replays: int = REPLAYS) -> None:
        self.replays = replays

    def measure(self, contenders: Mapping[str, Calls]) -> dict[str, Timing | Exception]:
        """See `Timer`. One contender's failure leaves the others' times alone."""
        results: dict[str, Timing | Exception] = {}
        players = {}
        for name, calls in contenders.items():
            try:
                players[name] = _player(calls)
            except Exception as error:
                results[name] = error
                _recover()
        samples: dict[str, list[float]] = {name: [] for name in players}
        order = list(players)
        for i in range(WARM_UP + self.replays):
            order = order[1:] + order[:1]  # nobody always follows the same neighbour
            for name in order:
                us = players[name].replay()
                if i >= WARM_UP:
                    samples[name].append(us)
        for name, player in players.items():
            results[name] = _summary(samples[name], player.mode)
        return results

    def host_cost(self, call: Callable[[], Any], calls: int = 2000) -> Timing:
        """See `Timer`. Chunks of 100, so that the queue of launches never fills and blocks."""
        for _ in range(20):
            call()
        chunks = []
        for _ in range(max(2, calls // 100)):
            torch.cuda.synchronize()
            start = perf_counter()
            for _ in range(100):
                call()
            chunks.append((perf_counter() - start) * 1e4)
        torch.cuda.synchronize()
        return _summary(chunks, "eager")


class _Player:
    def __init__(self, go: Callable[[], None], calls: int, mode: str, keep: Any) -> None:
        self._go, self.calls, self.mode, self._keep = go, calls, mode, keep

    def replay(self) -> float:
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        self._go()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) * 1e3 / self.calls


def _player(calls: Calls) -> _Player:
    _warm(calls)
    probe = _capture(calls, len(calls))
    probe.replay()
    us = max(probe.replay(), 0.5)
    wanted = round_up(min(MOST_CALLS, ceil(REPLAY_US / us)), len(calls))
    if probe.mode == "eager" or wanted == len(calls):
        return probe
    return _capture(calls, wanted)


def round_up(wanted: int, sets: int) -> int:
    """The smallest multiple of `sets` that is at least `wanted`: every set counts alike."""
    return sets * ceil(wanted / sets)


@cache
def _stream() -> torch.cuda.Stream:
    """The one stream of all warm-ups and captures: an op keeps a workspace for each stream."""
    return torch.cuda.Stream()


def _warm(calls: Calls) -> None:
    """Compile, allocate, and fail here and not in a capture."""
    _stream().wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(_stream()):
        for call in calls[:2]:
            call()
            call()
    torch.cuda.synchronize()


def _capture(calls: Calls, count: int) -> _Player:
    def all_calls() -> None:
        for i in range(count):
            calls[i % len(calls)]()

    graph = torch.cuda.CUDAGraph()
    try:
        _record(graph, all_calls)
    except Exception as error:
        _recover()
        print(f"  no graph, timed eagerly: {error!r:.200}", flush=True)
        return _Player(all_calls, count, "eager", calls)
    return _Player(graph.replay, count, "graph", (graph, calls))


def _record(graph: torch.cuda.CUDAGraph, work: Callable[[], None]) -> None:
    """As `torch.cuda.graph`, which also collects garbage and empties the allocator's cache.

    That takes longer than the measurement. What it is for, no object of CUDA destroyed during the
    capture, comes from pausing the collector.
    """
    torch.cuda.synchronize()
    gc.disable()
    try:
        with torch.cuda.stream(_stream()):
            graph.capture_begin()
            try:
                work()
            finally:
                graph.capture_end()
    finally:
        gc.enable()
    torch.cuda.synchronize()


def _summary(samples: list[float], mode: str) -> Timing:
    low, _, high = quantiles(samples, n=4) if len(samples) > 1 else samples * 3
    return Timing(median(samples), high - low, mode)


def _recover() -> None:
    """Report nothing: the failure that brought us here is the one to show."""
    try:
        torch.cuda.synchronize()
    except Exception as error:
        raise SystemExit(f"the device is lost: {error!r:.300}") from error


def rotations(bytes_per_set: int, device: torch.device) -> int:
    """How many sets of inputs are larger than twice the L2, so that no set is still in it."""
    return 1 + 2 * l2_bytes(device) // max(1, bytes_per_set)


def l2_bytes(device: torch.device) -> int:
    """Size of the L2; nothing on the CPU, where tests run the benchmarks' code."""
    if device.type == "cpu":
        return 0
    return int(torch.cuda.get_device_properties(device).L2_cache_size)
