"""The recipe: every setting of a run in one YAML file, checked as a whole before any work.

YAML is read as `common.yaml` says: `1e-5` is a number, and a key given twice is an error. Paths are relative to the
recipe's own folder.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from datetime import date
from io import StringIO
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal, Self

from pydantic import Field, JsonValue, ValidationError, field_validator, model_validator
from ruamel.yaml import YAML

from compile_steer.artifacts.files import digest
from compile_steer.artifacts.paths import home_path, real_path
from compile_steer.budget import Budget, with_budget
from compile_steer.common.errors import RecipeError, brief
from compile_steer.common.options import Section, Seed
from compile_steer.common.reading import Malformed, read_text
from compile_steer.common.yaml import MAX_YAML, Lines, Yaml, parse_yaml
from compile_steer.data.kinds import Data
from compile_steer.data.sources import Dataset
from compile_steer.extraction.options import ExtractOptions
from compile_steer.lowering.options import CompileOptions
from compile_steer.models.chat import DATE, RESERVED, ChatSettings
from compile_steer.refusals import explain_recipe
from compile_steer.scoring.classifier import Classifier
from compile_steer.steering.sites import parse_positions
from compile_steer.validation.options import ValidateOptions
from compile_steer.verification.options import VerifyOptions

CHAT_KEYS = ("chat_template", "chat_template_name", "chat_template_date")


class Recipe(Section):
    """One run. `folder` is where the file lies; everything else is in the file."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]{0,99}$", description="of the run's folder and artifacts")
    model: str = Field(description="smollm2-135m-instruct (embedded), a hub id, a local folder, or a .gguf file")
    prompt_format: str | None = Field(
        None, description="how a prompt is put to the model in the place of its chat template (a base model has none)"
    )
    chat_template: dict[str, JsonValue] = Field(
        {}, description="arguments of the model's chat template, for example {enable_thinking: false}"
    )
    chat_template_name: str | None = Field(None, description="which chat template, of a model that has several")
    chat_template_date: date = Field(date.fromisoformat(DATE), description="the date that a chat template prints")
    seed: Seed = Field(0, description="of everything random")
    device: str = Field("auto", description="auto (CUDA where there is one), cpu, cuda, cuda:1")
    device_map: Literal["auto"] | dict[str, str] | None = Field(
        None,
        description="for a model larger than a device: auto (all GPUs, main memory, disk), or limits as {0: 70GiB, cpu: 30GiB}",
    )
    dtype: Literal["float32", "bfloat16", "float16"] = Field("float32", description="in which the model computes")
    ask: str = Field("What are you?", description="one prompt answered by base, steered and compiled for the report")
    too_high: float = Field(
        4.0, gt=1, description="multiple of the chosen coefficient for the answer that shows what too much does"
    )
    budget: Budget = Field("standard", description="how much is measured: the defaults of the keys that are left out")
    data: Data
    extract: ExtractOptions = ExtractOptions()
    validate_: ValidateOptions = Field(alias="validate")
    compile: CompileOptions = CompileOptions()
    verify: VerifyOptions = VerifyOptions()
    folder: Path = Field(exclude=True)

    @property
    def chat(self) -> ChatSettings:
        """How the model's chat template is used."""
        return ChatSettings(self.chat_template, self.chat_template_name, self.chat_template_date.isoformat())

    _budget = model_validator(mode="before")(with_budget)

    @field_validator("chat_template")
    @classmethod
    def _names_arguments(cls, arguments: dict[str, JsonValue]) -> dict[str, JsonValue]:
        wrong = [name for name in arguments if not re.fullmatch(r"[A-Za-z]\w*", name, re.ASCII) or name in RESERVED]
        if wrong:
            raise ValueError(
                f"needed: names of the template's own arguments, which {', '.join(map(repr, wrong))} cannot be"
            )
        return arguments

    @field_validator("prompt_format")
    @classmethod
    def _holds_prompt(cls, prompt_format: str | None) -> str | None:
        if prompt_format is not None and (prompt_format.count("{prompt}") != 1 or not prompt_format.endswith("\n")):
            raise ValueError(
                "needed: {prompt} once, and a line break at the end, where the response begins "
                '("User: {prompt}\\nAssistant:\\n")'
            )
        return prompt_format

    @model_validator(mode="after")
    def _has_one_template(self) -> Self:
        if self.prompt_format is not None and (self.chat_template or self.chat_template_name):
            raise ValueError("prompt_format takes the place of the chat template; leave chat_template and its name out")
        return self

    @model_validator(mode="after")
    def _ablates_everywhere(self) -> Self:
        if self.extract.operation == "ablate" and parse_positions(self.validate_.positions) != {"all"}:
            raise ValueError(
                f"validate.positions: found '{self.validate_.positions}', but extract.operation ablate edits the weights "
                "that write to the residual stream, so it acts at all positions; leave positions out"
            )
        return self

    def part(self, *names: str) -> dict[str, Any]:
        """Return the named sections as JSON, for fingerprints."""
        return {name: self.record[name] for name in names}

    @property
    def record(self) -> dict[str, Any]:
        """The recipe with every default, as the JSON that artifacts carry; `recall` is the way back."""
        return self.model_dump(mode="json", by_alias=True)

    def named_paths(self) -> Iterator[tuple[str, str]]:
        """The keys and values of the files, folders and addresses that the recipe names, but for the models."""
        for part in type(self.data).model_fields:
            source = getattr(self.data, part)
            if isinstance(source, Path):
                yield f"data.{part}", str(source)
            elif isinstance(source, Dataset):
                yield from ((f"data.{part}.data_files", name) for name in source.data_files)
                if (self.folder / source.source).exists():
                    yield f"data.{part}", source.source
        classifiers = [part.model for part in self.validate_.score.parts if isinstance(part, Classifier)]
        keys = ("extract.imported.file", "validate.other_behaviour", *["validate.score.model"] * len(classifiers))
        paths = (self.extract.imported.file, self.validate_.other_behaviour, *classifiers)
        yield from ((key, str(home_path(str(path)))) for key, path in zip(keys, paths, strict=True) if path is not None)

    @property
    def hash(self) -> str:
        """SHA-256 of the resolved recipe."""
        return digest(self.record)

    @staticmethod
    def recall(
        record: dict[str, Any], folder: Path, source: str = "the recorded recipe", lines: Lines = MappingProxyType({})
    ) -> Recipe:
        """Return the recipe that an artifact carries, its paths relative to `folder`; raises `RecipeError`.

        Args:
            lines: where in `source` its keys are, for the error.
        """
        try:
            return Recipe.model_validate({**record, "folder": real_path(folder)})
        except ValidationError as error:
            raise RecipeError(explain_recipe(error, Recipe, record, source, lines)) from error

    def resolved(self) -> str:
        """Return the recipe with every default filled in, as YAML."""
        stream = StringIO()
        YAML().dump(self.record, stream)
        return stream.getvalue()


def read_recipe(path: Path, changes: Sequence[str] = ()) -> Recipe:
    """Read a recipe and apply `key.to.set=value` changes; raises one `RecipeError` with every problem."""
    _text, (content, lines) = _read(path)
    _apply(content, changes)
    if "folder" in content:
        raise RecipeError("folder: unknown key; paths are relative to the recipe's own folder.")
    changed = [tuple(change.partition("=")[0].split(".")) for change in changes]  # these are not in the file
    lines = {key: line for key, line in lines.items() if not any(key[: len(new)] == new for new in changed)}
    return Recipe.recall(content, real_path(path).parent, path.name, lines)


def rewritten(path: Path, changes: Sequence[str]) -> str:
    """Return the text of a recipe with the changes made, its comments kept; raises `RecipeError` as `read_recipe` does."""
    read_recipe(path, changes)
    yaml = YAML(typ="rt", pure=True)
    yaml.width, yaml.preserve_quotes = 4096, True  # lines and quotes stay as they were
    stream = StringIO()
    content = yaml.load(_read(path)[0])
    _apply(content, changes)
    yaml.dump(content, stream)
    return stream.getvalue()


def _read(path: Path) -> tuple[str, Yaml]:
    """The text of a recipe, and what it says: a mapping."""
    try:
        text = read_text(path, MAX_YAML)
    except Malformed as error:
        raise RecipeError(f"recipe {path} cannot be read ({error}).") from error
    try:
        yaml = parse_yaml(text)
    except Malformed as error:
        raise RecipeError(f"recipe {path} is not valid YAML: {error}.") from error
    if not isinstance(yaml.content, dict):
        kind = "empty" if yaml.content is None else type(yaml.content).__name__
        raise RecipeError(f"recipe {path} is {kind}; needed: keys and values (see recipes/ocean.yaml).")
    return text, yaml


def _apply(content: dict[str, Any], changes: Sequence[str]) -> None:
    """Make `key.to.set=value` changes; raises one `RecipeError` with every one that cannot be made."""
    problems = []
    for change in changes:
        key, equals, text = change.partition("=")
        *parents, last = key.split(".")
        if not equals or not all((*parents, last)):
            problems.append(
                f"--set {brief(change)}: needed: key.to.set=value, for example --set compile.distill.epochs=3"
            )
            continue
        try:
            value = parse_yaml(text).content
        except Malformed as error:
            problems.append(f"--set {brief(change)}: the value is not valid YAML ({error}).")
            continue
        section = content
        for parent in parents:
            section = section.setdefault(parent, {})
            if not isinstance(section, dict):
                problems.append(f"--set {brief(change)}: '{parent}' is a value, not a section.")
                break
        else:
            section[last] = value
    if problems:
        raise RecipeError(problems)
