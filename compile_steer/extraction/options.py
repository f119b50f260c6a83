"""The recipe's `extract` section: how directions are found."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Literal, Self, TypeVar, get_args

from pydantic import Field, field_validator, model_validator

from compile_steer.artifacts.files import sha256
from compile_steer.common.errors import RecipeError
from compile_steer.common.options import Section
from compile_steer.formats.foreign import Format, LayerConvention
from compile_steer.models.text import Readout
from compile_steer.steering.sites import Point

PairMethod = Literal["mean_difference", "pca", "logistic"]
ChoiceMethod = Literal["pasf", "ipasa", "ipaswo"]
Method = Literal[PairMethod, ChoiceMethod, "trained", "imported"]

T = TypeVar("T")


def _each_block_once(blocks: tuple[int, ...] | str | None) -> tuple[int, ...] | str | None:
    if isinstance(blocks, tuple) and (not blocks or min(blocks) < 0 or len(set(blocks)) < len(blocks)):
        raise ValueError("give block numbers from 0 on, each once, or 'all'")
    return blocks


class TrainedOptions(Section):
    """Vectors of many blocks at once, trained by AdamW while the model is frozen.

    Rates and penalties are relative to the stream's norm at each block, so that they mean the same for every model.
    """

    loss: Literal["likelihood", "bipo"] = Field(
        "likelihood", description="of the positive responses; or of the preference for them, in both directions (BiPO)"
    )
    layers: tuple[int, ...] | Literal["all"] = Field("all", description="the blocks that get a vector each")
    other_points: tuple[Point, ...] = Field((), description="other points of these blocks that get a vector too")
    start: Literal["zero", "mean_difference"] = Field("zero", description="the vectors before the first step")
    epochs: int = Field(8, ge=1, description="passes over the pairs; the best on a held-out sixth is kept")
    learning_rate: float = Field(0.02, gt=0, description="how far a step moves a vector, in norms of the stream")
    batch_tokens: int = Field(256, ge=64, description="padded tokens of a batch, one step each")
    l2: float = Field(1.0, ge=0, description="times the sum of the vectors' squared norms, relative to the stream's")
    beta: float = Field(0.1, gt=0, description="of bipo: how sharply a preference counts")

    _blocks = field_validator("layers")(_each_block_once)


class ImportedOptions(Section):
    """Vectors that another tool made, read from its file."""

    file: Path | None = Field(None, description="the file or folder, relative to the recipe")
    format: Format | None = Field(None, description="of the file, if its name does not tell")
    layer_convention: LayerConvention | None = Field(
        None, description="what number k in a GGUF or .svec means: the output of block k, or hidden_states[k]"
    )
    layer: int | None = Field(None, ge=0, description="the block of a bare tensor, if its name does not say")
    index: int | None = Field(None, ge=0, description="which row of a SAELens folder, or of AxBench's concepts")
    joint: tuple[int, ...] | Literal["all"] | None = Field(
        None, description="the blocks whose vectors are added all at once; otherwise each block is a candidate"
    )

    _blocks = field_validator("joint")(_each_block_once)


class ExtractOptions(Section):
    """How directions are found: from contrast pairs, labelled questions, training, or a file; and their use."""

    method: Method = Field("mean_difference", description="of pairs, of questions (PAS), trained, or imported")
    model: str | None = Field(
        None, description="another model of the same shape and tokenizer to take the directions from"
    )
    readout: Readout = Field("response_mean", description="the tokens whose activation represents a text")
    point: Point = Field("resid_post", description="where in each block the activations are read")
    pairs: int | None = Field(None, ge=2, description="use only the first so many training pairs, or questions")
    shuffled: int = Field(
        12,
        ge=1,
        le=1000,
        description="directions from shuffled labels, as controls; of method trained each is a training",
    )
    operation: Literal["add", "clamp", "ablate"] = Field(
        "add",
        description="clamp: set the projection on the direction to the positive side's; "
        "ablate: remove the direction from everything that the model writes",
    )
    length: Literal["own", "unit", "stream"] = Field(
        "own",
        description="of the direction, what a coefficient of 1 adds: the method's, 1, or the stream's median norm",
    )
    off_by_one: bool = Field(
        False, description="read each block's input as its output, as the published code of PAS does"
    )
    trained: TrainedOptions = TrainedOptions()
    imported: ImportedOptions = ImportedOptions()

    @property
    def read_point(self) -> Point:
        """The point whose activations are read for `point`."""
        # Published code of PAS takes hidden_states[k], the input of block k, for the output of block k.
        return "resid_pre" if self.off_by_one else self.point

    def first(self, items: Sequence[T], name: str) -> Sequence[T]:
        """Return the first `pairs` items; raises `RecipeError` if there are fewer."""
        if self.pairs is not None and len(items) < self.pairs:
            raise RecipeError(f"extract.pairs: found {len(items)} {name} in data.train; needed: {self.pairs}.")
        return items[: self.pairs]

    def located(self, folder: Path) -> ExtractOptions:
        """Return these options with an absolute path of the imported file, which is relative to the recipe's folder.

        The recipe's own record keeps the relative path: it is hashed, and must not depend on the machine.
        """
        if self.imported.file is None:
            return self
        path = Path(os.path.normpath(folder / self.imported.file))
        return self.model_copy(update={"imported": self.imported.model_copy(update={"file": path})})

    def imported_sha256(self, folder: Path) -> str:
        """Return the SHA-256 of the imported file; empty if there is none."""
        path = self.located(folder).imported.file
        return sha256(path) if path is not None and path.exists() else ""

    @model_validator(mode="after")
    def _fits(self) -> Self:
        method, imported, trained = self.method, self.method == "imported", self.method == "trained"
        clamp, ablate, sized = self.operation == "clamp", self.operation == "ablate", self.length != "own"
        inner, letters = self.point != "resid_post", method in get_args(ChoiceMethod)
        imports, trains = self.imported != ImportedOptions(), self.trained != TrainedOptions()
        no_file, joint = self.imported.file is None, self.imported.joint is not None
        points = (self.point, *self.trained.other_points)
        # One message for all rules that are broken, so that a recipe is fixed in one round.
        clashes = {
            f"imported: these options are of method imported, not of {method}": imports and not imported,
            "method imported needs extract.imported.file: the file or folder of the vectors": imported and no_file,
            f"the file of method imported says the point; leave out extract.point ({self.point})": imported and inner,
            "an ablation is of one direction at a time; leave out extract.imported.joint": ablate and joint,
            f"a clamp needs the activations of a positive side; method {method} has none: use operation add": (
                clamp and (imported or trained)
            ),
            "a clamp has no length: it sets the projection; leave out extract.length": clamp and sized,
            "an ablation has no length: it removes what is there; leave out extract.length": ablate and sized,
            "vectors of method trained are made to be added, all at once: use operation add": ablate and trained,
            f"an ablation is of the stream itself: read it at point resid_post, not {self.point}": ablate and inner,
            "off_by_one is about activations at resid_post": self.off_by_one and (imported or trained or inner),
            f"method {method} reads the letter that is the response: use readout response_mean": (
                letters and self.readout != "response_mean"
            ),
            # The activations are there already; a trained control costs a whole training.
            f"shuffled {self.shuffled} is too few for method {method}; 5 or more cost nothing": (
                not trained and self.shuffled < 5
            ),
            f"trained: these options are of method trained, not of {method}": trains and not trained,
            "method trained makes vectors of its own length; leave out extract.length": trained and sized,
            f"trained.other_points names a point twice (extract.point is {self.point})": len({*points}) < len(points),
        }
        problems = [message for message, clash in clashes.items() if clash]
        if problems:
            raise ValueError("; ".join(problems))
        return self
