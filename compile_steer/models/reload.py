"""Load an artifact from disk as a user's stack would: through plain PEFT, or plain transformers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from peft import PeftModel
from peft.tuners.lora import LoraLayer
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, AutoTokenizer

from compile_steer.common.errors import ArtifactError
from compile_steer.models.gguf import gguf_in, read_gguf
from compile_steer.models.load import LoadedModel, quiet

ADAPTER = "default"  # PEFT's name for the one that is loaded


def reload(folder: Path, base: LoadedModel) -> LoadedModel:
    """Load the adapter at `folder` on a fresh copy of `base`, or the checkpoint (or GGUF file) with its own tokenizer.

    Raises:
        ArtifactError: there is no such thing, it is damaged, or the adapter is for other modules or widths.
    """
    with _stock_errors(folder):
        if (folder / "adapter_config.json").is_file():
            model = PeftModel.from_pretrained(fresh(base).model, str(folder))
            tokenizer = base.tokenizer
        elif (file := gguf_in(folder)) is not None:
            model, tokenizer = _dequantised(file, base)
        else:
            model = AutoModelForCausalLM.from_pretrained(folder, dtype=base.model.dtype)
            tokenizer = AutoTokenizer.from_pretrained(folder)
    model.to(base.device).eval().requires_grad_(False)
    return LoadedModel(model, tokenizer, str(folder), "", str(folder))


def _dequantised(file: Path, base: LoadedModel) -> tuple[Any, Any]:
    """Model and tokenizer as transformers reads them; raises `ArtifactError` where not all of the file is in the model."""
    model, odd = read_gguf(file, base.model.dtype)
    if odd:
        raise ArtifactError([f"{file}: {one}." for one in odd] + ["Merge again."])
    return model, AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)


def reload_adapters(folders: Mapping[str, Path], base: LoadedModel) -> LoadedModel:
    """Load several adapters, by name, on one fresh copy of `base`; `switch` says which of them are on.

    Raises:
        ArtifactError: as `reload` does.
    """
    model: Any = None
    for name, folder in folders.items():
        with _stock_errors(folder):
            if model is None:
                model = PeftModel.from_pretrained(fresh(base).model, str(folder), adapter_name=name)
            else:
                model.load_adapter(str(folder), adapter_name=name)
    model.to(base.device).eval().requires_grad_(False)
    return LoadedModel(model, base.tokenizer, "adapters", "", base.source)


def switch(adapters: LoadedModel, dials: Mapping[str, float]) -> None:
    """Have the adapters named in `dials` on, each times its dial, and the others off."""
    wrapped: Any = adapters.model
    wrapped.base_model.set_adapter(list(dials), inference_mode=True)
    for module in wrapped.modules():
        if isinstance(module, LoraLayer):
            for name, dial in dials.items():
                module.set_scale(name, dial)


@contextmanager
def switched(adapter: LoadedModel, dial: float) -> Iterator[None]:
    """Have the one adapter that `reload` has loaded on, times `dial`, inside the block; at its own scale after it."""
    switch(adapter, {ADAPTER: dial})
    try:
        yield
    finally:
        switch(adapter, {ADAPTER: 1.0})


def fresh(base: LoadedModel) -> LoadedModel:
    """Another copy of `base`, read from where it lies."""
    with quiet():
        model = AutoModelForCausalLM.from_pretrained(base.source, dtype=base.model.dtype)
    model.to(base.device).eval().requires_grad_(False)
    return replace(base, model=model)


@contextmanager
def _stock_errors(folder: Path) -> Iterator[None]:
    """What stock libraries raise for an artifact that they cannot load, as one `ArtifactError`."""
    try:
        with quiet():
            yield
    except (OSError, ValueError, RuntimeError, KeyError, SafetensorError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ArtifactError(
            f"{folder} cannot be loaded by stock libraries ({reason}). Compile or merge again."
        ) from error
