# SPDX-License-Identifier: Apache-2.0
"""A JSON object of a config, whose values are checked as they are read."""

import reprlib
from collections.abc import Mapping
from dataclasses import dataclass

from fastkv.errors import SpecError, UnsupportedError

_MAX_WIDTH = 2**24


@dataclass(frozen=True, slots=True)
class Section:
    """A JSON object, and where it lies, for the errors.

    Attributes:
        source: names the file.
        prefix: the keys that lead to the object, each with a dot behind it.
        values: the object.
    """

    source: str
    prefix: str
    values: Mapping[str, object]

    def section(self, key: str) -> "Section | None":
        """The object under a key; None if there is none or it is null."""
        value = self.values.get(key)
        if value is None:
            return None
        if not isinstance(value, Mapping):
            raise self.wrong(key, "a JSON object")
        return Section(self.source, f"{self.prefix}{key}.", value)

    def integer(self, key: str, most: int = _MAX_WIDTH) -> int:
        """An integer of at least 1."""
        value = self.values.get(key)
        if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= most:
            raise self.wrong(key, f"an integer from 1 to {most}")
        return value

    def boolean(self, key: str) -> bool:
        """True or false; absent and null are false."""
        value = self.values.get(key)
        if value is not None and not isinstance(value, bool):
            raise self.wrong(key, "true or false")
        return bool(value)

    def wrong(self, key: str, expected: str) -> SpecError:
        """The error for a value that no cache can have."""
        return SpecError(self.source, self.prefix + key, expected=expected, got=self._got(key))

    def refused(self, key: str, expected: str, quant: str | None = None) -> UnsupportedError:
        """The error for a value that says of a cache that fastkv does not have."""
        name = self.prefix + key
        return UnsupportedError(
            self.source, name, format=quant, expected=expected, got=self._got(key)
        )

    def _got(self, key: str) -> str:
        return reprlib.repr(self.values[key]) if key in self.values else "nothing"
