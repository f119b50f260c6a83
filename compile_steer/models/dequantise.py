"""Models of few bits as plain checkpoints, where transformers, or the library that quantised them, can do it without a GPU."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    CompressedTensorsConfig,
    FineGrainedFP8Config,
    Mxfp4Config,
    PreTrainedModel,
)

from compile_steer.artifacts.files import read_json
from compile_steer.common.errors import ArtifactError, brief
from compile_steer.models.checked import DEQUANTISED_HERE, OF_OTHERS, require_loaded
from compile_steer.models.libraries import quiet_library_errors

_CONFIGS = {"fp8": FineGrainedFP8Config, "mxfp4": Mxfp4Config}
_LIBRARIES = {"compressed-tensors": "compressed_tensors", "bitsandbytes": "bitsandbytes"}


def read_dequantised(folder: Path) -> PreTrainedModel:
    """The model in `folder` with its weights de-quantised to bfloat16.

    Raises `ArtifactError` where it is quantised in another way or not at all, or its files are not one whole model.
    """
    config = read_json(folder / "config.json", "Needed: a quantised model.").get("quantization_config")
    method = config.get("quant_method") if isinstance(config, dict) else None
    if not isinstance(config, dict) or method not in DEQUANTISED_HERE:
        how = f"quantised by {brief(method)}" if config is not None else "not quantised"
        raise ArtifactError(f"{folder} is {how}; needed: {' or '.join(DEQUANTISED_HERE)}. Of others {OF_OTHERS}")
    library = _LIBRARIES.get(method, "torch")
    if importlib.util.find_spec(library) is None:
        raise ArtifactError(
            f"{folder} is quantised by {method}, which its own library alone can de-quantise: pip install {method}. Without it "
            f"{OF_OTHERS}"
        )

    def explain(reason: str) -> ArtifactError:
        return ArtifactError(
            f"{folder} cannot be de-quantised by transformers ({reason}). Get it from the publisher again."
        )

    with quiet_library_errors(explain):
        settings: Any
        if method == "bitsandbytes":
            settings = BitsAndBytesConfig.from_dict(config)
        elif method == "compressed-tensors":
            settings = CompressedTensorsConfig(dequantize=True, **config)
        else:
            known = {"modules_to_not_convert", "weight_block_size"} & config.keys()
            settings = _CONFIGS[method](dequantize=True, **{key: config[key] for key in known})
        model, loading = AutoModelForCausalLM.from_pretrained(
            folder,
            quantization_config=settings,
            dtype=torch.bfloat16,
            trust_remote_code=False,
            use_safetensors=True,
            ignore_mismatched_sizes=True,  # they are refused below, by their names
            output_loading_info=True,
        )
        if method == "bitsandbytes":
            for name, module in model.named_modules():
                block = getattr(getattr(getattr(module, "weight", None), "quant_state", None), "blocksize", 1)
                if module is not model and getattr(module, "in_features", 0) % block:
                    raise explain(
                        f"the rows of {name} are no whole blocks of {block}, which bitsandbytes mixes up on a CPU"
                    )
            model = model.dequantize(dtype=torch.bfloat16)
    # Where a scale is missing the library keeps the codes as they are.
    if codes := [
        name for name, value in model.named_parameters() if value.dtype not in (torch.bfloat16, torch.float32)
    ]:
        raise explain(f"{len(codes)} weights have no scale, the first {codes[0]}")
    loaded: PreTrainedModel = model
    require_loaded(folder, loaded, loading)
    model._weight_conversions = None  # saving would quantise again what it has de-quantised
    return loaded
