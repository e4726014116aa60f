# SPDX-License-Identifier: Apache-2.0
"""A model of transformers under test: over `PagedCache`, over `QuantizedCache`, or over neither."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from fastkv.calibrate.observe import Observer
from fastkv.calibrate.transformers import TransformersModel, attention
from fastkv.errors import ContractError, UnsupportedError
from fastkv.eval.errors import OP
from fastkv.eval.model import Size
from fastkv.eval.peers import PeerSession, require_peer
from fastkv.eval.serve import PAGE_SIZE
from fastkv.eval.subject import FormatCache, Peer, Subject
from fastkv.optional import require
from fastkv.scales import StaticScales
from fastkv.spec import CacheSpec

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Ids = NDArray[np.int64]

#: Under this name the attention that writes pages and attends to what it wrote them from.
PREFILL = "fastkv_exact_prefill"
_PROBE = np.array([3, 1, 2, 3, 5, 4, 1], np.int64)
# Largest difference of a log-probability that float32 sums in another order may make. Attention
# that is another one moves it by tenths and more.
_TOLERANCE = 1e-2


class HuggingFaceModel:
    """A model of transformers in float32 on the CPU (a `fastkv.eval.model.Model`).

    Args:
        loaded: with its head.

    Raises:
        UnsupportedError: a model without attention.
    """

    none_is_exact = False

    def __init__(self, loaded: TransformersModel) -> None:
        from fastkv.integrations.transformers.binding import model_shape

        self._loaded, self._model = loaded, loaded.model
        self._config = loaded.model.config.get_text_config()
        if getattr(self._config, "num_attention_heads", None) is None:
            raise _other_attention(f"{type(loaded.model).__name__}, which has no attention heads")
        self.num_layers = loaded.num_layers
        self._shape = model_shape(self._config)
        _register()

    def check(self, subjects: tuple[Subject, ...], dtype: str, backend: str) -> None:
        """Raise for what cannot be tested: the model's heads, its attention, a peer's package.

        Two short steps over a cache of format `none` must give what the model's own attention
        gives: a model whose attention is another one than fastkv's is found so, whatever it is.
        """
        from fastkv.integrations.transformers.binding import (
            require_kernels,
            require_served_layers,
        )

        _require("--dtype", dtype, "float32")
        _require("--backend", backend, "append")
        require_served_layers(self._config)
        for subject in subjects:
            if isinstance(subject, Peer):
                require_peer(subject, self._shape)
            else:
                require_kernels(self.spec(subject, dtype), self._shape[0], self._model.device)
        for exact in sorted({isinstance(s, FormatCache) and s.exact_prefill for s in subjects}):
            self._probe(exact)

    def spec(self, subject: FormatCache, dtype: str) -> CacheSpec:
        """The cache of the model in one format."""
        _, heads, dim = self._shape
        return CacheSpec(self.num_layers, heads, dim, PAGE_SIZE, subject.quant.name, dtype)

    def exact(self, capacity: int) -> "TransformersSession":
        """By the model's own attention over its own cache."""
        from transformers import DynamicCache

        own = self._model.config._attn_implementation
        dense = 2 * 4 * self.num_layers * self._shape[1] * self._shape[2]
        size = Size("float32", dense)
        return TransformersSession(self._loaded, DynamicCache(config=self._model.config), own, size)

    def open(
        self,
        subject: Subject,
        scales: Mapping[int, StaticScales],
        capacity: int,
        *,
        dtype: str,
        backend: str,
    ) -> "TransformersSession | PeerSession":
        """Over the cache under test."""
        if isinstance(subject, Peer):
            own = self._model.config._attn_implementation
            return PeerSession(self._loaded, subject, own)
        from fastkv.integrations.transformers import PagedCache

        row, spec = subject.quant, self.spec(subject, dtype)
        static = scales if row.needs_static else None
        cache = PagedCache(row.name, scales=static, page_size=PAGE_SIZE, reserve=capacity)
        size = Size(spec.storage_dtype(0), spec.bytes_per_token())
        prefill = PREFILL if subject.exact_prefill else None
        return TransformersSession(self._loaded, cache, "fastkv", size, prefill)

    def observe(self, ids: "Ids", observer: Observer, positions: int | None) -> None:
        """Hand every layer's Q, K and V of a sequence to the observer."""
        if positions is not None:
            expected, got = "the NumPy decoder", "a model of transformers"
            raise UnsupportedError(OP, "--positions", expected=expected, got=got)
        self._loaded.observe([ids], observer)

    def _probe(self, exact_prefill: bool) -> None:
        from fastkv.eval.score import log_softmax
        from fastkv.quant import QUANT_SPECS

        probe = FormatCache(QUANT_SPECS["none"], exact_prefill=exact_prefill)
        sessions = (
            self.exact(len(_PROBE)),
            self.open(probe, {}, len(_PROBE), dtype="float32", backend="append"),
        )
        wanted, got = (_probed(session) for session in sessions)
        cache = sessions[1].cache
        if not cache.is_initialized or cache.length != len(_PROBE):
            raise _other_attention("layers that keep no K and V in the cache")
        apart = float(np.abs(log_softmax(wanted) - log_softmax(got)).max())
        if not apart <= _TOLERANCE:
            raise _other_attention(f"log-probabilities {apart:.2g} apart over a float32 cache")


def _probed(session: Any) -> "NDArray[Any]":
    session.fill(_PROBE[:4])
    logits: NDArray[Any] = session.logits(_PROBE[4:])
    return logits


def _other_attention(got: str) -> ContractError:
    return UnsupportedError(
        OP, "--model", expected="causal attention of fastkv's kind in every layer", got=got
    )


def _require(option: str, got: str, only: str) -> None:
    if got != only:
        raise UnsupportedError(OP, option, expected=f"{only}, with transformers", got=got)


class TransformersSession:
    """One request over a cache.

    Args:
        loaded: the model.
        cache: of transformers, or a `PagedCache`.
        name: the attention that goes with it.
        size: what the cache holds.
        prefill: the attention of `fill`; None: the same.
    """

    def __init__(
        self,
        loaded: TransformersModel,
        cache: Any,
        name: str,
        size: Size,
        prefill: str | None = None,
    ) -> None:
        self.cache = cache
        self._model, self._size = loaded.model, size
        self._attention, self._prefill = name, prefill or name

    def fill(self, ids: "Ids") -> None:
        """Append the prefill."""
        self._run(self._model.base_model, self._prefill, ids)

    def logits(self, ids: "Ids") -> "NDArray[Any]":
        """Append tokens; their next-token logits `[T, vocabulary]`, float32."""
        found: NDArray[Any] = self._run(self._model, self._attention, ids).logits[0].numpy()
        return found

    def size(self) -> Size:
        """What the cache holds."""
        return self._size

    def _run(self, part: Any, name: str, ids: "Ids") -> Any:
        torch = require("torch", OP, "")
        with attention(self._model, name), torch.no_grad():
            return part(torch.from_numpy(ids)[None], past_key_values=self.cache, use_cache=True)


def _register() -> None:
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    from fastkv.integrations.transformers import register

    register()
    AttentionInterface.register(PREFILL, exact_prefill)
    AttentionMaskInterface.register(PREFILL, sdpa_mask)


def exact_prefill(
    module: Any, query: Any, key: Any, value: Any, attention_mask: Any, **options: Any
) -> tuple[Any, None]:
    """Write K and V into the pages, and attend to them as they came (transformers' interface).

    Args:
        module: the layer's attention.
        query: `[1, Hq, S, D]`.
        key: what `PagedCache.update` returned.
        value: `[1, Hkv, S, D]`.
        attention_mask: of sdpa.
        **options: what the model adds.

    Raises:
        UnsupportedError: a soft cap or sinks, which sdpa does not compute.
    """
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    from fastkv.calibrate.transformers import refuse_what_is_not_computed
    from fastkv.integrations.transformers.attention import write

    refuse_what_is_not_computed(module, options, OP)
    write(module, query, key, value)
    sdpa = ALL_ATTENTION_FUNCTIONS["sdpa"]
    out, _ = sdpa(module, query, key.keys, value, attention_mask, **options)
    return out, None
