"""A program as vectors that other tools add: one a block, at the output of blocks, at every position."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from torch import Tensor

from compile_steer.common.errors import CannotLower
from compile_steer.formats import vectors as vector_formats
from compile_steer.formats.foreign import LayerConvention
from compile_steer.steering.passes import canonical
from compile_steer.steering.program import Program

_ALL = frozenset(("all",))


def shifts(program: Program) -> dict[int, Tensor]:
    """What `program` adds to the output of each block, block -> [d_model] fp32, its coefficients multiplied in.

    Raises:
        CannotLower: it does something else too; every such intervention is named.
    """
    interventions = canonical(program).interventions
    problems = [
        f"{one.describe()}: a vector file cannot hold {what}; compile the program into weights instead."
        for one in interventions
        for what in _beyond(one.operation, one.site.point, one.scopes)
    ]
    if not interventions:
        problems.append("the program adds nothing.")
    if problems:
        raise CannotLower(problems)
    found: dict[int, Tensor] = {}
    for one in interventions:
        shift = one.coefficient * one.vector.float()
        found[one.site.layer] = found[one.site.layer] + shift if one.site.layer in found else shift
    return found


def _beyond(operation: str, point: str, scopes: frozenset[str]) -> Iterator[str]:
    if operation != "add":
        yield f"operation {operation}, only add"
    if point != "resid_post":
        yield f"point {point}, only resid_post"
    if scopes != _ALL:
        yield f"positions {'+'.join(sorted(scopes))}, only all"


def write_gguf(path: Path, program: Program, model_type: str) -> list[str]:
    """Write a control vector for llama.cpp, repeng and EasySteer; returns what its user should know.

    Raises:
        CannotLower: a control vector cannot hold the program.
    """
    vectors = shifts(program)
    vector_formats.write_gguf(path, vectors, model_type)
    told = ["direction.K is added to the output of block K: layer convention block."]
    if 0 in vectors:
        told.append("llama.cpp refuses a file with direction.0 (block 0); repeng and EasySteer take it.")
    return told


def write_svec(path: Path, program: Program, model_type: str, convention: LayerConvention, n_layers: int) -> list[str]:
    """Write a .svec for activation-steering; returns what its user should know.

    Raises:
        CannotLower: it cannot hold the program; under hidden_state, the output of the last block is no block's input.
    """
    vectors = shifts(program)
    if convention == "hidden_state" and n_layers - 1 in vectors:
        raise CannotLower(
            f"a vector at block {n_layers - 1}, the last, is the input of no block, to which activation-steering adds; "
            "use --layer-convention block to write where it was read, or another format."
        )
    vector_formats.write_svec(path, vectors, model_type, convention)
    if convention == "hidden_state":
        return ["direction K is added to the input of block K, as activation-steering adds it."]
    return [
        "direction K is of the output of block K, as activation-steering reads it; it adds to the input of block K."
    ]


def write_vllm_lens(path: Path, program: Program) -> list[str]:
    """Write the vectors for requests to vLLM with its plugin vllm-lens; returns what its user should know.

    Raises:
        CannotLower: it cannot hold the program.
    """
    vector_formats.write_vllm_lens(path, shifts(program))
    return [
        "the plugin takes the vectors out of a request's extra_args: where the same settings are used again, the second "
        "request runs unsteered without a word. Give each request its own.",
    ]
