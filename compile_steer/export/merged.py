"""A merged checkpoint: W + B A (and biases) summed in fp32, cast once, saved as a stock folder."""

from __future__ import annotations

from pathlib import Path
from typing import cast

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from compile_steer.errors import ArtifactError
from compile_steer.files import new_folder
from compile_steer.models import Loaded, quiet
from compile_steer.patch import WeightPatch, weight_delta
from compile_steer.provenance import Provenance

PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16}


def write_merged(
    folder: Path, patch: WeightPatch, loaded: Loaded, precision: str, provenance: Provenance, card: str
) -> None:
    """Merge into a fresh copy of the base read from disk, so that a failure cannot leave it half changed.

    Raises:
        ArtifactError: the patch names a module that the base lacks, has another shape, or gives NaN.
    """
    model = merged_model(loaded.source, patch).to(PRECISIONS[precision])
    with new_folder(folder) as new, quiet():
        model.save_pretrained(new)
        loaded.tokenizer.save_pretrained(new)
        provenance.write(new)
        (new / "README.md").write_text(card, encoding="utf-8")


def merged_model(source: str, patch: WeightPatch) -> PreTrainedModel:
    """The base at `source` in fp32 with `patch` in its weights."""
    with quiet():
        config = AutoConfig.from_pretrained(source)
        for switch in patch.switches:
            setattr(config, switch, True)
        model, loading = AutoModelForCausalLM.from_pretrained(
            source, config=config, dtype=torch.float32, output_loading_info=True
        )
    # What the checkpoint lacks is what the switches brought in: biases, which start at zero.
    unexpected = [name for name in loading["missing_keys"] if not (patch.switches and name.endswith(".bias"))]
    if unexpected:
        raise ArtifactError(f"the base at {source} lacks weights: {', '.join(sorted(unexpected)[:3])} ...")
    with torch.no_grad():
        for name in loading["missing_keys"]:
            model.get_parameter(name).zero_()
        for name, edit in patch.low_rank.items():
            weight = _module(model, name).weight
            delta = weight_delta(_module(model, name), edit)
            if delta.shape != weight.shape:
                raise ArtifactError(
                    f"the patch of {name} is {list(delta.shape)}, the base's weight {list(weight.shape)}."
                )
            weight.add_(delta)
        for name, bias in patch.bias.items():
            held = _module(model, name).bias
            if held is None or held.shape != bias.shape:
                raise ArtifactError(f"the base has no bias of width {bias.shape[0]} on {name}.")
            held.add_(bias)
    for name in (*patch.low_rank, *patch.bias):
        if not all(bool(torch.isfinite(p).all()) for p in _module(model, name).parameters()):
            raise ArtifactError(f"merging gives NaN or infinity in {name}; nothing was written.")
    merged: PreTrainedModel = model
    return merged


def _module(model: nn.Module, name: str) -> nn.Linear:
    try:
        return cast(nn.Linear, model.get_submodule(name))  # or a Conv1D, which has the same two parameters
    except AttributeError as error:
        raise ArtifactError(f"the patch edits {name}, which the base does not have.") from error
