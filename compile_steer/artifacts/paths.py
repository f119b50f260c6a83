"""Where a run's artifacts lie below its output folder."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class RunPaths:
    """`data/NAME.*`, `vectors/NAME.*`, `adapters/NAME-BACKEND/`, `merged/NAME-BACKEND-PRECISION/`.

    For several programs NAME is all their names, joined by '+'; their compositions lie in `composed/`.
    """

    out: Path
    name: str

    @staticmethod
    def of_artifact(path: Path, name: str) -> RunPaths:
        """The paths of the run that left the artifact at `path`, two folders below its output folder."""
        return RunPaths(path.resolve().parent.parent, name)

    def pairs(self, split: str) -> Path:
        """The pairs of a split that the model generated, as JSONL."""
        return self.out / "data" / f"{self.name}.{split}.jsonl"

    @property
    def generation_report(self) -> Path:
        """How many pairs the model generated, and why others were dropped."""
        return self.out / "data" / f"{self.name}.json"

    @property
    def directions(self) -> Path:
        """The candidate directions of every block, and their controls."""
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
        """The result of every test pair and prompt, one JSON object a line."""
        return self.out / "vectors" / f"{self.name}.prompts.jsonl"

    @property
    def decompiled(self) -> Path:
        """The program that was read off an artifact; how much it explains is in the JSON of the same name."""
        return self.out / "vectors" / f"{self.name}.decompiled.safetensors"

    @property
    def report(self) -> Path:
        """The whole run as one self-contained page."""
        return self.out / f"{self.name}.html"

    @property
    def work(self) -> Path:
        """The backends' intermediate state, removed when all are done."""
        return self.out / "work" / self.name

    def adapter(self, backend: str) -> Path:
        return self.out / "adapters" / f"{self.name}-{backend}"

    def composed(self, backend: str, way: str) -> Path:
        """An adapter made of several: `way` is stacked or joint."""
        return self.out / "composed" / f"{self.name}-{backend}-{way}"

    def composition(self, backend: str) -> Path:
        """The report on how several programs and their adapters interfere."""
        return self.out / "composed" / f"{self.name}-{backend}.json"

    def co_loaded(self, backend: str) -> Path:
        """The report on several adapters loaded at once, where nothing was composed."""
        return self.out / "composed" / f"{self.name}-{backend}-loaded.json"

    def merged(self, backend: str, precision: str) -> Path:
        return self.out / "merged" / f"{self.name}-{backend}-{precision}"
