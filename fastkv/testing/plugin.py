# SPDX-License-Identifier: Apache-2.0
"""The pytest plugin: fixtures, and nothing else.

pytest loads it in every suite of an environment that has fastkv, so it imports no other part of
fastkv before a test asks for a fixture.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from types import ModuleType
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from fastkv.spec import CacheSpec
    from fastkv.testing.recording import RecordingOps


@pytest.fixture
def recording_ops() -> "RecordingOps":
    """Ops that record each call and return sentinels (fastkv)."""
    from fastkv.testing.recording import RecordingOps

    return RecordingOps()


@pytest.fixture
def sentinel_spec(request: pytest.FixtureRequest) -> "CacheSpec":
    """A small CacheSpec with one layer in each format (fastkv).

    Parametrized with `indirect=True`, its three layers are in the format given, or one layer in
    each of a list of formats.
    """
    from fastkv.quant import QUANT_SPECS
    from fastkv.testing.conformance.cases import small_spec

    quant = getattr(request, "param", tuple(QUANT_SPECS))
    return small_spec((quant,) * 3 if isinstance(quant, str) else tuple(quant))


@pytest.fixture
def stub_module() -> Iterator[Callable[..., ModuleType]]:
    """`stub_module("a.b", name=value)` lends sys.modules a module for the test (fastkv)."""
    from fastkv.testing.stubs import stub_module

    with ExitStack() as undo:

        def stub(name: str, /, **attributes: Any) -> ModuleType:
            return undo.enter_context(stub_module(name, **attributes))

        yield stub
