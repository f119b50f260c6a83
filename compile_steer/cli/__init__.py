"""The command line: which function each command is.

Exit codes: 0 done and passed; 1 a check ran and failed; 2 the input is unusable or the run was stopped.
Errors become messages in `compile_steer.__main__`.
"""

from __future__ import annotations

from collections.abc import Callable

import typer

from compile_steer.cli import artifacts, engines, recipes, several, vectors

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
    "write": recipes.write,
    "extract": recipes.extract,
    "validate": recipes.validate,
    "compile": recipes.compile_,
    "merge": recipes.merge,
    "verify": recipes.verify,
    "run": recipes.run,
    "import": vectors.import_,
    "export-vector": vectors.export_vector,
    "decompile": vectors.decompile_,
    "task-vector": vectors.task_vector,
    "compose": several.compose_,
    "together": several.together,
    "show": artifacts.show,
    "reproduce": artifacts.reproduce_,
    "audit": artifacts.audit_,
    "export": engines.export,
    "verify-engines": engines.verify_engines,
    "push": artifacts.push,
}

for name, command in _COMMANDS.items():
    app.command(name)(command)
