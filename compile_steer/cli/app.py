"""The command line: which function each command is.

Exit codes: 0 done and passed; 1 a check ran and failed; 2 the input is unusable or the run was stopped; 3 our own error.
Errors become messages in `compile_steer.__main__`.
"""

from __future__ import annotations

from collections.abc import Callable

import typer

from compile_steer.cli import artifacts, programs, recipes

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # importing rich for the help costs as much as all else
    help="Turn a steering vector into ordinary weights, and prove that they match.\n\n"
    "Start with: compile-steer run recipes/ocean.yaml. It extracts a direction from contrast pairs, says on held-out "
    "prompts whether it is worth anything, compiles it (bias, LoRA adapter, merged checkpoint) and verifies in a fresh "
    "process that what is on disk behaves as the steered model did.",
)

_COMMANDS: dict[str, Callable[..., None]] = {
    "generate-pairs": recipes.generate_pairs,
    "extract": recipes.extract,
    "validate": recipes.validate,
    "compile": recipes.compile_,
    "merge": recipes.merge,
    "verify": recipes.verify,
    "run": recipes.run,
    "import": programs.import_,
    "export-vector": programs.export_vector,
    "decompile": programs.decompile,
    "task-vector": programs.task_vector,
    "compose": programs.compose,
    "co-load": programs.co_load,
    "show": artifacts.show,
    "reproduce": artifacts.reproduce,
    "audit": artifacts.audit,
    "export": artifacts.export,
    "verify-engines": artifacts.verify_engines,
    "push": artifacts.push,
}

for name, function in _COMMANDS.items():
    app.command(name)(function)
