# SPDX-License-Identifier: Apache-2.0
"""The observer: a model's adapter hands it one layer's sequence after another."""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from fastkv.calibrate.errors import OP
from fastkv.calibrate.histogram import Histogram
from fastkv.calibrate.methods import Recipe, Side
from fastkv.calibrate.weights import attention_weights
from fastkv.errors import MissingTensorError, ScaleError, ShapeError
from fastkv.quant import QuantSpec
from fastkv.scales.bundle import StaticScales
from fastkv.scales.calibration import from_ranges, static_layout

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from fastkv.quant import Granularity

    F32 = NDArray[np.float32]


class Observer:
    """Sketches of K and V of every layer.

    Memory: 8 bytes a bin, `histogram.BINS` bins a channel of K and of V, whatever the text's
    length. Of the activations only the layer at hand is held, for one sequence.

    Args:
        num_layers: of the model.
        by_attention: weigh tokens by attention, which needs the queries; otherwise all alike.
        done: told of each layer observed.
    """

    def __init__(
        self,
        num_layers: int,
        by_attention: bool = False,
        done: Callable[[str], None] = lambda _: None,
    ) -> None:
        self.num_layers = num_layers
        self.by_attention = by_attention
        self._done = done
        self._layers: dict[int, tuple[_Channels, _Channels]] = {}
        self._shape: tuple[int, ...] | None = None

    @property
    def heads_and_dim(self) -> tuple[int, int]:
        """Hkv and D, once something was observed."""
        assert self._shape is not None, "something was observed"
        heads, dim = self._shape
        return heads, dim

    def add(
        self,
        layer: int,
        q: "F32",
        k: "F32",
        v: "F32",
        scale: float,
        window: int | None = None,
        later: "Sequence[F32]" = (),
    ) -> None:
        """Observe one layer of one sequence, from its first token on.

        Args:
            layer: from 0.
            q: queries after norm and RoPE, `[T, Hq, D]`.
            k: keys as they are cached, after norm and RoPE, `[T, Hkv, D]`.
            v: values, `[T, Hkv, D]`.
            scale: multiplies the attention's logits.
            window: see `attention_weights`.
            later: K of the same tokens at later positions, `[T, Hkv, D]` each, counted like `k`:
                RoPE rotates Q and K alike, so that the weights stay what they are.

        Raises:
            ShapeError: K and V differ in shape, or from other layers', or no such layer.
            ScaleError: a value that is NaN or infinite.
        """
        self._check(layer, k, v)
        of_k, of_v = (
            attention_weights(q, k, v, scale, window)
            if self.by_attention
            else (np.ones(k.shape[:2]), np.ones(k.shape[:2]))
        )
        if layer not in self._layers:
            self._layers[layer] = _Channels(k.shape[1:]), _Channels(v.shape[1:])
        for channels, x, weights in zip(self._layers[layer], (k, v), (of_k, of_v), strict=True):
            channels.add(x, weights)
        for moved in later:
            self._layers[layer][0].add(moved, of_k)
        self._done(f"observe layer {layer}")

    def sides(self, layer: int) -> tuple[Side, Side]:
        """What was observed of a layer's K and V."""
        k, v = self._layers[layer]
        return k.side("k"), v.side("v")

    def require_layers(self) -> None:
        """Raise `MissingTensorError` unless every layer of the model was observed."""
        missing = [i for i in range(self.num_layers) if i not in self._layers]
        if missing:
            raise MissingTensorError(
                OP,
                f"layers {', '.join(map(str, missing))}",
                expected=f"K and V of all {self.num_layers} layers",
                got="none: the model's attention did not hand them over",
            )

    def scales(
        self,
        row: QuantSpec,
        granularity: "Granularity | str | None",
        recipe: Recipe,
        done: Callable[[str], None] = lambda _: None,
    ) -> dict[int, StaticScales]:
        """Static scales of every layer.

        Args:
            row: a static format.
            granularity: of its multipliers; None takes the preferred one.
            recipe: its weights are those that the observer was made with.
            done: told of each layer.

        Raises:
            MissingTensorError: see `require_layers`.
            UnsupportedError, ScaleError: see `fastkv.scales.calibration.static_layout`.
        """
        self.require_layers()
        layout = static_layout(row, granularity)
        found = {}
        for layer in range(self.num_layers):
            k, v = (recipe.range(side, row, layout) for side in self.sides(layer))
            found[layer] = from_ranges(k, v, row, layout, recipe.headroom)
            done(f"scales of layer {layer}")
        return found

    def _check(self, layer: int, k: "F32", v: "F32") -> None:
        if not 0 <= layer < self.num_layers:
            expected = f"a layer below {self.num_layers}"
            raise ShapeError(OP, "layer", expected=expected, got=str(layer))
        if k.shape != v.shape or self._shape not in (None, k.shape[1:]):
            raise ShapeError(
                OP,
                f"K and V of layer {layer}",
                expected="[T, Hkv, D], the same in K and V and in every layer",
                got=f"{list(k.shape)} and {list(v.shape)}",
            )
        self._shape = k.shape[1:]
        for name, x in (("K", k), ("V", v)):
            finite = np.isfinite(x)
            if not finite.all():
                token, head, channel = place = tuple(np.argwhere(~finite)[0].tolist())
                raise ScaleError(
                    OP,
                    f"{name} of layer {layer}",
                    expected="finite values",
                    got=f"{x[place]} at token {token}, head {head}, channel {channel}",
                )


class _Channels:
    """The sketch of K or V of one layer."""

    def __init__(self, shape: tuple[int, ...]) -> None:
        self.histogram = Histogram(int(np.prod(shape)))
        self._low = np.full(shape, np.inf, np.float32)
        self._high = np.full(shape, -np.inf, np.float32)

    def add(self, x: "F32", weights: "NDArray[Any]") -> None:
        """Count `x [T, Hkv, D]` with weights `[T, Hkv]`."""
        self._low = np.minimum(self._low, x.min(axis=0))
        self._high = np.maximum(self._high, x.max(axis=0))
        spread = np.broadcast_to(weights[:, :, None], x.shape)
        self.histogram.add(x.reshape(len(x), -1), spread.reshape(len(x), -1))

    def side(self, name: str) -> Side:
        """Under the name `k` or `v`."""
        return Side(name, self._low, self._high, self.histogram)
