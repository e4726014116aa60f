# SPDX-License-Identifier: Apache-2.0
"""transformers' `QuantizedCache` under test: what it needs, and what it holds."""

from collections.abc import Iterator
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from fastkv.calibrate.transformers import TransformersModel, attention
from fastkv.errors import MissingDependencyError, UnsupportedError
from fastkv.eval.errors import OP
from fastkv.eval.model import Size
from fastkv.eval.subject import Peer
from fastkv.optional import require

if TYPE_CHECKING:
    from numpy.typing import NDArray


def require_peer(peer: Peer, shape: tuple[int, int, int]) -> None:
    """Raise unless a peer can be run.

    Args:
        peer: the peer.
        shape: Hq, Hkv and D.

    Raises:
        MissingDependencyError: its package is not installed.
        UnsupportedError: its groups do not divide a token's K.
    """
    if peer.package is not None and not _is_installed(peer.package):
        name = peer.package.replace(".", "-")
        raise MissingDependencyError(f"{OP} --peers {peer.name}", name, peer.install)
    group, width = peer.options.get("q_group_size", 1), shape[1] * shape[2]
    if width % group:
        raise UnsupportedError(
            OP,
            f"--peers {peer.name}",
            expected=f"a multiple of {group} values in a token's K",
            got=f"{shape[1]} heads of {shape[2]}",
        )


def _is_installed(package: str) -> bool:
    try:
        return find_spec(package) is not None
    except ModuleNotFoundError:  # of the package's parent
        return False


class PeerSession:
    """One request over a `QuantizedCache` (a `fastkv.eval.model.Session`).

    Args:
        loaded: the model.
        peer: which cache.
        name: the model's own attention.
    """

    def __init__(self, loaded: TransformersModel, peer: Peer, name: str) -> None:
        library = require("transformers", OP, "")
        self._model, self._peer, self._attention = loaded.model, peer, name
        self.cache = library.QuantizedCache(peer.backend, loaded.model.config, **peer.options)

    def fill(self, ids: "NDArray[Any]") -> None:
        """Append the prefill; the cache hands it on as it came, and keeps it quantized."""
        self._run(self._model.base_model, ids)

    def logits(self, ids: "NDArray[Any]") -> "NDArray[Any]":
        """Append tokens; their next-token logits `[T, vocabulary]`, float32."""
        found: NDArray[Any] = self._run(self._model, ids).logits[0].numpy()
        return found

    def size(self) -> Size:
        """What the quantized tokens take, counted in the tensors that hold them."""
        held = sum(
            each.nbytes
            for layer in self.cache.layers
            for side in (layer._quantized_keys, layer._quantized_values)
            for each in _tensors(side)
        )
        first = self.cache.layers[0]
        tokens = first.cumulative_length - _window(first)
        return Size(f"{self._peer.bits} bit", held / tokens)

    def _run(self, part: Any, ids: "NDArray[Any]") -> Any:
        torch = require("torch", OP, "")
        with attention(self._model, self._attention), torch.no_grad():
            return part(torch.from_numpy(ids)[None], past_key_values=self.cache, use_cache=True)


def _window(layer: Any) -> int:
    """Tokens that a layer holds in full precision now."""
    keys = layer.keys
    return int(keys.shape[-2]) if keys is not None and keys.dim() == 4 else 0


def _tensors(value: Any) -> Iterator[Any]:
    """The plain tensors within what a backend keeps."""
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, (tuple, list)):
        for each in value:
            yield from _tensors(each)
    elif hasattr(value, "__tensor_flatten__") and type(value).__module__.startswith("optimum"):
        yield from _tensors([getattr(value, name) for name in value.__tensor_flatten__()[0]])
    elif hasattr(value, "nbytes"):
        yield value
