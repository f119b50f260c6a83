"""What is not weights: config, generation defaults, tokenizer and chat template, compared by what they say."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from compile_steer.common.errors import ArtifactError

_FILES = ("config.json", "generation_config.json", "tokenizer_config.json", "special_tokens_map.json")
# What the library writes of itself, or what every tensor's own type says.
_IGNORED = frozenset(
    {"transformers_version", "_name_or_path", "torch_dtype", "dtype", "chat_template", "is_local", "local_files_only"}
)
_LONGEST = 200


@dataclass(frozen=True)
class SettingsChange:
    """One key of one file; None where a side has no such key. Long values are cut short."""

    file: str
    key: str
    base: str | None
    other: str | None


def settings_changes(base: Path, other: Path) -> list[SettingsChange]:
    """Every key that differs, for the files that `other` has; raises `ArtifactError` for one that is no JSON.

    A file that a folder does not carry is the base's to those who load it.
    """
    found = [change for name in _FILES if (other / name).is_file() for change in _keys(base, other, name)]
    if (other / "tokenizer.json").is_file():
        found += _tokenizer(_read(base / "tokenizer.json"), _read(other / "tokenizer.json"))
    if (other / "tokenizer_config.json").is_file():
        before, after = _template(base), _template(other)
        if before != after:
            found.append(SettingsChange("chat template", "", _short(before), _short(after)))
    return found


def _keys(base: Path, other: Path, name: str) -> Iterator[SettingsChange]:
    before, after = _read(base / name), _read(other / name)
    for key in sorted((before.keys() | after.keys()) - _IGNORED):
        if before.get(key) != after.get(key):
            yield SettingsChange(name, key, _short(before.get(key)), _short(after.get(key)))


def _tokenizer(before: dict[str, Any], after: dict[str, Any]) -> Iterator[SettingsChange]:
    """The parts that differ; of the vocabulary how many entries, for it fills a screen."""
    for key in sorted(before.keys() | after.keys()):
        one, two = before.get(key), after.get(key)
        if one == two:
            continue
        if key == "model" and isinstance(one, dict) and isinstance(two, dict):
            words = [dict(_entries(side.get("vocab"))) for side in (one, two)]
            moved = sum(words[0].get(word) != place for word, place in words[1].items())
            lost = len(words[0].keys() - words[1].keys())
            said = f"{len(words[1])} tokens, of which {moved} are new or have another number; {lost} are gone"
            yield SettingsChange("tokenizer.json", "model", f"{len(words[0])} tokens", said)
        else:
            yield SettingsChange("tokenizer.json", key, _short(one), _short(two))


def _entries(vocab: Any) -> Iterator[tuple[str, Any]]:
    """(token, number or score) of a vocabulary, which some tokenizers keep as a list."""
    if isinstance(vocab, dict):
        yield from vocab.items()
    else:
        yield from ((str(entry[0]), (place, entry[1])) for place, entry in enumerate(vocab or ()))


def _template(folder: Path) -> str | None:
    path = folder / "chat_template.jinja"
    if path.is_file():
        return path.read_text(encoding="utf-8").strip()
    template = _read(folder / "tokenizer_config.json").get("chat_template")
    return None if template is None else str(template).strip()


def _read(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ArtifactError(f"{path} is damaged ({error}). Get or make it again.") from error
    if not isinstance(content, dict):
        raise ArtifactError(f"{path} is {type(content).__name__}; needed: a JSON object.")
    return content


def _short(value: Any) -> str | None:
    if value is None:
        return None
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, sort_keys=True)
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]} ... ({len(text)} characters)"
