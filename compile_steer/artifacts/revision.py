"""The revision of a model: what decides what it computes, in one line that vectors, adapters and reports record.

    sha256:HASH+settings:HASH, after hub:COMMIT+ for a model of the hub

`sha256` is of the tensors; `settings` of configuration, tokenizer, chat templates and generation settings, or of the whole
file for a GGUF. A path is no part of it: a copy has the revision of its original.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from compile_steer.artifacts.files import digest, read_json, sha256

_JSON = (
    "config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json",
    "added_tokens.json", "vocab.json", "chat_template.json",
)  # fmt: skip
_OTHER = (
    "*.jinja", "additional_chat_templates/*.jinja", "*.model", "*.tiktoken", "merges.txt", "vocab.txt", "tekken.json",
)  # fmt: skip
# What a library writes about itself, and paths.
_NO_SETTINGS = frozenset({"transformers_version", "_name_or_path", "name_or_path", "is_local", "local_files_only"})


def settings_sha256(folder: Path) -> str:
    """SHA-256 of a model folder's settings, whatever the order and spacing of its JSON; raises `ArtifactError` for damaged JSON."""
    settings: dict[str, Any] = {}
    for name in _JSON:
        if (folder / name).is_file():
            content = read_json(folder / name, "Get or make it again.")
            settings[name] = {key: value for key, value in content.items() if key not in _NO_SETTINGS}
    for pattern in _OTHER:
        settings |= {str(file.relative_to(folder)): sha256(file) for file in folder.glob(pattern) if file.is_file()}
    return digest(settings)


def join_revision(tensors: str, settings: str, commit: str = "") -> str:
    """The revision with these two SHA-256, of a hub's `commit` where there is one."""
    return f"{f'hub:{commit}+' if commit else ''}sha256:{tensors}+settings:{settings}"


def other_revision(recorded: str, found: str) -> str:
    """How a model of revision `found` differs from the recorded one, in words; '' where it is the same.

    Records of earlier versions name tensors or commit alone, and are compared by these.
    """
    if recorded == found:
        return ""
    old, new = (dict(part.partition(":")[::2] for part in revision.split("+")) for revision in (recorded, found))
    differing = [kind for kind in ("sha256", "settings") if kind in old and kind in new and old[kind] != new[kind]]
    if differing == ["settings"]:
        return "the same weights with another configuration, tokenizer, chat template or generation settings"
    if differing:
        return "other weights"
    if "sha256" in old and "sha256" in new:
        return ""  # a commit that changed nothing that counts
    return "" if "hub" in old and old["hub"] == new.get("hub") else "another revision"
