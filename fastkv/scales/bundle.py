# SPDX-License-Identifier: Apache-2.0
"""`StaticScales`: one immutable bundle that both the writer and the reader of a layer take."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from fastkv.errors import MissingTensorError, ShapeError
from fastkv.flat import Flat

if TYPE_CHECKING:
    from fastkv.arrays import LibraryName
    from fastkv.quant import QuantType
    from fastkv.spec import CacheSpec

#: The fields of a bundle, scales first.
FIELDS = ("k_quant", "k_dequant", "v_quant", "v_dequant", "k_zp", "v_zp")


@dataclass(frozen=True, slots=True)
class StaticScales(Flat):
    """Multipliers and zero points of one layer of a static format.

    Each array is `[Hkv]` (per KV head), `[Hkv, D]` (per channel) or `[Hkv * D]` (per channel,
    flat, as FastDeploy keeps it), float32, bfloat16 or float16. Building a bundle reads no
    values, so sentinels work; `validate` reads them, once, at load.

    Attributes:
        k_quant: multiplies K before rounding (`cache_k_scale` in FastDeploy).
        k_dequant: multiplies K's codes when read (`cache_k_out_scale`).
        v_quant: as `k_quant`, for V.
        v_dequant: as `k_dequant`, for V.
        k_zp: zero point in quantized units; both or neither.
        v_zp: as `k_zp`, for V.

    Raises:
        MissingTensorError: a multiplier is None, or one zero point of two.
    """

    k_quant: Any
    k_dequant: Any
    v_quant: Any
    v_dequant: Any
    k_zp: Any = None
    v_zp: Any = None

    def __post_init__(self) -> None:
        for name in FIELDS[:4]:
            if getattr(self, name) is None:
                raise MissingTensorError("StaticScales", name, expected="an array", got="None")
        if (self.k_zp is None) != (self.v_zp is None):
            absent = "k_zp" if self.k_zp is None else "v_zp"
            raise MissingTensorError(
                "StaticScales", absent, expected="both zero points or neither", got="None"
            )

    def map(self, change: Callable[[Any], Any]) -> "StaticScales":
        """A bundle with `change` applied to every array that is there."""
        present = {name: getattr(self, name) for name in FIELDS if getattr(self, name) is not None}
        return replace(self, **{name: change(array) for name, array in present.items()})

    def to(self, library: "LibraryName", device: str = "cpu") -> "StaticScales":
        """A copy of the bundle in another array library, on a device."""
        from fastkv import arrays

        return self.map(lambda array: arrays.convert(array, library, device))

    def shard(self, spec: "CacheSpec", tp_rank: int, tp_size: int) -> "StaticScales":
        """The part of one tensor-parallel rank; `spec` is the whole model's.

        Every array is cut along KV heads the way `CacheSpec.shard` cuts the cache, so a flat
        per-channel array stays flat.

        Raises:
            SpecError: the rank is outside the group, or the heads cannot be cut so.
            ShapeError: an array that is not the whole model's.
        """
        heads = spec.kv_heads(tp_rank, tp_size)
        whole, dim = spec.num_kv_heads, spec.head_dim

        def cut(array: Any) -> Any:
            rows = array.shape[0]
            if rows not in (whole, whole * dim):
                raise ShapeError(
                    "StaticScales.shard",
                    "static",
                    expected=f"[Hkv], [Hkv, D] or [Hkv * D] with Hkv = {whole}, D = {dim}",
                    got=str(list(array.shape)),
                    hint="The spec is the whole model's, and so is the bundle.",
                )
            per_head = rows // whole
            return array[heads.start * per_head : heads.stop * per_head]

        return self.map(cut)

    def validate(self, spec: "CacheSpec", layer_id: int = 0) -> tuple[str, ...]:
        """Read every value once and raise on what no op can use.

        Args:
            spec: the cache the bundle is for.
            layer_id: the layer, which names the format.

        Returns:
            Remarks on what is legal and looks like a mistake: a pair whose product is not 1
            within 2 %, multipliers that are all 1.0.

        Raises:
            SurplusTensorError: the layer's format takes no static scales, or no zero points.
            MissingTensorError: it needs zero points.
            ShapeError, DtypeError: an array that fits no granularity of the format.
            ScaleError: a multiplier that is not finite and positive, a zero point not finite.
        """
        from fastkv.contracts.presence import require_static
        from fastkv.scales.values import remarks, require_usable

        quant = spec.layer_quant(layer_id, op="StaticScales.validate")
        op = f"StaticScales.validate(layer_id={layer_id})"
        require_static(op, "static", self, quant)
        require_usable(op, self, spec, quant)
        return remarks(self)

    @classmethod
    def from_amax(cls, k_amax: Any, v_amax: Any, quant: "QuantType | str") -> "StaticScales":
        """Symmetric multipliers from observed maxima: `quant = bound / amax`, `dequant = 1/quant`.

        Args:
            k_amax: largest |K| seen, `[Hkv]` or `[Hkv, D]`, on the CPU, any library; reduced to
                heads for a format that has no scales per channel.
            v_amax: as `k_amax`, for V.
            quant: a static format without zero points.

        Returns:
            A bundle of NumPy arrays, float32.

        Raises:
            ScaleError: a maximum that is negative or not finite.
            UnsupportedError: a format without static scales, or with zero points.
        """
        from fastkv.scales import formulas

        return formulas.from_amax(k_amax, v_amax, quant)

    @classmethod
    def from_minmax(
        cls, k_min: Any, k_max: Any, v_min: Any, v_max: Any, quant: "QuantType | str"
    ) -> "StaticScales":
        """Multipliers, and zero points where the format has them, from observed ranges.

        Args:
            k_min: smallest K seen, `[Hkv, D]`, on the CPU, any library.
            k_max: largest K seen, `[Hkv, D]`.
            v_min: as `k_min`, for V.
            v_max: as `k_max`, for V.
            quant: any static format. A format with zero points maps `[min, max]` on all of its
                codes; any other takes `max(|min|, |max|)`, reduced to its preferred granularity.

        Returns:
            A bundle of NumPy arrays, float32.

        Raises:
            ScaleError: a minimum above its maximum, or one that is not finite.
            UnsupportedError: a format without static scales.
        """
        from fastkv.scales import formulas

        return formulas.from_minmax(k_min, k_max, v_min, v_max, quant)
