"""The command line: which function each command is.

Exit codes: 0 done and passed; 1 a check ran and failed; 2 the input is unusable or the run was stopped.
Errors become messages in `compile_steer.__main__`.
"""

from __future__ import annotations

from collections.abc import Callable

import typer

from compile_steer import beside_walk, on_artifact, on_engine, on_recipe, on_several

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    help="Turn a steering vector into ordinary weights, and prove that they match.\n\n"
    "Start with: **compile-steer run recipes/ocean.yaml**. It extracts a direction from contrast pairs, says on "
    "held-out prompts whether it is worth anything, compiles it (bias, LoRA adapter, merged checkpoint) and judges "
    "in a fresh process whether what is on disk behaves as the hooked model did.",
)

_COMMANDS: dict[str, Callable[..., None]] = {
    "write": on_recipe.write,
    "extract": on_recipe.extract,
    "validate": on_recipe.validate,
    "compile": on_recipe.compile_,
    "merge": on_recipe.merge,
    "verify": on_recipe.verify,
    "run": on_recipe.run,
    "import": beside_walk.import_,
    "export-vector": beside_walk.export_vector,
    "decompile": beside_walk.decompile_,
    "task-vector": beside_walk.task_vector,
    "compose": on_several.compose_,
    "together": on_several.together,
    "show": on_artifact.show,
    "reproduce": on_artifact.reproduce_,
    "audit": on_artifact.audit_,
    "export": on_engine.export,
    "verify-engines": on_engine.verify_engines,
    "push": on_artifact.push,
}

for name, command in _COMMANDS.items():
    app.command(name)(command)
