# SPDX-License-Identifier: Apache-2.0
import json
import sys

import pytest

from fastkv import __version__
from fastkv.backends import BACKEND_NAMES, ENVIRONMENT_VARIABLE
from fastkv.cli import devices, main
from fastkv.quant import QUANT_SPECS


@pytest.fixture(autouse=True)
def unset(monkeypatch):
    monkeypatch.delenv(ENVIRONMENT_VARIABLE, raising=False)


@pytest.fixture
def run(monkeypatch, capsys):
    """Exit code and output of the command line."""

    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["fastkv", *arguments])
        with pytest.raises(SystemExit) as exit_:
            main()
        return exit_.value.code, capsys.readouterr()

    return call


def test_select_says_which_and_why(run):
    code, printed = run("select", "--quant", "cache_int8", "--backend", "flash")
    assert code == 0
    assert "flash on reference: asked for by name" in printed.out


def test_select_refuses_with_the_reason_and_exits_with_1(run):
    code, printed = run(
        "select", "--backend", "flash", "--feature", "mask_offsets_on_prefill", "--json", "-"
    )
    assert code == 1
    result = json.loads(printed.out)
    assert result["kernel"] is None
    assert "select flash_mask or append" in result["reason"]
    assert [name for name, _ in result["rejected"]] == ["flash"]


def test_select_on_a_gpu_says_what_runs(run):
    code, printed = run("select", "--device", "cuda:90")
    assert code == 0
    assert "append on cuda: the default" in printed.out


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (("--backend", "flash", "--head-dim", "72"), "head dim 72 is none of 64, 96, 128, 256"),
        (("--device", "cuda:80", "--quant", "cache_fp8"), "float8_e4m3fn needs sm_89 or newer"),
        (("--head-dim", "80"), "head dim 80 is none of 64, 96, 128, 256"),
        (("--page-size", "8"), "page size 8 is none of 16, 32, 64, 128"),
        (("--group", "17"), "17 query heads a KV head are outside 1 to 16"),
        (("--dtype", "float32"), "no float32 cache"),
    ],
)
def test_select_on_a_gpu_says_what_is_missing(run, arguments, reason):
    code, printed = run("select", "--device", "cuda:90", *arguments, "--json", "-")
    assert code == 1
    result = json.loads(printed.out)
    assert result["kernel"] is None
    assert reason in result["reason"]


def test_select_takes_the_environment_variable_and_an_option_wins(run, monkeypatch):
    monkeypatch.setenv(ENVIRONMENT_VARIABLE, "flash_mask")
    assert json.loads(run("select", "--json", "-")[1].out)["backend"] == "flash_mask"
    named = run("select", "--backend", "append", "--json", "-")[1].out
    assert json.loads(named)["backend"] == "append"


@pytest.mark.parametrize(
    ("arguments", "names"),
    [
        (("--quant", "cache_int9"), tuple(QUANT_SPECS)),
        (("--backend", "flahs"), BACKEND_NAMES),
        (("--feature", "windows"), ("window", "sinks")),
        (("--device", "gpu"), ("cpu",)),
        (("--head-dim", "0"), ("head_dim",)),
    ],
)
def test_select_exits_with_2_on_a_wrong_name_and_lists_the_right_ones(run, arguments, names):
    code, printed = run("select", *arguments)
    assert code == 2
    assert printed.out == ""
    for name in names:
        assert name in printed.err


def test_doctor_reports_versions_devices_and_what_runs(run):
    code, printed = run("doctor", "--json", "-")
    assert code == 0
    report = json.loads(printed.out)
    assert report["fastkv"] == __version__
    packages = {row["package"]: row["version"] for row in report["packages"]}
    assert packages["numpy"] == sys.modules["numpy"].__version__
    assert report["devices"][0] == "cpu"
    on_cpu = [row for row in report["selection"] if row["device"] == "cpu"]
    assert {row["format"] for row in on_cpu} == set(QUANT_SPECS)
    assert {(row["backend"], row["kernel"]) for row in on_cpu} == {("append", "reference")}


def test_doctor_shows_what_runs_on_a_gpu(run, monkeypatch):
    monkeypatch.setattr(
        "fastkv.cli.doctor.found_devices",
        lambda: ([devices.Device("cpu"), devices.Device("cuda", 80)], ["cupy sees 1 GPU(s)"]),
    )
    code, printed = run("doctor")
    assert code == 0
    assert "cupy sees 1 GPU(s)" in printed.out
    assert "cuda (sm_80)" in printed.out
    report = json.loads(run("doctor", "--json", "-")[1].out)
    on_gpu = [row for row in report["selection"] if row["device"] == "cuda (sm_80)"]
    kernels = {row["format"]: row["kernel"] for row in on_gpu}
    assert kernels == {quant: None if "fp8" in quant else "cuda" for quant in QUANT_SPECS}
    refused = [row for row in on_gpu if row["kernel"] is None]
    assert all("float8_e4m3fn needs sm_89" in row["reason"] for row in refused)


def test_doctor_names_a_misspelt_backend_and_exits_with_2(run, monkeypatch):
    monkeypatch.setenv(ENVIRONMENT_VARIABLE, "flahs")
    code, printed = run("doctor")
    assert code == 2
    assert "Did you mean 'flash'?" in printed.out


def test_devices_report_a_library_that_breaks(monkeypatch):
    def broken():
        raise RuntimeError("driver too old")

    monkeypatch.setattr(devices, "_cupy", broken)
    monkeypatch.setattr(devices, "_torch", lambda: [80, 90])
    found, notes = devices.found_devices()
    assert [str(device) for device in found] == ["cpu", "cuda (sm_80)", "cuda (sm_90)"]
    assert notes == ["cupy sees no GPU: RuntimeError: driver too old", "torch sees 2 GPU(s)"]
