# SPDX-License-Identifier: Apache-2.0
"""What a model of transformers meets of a `PagedCache` in each layer: keys to hand on, a length."""

from typing import TYPE_CHECKING, Any, NoReturn

from transformers.cache_utils import Cache, CacheLayerMixin

from fastkv.errors import UnsupportedError
from fastkv.integrations.transformers.binding import OP

if TYPE_CHECKING:
    from fastkv.integrations.transformers.cache import PagedCache


class PagedKeys:
    """What `PagedCache.update` gives the model in place of keys: the layer, and the new keys.

    Only attn_implementation="fastkv" takes it. Any other asks it for a tensor's attributes, and is
    refused instead of attending to the new tokens alone.
    """

    def __init__(self, cache: "PagedCache", layer_idx: int, keys: Any) -> None:
        self.cache = cache
        self.layer_idx = layer_idx
        self.keys = keys
        self.taken = False  # by an attention

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):  # of protocols, which others look for everywhere
            raise AttributeError(name)
        raise UnsupportedError(
            OP,
            "attn_implementation",
            expected="'fastkv', and a model that hands it keys as they come",
            got=f"code that looks at keys.{name}",
            hint="Call model.set_attn_implementation('fastkv').",
        )


class AttentionOnly(Cache):  # type: ignore[misc]
    """A cache of keys and values alone: what other layers ask of a cache is refused by name."""

    def get_conv_state(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Refused: the state of a convolution."""
        _refuse_state("get_conv_state")

    def update_conv_state(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Refused: the state of a convolution."""
        _refuse_state("update_conv_state")

    def get_recurrent_state(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Refused: the state of a recurrent layer."""
        _refuse_state("get_recurrent_state")

    def update_recurrent_state(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Refused: the state of a recurrent layer."""
        _refuse_state("update_recurrent_state")

    def update_indexer(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Refused: keys of an indexer, which chooses keys."""
        _refuse_state("update_indexer")


def _refuse_state(method: str) -> NoReturn:
    raise UnsupportedError(
        OP,
        "model",
        expected="layers that cache keys and values",
        got=f"one that keeps another state ({method})",
    )


class PagedLayer(CacheLayerMixin):  # type: ignore[misc]
    """One layer as transformers sees it; the cache keeps what there is to keep."""

    is_sliding = False
    is_croppable = True

    def __init__(self, cache: "PagedCache", index: int) -> None:
        super().__init__()
        self._cache, self._index = cache, index

    def lazy_initialization(self, key_states: Any, value_states: Any) -> None:
        """Nothing: attention allocates, when all that it needs is there."""

    def update(
        self, key_states: Any, value_states: Any, *args: Any, **kwargs: Any
    ) -> tuple[PagedKeys, Any]:
        """As `PagedCache.update`."""
        return PagedKeys(self._cache, self._index, key_states), value_states

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Keys after the step, and the first of them."""
        return self._cache.length + query_length, 0

    def get_seq_length(self) -> int:
        """Tokens cached, padding included."""
        return self._cache.length

    def get_max_length(self) -> int:
        """No limit."""
        return -1

    def reset(self) -> None:
        """Refused: layers share one block table."""
        self._refuse("reset")

    def reorder_cache(self, beam_idx: Any) -> None:
        """Refused: layers share one block table."""
        self._refuse("reorder_cache")

    def crop(self, tokens_to_remove: int) -> None:
        """Refused: layers share one block table."""
        self._refuse("crop")

    def offload(self) -> None:
        """Refused: a step needs its pages on the device."""
        self._refuse("offload")

    def prefetch(self) -> None:
        """Refused, as `offload`."""
        self._refuse("prefetch")

    def _refuse(self, method: str) -> NoReturn:
        raise UnsupportedError(
            f"PagedLayer.{method}",
            "layer",
            expected=f"PagedCache.{method}, for all layers",
            got=f"layer {self._index} alone",
        )
