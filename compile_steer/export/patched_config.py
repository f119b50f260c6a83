"""The config.json of a patched model: the base's own with the keys that the patch needs, in words that every reader has."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import AutoConfig, PreTrainedConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from compile_steer.artifacts.files import read_json
from compile_steer.models.libraries import read_config
from compile_steer.models.older_readers import CONFIG
from compile_steer.steering.patch import WeightPatch


def patched_config(source: str, patch: WeightPatch) -> PreTrainedConfig:
    """The config of the base at `source` with room for the patch: its architecture and its biases."""
    return read_config(patched_content(Path(source), patch))


def patched_content(folder: Path, patch: WeightPatch) -> dict[str, Any]:
    """The content of the base's config.json with the keys that the patch needs."""
    content = read_json(folder / CONFIG, "Get or make it again.")
    if patch.architecture:
        content = _converted(content, patch.architecture)
    return {**content, **dict.fromkeys(patch.config_flags, True)}


def _converted(content: dict[str, Any], family: str) -> dict[str, Any]:
    """The same computation in another family's words: every field that both have, but the family's own name."""
    own, target = read_config(content), AutoConfig.for_model(family)
    names = {"model_type": family, "architectures": [MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[family]]}
    # Qwen2's query, key and value have biases without a flag; the target's flag stands for the output's too.
    names["attention_bias"] = own.model_type == "qwen2"
    only_own = {key for key in type(own)().to_dict() if not hasattr(target, key)}
    new = {key: value for key, value in content.items() if key not in only_own} | names
    # A field that the file leaves out has the family's own default, which may be another in the new family.
    read = read_config(new).to_dict()
    for key, value in own.to_dict().items():
        if hasattr(target, key) and key not in (*names, "transformers_version", "dtype") and read.get(key) != value:
            new[key] = value
    return new
