# SPDX-License-Identifier: Apache-2.0
"""The pages document every public name: what the build of the documentation checks, without it."""

import ast
import importlib
import importlib.util
import re
import zlib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def load_script():
    path = ROOT / "scripts/public_names.py"
    spec = importlib.util.spec_from_file_location("public_names", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


public = load_script()
LISTED = public.listed()
# Need PyTorch or transformers to be imported.
ELSEWHERE = {"fastkv.integrations.torch", "fastkv.integrations.transformers"}


def test_every_public_name_is_on_a_page():
    assert public.missing(LISTED) == []


def test_the_build_runs_the_check():
    config = (ROOT / "mkdocs.yml").read_text("utf-8")
    assert re.findall(r"^hooks: (.*)$", config, re.MULTILINE) == ["[scripts/public_names.py]"]


def test_the_modules_are_those_that_versioning_calls_public():
    table = (ROOT / "docs/versioning.md").read_text("utf-8").partition("## What each release")[0]
    named = set(re.findall(r"`(fastkv(?:\.[a-z]+)*)(?:\.__all__|\.…)?`", table))
    named -= {"fastkv.ops.reference", "fastkv.ops.cuda"}
    assert named - {"fastkv.integrations"} <= set(public.MODULES)
    folder = ROOT / "fastkv/integrations"
    found = {path.stem for path in folder.iterdir() if not path.stem.startswith("_")}
    inside = "fastkv.integrations."
    assert {n.removeprefix(inside) for n in public.MODULES if n.startswith(inside)} == found


@pytest.mark.parametrize("module", sorted(set(public.MODULES) - ELSEWHERE - {"fastkv.errors"}))
def test_names_are_those_of_the_module(module):
    assert public.names(module) == importlib.import_module(module).__all__


@pytest.mark.parametrize("module", ["fastkv.errors", "fastkv.integrations.torch"])
def test_without_a_list_a_module_has_what_it_defines(module):
    names = public.names(module)
    tree = ast.parse(public.source(module).read_text("utf-8"))
    defined = {node.name for node in ast.walk(tree) if hasattr(node, "name")}
    assert {"ContractError", "paged_attention"} & set(names)
    assert set(names) <= defined
    assert not [name for name in names if name.startswith("_")]


def test_a_name_that_is_missing_is_found():
    without = LISTED - {"fastkv.spec.CacheSpec", "fastkv.CacheSpec"}
    assert public.missing(without) == ["fastkv.CacheSpec"]


def test_a_module_is_not_its_function():
    own = "fastkv.ops.merge_states.merge_states"
    assert own in LISTED
    assert public.missing({*LISTED, "fastkv.ops.merge_states"} - {own}) == [
        "fastkv.ops.merge_states"
    ]


def test_what_was_rendered_is_read_from_the_inventory(tmp_path):
    lines = b"fastkv.ops.check_step py:function 1 api/#$ -\nfastkv.rope.Rope py:class 1 api/#$ -\n"
    head = b"# Sphinx inventory version 2\n# Project: fastkv\n# Version: 0\n# zlib\n"
    (tmp_path / "objects.inv").write_bytes(head + zlib.compress(lines))
    assert public.rendered(tmp_path / "objects.inv") == {
        "fastkv.ops.check_step",
        "fastkv.rope.Rope",
    }


def test_what_pages_list_is_read_from_their_directives(tmp_path):
    (tmp_path / "a.md").write_text(
        "::: fastkv.spec\n    options:\n      members: [CacheSpec, TensorSpec]\n\n"
        "::: fastkv.ops.copy_pages.copy_pages\n    options:\n      heading: copy_pages\n\n"
        "::: fastkv.rope.Rope\n"
    )
    assert public.listed(tmp_path) == {
        "fastkv.spec",
        "fastkv.spec.CacheSpec",
        "fastkv.spec.TensorSpec",
        "fastkv.ops.copy_pages.copy_pages",
        "fastkv.rope.Rope",
    }
