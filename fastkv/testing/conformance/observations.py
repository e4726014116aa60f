# SPDX-License-Identifier: Apache-2.0
"""What a kernel or an op was called with, in the words of the conformance suite."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias, get_args

from fastkv.errors import unknown_name
from fastkv.testing.conformance.cases import PAGED, STATIC
from fastkv.testing.recording import Call
from fastkv.testing.sentinels import SentinelTensor

Role: TypeAlias = Literal["write", "gather", "attend_pages", "attend_contiguous"]
ROLES: tuple[Role, ...] = get_args(Role)

# Tensors of the batch -> entries that they have beyond one a request.
BATCH = {"cache_seqlens": 0, "block_table": 0, "cu_seqlens_q": 1, "cu_seqlens_k": 1}
TABLES = ("rope.cos", "rope.sin")
_FLOW = ("q", "out_k", "out_v", "contiguous_k", "contiguous_v")
_VALUES = ("layer_id", "spec")
ARGUMENTS = (*PAGED, *STATIC, *BATCH, *TABLES, *_FLOW, *_VALUES)


@dataclass(frozen=True, slots=True)
class Observation:
    """One call of an op or kernel.

    Args:
        op: its name; any.
        roles: what it does: `write` puts the new tokens' K and V on pages, `gather` copies cached
            tokens into contiguous K and V, `attend_pages` and `attend_contiguous` attend. A fused
            kernel has several.
        arguments: what it was given. By name: `k`, `v`, `k_scale`, `v_scale` (cache tensors),
            `k_quant`, `k_dequant`, `v_quant`, `v_dequant`, `k_zp`, `v_zp` (static scales); an
            absent one counts as None. Checked where given: `cu_seqlens_q`, `cache_seqlens`,
            `block_table`, `cu_seqlens_k`, `rope.cos`, `rope.sin`, `q`, `out_k` and `out_v`
            (contiguous K and V that it fills), `contiguous_k` and `contiguous_v` (that it reads),
            `layer_id`, `spec`.
        requests: `(start, stop)`, the requests that it served; None reads them off the slices of
            the batch's tensors, or, where none was given, takes all that the role serves.
        labels: a name from above -> what the op calls that argument, for failures.
        result: what it returned: q, or (q, k, v), of a `write`.
        complete: it takes all tensors of the format, as an op that takes a `LayerCache` does, and
            not only those that its roles need.

    Raises:
        UnknownNameError: a role or an argument that nobody knows.
    """

    op: str
    roles: tuple[Role, ...]
    arguments: Mapping[str, Any]
    requests: tuple[int, int] | None = None
    labels: Mapping[str, str] = field(default_factory=dict)
    result: Any = None
    complete: bool = False

    def __post_init__(self) -> None:
        for role in self.roles:
            if role not in ROLES:
                raise unknown_name("Observation", "roles", role, ROLES)
        for name in self.arguments:
            if name not in ARGUMENTS:
                raise unknown_name("Observation", "arguments", name, ARGUMENTS)

    def label(self, name: str) -> str:
        """How the op calls an argument."""
        return self.labels.get(name, name)

    def get(self, name: str) -> Any:
        """An argument; None where absent."""
        return self.arguments.get(name)


def observed(call: Call) -> Observation | None:
    """A recorded call of one of fastkv's ops; None for an op that moves no tensor of the cache."""
    if call.op not in _OPS:
        return None
    role, renamed = _OPS[call.op]
    given = {name: call.arguments[name] for name in (*BATCH, *_FLOW) if name in call.arguments}
    given |= {new: call.arguments.get(old) for new, old in renamed.items()}
    labels = dict(renamed)
    takes_cache = "cache" in call.arguments
    if takes_cache:
        fields, places = _opened(call.arguments["cache"])
        given |= fields
        labels |= places
    if role == "write":
        rope = call.arguments.get("rope")
        given |= {name: getattr(rope, name[-3:], None) for name in TABLES}
        if given.get("cu_seqlens_k") is None:  # it comes with out_k and out_v, or not at all
            given.pop("cu_seqlens_k", None)
    return Observation(
        call.op, (role,), given, labels=labels, result=call.result, complete=takes_cache
    )


def _opened(cache: Any) -> tuple[dict[str, Any], dict[str, str]]:
    """The tensors in a `LayerCache`, and where in it they are."""
    static = getattr(cache, "static", None)
    found = {name: getattr(cache, name, None) for name in (*PAGED, *_VALUES)}
    found |= {name: getattr(static, name, None) for name in STATIC}
    places = {name: f"cache.{name}" for name in (*PAGED, *_VALUES)}
    return found, places | {name: f"cache.static.{name}" for name in STATIC}


# Op -> its role, and names of the suite -> names of the op's signature.
_OPS: dict[str, tuple[Role, dict[str, str]]] = {
    "rope_write_kv": ("write", {}),
    "gather_kv": ("gather", {}),
    "paged_attention": ("attend_pages", {}),
    "masked_attention": ("attend_contiguous", {"contiguous_k": "k", "contiguous_v": "v"}),
}


def origin(tensor: object) -> object:
    """What a tensor is a part of: a sentinel's root; anything else itself."""
    return tensor.root if isinstance(tensor, SentinelTensor) else tensor
