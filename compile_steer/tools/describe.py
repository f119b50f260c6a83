"""What an artifact of any kind says about itself. Of a folder or report neither torch nor transformers is imported."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

from compile_steer.artifacts.files import read_json, without_check
from compile_steer.artifacts.provenance import PARITY, Provenance
from compile_steer.artifacts.tensors import read_metadata
from compile_steer.validation.report import ValidationReport


def describe_artifact(path: Path) -> dict[str, Any]:
    """What an artifact of any kind says about itself, as JSON; raises `ArtifactError` where it cannot be read."""
    if path.is_dir():
        description: dict[str, Any] = {"kind": "artifact", "provenance": asdict(Provenance.read(path))}
        if (path / PARITY).is_file():
            description["parity"] = without_check(read_json(path / PARITY, "Verify again."))
        return description
    if path.suffix == ".json":
        content = without_check(read_json(path, "Make it again."))
        kind = "composition" if "matrix" in content else content.get("kind", "validation report")
        if kind == "validation report":
            content = asdict(ValidationReport.load(path))  # refuses files that are no report of ours
        return {"kind": kind, **content}

    from compile_steer.steering.directions import Directions
    from compile_steer.steering.program import Program

    if "directions" in read_metadata(path):
        directions = Directions.load(path)
        norms = [round(float(norm), 4) for norm in directions.vectors.norm(dim=-1)]
        source = {} if directions.source is None else {"source": asdict(directions.source)}
        curves = {"curves": dict(directions.curves)} if directions.curves else {}
        description = {"kind": "directions", "model": directions.model, "point": directions.point}
        return {**description, **source, **curves, "norms": norms}
    program = Program.load(path)
    lines = program.describe().splitlines()
    return {"kind": "program", "model": program.model, "revision": program.revision, "interventions": lines}
