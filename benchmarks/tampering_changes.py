"""What somebody may do to a file or folder of an artifact; `tampering` says who must notice."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from safetensors.numpy import load_file, save_file

from compile_steer.artifacts.files import read_json, save_record
from compile_steer.artifacts.tensors import read_metadata
from compile_steer.report.card import update_card

Change = Callable[[Path], object]


def flip(path: Path) -> None:
    """One bit of the last tensor."""
    content = bytearray(path.read_bytes())
    content[-3] ^= 1
    path.write_bytes(bytes(content))


def scale(path: Path) -> None:
    """Every tensor times 1.01: a valid file."""
    metadata = read_metadata(path)
    save_file({name: tensor * tensor.dtype.type(1.01) for name, tensor in load_file(path).items()}, path, metadata)


def cut(path: Path) -> None:
    """Its last 40 bytes are gone."""
    path.write_bytes(path.read_bytes()[:-40])


def empty(path: Path) -> None:
    """No byte is left."""
    path.write_bytes(b"")


def rename(path: Path) -> None:
    """It lies under another name."""
    path.rename(path.with_name(f"old-{path.name}"))


def header(path: Path) -> None:
    """Another entry in the metadata of a safetensors file, its tensors the same."""
    tensors, metadata = load_file(path), read_metadata(path)
    save_file(tensors, path, {**metadata, "note": "edited"})


def edit(**changes: Any) -> Change:
    """A JSON object with other values, as by hand."""

    def change(path: Path) -> None:
        path.write_text(json.dumps({**json.loads(path.read_text("utf-8")), **changes}, indent=2), "utf-8")

    return change


def without(key: str) -> Change:
    """A JSON object without one of its keys."""

    def change(path: Path) -> None:
        content = json.loads(path.read_text("utf-8"))
        del content[key]
        path.write_text(json.dumps(content, indent=2), "utf-8")

    return change


def figures(**changes: Any) -> Change:
    """A JSON record with other values in its sections (a__b), its edit check computed again."""

    def change(path: Path) -> None:
        content = read_json(path, "")
        content.pop("record_sha256", None)
        for name, value in changes.items():
            *sections, key = name.split("__")
            place = content
            for section in sections:
                place = place[section]
            place[key] = value
        save_record(path, content)

    return change


def copied(other: str) -> Change:
    """Replaced by the file of another artifact; `other` is relative to the run's folder."""
    return lambda path: shutil.copy(path.parents[len(path.parts) - 1 - path.parts.index("runs") - 2] / other, path)


def exchanged(other: str) -> Change:
    """Two folders change places."""

    def change(path: Path) -> None:
        second, kept = path.parent / other, path.parent / "kept"
        path.rename(kept)
        second.rename(path)
        kept.rename(second)

    return change


def beside(name: str, content: bytes = b"{}") -> Change:
    """One more file in a folder."""
    return lambda path: (path / name).write_bytes(content)


def link_beside(path: Path) -> None:
    """A linked folder from which a tokenizer would read more templates."""
    (path / "additional_chat_templates").symlink_to(path.parent)


def row(path: Path) -> None:
    """The first row of data with another word."""
    first, *rest = path.read_text("utf-8").splitlines()
    path.write_text("\n".join([first.replace("w", "w1", 1), *rest]), "utf-8")


def figure_in_card(path: Path) -> None:
    """Every number of the card becomes another one."""
    path.write_text(path.read_text("utf-8").replace("0.", "1."), "utf-8")


def forged_report(path: Path) -> None:
    """A figure that is no gate, so that the verdict follows all the same; hash and card are made again."""
    from compile_steer.verification.gates import judged
    from compile_steer.verification.options import Gates
    from compile_steer.verification.parity import Parity

    content = read_json(path, "")
    content.pop("record_sha256")
    content["divergence"]["kl_base"] *= 1.5
    save_record(path, content)
    parity = Parity.load(path)
    assert judged(parity, Gates.model_validate(parity.settings["verify"]["gates"])).checks == parity.checks
    update_card(path.parent, path.parents[2] / "vectors" / "tide.validation.json")
