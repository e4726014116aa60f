# SPDX-License-Identifier: Apache-2.0
"""What a backend is tried on: every format, layer, layout of the cache list and scenario."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from itertools import cycle, islice
from types import SimpleNamespace
from typing import Any, Literal, TypeAlias, get_args

from fastkv.batch import BatchMeta
from fastkv.errors import unknown_name
from fastkv.quant import QUANT_SPECS, QuantSpec, QuantType, quant_spec
from fastkv.spec import CacheSpec
from fastkv.testing.scenarios import (
    SCENARIOS,
    Scenario,
    scenario_named,
    sentinel_meta,
    sentinel_qkv,
)
from fastkv.testing.sentinels import (
    SCALE_ATTRIBUTES,
    ZERO_POINT_ATTRIBUTES,
    Scales,
    SentinelTensor,
    sentinel_caches,
    sentinel_layer,
)

Layout: TypeAlias = Literal["uniform", "mixed"]
#: Every layer in one format, or other formats around the layer.
LAYOUTS: tuple[Layout, ...] = get_args(Layout)

#: What a `LayerCache` holds of a layer.
PAGED = ("k", "v", "k_scale", "v_scale")
STATIC = ("k_quant", "k_dequant", "v_quant", "v_dequant", "k_zp", "v_zp")

_NUM_LAYERS = 5
_LAYERS = (0, 1, _NUM_LAYERS - 1)


def small_spec(formats: Sequence[QuantType | str]) -> CacheSpec:
    """A spec with one layer in each of these formats; no two of its numbers are equal."""
    return CacheSpec(
        len(formats), num_kv_heads=2, head_dim=64, page_size=8, quant=formats, dtype="bfloat16"
    )


@dataclass(frozen=True, eq=False)
class Case:
    """One step of one layer.

    Attributes:
        format: the layer's format.
        layout: whether the other layers have it too.
        layer_id: the layer.
        scenario: the requests of the step.
        scales: how layers carry static scales.
        spec: what the cache list holds.
    """

    format: str
    layout: Layout
    layer_id: int
    scenario: Scenario
    scales: Scales
    spec: CacheSpec

    def __str__(self) -> str:
        step = self.scenario.name.replace(" ", "_")
        return f"{self.format}-{self.layout}-{self.scales}-layer{self.layer_id}-{step}"

    def __getstate__(self) -> dict[str, Any]:
        # A failure that crosses processes leaves the sentinels behind; they are made anew.
        return {one.name: getattr(self, one.name) for one in fields(self)}

    @property
    def quant(self) -> QuantSpec:
        """The row of the layer's format."""
        return quant_spec(self.format)

    @cached_property
    def caches(self) -> list[SentinelTensor]:
        """The engine's flat cache list."""
        return sentinel_caches(self.spec)

    @cached_property
    def layers(self) -> tuple[SimpleNamespace, ...]:
        """All layers of the model."""
        ids = range(self.spec.num_layers)
        return tuple(sentinel_layer(self.spec, i, self.scales) for i in ids)

    @property
    def layer(self) -> SimpleNamespace:
        """The layer of the case."""
        return self.layers[self.layer_id]

    @cached_property
    def meta(self) -> BatchMeta:
        """The batch."""
        return sentinel_meta(self.spec, self.caches, self.scenario)

    @cached_property
    def qkv(self) -> SentinelTensor:
        """The new tokens."""
        return sentinel_qkv(self.spec, self.scenario)

    @cached_property
    def expected(self) -> Mapping[str, Any]:
        """What must reach the ops: name of an argument -> sentinel; None where nothing may."""
        found: dict[str, Any] = dict.fromkeys((*PAGED, *STATIC))
        # Counted anew and not asked of the spec, so that a mistake in its sums shows.
        before = sum(len(self.spec.layer_tensors(i, 1)) for i in range(self.layer_id))
        for i, tensor in enumerate(self.spec.layer_tensors(self.layer_id, 1)):
            found[tensor.name] = self.caches[before + i]
        if self.quant.needs_static:
            found |= self._static()
        batch = ("cu_seqlens_q", "cache_seqlens", "block_table", "cu_seqlens_k")
        found |= {name: getattr(self.meta, name) for name in batch}
        rope = self.meta.rope
        assert rope is not None, "every case has tables"
        found |= {"rope.cos": rope.cos, "rope.sin": rope.sin}
        return found | {"layer_id": self.layer_id, "spec": self.spec}

    def _static(self) -> dict[str, Any]:
        named = SCALE_ATTRIBUTES | ZERO_POINT_ATTRIBUTES
        owner = getattr(self.layer, "static_scales", None)
        if owner is not None:
            return {field: getattr(owner, field) for field in self.quant.static_fields}
        return {field: getattr(self.layer, name, None) for name, field in named.items()}


def cases(
    *,
    formats: Iterable[QuantType | str] = tuple(QuantType),
    layouts: Iterable[Layout] = LAYOUTS,
    scenarios: Iterable[Scenario | str] = tuple(SCENARIOS),
    scales: Scales = "attributes",
) -> list[Case]:
    """The cases of the suite: every format × layer 0, 1 and the last × layout × scenario.

    Args:
        formats: those that the backend serves.
        layouts: `uniform`, where all layers have one format, and `mixed`, where the layers around
            have others.
        scenarios: those that the backend serves.
        scales: whether layers carry static scales as `attributes` or as a `bundle`.
    """
    rows = [quant_spec(name, op="conformance.cases", argument="formats") for name in formats]
    steps = [scenario_named(step, op="conformance.cases") for step in scenarios]
    arrangements = [_arrangement(name) for name in layouts]
    return [
        Case(row.name.value, layout, layer_id, step, scales, spec)
        for row in rows
        for layout in arrangements
        for layer_id in _LAYERS
        for spec in [small_spec(_ARRANGED[layout](row, layer_id))]
        for step in steps
    ]


def _arrangement(name: str) -> Layout:
    for layout in LAYOUTS:
        if layout == name:
            return layout
    raise unknown_name("conformance.cases", "layouts", name, LAYOUTS)


def _uniform(row: QuantSpec, layer_id: int) -> list[QuantType]:
    return [row.name] * _NUM_LAYERS


def _mixed(row: QuantSpec, layer_id: int) -> list[QuantType]:
    """The layers before have another number of tensors in sum than as many layers of the format."""
    count = row.tensors_per_layer
    others = [other for other in QUANT_SPECS.values() if other is not row]
    others.sort(key=lambda other: other.tensors_per_layer == count)
    names = [other.name for other in others]
    # The format itself comes second, so that it has a namesake elsewhere in the model.
    around = list(islice(cycle([names[0], row.name, *names[1:]]), _NUM_LAYERS - 1))
    return [*around[:layer_id], row.name, *around[layer_id:]]


_ARRANGED = {"uniform": _uniform, "mixed": _mixed}
