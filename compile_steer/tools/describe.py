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


def summary_of(description: dict[str, Any]) -> list[tuple[str, str]]:
    """At most four (name, text) that say what `describe_artifact` found: what it is, what it does, how it did."""
    kind = description["kind"]
    if kind == "artifact":
        origin, parity = description["provenance"], description.get("parity")
        forced = ", compiled in spite of it" if origin["forced"] else ""
        return [
            ("what", f"{origin['name']}: {origin['form']} by {origin['backend']}, on {origin['model']}"),
            ("does", _first(origin["described"].splitlines())),
            ("direction", f"validation: {origin['verdict']}{forced}"),
            ("file", _parity_text(parity) if parity else "never verified: run compile-steer verify"),
        ]
    if kind == "validation report":
        chosen = f"layer {description['layer']}, coefficient {description['coefficient']:.3g}"
        scores, n_prompts = description["scores"], description["n_prompts"]
        gain = f"score {scores['base']:.2f} to {scores['steered']:.2f} on {n_prompts} test prompts"
        rows = {"what": f"validation of {description['name']}", "chosen": chosen, "verdict": description["verdict"]}
        return [*rows.items(), ("gain", gain)]
    if kind == "parity report":
        return [
            ("what", f"report on {description['form']} by {description['backend']}"),
            ("file", _parity_text(description)),
        ]
    if kind == "program":
        return [
            ("what", f"steering program for {description['model']}"),
            ("does", _first(description["interventions"])),
        ]
    if kind == "directions":
        blocks = sum(norm > 0 for norm in description["norms"])
        return [("what", f"directions of {blocks} blocks at {description['point']}, for {description['model']}")]
    return [("what", kind)]


def _first(lines: list[str]) -> str:
    return f"{lines[0] if lines else '-'}{f' (and {len(lines) - 1} more)' if len(lines) > 1 else ''}"


def _parity_text(parity: dict[str, Any]) -> str:
    try:
        left, top1 = parity["divergence"]["kl_remaining"]["value"], parity["divergence"]["top1"]
        verdict = "passed" if parity["passed"] else f"FAILED ({len(parity['reasons'])} gates)"
        return f"{verdict}; {left:.3%} of what steering changes is left over, the same next token in {top1:.1%}"
    except (KeyError, TypeError, ValueError):
        return "its report is no complete one: verify again"
