# SPDX-License-Identifier: Apache-2.0
"""A hook of mkdocs: the build fails unless the pages document every public name.

mkdocstrings leaves out a member that it does not find, without a word, and nobody remembers to list
a new one. What counts is what was rendered: the build's own inventory, `objects.inv`. The names are
read from the sources, since the environment that builds the pages has not installed fastkv.

A function whose module has its name, an op say, is such a member: `fastkv.ops.merge_states` is the
module to mkdocstrings. Pages name it `fastkv.ops.merge_states.merge_states`, with a heading.
"""

import ast
import re
import zlib
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
#: The modules that docs/versioning.md calls public.
MODULES = (
    "fastkv",
    "fastkv.backends",
    "fastkv.distributed",
    "fastkv.errors",
    "fastkv.integrations.fastdeploy",
    "fastkv.integrations.torch",
    "fastkv.integrations.transformers",
    "fastkv.ops",
    "fastkv.testing",
    "fastkv.testing.conformance",
    "fastkv.store",
    "fastkv.transfer",
)

_DIRECTIVE = re.compile(
    r"^::: (\S+)\n(?:    (options):\n(?:      members: \[(.*?)\]\n?|      heading: .*\n?))?",
    re.MULTILINE,
)


def on_post_build(config: Any, **_: Any) -> None:
    """Called by mkdocs when all pages are written."""
    from mkdocs.exceptions import PluginError

    found = rendered(Path(config.site_dir) / "objects.inv")
    absent = missing(found)
    if absent:
        raise PluginError(f"public names that no page documents: {', '.join(absent)}")
    lost = sorted(listed() - found)
    if lost:
        raise PluginError(f"listed on a page, and not rendered: {', '.join(lost)}")


def rendered(inventory: Path) -> set[str]:
    """The paths of everything that mkdocstrings rendered."""
    *_, packed = inventory.read_bytes().split(b"\n", 4)
    return {line.split(" ", 1)[0] for line in zlib.decompress(packed).decode().splitlines()}


def listed(pages: Path = ROOT / "docs") -> set[str]:
    """The paths that pages ask mkdocstrings for."""
    found = set()
    for page in pages.rglob("*.md"):
        for path, options, members in _DIRECTIVE.findall(page.read_text("utf-8")):
            inside = members.split(", ") if members else []
            if not options and source(path) is not None:
                inside = names(path)
            found |= {path, *(f"{path}.{name}" for name in inside)}
    return found


def missing(documented: Collection[str], modules: tuple[str, ...] = MODULES) -> list[str]:
    """Public names that stand among the documented paths under none of their own."""
    return [
        f"{module}.{name}"
        for module in modules
        for name in names(module)
        if not any(path in documented for path in paths(module, name))
    ]


def names(module: str) -> list[str]:
    """The public names of a module: its `__all__`, or what it defines without an underscore."""
    tree = parsed(module)
    for node in tree.body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__":
            return list(ast.literal_eval(node.value))
    defined = [node.name for node in tree.body if isinstance(node, ast.FunctionDef | ast.ClassDef)]
    return [name for name in defined if not name.startswith("_")]


def paths(module: str, name: str) -> Iterator[str]:
    """Where a name can be documented: under the module, and where that imports it from."""
    imports = [node for node in ast.walk(parsed(module)) if isinstance(node, ast.ImportFrom)]
    sources = {
        node.module
        for node in imports
        if node.module and name in [alias.name for alias in node.names]
    }
    # Where a function and its module share a name, that path is the module's.
    if f"{module}.{name}" not in sources:
        yield f"{module}.{name}"
    for origin in sources - {module}:
        yield from paths(origin, name)


def parsed(module: str) -> ast.Module:
    """A module's source."""
    path = source(module)
    assert path is not None, f"{module} is a module of fastkv"
    return ast.parse(path.read_text("utf-8"))


def source(module: str) -> Path | None:
    """A module's file, if it is one."""
    base = ROOT.joinpath(*module.split("."))
    found = (base / "__init__.py", base.with_suffix(".py"))
    return next((path for path in found if path.exists()), None)
