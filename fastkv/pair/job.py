# SPDX-License-Identifier: Apache-2.0
"""What every process of the example is told, and the model over its pages."""

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from fastkv.errors import MissingTensorError
from fastkv.eval.gguf_llama import Llama, ModelFile
from fastkv.eval.serve import Pages, Session
from fastkv.quant import quant_spec
from fastkv.scales import load_scales
from fastkv.spec import CacheSpec
from fastkv.transfer import Fingerprint

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from fastkv.scales import StaticScales

OP = "fastkv serve-pair"
PAGE_SIZE = 16
_CHUNK = 256  # tokens that a prefill computes at a time


@dataclass(frozen=True)
class Job:
    """The requests, and how they are served; the same for each process.

    Attributes:
        model: the GGUF file.
        name: what the fingerprint calls the model.
        quant: the cache format.
        scales: a file of static scales, for a format that has them.
        prompts: token ids of each request.
        new: tokens that each request is continued by.
        engine: what moves the blocks.
        seconds: how long one request's blocks may take to arrive.
    """

    model: str
    name: str
    quant: str
    scales: str | None
    prompts: tuple[tuple[int, ...], ...]
    new: int
    engine: str
    seconds: float

    def encode(self) -> str:
        """As one line of JSON."""
        return json.dumps(asdict(self))

    @classmethod
    def decode(cls, text: str) -> "Job":
        """From `encode`."""
        found = json.loads(text)
        return cls(**{**found, "prompts": tuple(map(tuple, found["prompts"]))})

    def prefilled(self, request: int) -> int:
        """Tokens of a prompt that the prefill computes: the last one is decode's first step."""
        return len(self.prompts[request]) - 1

    def pages(self, request: int, *, whole: bool) -> int:
        """Pages of one request: after its prefill, or of the whole of it."""
        tokens = self.prefilled(request) + (self.new if whole else 0)
        return -(-tokens // PAGE_SIZE)


class Server:
    """The model over one cache that all requests of a process share.

    Args:
        job: what to serve.
        whole: the cache has room for the new tokens too, not for the prompts alone.

    Raises:
        MissingTensorError: a format with static scales and no file of them.
    """

    def __init__(self, job: Job, *, whole: bool) -> None:
        self.job = job
        self.model: Llama = ModelFile(Path(job.model)).llama()
        self.spec = cache_spec(self.model, job.quant)
        self.scales = read_scales(job, self.spec)
        self.num_pages = sum(job.pages(i, whole=whole) for i in range(len(job.prompts)))
        self.caches: list[Any] = self.spec.allocate(self.num_pages)

    def fingerprint(self) -> Fingerprint:
        """What a peer must agree on."""
        return Fingerprint.of(self.spec, model=self.job.name, scales=self.scales)

    def prefill(self, request: int, pages: "NDArray[Any]") -> None:
        """Fill a request's pages from its prompt."""
        ids = np.array(self.job.prompts[request][:-1], np.int64)
        session = self._session(request, pages, cached=0)
        for start in range(0, len(ids), _CHUNK):
            session.hidden(ids[start : start + _CHUNK])

    def decode(self, request: int, pages: "NDArray[Any]") -> Iterator[int]:
        """Continue a request whose pages are filled, greedily, a token at a time."""
        session = self._session(request, pages, cached=self.job.prefilled(request))
        token = self.job.prompts[request][-1]
        for _ in range(self.job.new):
            token = int(session.logits(np.array([token], np.int64))[-1].argmax())
            yield token

    def _session(self, request: int, pages: "NDArray[Any]", *, cached: int) -> Session:
        capacity = len(self.job.prompts[request]) + self.job.new
        held = Pages(self.caches, pages.astype(np.int32), cached)
        return Session(self.model, self.spec, self.scales, capacity, pages=held)


def cache_spec(model: Llama, quant: str) -> CacheSpec:
    """The cache that every process of the example has."""
    shape = model.num_layers, model.num_kv_heads, model.head_dim
    return CacheSpec(*shape, PAGE_SIZE, quant, "bfloat16")


def require_scales(job: Job) -> None:
    """Raise where the format has static scales and the job names no file of them."""
    quant = quant_spec(job.quant)
    if quant.needs_static and job.scales is None:
        raise MissingTensorError(
            OP,
            "--scales",
            format=quant.name.value,
            expected="a file that `fastkv calibrate` wrote",
            got="None",
        )


def read_scales(job: Job, spec: CacheSpec) -> "dict[int, StaticScales]":
    """The static scales that the format needs; no others are read."""
    require_scales(job)
    if job.scales is None or not quant_spec(job.quant).needs_static:
        return {}
    return load_scales(job.scales, spec)
