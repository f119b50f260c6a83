"""Plan: which backends lower this program on this model, and why the others do not."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from compile_steer.common.errors import CannotLower
from compile_steer.lower.backends import BACKENDS
from compile_steer.lower.options import BackendName
from compile_steer.steering.layout import Layout
from compile_steer.steering.program import Program


@dataclass(frozen=True)
class Choice:
    """One backend's standing: `refusal` is None where it is legal; `chosen` if it will run.

    `adapter_refusal` is why the result cannot ship as a stock PEFT adapter, or None.
    """

    backend: str
    refusal: str | None
    chosen: bool
    adapter_refusal: str | None


def plan(program: Program, layout: Layout, wanted: Sequence[BackendName] | Literal["auto"]) -> list[Choice]:
    """Decide, before any work. `program` is canonical.

    Raises:
        CannotLower: a backend that the recipe pins refuses, or all do; every reason is named.
    """
    refusals = {name: backend.refusal(program, layout) for name, backend in BACKENDS.items()}
    legal = [name for name, refusal in refusals.items() if refusal is None]
    chosen = legal[:1] if wanted == "auto" else list(wanted)
    blocked = [name for name in chosen if refusals[name] is not None]
    if blocked or not chosen:
        lines = [f"{name}: {refusals[name]}." for name in (blocked or refusals)]
        use = f"Use compile.backends: {', '.join(legal)} or auto." if legal else "Change the program."
        raise CannotLower([*lines, use])
    return [
        Choice(
            name,
            refusals[name],
            name in chosen,
            backend.adapter_refusal(program, layout) if refusals[name] is None else None,
        )
        for name, backend in BACKENDS.items()
    ]
