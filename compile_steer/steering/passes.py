"""Named passes that bring a program into the one form that the backends reason about."""

from __future__ import annotations

from dataclasses import replace

from compile_steer.steering.program import Intervention, Program
from compile_steer.steering.sites import Site


def drop_inactive(program: Program) -> Program:
    """Leave out what is switched off or has coefficient 0."""
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
    for one in program.interventions:
        last = merged[-1] if merged else None
        if (
            last is not None
            and last.operation == one.operation == "add"
            and (last.site, last.scopes) == (one.site, one.scopes)
        ):
            total = last.coefficient * last.vector.float() + one.coefficient * one.vector.float()
            merged[-1] = replace(last, vector=total, coefficient=1.0)
        else:
            merged.append(one)
    return replace(program, interventions=tuple(merged))


def canonical(program: Program) -> Program:
    """All passes in order. The result steers exactly as `program` does."""
    return merge_shifts(input_to_output(drop_inactive(program)))
