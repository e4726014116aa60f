# SPDX-License-Identifier: Apache-2.0
"""`fastkv serve-pair`: three real processes of the real model."""

import json
import sys
from dataclasses import replace

import numpy as np
import pytest
from typer.testing import CliRunner

from fastkv.cli import main
from fastkv.cli.app import app
from fastkv.errors import TransferError
from fastkv.eval.gguf_llama import ModelFile, find_model
from fastkv.eval.gguf_tokenizer import TextTokenizer
from fastkv.eval.serve import Session, eval_spec
from fastkv.pair import run
from fastkv.pair.job import PAGE_SIZE, Job
from fastkv.pair.run import Row, Served, serve

PROMPTS = (
    "The Caterpillar and Alice looked at each other for some time in silence: at last the",
    "The capital of France is",
)
NEW = 5


def call(*arguments):
    return CliRunner().invoke(app, ["serve-pair", *arguments])


@pytest.fixture(scope="module")
def served():
    prompts = [part for text in PROMPTS for part in ("--prompt", text)]
    done = call(*prompts, "--new", str(NEW), "--json", "-")
    assert done.exit_code == 0, done.output
    return json.loads(done.stdout)


def test_two_processes_give_the_tokens_of_one(served):
    for row in served["rows"]:
        assert row["same"]
        assert len(row["tokens"]) == NEW
        assert row["tokens"] == row["expected"]
    assert served["rows"][0]["tokens"] != served["rows"][1]["tokens"]


def test_its_tokens_are_those_of_a_session_of_its_own(served):
    """Page size and cache are others, the values of every page the same."""
    path, _ = find_model(None)
    model = ModelFile(path).llama()
    row = served["rows"][1]
    ids = TextTokenizer(ModelFile(path)).encode(PROMPTS[1], "the prompt")
    assert len(ids) == row["prompt_tokens"]
    session = Session(model, eval_spec(model, "block_wise_fp8", "bfloat16"), {}, 64)
    session.hidden(ids[:-1])
    tokens = [int(ids[-1])]
    for _ in range(NEW):
        tokens.append(int(session.logits(np.array(tokens[-1:]))[-1].argmax()))
    assert row["tokens"] == tokens[1:]


def test_whole_blocks_moved_with_their_scales(served):
    # SmolLM2: 30 layers, 3 KV heads, D 64; block_wise_fp8: a byte a value and a float32 a row.
    block = 30 * 2 * 3 * PAGE_SIZE * (64 + 4)
    for row in served["rows"]:
        assert row["blocks"] == -(-(row["prompt_tokens"] - 1) // PAGE_SIZE)
        assert row["nbytes"] == row["blocks"] * block
        assert min(row["transfer_s"], row["prefill_s"], row["decode_s"]) > 0
    blocks = str(sum(row["blocks"] for row in served["rows"]))
    for role, name in (("prefill", "blocks sent"), ("decode", "blocks published")):
        (line,) = (x for x in served["stats"][role].splitlines() if x.startswith(name))
        assert line.split()[-1] == blocks


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--format", "cache_int8"), "--scales (format cache_int8): expected a file that"),
        (("--format", "int7"), "--format"),
        (("--prompt", "a"), "--prompt: expected at least 2 tokens, got 'a'"),
        (("--engine", "pigeon"), "engine: "),
        (("--model", "no.gguf"), "no.gguf"),
        (("--json", "no/folder/x.json"), "no folder"),
    ],
)
def test_bad_calls_end_before_a_process_starts(arguments, said, monkeypatch, capsys):
    monkeypatch.setattr(run, "_WORKER", (sys.executable, "-c", "started"))
    monkeypatch.setattr(sys, "argv", ["fastkv", "serve-pair", *arguments])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 2
    error = capsys.readouterr().err
    assert said in error
    assert "process" not in error


def test_a_file_of_scales_that_is_none_is_refused(tmp_path):
    path = tmp_path / "s.safetensors"
    path.write_bytes(b"none")
    done = call("--format", "cache_int8", "--scales", str(path), "--prompt", PROMPTS[1])
    assert str(path) in str(done.exception)


def job(**changes):
    fields = Job("", "m", "none", None, ((1, 2, 3), (4, 5)), 2, "nixl", 5.0)
    return replace(fields, **changes)


WORKER = """
import json, os, sys, time
role, job = sys.argv[1], json.loads(sys.stdin.readline())
def emit(event, **more): print(json.dumps(dict(event=event, **more)), flush=True)
"""


@pytest.mark.parametrize(
    ("does", "said"),
    [
        (
            "if role == 'prefill': sys.exit('no memory')\ntime.sleep(600)",
            "the prefill process ended with 1: no memory",
        ),
        (
            "if role == 'decode': os.kill(os.getpid(), 9)\ntime.sleep(600)",
            "the decode process ended with -9",
        ),
        (
            "if role == 'decode': emit('error', text='Endpoint.connect: model differs')\n"
            "time.sleep(600)",
            "the decode process: Endpoint.connect: model differs",
        ),
        (
            "if role == 'prefill': emit('pushed', request=1, state='in doubt', reason='late')\n"
            "time.sleep(600)",
            "request 1 is in doubt: late",
        ),
    ],
)
def test_a_process_that_fails_ends_the_other_and_is_named(does, said, monkeypatch):
    monkeypatch.setattr(run, "_WORKER", (sys.executable, "-c", WORKER + does))
    with pytest.raises(TransferError, match="fastkv serve-pair: ") as raised:
        serve(job())
    assert said in str(raised.value)


def test_other_tokens_end_with_1(monkeypatch):
    row = Row(0, 5, 1, 10, 0.1, 0.1, 0.1, [3, 4], [3, 5])
    monkeypatch.setattr(run, "serve", lambda *_: Served((row,), {}))
    done = call("--prompt", PROMPTS[1])
    assert done.exit_code == 1
    assert "OTHER" in done.output
    assert not replace(row, tokens=[], expected=[]).same


def test_a_job_is_the_same_on_the_other_side():
    assert Job.decode(job().encode()) == job()
    assert [job().pages(i, whole=False) for i in (0, 1)] == [1, 1]
    assert job(new=15).pages(0, whole=True) == 2  # 2 + 15 tokens
    assert job(new=14).pages(0, whole=True) == 1
