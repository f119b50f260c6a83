"""Where a run's artifacts lie below its output folder."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class RunPaths:
    """`data/NAME.*`, `vectors/NAME.*`, `adapters/NAME-BACKEND/`, `merged/NAME-BACKEND-PRECISION/`.

    Of several programs at once NAME is all their names, joined by '+'; what they are compiled into is in `composed/`.
    """

    out: Path
    name: str

    def pairs(self, split: str) -> Path:
        """The pairs of a split that the model wrote, as JSONL."""
        return self.out / "data" / f"{self.name}.{split}.jsonl"

    @property
    def writing(self) -> Path:
        """How many pairs the model wrote, and why the others were dropped."""
        return self.out / "data" / f"{self.name}.json"

    @property
    def directions(self) -> Path:
        """Candidate directions of every block, and their shuffled-label controls."""
        return self.out / "vectors" / f"{self.name}.directions.safetensors"

    @property
    def program(self) -> Path:
        """The chosen steering program: the vector."""
        return self.out / "vectors" / f"{self.name}.safetensors"

    @property
    def validation(self) -> Path:
        return self.out / "vectors" / f"{self.name}.validation.json"

    @property
    def prompts(self) -> Path:
        """What every test pair and prompt did, a JSON object a line: for those who look."""
        return self.out / "vectors" / f"{self.name}.prompts.jsonl"

    @property
    def decompiled(self) -> Path:
        """The program that was read off an artifact; what it explains is in the JSON of the same name."""
        return self.out / "vectors" / f"{self.name}.decompiled.safetensors"

    @property
    def report(self) -> Path:
        """The whole run as one self-contained page."""
        return self.out / f"{self.name}.html"

    @property
    def work(self) -> Path:
        """What the backends keep while they run; gone when all are done."""
        return self.out / "work" / self.name

    def adapter(self, backend: str) -> Path:
        return self.out / "adapters" / f"{self.name}-{backend}"

    def composed(self, backend: str, way: str) -> Path:
        return self.out / "composed" / f"{self.name}-{backend}-{way}"

    def composition(self, backend: str) -> Path:
        """How several programs and their adapters get on with each other."""
        return self.out / "composed" / f"{self.name}-{backend}.json"

    def together(self, backend: str) -> Path:
        """How their adapters do loaded at once, where nothing was composed."""
        return self.out / "composed" / f"{self.name}-{backend}-loaded.json"

    def merged(self, backend: str, precision: str) -> Path:
        return self.out / "merged" / f"{self.name}-{backend}-{precision}"
