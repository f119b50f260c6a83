"""The revision of a model: what decides what it computes, in one line that vectors, adapters and reports record.

    sha256:HASH+settings:HASH, after hub:COMMIT+ for a model of the hub

`sha256` is of the tensors; `settings` of configuration, tokenizer, chat templates and generation settings, or of the whole
file for a GGUF. A path is no part of it: a copy has the revision of its original.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from compile_steer.artifacts.files import digest, read_json, sha256
from compile_steer.artifacts.tensors import misplaced
from compile_steer.common.errors import ArtifactError, several
from compile_steer.common.reading import MAX_JSON, Malformed, read_text

EMBEDDED = "smollm2-135m-instruct"
_JSON = (
    "config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json",
    "added_tokens.json", "vocab.json", "chat_template.json",
)  # fmt: skip
_TEXTS = ("*.jinja", "additional_chat_templates/*.jinja", "merges.txt", "vocab.txt")
_OTHERS = ("*.model", "*.tiktoken", "tekken.json")
_REMEDY = "Get or make it again."
# What a library writes about itself, and paths.
_NO_SETTINGS = frozenset({"transformers_version", "_name_or_path", "name_or_path", "is_local", "local_files_only"})


def is_gguf(model: str) -> bool:
    """True of a name that stands for a GGUF file, which transformers, PEFT and vLLM cannot load by that name."""
    return model == EMBEDDED or model.endswith(".gguf")


def read_settings(folder: Path) -> dict[str, Any]:
    """The settings of the model in `folder` by file: the content of each JSON file, the SHA-256 of each other one.

    No library reads them before this has. Raises `ArtifactError` with every file that is damaged, or a link out of the folder.
    """
    files = [folder / name for name in _JSON]
    files += [file for pattern in (*_TEXTS, *_OTHERS) for file in folder.glob(pattern) if not file.is_dir()]
    settings: dict[str, Any] = {}
    problems: list[str] = []
    for file in files:
        name = str(file.relative_to(folder))
        if not file.exists() and not file.is_symlink():
            continue
        if problem := misplaced(file, folder):
            problems.append(f"{problem}.")
            continue
        try:
            if name in _JSON:
                settings[name] = read_json(file, _REMEDY)
                continue
            if file.suffix in (".jinja", ".txt"):
                read_text(file, MAX_JSON)
            elif (size := file.stat().st_size) > MAX_JSON:
                raise Malformed(f"it has {size:,} bytes; at most {MAX_JSON:,} are read")
            settings[name] = sha256(file)
        except ArtifactError as error:
            problems += error.problems
        except Malformed as error:
            problems.append(f"{file} is damaged or cannot be read ({error}). {_REMEDY}")
    if problems:
        raise ArtifactError(several(problems))
    return settings


def settings_sha256(folder: Path) -> str:
    """SHA-256 of a model folder's settings, whatever the order and spacing of its JSON; raises as `read_settings`."""
    settings = read_settings(folder)
    for name in settings.keys() & set(_JSON):
        settings[name] = {key: value for key, value in settings[name].items() if key not in _NO_SETTINGS}
    return digest(settings)


def join_revision(tensors: str, settings: str, commit: str = "") -> str:
    """The revision with these two SHA-256, of a hub's `commit` where there is one."""
    return f"{f'hub:{commit}+' if commit else ''}sha256:{tensors}+settings:{settings}"


def identity_of(revision: str) -> str:
    """The part of a revision that decides what is computed: a snapshot of the hub and its copy have the same."""
    return revision[max(revision.find("sha256:"), 0) :]


def other_revision(recorded: str, actual: str) -> str:
    """How a model of revision `actual` differs from the recorded one, in words; '' where it is the same.

    Records of earlier versions name tensors or commit alone, and are compared by these.
    """
    if recorded == actual:
        return ""
    old, new = (dict(part.partition(":")[::2] for part in revision.split("+")) for revision in (recorded, actual))
    differing = [kind for kind in ("sha256", "settings") if kind in old and kind in new and old[kind] != new[kind]]
    if differing == ["settings"]:
        return "the same weights with another configuration, tokenizer, chat template or generation settings"
    if differing:
        return "other weights"
    if "sha256" in old and "sha256" in new:
        return ""  # a commit that changed nothing that counts
    return "" if "hub" in old and old["hub"] == new.get("hub") else "another revision"
