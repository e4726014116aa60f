# SPDX-License-Identifier: Apache-2.0
"""What is tested: a cache of fastkv, or one of transformers' `QuantizedCache` beside it."""

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from fastkv.calibrate.methods import Recipe
from fastkv.quant import Granularity, QuantSpec


@dataclass(frozen=True, slots=True)
class FormatCache:
    """A cache of fastkv.

    Attributes:
        quant: its format.
        layout: of the static multipliers; None without.
        recipe: how static scales are calibrated; None without.
        exact_prefill: the prefill attends to K and V as they come and leaves them quantized, as
            `QuantizedCache` does; otherwise every K and V is read from the cache.
    """

    quant: QuantSpec
    layout: Granularity | None = None
    recipe: Recipe | None = None
    exact_prefill: bool = False

    @property
    def name(self) -> str:
        """The format's."""
        return self.quant.name.value


@dataclass(frozen=True, slots=True, eq=False)
class Peer:
    """A `QuantizedCache`. It attends to the prefill, and to the window, as they come, by design.

    Attributes:
        name: what it is asked for by.
        backend: of `QuantizedCache`.
        options: of `QuantizedCache`; none for `fp8`.
        window: tokens that it gathers in full precision before it quantizes them.
        package: what must be installed; None: nothing but transformers.
        install: the line that does.
    """

    name: str
    backend: str
    options: Mapping[str, int]
    window: int = 0
    package: str | None = None
    install: str = ""

    @property
    def bits(self) -> int:
        """Of a stored value."""
        return self.options.get("nbits", 8)


#: What both of its grouped backends gather by default.
WINDOW = 128


def _grouped(backend: str, group: int, axis: int, package: str, version: str) -> Peer:
    options = {"nbits": 4, "axis_key": axis, "axis_value": axis, "q_group_size": group}
    return Peer(
        f"{backend}4-g{group}",
        backend,
        MappingProxyType({**options, "residual_length": WINDOW}),
        WINDOW,
        package,
        f"pip install {package.replace('.', '-')}=={version}",
    )


def _quanto(group: int) -> Peer:
    return _grouped("quanto", group, 0, "optimum.quanto", "0.2.7")


#: The peers by name. quanto's axis 0 and hqq's axis 1 group neighbours in a token's K or V.
PEERS: Mapping[str, Peer] = MappingProxyType(
    {
        peer.name: peer
        for peer in (
            _quanto(64),
            _quanto(32),
            _grouped("hqq", 64, 1, "hqq", "0.2.8.post1"),
            Peer("fp8", "fp8", MappingProxyType({})),
        )
    }
)

Subject = FormatCache | Peer
