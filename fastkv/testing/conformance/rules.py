# SPDX-License-Identifier: Apache-2.0
"""The rules: which arguments each call must have, and which calls a step must have."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field

from fastkv.testing.conformance.cases import PAGED, STATIC, Case
from fastkv.testing.conformance.faults import Fault, shown
from fastkv.testing.conformance.observations import BATCH, TABLES, Observation, Role, origin
from fastkv.testing.sentinels import SentinelTensor

# Role -> static scales that it cannot do without, where the format has them.
_NEEDS: dict[Role, tuple[str, ...]] = {
    "write": ("k_quant", "v_quant", "k_zp", "v_zp"),
    "gather": ("k_dequant", "v_dequant", "k_zp", "v_zp"),
    "attend_pages": ("k_dequant", "v_dequant", "k_zp", "v_zp"),
    "attend_contiguous": (),
}
_ATTENDING: tuple[Role, ...] = ("attend_pages", "attend_contiguous")
_COMPARED = (*PAGED, *STATIC, *TABLES, "layer_id", "spec")


def argument_faults(case: Case, call: Observation) -> Iterator[Fault]:
    """What is wrong with the arguments of one call, looked at alone."""
    required = _required(call)
    for name in _COMPARED:
        want, got = case.expected[name], call.get(name)
        absent = got is None and name not in required
        # An op that takes a LayerCache names its fields even where they are None.
        if not absent and not _is(got, want):
            yield Fault(case, call.op, call.label(name), shown(want), shown(got))
    yield from _batch_faults(case, call)


def _required(call: Observation) -> frozenset[str]:
    if call.complete:
        tables = TABLES if "write" in call.roles else ()
        return frozenset((*PAGED, *STATIC, *tables, "layer_id", "spec"))
    on_pages = [role for role in call.roles if role != "attend_contiguous"]
    return frozenset((*(PAGED if on_pages else ()), *(n for r in call.roles for n in _NEEDS[r])))


def _is(got: object, want: object) -> bool:
    """Whether a tensor is the very one, whole, whatever its layout; or equal, if no tensor."""
    if isinstance(want, SentinelTensor):
        return isinstance(got, SentinelTensor) and got.root is want and got.is_whole()
    if want is None or isinstance(got, SentinelTensor):
        return got is want
    return bool(got == want)


def _served(case: Case, call: Observation) -> tuple[int, int] | None:
    """`(start, stop)` of a call's requests; None where it does not show."""
    if call.requests is not None:
        return call.requests
    for name, more in BATCH.items():
        tensor = call.get(name)
        if origin(tensor) is case.expected[name] and tensor.part is not None:
            return tensor.part[0], max(tensor.part[0], tensor.part[1] - more)
    return None


def _batch_faults(case: Case, call: Observation) -> Iterator[Fault]:
    """The batch's tensors are the case's, and all cut at the same requests."""
    start, stop = _served(case, call) or (0, case.scenario.num_requests)
    for name, more in BATCH.items():
        got, whole = call.get(name), case.expected[name]
        if got is None and not (call.complete and name in call.arguments):
            continue
        part = (start, stop + more)
        if origin(got) is not whole or getattr(got, "part", None) != part:
            # The slice, as somebody would write it; the whole tensor where it covers all.
            want = whole if part == whole.part else whole[part[0] : part[1]]
            yield Fault(case, call.op, call.label(name), shown(want), shown(got))


@dataclass
class Step:
    """The calls of one step, looked at together, in order.

    Args:
        case: what the step is of.
        driven: the calls are those of fastkv's ops, so everything that fills contiguous K and V is
            among them; kernels of somebody else may not say it.
        merged: attention states are merged: requests may be attended more than once, and the new
            tokens and the prefix may lie in buffers of their own.
    """

    case: Case
    driven: bool
    merged: bool
    written: set[int] = field(default_factory=set)
    gathered: set[int] = field(default_factory=set)
    paged: set[int] = field(default_factory=set)
    contiguous: bool = False
    attended: list[int] = field(default_factory=list)
    queries: list[SentinelTensor] = field(default_factory=list)
    # "k" or "v" -> contiguous tensors of that kind; those a write, those a gather left something in
    buffers: dict[str, list[object]] = field(default_factory=lambda: {"k": [], "v": []})
    filled: dict[tuple[str, str], list[object]] = field(default_factory=dict)
    faults: list[Fault] = field(default_factory=list)

    def add(self, op: str, argument: str, expected: str, got: str) -> None:
        """Note a fault."""
        self.faults.append(Fault(self.case, op, argument, expected, got))

    def take(self, calls: Sequence[Observation]) -> list[Fault]:
        """The faults of all calls, which are in order."""
        self.contiguous = any({"gather", "attend_contiguous"} & set(call.roles) for call in calls)
        for call in calls:
            if "attend_pages" in call.roles:
                self.paged |= set(self._requests(call, "attend_pages"))
        for call in calls:
            self._take(call)
        self._check_coverage("write", "written", self.written)
        self._check_coverage("attend", "attended", set(self.attended))
        twice = sorted({r for r in self.attended if self.attended.count(r) > 1})
        if twice and not self.merged:
            self.add("attend", "requests", "each attended once", f"{_listed(twice)} attended twice")
        return self.faults

    def _requests(self, call: Observation, role: Role) -> range:
        """The requests of a call; where it does not say, those that such an op would serve."""
        decode, every = self.case.scenario.num_decode, self.case.scenario.num_requests
        served = _served(self.case, call)
        if served is not None:
            return range(*served)
        if role == "attend_contiguous" and decode < every:
            return range(decode, every)
        return range(decode if role == "attend_pages" and self.contiguous else every)

    def _take(self, call: Observation) -> None:
        # In the order in which a fused kernel does them.
        if "write" in call.roles:
            self.written |= set(self._requests(call, "write"))
            self._take_results(call)
            self._take_buffers(call, "write")
        if "gather" in call.roles:
            self.gathered |= set(self._requests(call, "gather"))
            self._take_buffers(call, "gather")
        served: set[int] = set()
        for role in _ATTENDING:
            if role in call.roles:
                served |= set(self._requests(call, role))
        if served:
            self._check_written(call, served)
            self._check_query(call)
            self.attended += served
        if "attend_contiguous" in call.roles:
            self._check_contiguous(call, self._requests(call, "attend_contiguous"))

    def _take_results(self, call: Observation) -> None:
        results = call.result if isinstance(call.result, tuple) else (call.result,)
        if isinstance(results[0], SentinelTensor):
            self.queries.append(results[0].root)
        for kind, tensor in zip("kv", results[1:], strict=False):
            self._fill("write", kind, tensor)

    def _take_buffers(self, call: Observation, role: str) -> None:
        for kind in "kv":
            tensor = call.get(f"out_{kind}")
            if tensor is not None:
                self._fill(role, kind, tensor)
                self._check_kind(call, f"out_{kind}", kind, tensor)

    def _fill(self, role: str, kind: str, tensor: object) -> None:
        whole, other = origin(tensor), "v" if kind == "k" else "k"
        self.filled.setdefault((role, kind), []).append(whole)
        if not _has(self.buffers[other], whole):
            self.buffers[kind].append(whole)

    def _check_kind(self, call: Observation, name: str, kind: str, tensor: object) -> bool:
        if _has(self.buffers[kind], origin(tensor)):
            return True
        want = _named(self.buffers[kind], f"a contiguous {kind.upper()} of its own")
        self.add(call.op, call.label(name), want, shown(tensor))
        return False

    def _check_written(self, call: Observation, requests: set[int]) -> None:
        early = sorted(requests - self.written)
        if early:
            text = f"K and V of {_listed(early)} are not written yet"
            self.add(call.op, "requests", "a write before it", text)

    def _check_query(self, call: Observation) -> None:
        q = call.get("q")
        if q is not None and self.queries and not _has(self.queries, origin(q)):
            self.add(call.op, call.label("q"), _named(self.queries, "q"), shown(q))

    def _check_contiguous(self, call: Observation, requests: range) -> None:
        """Contiguous K and V hold the new tokens, and the prefix that the pages do not serve."""
        cached = self.case.scenario.cached
        prefix = {r for r in requests if r < len(cached) and cached[r]} - self.paged
        roles = ("write", "gather") if prefix else ("write",)
        if prefix - self.gathered:
            roles = ("write",)  # said once
            text = f"none for {_listed(sorted(prefix - self.gathered))}, whose keys are cached"
            self.add("gather", "requests", f"a gather of the prefix before {call.op}", text)
        for kind in "kv":
            tensor = call.get(f"contiguous_{kind}")
            known = ("write", kind) in self.filled or ("gather", kind) in self.filled
            if not self.driven and (tensor is None or not known):
                continue
            if self._check_kind(call, f"contiguous_{kind}", kind, tensor) and not self.merged:
                self._check_filled(call, kind, tensor, roles)

    def _check_filled(
        self, call: Observation, kind: str, tensor: object, roles: tuple[str, ...]
    ) -> None:
        for role in roles:
            filled = self.filled.get((role, kind), [])
            if (filled or self.driven) and not _has(filled, origin(tensor)):
                want = _named(filled, f"what a {role} filled")
                self.add(call.op, call.label(f"contiguous_{kind}"), want, shown(tensor))
                return

    def _check_coverage(self, op: str, done: str, requests: set[int]) -> None:
        missing = sorted(set(range(self.case.scenario.num_requests)) - requests)
        if missing:
            self.add(op, "requests", f"every request {done}", f"{_listed(missing)} never {done}")


def _has(tensors: Iterable[object], tensor: object) -> bool:
    return any(one is tensor for one in tensors)


def _named(tensors: Sequence[object], otherwise: str) -> str:
    return " or ".join(dict.fromkeys(map(shown, tensors))) or otherwise


def _listed(requests: Sequence[int]) -> str:
    return f"request{'s' if len(requests) > 1 else ''} {', '.join(map(str, requests))}"
