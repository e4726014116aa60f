# SPDX-License-Identifier: Apache-2.0
"""Warming up: what is called for which spec, and every way in which it cannot be."""

import json
import sys

import pytest

import fastkv
from fastkv import CacheSpec, ops, warming
from fastkv.backends import Device
from fastkv.cli import main
from fastkv.errors import (
    ContractError,
    MissingDependencyError,
    PlacementError,
    SelectionError,
)
from fastkv.quant import QUANT_SPECS
from helpers.calls import OPS

PAGED = ("rope_write_kv", "paged_attention", "gather_kv", "copy_pages")


@pytest.fixture
def on_the_cpu(monkeypatch):
    """A "GPU" whose tensors are NumPy's, so that the reference runs the tiny batches."""
    monkeypatch.setattr(warming, "_require_gpu", lambda _: Device("cuda", 90))
    monkeypatch.setattr(warming, "_library", lambda _: "numpy")
    monkeypatch.setattr(warming, "_synchronize", lambda _: None)
    return {"device": "cpu"}


@pytest.fixture
def called(mocker):
    """Spies on the ops."""
    return {op: mocker.spy(ops, op) for op in OPS}


def spec_of(*formats, dtype="bfloat16", **changes):
    shape = {"num_kv_heads": 2, "head_dim": 64, "page_size": 16} | changes
    return CacheSpec(len(formats), quant=list(formats), dtype=dtype, **shape)


@pytest.mark.parametrize("fmt", QUANT_SPECS)
def test_every_op_is_called_for_a_format(fmt, on_the_cpu, called):
    rows = fastkv.warmup(spec_of(fmt), num_query_heads=6, **on_the_cpu)
    assert [(row.op, row.format) for row in rows] == [
        *[(op, fmt) for op in PAGED],
        ("masked_attention", None),
        ("merge_states", None),
    ]
    assert all(row.seconds >= 0 and row.kernels == 0 for row in rows)
    (contiguous,) = called["masked_attention"].call_args_list
    assert [x.shape for x in contiguous.args] == [(1, 6, 64), (1, 2, 64), (1, 2, 64)]
    assert {x.dtype.name for x in contiguous.args} == {"bfloat16"}
    write = called["rope_write_kv"].call_args
    assert write.args[0].shape == (1, (6 + 2 * 2) * 64)
    assert write.args[0].dtype.name == "bfloat16"
    assert write.kwargs["rope"].cos.shape == (1, 32)
    assert write.kwargs["q_norm_weight"] is None
    assert write.kwargs["out_k"].shape == (1, 2, 64)
    assert write.kwargs["out_v"].dtype.name == "bfloat16"
    attended = [call.args[0].shape for call in called["paged_attention"].call_args_list]
    assert attended == [(rows, 6, 64) for rows in (1, 2, 4, 8, 64)]


def test_each_format_is_warmed_up_once(on_the_cpu, called):
    spec = spec_of("cache_int8", "none", "cache_int8", "none")
    rows = fastkv.warmup(spec, num_query_heads=2, **on_the_cpu)
    formats = [row.format for row in rows]
    assert formats == ["cache_int8"] * 4 + ["none"] * 4 + [None] * 2
    writes = called["rope_write_kv"].call_args_list
    assert ["out_k" in write.kwargs for write in writes] == [False, True] * 2


def test_what_layers_have_reaches_the_op(on_the_cpu, called):
    options = {"rotary_dim": 20, "interleaved": True, "qk_norm": True, "norm_after_rope": True}
    fastkv.warmup(
        spec_of("cache_int8"),
        num_query_heads=2,
        dtype="fp16",
        granularity="channel",
        static_dtype="bf16",
        **options,
        **on_the_cpu,
    )
    write = called["rope_write_kv"].call_args
    assert write.kwargs["rope"].cos.shape == (1, 10)
    assert write.kwargs["rope"].interleaved is True
    assert write.kwargs["norm_after_rope"] is True
    weights = [write.kwargs[f"{x}_norm_weight"] for x in "qk"]
    assert {(w.shape, w.dtype.name) for w in weights} == {((64,), "float16")}
    static = write.args[1].static
    assert (static.k_quant.shape, static.k_quant.dtype.name) == ((2, 64), "bfloat16")
    fastkv.warmup(spec_of("none"), num_query_heads=2, rotary_dim=0, **on_the_cpu)
    assert called["rope_write_kv"].call_args.kwargs["rope"] is None


def test_a_granularity_that_one_format_has_not_leaves_it_its_own(on_the_cpu, called):
    spec = spec_of("cache_fp8", "cache_int8")
    fastkv.warmup(spec, num_query_heads=2, granularity="channel", **on_the_cpu)
    shapes = [c.args[1].static.k_quant.shape for c in called["rope_write_kv"].call_args_list]
    assert shapes == [(2,)] * 2 + [(2, 64)] * 2


def test_progress_names_what_comes_next(on_the_cpu):
    seen = []
    fastkv.warmup(
        spec_of("none"), num_query_heads=2, progress=lambda *said: seen.append(said), **on_the_cpu
    )
    assert seen == [
        *[(i, 6, f"{op} none") for i, op in enumerate(PAGED)],
        (4, 6, "masked_attention"),
        (5, 6, "merge_states"),
        (6, 6, ""),
    ]


@pytest.mark.parametrize(
    ("changes", "argument"),
    [
        ({"dtype": "float32"}, "dtype"),
        ({"dtype": "int8"}, "dtype"),
        ({"static_dtype": "fp8"}, "static_dtype"),
        ({"granularity": "token"}, "granularity"),
        ({"rotary_dim": 66}, "rotary_dim"),
        ({"rotary_dim": 7}, "rotary_dim"),
        ({"rotary_dim": -2}, "rotary_dim"),
        ({"num_query_heads": 3}, "num_query_heads"),
    ],
)
def test_arguments_that_cannot_be(changes, argument, on_the_cpu, called):
    with pytest.raises(ContractError) as caught:
        fastkv.warmup(spec_of("none"), **({"num_query_heads": 2} | changes), **on_the_cpu)
    assert caught.value.argument == argument
    assert sum(spy.call_count for spy in called.values()) == 0


def test_what_the_kernels_do_not_serve_is_refused_before_a_tensor_is_made(on_the_cpu, called):
    for spec, heads, reason in (
        (spec_of("none", dtype="float32"), 2, "no float32 cache"),
        (spec_of("none", head_dim=80), 2, "head dim 80 is none of"),
        (spec_of("none"), 34, "17 query heads a KV head"),
    ):
        with pytest.raises(SelectionError, match=reason):
            fastkv.warmup(spec, num_query_heads=heads, **on_the_cpu)
    assert sum(spy.call_count for spy in called.values()) == 0


# --- machines that cannot ---------------------------------------------------------------------


class Runtime:
    """CuPy, as far as it is asked for devices."""

    def __init__(self, count):
        self.count, self.cuda, self.runtime = count, self, self

    def getDeviceCount(self):  # noqa: N802 - CuPy's name
        if isinstance(self.count, Exception):
            raise self.count
        return self.count


@pytest.fixture
def machine(monkeypatch):
    """Sets what CuPy sees; None: it is not installed."""

    def set_to(count):
        monkeypatch.setitem(sys.modules, "cupy", None if count is None else Runtime(count))
        monkeypatch.setitem(sys.modules, "cuda", Runtime(0))
        monkeypatch.setitem(sys.modules, "cuda.bindings", Runtime(0))

    return set_to


@pytest.mark.parametrize(
    ("count", "device", "got"),
    [
        (0, "cuda:0", "0 GPU(s)"),
        (1, "cuda:1", "1 GPU(s)"),
        (RuntimeError("no driver"), "cuda:0", "RuntimeError: no driver"),
    ],
)
def test_no_such_gpu(machine, count, device, got):
    machine(count)
    with pytest.raises(PlacementError) as caught:
        fastkv.warmup(spec_of("none"), num_query_heads=2, device=device)
    assert (caught.value.op, caught.value.argument, caught.value.got) == ("warmup", "device", got)
    assert device in caught.value.expected


def test_a_device_that_is_no_gpu():
    with pytest.raises(PlacementError, match="cuda:N"):
        fastkv.warmup(spec_of("none"), num_query_heads=2, device="cpu")


@pytest.fixture
def without_torch(monkeypatch):
    monkeypatch.setattr(warming, "_torch_sees_gpus", lambda: False)
    monkeypatch.setattr(warming, "_require_gpu", lambda _: Device("cuda", 90))


@pytest.mark.usefixtures("without_torch")
@pytest.mark.parametrize(
    ("dtype", "options"),
    [
        ("bfloat16", {"dtype": "float16"}),
        ("float16", {"dtype": "bfloat16"}),
        ("float16", {"dtype": "float16", "static_dtype": "bfloat16"}),
    ],
)
def test_bfloat16_without_torch_says_so_by_name(dtype, options):
    with pytest.raises(MissingDependencyError, match=r"bfloat16 .*torch.*fastkv\[torch\]"):
        fastkv.warmup(spec_of("none", dtype=dtype), num_query_heads=2, **options)


@pytest.mark.usefixtures("without_torch")
def test_float16_needs_no_torch(mocker):
    run = mocker.patch.object(warming, "_run", return_value=[])
    spec = spec_of("none", "cache_int4_zp", "block_wise_fp8", dtype="float16")
    assert fastkv.warmup(spec, num_query_heads=2, dtype="float16") == []
    assert run.call_args.args[0].library == "cupy"


# --- the command ------------------------------------------------------------------------------


@pytest.fixture
def command(monkeypatch, capsys):
    """Exit code and output of `fastkv warmup`."""

    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["fastkv", "warmup", *arguments])
        with pytest.raises(SystemExit) as exit_:
            main()
        return exit_.value.code, capsys.readouterr()

    return call


SHAPE = ("--kv-heads", "2", "--query-heads", "6", "--head-dim", "64", "--page-size", "16")


def test_the_command_shows_every_op_and_its_seconds(command, on_the_cpu):
    code, printed = command(*SHAPE, "--quant", "cache_int8", "--device", "cpu")
    assert code == 0
    for op in (*PAGED, "merge_states"):
        assert op in printed.out
    assert "0 kernels in" in printed.out


def test_the_command_writes_json_alone(command, on_the_cpu):
    formats = ("--quant", "none", "--quant", "block_wise_fp8")
    code, printed = command(*SHAPE, *formats, "--device", "cpu", "--json", "-")
    assert code == 0
    rows = json.loads(printed.out)["rows"]
    assert {row["format"] for row in rows} == {"none", "block_wise_fp8", None}
    assert all(set(row) == {"op", "format", "kernels", "seconds"} for row in rows)


def test_the_command_warms_up_every_format_unless_told(command, on_the_cpu):
    code, printed = command(*SHAPE, "--device", "cpu", "--json", "-")
    assert code == 0
    assert {row["format"] for row in json.loads(printed.out)["rows"]} == {*QUANT_SPECS, None}


def test_the_command_exits_with_2_where_there_is_no_gpu(command, machine):
    machine(0)
    code, printed = command(*SHAPE)
    assert code == 2
    assert printed.out == ""
    assert "expected cuda:0, an NVIDIA GPU that CuPy sees, got 0 GPU(s)" in printed.err


def test_the_command_exits_with_2_where_a_package_is_missing(command, machine):
    machine(None)
    code, printed = command(*SHAPE)
    assert code == 2
    assert "Warming up kernels needs cupy, which is not installed" in printed.err


def test_the_command_exits_with_1_where_nothing_serves_it(command, on_the_cpu):
    code, printed = command(*SHAPE, "--dtype", "float32", "--device", "cpu")
    assert code == 1
    assert "no float32 cache" in printed.err


@pytest.mark.parametrize(
    "wrong",
    [("--quant", "cache_int9"), ("--q-dtype", "float32"), ("--granularity", "token")],
    ids=lambda wrong: wrong[0],
)
def test_the_command_exits_with_2_on_a_wrong_name(command, on_the_cpu, wrong):
    code, printed = command(*SHAPE, "--device", "cpu", *wrong)
    assert code == 2
    assert printed.out == ""
