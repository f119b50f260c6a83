"""Load an artifact from disk as a stock user would: through plain PEFT, or plain transformers."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, get_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from peft.utils import load_peft_weights
from torch import nn

from compile_steer.artifacts.files import read_json
from compile_steer.artifacts.tensors import open_tensors
from compile_steer.common.errors import ArtifactError, brief
from compile_steer.models.adapter_patterns import require_quick_patterns
from compile_steer.models.chat import configure
from compile_steer.models.checked import read_model, read_tokenizer
from compile_steer.models.gguf import gguf_in, read_gguf
from compile_steer.models.libraries import quiet_library_errors
from compile_steer.models.load import LoadedModel, frozen, spread_over
from compile_steer.steering.layout import Layout

ADAPTER = "default"  # PEFT's name for an adapter that was loaded without one


def reload(folder: Path, base: LoadedModel) -> LoadedModel:
    """Load the adapter at `folder` on a fresh copy of `base`, or the checkpoint or GGUF file with its own tokenizer.

    Raises `ArtifactError` if it does not exist, is damaged, or is an adapter for other modules or widths.
    """
    if (folder / "adapter_config.json").is_file():
        return replace(reload_adapters({ADAPTER: folder}, base), id=str(folder), source=str(folder))
    explain = _not_loaded(folder)
    if (file := gguf_in(folder)) is not None:
        with quiet_library_errors(explain):
            model, tokenizer, problems = read_gguf(file, base.model.dtype)
        if problems:
            raise ArtifactError([f"{file}: {problem}." for problem in problems] + ["Merge again."])
    else:
        model = read_model(folder, base.model.dtype, explain, spread=spread_over(base.device_map))
        tokenizer = read_tokenizer(folder, model, explain)
    Layout.share(base.model, model)
    # An artifact carries the template that its base was used with, or all of them.
    chat = base.chat if isinstance(tokenizer.chat_template, dict) else replace(base.chat, name=None)
    configure(tokenizer, str(folder), chat=chat)
    model = frozen(model, base.device)
    share_equal(model, base.model)
    return LoadedModel(model, tokenizer, str(folder), "", str(folder), chat=base.chat)


def reload_adapters(folders: Mapping[str, Path], base: LoadedModel) -> LoadedModel:
    """Load adapters, by name, on one fresh copy of `base`; raises as `reload`. `set_adapter_scales` activates some."""
    model: Any = None
    for name, folder in folders.items():
        require_own_files(folder, base.model)
        plain = fresh_copy(base).model if model is None else None
        with quiet_library_errors(_not_loaded(folder)):
            if plain is not None:
                # PEFT would lay out the weights anew, and write a copy of them into the current folder.
                places = {key: plain.__dict__.pop(key) for key in ["hf_device_map"] if key in plain.__dict__}
                model = PeftModel.from_pretrained(plain, str(folder), adapter_name=name)
                plain.__dict__.update(places)
            else:
                model.load_adapter(str(folder), adapter_name=name)
            needed = get_peft_model_state_dict(model, adapter_name=name, save_embedding_layers=False).keys()
            weights = load_peft_weights(str(folder), device=str(base.device))
            held = weights.keys()
            for parameter, value in list(model.named_parameters()):
                # PEFT puts an adapter's weights beside those of the base, which may be on disk.
                if value.is_meta and f".{name}." in parameter:
                    owner, _dot, last = parameter.rpartition(".")
                    own = nn.Parameter(weights[parameter.replace(f".{name}.", ".")].to(base.model.dtype))
                    setattr(model.get_submodule(owner), last, own.requires_grad_(False))
        # PEFT only warns of these, and starts what is missing at random. It may save an embedding beside its edit.
        if different := sorted((needed - held) | (held - needed - model.state_dict().keys())):
            raise ArtifactError(
                f"{folder}: the weights are not those that adapter_config.json asks for; {len(different)} are missing or left "
                f"over, the first {different[0]}. Compile again."
            )
    return LoadedModel(frozen(model, base.device), base.tokenizer, "adapters", "", base.source, chat=base.chat)


def require_own_files(folder: Path, model: nn.Module) -> None:
    """Raise `ArtifactError` for an adapter that PEFT could not put on `model` from its own two files, or not in sane time.

    Other kinds than LoRA have PEFT load tokenizers, models or more adapters from places that the configuration names.
    """
    path, weights = folder / "adapter_config.json", folder / "adapter_model.safetensors"
    config = read_json(path, "Needed: a PEFT adapter's folder.")
    kind = str(config.get("peft_type", "")).rpartition(".")[2]
    if kind != "LORA" or config.get("megatron_config") is not None:
        setting = f"peft_type {brief(kind)}" if kind != "LORA" else "a megatron_config"
        raise ArtifactError(f"{path} has {setting}, which loads more than this folder. Needed: LORA.")
    with open_tensors(weights, "np") as file:  # a pickle beside it is never read
        widest = max((size for name in file.keys() for size in file.get_slice(name).get_shape()), default=0)  # noqa: SIM118
    patterns = config.get("rank_pattern")
    ranks = [config.get("r"), *(patterns.values() if isinstance(patterns, dict) else ())]
    if any(isinstance(rank, int) and rank > widest for rank in ranks):
        raise ArtifactError(f"{path} claims a rank that no tensor of {weights.name} has; the widest is {widest} wide.")
    require_quick_patterns(path, config, [name for name, _module in model.named_modules()])


def set_adapter_scales(adapters: LoadedModel, scales: Mapping[str, float]) -> None:
    """Activate the adapters named in `scales`, each multiplied by its scale, and deactivate the others."""
    wrapped: Any = adapters.model
    wrapped.base_model.set_adapter(list(scales), inference_mode=True)
    for module in wrapped.modules():
        if isinstance(module, LoraLayer):
            for name, scale in scales.items():
                module.set_scale(name, scale)


@contextmanager
def adapter_scaled(adapter: LoadedModel, scale: float) -> Iterator[None]:
    """Multiply the adapter that `reload` has loaded by `scale` inside the block."""
    set_adapter_scales(adapter, {ADAPTER: scale})
    try:
        yield
    finally:
        set_adapter_scales(adapter, {ADAPTER: 1.0})


def share_equal(model: Any, other: Any) -> None:
    """Give `model` the memory of every parameter that `other` has by the same name and with equal values.

    From here on neither may be written to in place.
    """
    theirs = dict(other.named_parameters(remove_duplicate=False))
    for name, own in model.named_parameters(remove_duplicate=False):
        same = theirs.get(name)
        # What lies on disk takes no memory.
        if same is not None and same.dtype == own.dtype and not own.is_meta and torch.equal(same, own):
            own.data = same.data


def shallow_copy(base: LoadedModel) -> LoadedModel:
    """`base` with parameters of its own that share their memory with the base's: give them other tensors, never write to them."""
    own = {id(value): nn.Parameter(value.data, requires_grad=False) for value in base.model.parameters()}
    model = copy.deepcopy(base.model, own)
    Layout.share(base.model, model)
    return replace(base, model=model)


def fresh_copy(base: LoadedModel) -> LoadedModel:
    """Another copy of `base`, loaded from its source; what is equal is in memory once, see `share_equal`."""
    folder = Path(base.source)
    model = read_model(folder, base.model.dtype, _not_loaded(folder), spread=spread_over(base.device_map))
    Layout.share(base.model, model)
    model = frozen(model, base.device)
    share_equal(model, base.model)
    return replace(base, model=model)


def _not_loaded(folder: Path) -> Callable[[str], ArtifactError]:
    return lambda reason: ArtifactError(
        f"{folder} cannot be loaded by stock libraries ({reason}). Compile or merge again."
    )
