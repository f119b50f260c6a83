"""What a judge said, kept line by line, so that nothing is paid for twice."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from compile_steer.common.errors import ArtifactError


class Ledger:
    """A JSONL file that only grows: first the judge's settings, then a line an answer.

    `scores` holds the last score of each reply by its key, `requests` and `tokens` what all answers have cost.
    """

    def __init__(self, path: Path, settings: dict[str, Any]) -> None:
        """Raises `ArtifactError` where the file cannot be read or written."""
        self.path = path
        self.scores: dict[str, float] = {}
        self.requests = 0
        self.tokens = 0
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            lines = path.read_text(encoding="utf-8").split("\n") if path.is_file() else []
        except (OSError, UnicodeDecodeError) as error:
            raise ArtifactError(f"{path} cannot be read ({error}); it keeps what the judge said. Remove it.") from error
        for line in lines:
            self._count(_row(line))
        if not lines:
            self._write({"judge": settings})
        elif lines[-1]:  # a writer was stopped within a line: what follows must not be joined to it
            self._append("\n")

    def add(self, key: str, score: float | None, answer: str, tokens: int) -> None:
        """Keep one answer about the reply `key`; a score of None is nonsense, which costs as much."""
        row = {"reply": key, "score": score, "answer": answer, "tokens": tokens}
        self._write(row)
        self._count(row)

    def _count(self, row: dict[str, Any]) -> None:
        if "reply" in row:
            self.requests += 1
            self.tokens += row["tokens"]
            if row["score"] is not None:
                self.scores[row["reply"]] = row["score"]

    def _write(self, row: dict[str, Any]) -> None:
        self._append(json.dumps(row, ensure_ascii=False) + "\n")

    def _append(self, text: str) -> None:
        try:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(text)
        except OSError as error:
            raise ArtifactError(
                f"{self.path} cannot be written ({error.strerror}); it keeps what the judge said."
            ) from error


def _row(line: str) -> dict[str, Any]:
    """One line; empty for one that was cut off."""
    try:
        row = json.loads(line)
    except json.JSONDecodeError:
        return {}
    return row if isinstance(row, dict) else {}
