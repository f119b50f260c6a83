"""Load a causal language model by hub id, local folder, `.gguf` file, or the name of the embedded model."""

from __future__ import annotations

import atexit
import re
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from transformers import PreTrainedModel
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from compile_steer.artifacts.paths import real_path
from compile_steer.artifacts.revision import EMBEDDED
from compile_steer.common.distributed import require_alone
from compile_steer.common.errors import RecipeError
from compile_steer.models.chat import ChatSettings, configure
from compile_steer.models.checked import read_model, read_tokenizer
from compile_steer.models.source import find_model, new_cache_folder
from compile_steer.steering.layout import Layout

if TYPE_CHECKING:
    from compile_steer.models.kept_passes import KeptPasses
    from compile_steer.models.shared_blocks import SharedBlocks

_SIZE = r"\d+(\.\d+)?[KMGT]i?B"  # as accelerate reads it
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
        below: what another model has computed that it may share; None where every pass starts at the tokens.
        kept: what an earlier run computed of the same texts; None where every text is run.
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
    below: SharedBlocks | None = None
    kept: KeptPasses | None = None

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
