"""A merged checkpoint: W + B A (or whole changes, and biases) summed in fp32, cast once, saved as a stock folder."""

from __future__ import annotations

from itertools import chain
from pathlib import Path
from typing import cast

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from compile_steer.artifacts.files import new_folder
from compile_steer.artifacts.provenance import CARD, Provenance
from compile_steer.common.errors import ArtifactError
from compile_steer.models.load import LoadedModel, quiet
from compile_steer.steering.low_rank import weight_delta
from compile_steer.steering.patch import WeightPatch

PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def write_merged(
    folder: Path, patch: WeightPatch, loaded: LoadedModel, precision: str, provenance: Provenance, card: str
) -> None:
    """Merge into a fresh copy of the base read from disk, so that a failure cannot leave it half changed.

    Raises:
        ArtifactError: the patch names a module that the base lacks, has another shape, gives NaN, or a value that the
            precision cannot hold.
    """
    model, dtype = merged_model(loaded.source, patch), PRECISIONS[precision]
    limit, type_name = torch.finfo(dtype).max, str(dtype).removeprefix("torch.")
    largest = {name: float(parameter.detach().abs().max()) for name, parameter in model.named_parameters()}
    beyond = [  # the cast would make it infinite
        f"{name} holds {size:.4g}, beyond {limit:g}, the largest of {type_name}; nothing was written."
        for name, size in largest.items()
        if size > limit
    ]
    if beyond:
        raise ArtifactError([*beyond, "Merge at a wider precision: merged-bf16 or merged-fp32."])
    model.to(dtype)
    with new_folder(folder) as new, quiet():
        model.save_pretrained(new)
        loaded.tokenizer.save_pretrained(new)
        provenance.write(new)
        (new / CARD).write_text(card, encoding="utf-8")


def merged_model(source: str, patch: WeightPatch) -> PreTrainedModel:
    """The base at `source` in fp32 with `patch` in its weights; raises `ArtifactError`."""
    model = _base_with_room(source, patch)
    with torch.no_grad():
        # In each weight's own orientation, and one whole matrix at a time.
        low_rank = ((name, weight_delta(_module(model, name), edit)) for name, edit in patch.low_rank.items())
        for name, delta in chain(low_rank, patch.dense.items()):
            weight = _module(model, name).weight
            if delta.shape != weight.shape:
                raise ArtifactError(
                    f"the patch of {name} is {list(delta.shape)}, the base's weight {list(weight.shape)}."
                )
            weight.add_(delta)
        parameters = dict(model.named_parameters())
        for name, shift in patch.bias.items():
            # A bias is named by its module, or by the parameter itself where a mixture of experts has one.
            bias = parameters[name] if name in parameters else getattr(_module(model, name), "bias", None)
            if bias is None or bias.shape[-1:] != shift.shape:
                raise ArtifactError(f"the base has no bias of width {shift.shape[0]} on {name}.")
            bias.add_(shift)
    for name in (*patch.low_rank, *patch.dense, *patch.bias):
        edited = [value for full_name, value in parameters.items() if f"{full_name}.".startswith(f"{name}.")]
        if not all(bool(torch.isfinite(value).all()) for value in edited):
            raise ArtifactError(f"merging gives NaN or infinity in {name}; nothing was written.")
    return model


def _module(model: nn.Module, name: str) -> nn.Linear:
    try:
        return cast(nn.Linear, model.get_submodule(name))  # or a Conv1D, which has the same two parameters
    except AttributeError as error:
        raise ArtifactError(f"the patch edits {name}, which the base does not have.") from error


def _base_with_room(source: str, patch: WeightPatch) -> PreTrainedModel:
    """The base with room for the patch: its architecture, its biases (zero), a head of its own."""
    config = patched_config(source, patch)
    with quiet():
        model, loading = AutoModelForCausalLM.from_pretrained(
            source, config=config, dtype=torch.float32, output_loading_info=True
        )
    # The config flags bring in biases that the checkpoint lacks; every other missing weight is an error.
    has_new_biases = bool(patch.config_flags or patch.architecture)
    missing = [name for name in loading["missing_keys"] if not (has_new_biases and name.endswith(".bias"))]
    if missing:
        raise ArtifactError(f"the base at {source} lacks weights: {', '.join(sorted(missing)[:3])} ...")
    if patch.architecture and loading["unexpected_keys"]:
        names = ", ".join(sorted(loading["unexpected_keys"])[:3])
        raise ArtifactError(f"{type(model).__name__} has no place for {names} of the base at {source}.")
    with torch.no_grad():
        for name in loading["missing_keys"]:
            model.get_parameter(name).zero_()  # new biases must add nothing but the patch
        if patch.untie:
            model.config.tie_word_embeddings = False
            model.get_output_embeddings().weight = nn.Parameter(model.get_input_embeddings().weight.clone())
    base: PreTrainedModel = model
    return base


def patched_config(source: str, patch: WeightPatch) -> PreTrainedConfig:
    """The config of the base at `source` with room for the patch: its architecture and its biases."""
    with quiet():
        config = AutoConfig.from_pretrained(source)
    if patch.architecture:
        # The same computation in another family's words: every field that both have, but the family's own name.
        target = AutoConfig.for_model(patch.architecture)
        own = {"model_type", "architectures", "transformers_version"}
        shared = {key: value for key, value in config.to_dict().items() if hasattr(target, key) and key not in own}
        shared["head_dim"] = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        # Qwen2's query, key and value have biases without a flag; the target's flag stands for the output's too.
        shared["attention_bias"] = config.model_type == "qwen2"
        config = AutoConfig.for_model(patch.architecture, **shared)
    for flag in patch.config_flags:
        setattr(config, flag, True)
    return config
