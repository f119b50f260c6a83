"""Several processes on one compile, started by torchrun: each holds a share of the texts, and only sums are exchanged."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, TypeVar

from compile_steer.common.errors import RecipeError, brief

if TYPE_CHECKING:
    from torch import Tensor

T = TypeVar("T")


def join() -> None:
    """Join the process group of the processes that torchrun started; does nothing in a single process."""
    if count() > 1:
        import torch
        import torch.distributed as dist

        if not dist.is_initialized():
            if torch.cuda.is_available():
                torch.cuda.set_device(_number("LOCAL_RANK", 0))
            # Both backends: sums on GPUs travel by NCCL, and what is on the CPU by gloo.
            dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo")


def leave() -> None:
    """Leave the process group, after all processes have come here."""
    if count() > 1:
        import torch.distributed as dist

        dist.barrier()
        dist.destroy_process_group()


def rank() -> int:
    """Return this process's number, 0 in a single process. Only rank 0 writes and prints."""
    number = _number("RANK", 0)
    if number >= count():  # nothing would be written, by nobody
        raise RecipeError(
            f"the environment variable RANK is {number}, of {count()} processes (WORLD_SIZE); unset both, or use torchrun."
        )
    return number


def count() -> int:
    """Return how many processes torchrun started."""
    return _number("WORLD_SIZE", 1, least=1)


def _number(name: str, default: int, least: int = 0) -> int:
    """An environment variable that torchrun sets; raises `RecipeError` where something else has set it."""
    value = os.environ.get(name, str(default))
    if not value.isascii() or not value.isdecimal() or len(value) > 9 or int(value) < least:
        needed = f"a number from {least} on, as torchrun sets it, or none"
        raise RecipeError(f"the environment variable {name} is {brief(value)}; needed: {needed}.")
    return int(value)


def require_alone(task: str) -> None:
    """Raise `RecipeError` where several processes would do `task` at once."""
    if count() > 1:
        raise RecipeError(f"{task} runs in one process; start it without torchrun.")


def share(items: Sequence[T]) -> list[T]:
    """Return this process's share: every `count()`-th item from its own number on."""
    return list(items[rank() :: count()])


def sum_over_all(*tensors: Tensor) -> None:
    """Replace each tensor by its sum over the processes."""
    if count() > 1:
        import torch.distributed as dist

        for tensor in tensors:
            dist.all_reduce(tensor)
