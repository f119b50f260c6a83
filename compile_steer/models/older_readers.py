"""What transformers 5 writes, spelled so that transformers 4 and every other reader of its files understand it too."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from compile_steer.artifacts.files import read_json

CONFIG, TOKENIZER_CONFIG = "config.json", "tokenizer_config.json"
# Settings of the machine that wrote the file, and of a class that only transformers 5 has.
_AMBIENT = ("backend", "is_local", "local_files_only", "name_or_path")


def respell(folder: Path) -> None:
    """Rewrite the settings that `save_pretrained` of transformers 5 has left in `folder`: the same model, for all readers."""
    config = read_json(folder / CONFIG, "Make it again.")
    write_settings(folder / CONFIG, with_older_rope({**config, "torch_dtype": config["dtype"]}))
    settings = read_json(folder / TOKENIZER_CONFIG, "Make it again.")
    kept = {key: value for key, value in settings.items() if key not in _AMBIENT}
    write_settings(folder / TOKENIZER_CONFIG, {**kept, "tokenizer_class": "PreTrainedTokenizerFast"})


def with_older_rope(content: dict[str, Any]) -> dict[str, Any]:
    """The content of a config.json with its rotary embedding also as transformers 4 and all other readers spell it.

    transformers 5 writes `rope_parameters` alone, which an older reader skips: it then computes with its default base.
    """
    rope = content.get("rope_parameters")
    if not isinstance(rope, dict) or not rope or content.get("rope_scaling"):
        return content  # where both are there, transformers 5 takes the older one
    kinds = {kind: part for kind, part in rope.items() if isinstance(part, dict)}  # of attention, where there are two
    main = kinds.get("full_attention", rope)
    base, part = main.get("rope_theta"), main.get("partial_rotary_factor")
    scaling = {key: value for key, value in main.items() if key not in ("rope_theta", "partial_rotary_factor")}
    local = kinds.get("sliding_attention", {}).get("rope_theta")
    older = {"rope_theta": base, "partial_rotary_factor": part, "rope_local_base_freq": local}
    if content.get("model_type") == "gpt_neox":
        older |= {"rotary_emb_base": base, "rotary_pct": part}
    older = {key: value for key, value in older.items() if value is not None}
    # None says that there is none: a key that is missing has a family's default, which may be a scaling.
    return {**content, **older, "rope_scaling": scaling if scaling.get("rope_type", "default") != "default" else None}


def write_settings(path: Path, content: dict[str, Any]) -> None:
    """Write a JSON object as transformers does, in the order of its keys."""
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
