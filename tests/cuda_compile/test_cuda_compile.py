# SPDX-License-Identifier: Apache-2.0
"""Every kernel compiles for every architecture, without spills; NVRTC and no GPU.

`tox -e cuda-compile`. A missing NVRTC is a failure here: nothing is skipped.
"""

import os
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

import pytest

from fastkv.ops.cuda import jit, listing
from helpers import nvrtc
from helpers.calls import OPS

CASES = [
    (what, arch)
    for what in listing.specializations()
    for arch in listing.ARCHITECTURES
    if listing.is_for(what, arch)
]


@pytest.fixture(scope="module")
def compiled(request):
    """The compilations of all selected cases, in as many processes as there are cores."""
    items = request.session.items
    wanted = {item.callspec.params["case"] for item in items if item.originalname == "test_case"}
    # Spawned: a forked process would inherit pytest's threads and captured streams.
    pool = ProcessPoolExecutor(os.cpu_count(), mp_context=get_context("spawn"))
    try:
        ordered = [case for case in CASES if case in wanted]
        yield {case: pool.submit(nvrtc.compile_specialization, *case) for case in ordered}
    finally:
        pool.shutdown(cancel_futures=True)


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{listing.label(case[0])}-{case[1]}")
def test_case(case, compiled):
    what, _ = case
    assert nvrtc.faults(compiled[case].result(timeout=600), what.kernel) == []


def test_every_op_with_a_kernel_is_listed():
    assert set(listing.launchers()) == set(OPS)
    for op in listing.launchers():
        assert any(case[0].kernel.startswith(op) for case in CASES), op


def test_every_kernel_of_every_format_is_compiled_for_every_architecture_that_serves_it():
    # Else a format has only shapes that need more shared memory than some GPU has.
    def of_format(what):
        return what.kernel, dict(what.defines).get("FASTKV_CODEC_HEADER")

    built = {(*of_format(what), arch) for what, arch in CASES}
    expected = {
        (*of_format(what), arch)
        for what in listing.specializations()
        for arch in listing.ARCHITECTURES
        if listing.sm_of(arch) >= listing.least_sm(what)
    }
    assert expected - built == set()
    assert {arch for _, arch in CASES} == set(listing.ARCHITECTURES)


# --- the gate itself can fail -----------------------------------------------------------------

COPY = """
extern "C" __global__ void copy(const float* a, float* b) { b[threadIdx.x] = a[threadIdx.x]; }
"""
SPILL = """
extern "C" __global__ void __launch_bounds__(1024, 2) copy(float* a, int n) {
  float r[96];
  #pragma unroll
  for (int i = 0; i < 96; i++) r[i] = a[i * n + threadIdx.x];
  __syncthreads();
  #pragma unroll
  for (int i = 0; i < 96; i++) a[(95 - i) * n * 3 + threadIdx.x] = r[i] * r[(i + 7) % 96];
}
"""
E4M3 = """
extern "C" __global__ void copy(const float* a, unsigned short* b) {
  asm volatile("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %1;" : "=h"(b[0]) : "f"(a[0]));
}
"""


def faults_of(source, arch="sm_90a"):
    return nvrtc.faults(nvrtc.compile_source(source, "control", (f"-arch={arch}",)), "copy")


def test_a_header_that_the_kernel_s_digest_leaves_out_is_seen(monkeypatch):
    what = next(what for what in listing.specializations() if what.kernel == "merge_states")
    every = jit.sources("merge_states")
    kept = [path for path in every if path.name != "rounding.cuh"]
    assert len(kept) == len(every) - 1
    monkeypatch.setattr(jit, "sources", lambda _: kept)
    (fault,) = nvrtc.faults(nvrtc.compile_specialization(what, "sm_90a"), "merge_states")
    assert 'cannot open source file "common/rounding.cuh"' in fault


@pytest.mark.parametrize("arch", listing.ARCHITECTURES)
def test_a_sound_kernel_passes(arch):
    assert faults_of(COPY, arch) == []


def test_spills_are_seen():
    (fault,) = faults_of(SPILL)
    assert fault.startswith("spills ")


def test_a_kernel_of_another_name_is_seen():
    assert faults_of(COPY.replace(" copy(", " copied(")) == ["the binary has no kernel copy"]


def test_a_wrong_source_is_seen():
    (fault,) = faults_of("extern void;")
    assert "does not compile" in fault


def test_fp8_is_refused_below_sm_89():
    (fault,) = faults_of(E4M3, "sm_80")
    assert "sm_89" in fault
    assert faults_of(E4M3, "sm_89") == []


@pytest.mark.parametrize("code", ["C7508", "C7517"])
def test_serialized_instructions_are_seen(code):
    line = f"ptxas info : ({code}) Potential Performance Loss: wgmma.mma_async are serialized"
    log = f"{line}\n0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads"
    assert nvrtc.faults(nvrtc.Compiled(True, log, b"\0.text.copy\0"), "copy") == [line]


def test_an_assembler_that_says_nothing_is_seen():
    (fault,) = nvrtc.faults(nvrtc.Compiled(True, "", b"\0.text.copy\0"), "copy")
    assert "no spill counts" in fault
