# SPDX-License-Identifier: Apache-2.0
"""The kernels' sources: what their digest sees, and what each file must have."""

import os
import re
import shutil
from pathlib import Path

import pytest

from fastkv.backends.kernels import KERNELS
from fastkv.ops.cuda import jit, listing
from helpers.calls import OPS

FOLDER = jit.kernel_folder()
SOURCES = sorted(path for path in FOLDER.rglob("*") if path.is_file())
SIZE = re.compile(r"static_assert\(\s*sizeof\((\w+)\) == FASTKV_PARAMS_BYTES\b")


def name(path):
    return path.relative_to(FOLDER).as_posix()


@pytest.fixture
def copied(tmp_path, monkeypatch):
    """The folder of a copy of the sources, in place of the real one."""
    folder = tmp_path / "kernels"
    shutil.copytree(FOLDER, folder)
    monkeypatch.setattr(jit, "kernel_folder", lambda: folder)
    jit.source_digest.cache_clear()
    yield folder
    jit.source_digest.cache_clear()


def digest():
    jit.source_digest.cache_clear()
    return jit.source_digest()


def test_a_copy_has_the_same_digest(copied):
    here = digest()
    assert re.fullmatch("[0-9a-f]{16}", here)
    (copied / "notes.txt").write_text("no source")
    assert digest() == here


@pytest.mark.parametrize("path", SOURCES, ids=name)
def test_each_source_counts(path, copied):
    before = digest()
    own = copied / name(path)
    own.write_bytes(own.read_bytes() + b" ")
    after = digest()
    assert after != before
    own.rename(own.with_stem("renamed"))
    assert digest() not in (before, after)


def test_the_folder_of_a_source_counts(copied):
    before = digest()
    (copied / "codecs").rename(copied / "codecs_")  # the order of the files stays
    assert digest() != before


def test_options_are_in_one_order_whatever_the_caller_s():
    one = jit.Specialization.of("gather_kv", head_dim=64, codec="none")
    assert one == jit.Specialization.of("gather_kv", codec="none", head_dim=64)
    assert [o for o in one.options("sm_80") if "FASTKV_" in o][1:] == [
        "-DFASTKV_CODEC=none",
        "-DFASTKV_HEAD_DIM=64",
    ]


@pytest.mark.parametrize(("sm", "arch"), [(80, "sm_80"), (90, "sm_90a"), (120, "sm_120")])
def test_architectures(sm, arch):
    assert jit.arch_of(sm) == arch
    assert listing.sm_of(arch) == sm


def test_fp8_is_listed_from_sm_89():
    fp8 = [{"codec_header": "<codecs/cache_fp8.cuh>"}, {"expand": "E4m3Expand"}]
    assert {listing.least_sm(jit.Specialization.of("any", **defines)) for defines in fp8} == {89}
    assert listing.least_sm(jit.Specialization.of("any", codec="int8")) == 80


def test_shared_memory_decides_too():
    needs = jit.Specialization.of("any", shared_bytes=99 * 1024 + 16)
    built = [arch for arch in listing.ARCHITECTURES if listing.is_for(needs, arch)]
    assert built == ["sm_80", "sm_90a", "sm_100a"]
    fits = jit.Specialization.of("any", shared_bytes=99 * 1024, codec="cache_fp8")
    built = [arch for arch in listing.ARCHITECTURES if listing.is_for(fits, arch)]
    assert built == ["sm_89", "sm_90a", "sm_100a", "sm_120"]


def test_every_architecture_of_the_table_is_compiled_for():
    row = KERNELS["cuda"]
    listed = {listing.sm_of(arch) for arch in listing.ARCHITECTURES}
    assert {row.min_sm, *row.min_sm_by_storage.values()} <= listed


# --- what each file has -----------------------------------------------------------------------


def test_there_are_only_sources():
    assert {path.suffix for path in SOURCES} <= {".cu", ".cuh"}
    assert len(SOURCES) >= 2


@pytest.mark.parametrize("path", SOURCES, ids=name)
def test_every_source_opens_with_its_licence(path):
    assert path.read_text("utf-8").startswith("// SPDX-License-Identifier: Apache-2.0\n")


@pytest.mark.parametrize("path", SOURCES, ids=name)
def test_no_source_includes_a_toolkit_header(path):
    # NVRTC on a user's machine comes without headers; each include is one of fastkv's own.
    included = re.findall(r'#include\s+[<"]([^>"]+)[>"]', path.read_text("utf-8"))
    assert [header for header in included if not (FOLDER / header).is_file()] == []


@pytest.mark.parametrize("path", [path for path in SOURCES if path.suffix == ".cuh"], ids=name)
def test_every_header_is_read_once(path):
    assert "\n#pragma once\n" in path.read_text("utf-8")


def with_includes(path, seen):
    """A kernel's text and that of every header it reaches."""
    seen.add(path)
    text = path.read_text("utf-8")
    for header in re.findall(r'#include\s+[<"]([^>"]+)[>"]', text):
        at = FOLDER / header
        if at.is_file() and at not in seen:
            text += with_includes(at, seen)
    return text


@pytest.mark.parametrize("op", OPS)
def test_every_kernel_asserts_the_size_of_its_parameters(op):
    # The launcher packs them by hand: a struct that the compiler pads must not compile.
    path = FOLDER / f"{op}.cu"
    found = SIZE.findall(with_includes(path, set()))
    assert found, f"no static_assert(sizeof(...) == FASTKV_PARAMS_BYTES) within {op}.cu"
    text = re.sub(r"\s+", " ", path.read_text("utf-8"))
    assert f"{op}(const __grid_constant__ {found[0]} " in text, "the kernel takes that struct"


# --- the compile gate -------------------------------------------------------------------------

GATE = Path(__file__).resolve().parents[2] / "cuda_compile"


def test_the_compile_gate_fails_without_nvrtc(pytester, monkeypatch):
    # A `cuda` that is there and has no bindings, as on a machine without the package.
    package = pytester.mkpydir("cuda")
    assert package.is_dir()
    paths = [str(pytester.path), str(GATE.parent), os.environ.get("PYTHONPATH", "")]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(paths))
    chosen = "test_a_sound_kernel_passes or copy_pages"
    result = pytester.runpytest_subprocess("-p", "no:cacheprovider", GATE, "-k", chosen)
    assert result.ret == pytest.ExitCode.TESTS_FAILED
    outcomes = result.parseoutcomes()
    assert outcomes["failed"] >= 6
    assert not {"passed", "skipped"} & set(outcomes)
    result.stdout.fnmatch_lines(["*No module named 'cuda.bindings'*"])
