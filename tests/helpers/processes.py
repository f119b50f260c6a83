"""Several processes of one command, forked, so that no library is imported again."""

from __future__ import annotations

import multiprocessing
import os
import socket
from collections.abc import Callable


def run_in_processes(count: int, work: Callable[[], None]) -> list[int | None]:
    """Run `work` in `count` processes that have joined each other, as torchrun starts them; returns their exit codes."""
    with socket.socket() as one:
        one.bind(("", 0))
        port = one.getsockname()[1]

    def enter(rank: int) -> None:
        settings = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count}
        os.environ |= {name: str(value) for name, value in settings.items()}
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
        import torch
        from accelerate.state import AcceleratorState

        from compile_steer.common import distributed

        torch.set_num_threads(1)
        AcceleratorState._reset_state(reset_partial_state=True)  # a trainer that ran before in this process was alone
        distributed.join()
        work()
        distributed.leave()

    fork = multiprocessing.get_context("fork")
    processes = [fork.Process(target=enter, args=(rank,)) for rank in range(count)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
        process.kill()
    return [process.exitcode for process in processes]
