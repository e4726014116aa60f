# SPDX-License-Identifier: Apache-2.0
"""Run a file as several processes, the ranks of a group, and collect what each found."""

import os
import pickle
import subprocess
import sys
import time
from pathlib import Path

TESTS = Path(__file__).resolve().parents[1]


def run_ranks(worker, size, folder, *arguments, timeout=100, may_die=()):
    """What the ranks leave, in their order; None of a rank that may die.

    Args:
        worker: name of a module of `helpers`; run with rank, size, folder and the arguments.
        size: number of processes.
        folder: an empty one; each rank writes `<rank>.pkl` there.
        arguments: further ones, strings.
        timeout: seconds until all are killed, which fails.
        may_die: ranks whose exit code does not count.
    """
    paths = [str(TESTS), *filter(None, [os.environ.get("PYTHONPATH")])]
    # One thread a rank: more only wait for each other.
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", f"helpers.{worker}"]
    processes = []
    for rank in range(size):
        with (folder / f"{rank}.log").open("w") as log:
            own = [*command, str(rank), str(size), str(folder), *arguments]
            processes.append(subprocess.Popen(own, env=environment, stdout=log, stderr=log))
    deadline = time.monotonic() + timeout
    try:
        for process in processes:
            process.wait(max(0.1, deadline - time.monotonic()))
    finally:
        for process in processes:
            process.kill()
            process.wait()
    for rank, process in enumerate(processes):
        said = (folder / f"{rank}.log").read_text()
        assert process.returncode == 0 or rank in may_die, f"rank {rank}: {said}"
    return [load(folder / f"{rank}.pkl") for rank in range(size)]


def load(path):
    return pickle.loads(path.read_bytes()) if path.exists() else None


def leave(folder, rank, found):
    """Write what a rank found, for `run_ranks`."""
    (Path(folder) / f"{rank}.pkl").write_bytes(pickle.dumps(found))
