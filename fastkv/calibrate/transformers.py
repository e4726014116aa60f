# SPDX-License-Identifier: Apache-2.0
"""Observe a transformers model: its own attention interface hands over Q, K and V after RoPE."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from fastkv.calibrate.errors import OP
from fastkv.calibrate.observe import Observer
from fastkv.errors import ContractError, UnsupportedError
from fastkv.optional import require

if TYPE_CHECKING:
    from numpy.typing import NDArray

INSTALL = "pip install 'fastkv[transformers]'"
GGUF_INSTALL = "pip install 'fastkv[eval,transformers]'"
#: Under this name the attention that observes is registered with transformers.
ATTENTION = "fastkv_calibrate"
# Not every model hands keyword arguments down to its attention.
_OBSERVER: ContextVar[Observer] = ContextVar("observer")
# What changes the attention in ways that are not computed here, by the argument that asks for it.
_NOT_COMPUTED = {"softcap": "a soft cap", "s_aux": "sinks"}


class TransformersModel:
    """A model directory, a name on the Hugging Face Hub, or a GGUF file, with its tokenizer.

    Attributes:
        name: as it was given.
        model: transformers' own, in evaluation mode.
        bos: the token that begins a sequence, or None.

    Args:
        name: what `from_pretrained` takes, or a `.gguf` file. The model is loaded in float32.
        op: the command that asks, for errors.
        head: load the model with its language head.

    Raises:
        MissingDependencyError: transformers or PyTorch, or gguf for such a file, is not installed.
        ContractError: transformers finds no such model.
    """

    def __init__(self, name: str, *, op: str = OP, head: bool = False) -> None:
        self._torch = require("torch", op, INSTALL)
        library = require("transformers", op, INSTALL)
        from safetensors import SafetensorError

        _register(library)
        self.name = name
        place, options = _place(name, op)
        kind = library.AutoModelForCausalLM if head else library.AutoModel
        try:
            with _quiet():
                self._tokenizer = library.AutoTokenizer.from_pretrained(place, **options)
                self.model, loaded = kind.from_pretrained(
                    place, dtype=self._torch.float32, output_loading_info=True, **options
                )
        except (OSError, ValueError, RuntimeError, SafetensorError) as error:
            # RuntimeError: weights of another size; SafetensorError: a file cut short.
            first = str(error).strip().partition("\n")[0]
            raise ContractError(
                op, "--model", expected="a GGUF file or a transformers model", got=first
            ) from error
        _require_whole(op, name, loaded["missing_keys"])
        self.model.eval()
        self._body = self.model.base_model if head else self.model
        self._config = self.model.config.get_text_config()
        self.bos: int | None = self._begins()

    @property
    def num_layers(self) -> int:
        """Decoder layers."""
        return int(self._config.num_hidden_layers)

    @property
    def longest(self) -> int | None:
        """Tokens that a sequence may have, BOS not counted; None where the model does not say."""
        most = getattr(self._config, "max_position_embeddings", None)
        return None if most is None else int(most) - (self.bos is not None)

    def encode(self, text: str) -> "NDArray[np.int64]":
        """Token ids of a text, without special tokens."""
        ids = self._tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        return np.array(ids, np.int64)

    def observe(self, sequences: "Iterable[NDArray[np.int64]]", observer: Observer) -> None:
        """Run the model over token sequences, each from position 0."""
        before = _OBSERVER.set(observer)
        try:
            with attention(self.model, ATTENTION), self._torch.no_grad():
                for ids in sequences:
                    self._body(input_ids=self._torch.from_numpy(ids)[None], use_cache=False)
        finally:
            _OBSERVER.reset(before)

    def _begins(self) -> int | None:
        """The BOS token, where the tokenizer puts it before a text."""
        ids = self._tokenizer("a", verbose=False)["input_ids"]
        bos = self._tokenizer.bos_token_id
        return bos if bos is not None and ids and ids[0] == bos else None


@contextmanager
def attention(model: Any, name: str) -> Iterator[None]:
    """Let a model attend by an implementation of this name, and then by its own again."""
    before = model.config._attn_implementation
    model.set_attn_implementation(name)
    try:
        yield
    finally:
        model.set_attn_implementation(before)


def _place(name: str, op: str) -> tuple[str, dict[str, str]]:
    """What `from_pretrained` takes for a model's name."""
    if not name.endswith(".gguf"):
        return name, {}
    require("gguf", op, GGUF_INSTALL)
    path = Path(name)
    return str(path.parent), {"gguf_file": path.name}


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the library's progress bars, which would be written over fastkv's own."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def _require_whole(op: str, name: str, missing: Iterable[str]) -> None:
    """Raise for weights that a checkpoint lacks: they would be random, with a warning."""
    absent = sorted(key for key in missing if ".layers." in f".{key}")
    if absent:
        raise ContractError(
            op,
            "--model",
            expected="a checkpoint with every weight of the layers",
            got=f"none of {', '.join(absent[:3])}{', …' * (len(absent) > 3)} in {name}",
        )


def _register(library: Any) -> None:
    """Tell transformers of the attention; a second time changes nothing."""
    from transformers.masking_utils import sdpa_mask

    library.AttentionInterface.register(ATTENTION, observed_attention)
    library.AttentionMaskInterface.register(ATTENTION, sdpa_mask)


def observed_attention(
    module: Any, query: Any, key: Any, value: Any, attention_mask: Any, **options: Any
) -> tuple[Any, None]:
    """PyTorch's attention, observed (transformers' attention interface).

    Args:
        module: the layer's attention; `module.layer_idx` is its layer.
        query: after RoPE, `[1, Hq, T, D]`.
        key: as it is cached, `[1, Hkv, T, D]`.
        value: `[1, Hkv, T, D]`.
        attention_mask: transformers' own.
        **options: `scaling`, `sliding_window` and what the model adds.

    Raises:
        UnsupportedError: attention that is not causal, or has a soft cap or sinks.
    """
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    refuse_what_is_not_computed(module, options)
    q, k, v = (x[0].transpose(0, 1).float().numpy() for x in (query, key, value))
    scale = options.get("scaling") or query.shape[-1] ** -0.5
    _OBSERVER.get().add(module.layer_idx, q, k, v, float(scale), options.get("sliding_window"))
    out, _ = ALL_ATTENTION_FUNCTIONS["sdpa"](module, query, key, value, attention_mask, **options)
    return out, None


def refuse_what_is_not_computed(module: Any, options: dict[str, Any], op: str = OP) -> None:
    """Raise `UnsupportedError` for attention that PyTorch's own, causal, is not."""
    asked = [what for name, what in _NOT_COMPUTED.items() if options.get(name) is not None]
    if not getattr(module, "is_causal", True):
        asked.append("no causal order")
    if asked:
        raise UnsupportedError(
            op,
            "--model",
            expected="causal attention without a soft cap or sinks",
            got=f"{type(module).__name__} with {', '.join(asked)}",
        )
