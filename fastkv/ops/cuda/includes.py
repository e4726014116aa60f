# SPDX-License-Identifier: Apache-2.0
"""Which files a kernel is compiled from: its `.cu`, and every header that it may include.

The text is searched without a preprocessor: an include that is commented out or switched off
counts, and one that cannot be followed raises. A file too many costs a compilation; a file too
few would leave an old binary in use.
"""

import re
from collections.abc import Iterator
from pathlib import Path
from posixpath import dirname, join, normpath

#: The folder of the formats' codecs. A specialization names one of its headers.
CODECS = "codecs"
#: The macros that stand for a header, each with the folder that the header lies in.
HEADER_MACROS = {"FASTKV_CODEC_HEADER": CODECS}

_SPLICE = re.compile(r"\\[ \t]*\n")
_GAP = r"(?:[ \t\v\f]|/\*(?:(?!\*/).)*\*/)*"
# Not bound to the start of a line, where a comment may stand before the directive.
_INCLUDE = re.compile(
    rf"(?:\#|%:){_GAP}(?:include|include_next|import)\b{_GAP}"
    r'(?:"(?P<quoted>[^"\n]+)"|<(?P<angled>[^>\n]+)>|(?P<macro>\w*))',
    re.DOTALL,
)


def closure(folder: Path, source: str) -> list[Path]:
    """A source of `folder` and all that it includes, directly or not; sorted.

    Args:
        folder: where the kernels lie, and where their includes are looked for.
        source: path of the source, from `folder`.

    Raises:
        FileNotFoundError: the source, or what it includes, is not in the folder.
        ValueError: an include by a macro that is none of `HEADER_MACROS`.
    """
    found: set[str] = set()
    ahead = [source]
    while ahead:
        name = ahead.pop()
        if name not in found:
            found.add(name)
            ahead += _included(folder, name)
    return sorted(folder / name for name in found)


def _included(folder: Path, name: str) -> Iterator[str]:
    """The files that the file `name` may include itself, as paths from `folder`."""
    text = _SPLICE.sub("", (folder / name).read_text("utf-8"))
    for include in _INCLUDE.finditer(text):
        macro, quoted = include["macro"], include["quoted"]
        if macro is not None:
            headers = _of_macro(folder, name, macro)
        else:
            # A header beside the one that includes it hides one of the folder: both count.
            beside = [join(dirname(name), quoted)] if quoted else []
            headers = [normpath(at) for at in (*beside, quoted or include["angled"])]
            headers = [at for at in headers if _is_within(folder, at)]
        if not headers:
            raise FileNotFoundError(f"{name}: no file of the kernels for `{include[0]}`")
        yield from headers


def _of_macro(folder: Path, name: str, macro: str) -> list[str]:
    """Every header that a macro may stand for."""
    if macro not in HEADER_MACROS:
        known = ", ".join(HEADER_MACROS)
        raise ValueError(f"{name}: expected an include by name or by {known}, got `{macro}`")
    headers = (folder / HEADER_MACROS[macro]).rglob("*.cuh")
    return [path.relative_to(folder).as_posix() for path in headers]


def _is_within(folder: Path, name: str) -> bool:
    """Whether there is such a file, and not outside the folder."""
    return not name.startswith(("/", "../")) and (folder / name).is_file()
