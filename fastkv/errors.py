# SPDX-License-Identifier: Apache-2.0
"""What fastkv raises.

Every error about an argument is a `ContractError` and carries, as attributes and in its text, the
op, the argument, the format of the cache, what was expected and what came.
"""

from collections.abc import Iterable, Sequence


class FastKVError(Exception):
    """Base of everything that fastkv raises."""


class ContractError(FastKVError, ValueError):
    """An argument breaks the contract of an op or a policy.

    Args:
        op: the op or policy function that was called.
        argument: the argument at fault, spelled as the caller spells it.
        expected: what the contract asks for.
        got: what came instead.
        format: the cache format in use; None where no format takes part.
        hint: one more sentence: what to do about it.
    """

    def __init__(
        self,
        op: str,
        argument: str,
        *,
        expected: str,
        got: str,
        format: str | None = None,  # noqa: A002 - the public term for a cache format
        hint: str = "",
    ) -> None:
        self.op = op
        self.argument = argument
        self.format = format
        self.expected = expected
        self.got = got
        self.hint = hint
        super().__init__(str(self))

    def __str__(self) -> str:
        where = f"{self.op}: {self.argument}"
        if self.format is not None:
            where += f" (format {self.format})"
        text = f"{where}: expected {self.expected}, got {self.got}"
        return f"{text}. {self.hint}" if self.hint else text

    def __reduce__(self) -> tuple[object, ...]:
        # The default would call the class with the text alone; engines send errors between
        # worker processes.
        state = {name: getattr(self, name) for name in ("expected", "got", "format", "hint")}
        return (_rebuild, (type(self), self.op, self.argument, state))


def _rebuild(cls: type[ContractError], op: str, argument: str, state: dict[str, str]) -> object:
    return cls(op, argument, **state)


class MissingTensorError(ContractError):
    """A tensor that the format or the op requires is absent."""


class SurplusTensorError(ContractError):
    """A tensor was given that the format or the op has no use for."""


class ShapeError(ContractError):
    """A tensor has another shape than its place asks for."""


class DtypeError(ContractError, TypeError):
    """A tensor has another dtype than its place asks for, or is no tensor."""


class PlacementError(ContractError):
    """Tensors of one call live in different libraries or on different devices."""


class ReadOnlyError(ContractError):
    """A tensor that the op writes cannot be written."""


class LayerIndexError(ContractError, IndexError):
    """A layer id is outside the spec."""


class SpecError(ContractError):
    """A `CacheSpec` cannot be built from these values."""


class SpecMismatchError(ContractError):
    """The cache list or the layer does not fit the spec."""


class ScaleError(ContractError):
    """Static scales or zero points that no op can use."""


class BatchValueError(ContractError):
    """A value in the batch's metadata is out of its range; names request and row."""


class UnsupportedError(ContractError, NotImplementedError):
    """A legal request that this backend or this build does not serve; says which does."""


class UnknownNameError(ContractError):
    """A format or backend name that nobody knows; the text lists the known ones."""


class RankMismatchError(ContractError):
    """Ranks of a group make different calls; every rank raises it, and nothing was merged."""


class CollectiveError(FastKVError, RuntimeError):
    """A message between ranks did not arrive: a rank is gone, or the deadline has passed.

    Args:
        op: what needed the message.
        rank: this process's rank in the group.
        size: ranks of the group.
        reason: what the communication library said.
    """

    def __init__(self, op: str, rank: int, size: int, reason: str) -> None:
        self.op = op
        self.rank = rank
        self.size = size
        self.reason = reason
        super().__init__(f"{op}: rank {rank} of {size} did not get all ranks' messages: {reason}")

    def __reduce__(self) -> tuple[object, ...]:
        return (type(self), (self.op, self.rank, self.size, self.reason))


class BlockIdError(ContractError, IndexError):
    """A block id outside the cache, one that comes twice, or lists of ids that do not match."""


class BlockSizeError(ContractError):
    """The bytes that should become a block are not as many as a block has."""


class FingerprintError(FastKVError, ValueError):
    """Two caches whose blocks mean different things; names each field that differs.

    Args:
        op: what compared the two.
        differences: `(field, ours, theirs)`, the values as text.
    """

    def __init__(self, op: str, differences: Sequence[tuple[str, str, str]]) -> None:
        self.op = op
        self.differences = tuple((name, ours, theirs) for name, ours, theirs in differences)
        parts = "; ".join(f"{name}: ours {a}, theirs {b}" for name, a, b in self.differences)
        super().__init__(f"{op}: the peer's cache differs in {parts}")

    def __reduce__(self) -> tuple[object, ...]:
        return (type(self), (self.op, self.differences))


class MalformedError(FastKVError, ValueError):
    """Bytes from outside this process that are not what they should be.

    Args:
        op: what read them.
        reason: what is wrong with them.
    """

    def __init__(self, op: str, reason: str) -> None:
        self.op = op
        self.reason = reason
        super().__init__(f"{op}: {reason}")

    def __reduce__(self) -> tuple[object, ...]:
        return (type(self), (self.op, self.reason))


class TransferError(FastKVError, RuntimeError):
    """Blocks cannot be moved: no connection, no free blocks, an engine that refuses.

    Args:
        op: what needed it.
        reason: what went wrong.
    """

    def __init__(self, op: str, reason: str) -> None:
        self.op = op
        self.reason = reason
        super().__init__(f"{op}: {reason}")

    def __reduce__(self) -> tuple[object, ...]:
        return (type(self), (self.op, self.reason))


class SelectionError(FastKVError, ValueError):
    """No backend serves the request.

    Args:
        request: what was asked for, in words.
        rejected: `(backend, reason)` pairs.
    """

    def __init__(self, request: str, rejected: Sequence[tuple[str, str]]) -> None:
        self.request = request
        self.rejected = tuple(rejected)
        reasons = "; ".join(f"{name}: {reason}" for name, reason in rejected)
        super().__init__(f"select_backend: no backend serves {request}: {reasons}")

    def __reduce__(self) -> tuple[object, ...]:
        return (type(self), (self.request, self.rejected))


class MissingDependencyError(FastKVError, ImportError):
    """An optional package is absent; the text is the line that installs it.

    Args:
        purpose: what needs the package.
        package: its name.
        install: the command that installs it.
    """

    def __init__(self, purpose: str, package: str, install: str) -> None:
        self.purpose = purpose
        self.package = package
        self.install = install
        super().__init__(f"{purpose} needs {package}, which is not installed: {install}")

    def __reduce__(self) -> tuple[object, ...]:
        return (type(self), (self.purpose, self.package, self.install))


class ScaleWarning(UserWarning):
    """Static scales that are legal and look like a mistake."""


def unknown_name(op: str, argument: str, got: object, known: Iterable[str]) -> UnknownNameError:
    """The error for a name outside a table: lists the table, and suggests the nearest name."""
    from difflib import get_close_matches  # only on the way out: keeps `import fastkv` fast

    names, text = list(known), str(got).lower()
    # "fp8" is part of "cache_fp8" and still far from it by the measure of difflib.
    within = [name for name in names if text in name] if text else []
    close = get_close_matches(text, within or names, n=1, cutoff=0.0 if within else 0.6)
    hint = f"Did you mean {close[0]!r}?" if close else ""
    return UnknownNameError(
        op, argument, expected=f"one of {', '.join(names)}", got=repr(got), hint=hint
    )
