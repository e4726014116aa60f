# SPDX-License-Identifier: Apache-2.0
"""What an evaluation needs of a model: a session over any cache, and a look at its K and V."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from fastkv.calibrate.observe import Observer
from fastkv.eval.subject import FormatCache, Subject
from fastkv.scales import StaticScales
from fastkv.spec import CacheSpec

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Ids = NDArray[Any]


@dataclass(frozen=True, slots=True)
class Size:
    """What a cache holds.

    Attributes:
        dtype: what it stores.
        bytes_per_token: K, V and scales of a quantized token, all layers.
    """

    dtype: str
    bytes_per_token: float


class Session(Protocol):
    """One request of the model over one cache."""

    def fill(self, ids: "Ids") -> None:
        """Append the prefill, whose logits nobody asks for."""

    def logits(self, ids: "Ids") -> "NDArray[Any]":
        """Append tokens `[T]`; their next-token logits `[T, vocabulary]`, float32."""

    def size(self) -> Size:
        """What the cache holds now."""


class Model(Protocol):
    """A model that sessions are opened of.

    Attributes:
        num_layers: of the decoder.
        none_is_exact: a float32 cache of format `none` is what all are compared with, so that it
            needs no run of its own.
    """

    num_layers: int
    none_is_exact: bool

    def check(self, subjects: tuple[Subject, ...], dtype: str, backend: str) -> None:
        """Raise what a session of these caches would raise, before anything long is run."""

    def spec(self, subject: FormatCache, dtype: str) -> CacheSpec:
        """A cache of fastkv for the model; `dtype` is what `none` stores."""

    def exact(self, capacity: int) -> Session:
        """The session that all are compared with: the model in float32 over a float32 cache."""

    def open(
        self,
        subject: Subject,
        scales: Mapping[int, StaticScales],
        capacity: int,
        *,
        dtype: str,
        backend: str,
    ) -> Session:
        """A session over the cache under test, with room for `capacity` tokens."""

    def observe(self, ids: "Ids", observer: Observer, positions: int | None) -> None:
        """Hand every layer's Q, K and V of a sequence to the observer."""
