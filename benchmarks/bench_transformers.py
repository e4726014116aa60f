# SPDX-License-Identifier: Apache-2.0
"""Time of a token, and memory held, in a Llama of transformers over each kind of cache.

    python benchmarks/bench_transformers.py --json benchmarks/results/transformers.json

From the root of a checkout (PYTHONPATH=. if fastkv is not installed). Random weights in the shape
of Llama 3 8B with a few layers. PagedCache in each format is held against DynamicCache over the
model's own attention (sdpa) and QuantizedCache with 4 bits by quanto and by hqq
(`pip install optimum-quanto hqq`). Each contender fills its cache in chunks and decodes greedily,
in rounds, so that none is always the first. A peer that is not installed is listed as an error.
"""

import argparse
import gc
import json
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from statistics import median, quantiles
from time import perf_counter
from typing import Any

import torch
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM, QuantizedCache

from fastkv.calibrate.transformers import attention
from fastkv.integrations.transformers import PagedCache, calibrate
from fastkv.quant import QUANT_SPECS
from gpu import report

LLAMA_8B = {
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "vocab_size": 128256,
}
TINY = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "vocab_size": 128,
}
CALIBRATE = 512
WARM_UP = 4
BASE = "DynamicCache sdpa"
# Of the ops that PagedCache and its attention call.
KERNELS = ("copy_pages", "gather_kv", "paged_attention", "rope_write_kv")


@dataclass(frozen=True, slots=True)
class Contender:
    """A cache and the attention that it needs."""

    name: str
    attention: str
    make: Callable[[], Any]


@dataclass(frozen=True, slots=True)
class Case:
    """One size."""

    batch: int
    context: int


def main(argv: list[str] | None = None, device: str = "cuda") -> dict[str, Any]:
    """Run from a command line; `device` is for a test without a GPU."""
    arguments = parse(argv)
    if device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("bench_transformers needs an NVIDIA GPU that PyTorch sees")
    torch.manual_seed(0)
    model = make_model(arguments, device)
    rows: list[dict[str, Any]] = []
    errors: list[str] = []
    for case in (Case(b, n) for b in arguments.batch for n in arguments.context):
        rows += run_case(arguments, model, case, errors)
        write(arguments, document(arguments, model, rows, errors))
    return document(arguments, model, rows, errors)


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--json", type=Path, help="where to write the result")
    parser.add_argument("--batch", type=numbers, default=[1, 8])
    parser.add_argument("--context", type=numbers, default=[4096, 16384])
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=64, help="decoded and timed in a round")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--chunk", type=int, default=4096, help="tokens of a forward that fills")
    parser.add_argument("--page", type=int, default=64)
    parser.add_argument("--formats", type=lambda text: text.split(","), default=list(QUANT_SPECS))
    parser.add_argument("--tiny", action="store_true", help="a tiny model in float32")
    return parser.parse_args(argv)


def numbers(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]


def make_model(arguments: argparse.Namespace, device: str) -> Any:
    shape = TINY if arguments.tiny else LLAMA_8B
    config = LlamaConfig(
        **shape,
        num_hidden_layers=arguments.layers,
        max_position_embeddings=max(arguments.context) + 1024,
        rope_parameters={"rope_type": "default", "rope_theta": 500000.0},
    )
    dtype = torch.float32 if arguments.tiny else torch.bfloat16
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            return LlamaForCausalLM(config).eval()
    finally:
        torch.set_default_dtype(before)


def contenders(arguments: argparse.Namespace, model: Any, case: Case) -> list[Contender]:
    """All kinds of caches; scales for the static formats come from random tokens."""
    config, room = model.config, case.context + WARM_UP + arguments.tokens
    with attention(model, "fastkv"):
        seen = PagedCache(page_size=arguments.page)
        forward(model, random_ids(model, 1, CALIBRATE), seen)
    found = [Contender(BASE, "sdpa", lambda: DynamicCache(config=config))]
    for name in arguments.formats:
        scales = calibrate(seen, name) if QUANT_SPECS[name].needs_static else None
        options = {"scales": scales, "page_size": arguments.page, "reserve": room}
        make = lambda name=name, options=options: PagedCache(name, **options)  # noqa: E731
        found.append(Contender(f"PagedCache {name}", "fastkv", make))
    axes = {"quanto": 0, "hqq": 1}
    for backend, axis in axes.items():
        options = {"nbits": 4, "axis_key": axis, "axis_value": axis}
        make = lambda backend=backend, options=options: QuantizedCache(backend, config, **options)  # noqa: E731
        found.append(Contender(f"QuantizedCache {backend} 4 bit", "sdpa", make))
    return found


def run_case(
    arguments: argparse.Namespace, model: Any, case: Case, errors: list[str]
) -> list[dict[str, Any]]:
    """One row a contender."""
    everyone = contenders(arguments, model, case)
    times: dict[str, list[float]] = {}
    held: dict[str, int] = {}
    for turn in range(arguments.rounds):
        for contender in everyone[turn:] + everyone[:turn]:
            try:
                seconds, size = one_round(arguments, model, case, contender)
            except Exception as error:  # a peer that is missing or fails is told, and costs no row
                text = f"{contender.name} {case.batch}x{case.context}: {type(error).__name__}"
                text = f"{text}: {' '.join(str(error).split())[:300]}"
                if text not in errors:
                    errors.append(text)
                    print(f"  FAILED {text}", flush=True)
                continue
            times.setdefault(contender.name, []).extend(seconds)
            held[contender.name] = size
    base = median(times[BASE]) if BASE in times else None
    return [row(case, name, samples, held[name], base) for name, samples in times.items()]


def row(
    case: Case, name: str, samples: list[float], held: int, base: float | None
) -> dict[str, Any]:
    ms = 1e3 * median(samples)
    low, _, high = (1e3 * x for x in quantiles(samples, n=4))
    found = {
        "cache": name,
        **asdict(case),
        "ms_per_step": ms,
        "iqr_ms": high - low,
        "tokens_per_s": case.batch / ms * 1e3,
        "held_bytes": held,
        "times_dynamic": None if base is None else base / ms * 1e3,
    }
    print(
        f"{name:<28}{case.batch}x{case.context:<8}{ms:>9.3f} ms ±{high - low:<8.3f}"
        f"{held / 2**20:>10.1f} MiB",
        flush=True,
    )
    return found


@torch.no_grad()
def one_round(
    arguments: argparse.Namespace, model: Any, case: Case, contender: Contender
) -> tuple[list[float], int]:
    """Seconds of each decoded step, and bytes that the full cache holds."""
    ids = random_ids(model, case.batch, case.context)
    before = memory(model.device)
    cache = contender.make()
    with attention(model, contender.attention):
        for part in ids.split(arguments.chunk, dim=1):
            token = forward(model, part, cache)
        seconds = []
        for _ in range(WARM_UP + arguments.tokens):
            synchronize(model.device)
            start = perf_counter()
            token = forward(model, token, cache)
            synchronize(model.device)
            seconds.append(perf_counter() - start)
    return seconds[WARM_UP:], memory(model.device) - before


def forward(model: Any, ids: torch.Tensor, cache: Any) -> torch.Tensor:
    """The next token of each request, `[B, 1]`."""
    with torch.no_grad():
        out = model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
    return out.logits.argmax(-1)


def random_ids(model: Any, batch: int, length: int) -> torch.Tensor:
    return torch.randint(model.config.vocab_size, (batch, length), device=model.device)


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def memory(device: torch.device) -> int:
    """Bytes of live tensors: the allocator's count, and on the CPU the garbage collector's."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize()
        return torch.cuda.memory_allocated()
    tensors = [x for x in gc.get_objects() if type(x) in (torch.Tensor, torch.nn.Parameter)]
    storages = {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in tensors}
    return sum(storages.values())


def document(
    arguments: argparse.Namespace, model: Any, rows: list[dict[str, Any]], errors: list[str]
) -> dict[str, Any]:
    return {
        "benchmark": "bench_transformers",
        "command": " ".join(["python", "benchmarks/bench_transformers.py", *sys.argv[1:]]),
        "commit": report.commit(),
        "device": report.device_name(model.device),
        **report.about_sources(KERNELS),
        "versions": report.versions() | peer_versions(),
        "model": {**(TINY if arguments.tiny else LLAMA_8B), "layers": arguments.layers},
        "dtype": str(model.dtype).removeprefix("torch."),
        "page_size": arguments.page,
        "rows": rows,
        "errors": errors,
    }


def peer_versions() -> dict[str, str]:
    found = {}
    for package in ("transformers", "optimum-quanto", "hqq"):
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = "not installed"
    return found


def write(arguments: argparse.Namespace, found: dict[str, Any]) -> None:
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
