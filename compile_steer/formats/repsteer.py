"""A repsteer artifact: a folder of `manifest.json`, `tensors.safetensors` and `checksums.json`."""

from __future__ import annotations

from pathlib import Path

from compile_steer.artifacts.files import sha256
from compile_steer.artifacts.tensors import read_tensors
from compile_steer.common.errors import ArtifactError
from compile_steer.formats.foreign import Foreign, Given, read_json

MANIFEST, TENSORS, CHECKSUMS = "manifest.json", "tensors.safetensors", "checksums.json"
_VECTORS = {"direction": "direction", "sae_feature": "decoder_direction"}


def read(path: Path, _given: Given) -> Foreign:
    """The one direction of an artifact, whose checksums hold; raises `ArtifactError`."""
    _require_checksums(path)
    manifest = read_json(path / MANIFEST, "repsteer's manifest")
    kind, site, model = (manifest.get(key) for key in ("artifact_type", "site", "model"))
    problems = []
    if kind not in _VECTORS:
        problems.append(f"{path} is of type '{kind}'; a vector is one of {', '.join(_VECTORS)}.")
    site = site if isinstance(site, dict) else {}
    layer, component = site.get("layer"), site.get("component")
    if component not in ("resid_pre", "resid_post") or type(layer) is not int or site.get("stream") != "language":
        problems.append(
            f"{path} is of site {site}; needed: stream language, component resid_pre or resid_post, and a layer."
        )
    if problems:
        raise ArtifactError(problems)
    tensors, _metadata = read_tensors(path / TENSORS)
    name = _VECTORS[str(kind)]
    if name not in tensors:
        raise ArtifactError(f"{path / TENSORS} has no tensor '{name}'.")
    hint = str(model.get("id", "")) if isinstance(model, dict) else ""
    vector, block = tensors[name].float(), int(str(layer))
    if component == "resid_pre" and block > 0:
        return Foreign({block - 1: vector}, made_for=hint)  # the input of a block is the output of the one before
    return Foreign({block: vector}, "resid_pre" if component == "resid_pre" else "resid_post", made_for=hint)


def _require_checksums(path: Path) -> None:
    stated = read_json(path / CHECKSUMS, "repsteer's checksums")
    files = stated.get("files")
    if stated.get("algorithm") != "sha256" or not isinstance(files, dict):
        raise ArtifactError(f"{path / CHECKSUMS} holds no SHA-256 checksums; save the artifact again.")
    problems = []
    for name in (MANIFEST, TENSORS):
        found = sha256(path / name) if (path / name).is_file() else "no such file"
        if found != str(files.get(name)).removeprefix("sha256:"):
            problems.append(f"{path / name} is not what {CHECKSUMS} says: {files.get(name)}; found {found}.")
    if problems:
        raise ArtifactError([*problems, "Fetch the artifact again, or save it again where it was made."])
