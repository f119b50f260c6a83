"""Send an artifact to a hub: list what would be sent, measure it again, and refuse what is not what its report says."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

from huggingface_hub import CommitOperationAdd, HfApi

from compile_steer.artifacts.files import own_files, read_front_matter, sha256
from compile_steer.artifacts.paths import RunPaths
from compile_steer.artifacts.provenance import CARD, PARITY, Provenance
from compile_steer.common.errors import ArtifactError, RecipeError, library_errors
from compile_steer.common.progress import Progress
from compile_steer.pipeline.artifacts import verify
from compile_steer.pipeline.run import Run
from compile_steer.tools.lineage import lineage
from compile_steer.tools.reproduce import recalled_recipe
from compile_steer.verification.parity import own_parity

_TARGET = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", re.ASCII)

# Two machines sum in different orders; a figure that was changed by less says the same.
_RELATIVE = 0.01
_ABSOLUTE = 1e-6
_SHOWN = 5


@dataclass(frozen=True)
class File:
    """One file as it is sent: its name in the repository, bytes, SHA-256."""

    name: str
    size: int
    sha256: str


@dataclass(frozen=True)
class Upload:
    """What `send` will do. `refusals` are reasons not to do it, `notes` what to know before."""

    folder: Path
    target: str
    private: bool
    files: tuple[File, ...]
    refusals: list[str]
    notes: list[str]


def prepare(folder: Path, target: str, private: bool, recipes: Path | None = None) -> Upload:
    """List what sending `folder` to `target` (OWNER/NAME) would do; nothing leaves the machine.

    Args:
        recipes: what the paths in the recorded recipe are relative to; None: found from where the artifact lies.

    Raises:
        RecipeError: `target` names no repository. ArtifactError: the folder is not one of ours, or damaged.
    """
    if not _TARGET.fullmatch(target):
        raise RecipeError(f"--to {target}: needed: OWNER/NAME, of letters, digits, '.', '_' and '-'.")
    provenance = Provenance.read(folder)
    files = tuple(File(name, (folder / name).stat().st_size, sha256(folder / name)) for name in own_files(folder))
    refusals = []
    notes = []
    for link in lineage(folder, recipes):
        if link.state == "changed":
            expected, actual = link.expected or "no such file", link.actual or "nothing"
            refusals.append(f"{link.name}: {link.path} was changed (expected {expected}, found {actual}).")
        elif link.state == "unrecorded" or (link.name == "card" and link.state == "missing"):
            notes.append(f"{link.name}: {link.path} cannot be checked ({link.state}).")
    parity = own_parity(folder)
    if parity is None:
        reason = "is missing" if not (folder / PARITY).is_file() else "is of other weights, or was edited"
        refusals.append(f"not verified: {PARITY} {reason}. Run 'compile-steer verify'.")
    elif not parity.passed:
        refusals.append(f"verification failed: {'; '.join(parity.reasons)}.")
    elif parity.unchecked:
        notes.append(f"not checked: {', '.join(check.name for check in parity.unchecked)}; the card says why.")
    if provenance.verdict != "pass":
        forced = ", and compiled with --force" if provenance.forced else ""
        notes.append(f"validation: {provenance.verdict}{forced}; the card says so.")
    if not provenance.revision.startswith("hub:"):
        local = f"the base is named as '{provenance.model}' in the files, a local model"
        notes.append(f"{local}; name its id in the card (base_model).")
    licence = "fill in the licence in the card's header before it is public: the base's licence binds it."
    notes += [licence] * (not read_front_matter(folder / CARD).get("license"))
    return Upload(folder, target, private, files, refusals, notes)


def measured_again(upload: Upload, recipes: Path | None, progress: Progress, model: str | None = None) -> Upload:
    """The upload with a refusal for everything that its report says and that does not come out again.

    Whoever computes a record's hash again can write any figure; only measuring shows that. It is done in this process, by
    the recipe and settings that artifact and report carry.
    """
    return replace(upload, refusals=[*upload.refusals, *_measured_again(upload.folder, recipes, progress, model)])


def _measured_again(folder: Path, recipes: Path | None, progress: Progress, model: str | None) -> list[str]:
    provenance, recorded = Provenance.read(folder), own_parity(folder)
    if recorded is None or not recorded.settings:
        return ["no report to measure again. Run 'compile-steer verify'."]
    if provenance.members or provenance.recombined or not provenance.recipe:
        made_of = provenance.recombined or ", ".join(provenance.members) or "no recorded recipe"
        return [f"cannot be measured again: it was made from {made_of}, for which there is no one recipe."]
    record = {**provenance.recipe, **{key: recorded.settings[key] for key in ("verify", "seed", "ask")}}
    recipe, out = recalled_recipe(folder, record, recipes, model), RunPaths.of_artifact(folder, provenance.name).out
    (measured,) = verify(Run.open(recipe, out, progress), [folder], save=False)
    differences = islice(_differences(asdict(recorded), asdict(measured)), _SHOWN)
    refusals = [
        f"measured again, {place} is {now!s:.200}, in {PARITY} {then!s:.200}." for place, then, now in differences
    ]
    return [*refusals, "Run 'compile-steer verify': it writes what it measures."] if refusals else []


def _differences(then: Any, now: Any, where: str = "") -> Iterator[tuple[str, Any, Any]]:
    """Every figure of two reports that is not the same but for rounding: (its place, then, now)."""
    if isinstance(then, dict) and isinstance(now, dict):
        for key in then | now:
            # Words hold the figures that are compared; the recipe's hash has no settings of this report in it.
            if key not in ("reasons", "text", "recipe", "versions", "unmeasured"):
                yield from _differences(then.get(key), now.get(key), f"{where}.{key}".lstrip("."))
    elif isinstance(then, list) and isinstance(now, list) and len(then) == len(now):
        for index, (old, new) in enumerate(zip(then, now, strict=True)):
            yield from _differences(old, new, f"{where}.{index}")
    elif isinstance(then, int | float) and isinstance(now, int | float):
        if not math.isclose(then, now, rel_tol=_RELATIVE, abs_tol=_ABSOLUTE):
            yield where, then, now
    elif then != now:
        yield where, then, now


def send(upload: Upload, hub: HfApi) -> str:
    """Create the repository if there is none and commit exactly the listed files; returns their address.

    Raises:
        ArtifactError: a file changed since it was listed, or the hub refused or could not be reached.
    """
    # Between listing and sending a person reads and decides. An operation holds the hash of what it will send.
    operations = [CommitOperationAdd(file.name, upload.folder / file.name) for file in upload.files]
    sent = {operation.path_in_repo: operation.upload_info.sha256.hex() for operation in operations}
    changed = [file.name for file in upload.files if sent[file.name] != file.sha256]
    if changed:
        raise ArtifactError(f"{upload.folder}: {', '.join(changed)} changed since it was listed; nothing was sent.")
    advice = "Log in with 'hf auth login', with a token that may write there."
    with library_errors(lambda reason: ArtifactError(f"{upload.target} was not written ({reason}). {advice}")):
        # exist_ok: an artifact is sent again after its card was filled in.
        hub.create_repo(upload.target, private=upload.private, repo_type="model", exist_ok=True)
        commit = hub.create_commit(upload.target, operations, commit_message=f"compile_steer: {upload.folder.name}")
    return str(commit)
