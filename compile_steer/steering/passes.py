"""Named passes that bring a program into the one form that the backends decide about; none changes what it does."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from compile_steer.steering.program import Intervention, Program
from compile_steer.steering.sites import Site


def drop_inactive(program: Program) -> Program:
    """Leave out what is disabled or has coefficient 0."""
    return replace(program, interventions=program.active)


def input_to_output(program: Program) -> Program:
    """The input of block k > 0 is the output of block k-1; edits of that output itself still come first."""
    ordered = sorted(program.interventions, key=lambda i: i.site.point == "resid_pre")
    moved = tuple(
        replace(i, site=Site(i.site.layer - 1, "resid_post")) if i.site.point == "resid_pre" and i.site.layer > 0 else i
        for i in ordered
    )
    return replace(program, interventions=moved)


def merge_shifts(program: Program) -> Program:
    """Adds that meet at one site and positions, with nothing between them, are one add."""
    merged: list[Intervention] = []
    for i in program.interventions:
        last = merged[-1] if merged else None
        if last and last.operation == i.operation == "add" and (last.site, last.scopes) == (i.site, i.scopes):
            total = last.coefficient * last.vector.float() + i.coefficient * i.vector.float()
            merged[-1] = replace(last, vector=total, coefficient=1.0)
        else:
            merged.append(i)
    return replace(program, interventions=tuple(merged))


# In this order: only what is active counts, and shifts can meet once inputs are outputs.
PASSES: tuple[Callable[[Program], Program], ...] = (drop_inactive, input_to_output, merge_shifts)


def canonical(program: Program) -> Program:
    """Run all passes in order."""
    for run in PASSES:
        program = run(program)
    return program
