# SPDX-License-Identifier: Apache-2.0
"""A kernel's digest: an edit of any file that it may include changes it, and no other does."""

import random
import re
import shutil

import pytest

from fastkv.ops.cuda import includes, jit, listing
from fastkv.quant import QUANT_SPECS

FOLDER = jit.kernel_folder()
KERNELS = jit.kernels()
SOURCES = [path.relative_to(FOLDER).as_posix() for path in jit.sources()]
WITH_CODEC = {"gather_kv", "paged_attention", "rope_write_kv"}
KNOWN = {*WITH_CODEC, "copy_pages", "merge_states"}
#: Which of these kernels some of the files are known to be of; other kernels may come.
REACHED = {
    "codecs/none.cuh": WITH_CODEC,
    "codecs/cache_int4_zp.cuh": WITH_CODEC,
    "fragments/four_bit.cuh": WITH_CODEC,  # by way of the codec alone
    "common/tensor_core.cuh": WITH_CODEC,  # a step further
    "common/e4m3.cuh": WITH_CODEC,
    "common/numbers.cuh": KNOWN,
    "common/grid.cuh": KNOWN,
    "common/row_fold.cuh": {"rope_write_kv"},
    "paged/stream.cuh": {"paged_attention"},
    "paged/params.cuh": {"paged_attention"},
    **{f"{kernel}.cu": {kernel} for kernel in sorted(KNOWN)},
}


def put(monkeypatch, folder):
    monkeypatch.setattr(jit, "kernel_folder", lambda: folder)
    jit.source_digest.cache_clear()


@pytest.fixture
def copied(tmp_path, monkeypatch):
    """A copy of the sources, in place of the real ones."""
    folder = tmp_path / "kernels"
    shutil.copytree(FOLDER, folder)
    put(monkeypatch, folder)
    yield folder
    jit.source_digest.cache_clear()


@pytest.fixture
def written(tmp_path, monkeypatch):
    """Write files, by path, that are all the sources there are."""

    def write(**files):
        for name, text in files.items():
            path = tmp_path / name.replace("__", "/")
            path = path.with_suffix(".cu" if path.parent == tmp_path else ".cuh")
            path.parent.mkdir(exist_ok=True)
            path.write_text(text, "utf-8")
        jit.source_digest.cache_clear()

    put(monkeypatch, tmp_path)
    yield write
    jit.source_digest.cache_clear()


def names(kernel):
    folder = jit.kernel_folder()
    return [path.relative_to(folder).as_posix() for path in jit.sources(kernel)]


def digests():
    jit.source_digest.cache_clear()
    return jit.source_digests()


def changed(copied, name):
    """Kernels whose digest an edit of a file changes; it is undone."""
    path, before = copied / name, digests()
    text = path.read_text("utf-8")
    # As harmless as an edit can be: a comment of some digits at the end.
    path.write_text(f"{text}// {random.getrandbits(64)}\n", "utf-8")
    after = digests()
    path.write_text(text, "utf-8")
    assert digests() == before
    return {kernel for kernel in before if after[kernel] != before[kernel]}


# --- the real sources --------------------------------------------------------------------------


@pytest.mark.parametrize("name", REACHED)
def test_an_edit_changes_exactly_the_kernels_that_include_it(copied, name):
    assert changed(copied, name) & KNOWN == REACHED[name]


def test_each_file_is_of_the_kernels_whose_digest_it_changes(copied):
    for name in SOURCES:
        found = changed(copied, name)
        assert found == {kernel for kernel in KERNELS if name in names(kernel)}
        assert found, f"{name} is of no kernel"


def test_kernels_are_those_that_the_launchers_list():
    assert sorted({what.kernel for what in listing.specializations()}) == KERNELS
    digests = jit.source_digests()
    assert list(digests) == KERNELS
    assert len({*digests.values(), jit.source_digest()}) == len(KERNELS) + 1
    assert all(re.fullmatch("[0-9a-f]{16}", digest) for digest in digests.values())


def test_only_the_kernels_asked_for_are_digested():
    wanted = ["gather_kv", "copy_pages"]
    assert jit.source_digests(wanted) == {name: jit.source_digest(name) for name in wanted}
    assert jit.source_digests([]) == {}


def test_every_header_that_a_specialization_names_is_of_its_kernel():
    named = 0
    for what in listing.specializations():
        for value in (value for key, value in what.defines if key.endswith("_HEADER")):
            assert re.fullmatch(r"<(.*)>", value)[1] in names(what.kernel)
            named += 1
    assert named > 10


def test_every_format_s_codec_is_of_the_kernels_with_a_codec():
    codecs = {f"{includes.CODECS}/{quant}.cuh" for quant in QUANT_SPECS}
    for kernel in KERNELS:
        found = codecs & set(names(kernel))
        assert found in (codecs, set())
        assert bool(found) == (kernel in WITH_CODEC) or kernel not in KNOWN


def test_a_new_codec_is_of_the_kernels_with_a_codec_and_a_new_kernel_of_none(copied):
    before = digests()
    (copied / "codecs" / "new.cuh").write_text('#pragma once\n#include "common/grid.cuh"\n')
    after = digests()
    assert {kernel for kernel in KNOWN if after[kernel] != before[kernel]} == WITH_CODEC
    (copied / "new.cu").write_text('#include "common/grid.cuh"\n')
    with_kernel = digests()
    assert with_kernel.pop("new") == jit.source_digest("new")
    assert with_kernel == after


def test_the_options_hold_the_kernel_s_own_digest(copied):
    what = {kernel: jit.Specialization.of(kernel, codec="none") for kernel in KNOWN}
    before = {kernel: each.options("sm_90a") for kernel, each in what.items()}
    path = copied / "common" / "row_fold.cuh"
    path.write_text(path.read_text("utf-8") + "// edited\n", "utf-8")
    jit.source_digest.cache_clear()
    after = {kernel: each.options("sm_90a") for kernel, each in what.items()}
    for kernel in KNOWN - {"rope_write_kv"}:
        assert after[kernel] == before[kernel]
        assert f"-DFASTKV_SOURCES={jit.source_digest(kernel)}" in after[kernel]
    (other,) = set(after["rope_write_kv"]) - set(before["rope_write_kv"])
    assert other == f"-DFASTKV_SOURCES={jit.source_digest('rope_write_kv')}"


@pytest.mark.parametrize("name", ["paged/fold.cuh", "common/faults.cuh", "fragments/four_bit.cuh"])
def test_a_header_that_is_missing_raises(copied, name):
    whose = {kernel for kernel in KERNELS if name in names(kernel)}
    (copied / name).unlink()
    jit.source_digest.cache_clear()
    for kernel in KERNELS:
        if kernel in whose:
            with pytest.raises(FileNotFoundError, match=f'#include "{name}"'):
                jit.source_digest(kernel)
        else:
            jit.source_digest(kernel)


def test_no_such_kernel_raises():
    with pytest.raises(FileNotFoundError, match=r"gather\.cu"):
        jit.source_digest("gather")


def test_codecs_that_are_missing_raise(copied):
    shutil.rmtree(copied / "codecs")
    with pytest.raises(FileNotFoundError, match=r"params\.cuh: .*#include FASTKV_CODEC_HEADER"):
        jit.sources("paged_attention")
    assert names("copy_pages")


# --- how an include may be written --------------------------------------------------------------

INCLUDES = {
    "plain": '#include "a/one.cuh"',
    "angles": "#include <a/one.cuh>",
    "spaces": '  #\tinclude\t "a/one.cuh"',
    "no space": '#include"a/one.cuh"',
    "at the end of the file": 'int x;\n#include "a/one.cuh"',
    "behind a comment": '/* why */ #include "a/one.cuh"',
    "around comments": '#/* a */include/* b\n b */"a/one.cuh"',
    "over two lines": '#inc\\\nlude \\\r\n "a/one.cuh"',
    "over two lines that end in spaces": '#include \\ \t\n"a/one.cuh"',
    "before a comment and another": ('#/* a */include "a/one.cuh"\n#/* b */include "b/two.cuh"'),
    "between comments": '#/* a */if X\n#include "a/one.cuh"\n#/* b */include "b/two.cuh"',
    "import": '#import "a/one.cuh"',
    "digraph": '%:include "a/one.cuh"',
    "next": "#include_next <a/one.cuh>",
    "switched off": '#if 0\n#include "a/one.cuh"\n#endif',
    "commented out": '// #include "a/one.cuh"',
    "in a comment": '/*\n#include "a/one.cuh"\n*/',
    "dots": '#include "b/../a/./one.cuh"',
    "by the second of two": '#include "b/two.cuh"\n#include "a/one.cuh"',
}


@pytest.mark.parametrize("text", INCLUDES.values(), ids=INCLUDES)
def test_an_include_is_found_however_it_is_written(written, text):
    written(kernel=text, a__one="int one;", b__two="int two;")
    assert "a/one.cuh" in names("kernel")
    before = jit.source_digest("kernel")
    written(a__one="int other;")
    assert jit.source_digest("kernel") != before


def test_includes_of_includes_are_found(written):
    written(
        kernel='#include "a/one.cuh"',
        a__one='#include "b/two.cuh"',
        b__two='#include "a/three.cuh"',
        a__three="",
        a__four='#include "a/one.cuh"',
    )
    assert names("kernel") == ["a/one.cuh", "a/three.cuh", "b/two.cuh", "kernel.cu"]


def test_a_header_beside_the_one_that_includes_it_counts_and_so_does_the_folder_s(written):
    files = {"kernel": '#include "a/one.cuh"', "a__one": '#include "b/two.cuh"\n', "b__two": ""}
    written(**files)
    assert names("kernel") == ["a/one.cuh", "b/two.cuh", "kernel.cu"]
    folder = jit.kernel_folder()
    (folder / "a" / "b").mkdir()
    (folder / "a" / "b" / "two.cuh").write_text("")
    assert names("kernel") == ["a/b/two.cuh", "a/one.cuh", "b/two.cuh", "kernel.cu"]
    (folder / "b" / "two.cuh").unlink()
    assert names("kernel") == ["a/b/two.cuh", "a/one.cuh", "kernel.cu"]


def test_a_cycle_ends(written):
    cycle = {"a__one": '#include "a/two.cuh"', "a__two": '#include "a/one.cuh"'}
    written(kernel='#include "a/one.cuh"', other='#include "a/two.cuh"', **cycle)
    assert names("kernel") == ["a/one.cuh", "a/two.cuh", "kernel.cu"]
    assert jit.source_digest("kernel") != jit.source_digest("other")
    written(a__one='#include "a/one.cuh"')
    assert names("kernel") == ["a/one.cuh", "kernel.cu"]


def test_the_codec_s_macro_stands_for_all_codecs_and_what_they_include(written):
    codecs = {"codecs__one": '#include "a/used.cuh"', "codecs__two": ""}
    written(kernel="#include FASTKV_CODEC_HEADER", a__used="", a__unused="", **codecs)
    assert names("kernel") == ["a/used.cuh", "codecs/one.cuh", "codecs/two.cuh", "kernel.cu"]


@pytest.mark.parametrize("include", ["OTHER", "FASTKV_CODEC", "FASTKV_CODEC_HEADERS", "X(a)", ""])
def test_an_include_by_another_macro_raises(written, include):
    written(kernel=f"#include {include}\n", codecs__one="")
    with pytest.raises(ValueError, match=r"kernel\.cu: .*FASTKV_CODEC_HEADER, got"):
        jit.source_digest("kernel")


@pytest.mark.parametrize(
    "include", ['"a/two.cuh"', "<two.cuh>", "<cuda_fp16.h>", '"a"', '"one.cuh"']
)
def test_an_include_of_nothing_raises(written, include):
    written(kernel=f"#include {include}", a__one="")
    with pytest.raises(FileNotFoundError, match=re.escape("kernel.cu: no file of the kernels for")):
        jit.source_digest("kernel")


@pytest.mark.parametrize("up", [False, True])
def test_a_file_outside_the_folder_is_none_of_the_kernels(copied, up):
    outside = copied.parent / "outside.cuh"
    outside.write_text("int outside;")
    (copied / "new.cu").write_text(f'#include "{"../outside.cuh" if up else outside}"')
    with pytest.raises(FileNotFoundError, match=r"new\.cu: .*outside\.cuh"):
        jit.source_digest("new")
