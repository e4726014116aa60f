# SPDX-License-Identifier: Apache-2.0
"""A rank of a gloo group of Paddle: cases of context parallelism, and gathered heads."""

import os
import sys


def main(rank, size, folder, port):
    addresses = [f"127.0.0.1:{int(port) + 1 + r}" for r in range(size)]
    os.environ |= {
        "PADDLE_TRAINER_ID": str(rank),
        "PADDLE_TRAINERS_NUM": str(size),
        "PADDLE_MASTER": f"127.0.0.1:{port}",
        "PADDLE_TRAINER_ENDPOINTS": ",".join(addresses),
        "PADDLE_CURRENT_ENDPOINT": addresses[rank],
        "PADDLE_DISTRI_BACKEND": "gloo",
    }
    import paddle
    import paddle.distributed as dist

    from fastkv import CacheSpec
    from fastkv.distributed import ContextParallel, TensorParallel
    from fastkv.errors import RankMismatchError
    from helpers.parallel_cases import CASES, P, run
    from helpers.ranks import leave

    paddle.set_device("cpu")
    dist.init_parallel_env()
    group = dist.new_group(list(range(size)), backend="gloo")
    found = {}
    for name, case in CASES.items():
        context = ContextParallel(group, case.get("page", P), timeout=20)
        found[name] = run(context, name, "paddle")
    heads = TensorParallel(group, CacheSpec(1, 2, 16, 4), 4, timeout=20)
    out = heads.all_gather(paddle.full([3, 2, 16], float(rank), "bfloat16"))
    found["heads"] = out.astype("float32").numpy()
    try:
        heads.all_gather(paddle.zeros([1 + rank, 2, 16]))
    except RankMismatchError as error:
        found["at odds"] = str(error)
    leave(folder, rank, found)
    os._exit(0)  # Paddle's store would wait for the others


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], sys.argv[4])
