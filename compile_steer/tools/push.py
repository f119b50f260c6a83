"""Send an artifact to a hub: list what would be sent, and refuse what was not verified or was changed."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import cast

from huggingface_hub import CommitOperationAdd, HfApi
from huggingface_hub.errors import HfHubHTTPError

from compile_steer.artifacts.files import own_files, sha256
from compile_steer.artifacts.provenance import PARITY, Provenance
from compile_steer.common.errors import ArtifactError, RecipeError
from compile_steer.tools.lineage import lineage
from compile_steer.verification.parity import own_parity

_TARGET = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", re.ASCII)
# The errors of whichever HTTP library the hub's client uses are the bases of its own.
_HUB_ERRORS = cast("tuple[type[Exception], ...]", (*HfHubHTTPError.__bases__, ValueError))


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


def prepare(folder: Path, target: str, private: bool) -> Upload:
    """List what sending `folder` to `target` (OWNER/NAME) would do; nothing leaves the machine.

    Raises:
        RecipeError: `target` names no repository. ArtifactError: the folder is not one of ours, or damaged.
    """
    if not _TARGET.fullmatch(target):
        raise RecipeError(f"--to {target}: needed: OWNER/NAME, of letters, digits, '.', '_' and '-'.")
    provenance = Provenance.read(folder)
    files = tuple(File(name, (folder / name).stat().st_size, sha256(folder / name)) for name in own_files(folder))
    refusals = []
    for link in lineage(folder):
        if link.state == "changed":
            expected, actual = link.expected or "no such file", link.actual or "nothing"
            refusals.append(f"{link.name}: {link.path} was changed (expected {expected}, found {actual}).")
    parity = own_parity(folder)
    if parity is None:
        reason = "is missing" if not (folder / PARITY).is_file() else "is of other weights, or was edited"
        refusals.append(f"not verified: {PARITY} {reason}. Run 'compile-steer verify'.")
    elif not parity.passed:
        refusals.append(f"verification failed: {'; '.join(parity.reasons)}.")
    notes = []
    if provenance.verdict != "pass":
        forced = ", and compiled with --force" if provenance.forced else ""
        notes.append(f"validation: {provenance.verdict}{forced}; the card says so.")
    if not provenance.revision.startswith("hub:"):
        local = f"the base is named as '{provenance.model}' in the files, a local model"
        notes.append(f"{local}; name its id in the card (base_model).")
    notes.append("fill in the licence in the card's header before it is public: the base's licence binds it.")
    return Upload(folder, target, private, files, refusals, notes)


def send(upload: Upload, hub: HfApi) -> str:
    """Create the repository if there is none and commit exactly the listed files; returns their address.

    Raises:
        ArtifactError: a file changed since it was listed, or the hub refused or could not be reached.
    """
    # Between listing and sending a person reads and decides.
    changed = [file.name for file in upload.files if sha256(upload.folder / file.name) != file.sha256]
    if changed:
        raise ArtifactError(f"{upload.folder}: {', '.join(changed)} changed since it was listed; nothing was sent.")
    operations = [CommitOperationAdd(file.name, upload.folder / file.name) for file in upload.files]
    try:
        # exist_ok: an artifact is sent again after its card was filled in.
        hub.create_repo(upload.target, private=upload.private, repo_type="model", exist_ok=True)
        commit = hub.create_commit(upload.target, operations, commit_message=f"compile_steer: {upload.folder.name}")
    except _HUB_ERRORS as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ArtifactError(
            f"{upload.target} was not written ({reason}). Log in with 'hf auth login', with a token that may write there."
        ) from error
    return str(commit)
