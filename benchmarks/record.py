"""Findings that take hours: each is kept as a line beside their page, so that a stopped benchmark goes on."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

from pydantic import TypeAdapter
from rich.console import Console

from benchmarks.ocean import machine
from compile_steer.artifacts.files import save_text

_Finding = TypeVar("_Finding", bound=Any)  # a dataclass


@dataclass(frozen=True)
class Record(Generic[_Finding]):
    """What was found, a line each in `lines`, and the `page` in words: `title`, who wrote it, `setting`, then the findings."""

    kind: type[_Finding]
    lines: Path
    page: Path
    title: str
    command: str
    setting: str

    def read(self) -> list[_Finding]:
        """What was found before."""
        lines = self.lines.read_text(encoding="utf-8").splitlines() if self.lines.is_file() else []
        kind = TypeAdapter(self.kind)
        return [kind.validate_python(json.loads(line)) for line in lines]

    def save(self, found: Sequence[_Finding], told: Sequence[str]) -> None:
        """The lines, and the page with what they are `told` as."""
        save_text(self.lines, "".join(json.dumps(asdict(one)) + "\n" for one in found))
        head = [
            f"# {self.title}",
            "",
            f"Written by `python -m {self.command}`; do not edit. Every finding is in [{self.lines.name}]({self.lines.name}).",
            "",
            f"{machine()} {self.setting}",
            "",
        ]
        save_text(self.page, "\n".join([*head, *told, ""]))

    def resume(
        self,
        missing: Callable[[list[_Finding]], Iterator[_Finding]],
        tell: Callable[[list[_Finding]], list[str]],
        say: Callable[[_Finding], str],
    ) -> None:
        """Find what is missing; lines and page are saved after each."""
        console, found = Console(width=132), self.read()
        for one in missing(list(found)):
            found.append(one)
            self.save(found, tell(found))
            console.print(say(one), markup=False)
        self.save(found, tell(found))
