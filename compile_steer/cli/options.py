"""What commands share: their options, and what these come to.

Nothing heavy is imported before a command runs, so that help answers at once.
"""

from __future__ import annotations

import functools
import inspect
import json
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from compile_steer.artifacts.locks import locked
from compile_steer.common import distributed
from compile_steer.common.detail import Detail, detail

if TYPE_CHECKING:
    from rich.console import Console

    from compile_steer.common.profile import Profile
    from compile_steer.common.progress import Progress
    from compile_steer.pipeline.run import Run
    from compile_steer.tools.interference import Composition


def within(low: float, high: float = 1e6) -> Any:
    """Return a callback of an option that refuses what is no number from `low` to `high`; NaN passes typer's own min and max."""

    def check(value: Any) -> Any:
        for number in value if isinstance(value, list) else [value]:
            if number is not None and not low <= number <= high:
                raise typer.BadParameter(f"found {number}; needed: a number from {low:g} to {high:g}.")
        return value

    return check


RecipePath = Annotated[Path, typer.Argument(help="The recipe: a YAML file that names model, data and settings.")]
RecipePaths = Annotated[list[Path], typer.Argument(help="The recipes, two or more, compiled already.")]
Out = Annotated[Path | None, typer.Option(help="Folder for vectors/, adapters/ and merged/. [default: runs/NAME]")]
Set = Annotated[list[str] | None, typer.Option("--set", help="Override any recipe key: path.to.key=value. Repeatable.")]
Device = Annotated[str | None, typer.Option(help="auto, cpu, cuda, cuda:1 ... (recipe key device).")]
Dtype = Annotated[str | None, typer.Option(help="float32, bfloat16 or float16 (recipe key dtype).")]
Seed = Annotated[int | None, typer.Option(help="Seed of everything random (recipe key seed).")]
Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON on standard output.")]
Force = Annotated[bool, typer.Option(help="Compile in spite of a failed or missing validation; the artifact says so.")]
Artifacts = Annotated[
    list[Path] | None, typer.Option("--artifact", help="Folder; by default all that the recipe makes. Repeatable.")
]
# The output folder that the running command has locked.
_OUTPUT = ExitStack()


def existing_folder(path: Path | None) -> Path | None:
    """A callback of an option that refuses a path where no folder is: nothing would be found there, and nothing said."""
    if path is not None and not path.is_dir():
        raise typer.BadParameter(f"{path} is no folder.")
    return path


Recipes = Annotated[
    Path | None,
    typer.Option(
        callback=existing_folder,
        help="Folder that the recorded recipe's data paths are relative to. "
        "[default: the nearest one at or above the artifact, or its recipes/, that has them]",
    ),
]
RecordedModel = Annotated[
    str | None,
    typer.Option(
        "--model",
        help="The base, where the recorded recipe names a path outside of the current folder and the recipes'. "
        "[default: as recorded]",
    ),
]


def console(as_json: bool = False) -> Console:
    """Return the console for a person: standard error where standard output carries JSON. Only rank 0 prints."""
    from compile_steer.common.terminal import Terminal

    return Terminal(stderr=as_json, quiet=distributed.rank() > 0)


def progress_bars() -> Progress:
    """Return progress bars on standard error, so that standard output carries results alone; none with --quiet."""
    from compile_steer.common.progress import Progress, ProgressBars

    return Progress() if detail.get() == Detail.QUIET else ProgressBars(console(as_json=True), detail.get())


def print_title(out: Console, text: str) -> None:
    """Print what was asked, or which part of it comes now."""
    if detail.get() > Detail.QUIET:
        out.print(text, style="bold blue")


Show = Callable[["Console", Any], None]


def finish(as_json: bool, value: Any, show: Show = lambda _console, _value: None, passed: bool = True) -> None:
    """Print `value` (dataclasses and paths too) as JSON, or have `show` print it for a person; exit with 1 if not `passed`."""
    if not as_json:
        show(console(), value)
    elif distributed.rank() == 0:
        from pydantic_core import to_jsonable_python

        print(json.dumps(to_jsonable_python(value, inf_nan_mode="null"), indent=2))  # JSON has no NaN
    distributed.leave()
    if (
        not passed and distributed.rank() == 0
    ):  # launchers stop all processes where one fails, and rank 0 has more to say
        raise typer.Exit(1)


class Session:
    """One command's recipe, output folder and consoles; its arguments are options of every command on a recipe."""

    def __init__(
        self,
        *,
        recipe: RecipePath,
        out: Out = None,
        changes: Set = None,
        device: Device = None,
        dtype: Dtype = None,
        seed: Seed = None,
        as_json: Json = False,
        profile: Annotated[
            bool, typer.Option("--profile", help="Measure each phase; leaves OUT/profile.json.")
        ] = False,
    ) -> None:
        from compile_steer.recipe import read_recipe

        shorthands = {"device": device, "dtype": dtype, "seed": seed}
        self.path = recipe
        self.changes = [*(changes or []), *(f"{key}={value}" for key, value in shorthands.items() if value is not None)]
        self.recipe = read_recipe(recipe, self.changes)
        self._out, self.as_json = out, as_json
        self.console = console(as_json)
        self._profiled: tuple[Profile, Path] | None = None
        self._profile = profile

    def changed(self, changes: Sequence[str]) -> Session:
        """Return the same with changes of the recipe before the user's own; the output folder follows its name."""
        return Session(recipe=self.path, out=self._out, changes=[*changes, *self.changes], as_json=self.as_json)

    def open(self, *, shared: bool = False) -> Run:
        """Open the run; of several processes only where the command has them share its work."""
        if not shared:
            distributed.require_alone("this command")
        if not self.as_json:
            print_title(self.console, f"{self.recipe.name} on {self.recipe.model}, budget {self.recipe.budget}")
        out = self._out or Path("runs") / self.recipe.name
        hold_output(out)  # before the seconds that libraries and model take to load
        distributed.join()
        from compile_steer.pipeline.run import Run

        progress = progress_bars()
        if self._profile:
            from compile_steer.common.profile import Profile
            from compile_steer.models.load import choose_device

            progress = Profile(progress, str(choose_device(self.recipe.device)), self.recipe.dtype)
            self._profiled = progress, out / "profile.json"
        return Run.open(self.recipe, out, progress)

    def finish(self, value: Any, show: Show = lambda _console, _value: None, passed: bool = True) -> None:
        if self._profiled is not None:
            from compile_steer.artifacts.files import save_json
            from compile_steer.cli.run_tables import print_profile

            profile, path = self._profiled
            phases = profile.close()
            if distributed.rank() == 0:
                save_json(path, profile.record())
            print_profile(console(as_json=True), phases, profile.rate, path)
        finish(self.as_json, value, show, passed)


class SeveralSession:
    """Several recipes whose programs are used at once; the settings (--set and the like) are every recipe's."""

    def __init__(
        self,
        *,
        recipes: RecipePaths,
        backend: Annotated[str, typer.Option(help="Whose adapters are put together.")] = "closed_form",
        scale: Annotated[
            list[float] | None,
            typer.Option("--scale", callback=within(-1e6), help="Factor of each program, in order. [default: 1]"),
        ] = None,
        runs: Annotated[Path, typer.Option(help="Folder that holds each recipe's run, as NAME.")] = Path("runs"),
        out: Annotated[Path | None, typer.Option(help="Folder for composed/. [default: RUNS/NAME1+NAME2]")] = None,
        changes: Set = None,
        device: Device = None,
        dtype: Dtype = None,
        seed: Seed = None,
        as_json: Json = False,
    ) -> None:
        from compile_steer.tools.compose import CompositionRun

        settings: dict[str, Any] = {"changes": changes, "device": device, "dtype": dtype, "seed": seed}
        read = [Session(recipe=path, **settings).recipe for path in recipes]
        self.as_json = as_json
        out = out or runs / "+".join(dict.fromkeys(recipe.name for recipe in read))
        hold_output(out)
        self.run = CompositionRun.open(read, scale or [], backend, runs, out, progress_bars())

    def finish(self, composition: Composition) -> None:
        from compile_steer.cli.tables import print_composition

        finish(self.as_json, composition, print_composition, composition.passed)


def with_detail(function: Callable[..., None]) -> Callable[..., None]:
    """Give a command the options that say how much it prints."""

    @functools.wraps(function)
    def run(*, verbose: bool, quiet: bool, **options: Any) -> None:
        if verbose and quiet:
            raise typer.BadParameter("--verbose and --quiet exclude each other.")
        detail.set(Detail.VERBOSE if verbose else Detail.QUIET if quiet else Detail.NORMAL)
        function(**options)

    own = list(inspect.signature(function, eval_str=True).parameters.values())
    flags = {
        "verbose": ("--verbose", "-v", "Print every figure."),
        "quiet": ("--quiet", "-q", "Print the result alone."),
    }
    for name, (long, short, text) in flags.items():
        option = Annotated[bool, typer.Option(long, short, help=text)]
        own.append(inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=False, annotation=option))
    run.__signature__ = inspect.Signature(own)  # type: ignore[attr-defined]  # what typer reads
    return run


def hold_output(out: Path) -> None:
    """Lock the output folder until the command ends; of several processes rank 0 does. Raises `ArtifactError`."""
    if distributed.rank() == 0:
        _OUTPUT.enter_context(locked(out))


def command(session_type: Callable[..., Any]) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Make a function of a session a command: the options that make a session come first, then the function's own."""

    def decorate(function: Callable[..., None]) -> Callable[..., None]:
        shared = inspect.signature(session_type, eval_str=True).parameters
        own = list(inspect.signature(function, eval_str=True).parameters.values())[1:]

        @functools.wraps(function)
        def run(**options: Any) -> None:
            with _OUTPUT:
                function(session_type(**{name: options.pop(name) for name in shared}), **options)

        run.__signature__ = inspect.Signature([*shared.values(), *own])  # type: ignore[attr-defined]  # what typer reads
        return run

    return decorate
