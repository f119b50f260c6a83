"""README and guide name only what there is: commands, recipe keys, files, and one definition for each term."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import pytest
from pydantic import BaseModel

from compile_steer.cli.app import app
from compile_steer.recipe import Recipe, read_recipe
from compile_steer.refusals import RENAMED_KEYS
from compile_steer.scoring.base import ScorerBase

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("guide/*.md")), ROOT / "docs/index.md"]
GLOSSARY = ROOT / "compile_steer/report/glossary.md"
SECTIONS = ("data", "extract", "validate", "compile", "verify")
# File names that look like keys.
NO_KEYS = {"data.py", "compile.py"}


def _sections(annotation: Any) -> Iterator[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for argument in get_args(annotation):
        yield from _sections(argument)


def _is_key(path: str) -> bool:
    """True if a dotted path is a key of the recipe, in any of the kinds that a section may have."""
    sections: list[type[BaseModel]] = [Recipe]
    for step in path.split("."):
        fields = [f for s in sections for name, f in s.model_fields.items() if step in (name, f.alias)]
        if not fields:
            return False
        sections = [section for field in fields for section in _sections(field.annotation)]
    return True


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_commands_and_keys_exist(page: Path) -> None:
    text = page.read_text("utf-8")
    commands = {command.name for command in app.registered_commands}
    assert set(re.findall(r"(?<![\w./-])compile-steer (?!--)([a-z][\w-]*)", text)) <= commands
    keys = set(re.findall(rf"(?<![\w./])(?:{'|'.join(SECTIONS)})(?:\.[a-z_0-9]+)+(?=[`:=\s])", text))
    assert [key for key in sorted(keys - NO_KEYS) if not _is_key(key)] == []


def test_files_and_modules_that_pages_name_exist() -> None:
    """Only what pages write by hand: results of benchmarks say what was there when they were measured."""
    missing = []
    for page in [*PAGES, ROOT / "docs/ARCHITECTURE.md", ROOT / "CONTRIBUTING.md"]:
        text = page.read_text("utf-8")
        named = [f"{module.replace('.', '/')}" for module in re.findall(r"python -m (benchmarks[.\w]*)", text)]
        named += re.findall(r"`((?:compile_steer|tests|benchmarks|docs|recipes)/[\w./-]+)`", text)
        paths = [ROOT / name for name in named]
        missing += [f"{page.name}: {p}" for p in paths if not (p.exists() or p.with_suffix(".py").exists())]
    assert missing == []


def test_every_command_is_in_the_guide() -> None:
    text = (ROOT / "docs/guide/concepts.md").read_text("utf-8")
    assert [command.name for command in app.registered_commands if f"| `{command.name}` |" not in text] == []


def test_readme_is_short_and_its_links_lead_to_files() -> None:
    text = (ROOT / "README.md").read_text("utf-8")
    assert len(text.splitlines()) <= 150
    links = [link.partition("#")[0] for link in re.findall(r"\]\((?!http)([^)]+)\)", text)]
    assert [link for link in links if not (ROOT / link).is_file()] == []


def test_recipe_of_the_readme_is_valid(tmp_path: Path) -> None:
    block = (ROOT / "README.md").read_text("utf-8").partition("```yaml\n")[2].partition("```")[0]
    (tmp_path / "pirate.yaml").write_text(block, encoding="utf-8")
    recipe = read_recipe(tmp_path / "pirate.yaml")
    assert recipe.compile.backends == ("closed_form",)


def test_every_term_of_the_glossary_has_one_definition_on_one_line() -> None:
    lines = GLOSSARY.read_text("utf-8").splitlines()
    terms = [match[1] for line in lines if (match := re.fullmatch(r"- \*\*(.+?)\*\*: .+\.", line))]
    assert len(terms) == len(lines) == len(set(terms)) <= 25


def test_every_renamed_recipe_key_is_in_the_changelog() -> None:
    text = (ROOT / "CHANGELOG.md").read_text("utf-8")
    words = [re.split(r"[.=]", key)[-1] for key in (*RENAMED_KEYS, *RENAMED_KEYS.values())]
    assert [word for word in words if not re.search(rf"\b{word}\b", text)] == []


def test_every_recipe_key_has_a_description() -> None:
    """The page of recipe keys is made of them. A scorer's keys are described with the scorer."""

    def undescribed(path: str, section: type[BaseModel], above: tuple[type[BaseModel], ...] = ()) -> Iterator[str]:
        if section in above or issubclass(section, ScorerBase):
            return
        for name, field in section.model_fields.items():
            inner = list(_sections(field.annotation))
            if not (field.description or inner or field.exclude or name == "kind"):
                yield f"{path}.{name}"
            for one in inner:
                yield from undescribed(f"{path}.{name}", one, (*above, section))

    assert sorted(set(undescribed("recipe", Recipe))) == []
