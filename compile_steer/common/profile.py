"""Where the time goes: seconds, tokens, arithmetic and peak memory of each phase, from the bars that a command shows anyway.

Arithmetic is counted as it is done, by torch's own formulas for matrix products, convolutions and attention; the machine's
rate is that of a large matrix product, measured in the same run. Counting costs a few per cent.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from threading import Event, Thread
from typing import Any

from compile_steer.common.progress import Advance, Progress

_OUTSIDE = "between phases"  # loading, statistics, hashing


@dataclass
class Phase:
    """All work of one label: `flops` are floating-point operations, `tokens` those that went into the model."""

    label: str
    seconds: float = 0.0
    tokens: int = 0
    flops: float = 0.0
    peak_bytes: int = 0


def own_memory() -> int:
    """Bytes of this process but for pages of files, which the kernel drops when it needs room; 0 where that is not known."""
    try:
        lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    except OSError:
        return 0
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith("RssAnon")), 0)


@dataclass
class PeakMemory:
    """The most memory that was in use since `restart`: of the GPU if there is one, else of this process, looked at every 20 ms."""

    _peak: int = 0
    _done: Event = field(default_factory=Event)

    def __post_init__(self) -> None:
        import torch

        self._gpu = torch.cuda.is_available()
        if not self._gpu:
            Thread(target=self._watch, daemon=True).start()

    def _watch(self) -> None:
        while not self._done.wait(0.02):
            self._peak = max(self._peak, own_memory())

    def restart(self) -> int:
        """The peak since the last call."""
        import torch

        if self._gpu:
            torch.cuda.synchronize()  # what was asked for before belongs to the phase that asked
            peak = torch.cuda.max_memory_allocated()
            torch.cuda.reset_peak_memory_stats()
            return peak
        peak, self._peak = max(self._peak, own_memory()), 0
        return peak

    def stop(self) -> None:
        """End the watch."""
        self._done.set()


def matmul_rate(device: str, dtype: str) -> float:
    """Floating-point operations a second of a large matrix product here, the best of some."""
    import torch

    size = 8192 if device.startswith("cuda") else 1024
    a, best = torch.randn(size, size, dtype=getattr(torch, dtype), device=device), 0.0
    for _ in range(4):
        started = time.perf_counter()
        (a @ a)[0, 0].item()  # waits for the result
        best = max(best, 2 * size**3 / (time.perf_counter() - started))
    return best


def _counter(count: Callable[[int, float], None]) -> AbstractContextManager[Any]:
    """Inside the block, `count` is told (tokens, flops) of every operation."""
    import torch
    from torch.utils._python_dispatch import TorchDispatchMode
    from torch.utils.flop_counter import flop_registry, sdpa_flop_count

    attention_on_cpu = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu  # the one that has no formula there

    class Counter(TorchDispatchMode):
        rows = 0

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            result = func(*args, **(kwargs or {}))
            formula = flop_registry.get(func._overloadpacket)
            if formula is not None:
                count(0, formula(*args, **(kwargs or {}), out_val=result))
            elif func._overloadpacket is attention_on_cpu:
                count(0, sdpa_flop_count(args[0].shape, args[1].shape, args[2].shape))
            elif func is torch.ops.aten.embedding.default and args[0].shape[0] >= self.rows:
                self.rows = args[0].shape[0]  # the largest table is that of tokens, not of positions
                count(args[1].numel(), 0.0)
            return result

    return Counter()  # type: ignore[no-untyped-call]  # torch has no types here


class Profile(Progress):
    """Another progress, measured."""

    def __init__(self, inner: Progress, device: str, dtype: str) -> None:
        self._inner, self.rate = inner, matmul_rate(device, dtype)
        self.phases = {_OUTSIDE: Phase(_OUTSIDE)}
        self._stack, self._events, self._memory = [_OUTSIDE], list[dict[str, Any]](), PeakMemory()
        self._origin = self._since = time.perf_counter()
        self._exit = ExitStack()
        self._exit.enter_context(_counter(self._count))
        self._exit.callback(self._memory.stop)

    def _count(self, tokens: int, flops: float) -> None:
        phase = self.phases[self._stack[-1]]
        phase.tokens += tokens
        phase.flops += flops

    def _turn(self) -> float:
        """Give the time and memory since the last turn to the innermost phase."""
        now, phase = time.perf_counter(), self.phases[self._stack[-1]]
        phase.seconds += now - self._since
        phase.peak_bytes = max(phase.peak_bytes, self._memory.restart())
        self._since = now
        return now

    @contextmanager
    def phase(self, label: str, total: float) -> Iterator[Advance]:
        """As `Progress`."""
        began = self._turn()
        self.phases.setdefault(label, Phase(label))
        self._stack.append(label)
        try:
            with self._inner.phase(label, total) as advance:
                yield advance
        finally:
            ended = self._turn()
            self._stack.pop()
            # As Chrome's and Perfetto's viewers read it, in microseconds.
            event = {"name": label, "ph": "X", "pid": 0, "tid": 0}
            self._events.append({**event, "ts": 1e6 * (began - self._origin), "dur": 1e6 * (ended - began)})

    def note(self, text: str) -> None:
        """As `Progress`."""
        self._inner.note(text)

    def remark(self, text: str) -> None:
        """As `Progress`."""
        self._inner.remark(text)

    def close(self) -> Sequence[Phase]:
        """Stop measuring; returns the table, the longest first."""
        self._turn()
        self._exit.close()
        return sorted(self.phases.values(), key=lambda phase: -phase.seconds)

    def record(self) -> dict[str, Any]:
        """Trace and table, for profile.json."""
        return {"traceEvents": self._events, "matmul_flops": self.rate, "phases": [*map(asdict, self.phases.values())]}
