# SPDX-License-Identifier: Apache-2.0
"""Redis or Valkey, over redis-py."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from fastkv.contracts.numbers import is_finite
from fastkv.errors import SpecError
from fastkv.optional import require


class RedisBackend:
    """One Redis or Valkey server, over one connection that is made when first needed.

    A batch is one pipeline without a transaction: what a server that runs out of memory took
    stays. No command is tried twice: the next request is.

    Args:
        url: as redis-py takes it: `redis://host:6379/0`, `rediss://user:password@host:6379` with
            TLS and an ACL user, `unix:///path`. TLS's certificates are options of the URL:
            `?ssl_ca_certs=/path`.
        timeout: seconds to connect, and without a byte from the server. `PageStore` has a deadline
            for whole calls besides; this one frees the connection of a server that hangs.
        ttl: seconds that the server keeps a value; None leaves it to the server's eviction.

    Raises:
        MissingDependencyError: redis-py is not installed.
        SpecError: a timeout or a ttl that is not above 0.
        ValueError: redis-py does not know the URL's scheme.
    """

    def __init__(self, url: str, *, timeout: float = 1.0, ttl: float | None = None) -> None:
        for name, value in (("timeout", timeout), ("ttl", 1 if ttl is None else ttl)):
            if not is_finite(value) or value <= 0:
                raise SpecError("RedisBackend", name, expected="a number above 0", got=repr(value))
        redis = require("redis", "RedisBackend", "pip install 'fastkv[transfer]'")
        from redis.backoff import NoBackoff
        from redis.retry import Retry

        self._errors: Any = redis.exceptions
        self._expiry: dict[str, int] = {} if ttl is None else {"px": max(1, round(ttl * 1000))}
        self._client: Any = redis.Redis.from_url(
            url,
            socket_timeout=timeout,
            socket_connect_timeout=timeout,
            # By default redis-py tries three times more, which is three more timeouts.
            retry=Retry(NoBackoff(), 0),
            decode_responses=False,
        )

    def mset(self, items: Sequence[tuple[bytes, bytes | memoryview]]) -> list[bool]:
        """Keep values under their names; whether the server took each."""
        pipeline = self._client.pipeline(transaction=False)
        for name, value in items:
            pipeline.set(name, value, **self._expiry)
        return [reply is True for reply in self._execute(pipeline)]

    def mget(self, names: Sequence[bytes], limit: int) -> list[bytes | None]:
        """The first `limit` bytes of each value, None of a name that is not there."""
        pipeline = self._client.pipeline(transaction=False)
        for name in names:
            # Not MGET: a foreign value of 512 MB under one of our names would come whole.
            pipeline.getrange(name, 0, limit - 1)
        replies = self._execute(pipeline)
        # An absent name reads as an empty string; a value of another type as an error.
        return [reply if isinstance(reply, bytes) and reply else None for reply in replies]

    def exists(self, names: Sequence[bytes]) -> list[bool]:
        """Whether each name is there."""
        pipeline = self._client.pipeline(transaction=False)
        for name in names:
            pipeline.exists(name)
        return [reply == 1 for reply in self._execute(pipeline)]

    def close(self) -> None:
        """Shut down the connection."""
        self._client.close()

    def _execute(self, pipeline: Any) -> list[Any]:
        with self._translated():
            replies: list[Any] = pipeline.execute(raise_on_error=False)
        errors = [reply for reply in replies if isinstance(reply, Exception)]
        # One that refuses every command (no permission, a replica) is no empty store.
        if errors and len(errors) == len(replies) and not self._of_one_value(errors[0]):
            raise ConnectionError(str(errors[0])) from errors[0]
        return replies

    def _of_one_value(self, error: Exception) -> bool:
        """Whether the next value may fare better: no room for it, or a list in its place."""
        no_room: Any = self._errors.OutOfMemoryError
        return isinstance(error, no_room) or str(error).startswith("WRONGTYPE")

    @contextmanager
    def _translated(self) -> Iterator[None]:
        try:
            yield
        except self._errors.TimeoutError as error:
            raise TimeoutError(str(error)) from error
        except self._errors.RedisError as error:
            raise ConnectionError(str(error)) from error
