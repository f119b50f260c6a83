"""The recipe: every setting of a run in one YAML file, checked as a whole before any work.

YAML is read as version 1.2, so `1e-5` is a number, and a key given twice is an error. Paths are
relative to the recipe's own folder.
"""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from io import StringIO
from pathlib import Path
from typing import Any, Literal, get_args

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator
from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from compile_steer.activations import Readout
from compile_steer.errors import ArtifactError, RecipeError
from compile_steer.files import digest
from compile_steer.program import Point, parse_positions
from compile_steer.scoring import Scorer

BackendName = Literal["bias", "orthogonalise", "retarget", "closed_form", "distill"]
Form = Literal["adapter", "merged-fp32", "merged-bf16"]
Method = Literal["mean_difference", "pca", "logistic"]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Data(_Strict):
    """JSONL files; see the recipes for one line of each."""

    train: Path
    validation: Path
    test: Path
    neutral: Path
    heldout: Path
    calibration: Path
    positive_template: str = "{prompt}"
    negative_template: str = "{prompt}"

    def files(self, folder: Path) -> dict[str, Path]:
        names = ("train", "validation", "test", "neutral", "heldout", "calibration")
        return {name: folder / getattr(self, name) for name in names}


class Extract(_Strict):
    """How a direction is read off contrast pairs."""

    method: Method = "mean_difference"
    readout: Readout = "response_mean"
    point: Point = "resid_post"
    pairs: int | None = Field(None, ge=2, description="use only the first so many training pairs")
    shuffled: int = Field(5, ge=5, description="directions from shuffled labels, as controls")


class Validate(_Strict):
    """The sweep on validation data, and what the test must show."""

    score: Scorer
    layers: tuple[int, ...] | Literal["auto"] = "auto"
    coefficients: tuple[float, ...] = Field((0.5, 1.0, 1.5, 2.0), min_length=1)
    positions: str = "all"
    sweep_pairs: int = Field(24, ge=4)
    sweep_neutral: int = Field(12, ge=4, description="neutral texts of the sweep; the test uses all")
    sweep_prompts: int = Field(12, ge=4)
    sweep_layers: int = Field(2, ge=1, description="how many of the best layers are also scored by generation")
    control_pairs: int = Field(24, ge=4)
    prompts: int = Field(32, ge=8, description="test prompts answered in full")
    max_new_tokens: int = Field(40, ge=4)
    random_directions: int = Field(20, ge=20)
    max_perplexity_ratio: float = Field(1.5, gt=1)
    max_repetition: float = Field(0.2, gt=0, lt=1)
    min_score: float = Field(0.0, ge=0, le=1, description="the least generation score that is worth compiling")
    instruction: str = Field("", description="what one would ask instead of steering: the prompt-only baseline")

    @field_validator("coefficients")
    @classmethod
    def _nonzero(cls, values: tuple[float, ...]) -> tuple[float, ...]:
        if any(value == 0 for value in values):
            raise ValueError("a coefficient of 0 steers nothing; the base is measured anyway")
        return values

    @field_validator("layers")
    @classmethod
    def _some(cls, layers: tuple[int, ...] | str) -> tuple[int, ...] | str:
        if layers == () or (isinstance(layers, tuple) and min(layers) < 0):
            raise ValueError("give block numbers from 0 on, or 'auto'")
        return layers

    @field_validator("positions")
    @classmethod
    def _parses(cls, positions: str) -> str:
        try:
            parse_positions(positions)
        except ArtifactError as error:
            raise ValueError(str(error)) from error
        return positions


class Calibration(_Strict):
    """The texts that the compiler sees: the steered model's own continuations of calibration prompts."""

    prompts: int = Field(180, ge=1)
    max_new_tokens: int = Field(48, ge=1)
    batch: int = Field(96, ge=1, description="prompts continued at once")


class ClosedFormStage(_Strict):
    """One regression: a writer of the block `offset` after the first intervened one, cut to `rank`."""

    offset: int = Field(ge=0)
    writer: Literal["attn", "mlp"]
    rank: int = Field(ge=1)


class ClosedForm(_Strict):
    """Which writers are solved for, in which order of blocks."""

    stages: tuple[ClosedFormStage, ...] | None = Field(None, min_length=1, description="None: chosen by the program")


class Distill(_Strict):
    """Training: each intervened block on its own output, then end to end on the divergence.

    `start` random is the baseline: rank-`rank` edits of all Linears from the block on, on the divergence alone.
    """

    start: Literal["closed_form", "random"] = "closed_form"
    rank: int = Field(8, ge=1)
    prompts: int = Field(60, ge=1, description="calibration prompts kept for training, unseen by the closed form")
    block_steps: int = Field(800, ge=0, description="steps of one block's own training; 0: the closed form alone")
    block_batch_tokens: int = Field(512, ge=64)
    block_learning_rate: float = Field(0.3, gt=0)
    epochs: float = Field(2.0, gt=0, description="passes of the training on the divergence")
    learning_rate: float = Field(0.02, gt=0)
    batch_tokens: int = Field(1024, ge=64)


class Compile(_Strict):
    """Backends, and the texts they are fitted to."""

    backends: tuple[BackendName, ...] | Literal["auto"] = "auto"
    calibration: Calibration = Calibration()
    closed_form: ClosedForm = ClosedForm()
    distill: Distill = Distill()


class Gates(_Strict):
    """What a compiled artifact must reach (nats a token; shares of KL(steered||base))."""

    exact_kl: float = Field(1e-6, gt=0)
    exact_top1: float = Field(0.999, gt=0, le=1)
    share: float = Field(0.02, gt=0)
    top1: float = Field(0.95, gt=0, le=1)
    recovery: float = Field(0.95, gt=0)
    recovery_low: float = Field(0.90, gt=0)
    drift_margin: float = Field(0.01, ge=0)
    score_margin: float = Field(0.1, gt=0)


class Verify(_Strict):
    """Which forms are judged, on how much, and by which gates."""

    forms: tuple[Form, ...] = Field(("adapter", "merged-fp32", "merged-bf16"), min_length=1)
    max_new_tokens: int = Field(48, ge=4)
    heldout: int = Field(40, ge=8, description="held-out prompts continued by the steered model, for the KL")
    pairs: int = Field(40, ge=8, description="test pairs, for the recovery")
    neutral: int = Field(30, ge=8, description="neutral texts, for the drift")
    prompts: int = Field(32, ge=8, description="test prompts answered in full")
    gates: Gates = Gates()


class Recipe(_Strict):
    """One run. `folder` is where the file lies; everything else is in the file."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$")
    model: str
    seed: int = 0
    device: str = "auto"
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    ask: str = Field("What are you?", description="one prompt answered by base, steered and compiled for the report")
    too_high: float = Field(4.0, gt=1, description="the coefficient of the honest bad sample, as a multiple")
    data: Data
    extract: Extract = Extract()
    validate_: Validate = Field(alias="validate")
    compile: Compile = Compile()
    verify: Verify = Verify()
    folder: Path = Field(exclude=True)

    def part(self, *names: str) -> dict[str, Any]:
        """The named sections as JSON, for fingerprints."""
        whole = self.model_dump(mode="json", by_alias=True)
        return {name: whole[name] for name in names}

    @property
    def hash(self) -> str:
        """SHA-256 of the resolved recipe."""
        return digest(self.model_dump(mode="json", by_alias=True))

    def resolved(self) -> str:
        """The recipe with every default filled in, as YAML."""
        stream = StringIO()
        YAML().dump(self.model_dump(mode="json", by_alias=True), stream)
        return stream.getvalue()


def read_recipe(path: Path, changes: Sequence[str] = ()) -> Recipe:
    """Read a recipe and apply `key.to.set=value` changes; raises one `RecipeError` with every problem."""
    try:
        content = YAML(typ="safe", pure=True).load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(f"recipe {path} cannot be read ({getattr(error, 'strerror', None) or error}).") from error
    except YAMLError as error:
        raise RecipeError(f"recipe {path} is not valid YAML: {' '.join(str(error).split())}") from error
    if not isinstance(content, dict):
        raise RecipeError(
            f"recipe {path} is {type(content).__name__}; needed: keys and values (see recipes/ocean.yaml)."
        )
    for change in changes:
        _apply(content, change)
    if "folder" in content:
        raise RecipeError("folder: unknown key; paths are relative to the recipe's own folder.")
    try:
        return Recipe.model_validate({**content, "folder": path.resolve().parent})
    except ValidationError as error:
        raise RecipeError([f"{path.name}: {line}" for line in _explain(error)]) from error


def _apply(content: dict[str, Any], change: str) -> None:
    key, equals, text = change.partition("=")
    if not equals or not key:
        raise RecipeError(f"--set {change}: needed: key.to.set=value, for example --set compile.distill.epochs=3")
    try:
        value = YAML(typ="safe", pure=True).load(text)
    except YAMLError as error:
        raise RecipeError(f"--set {change}: the value is not valid YAML.") from error
    *parents, last = key.split(".")
    place = content
    for parent in parents:
        found = place.setdefault(parent, {})
        if not isinstance(found, dict):
            raise RecipeError(f"--set {change}: '{parent}' is a value, not a section.")
        place = found
    place[last] = value


def _explain(error: ValidationError) -> list[str]:
    """One line a problem: the key, what was found, what was needed, and the likely spelling."""
    lines = []
    for item in error.errors():
        steps = [str(step) for step in item["loc"]]
        where = ".".join(steps)
        if item["type"] == "extra_forbidden":
            near = difflib.get_close_matches(steps[-1], _keys(steps[:-1]), n=1)
            hint = f"; did you mean '{near[0]}'?" if near else f"; known here: {', '.join(sorted(_keys(steps[:-1])))}."
            lines.append(f"{where}: unknown key{hint}")
        elif item["type"] == "missing":
            lines.append(f"{where}: missing.")
        else:
            lines.append(f"{where}: found {item['input']!r}; {item['msg'][0].lower()}{item['msg'][1:]}.")
    return lines


def _keys(steps: Sequence[str]) -> list[str]:
    """The keys that are known in the section at `steps`, through lists and tagged choices."""
    sections: list[type[BaseModel]] = [Recipe]
    for step in steps:
        fields = [f for s in sections for name, f in s.model_fields.items() if step in (name, f.alias)]
        if fields:
            sections = [section for field in fields for section in _sections(field.annotation)]
        elif not step.isdigit():  # the tag of a choice ("keywords"), told by its kind
            sections = [
                s for s in sections if "kind" in s.model_fields and step in get_args(s.model_fields["kind"].annotation)
            ]
    return [f.alias or name for s in sections for name, f in s.model_fields.items() if name != "folder"]


def _sections(annotation: Any) -> list[type[BaseModel]]:
    """The models that an annotation mentions."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [section for argument in get_args(annotation) for section in _sections(argument)]
