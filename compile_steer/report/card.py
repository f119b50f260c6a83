"""The model card: what an artifact is, what was measured of it, what is not known, and what loads it.

Every number is read from a report that is of this very artifact, by its hash; where there is none, the card says so.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from io import StringIO
from pathlib import Path
from types import MappingProxyType
from typing import Any

from markupsafe import Markup
from ruamel.yaml import YAML

from compile_steer.artifacts.files import digest, edit_check, read_front_matter, save_text
from compile_steer.artifacts.paths import real_path
from compile_steer.artifacts.provenance import CARD, PARITY, EngineRecord, Provenance, load_engine_records
from compile_steer.common.errors import ArtifactError
from compile_steer.export.engine_support import engine_support
from compile_steer.report.render import render
from compile_steer.report.terminal import details
from compile_steer.validation.report import own_validation
from compile_steer.verification.parity import Parity, own_parity

_FILLED_IN = {
    "base_model": "the base was a local model, and its id on the hub is not known here",
    "license": "it is not known here, and what is made from a base model is bound by that model's licence",
}
"""Fields of the header that only a person knows, and why."""
_SEAL = "\n<!-- SHA-256 of this card with its record and report: {} -->"


def model_card(
    origin: Provenance,
    folder: Path,
    validation: Path | None,
    parity: Parity | None = None,
    engine_records: Sequence[EngineRecord] = (),
    header: Mapping[str, Any] = MappingProxyType({}),
    parity_sha256: str = "",
) -> str:
    """Return the folder's README; by default as before it is verified.

    Args:
        folder: where the artifact lies; commands call it by its name.
        validation: path of the run's validation report, which counts only if the artifact was compiled by it; None where
            there can be none.
        header: fields of the YAML header that a person filled in.
        parity_sha256: the edit check of the parity report's file.
    """
    text = render(
        "card.md",
        p=origin,
        validation=None if validation is None else own_validation(origin, validation),
        parity=parity,
        details=[] if parity is None else details(parity),
        engine_records=engine_records,
        header=Markup(_header(origin, header)),
        engines=engine_support(origin, Path(folder.name)),
        folder=folder.name,
        validation_ask=origin.recipe.get("ask", ""),
        interval=lambda i: f"{i.value:+.3f} [{i.low:+.3f}, {i.high:+.3f}]",
    )
    return f"{text}{_SEAL.format(_seal(text, origin, parity_sha256))}\n"


def card_check(folder: Path) -> tuple[str, str]:
    """The edit check of a folder's card: the SHA-256 that it carries ('' if it has none), and what it should be.

    It holds for the text below the YAML header, and for the artifact and the parity report that lie beside the card now.
    What a person adds below it is his own. Raises `ArtifactError` where there is no card, or no artifact of ours.
    """
    try:
        text = (folder / CARD).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ArtifactError(f"{folder / CARD} cannot be read ({error}). Run 'compile-steer verify' again.") from error
    before, mark, rest = text.partition(_SEAL.partition("{}")[0])
    origin, parity = Provenance.read(folder), folder / PARITY
    recorded, actual = (
        rest[:64] if mark else "",
        _seal(before, origin, edit_check(parity)[0] if parity.is_file() else ""),
    )
    # A card says "not verified" beside a report of another artifact.
    unverified = _seal(before, origin, "")
    return recorded, unverified if recorded == unverified and own_parity(folder) is None else actual


def _seal(text: str, origin: Provenance, parity_sha256: str) -> str:
    body = text.partition("\n---\n")[2] or text  # a person fills in the header
    bound_to = [origin.name, origin.backend, origin.form, origin.program_sha256, origin.inputs]
    return digest([body, bound_to, parity_sha256])


def update_card(folder: Path, validation: Path) -> None:
    """Write the README of `folder` again with what the verifier and engines measured; keep base and licence that were filled in.

    Raises:
        ArtifactError: the folder is not one of ours.
    """
    origin, header, records = Provenance.read(folder), _read_header(folder / CARD), load_engine_records(folder)
    parity = own_parity(folder)
    seal = edit_check(folder / PARITY)[0] if parity else ""
    save_text(folder / CARD, model_card(origin, real_path(folder), validation, parity, records, header, seal))


def _header(origin: Provenance, filled: Mapping[str, Any]) -> str:
    """The YAML header, with a comment for each field that only a person knows and nobody filled in."""
    library = "gguf" if origin.form.startswith("gguf") else "transformers" if origin.is_merged else "peft"
    base = {"base_model": origin.model} if origin.revision.startswith("hub:") else {}
    known = {"license": origin.license} if origin.license else {}
    fields = {"library_name": library, **base, **known, **filled, "tags": ["steering-vector", "compile-steer"]}
    yaml, stream = YAML(), StringIO()
    yaml.width = 4096
    yaml.dump(fields, stream)
    missing = (f"# {name}: fill in; {why}\n" for name, why in _FILLED_IN.items() if name not in fields)
    return (stream.getvalue() + "".join(missing)).rstrip()


def _read_header(path: Path) -> dict[str, Any]:
    """Return the fields of a card's YAML header that only a person knows."""
    fields = read_front_matter(path)  # where somebody broke it, nothing can be kept
    kept = {key: fields[key] for key in _FILLED_IN if fields.get(key)}
    return {key: list(map(str, value)) if isinstance(value, list) else str(value) for key, value in kept.items()}
