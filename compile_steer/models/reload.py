"""Load an artifact from disk as a stock user would: through plain PEFT, or plain transformers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from peft import PeftModel
from peft.tuners.lora import LoraLayer
from transformers import AutoModelForCausalLM, AutoTokenizer

from compile_steer.common.errors import ArtifactError
from compile_steer.models.gguf import gguf_in, read_gguf
from compile_steer.models.load import LoadedModel, frozen, library_errors, quiet

ADAPTER = "default"  # PEFT's name for an adapter that was loaded without one


def reload(folder: Path, base: LoadedModel) -> LoadedModel:
    """Load the adapter at `folder` on a fresh copy of `base`, or the checkpoint or GGUF file with its own tokenizer.

    Raises `ArtifactError` if it does not exist, is damaged, or is an adapter for other modules or widths.
    """
    if (folder / "adapter_config.json").is_file():
        return replace(reload_adapters({ADAPTER: folder}, base), id=str(folder), source=str(folder))
    with _loading(folder):
        if (file := gguf_in(folder)) is not None:
            model, tokenizer, problems = read_gguf(file, base.model.dtype)
            if problems:
                raise ArtifactError([f"{file}: {problem}." for problem in problems] + ["Merge again."])
        else:
            model = AutoModelForCausalLM.from_pretrained(folder, dtype=base.model.dtype)
            tokenizer = AutoTokenizer.from_pretrained(folder)
    return LoadedModel(frozen(model, base.device), tokenizer, str(folder), "", str(folder))


def reload_adapters(folders: Mapping[str, Path], base: LoadedModel) -> LoadedModel:
    """Load adapters, by name, on one fresh copy of `base`; raises as `reload`. `set_adapter_scales` activates some."""
    model: Any = None
    for name, folder in folders.items():
        with _loading(folder):
            if model is None:
                model = PeftModel.from_pretrained(fresh_copy(base).model, str(folder), adapter_name=name)
            else:
                model.load_adapter(str(folder), adapter_name=name)
    return LoadedModel(frozen(model, base.device), base.tokenizer, "adapters", "", base.source)


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


def fresh_copy(base: LoadedModel) -> LoadedModel:
    """Another copy of `base`, loaded from its source."""
    with quiet():
        model = AutoModelForCausalLM.from_pretrained(base.source, dtype=base.model.dtype)
    return replace(base, model=frozen(model, base.device))


def _loading(folder: Path) -> Any:
    return library_errors(
        lambda reason: ArtifactError(
            f"{folder} cannot be loaded by stock libraries ({reason}). Compile or merge again."
        )
    )
