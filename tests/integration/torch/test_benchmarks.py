# SPDX-License-Identifier: Apache-2.0
"""The GPU benchmarks' own code, with the reference's ops and a clock that does not tick.

What only a GPU shows (graphs, peers, times) is not here.
"""

import importlib
import json
import re
import sys
from pathlib import Path

import pytest
import torch

import fastkv
from fastkv.ops.cuda import jit
from fastkv.quant import QUANT_SPECS

BENCHMARKS = Path(__file__).resolve().parents[3] / "benchmarks"
LABELS = [
    f"{row.name.value}{suffix}"
    for row in QUANT_SPECS.values()
    for suffix in ("", *(f"/{g.value}" for g in row.granularities[1:]))
]
KEYS = {"op", "format", "shape", "us", "bytes", "TBps", "peer", "peer_us", "ratio"}


@pytest.fixture
def module(monkeypatch):
    """Import a benchmark as `python benchmarks/<name>.py` finds it, and forget it afterwards."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    before = set(sys.modules)
    yield importlib.import_module
    for name in set(sys.modules) - before:
        if name.partition(".")[0] == "gpu" or name.startswith("bench_"):
            del sys.modules[name]


@pytest.fixture
def clock(module):
    """Calls everything once. The n-th contender takes n microseconds."""
    timing = module("gpu.timing")

    class Clock:
        def measure(self, contenders):
            found = {}
            for n, (name, calls) in enumerate(contenders.items(), 1):
                for call in calls:
                    call()
                found[name] = timing.Timing(float(n), 0.0, "graph")
            return found

        def host_cost(self, call, calls):
            call()
            return timing.Timing(float(calls), 0.0, "eager")

    return Clock()


def decode_cases(bench):
    small = {"heads": (4, 2), "dim": 64}
    return [
        bench.Case(2, 128, **small, anchor=True),
        bench.Case(2, 128, **small, queries=3, anchor=True),
        bench.Case(2, 128, **small, window=32),
    ]


def run(module, clock, name, tmp_path, *arguments):
    bench = module(name)
    path = tmp_path / "result.json"
    cases = {
        "bench_decode": decode_cases,
        "bench_write": lambda bench: [bench.Case(2, 64, (4, 2), 64)],
        "bench_gather": lambda bench: [bench.Case(128, 2, 64)],
    }[name](bench)
    bench.main(["--json", str(path), *arguments], clock, "cpu", cases)
    return json.loads(path.read_text("utf-8"))


@pytest.mark.parametrize("name", ["bench_decode", "bench_write", "bench_gather"])
def test_every_format_has_a_row_at_both_page_sizes(module, clock, name, tmp_path):
    document = run(module, clock, name, tmp_path, "--no-peers")
    assert document["errors"] == []
    assert {row["format"] for row in document["rows"]} == set(LABELS)
    shapes = {row["shape"] for row in document["rows"]}
    assert len(document["rows"]) == len(LABELS) * len(shapes)
    for row in document["rows"]:
        assert set(row) >= KEYS
        assert row["TBps"] == pytest.approx(row["bytes"] / row["us"] / 1e6)
        assert (row["peer"], row["peer_us"], row["ratio"]) == (None, None, None)
    assert {shape.partition(" P")[2].split()[0] for shape in shapes} == {"16", "64"}
    assert set(document) >= {"device", "versions", "ceilings", "digest", "commit", "command"}
    (op,) = {row["op"] for row in document["rows"]}
    assert document["digests"] == {op: jit.source_digest(op)}


def test_a_loaded_kernel_that_was_not_named_is_recorded(module, clock, monkeypatch, tmp_path):
    loaded = {(jit.Specialization.of("merge_states", head_dim=64), 0): object()}
    monkeypatch.setattr(jit, "_compiled", loaded)
    document = run(module, clock, "bench_gather", tmp_path, "--no-peers", "--formats", "none")
    assert document["digests"] == jit.source_digests(["gather_kv", "merge_states"])


def test_shapes_are_spelled_as_the_documentation_spells_them(module, clock, tmp_path):
    document = run(module, clock, "bench_decode", tmp_path, "--no-peers", "--formats", "none")
    shapes = list(dict.fromkeys(row["shape"] for row in document["rows"]))
    assert shapes[:4] == [
        "2x128 Hq4 Hkv2 D64 P16",
        "2x128 Hq4 Hkv2 D64 P64",
        "2x3 over 128 Hq4 Hkv2 D64 P16",
        "2x3 over 128 Hq4 Hkv2 D64 P64",
    ]
    assert shapes[4].endswith(" W32")


def test_bytes_of_decode_are_those_of_the_keys_that_are_read(module, clock, tmp_path):
    rows = run(module, clock, "bench_decode", tmp_path, "--no-peers")["rows"]
    size = {(row["format"], row["shape"]): row["bytes"] for row in rows}
    whole, window = "2x128 Hq4 Hkv2 D64 P16", "2x128 Hq4 Hkv2 D64 P16 W32"
    elements = 2 * 2 * 128 * 2 * 64  # K and V, requests, keys, heads, D
    assert size["none", whole] == 2 * elements
    assert size["cache_int8", whole] == size["cache_fp8", whole] == elements
    assert size["cache_int4_zp", whole] == elements // 2
    assert size["block_wise_fp8", whole] == elements + 4 * elements // 64
    assert size["none", window] == 2 * elements // 4


def test_quick_leaves_the_extra_rows_and_page_64_out(module, clock, tmp_path):
    document = run(module, clock, "bench_decode", tmp_path, "--no-peers", "--quick")
    assert {row["shape"] for row in document["rows"]} == {
        "2x128 Hq4 Hkv2 D64 P16",
        "2x3 over 128 Hq4 Hkv2 D64 P16",
    }


def test_rows_and_formats_select(module, clock, tmp_path):
    wanted = ("--rows", "over 128.*P64$", "--formats", "cache_int4_zp,cache_int8/channel")
    rows = run(module, clock, "bench_decode", tmp_path, "--no-peers", *wanted)["rows"]
    assert [(row["format"], row["shape"]) for row in rows] == [
        ("cache_int4_zp", "2x3 over 128 Hq4 Hkv2 D64 P64"),
        ("cache_int8/channel", "2x3 over 128 Hq4 Hkv2 D64 P64"),
    ]


def test_an_unknown_format_is_refused(module, capsys):
    with pytest.raises(SystemExit):
        module("bench_decode").parse(["--formats", "fp7"])
    assert "unknown ['fp7']; there are none, " in capsys.readouterr().err


def test_peers_that_are_missing_leave_the_rows_alone(module, clock, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "flashinfer", None)
    document = run(module, clock, "bench_decode", tmp_path, "--formats", "none,cache_int8")
    assert len(document["rows"]) == 2 * 6
    assert all("flashinfer" in error for error in document["errors"])
    assert len(document["errors"]) == 2 * (2 + 2 + 3 + 3) - 2


class Attention:
    """A peer that is fastkv itself, over the same pool, in the peer's shape of a call."""

    def __init__(self, peers, ops):
        self.peers, self.ops = peers, ops

    def __call__(self, pool, batch, q):
        scale = pool.format.multipliers[1]

        def make():
            layers = [pool.layer(batch.page, i) for i in range(pool.sets)]
            calls = [
                lambda layer=layer: self.ops.paged_attention(q, layer, **batch.meta) / scale
                for layer in layers
            ]
            return self.peers.Peer(calls, scale)

        yield "Twin", make


def test_rows_are_held_against_the_best_peer_of_any_page(module, clock, tmp_path, monkeypatch):
    from fastkv import ops

    peers = module("gpu.peers")
    monkeypatch.setattr(peers, "decode_peers", Attention(peers, ops))
    document = run(module, clock, "bench_decode", tmp_path)
    assert document["errors"] == []
    # Contenders in order: fastkv P16 1 us, Twin P16 2 us, fastkv P64 3 us, Twin P64 4 us.
    for row in document["rows"]:
        if row["shape"].endswith("W32"):
            assert row["peer"] is None
        else:
            assert (row["peer"], row["peer_us"]) == ("Twin P16", 2.0)
            assert row["ratio"] == pytest.approx(2 / row["us"])
            assert row["peers"] == {"Twin P16": 2.0, "Twin P64": 4.0}


def test_eight_bit_peers_are_timed_for_formats_that_no_peer_has(
    module, clock, tmp_path, monkeypatch
):
    from fastkv import ops

    peers = module("gpu.peers")
    monkeypatch.setattr(peers, "decode_peers", Attention(peers, ops))
    rows = run(module, clock, "bench_decode", tmp_path, "--formats", "cache_int4_zp")["rows"]
    assert {row["peer"] for row in rows} == {"Twin P16", None}


def test_a_peer_that_computes_something_else_is_told(module, clock, tmp_path, monkeypatch):
    from fastkv import ops

    peers = module("gpu.peers")
    attention = Attention(peers, ops)

    def off(pool, batch, q):
        for name, make in attention(pool, batch, q):
            peer = make()
            calls = [lambda call=call: call() * 1.5 for call in peer.calls]
            yield name, lambda calls=calls, peer=peer: peers.Peer(calls, peer.output_scale)

    monkeypatch.setattr(peers, "decode_peers", off)
    document = run(module, clock, "bench_decode", tmp_path, "--formats", "none")
    assert len(document["errors"]) == 4
    assert all(
        re.search("differs from fastkv by 0.50?1? of the norm", error)
        for error in document["errors"]
    )


def test_peers_of_an_earlier_run_are_taken_over(module, clock, tmp_path):
    earlier = tmp_path / "earlier.json"
    rows = run(module, clock, "bench_decode", tmp_path, "--no-peers")["rows"]
    earlier.write_text(json.dumps({"rows": [{**rows[0], "peers": {"A": 7.0, "B": 5.0}}]}))
    again = run(module, clock, "bench_decode", tmp_path, "--peer-figures", str(earlier))
    assert [row["peer"] for row in again["rows"]].count("B") == 1
    assert again["rows"][0]["ratio"] == 5.0 / again["rows"][0]["us"]
    assert again["peer_figures"] == "earlier.json"


def test_gather_agrees_with_the_formula_in_torch(module, clock, tmp_path):
    document = run(module, clock, "bench_gather", tmp_path)
    assert document["errors"] == []
    assert {row["peer"] for row in document["rows"]} == {"torch.compile P16"}


def test_write_counts_what_it_must_move_and_picks_its_peer(module):
    bench = module("bench_write")
    case = bench.Case(1, 8192)
    formats = module("gpu.data").FORMATS
    per_token = {label: case.bytes_moved(formats[label]) / 8192 for label in formats}
    assert per_token["none"] == 2 * 128 * (48 + 32) + 4096
    assert per_token["cache_fp8"] == 2 * 128 * (48 + 32) + 2048
    figures = {f"{name} P16": 1.0 for name in (bench.FUSED, bench.WITH_INDEX, "append")}
    assert list(bench.governing(case, figures)) == ["rope_quantize_fp8_append P16"]
    small = bench.governing(bench.Case(1, 128), figures)
    assert list(small) == ["rope_quantize_fp8_append + index P16"]


def test_host_has_every_op(module, clock, tmp_path):
    bench = module("bench_host")
    path = tmp_path / "host.json"
    bench.main(["--no-peers", "--quick", "--json", str(path)], clock, "cpu")
    document = json.loads(path.read_text("utf-8"))
    assert document["errors"] == []
    from fastkv import ops

    every = set(ops.__all__) - {"zeros_beside", "check_step"}
    assert {row["op"] for row in document["rows"]} == every
    assert document["digests"] == jit.source_digests(every)


class Processes:
    """In place of new processes: the n-th to be measured takes n, then 0.1 seconds."""

    def __init__(self, binaries=("paged.cubin",), functions=1):
        self.binaries, self.functions = binaries, functions
        self.started, self.measured = [], 0

    def __call__(self, command, environment, count):
        cache = Path(environment["CUPY_CACHE_DIR"])
        (op, fmt, device), full = command[-3:], cache.exists()
        self.started.append((op, fmt, device, count, full))
        if not full:
            cache.mkdir()
            for name in self.binaries:
                (cache / name).write_bytes(b"")
        return [self.sample() for _ in range(count)]

    def sample(self):
        self.measured += 1
        return {"first_us": self.measured * 1e6, "second_us": 1e5, "functions": self.functions}


def startup(module, tmp_path, runner, *arguments):
    path = tmp_path / "startup.json"
    module("bench_startup").main(["--json", str(path), *arguments], runner, "cpu")
    return json.loads(path.read_text("utf-8"))


def test_startup_is_cold_once_and_then_from_the_cache_that_this_left(module, tmp_path):
    processes = Processes()
    document = startup(module, tmp_path, processes, "--quick")
    cases = [(op, fmt) for fmt in LABELS[:2] for op in ("paged_attention", "rope_write_kv")]
    ahead = [("paged_attention", "none", "cpu", 1, False), ("import cupy", "none", "cpu", 3, True)]
    assert processes.started[:2] == ahead
    assert processes.started[2:] == [
        (*case, "cpu", count, full) for case in cases for count, full in ((1, False), (3, True))
    ]
    rows = document["rows"]
    assert [(row["op"], row["format"], row["shape"]) for row in rows] == [
        (*case, shape) for case in cases for shape in ("cold", "disk")
    ]
    # Processes 1 to 4 come ahead; the import's are 2, 3 and 4.
    assert [row["us"] / 1e6 for row in rows] == [5, 7, 9, 11, 13, 15, 17, 19]
    assert rows[1]["samples_us"] == [6e6, 7e6, 8e6]
    assert [rows[n]["iqr_us"] for n in (0, 1)] == [0, 2e6]
    for row in rows:
        assert set(row) >= KEYS
        assert (row["second_us"], row["functions"], row["import_us"]) == (1e5, 1, 3e6)
    assert document["errors"] == []
    assert set(document) >= {"device", "versions", "digest", "commit", "command"}
    assert document["digests"] == jit.source_digests(["paged_attention", "rope_write_kv"])


def test_startup_has_every_op_with_a_kernel_and_every_format(module, tmp_path):
    from fastkv.ops.cuda import listing

    document = startup(module, tmp_path, Processes())
    assert document["digests"] == jit.source_digests()
    cases = [(row["op"], row["format"]) for row in document["rows"][::2]]
    assert [op for op, fmt in cases if fmt == "none"] == listing.launchers()
    assert [fmt for op, fmt in cases if op == "gather_kv"] == LABELS
    assert [fmt for op, fmt in cases if op == "merge_states"] == ["none"]
    assert len(cases) == (len(listing.launchers()) - 1) * len(LABELS) + 1


def test_startup_rows_and_formats_select(module, tmp_path):
    wanted = ("--quick", "--rows", "disk", "--formats", "cache_fp8")
    rows = startup(module, tmp_path, Processes(), *wanted)["rows"]
    assert {(row["format"], row["shape"]) for row in rows} == {("cache_fp8", "disk")}


def test_startup_tells_a_cold_call_that_left_no_binary(module, tmp_path):
    document = startup(module, tmp_path, Processes(binaries=()), "--quick")
    assert document["rows"] == []
    assert len(document["errors"]) == 4
    assert document["errors"][0] == (
        "paged_attention none cold: RuntimeError: no binary was left in the cache"
    )


def test_startup_tells_a_call_that_compiled_although_the_cache_is_full(module, tmp_path):
    class Anew(Processes):
        def __call__(self, command, environment, count):
            said = super().__call__(command, environment, count)
            if count > 1:
                (Path(environment["CUPY_CACHE_DIR"]) / "again.cubin").write_bytes(b"")
            return said

    document = startup(module, tmp_path, Anew(), "--quick")
    assert {row["shape"] for row in document["rows"]} == {"cold"}
    assert document["errors"][0] == (
        "paged_attention none disk: RuntimeError: compiled anew: 1 binaries more in the cache"
    )


def test_startup_goes_on_after_a_process_that_fails(module, tmp_path):
    class Failing(Processes):
        def __call__(self, command, environment, count):
            if command[-3] in ("rope_write_kv", "import cupy"):
                raise RuntimeError("exit code 1")
            return super().__call__(command, environment, count)

    document = startup(module, tmp_path, Failing(), "--quick")
    assert [row["op"] for row in document["rows"]] == ["paged_attention"] * 4
    assert [row["import_us"] for row in document["rows"]] == [None] * 4
    assert [error.split(": ")[0] for error in document["errors"]] == [
        "import cupy",
        "rope_write_kv none cold",
        "rope_write_kv cache_int8 cold",
    ]


def test_startup_measures_in_new_processes(module, tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(Path(fastkv.__file__).parents[1]))
    bench = module("bench_startup")
    fmt, device = module("gpu.data").FORMATS["none"], torch.device("cpu")
    go = (bench.run, device, "merge_states", fmt, tmp_path, 2)
    said = bench.samples(*go)
    assert len(said) == 2
    for sample in said:
        assert set(sample) == {"first_us", "second_us", "functions"}
        assert 0 < sample["second_us"] < sample["first_us"] < 60e6
        assert sample["functions"] == 0


# The n-th of these processes is ready after 0.4 n seconds, and notes what it does.
WAITS = """
import sys, pathlib, time
folder = pathlib.Path(sys.argv[1])

def note(what):
    with (folder / "log").open("a") as log:
        log.write(what + " ")

for n in range(3):
    try:
        (folder / str(n)).mkdir()
        break
    except FileExistsError:
        pass
print("a library says something", flush=True)
time.sleep(0.4 * n)
note("ready")
print("ready", flush=True)
sys.stdin.readline()
note("begin")
print('{"first_us": 2, "second_us": 1, "functions": 3}')
note("end")
"""


def test_startup_measures_one_process_at_a_time_when_all_are_ready(module, tmp_path):
    command = [sys.executable, "-c", WAITS, str(tmp_path)]
    said = module("bench_startup").run(command, {}, 3)
    assert said == [{"first_us": 2, "second_us": 1, "functions": 3}] * 3
    assert (tmp_path / "log").read_text() == "ready " * 3 + "begin end " * 3


@pytest.mark.parametrize("ready", ["", "print('ready', flush=True); input(); "])
def test_startup_tells_why_a_process_failed(module, ready):
    command = [sys.executable, "-c", f"{ready}raise SystemExit('no such op')"]
    with pytest.raises(RuntimeError, match="exit code 1: no such op"):
        module("bench_startup").run(command, {}, 2)


def test_startup_caches_are_in_the_folder(module, tmp_path):
    seen = []
    bench = module("bench_startup")
    fmt = module("gpu.data").FORMATS["cache_int8/channel"]
    bench.samples(
        lambda *given: seen.append(given), torch.device("cpu"), "gather_kv", fmt, tmp_path, 3
    )
    ((command, environment, count),) = seen
    assert command[1:] == [bench.__file__, "--child", "gather_kv", "cache_int8/channel", "cpu"]
    assert environment == {
        "CUPY_CACHE_DIR": str(tmp_path / "cupy"),
        "CUDA_CACHE_PATH": str(tmp_path / "driver"),
    }
    assert count == 3


def test_rotation_is_larger_than_twice_the_l2(module, monkeypatch):
    timing = module("gpu.timing")
    monkeypatch.setattr(timing, "l2_bytes", lambda device: 50)
    for size in (1, 30, 99, 100, 101, 10**9):
        sets = timing.rotations(size, torch.device("cpu"))
        assert sets * size > 100
        assert (sets - 1) * size <= 100


@pytest.mark.parametrize(("wanted", "sets", "calls"), [(2, 1, 2), (8, 3, 9), (5, 40, 40)])
def test_every_set_is_called_alike(module, wanted, sets, calls):
    assert module("gpu.timing").round_up(wanted, sets) == calls


def test_copy_ceiling_is_the_best_copy_and_reading_is_counted_once(module):
    timing, ceilings = module("gpu.timing"), module("gpu.ceilings")

    class Fixed:
        def measure(self, contenders):
            return {name: timing.Timing(1.0, 0.0, "graph") for name in contenders}

    size = 1 << 12
    found = ceilings.measure(Fixed(), torch.device("cpu"), size)
    assert found["copy_TBps"] == 2 * size / 1e6
    assert found["read_measured_TBps"] == size / 1e6


def test_mask_of_draft_tokens_is_causal(module):
    bits = module("gpu.peers").causal_bits(2, 4, torch.device("cpu"))
    assert bits.shape == (2, 4, 2)
    assert bits.dtype == torch.uint16
    assert bits[1].tolist() == [[1, 0], [3, 0], [7, 0], [15, 0]]


def test_every_module_to_warm_has_a_name_of_one_word(module):
    names = list(module("gpu.warm").modules((16, 64)))
    assert len(names) == len(set(names)) == 1 + 2 * (1 + 2 * 4) + 1
    assert not any(set(" \t") & set(name) for name in names)


def test_prefill_rows_of_every_mask_hold_what_the_page_reads(module, clock, tmp_path):
    bench = module("bench_prefill")
    masks = ("causal", "full", "causal as intervals", "window 1024 as intervals")
    cases = [bench.Case((96,), mask, (4, 2), 64) for mask in masks]
    cases.append(bench.Case((5, 1, 90), "causal", (4, 2), 64))
    path = tmp_path / "result.json"
    bench.main(["--json", str(path), "--no-peers"], clock, "cpu", cases)
    found = json.loads(path.read_text("utf-8"))
    assert found["errors"] == []
    assert [row["shape"] for row in found["rows"]] == [case.shape for case in cases]
    assert all(row.keys() >= KEYS | {"TFLOPs"} for row in found["rows"])
    assert set(found["digests"]) >= {"masked_attention"}


@pytest.mark.parametrize("mask", ["causal", "causal as intervals", "window 1024 as intervals"])
def test_prefill_counts_the_pairs_that_are_seen(module, mask):
    bench = module("bench_prefill")
    case = bench.Case((1500,), mask, (3, 1), 64)
    width = 1024 if mask.startswith("window") else 1500
    pairs = sum(min(row + 1, width) for row in range(1500))
    assert case.flops == 4 * pairs * 3 * 64


def test_documents_cover_the_prompt_and_rows_see_their_own(module):
    bench = module("bench_prefill")
    start = bench.Case((2000,), "16 documents as intervals", (2, 1), 64).start()
    assert len(set(start.tolist())) == 16
    assert bool((start <= torch.arange(2000)).all())
    assert bool((start[1:] >= start[:-1]).all())


def test_a_peer_that_is_left_out_is_named(module):
    report = module("gpu.report")
    arguments = report.parser("x").parse_args(["--skip-peers", "FA3"])
    found = report.Report("x", arguments, None, torch.device("cpu"), ())
    assert found.skips("here", "FlashInfer FA3")
    assert not found.skips("here", "FlashInfer FA2")
    assert ["FA3" in error for error in found.errors] == [True]


def test_both_ways_behind_a_prefix_agree_in_every_format(module, clock, tmp_path):
    bench = module("bench_prefix")
    case = bench.Case(2, 20, 96, (4, 2), 64)
    path = tmp_path / "result.json"
    bench.main(["--json", str(path), "--no-peers", "--quick"], clock, "cpu", [case])
    found = json.loads(path.read_text("utf-8"))
    assert found["errors"] == []
    assert sorted((row["format"], row["shape"]) for row in found["rows"]) == sorted(
        (label, case.shape(way, 16)) for label in LABELS for way in bench.WAYS
    )


def test_ways_that_disagree_are_told(module, clock, tmp_path, monkeypatch):
    bench = module("bench_prefix")
    whole = bench.ops.masked_attention
    monkeypatch.setattr(
        bench.ops, "masked_attention", lambda *a, **k: whole(*a, **{**k, "causal": False})
    )
    path = tmp_path / "result.json"
    case = bench.Case(2, 90, 96, (4, 2), 64)
    bench.main(["--json", str(path), "--formats", "none"], clock, "cpu", [case])
    assert any("append: ValueError: differs" in x for x in json.loads(path.read_text())["errors"])
