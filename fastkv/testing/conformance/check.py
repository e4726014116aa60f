# SPDX-License-Identifier: Apache-2.0
"""Run a backend on the cases, and judge what it did."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Protocol, TypeAlias

from fastkv.backends import Ops
from fastkv.testing.conformance.cases import Case, cases
from fastkv.testing.conformance.faults import ConformanceError, Fault, shown
from fastkv.testing.conformance.observations import Observation, observed, origin
from fastkv.testing.conformance.rules import Step, argument_faults
from fastkv.testing.recording import Call, RecordingOps


class MixedBackend(Protocol):
    """A backend that fastkv's ops can be injected into."""

    def forward_mixed(self, qkv: Any, layer: Any, meta: Any) -> Any:
        """See `fastkv.backends.Backend.forward_mixed`."""


MakeBackend: TypeAlias = Callable[[Ops], MixedBackend]
Run: TypeAlias = Callable[[Case], Iterable[Observation]]


def faults(
    case: Case, make_backend: MakeBackend | None = None, *, run: Run | None = None
) -> tuple[Fault, ...]:
    """What a backend does wrong in a case; empty when nothing.

    Args:
        case: one of `cases()`.
        make_backend: takes ops and returns a backend with `forward_mixed(qkv, layer, meta)` that
            drives them.
        run: instead, for a backend with kernels of its own: runs the case's `qkv`, `layer`,
            `caches` and `meta` through it and returns what its kernels were called with, in order.
    """
    return _tried(case, make_backend, run)[0]


def check(case: Case, make_backend: MakeBackend | None = None, *, run: Run | None = None) -> None:
    """Raise `ConformanceError` if a backend hands wrong tensors on; arguments as in `faults`.

    An exception of the backend counts as one; it is the error's cause.
    """
    __tracebackhide__ = True  # pytest shows the test's line, and the text
    found, error = _tried(case, make_backend, run)
    if found:
        raise ConformanceError(found) from error


def check_backend(
    make_backend: MakeBackend | None = None,
    *,
    run: Run | None = None,
    tried: Sequence[Case] | None = None,
) -> None:
    """`check` on every case; one error with all faults.

    Args:
        make_backend: as in `faults`.
        run: as in `faults`.
        tried: the cases; None takes all of `cases()`.
    """
    __tracebackhide__ = True
    found: list[Fault] = []
    first_error: Exception | None = None
    for case in cases() if tried is None else tried:
        more, error = _tried(case, make_backend, run)
        found += more
        first_error = first_error or error
    if found:
        raise ConformanceError(found) from first_error


def _tried(
    case: Case, make_backend: MakeBackend | None, run: Run | None
) -> tuple[tuple[Fault, ...], Exception | None]:
    """The faults, and the exception that is one of them."""
    if make_backend is not None and run is None:
        ops = RecordingOps()
        try:
            result = make_backend(ops).forward_mixed(case.qkv, case.layer, case.meta)
        except Exception as error:  # a backend under test may raise anything: a finding, not ours
            return _raised(case, error), error
        return _driven_faults(case, ops, result), None
    if run is None or make_backend is not None:
        raise TypeError("conformance: expected either make_backend or run")
    try:
        calls = tuple(run(case))
    except Exception as error:  # as above
        return _raised(case, error), error
    return _judged(case, calls, driven=False, merged=False), None


def _raised(case: Case, error: Exception) -> tuple[Fault, ...]:
    text = f"{type(error).__name__}: {error}"
    return (Fault(case, "the backend", "call", "no exception", text),)


def _driven_faults(case: Case, ops: RecordingOps, result: object) -> tuple[Fault, ...]:
    calls = tuple(seen for seen in map(observed, ops.calls) if seen is not None)
    merged = "merge_states" in ops.names()
    return (*_judged(case, calls, True, merged), *_output_faults(case, ops.calls, result, merged))


def _judged(
    case: Case, calls: Sequence[Observation], driven: bool, merged: bool
) -> tuple[Fault, ...]:
    alone = [fault for call in calls for fault in argument_faults(case, call)]
    return (*alone, *Step(case, driven, merged).take(calls))


def _output_faults(
    case: Case, calls: Sequence[Call], result: object, merged: bool
) -> Iterator[Fault]:
    """Every attention writes into what is returned, unless states are merged into that."""
    for call in calls:
        out = call.result[0] if isinstance(call.result, tuple) else call.result
        counts = call.op == "merge_states" if merged else call.op in _ATTENTION
        if counts and origin(out) is not origin(result):
            got = f"{shown(result)} as the backend's result"
            yield Fault(case, call.op, "out", shown(out), got)


_ATTENTION = ("paged_attention", "masked_attention")
