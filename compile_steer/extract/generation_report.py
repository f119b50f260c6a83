"""What came of the writing: how many pairs were wanted, how many were kept, and why the others were not."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path

from compile_steer.artifacts.files import load_json, save_json


@dataclass(frozen=True)
class SplitReport:
    """One split: prompts, answers written for them (both sides, all tries), pairs kept.

    `dropped` counts the other prompts by reason, `examples` has one answer a reason.
    """

    wanted: int
    written: int
    kept: int
    dropped: dict[str, int]
    examples: dict[str, str]

    def describe(self) -> str:
        """One line, the most frequent reason first."""
        reasons = sorted(self.dropped, key=lambda reason: -self.dropped[reason])
        why = "; ".join(f"{self.dropped[reason]} {reason}" for reason in reasons)
        return f"{self.kept} of {self.wanted} prompts gave a pair" + (f" ({why})" if why else "")


@dataclass(frozen=True)
class WritingReport:
    """All splits by name; `inputs` is the fingerprint of what the pairs were written from."""

    splits: dict[str, SplitReport]
    inputs: str

    def save(self, path: Path) -> None:
        save_json(path, asdict(self))

    @staticmethod
    def load(path: Path) -> WritingReport:
        """Raises `ArtifactError` for a missing or damaged report."""
        return load_json(path, WritingReport, "report on written pairs", "write")
