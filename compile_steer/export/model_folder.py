"""What of a model's folder goes into a patched model's: its files by an allow-list of kinds, its config with the patch's keys.

A base may come from anybody. What is on no list stays behind: code, pickles, links out of the folder, keys, hidden files, whole
folders. README.md stays too, as its name is that of the model card that compile_steer writes.
"""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any

from transformers import AutoConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from compile_steer.artifacts.files import read_json
from compile_steer.artifacts.tensors import INDEX_FILE, SINGLE_FILE, checkpoint_files, misplaced
from compile_steer.common.errors import ArtifactError, several
from compile_steer.models.libraries import read_config
from compile_steer.models.older_readers import CONFIG, TOKENIZER_CONFIG, write_settings
from compile_steer.steering.patch import WeightPatch

_TEMPLATES = r"chat_template\.(jinja|json)|additional_chat_templates/[\w-]+\.jinja"
_KINDS = (
    r"(config|generation_config)\.json",
    r"(tokenizer|tokenizer_config|special_tokens_map|added_tokens|vocab|tekken)\.json|(vocab|merges)\.txt",
    r"(tokenizer|spiece|sentencepiece(\.bpe)?|tiktoken)\.model(\.v\d+)?|\w+\.tiktoken",
    _TEMPLATES,
    r"((video_|image_)?preprocessor|processor)_config\.json",
    r"(?i:licen[sc]e|notice|copying|use[_-]policy)([-_]\w+)?(\.md|\.txt)?",
)
_ALLOWED, _TEMPLATE = re.compile("|".join(_KINDS)), re.compile(_TEMPLATES)
# Names of a folder's own code, which stays behind: with trust_remote_code a reader would run whatever they lead to.
_CODE_KEYS = ("auto_map", "custom_pipelines")


def side_files(folder: Path) -> list[str]:
    """The relative names of the files that belong to the model in `folder` beside its weights, sorted.

    Raises `ArtifactError` where one of them is a link to outside of the folder.
    """
    files = [file for pattern in ("*", "additional_chat_templates/*") for file in folder.glob(pattern)]
    names = {str(file.relative_to(folder)) for file in files if file.is_file() or file.is_symlink()}
    allowed = sorted(name for name in names if _ALLOWED.fullmatch(name))
    problems = [f"{problem}." for name in allowed if (problem := misplaced(folder / name, folder))]
    if problems:
        raise ArtifactError(several(problems))
    return allowed


def copy_side_files(folder: Path, new: Path, chat_template: str | None = None) -> None:
    """Copy the model's files but for its weights from `folder` to `new`, byte for byte where they name no code.

    Args:
        chat_template: takes the place of the model's own, in every file that readers look for one.
    """
    for name in side_files(folder):
        if chat_template is not None and _TEMPLATE.fullmatch(name):
            continue
        (new / name).parent.mkdir(exist_ok=True)
        shutil.copyfile(folder / name, new / name)
        changes: dict[str, Any] = {}
        if name in (CONFIG, TOKENIZER_CONFIG, "processor_config.json"):
            content = read_json(new / name, "Get or make it again.")
            kept = {key: value for key, value in content.items() if key not in _CODE_KEYS}
            if chat_template is not None and "chat_template" in content:
                changes["chat_template"] = chat_template
            if {**kept, **changes} != content:
                write_settings(new / name, {**kept, **changes})
    if chat_template is not None:
        (new / "chat_template.jinja").write_text(chat_template, encoding="utf-8")


def copy_model(folder: Path, new: Path) -> None:
    """Copy the model in `folder` to `new`: the weights that are loaded, and the files beside them."""
    names = [file.relative_to(folder) for file in checkpoint_files(folder)]
    for name in [*names, Path(INDEX_FILE)] if names != [Path(SINGLE_FILE)] else names:
        (new / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(folder / name, new / name)
    copy_side_files(folder, new)


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
