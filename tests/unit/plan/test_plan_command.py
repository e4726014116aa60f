# SPDX-License-Identifier: Apache-2.0
import json
import re
import sys
from pathlib import Path

import pytest

from fastkv import __version__
from fastkv.cli import main
from fastkv.quant import QUANT_SPECS

DOCS = Path(__file__).resolve().parents[3] / "docs"
CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 4096,
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 8,
    "torch_dtype": "bfloat16",
    "quantization_config": {
        "quantization": "mix_quant",
        "kv_cache_quant_type": "block_wise_fp8",
        "is_channel_wise": False,
        "has_zero_point": False,
    },
}
SHAPE = ("--layers", "32", "--kv-heads", "8", "--head-dim", "128")
GIB = 2**30


@pytest.fixture
def run(monkeypatch, capsys, tmp_path):
    """Exit code and output of `fastkv plan`, in a folder that holds config.json."""
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    monkeypatch.chdir(tmp_path)

    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["fastkv", "plan", *arguments])
        with pytest.raises(SystemExit) as exit_:
            main()
        return exit_.value.code, capsys.readouterr()

    return call


def document(run, *arguments):
    code, printed = run(*arguments, "--json", "-")
    assert (code, printed.err) == (0, "")
    return json.loads(printed.out)  # nothing but JSON on standard output


def test_json_holds_all_that_was_counted(run, tmp_path):
    file = tmp_path / "rows.json"
    code, printed = run("config.json", "--gpu-memory", "80", "--weights", "15", "--json", str(file))
    assert code == 0
    assert "block_wise_fp8 *" in printed.out
    got = json.loads(file.read_text())
    rows = {row["format"]: row for row in got.pop("rows")}
    assert got == {
        "fastkv": __version__,
        "config": "config.json",
        "layers": 32,
        "kv_heads": 8,
        "head_dim": 128,
        "dtype": "bfloat16",
        "page_size": 64,
        "tp": 1,
        "memory": {"gpu": 80 * GIB, "weights": 15 * GIB, "utilization": 0.9},
        "cache_bytes": 57 * GIB,
        "notes": [],
    }
    assert list(rows) == list(QUANT_SPECS)
    assert rows["block_wise_fp8"] == {
        "format": "block_wise_fp8",
        "configured": True,
        "bytes_per_token": 67584,
        "static_bytes": 0,
        "compression": 64 / 33,
        "request_bytes": {"4096": 67584 * 4096, "32768": 67584 * 32768, "131072": 67584 * 131072},
        "pages": 57 * GIB // (64 * 67584),
        "tokens": 57 * GIB // (64 * 67584) * 64,
        "requests": {"4096": 221, "32768": 27, "131072": 6},
    }


def test_the_table_fits_80_columns_and_marks_the_configs_format(run):
    code, printed = run(".", "--gpu-memory", "141", "--params", "8.03B", "--page-size", "16")
    assert code == 0
    lines = printed.out.splitlines()
    rows = [line for line in lines if line.split() and line.split()[0] in QUANT_SPECS]
    assert [line.split()[0] for line in rows] == list(QUANT_SPECS)
    assert [line.split()[0] for line in rows if "*" in line] == ["block_wise_fp8"]
    table = lines[lines.index(rows[0]) - 3 : lines.index(rows[-1]) + 1]
    assert max(len(line) for line in table) <= 80
    assert re.search(r"format +B/token +x +pages +tokens +4k +32k +128k", printed.out)
    left = int(141 * GIB * 0.9) - 2 * 8_030_000_000
    pages = left // (131072 * 16)
    want = ["131072", "1.00", f"{pages}", f"{pages * 16}", *(f"{pages // n}" for n in (256, 2048))]
    assert rows[0].split()[1:-1] == want
    assert f"{left / GIB:.2f} GiB a rank for the cache" in printed.out


def test_without_memory_the_table_shows_the_size_of_a_request(run):
    code, printed = run("config.json", "--contexts", "4k, 100,1M")
    assert code == 0
    assert "pages" not in printed.out
    assert re.search(r"none +131072 +1\.00 +0\.500 +0\.016 +128\.000", printed.out)
    assert re.search(r"format +B/token +x +4k +100 +1024k", printed.out)


def test_static_bytes_and_notes_are_printed(run):
    code, printed = run(*SHAPE, "--tp", "16", "--dtype", "fp16")
    assert code == 0
    text = " ".join(printed.out.split())
    assert "32 layers, 8 KV heads, D 128, float16, P 64, TP 16" in text
    assert "once: cache_int8 512, cache_fp8 512, cache_int4_zp 98304." in text
    assert "Each KV head is on 2 of the 16 ranks." in text
    assert "*" not in text  # no config, no format that it asks for


def test_options_reach_the_count(run):
    got = document(
        run, *SHAPE, "--dtype", "fp32", "--scale-dtype", "bf16", "--page-size", "1", "--tp", "2",
        "--gpu-memory", "2.5", "--params", "1.25M", "--param-bytes", "0.5", "--utilization", "0.5",
        "--contexts", "3", "--quant", "block_wise_fp8", "--quant", "none",
    )  # fmt: skip
    assert got["cache_bytes"] == int(1.25 * GIB) - 312_500
    assert (got["config"], got["dtype"], got["page_size"], got["tp"]) == (None, "float32", 1, 2)
    block, none = got["rows"]
    assert block["bytes_per_token"] == 2 * 32 * 4 * (128 + 2)
    assert none["bytes_per_token"] == 2 * 32 * 4 * 128 * 4
    assert none["requests"] == {"3": got["cache_bytes"] // none["bytes_per_token"] // 3}


def test_params_take_the_bytes_of_the_dtype(run):
    flags = ("--gpu-memory", "8", "--params", "1000000000", "--utilization", "1")
    for dtype, size in (("bf16", 2), ("fp32", 4)):
        got = document(run, *SHAPE, *flags, "--dtype", dtype)
        assert got["cache_bytes"] == 8 * GIB - size * 10**9


def test_a_dtype_replaces_the_configs(run):
    got = document(run, "config.json", "--dtype", "float32")
    assert (got["dtype"], got["rows"][0]["bytes_per_token"]) == ("float32", 262144)
    assert got["rows"][4]["configured"]


def test_windowed_reaches_the_count(run, tmp_path):
    kinds = ["sliding_attention"] * 31 + ["full_attention"]
    config = {**CONFIG, "layer_types": kinds, "sliding_window": 65}
    (tmp_path / "config.json").write_text(json.dumps(config))
    full = document(run, ".")
    windowed = document(run, ".", "--windowed")
    page = 64 * 131072 // 32
    assert full["rows"][0]["request_bytes"]["4096"] == page * 32 * 64
    assert windowed["rows"][0]["request_bytes"]["4096"] == page * (31 * 2 + 64)
    assert full["notes"] != windowed["notes"]


def test_no_limit_is_shown_where_all_layers_slide(run, tmp_path):
    config = {**CONFIG, "layer_types": ["sliding_attention"] * 32, "sliding_window": 128}
    (tmp_path / "config.json").write_text(json.dumps(config))
    _, printed = run(".", "--windowed", "--gpu-memory", "1", "--weights", "0")
    assert re.search(r"none +0 +1\.00 +no limit +no limit", printed.out)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("--gpu-memory", "16", "--weights", "15"), "weights take 15.00 GiB a rank"),
        (("--gpu-memory", "16", "--weights", "14.399999"), "less than one page of 64 tokens"),
    ],
)
def test_no_memory_for_a_cache_exits_with_1(run, tmp_path, arguments, says):
    file = tmp_path / "rows.json"
    code, printed = run("config.json", *arguments, "--json", str(file))
    assert (code, printed.out) == (1, "")
    assert printed.err.startswith("fastkv: no memory for a cache: ")
    assert says in printed.err
    assert not file.exists()


NEITHER = "expected a config, or --layers, --kv-heads, --head-dim, got neither"
MEMORY = ("--gpu-memory", "80", "--weights", "15")


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ((), (f"fastkv: plan: --layers: {NEITHER}",)),
        (SHAPE[:2], (f"fastkv: plan: --kv-heads: {NEITHER}",)),
        (SHAPE[:4], (f"fastkv: plan: --head-dim: {NEITHER}",)),
        (("config.json", *SHAPE), ("plan: --layers: ", "config.json", "not both")),
        (("config.json", "--dtype", "fp8"), ("--dtype", "'fp8'", "bfloat16")),
        (("config.json", "--weights", "15"), ("--weights", "--gpu-memory")),
        (("config.json", "--params", "8B"), ("--params", "--gpu-memory")),
        (("config.json", "--gpu-memory", "80"), ("--weights", "--params", "neither")),
        (("config.json", *MEMORY, "--params", "8B"), ("--weights", "--params", "both")),
        ((*SHAPE, *MEMORY, "--utilization", "1.1"), ("--utilization", "1.1")),
        ((*SHAPE, "--gpu-memory", "nan", "--weights", "1"), ("--gpu-memory", "nan")),
        ((*SHAPE, "--gpu-memory", "inf", "--weights", "1"), ("--gpu-memory", "inf")),
        ((*SHAPE, "--gpu-memory", "80", "--weights", "-1"), ("--weights", "-1")),
        ((*SHAPE, "--gpu-memory", "80", "--params", "8G"), ("--params", "'8G'", "M, B")),
        ((*SHAPE, "--gpu-memory", "80", "--params", "1e9"), ("--params", "'1e9'")),
        ((*SHAPE, "--contexts", "4k,,8k"), ("--contexts", "''")),
        ((*SHAPE, "--contexts", "0"), ("contexts", "got 0")),
        ((*SHAPE, "--contexts", "4B"), ("--contexts", "'4B'", "K, M")),
        ((*SHAPE, "--tp", "3"), ("tp_size", "8 KV heads", "got 3")),
        ((*SHAPE, "--tp", "0"), ("--tp",)),
        ((*SHAPE, "--layers", "1000000000"), ("--layers", "10000")),
        ((*SHAPE, "--quant", "int8"), (*QUANT_SPECS, "Did you mean 'cache_int8'?")),
        (("none.json",), ("none.json",)),
        ((*SHAPE, "--json", "no/rows.json"), ("rows.json",)),
        (("mla.json",), ("mla.json: kv_lora_rank", "MLA")),
        (("empty.json",), ("empty.json: num_hidden_layers", "got nothing")),
        (("text.json",), ("text.json: the file: expected JSON",)),
        (("fp9.json",), ("fp9.json: quantization_config.kv_cache_quant_type", "int4_zp")),
    ],
)
def test_a_wrong_call_exits_with_2_and_names_what_is_wrong(run, tmp_path, arguments, says):
    (tmp_path / "mla.json").write_text(json.dumps({**CONFIG, "kv_lora_rank": 512}))
    (tmp_path / "empty.json").write_text("{}")
    (tmp_path / "text.json").write_text("no JSON")
    fp9 = {**CONFIG, "quantization_config": {"kv_cache_quant_type": "fp9"}}
    (tmp_path / "fp9.json").write_text(json.dumps(fp9))
    code, printed = run(*arguments)
    assert (code, printed.out) == (2, "")
    for text in says:
        assert text in " ".join(printed.err.replace("│", " ").split())


def test_help_has_examples_and_every_documented_option(run):
    code, printed = run("--help")
    assert code == 0
    assert "Examples" in printed.out
    assert "fastkv plan Llama-3-8B/config.json" in printed.out
    documented = set(re.findall(r"--[a-z][a-z-]+", (DOCS / "plan.md").read_text(encoding="utf-8")))
    assert documented
    assert {option for option in documented if option not in printed.out} == set()


def test_the_output_that_the_documentation_shows_is_real(run):
    page = (DOCS / "plan.md").read_text(encoding="utf-8")
    found = re.search(
        r"^```console\n\$ fastkv plan (.*?)\n(.*?)^```", page, re.MULTILINE | re.DOTALL
    )
    command, shown = found.groups()
    code, printed = run(*command.split())
    assert code == 0
    lines = [line.strip() for line in printed.out.splitlines() if line.strip()]
    assert lines == [line.strip() for line in shown.splitlines() if line.strip()]
