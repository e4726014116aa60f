# SPDX-License-Identifier: Apache-2.0
"""Which backend and which kernels serve a request, and why not the others."""

import re
from types import MappingProxyType, SimpleNamespace

import pytest

import fastkv.ops
from fastkv import CacheSpec
from fastkv.backends import (
    BACKEND_NAMES,
    ENVIRONMENT_VARIABLE,
    FEATURES,
    AppendBackend,
    Backend,
    Choice,
    Device,
    FlashBackend,
    FlashMaskBackend,
    get_backend,
    name_from_environment,
    select,
    select_backend,
)
from fastkv.backends.features import BACKENDS, BackendRow
from fastkv.backends.kernels import KERNELS, Kernels
from fastkv.errors import ContractError, SelectionError, UnknownNameError
from helpers.recording import RecordingOps
from helpers.sentinels import FORMATS

CLASSES = {"append": AppendBackend, "flash": FlashBackend, "flash_mask": FlashMaskBackend}
#: Kernels that serve less than this version's.
BUILT = {
    "reference": Kernels(name="reference", kind="cpu"),
    "cuda": Kernels(
        name="cuda",
        kind="cuda",
        min_sm=80,
        min_sm_by_storage={"float8_e4m3fn": 89},
        head_dims=(64, 128),
        page_sizes=(16, 64),
        groups=range(1, 9),
        storage=("bfloat16", "float16", "int8", "uint8", "float8_e4m3fn"),
    ),
}


def spec_of(fmt="none", head_dim=128, dtype="bfloat16"):
    layers = 1 if isinstance(fmt, str) else len(fmt)
    return CacheSpec(layers, 2, head_dim, 16, fmt, dtype)


def refused(*args, **kwargs):
    with pytest.raises(SelectionError) as caught:
        select_backend(*args, **kwargs)
    return caught.value


# --- names ------------------------------------------------------------------------------------


def test_names_classes_and_table_are_the_same_three():
    assert set(BACKEND_NAMES) == set(CLASSES) == set(BACKENDS)
    for name, row in BACKENDS.items():
        assert row.name == name == CLASSES[name].name


@pytest.mark.parametrize("fmt", FORMATS)
@pytest.mark.parametrize("name", BACKEND_NAMES)
def test_explicit_name_is_taken(name, fmt):
    choice = select_backend(name, spec_of(fmt))
    assert choice == Choice(name, "reference", "asked for by name", ())


@pytest.mark.parametrize(
    ("name", "suggestion"),
    [("apend", "append"), ("flash-mask", "flash_mask"), ("FLASH", "flash"), ("xyz", None)],
)
def test_misspelt_name_lists_the_names(name, suggestion):
    with pytest.raises(UnknownNameError) as caught:
        select_backend(name, spec_of())
    assert (caught.value.op, caught.value.argument) == ("select_backend", "name")
    assert_lists_the_names(caught.value, name, suggestion)


def assert_lists_the_names(error, name, suggestion):
    listed = re.search(r"expected one of (.*), got", str(error)).group(1).split(", ")
    assert sorted(listed) == ["append", "auto", "flash", "flash_mask"]
    assert error.got == repr(name)
    found = re.findall(r"Did you mean '(.*)'\?", str(error))
    assert found == ([suggestion] if suggestion else [])


def test_unknown_feature_lists_the_features():
    with pytest.raises(UnknownNameError, match="Did you mean 'window'") as caught:
        select_backend("auto", spec_of(), features=["sinks", "windows", "nonsense"])
    assert caught.value.argument == "features"
    assert caught.value.expected == f"one of {', '.join(FEATURES)}"


def test_features_may_be_an_iterator():
    error = refused("flash", spec_of(), features=iter(["window", "mask_offsets_on_prefill"]))
    assert "with mask_offsets_on_prefill, window:" in str(error)


# --- features ---------------------------------------------------------------------------------


@pytest.mark.parametrize("feature", FEATURES)
@pytest.mark.parametrize("name", BACKEND_NAMES)
def test_explicit_name_runs_or_raises_with_the_reason(name, feature):
    reason = BACKENDS[name].refuses.get(feature)
    if reason is None:
        assert select_backend(name, spec_of(), features=[feature]).backend == name
        return
    error = refused(name, spec_of(), features=[feature])
    assert [candidate for candidate, _ in error.rejected] == [name]
    assert reason in str(error)
    assert feature in str(error)


def test_flash_refuses_intervals_on_prefill_rows():
    error = refused("flash", spec_of(), features=["mask_offsets_on_prefill"])
    assert "select flash_mask or append" in str(error)


@pytest.fixture
def picky(monkeypatch):
    """A table in which the first two backends refuse something."""
    rows = (
        BackendRow("append", (), (), "", MappingProxyType({"sinks": "A has none"})),
        BackendRow(
            "flash_mask",
            ("masked_attention",),
            (),
            "",
            MappingProxyType({"sinks": "M neither", "window": "M no"}),
        ),
        BackendRow(
            "flash", ("masked_attention",), (), "", MappingProxyType({"soft_cap": "F never"})
        ),
    )
    monkeypatch.setattr(select, "BACKENDS", {row.name: row for row in rows})
    monkeypatch.setattr(select, "BACKEND_NAMES", tuple(row.name for row in rows))


@pytest.mark.usefixtures("picky")
def test_auto_falls_through_and_says_why():
    choice = select_backend("auto", spec_of(), features=["sinks"])
    assert choice.backend == "flash"
    assert choice.rejected == (
        ("append", "no sinks: A has none"),
        ("flash_mask", "no sinks: M neither"),
    )
    assert choice.reason == "the first that serves sinks; passed over: append, flash_mask"


@pytest.mark.usefixtures("picky")
def test_explicit_name_is_never_overridden():
    error = refused("append", spec_of(), features=["sinks"])
    assert error.rejected == (("append", "no sinks: A has none"),)
    assert str(error) == (
        "select_backend: no backend serves 'append' on cpu with sinks: append: no sinks: A has none"
    )


@pytest.mark.usefixtures("picky")
def test_error_of_auto_has_every_reason_of_every_backend():
    error = refused("auto", spec_of(), "cuda:90", ["window", "sinks", "soft_cap"])
    assert [name for name, _ in error.rejected] == ["append", "flash_mask", "flash"]
    assert "on cuda (sm_90) with sinks, soft_cap, window" in error.request
    for reason in ("A has none", "M neither", "M no", "F never"):
        assert reason in str(error)


def test_auto_takes_the_first_when_nothing_is_asked():
    choice = select_backend("auto", spec_of())
    assert choice == Choice(BACKEND_NAMES[0], "reference", "the default", ())


def test_the_function_is_pure():
    features = ["mask_offsets_on_prefill", "window"]
    first = select_backend("auto", spec_of(), "cpu", features)
    assert select_backend("auto", spec_of(), Device("cpu"), tuple(reversed(features))) == first
    assert features == ["mask_offsets_on_prefill", "window"]


def test_selection_ignores_the_environment(monkeypatch):
    monkeypatch.setenv(ENVIRONMENT_VARIABLE, "flash")
    assert select_backend("auto", spec_of()).backend == "append"


# --- devices and kernels ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "device", "shown"),
    [
        ("cpu", Device("cpu"), "cpu"),
        ("cuda:90", Device("cuda", 90), "cuda (sm_90)"),
        ("cuda:sm_89", Device("cuda", 89), "cuda (sm_89)"),
        ("cuda:120", Device("cuda", 120), "cuda (sm_120)"),
        ("cuda:10", Device("cuda", 10), "cuda (sm_10)"),  # 1.0, the least that there is
    ],
)
def test_device_from_text(text, device, shown):
    assert Device.of(text) == device
    assert Device.of(device) is device
    assert str(device) == shown


@pytest.mark.parametrize(
    "text", ["cuda", "cuda:0", "cuda:9", "cuda:9.0", "gpu", "cpu:0", "", "cuda:-90", None, 90]
)
def test_device_that_nobody_knows(text):
    with pytest.raises(ContractError) as caught:
        select_backend("auto", spec_of(), text)
    assert caught.value.argument == "device"
    assert caught.value.got == repr(text)
    assert "'cuda:90'" in str(caught.value)


@pytest.mark.parametrize("fmt", FORMATS)
@pytest.mark.parametrize("name", [*BACKEND_NAMES, "auto"])
def test_every_backend_runs_on_a_gpu(name, fmt):
    choice = select_backend(name, spec_of(fmt), "cuda:90")
    backend = "append" if name == "auto" else name
    assert (choice.backend, choice.kernel, choice.rejected) == (backend, "cuda", ())


def test_auto_says_of_each_backend_what_the_kernels_lack():
    error = refused("auto", spec_of(head_dim=80), "cuda:90")
    reason = "head dim 80 is none of 64, 96, 128, 256"
    assert error.rejected == tuple((name, reason) for name in BACKEND_NAMES)


def test_a_gpu_never_falls_back_to_the_reference():
    # Nor a CPU to the kernels: one row of kernels per kind of device, and no other is tried.
    assert select_backend("auto", spec_of(), "cuda:90", kernels=BUILT).kernel == "cuda"
    assert select_backend("auto", spec_of(), "cpu", kernels=BUILT).kernel == "reference"
    only = {"reference": KERNELS["reference"]}
    assert "no kernels for a cuda device" in str(
        refused("auto", spec_of(), "cuda:90", kernels=only)
    )
    only = {"cuda": BUILT["cuda"]}
    assert "no kernels for a cpu device" in str(refused("auto", spec_of(), "cpu", kernels=only))
    assert "no kernels for a tpu device" in str(refused("auto", spec_of(), Device("tpu")))


@pytest.mark.parametrize("kernels", [BUILT, KERNELS], ids=["built", "this version"])
@pytest.mark.parametrize("fmt", FORMATS)
@pytest.mark.parametrize("sm", [75, 80, 86, 89, 90, 120])
def test_what_a_gpu_lacks(sm, fmt, kernels):
    is_fp8 = "fp8" in fmt
    device = f"cuda:{sm}"
    if sm >= (89 if is_fp8 else 80):
        assert select_backend("append", spec_of(fmt), device, kernels=kernels).kernel == "cuda"
        return
    text = str(refused("append", spec_of(fmt), device, kernels=kernels))
    assert ("needs sm_80 or newer, the device is cuda (sm_75)" in text) == (sm < 80)
    wants_fp8 = f"float8_e4m3fn needs sm_89 or newer, the device is cuda (sm_{sm})"
    assert (wants_fp8 in text) == is_fp8


def test_every_format_of_a_mixed_cache_counts():
    spec = spec_of(["cache_int8", "none", "cache_fp8"])
    assert select_backend("append", spec, "cuda:89", kernels=BUILT).kernel == "cuda"
    error = refused("append", spec, "cuda:80", kernels=BUILT)
    assert "float8_e4m3fn needs sm_89" in str(error)


@pytest.mark.parametrize(("head_dim", "served"), [(64, True), (96, False), (128, True)])
def test_head_dim_that_kernels_lack(head_dim, served):
    spec = spec_of("cache_int8", head_dim)
    if served:
        assert select_backend("append", spec, "cuda:90", kernels=BUILT).kernel == "cuda"
    else:
        error = refused("append", spec, "cuda:90", kernels=BUILT)
        assert f"head dim {head_dim} is none of 64, 128" in str(error)
    assert select_backend("append", spec, "cpu", kernels=BUILT).kernel == "reference"


@pytest.mark.parametrize("page_size", [1, 8, 16, 32, 64, 128, 256])
def test_page_size_that_kernels_lack(page_size):
    spec = CacheSpec(1, 2, 128, page_size, "cache_int8")
    if page_size in (16, 32, 64, 128):
        assert select_backend("append", spec, "cuda:90").kernel == "cuda"
    else:
        reason = f"page size {page_size} is none of 16, 32, 64, 128"
        assert refused("append", spec, "cuda:90").rejected == (("append", reason),)
    assert select_backend("append", spec, "cpu").kernel == "reference"


@pytest.mark.parametrize("group", [1, 7, 16, 17, 64])
def test_query_heads_that_kernels_lack(group):
    spec = spec_of("cache_int8")
    asked = {"num_query_heads": group * spec.num_kv_heads}
    if group <= 16:
        assert select_backend("append", spec, "cuda:90", **asked).kernel == "cuda"
        assert get_backend(spec, name="append", device="cuda:90", **asked).name == "append"
    else:
        reason = f"{group} query heads a KV head are outside 1 to 16"
        assert refused("append", spec, "cuda:90", **asked).rejected == (("append", reason),)
        with pytest.raises(SelectionError, match=reason):
            get_backend(spec, name="append", device="cuda:90", **asked)
    assert select_backend("append", spec, "cpu", **asked).kernel == "reference"


@pytest.mark.parametrize("count", [0, -2, 3, 2.0, True, "2"])
def test_query_heads_that_cannot_be(count):
    with pytest.raises(ContractError) as caught:
        select_backend("append", spec_of(), num_query_heads=count)
    assert caught.value.argument == "num_query_heads"
    assert caught.value.expected == "None or a multiple of the 2 KV heads"
    assert caught.value.got == repr(count)


@pytest.mark.parametrize(
    ("head_dim", "served"), [(64, True), (96, True), (80, False), (512, False)]
)
def test_head_dims_of_this_version(head_dim, served):
    spec = spec_of("none", head_dim)
    if served:
        assert select_backend("auto", spec, "cuda:80").kernel == "cuda"
    else:
        text = f"head dim {head_dim} is none of 64, 96, 128, 256"
        assert text in str(refused("auto", spec, "cuda:80"))


def test_float32_cache_is_for_the_reference():
    spec = spec_of("none", dtype="float32")
    assert "no float32 cache" in str(refused("append", spec, "cuda:90", kernels=BUILT))
    assert select_backend("append", spec, "cpu", kernels=BUILT).kernel == "reference"


def test_all_reasons_of_kernels_and_backend_together():
    spec = spec_of(["none", "cache_fp8"], 96, "float32")
    error = refused("flash", spec, "cuda:75", ["mask_offsets_on_prefill"], kernels=BUILT)
    ((name, reasons),) = error.rejected
    assert name == "flash"
    on = "or newer, the device is cuda (sm_75)"
    assert reasons.split("; ", 4) == [
        f"needs sm_80 {on}",
        "head dim 96 is none of 64, 128",
        "no float32 cache",
        f"float8_e4m3fn needs sm_89 {on}",
        f"no mask_offsets_on_prefill: {BACKENDS['flash'].refuses['mask_offsets_on_prefill']}",
    ]


# --- the environment --------------------------------------------------------------------------


@pytest.mark.parametrize("name", [*BACKEND_NAMES, "auto"])
def test_environment_names_the_backend(name, monkeypatch):
    assert name_from_environment({ENVIRONMENT_VARIABLE: name}) == name
    monkeypatch.setenv(ENVIRONMENT_VARIABLE, name)
    assert name_from_environment() == name
    want = BACKEND_NAMES[0] if name == "auto" else name
    assert get_backend(spec_of()).name == want


@pytest.mark.parametrize("environ", [{}, {ENVIRONMENT_VARIABLE: ""}], ids=["unset", "empty"])
def test_environment_says_nothing(environ, monkeypatch):
    assert name_from_environment(environ) == "auto"
    monkeypatch.delenv(ENVIRONMENT_VARIABLE, raising=False)
    for name, value in environ.items():
        monkeypatch.setenv(name, value)
    assert name_from_environment() == "auto"
    assert get_backend(spec_of()).name == BACKEND_NAMES[0]


@pytest.mark.parametrize(
    ("name", "suggestion"), [("flashmask", "flash_mask"), ("Append", "append"), ("cudnn", None)]
)
def test_misspelt_environment(name, suggestion, monkeypatch):
    monkeypatch.setenv(ENVIRONMENT_VARIABLE, name)
    for call in (name_from_environment, lambda: get_backend(spec_of())):
        with pytest.raises(UnknownNameError, match="FASTKV_ATTENTION_BACKEND") as caught:
            call()
        assert caught.value.argument == "FASTKV_ATTENTION_BACKEND"
        assert_lists_the_names(caught.value, name, suggestion)


def test_a_name_of_the_caller_wins_over_the_environment(monkeypatch):
    monkeypatch.setenv(ENVIRONMENT_VARIABLE, "flash")
    assert get_backend(spec_of(), name="flash_mask").name == "flash_mask"
    assert get_backend(spec_of(), name="auto").name == "append"
    monkeypatch.setenv(ENVIRONMENT_VARIABLE, "misspelt")
    assert get_backend(spec_of(), name="append").name == "append"


def test_environment_is_never_overridden_either(monkeypatch):
    monkeypatch.setenv(ENVIRONMENT_VARIABLE, "flash")
    with pytest.raises(SelectionError, match="no interval of keys"):
        get_backend(spec_of(), features=["mask_offsets_on_prefill"])
    with pytest.raises(SelectionError, match="head dim 80 is none of"):
        get_backend(spec_of(head_dim=80), device="cuda:90")


# --- creation ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", BACKEND_NAMES)
def test_choice_creates_the_backend(name):
    ops = RecordingOps()
    made = Choice(name, "reference", "").create(ops)
    assert type(made) is CLASSES[name]
    assert made.ops is ops
    assert made.row is BACKENDS[name]
    assert get_backend(spec_of(), name=name, ops=ops).ops is ops


@pytest.mark.parametrize("name", BACKEND_NAMES)
def test_without_ops_the_real_ones_are_driven(name):
    assert Choice(name, "reference", "").create().ops is fastkv.ops
    assert get_backend(spec_of(), name=name).ops is fastkv.ops


def test_a_backend_is_abstract():
    with pytest.raises(TypeError, match="abstract"):
        Backend(SimpleNamespace())


def test_the_reason_lists_what_was_asked_for():
    choice = select_backend("auto", spec_of(), features=["window", "sinks"])
    assert choice.reason == "the first that serves sinks, window"
    assert select_backend("auto", spec_of()).reason == "the default"
