"""The command line: which function each command is.

Exit codes: 0 done and passed; 1 a check ran and failed; 2 the input is unusable; 3 our own error; 130
Ctrl-C (128 + the signal's number). Errors become messages in `compile_steer.__main__`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated

import typer

from compile_steer.cli import artifacts, programs, recipes, talk
from compile_steer.cli.options import console, with_detail
from compile_steer.common.errors import RecipeError, brief
from compile_steer.report.glossary import glossary_terms

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    help="Turn a steering vector into ordinary weights, and prove that they match.\n\n"
    "Start with: compile-steer run recipes/ocean.yaml. It extracts a direction from contrast pairs, says on held-out "
    "prompts whether it is worth anything, compiles it (bias, LoRA adapter, merged checkpoint) and verifies in a fresh "
    "process that what is on disk behaves as the steered model did.",
    epilog="The words are explained by: compile-steer glossary",
)


def glossary(term: Annotated[str, typer.Argument(help="One term, or a part of it. [default: all]")] = "") -> None:
    """Explain the words that commands, reports and pages use."""
    definitions = {name: text for name, text in glossary_terms().items() if term.lower() in name.lower()}
    if not definitions:
        raise RecipeError(f"glossary: no term contains {brief(term)}. The terms are {', '.join(glossary_terms())}.")
    for name, text in definitions.items():
        console().print(f"{name}: {text}", soft_wrap=True, highlight=False)


_COMMANDS: dict[str, Callable[..., None]] = {
    "new": recipes.new,
    "schema": recipes.schema,
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
    "fleet": programs.fleet,
    "chat": talk.chat,
    "play": talk.play,
    "show": artifacts.show,
    "reproduce": artifacts.reproduce,
    "inspect": artifacts.inspect,
    "audit": artifacts.audit,
    "export": artifacts.export,
    "base": artifacts.base,
    "verify-engines": artifacts.verify_engines,
    "push": artifacts.push,
    "glossary": glossary,
}

for name, function in _COMMANDS.items():
    app.command(name)(with_detail(function))


def _version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version

        console().print(f"compile-steer {version('compile_steer')}", highlight=False)
        raise typer.Exit


@app.callback()
def _main(
    version: Annotated[
        bool, typer.Option("--version", is_eager=True, callback=_version, help="Print the version.")
    ] = False,
) -> None: ...
