# SPDX-License-Identifier: Apache-2.0
"""docs/performance.md stands for the committed results, and those for the kernels' sources."""

import copy
from pathlib import Path

import pytest

import performance
from fastkv.ops.cuda import jit

ROOT = Path(__file__).resolve().parents[2]
DIGESTS = {
    "paged_attention": "0123456789abcdef",
    "rope_write_kv": "123456789abcdef0",
    "gather_kv": "23456789abcdef01",
    "merge_states": "3456789abcdef012",
}


PAGE = performance.PAGE.read_text("utf-8")


def test_page_shows_the_results_of_these_sources():
    assert performance.problems(PAGE, performance.load(), jit.source_digests()) == []


def test_picture_is_there_where_the_page_shows_it():
    assert performance.PICTURE.exists() == ("](performance.svg)" in PAGE)


def test_page_says_what_xqa_computes_with():
    (note,) = [line for line in PAGE.split("\n") if line.startswith(performance.MARK)]
    assert "XQA computes fp8 with e4m3 q and P" in note


def row(op="paged_attention", fmt="none", shape="64x8192 Hq32 Hkv8 D128 P16", **more):
    return {
        "op": op,
        "format": fmt,
        "shape": shape,
        "us": 700.0,
        "iqr_us": 1.0,
        "mode": "graph",
        "bytes": 2**31,
        "TBps": 2**31 / 700e6,
        "peer": "XQA P64",
        "peer_us": 714.0,
        "ratio": 1.02,
        "peers": {},
        **more,
    }


def result(*rows):
    return {
        "command": "python benchmarks/bench_decode.py",
        "commit": "abc1234",
        "device": "A GPU",
        "digests": {row["op"]: DIGESTS[row["op"]] for row in rows},
        "versions": {"fastkv": "0", "torch": "2.11", "driver": "580"},
        "ceilings": {"read_TBps": 3.11, "copy_TBps": 2.43},
        "rows": list(rows),
        "errors": [],
    }


def started(op, fmt, shape, seconds, imports=0.0625):
    us = {"us": seconds * 1e6, "import_us": imports and imports * 1e6}
    return row(op, fmt, shape, bytes=0, peer=None, ratio=None, **us)


@pytest.fixture
def documents():
    host = row("gather_kv", shape="64x128 Hq32 Hkv8 D128 P16", us=12.5, bytes=0, peer=None)
    chunk = row(shape="8x512 over 8192 Hq32 Hkv8 D128 P16", TFLOPs=300.0, ratio=None, peer=None)
    return {
        "decode": result(
            row(),
            row(fmt="cache_fp8", us=400.0),
            row(shape="64x8192 Hq32 Hkv8 D128 P64"),
            row(shape="64x8192 Hq32 Hkv8 D128 P16 W1024", peer=None, ratio=None),
            chunk,
        ),
        "write": result(row("rope_write_kv", shape="1x128 Hq32 Hkv8 D128 P16")),
        "gather": result(row("gather_kv", shape="128 tokens Hkv8 D128 P16")),
        "host": {**result(host), "ceilings": {}},
        "startup": {
            **result(
                started("paged_attention", "none", "cold", 2.5),
                started("paged_attention", "none", "disk", 0.125),
                started("paged_attention", "cache_int8", "cold", 2.0),
                started("merge_states", "none", "cold", 1.0),
                started("merge_states", "none", "disk", 0.25),
            ),
            "ceilings": {},
        },
    }


def test_tables_name_shape_page_time_rate_and_peer(documents):
    lines = performance.blocks(documents)["decode"].split("\n")
    assert lines == [
        "| Shape | Page | `none` | `cache_fp8` |",
        "|---|---|---|---|",
        "| 64 × 8192 Hq32 Hkv8 D128 | 16 | 700 µs<br>3.07 TB/s<br>**1.02 ×** XQA P64, 714 µs | "
        "400 µs<br>3.07 TB/s<br>**1.02 ×** XQA P64 †, 714 µs |",
        "| 64 × 8192 Hq32 Hkv8 D128 | 64 | 700 µs<br>3.07 TB/s<br>**1.02 ×** XQA P64, 714 µs | – |",
        "| 64 × 8192 Hq32 Hkv8 D128 W1024 | 16 | 700 µs<br>3.07 TB/s | – |",
        "| 8 × 512 over 8192 Hq32 Hkv8 D128 | 16 | 700 µs<br>300 TFLOP/s<br>3.07 TB/s | – |",
    ]
    assert "| `gather_kv` | 16 | 12.5 µs |" in performance.blocks(documents)["host"]


def test_startup_shows_seconds_cold_and_from_the_disk(documents):
    assert performance.blocks(documents)["startup"].split("\n") == [
        "| Op: cold, disk in s | `none` | `cache_int8` |",
        "|---|---|---|",
        "| `paged_attention` | 2.50, 0.12 | 2.00, – |",
        "| `merge_states` | 1.00, 0.25 | –, – |",
        "",
        "Of every first call, `import cupy` takes 0.06 s.",
    ]


def test_startup_without_the_import_lists_what_failed(documents):
    row = started("gather_kv", "none", "cold", 1.0, None)
    failed = {**result(row), "errors": ["import cupy: ModuleNotFoundError: No module"]}
    text = performance.blocks({"startup": failed})["startup"]
    assert "Of every first call" not in text
    assert text.endswith("\n\n- `import cupy`: `ModuleNotFoundError: No module`")


def test_startup_that_is_missing_says_so(documents):
    del documents["startup"]
    assert performance.blocks(documents)["startup"] == performance.NOTHING


def test_startup_is_not_in_the_picture(documents):
    assert performance.blocks({"startup": documents["startup"]})["picture"] == performance.NOTHING


def test_startup_says_what_it_aims_at():
    text = PAGE.partition("## Start-up")[2].partition("<!-- startup -->")[0]
    assert "at most 3 s cold and 0.3 s from the disk" in text


def test_runs_name_device_sources_versions_and_command(documents):
    text = performance.blocks(documents)["runs"]
    for part in ("A GPU", "abc1234", "3.11, 2.43", "torch 2.11, driver 580", "–, –"):
        assert part in text
    assert text.count("python benchmarks/bench_decode.py") == 5
    assert "| decode | A GPU | `paged_attention` |" in text
    assert "| startup | A GPU | `merge_states`, `paged_attention` |" in text
    sources = ", ".join(f"`{kernel}` `{DIGESTS[kernel]}`" for kernel in sorted(DIGESTS))
    assert f"\n\nKernel sources: {sources}.\n\n" in text


@pytest.mark.parametrize(("us", "text"), [(714.4, "714"), (99.94, "99.9"), (3.456, "3.46")])
def test_three_digits(us, text):
    assert performance.number(us) == text


def test_what_could_not_be_measured_is_listed(documents):
    documents["decode"]["errors"] = ["none XQA P64: RuntimeError: no `mask`"]
    text = performance.blocks(documents)["decode"]
    assert text.endswith("- `none XQA P64`: `RuntimeError: no mask`")


def test_one_reason_is_one_line(documents):
    why = ["ImportError: lib.so: no such file", "RuntimeError: another"]
    documents["decode"]["errors"] = [f"a: {why[0]}", f"b: {why[1]}", f"c: {why[0]}", f"d: {why[0]}"]
    text = performance.blocks(documents)["decode"]
    assert text.endswith(f"- `a` and 2 more: `{why[0]}`\n- `b`: `{why[1]}`")


def test_a_written_page_has_no_problems_and_is_written_once(documents):
    page = performance.rewrite(PAGE, performance.blocks(documents))
    assert performance.problems(page, documents, DIGESTS) == []
    assert performance.rewrite(page, performance.blocks(documents)) == page
    assert performance.rewrite(page, performance.blocks({})) == performance.rewrite(
        PAGE, performance.blocks({})
    )


def test_results_of_other_sources_are_found(documents):
    page = performance.rewrite(PAGE, performance.blocks(documents))
    edited = {**DIGESTS, "gather_kv": "f" * 16, "merge_states": "e" * 16}
    measured = "benchmarks/results/{}.json: measured on {} {}, not {}".format
    gathered, merged = (
        (kernel, DIGESTS[kernel], edited[kernel]) for kernel in ("gather_kv", "merge_states")
    )
    assert performance.problems(page, documents, edited) == [
        measured("gather", *gathered),
        measured("host", *gathered),
        measured("startup", *merged),
        *(
            f"docs/performance.md quotes sources {digest}, which are no kernel's"
            for _, digest, _ in (gathered, merged)
        ),
    ]


def test_a_kernel_that_no_result_times_changes_nothing(documents):
    page = performance.rewrite(PAGE, performance.blocks(documents))
    assert performance.problems(page, documents, DIGESTS | {"new": "f" * 16}) == []


def test_a_result_without_the_digest_of_what_it_times_is_found(documents):
    del documents["write"]["digests"]
    del documents["startup"]["digests"]["merge_states"]
    page = performance.rewrite(PAGE, performance.blocks(documents))
    assert performance.problems(page, documents, DIGESTS) == [
        "benchmarks/results/write.json: has no digest of any kernel",
        "benchmarks/results/startup.json: has no digest of merge_states",
    ]


def test_a_digest_in_the_text_is_held_to_the_sources(documents):
    page = performance.rewrite(PAGE, performance.blocks(documents)) + "\nOf `00000000000000aa`."
    (found,) = performance.problems(page, documents, DIGESTS)
    assert "quotes sources 00000000000000aa" in found


@pytest.mark.parametrize("figure", ["us", "TBps", "ratio", "peer_us"])
def test_a_figure_that_differs_is_found(documents, figure):
    page = performance.rewrite(PAGE, performance.blocks(documents))
    changed = copy.deepcopy(documents)
    changed["gather"]["rows"][0][figure] *= 1.1
    assert performance.problems(page, changed, DIGESTS) == [
        "docs/performance.md: block gather is not what the results say"
    ]


def test_a_result_that_is_missing_is_found(documents):
    page = performance.rewrite(PAGE, performance.blocks(documents))
    del documents["write"]
    found = performance.problems(page, documents, DIGESTS)
    assert [text.split()[2] for text in found] == ["runs", "write"]


def test_results_are_read_by_name(tmp_path):
    (tmp_path / "gather.json").write_text('{"rows": []}')
    (tmp_path / "other.json").write_text("{}")
    assert performance.load(tmp_path) == {"gather": {"rows": []}}


def test_picture_is_the_same_each_time(documents, tmp_path):
    first, second = tmp_path / "a.svg", tmp_path / "b.svg"
    performance.draw(documents, first)
    performance.draw(documents, second)
    text = first.read_text("utf-8")
    assert text == second.read_text("utf-8")
    assert "attention 64 × 8192 Hq32 Hkv8 D128 W1024" in text
    assert "cache_fp8" in text


def test_only_prefill_has_rows_without_a_page():
    shape = "4096 causal Hq32 Hkv8 D128"
    row = {"op": "masked_attention", "shape": shape, "bytes": 1}
    assert performance.place(row) == (shape, performance.NO_PAGE)
    with pytest.raises(AssertionError, match="holds its page size"):
        performance.place({**row, "op": "gather_kv"})
