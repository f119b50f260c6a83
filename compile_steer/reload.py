"""Load an artifact from disk as a user's stack would: through plain PEFT, or plain transformers."""

from __future__ import annotations

from pathlib import Path

from peft import PeftModel
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, AutoTokenizer

from compile_steer.errors import ArtifactError
from compile_steer.models import Loaded, quiet


def reload(folder: Path, base: Loaded) -> Loaded:
    """Load the adapter at `folder` on a fresh copy of `base`, or the checkpoint with its own tokenizer.

    Raises:
        ArtifactError: there is no such thing, it is damaged, or the adapter is for other modules or widths.
    """
    dtype = base.model.dtype
    try:
        with quiet():
            if (folder / "adapter_config.json").is_file():
                fresh = AutoModelForCausalLM.from_pretrained(base.source, dtype=dtype)
                model = PeftModel.from_pretrained(fresh, str(folder))
                tokenizer = base.tokenizer
            else:
                model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
                tokenizer = AutoTokenizer.from_pretrained(folder)
    except (OSError, ValueError, RuntimeError, KeyError, SafetensorError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ArtifactError(
            f"{folder} cannot be loaded by stock libraries ({reason}). Compile or merge again."
        ) from error
    model.to(base.device).eval().requires_grad_(False)
    return Loaded(model, tokenizer, str(folder), "", str(folder))
