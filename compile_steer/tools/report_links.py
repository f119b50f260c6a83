"""The links from an artifact to the reports on it: are they of this very artifact, and does the verdict follow from the figures?

An edit check notices what was edited by hand. Whoever computes it again can write anything, so that the reports are held
against each other and against their own figures too; beyond that only measuring again helps.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Literal

from compile_steer.artifacts.files import edit_check, read_json, sha256
from compile_steer.artifacts.provenance import (
    CARD,
    ENGINES,
    PARITY,
    Origin,
    Provenance,
    artifact_sha256,
    weights_sha256,
)
from compile_steer.common.errors import ArtifactError, RecipeError
from compile_steer.recipe import Recipe
from compile_steer.report.card import card_check
from compile_steer.validation.report import ValidationReport
from compile_steer.validation.verdict import decide
from compile_steer.verification.gates import judged
from compile_steer.verification.options import Gates
from compile_steer.verification.parity import Parity

State = Literal["intact", "changed", "missing", "unrecorded"]


@dataclass(frozen=True)
class Link:
    """One step from an artifact back to its data.

    intact: `path` is what was recorded; changed: it is not; missing: nothing is here to compare with; unrecorded: the
    artifact is older than this record.
    """

    name: str  # what the artifact was made from, or is described by
    state: State
    path: str  # what was read
    expected: str = ""  # the recorded SHA-256, or words where there is no hash
    actual: str = ""  # that of what lies there


def compared_link(name: str, path: Path | str, expected: str, actual: str) -> Link:
    """A link whose two hashes should be equal; '' for `actual` where nothing is there."""
    state: State = "missing" if not actual else "intact" if actual == expected else "changed"
    return Link(name, state, str(path), expected, actual)


def recorded_link(name: str, path: Path, expected: str) -> Link:
    """Whether the file or artifact folder at `path` has the recorded hash."""
    actual = "" if not path.exists() else artifact_sha256(path) if path.is_dir() else sha256(path)
    return compared_link(name, path, expected, actual)


def check_link(name: str, path: Path, expected: str, actual: str) -> Link:
    """The same of a check that older files do not carry."""
    return compared_link(name, path, expected, actual) if expected else Link(name, "unrecorded", str(path), "", actual)


def edit_link(name: str, path: Path) -> Link:
    """Whether a record was edited by hand since it was written."""
    expected, actual = edit_check(path)
    return compared_link(name, path, expected or "a hash of its own content", actual)


def report_links(folder: Path, provenance: Provenance) -> Iterator[Link]:
    """What was measured of the folder, by verification and in serving engines, and its card: are they of this artifact?"""
    parity, engines, card = folder / PARITY, folder / ENGINES, folder / CARD
    if parity.is_file():
        yield from _parity_links(parity, folder, provenance)
    elif provenance.form != "patch":  # a patch is measured once it is merged
        yield Link("parity", "missing", str(parity), "a report of 'compile-steer verify'")
    if engines.is_file():
        yield edit_link("engines' record", engines)
        measured = str(read_json(engines, "Make it again.").get("artifact", ""))
        yield compared_link("engines' records are of these weights", engines, measured, weights_sha256(folder))
    if card.is_file():
        yield check_link("card", card, *card_check(folder))
    else:
        yield Link("card", "missing", str(card), "a card of 'compile-steer verify'")


def _parity_links(path: Path, folder: Path, provenance: Provenance) -> Iterator[Link]:
    yield edit_link("parity's record", path)
    try:
        parity = Parity.load(path)
    except ArtifactError as error:
        yield Link("parity is of these weights", "changed", str(path), "a complete report", error.problems[0])
        return
    weights, *others = parity.bonds(folder, provenance)
    yield compared_link("parity is of these weights", path, *weights[1:])
    yield from (compared_link(f"parity's {what}", path, *hashes) for what, *hashes in others if hashes[0] != hashes[1])
    # Whoever computes the report's hash again can write any verdict; one that its figures do not give shows.
    if parity.settings.get("compile_steer") == version("compile_steer"):
        again = judged(parity, Gates.model_validate(parity.settings["verify"]["gates"]))
        state: State = "intact" if again == parity else "changed"
        yield Link("parity's verdict", state, str(path), "; ".join(again.reasons) or "passed", parity.verdict)
    else:
        yield Link("parity's verdict", "unrecorded", str(path), "a verdict of this version")


def validation_links(path: Path, origin: Origin | None, verdict: str = "") -> Iterator[Link]:
    """Whether the report's verdict is the one that the artifact records and follows from its figures, and its rows are there."""
    report = ValidationReport.load(path)
    if verdict not in ("", "none"):
        yield compared_link("validation's verdict", path, verdict, report.verdict)
    if origin is not None and origin.versions.get("compile_steer") == version("compile_steer"):
        try:
            decided, reasons = decide(report, Recipe.recall(origin.recipe, path.parent).validate_)
        except RecipeError:  # keys of another version
            decided, reasons = report.verdict, report.reasons
        if (decided, reasons) != (report.verdict, report.reasons):
            words = f"{decided}: {'; '.join(reasons)}", f"{report.verdict}: {'; '.join(report.reasons)}"
            yield Link("validation's verdict by its figures", "changed", str(path), *words)
    rows = path.with_name(path.name.replace(".validation.json", ".prompts.jsonl"))
    if report.prompts_sha256:
        yield recorded_link("results by prompt", rows, report.prompts_sha256)
    elif rows.is_file():
        yield Link("results by prompt", "unrecorded", str(rows))
