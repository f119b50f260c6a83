"""Load an artifact from disk as a user's stack would: through plain PEFT, or plain transformers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GgufConfig

from compile_steer.errors import ArtifactError
from compile_steer.models import Loaded, quiet

ADAPTER = "default"  # PEFT's name for the one that is loaded


def reload(folder: Path, base: Loaded) -> Loaded:
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
    return Loaded(model, tokenizer, str(folder), "", str(folder))


def gguf_in(folder: Path) -> Path | None:
    """The GGUF file that `folder` holds, or None."""
    return next(iter(sorted(folder.glob("*.gguf"))), None)


def _dequantised(file: Path, base: Loaded) -> tuple[Any, Any]:
    """Model and tokenizer as transformers reads them off a GGUF file, its weights de-quantised.

    llama.cpp's llama graph adds a bias wherever the file has one, transformers' only where the config says so, which no
    GGUF records: it is told by the tensors. The width of a head is recorded, but not read for every family.

    Raises:
        ArtifactError: the file and the model do not have the same tensors.
    """
    config = AutoConfig.from_pretrained(file.parent, gguf_file=file.name)
    reader = gguf.GGUFReader(file)
    names = {tensor.name for tensor in reader.tensors}
    width = reader.get_field(f"{config.model_type}.attention.key_length")
    if width is not None:
        config.head_dim = int(width.contents())
    if config.model_type == "llama":
        config.attention_bias = "blk.0.attn_output.bias" in names
        config.mlp_bias = "blk.0.ffn_down.bias" in names
    model, loading = AutoModelForCausalLM.from_pretrained(
        file.parent,
        gguf_file=file.name,
        config=config,
        quantization_config=GgufConfig(dequantize=True),
        dtype=base.model.dtype,
        output_loading_info=True,
    )
    wanted = len(dict(model.named_parameters()))
    if loading["missing_keys"] or len(names) != wanted:
        lacking = "".join(f", without {name}" for name in sorted(loading["missing_keys"])[:3])
        raise ArtifactError(f"{file} holds {len(names)} tensors, the model {wanted}{lacking}. Merge again.")
    return model, AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)


def reload_adapters(folders: Mapping[str, Path], base: Loaded) -> Loaded:
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
    return Loaded(model, base.tokenizer, "adapters", "", base.source)


def switch(adapters: Loaded, dials: Mapping[str, float]) -> None:
    """Have the adapters named in `dials` on, each times its dial, and the others off."""
    wrapped: Any = adapters.model
    wrapped.base_model.set_adapter(list(dials), inference_mode=True)
    for module in wrapped.modules():
        if isinstance(module, LoraLayer):
            for name, dial in dials.items():
                module.set_scale(name, dial)


@contextmanager
def switched(adapter: Loaded, dial: float) -> Iterator[None]:
    """Have the one adapter that `reload` has loaded on, times `dial`, inside the block; at its own scale after it."""
    switch(adapter, {ADAPTER: dial})
    try:
        yield
    finally:
        switch(adapter, {ADAPTER: 1.0})


def fresh(base: Loaded) -> Loaded:
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
