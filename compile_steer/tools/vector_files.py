"""Vectors in and out: a recipe that starts from another tool's file, and a program as a file for other tools.

Other tools add one vector a block, to the block's output, at every position.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

from torch import Tensor

from compile_steer.artifacts.files import save_text
from compile_steer.artifacts.paths import real_path
from compile_steer.common.errors import CannotLower, RecipeError
from compile_steer.formats import vectors as vector_formats
from compile_steer.formats.foreign import LayerConvention
from compile_steer.pipeline.run import Run
from compile_steer.recipe import rewritten
from compile_steer.steering.directions import Directions
from compile_steer.steering.passes import canonical
from compile_steer.steering.program import Program
from compile_steer.validation.sweep import candidates


def import_changes(
    recipe: Path, file: Path, name: str, joint: str | None = None, **settings: str | int | None
) -> list[str]:
    """The changes, as `key=value`, that make a recipe named `name` out of `recipe`, with `file` as its directions.

    Args:
        joint: blocks whose vectors are added at once: all, or '4,5,6'.
        settings: what the file does not say about itself: format, layer_convention, layer, index.
    """
    blocks: str | list[int] | None = joint
    if joint not in (None, "all"):
        try:
            blocks = [int(part) for part in str(joint).split(",")]
        except ValueError as error:
            raise RecipeError(f"--joint {joint}: needed: all, or blocks as 4,5,6.") from error
    # Not resolved: a hub's cache has links with names, and the names tell the format.
    section = {"file": os.path.relpath(file.absolute(), real_path(recipe).parent), **settings, "joint": blocks}
    imported = {key: value for key, value in section.items() if value is not None}
    return [f"name={json.dumps(name)}", f"extract={json.dumps({'method': 'imported', 'imported': imported})}"]


def new_recipe(base: Path, name: str, changes: list[str]) -> tuple[Path, str]:
    """Path and text of the recipe `base` with `changes`, beside it; raises `RecipeError` where another one is there."""
    path, text = base.with_name(f"{name}.yaml"), rewritten(base, changes)
    if path.exists() and path.read_text(encoding="utf-8") != text:
        raise RecipeError(f"{path} is there already and says something else. Choose another --to, or remove it.")
    return path, text


def import_vector(run: Run, path: Path, text: str) -> Directions:
    """Read the file of the run's recipe, check it against the model, and leave the directions and then the recipe.

    Raises:
        ArtifactError: the file is missing, damaged, unsafe, ambiguous, or of another model; no recipe is left then.
        RecipeError: the recipe's validate.layers are not those of the file.
    """
    directions = run.extract()  # reads the file: the recipe's method is `imported`
    candidates(run.recipe.validate_, directions)  # the base recipe's layers may be others than the file's
    save_text(path, text)
    return directions


def export_vector(run: Run, kind: str, to: Path | None, convention: str | None) -> tuple[Path, list[str]]:
    """Write the run's program as a vector file; returns its path and notes for its user.

    Raises `RecipeError` where format and convention do not go together, `CannotLower` where the format cannot hold it.
    """
    program, model_type = run.program, str(run.model.model.config.model_type)
    path = to or run.paths.program.with_suffix(f".{kind}")
    match kind, convention:
        case "gguf", None:
            return path, write_gguf(path, program, model_type)
        case "svec", ("block" | "hidden_state") as named:
            return path, write_svec(path, program, model_type, named, run.model.layout.n_layers)
    raise RecipeError(
        f"--format {kind} --layer-convention {convention or 'not specified'}: needed: gguf without a convention (all that "
        "read one add direction.k to the output of block k), or svec with block or hidden_state."
    )


def block_vectors(program: Program) -> dict[int, Tensor]:
    """What `program` adds to the output of each block: block -> [d_model] in fp32, the coefficient multiplied in.

    Raises `CannotLower` where it does something else too, and names every such intervention.
    """
    interventions = canonical(program).interventions
    vectors: dict[int, Tensor] = {}
    problems = [] if interventions else ["the program adds nothing."]
    for intervention in interventions:
        operation, site, scopes = intervention.operation, intervention.site, intervention.scopes
        beyond = {
            f"operation {operation}, only add": operation != "add",
            f"point {site.point}, only resid_post": site.point != "resid_post",
            f"positions {'+'.join(sorted(scopes))}, only all": scopes != {"all"},
        }
        problems += [
            f"{intervention.describe()}: a vector file cannot hold {reason}; compile the program into weights instead."
            for reason, applies in beyond.items()
            if applies
        ]
        vector = intervention.coefficient * intervention.vector.float()
        # Other tools take one vector a block.
        vectors[site.layer] = vectors[site.layer] + vector if site.layer in vectors else vector
    if problems:
        raise CannotLower(problems)
    return vectors


def write_gguf(path: Path, program: Program, model_type: str) -> list[str]:
    """Write a control vector for llama.cpp, repeng and EasySteer; returns notes for its user. Raises `CannotLower`."""
    vectors = block_vectors(program)
    vector_formats.write_gguf(path, vectors, model_type)
    notes = ["direction.K is added to the output of block K: layer convention block."]
    if 0 in vectors:
        notes.append("llama.cpp refuses a file with direction.0 (block 0); repeng and EasySteer take it.")
    return notes


def write_svec(path: Path, program: Program, model_type: str, convention: LayerConvention, n_layers: int) -> list[str]:
    """Write a .svec for activation-steering; returns notes for its user. Raises `CannotLower`."""
    vectors = block_vectors(program)
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
    """Write the vectors for requests to vLLM with its plugin vllm-lens; returns notes for its user. Raises `CannotLower`."""
    vector_formats.write_vllm_lens(path, block_vectors(program))
    return [
        "the plugin takes the vectors out of a request's extra_args: where the same settings are used again, the second "
        "request runs unsteered without a word. Give each request its own.",
    ]
