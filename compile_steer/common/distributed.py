"""Several processes on one command, started by torchrun or `accelerate launch`: each works on its share of the texts.

All processes run the same code on the same texts in the same order. What runs a model takes its `share` of the texts, and
what it found is summed or gathered, so that every process goes on with the numbers that one process would have, to
rounding. What is written, and what is read back to decide whether work can be kept, goes through rank 0 alone (`first`).
"""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import TYPE_CHECKING, TypeVar, cast

from compile_steer.common.errors import CompileSteerError, RecipeError, brief

if TYPE_CHECKING:
    import torch
    from torch import Tensor

T = TypeVar("T")
R = TypeVar("R")
# Rank 0 may write a checkpoint while the others wait. A process that ends is noticed at once, whatever the limit.
_PATIENCE = timedelta(days=2)
_alone = False  # rank 0 works while the others wait


def join() -> None:
    """Join the other processes; does nothing in a single process. Raises `RecipeError` where there is no launcher."""
    if count() == 1:
        return
    import torch
    from accelerate import PartialState

    gpu = torch.cuda.is_available()
    if "LOCAL_RANK" not in os.environ:
        raise RecipeError(
            f"WORLD_SIZE is {count()}, but LOCAL_RANK is not set: use torchrun --nproc_per_node N -m compile_steer, or unset it."
        )
    with _together():
        # Both backends: sums on GPUs travel by NCCL, and what is on the CPU by gloo.
        PartialState(cpu=not gpu, timeout=_PATIENCE, **({"backend": "cpu:gloo,cuda:nccl"} if gpu else {}))


def leave() -> None:
    """Leave the other processes."""
    if count() > 1:
        from accelerate import PartialState

        if PartialState._shared_state:
            PartialState().destroy_process_group()


def for_children() -> dict[str, str]:
    """Return the environment variables with which the child processes of all processes find each other."""
    if count() == 1:
        return {}

    def free_port() -> str:
        with socket.socket() as listener:
            listener.bind(("", 0))
            return str(listener.getsockname()[1])

    # The launcher's own meeting place keeps what the parents left there.
    return {"MASTER_PORT": first(free_port), "TORCHELASTIC_USE_AGENT_STORE": "False"}


def rank() -> int:
    """Return this process's number, 0 in a single process. Only rank 0 writes and prints."""
    number = _number("RANK", 0)
    if number >= _number("WORLD_SIZE", 1, least=1):  # nothing would be written, by nobody
        raise RecipeError(
            f"the environment variable RANK is {number}, of {count()} processes (WORLD_SIZE); unset both, or use torchrun."
        )
    return number


def count() -> int:
    """Return how many processes share the work."""
    number = _number("WORLD_SIZE", 1, least=1)
    return 1 if _alone else number


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


@contextmanager
def _together() -> Iterator[None]:
    """Around what needs all processes; torch says `RuntimeError` where one has left."""
    try:
        yield
    except RuntimeError as error:
        reason = next(iter(str(error).splitlines()), "")
        raise RecipeError(
            f"process {rank()} has lost the others ({brief(reason)}): one of them ended, or cannot be reached. See what that one "
            "said; the same command goes on where it was."
        ) from error


def share(items: Sequence[T]) -> list[T]:
    """Return this process's share: every `count()`-th item from its own number on."""
    return list(items[rank() :: count()]) if count() > 1 else list(items)


def gather(value: T) -> list[T]:
    """Return the value of each process, by rank; none may hold a tensor of a GPU."""
    if count() == 1:
        return [value]
    from accelerate.utils import gather_object

    with _together():
        return cast(list[T], gather_object([value]))


def spread(items: Sequence[T], work: Callable[[list[T]], list[R]]) -> list[R]:
    """Have each process `work` on its share; returns one result an item, in the order of the items."""
    own = share(items)
    parts = gather(work(own) if own else [])
    return [parts[number % count()][number // count()] for number in range(len(items))]


def concatenate(parts: Sequence[Tensor], device: torch.device) -> Tensor:
    """Return the tensors of all processes in one on `device`, those of rank 0 first; a process may have none."""
    import torch

    if count() > 1:
        parts = [part.to(device) for parts in gather([part.cpu() for part in parts]) for part in parts]
    return torch.cat(list(parts))


def first(work: Callable[[], T]) -> T:
    """Have rank 0 do `work` alone, once all have come here; returns its result, or raises its error, in every process."""
    global _alone  # noqa: PLW0603  (whatever `work` calls must share nothing)
    if count() == 1:
        return work()
    gather(None)
    outcome: T | CompileSteerError | None = None
    if rank() == 0:
        _alone = True
        try:
            outcome = work()
        except CompileSteerError as error:
            outcome = error
        finally:
            _alone = False
    outcome = gather(outcome)[0]
    if isinstance(outcome, CompileSteerError):
        raise outcome
    return cast(T, outcome)


def sum_over_all(*tensors: Tensor) -> None:
    """Replace each tensor by its sum over the processes; those of one kind travel together."""
    if count() == 1:
        return
    import torch
    import torch.distributed as dist

    kinds: dict[object, list[Tensor]] = {}
    for tensor in tensors:
        kinds.setdefault((tensor.dtype, tensor.device), []).append(tensor)
    for same in kinds.values():
        flat = torch.cat([tensor.detach().flatten() for tensor in same])
        with _together():
            dist.all_reduce(flat)
        for tensor, part in zip(same, flat.split([tensor.numel() for tensor in same]), strict=True):
            tensor.detach().copy_(part.view_as(tensor))
