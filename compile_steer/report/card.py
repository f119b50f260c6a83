"""The model card: what an artifact is, what was measured of it, what is not known, and what loads it.

Every number is read from a report that is of this very artifact, by its hash; where there is none, the card says so.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from compile_steer.artifacts.files import save_text
from compile_steer.artifacts.provenance import CARD, EngineRecord, Provenance, load_engine_records
from compile_steer.export.engine_support import engine_support
from compile_steer.report.terminal import details
from compile_steer.validation.report import ValidationReport, own_validation
from compile_steer.verification.parity import Parity, own_parity


def model_card(origin: Provenance, validation: Path | None) -> str:
    """Return the folder's README before it is verified.

    Args:
        validation: path of the run's validation report, which counts only if the artifact was compiled by it; None where
            there can be none.
    """
    return _render(origin, None if validation is None else own_validation(origin, validation), None, (), {})


def update_card(folder: Path, validation: Path) -> None:
    """Write the README of `folder` again with what the verifier and engines measured; keep base and licence that were filled in.

    Raises:
        ArtifactError: the folder is not one of ours.
    """
    origin = Provenance.read(folder)
    report, parity = own_validation(origin, validation), own_parity(folder)
    header = _read_header(folder / CARD)
    save_text(folder / CARD, _render(origin, report, parity, load_engine_records(folder), header))


def _read_header(path: Path) -> dict[str, str]:
    """Return the fields of a card's YAML header that only a person knows."""
    from ruamel.yaml import YAML
    from ruamel.yaml.error import YAMLError

    if not path.is_file():
        return {}
    before, _dashes, rest = path.read_text(encoding="utf-8").partition("---\n")
    try:
        header = YAML(typ="safe", pure=True).load(rest.partition("\n---\n")[0]) if not before else None
    except YAMLError:
        header = None  # somebody broke it: nothing can be kept
    fields = header if isinstance(header, dict) else {}
    return {key: str(fields[key]) for key in ("license", "base_model") if fields.get(key) is not None}


def _render(
    origin: Provenance,
    validation: ValidationReport | None,
    parity: Parity | None,
    engine_records: Sequence[EngineRecord],
    header: dict[str, str],
) -> str:
    # Imported here: a card is written by commands that must start fast and rarely write one.
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("compile_steer.report"),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        autoescape=False,  # it is Markdown, not HTML
    )
    environment.filters["interval"] = lambda one: f"{one.value:+.3f} [{one.low:+.3f}, {one.high:+.3f}]"
    return environment.get_template("card.md").render(
        p=origin,
        validation=validation,
        parity=parity,
        details=[] if parity is None else details(parity),
        engine_records=engine_records,
        kept={"license": "", "base_model": "", **header},
        engines=engine_support(origin),
    )
