"""The model card: what an artifact is, what was measured of it, what is not known, and what loads it.

Every number is read from a report that is of this very artifact, by its hash; where there is none, the card says so.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from jinja2 import Environment, PackageLoader, StrictUndefined
from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from compile_steer.artifacts.files import save_text
from compile_steer.artifacts.provenance import CARD, EngineRecord, Provenance, load_engine_records
from compile_steer.export.engine_support import engine_support
from compile_steer.report.terminal import details
from compile_steer.validation.report import ValidationReport, own_validation
from compile_steer.verification.parity import Parity, own_parity


def model_card(origin: Provenance, validation: Path | None) -> str:
    """The folder's README before anything has judged it.

    Args:
        validation: where the run's validation report lies; it counts only if the artifact was compiled by it. None where
            there can be none.
    """
    return _render(origin, None if validation is None else own_validation(origin, validation), None, (), {})


def update_card(folder: Path, validation: Path) -> None:
    """Write the README of `folder` again, with what the judge and serving engines found; base and licence that somebody filled in stay.

    Raises:
        ArtifactError: the folder is not one of ours.
    """
    origin = Provenance.read(folder)
    report, parity = own_validation(origin, validation), own_parity(folder)
    kept = _filled_in(folder / CARD)
    save_text(folder / CARD, _render(origin, report, parity, load_engine_records(folder), kept))


def _filled_in(path: Path) -> dict[str, str]:
    """What a card's header says that only a person knows."""
    if not path.is_file():
        return {}
    before, _dashes, rest = path.read_text(encoding="utf-8").partition("---\n")
    try:
        found = YAML(typ="safe", pure=True).load(rest.partition("\n---\n")[0]) if not before else None
    except YAMLError:
        found = None  # no header any more: there is nothing to keep
    header = found if isinstance(found, dict) else {}
    return {key: str(header[key]) for key in ("license", "base_model") if header.get(key) is not None}


def _render(
    origin: Provenance,
    validation: ValidationReport | None,
    parity: Parity | None,
    readings: Sequence[EngineRecord],
    kept: dict[str, str],
) -> str:
    environment = Environment(
        loader=PackageLoader("compile_steer.report"),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        autoescape=False,
    )
    environment.filters["interval"] = lambda one: f"{one.value:+.3f} [{one.low:+.3f}, {one.high:+.3f}]"
    given = {
        "p": origin,
        "validation": validation,
        "parity": parity,
        "details": [] if parity is None else details(parity),
        "readings": readings,
        "kept": {"license": "", "base_model": "", **kept},
        "engines": engine_support(origin),
    }
    return environment.get_template("card.md").render(**given)
