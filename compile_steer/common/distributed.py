"""Several processes on one compile, started by torchrun: each holds a share of the texts, and only sums travel."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from compile_steer.common.errors import RecipeError

T = TypeVar("T")


def join() -> None:
    """Meet the other processes that torchrun started with this one; nothing where it is alone."""
    if count() > 1 and not dist.is_initialized():
        if torch.cuda.is_available():
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        # Both: on GPUs the sums travel by NCCL, and what is on the CPU by gloo.
        dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo")


def leave() -> None:
    """Part from the others, after all have come here."""
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()


def rank() -> int:
    """This process's number, 0 where it is alone; 0 is the one that writes."""
    return int(os.environ.get("RANK", "0"))


def count() -> int:
    """How many processes torchrun started."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def require_alone(what: str) -> None:
    """Raise `RecipeError` where several processes would do `what` at once."""
    if count() > 1:
        raise RecipeError(f"{what} runs in one process; start it without torchrun.")


def share(items: Sequence[T]) -> list[T]:
    """This process's share: every `count()`-th from its own number on."""
    return list(items[rank() :: count()])


def sum_over_all(*tensors: Tensor) -> None:
    """Replace each tensor by its sum over the processes."""
    if count() > 1:
        for tensor in tensors:
            dist.all_reduce(tensor)
