"""What an artifact of any kind says of itself."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

from compile_steer.artifacts.provenance import PARITY, Provenance
from compile_steer.artifacts.tensors import read_tensors
from compile_steer.common.errors import ArtifactError
from compile_steer.extraction.generate_pairs import GenerationReport
from compile_steer.steering.directions import Directions
from compile_steer.steering.program import Program
from compile_steer.validation.report import ValidationReport
from compile_steer.verification.parity import Parity


def describe_artifact(path: Path) -> dict[str, object]:
    """What an artifact of any kind says of itself, for `show`; raises `ArtifactError`."""
    if path.is_dir():
        found: dict[str, object] = {"kind": "artifact", "provenance": asdict(Provenance.read(path))}
        if (path / PARITY).is_file():
            found["parity"] = asdict(Parity.load(path / PARITY))
        return found
    if path.suffix == ".json":
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise ArtifactError(f"{path} is not JSON ({error}).") from error
        if "matrix" in content:
            return {"kind": "composition", **content}
        if "splits" in content:
            return asdict(GenerationReport.load(path))
        report = Parity.load(path) if content.get("kind") == "parity report" else ValidationReport.load(path)
        return asdict(report)
    _tensors, metadata = read_tensors(path)
    if "directions" in metadata:
        directions = Directions.load(path)
        norms = [round(float(norm), 4) for norm in directions.vectors.norm(dim=-1)]
        told: dict[str, object] = {"kind": "directions", "model": directions.model, "point": directions.point}
        if directions.source is not None:
            told["source"] = asdict(directions.source)
        if directions.curves:
            told["curves"] = dict(directions.curves)
        return {**told, "norms": norms}
    program = Program.load(path)
    lines = program.describe().splitlines()
    return {"kind": "program", "model": program.model, "revision": program.revision, "interventions": lines}
