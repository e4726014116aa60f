# SPDX-License-Identifier: Apache-2.0
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from fastkv.backends import BACKEND_NAMES
from fastkv.cli import main
from fastkv.demo import measure
from fastkv.quant import QUANT_SPECS

KEYS = {"backend", "format", "bytes_per_token", "error", "worst_row", "seconds"}


def run(monkeypatch, *arguments):
    """The exit code of the command line."""
    monkeypatch.setattr(sys, "argv", ["fastkv", *arguments])
    with pytest.raises(SystemExit) as exit_:
        main()
    return exit_.value.code


def test_demo_writes_table_json_and_picture(monkeypatch, capsys, tmp_path):
    rows_file, picture = tmp_path / "rows.json", tmp_path / "demo.png"
    code = run(monkeypatch, "demo", "--json", str(rows_file), "--plot", str(picture))
    assert code == 0
    rows = json.loads(rows_file.read_text())["rows"]
    cells = {(name, quant) for name in BACKEND_NAMES for quant in QUANT_SPECS}
    assert {(row["backend"], row["format"]) for row in rows} == cells
    assert all(row.keys() >= KEYS and row["ok"] for row in rows)
    by_format = {row["format"]: row["bytes_per_token"] for row in rows}
    values = 2 * 3 * 3 * 64  # K and V, layers, heads, D
    assert by_format == {
        "none": 2 * values,
        "cache_int8": values,
        "cache_fp8": values,
        "cache_int4_zp": values // 2,
        "block_wise_fp8": values + 4 * 2 * 3 * 3,  # a float32 scale per token and head
    }
    printed = capsys.readouterr().out
    for row in rows:
        assert f"{row['error']:.4f}" in printed
    assert "All 15 within the bound" in printed
    assert picture.read_bytes().startswith(b"\x89PNG\r\n")
    assert picture.stat().st_size > 10_000


def test_demo_exits_with_1_when_a_format_misses_its_bound(monkeypatch, capsys):
    monkeypatch.setattr(measure, "SAFETY", 0.01)
    assert run(monkeypatch, "demo", "--json", "-") == 1
    document = json.loads(capsys.readouterr().out)  # nothing but JSON on standard output
    assert not any(row["ok"] for row in document["rows"])


def test_demo_names_the_rows_that_miss(monkeypatch, capsys):
    monkeypatch.setattr(measure, "SAFETY", 0.01)
    assert run(monkeypatch, "demo") == 1
    assert "MISSED: append cache_int8:" in capsys.readouterr().out


def test_demo_without_matplotlib_says_how_to_install_it_before_working(
    monkeypatch, capsys, mocker, tmp_path
):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    serve = mocker.spy(measure, "serve")
    assert run(monkeypatch, "demo", "--plot", str(tmp_path / "x.png")) == 2
    assert "pip install 'fastkv[plot]'" in capsys.readouterr().err
    assert serve.call_count == 0


def test_demo_refuses_a_folder_that_is_not_there_before_working(
    monkeypatch, capsys, mocker, tmp_path
):
    serve = mocker.spy(measure, "serve")
    assert run(monkeypatch, "demo", "--json", str(tmp_path / "no" / "rows.json")) == 2
    assert "rows.json" in capsys.readouterr().err
    assert serve.call_count == 0


def test_the_installed_command_runs():
    command = Path(sys.executable).with_name("fastkv")
    done = subprocess.run(
        [command, "--version"], capture_output=True, text=True, timeout=60, check=True
    )
    assert done.stdout.startswith("fastkv 0.")


@pytest.mark.parametrize("command", ["demo", "doctor", "select"])
def test_help_has_examples(monkeypatch, capsys, command):
    assert run(monkeypatch, command, "--help") == 0
    printed = capsys.readouterr().out
    assert "Examples" in printed
    assert f"fastkv {command}" in printed


def test_an_unknown_command_exits_with_2(monkeypatch, capsys):
    assert run(monkeypatch, "demmo") == 2
    assert "demmo" in capsys.readouterr().err


def test_the_command_line_starts_without_an_array_library(run_python):
    code = (
        "import sys, fastkv.cli\n"
        "found = {'numpy', 'torch', 'paddle', 'cupy', 'matplotlib'} & set(sys.modules)\n"
        "assert not found, found"
    )
    run_python(code, **os.environ)
