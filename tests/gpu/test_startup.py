# SPDX-License-Identifier: Apache-2.0
"""The first call in a new process: from the disk cache, and anew after an edit of a header."""

import json
import shutil

import pytest

from fastkv.ops.cuda import jit
from helpers.on_gpu import with_helpers

# Runs one op, and prints the digest and the op's result.
SCRIPT = """
import json, os
from pathlib import Path
from fastkv.ops.cuda import jit
from helpers.on_gpu import gpu_call, snapshot, synchronize

folder = Path(os.environ["KERNELS"])
jit.kernel_folder = lambda: folder
result = gpu_call("paged_attention", "cache_int8").run()
synchronize()
digest = jit.source_digest("paged_attention")
print(json.dumps({"digest": digest, "out": snapshot(result)[0].hex()}))
"""


@pytest.fixture
def start(run_python, tmp_path):
    """Run the script in a new process, over a disk cache and a copy of the sources of its own."""
    kernels, cache = tmp_path / "kernels", tmp_path / "cache"
    shutil.copytree(jit.kernel_folder(), kernels)
    env = {"KERNELS": str(kernels), "CUPY_CACHE_DIR": str(cache), **with_helpers()}

    def run():
        before = binaries(cache)
        said = json.loads(run_python(SCRIPT, **env).stdout)
        return {**said, "compiled": len(binaries(cache) - before)}

    run.kernels = kernels
    return run


def binaries(cache):
    """The cached binaries of the op's kernels, and when each was written."""
    files = [path for path in cache.glob("**/*") if path.is_file()]
    own = [path for path in files if b"paged_attention" in path.read_bytes()]
    return {(path.name, path.stat().st_mtime_ns) for path in own}


def test_a_new_process_takes_the_binary_from_the_disk(start):
    first = start()
    assert first["compiled"] >= 1
    again = start()
    assert again["compiled"] == 0
    assert again["digest"] == first["digest"]
    assert again["out"] == first["out"]


def test_an_edited_header_compiles_anew(start):
    first = start()
    header = start.kernels / "common" / "numbers.cuh"
    header.write_text(header.read_text("utf-8") + "\n// edited\n", "utf-8")
    edited = start()
    assert edited["compiled"] == first["compiled"]
    assert edited["digest"] != first["digest"]
    assert edited["out"] == first["out"]
    header.write_text(header.read_text("utf-8") + "\n#error edited\n", "utf-8")
    with pytest.raises(AssertionError, match="edited"):
        start()
