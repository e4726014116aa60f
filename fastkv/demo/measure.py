# SPDX-License-Identifier: Apache-2.0
"""The demo's table: each backend × format against float64, and against its bound."""

from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from math import sqrt
from time import perf_counter
from typing import TYPE_CHECKING, Any

import numpy as np

from fastkv.backends import BACKEND_NAMES, Ops
from fastkv.backends.features import BACKENDS
from fastkv.demo.sample import Sample, load_sample
from fastkv.demo.schedule import Request, requests
from fastkv.demo.serve import demo_layers, demo_spec, serve
from fastkv.demo.truth import Truth, expected_square, truth
from fastkv.quant import QUANT_SPECS, QuantSpec, QuantType

if TYPE_CHECKING:
    from numpy.typing import NDArray

#: How far the measured error may lie above the predicted one. The prediction is an expectation
#: over rounding errors; measured, it is met within 20 % (docs/demo.md).
SAFETY = 1.5


@dataclass(frozen=True, slots=True)
class Row:
    """One backend and format.

    Attributes:
        backend: its name.
        format: its name.
        bytes_per_token: K, V and paged scales of the sample's layers.
        fixed_bytes: static scales and zero points of these layers, whatever the tokens.
        compression: bytes a token of a bfloat16 cache over this one's.
        error: relative error of the output: root mean square over the layers of
            `|out - exact| / |exact|` (Frobenius norms over all rows and heads).
        predicted: the same, expected from the format's step.
        bound: `SAFETY` times `predicted`.
        worst_row: largest relative error of one token in one layer.
        seconds: to serve all steps in all layers.
    """

    backend: str
    format: str
    bytes_per_token: int
    fixed_bytes: int
    compression: float
    error: float
    predicted: float
    bound: float
    worst_row: float
    seconds: float

    @property
    def ok(self) -> bool:
        """Whether the error is within its bound; NaN is not."""
        return self.error <= self.bound

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {**asdict(self), "ok": self.ok}


class Demo:
    """The sample and its exact attention, computed once for all rows."""

    def __init__(self, sample: Sample | None = None) -> None:
        self.sample = load_sample() if sample is None else sample
        self.requests = requests(self.sample)
        self._exact = [
            [truth(self.sample, layer, request) for request in self.requests]
            for layer in self.sample.layers
        ]

    def cells(self) -> list[tuple[str, QuantSpec]]:
        """Every backend × format."""
        return [(name, quant) for name in BACKEND_NAMES for quant in QUANT_SPECS.values()]

    def rows(
        self, cells: Iterable[tuple[str, QuantSpec]], done: Callable[[], None] = lambda: None
    ) -> list[Row]:
        """Measure cells; `done` is called after each."""
        rows = []
        for backend, quant in cells:
            rows.append(self.row(backend, quant))
            done()
        return rows

    def row(self, backend: str, quant: QuantSpec, ops: Ops | None = None) -> Row:
        """Serve the sample through one backend and format, and measure it.

        Args:
            backend: its name.
            quant: the format.
            ops: None takes `fastkv.ops`.
        """
        spec = demo_spec(self.sample, quant)
        start = perf_counter()
        outs = serve(self.sample, spec, backend, ops)
        seconds = perf_counter() - start
        predicted = self._predicted(backend, quant)
        plain = demo_spec(self.sample, QUANT_SPECS[QuantType.NONE.value])
        return Row(
            backend=backend,
            format=quant.name.value,
            bytes_per_token=int(spec.bytes_per_token()),
            fixed_bytes=spec.static_bytes(),
            compression=plain.bytes_per_token() / spec.bytes_per_token(),
            error=self._error(outs),
            predicted=predicted,
            bound=SAFETY * predicted,
            worst_row=self._worst_row(outs),
            seconds=seconds,
        )

    def _error(self, outs: "list[list[NDArray[np.float32]]]") -> float:
        return self._over_layers(
            lambda layer, i: (_difference(outs[layer][i], self._exact[layer][i]) ** 2).sum()
        )

    def _predicted(self, backend: str, quant: QuantSpec) -> float:
        layers = demo_layers(self.sample, demo_spec(self.sample, quant))
        exact_from = [_exact_from(backend, request) for request in self.requests]
        return self._over_layers(
            lambda layer, i: expected_square(
                self._exact[layer][i], quant, layers[layer].static_scales, exact_from[i]
            ).sum()
        )

    def _over_layers(self, square: Callable[[int, int], Any]) -> float:
        """Root mean square over layers of relative errors, given the square of each request's."""
        ratios = []
        for layer, exact in enumerate(self._exact):
            total = sum(square(layer, i) for i in range(len(exact)))
            ratios.append(total / sum((one.out**2).sum() for one in exact))
        return sqrt(np.mean(ratios))

    def _worst_row(self, outs: "list[list[NDArray[np.float32]]]") -> float:
        worst = 0.0
        for per_request, exact in zip(outs, self._exact, strict=True):
            for out, one in zip(per_request, exact, strict=True):
                off = np.linalg.norm(_difference(out, one).reshape(len(out), -1), axis=1)
                size = np.linalg.norm(one.out.reshape(len(out), -1), axis=1)
                worst = max(worst, float((off / size).max()))
        return worst


def _difference(out: "NDArray[np.float32]", exact: Truth) -> "NDArray[np.float64]":
    return out.astype(np.float64).reshape(exact.out.shape) - exact.out


def _exact_from(backend: str, request: Request) -> "NDArray[np.int64]":
    if "gather_kv" in BACKENDS[backend].prefill:
        return request.exact_from()
    return np.full(len(request.tokens), len(request.tokens))
