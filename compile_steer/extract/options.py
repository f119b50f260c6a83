"""`extract`: how a direction is found."""

from __future__ import annotations

from pathlib import Path
from typing import Literal, Self, get_args

from pydantic import Field, field_validator, model_validator

from compile_steer.common.options import Section
from compile_steer.formats.foreign import Format, LayerConvention
from compile_steer.models.text import Readout
from compile_steer.steering.sites import Point

PairMethod = Literal["mean_difference", "pca", "logistic"]
ChoiceMethod = Literal["pasf", "ipasa", "ipaswo"]
Method = Literal[PairMethod, ChoiceMethod, "trained", "imported"]


class Trained(Section):
    """Vectors of many blocks at once, trained by AdamW while the model is frozen.

    Rates and penalties count lengths in the stream's own norm at each block, so they mean the same for every model.
    """

    loss: Literal["likelihood", "bipo"] = Field(
        "likelihood", description="of the positive responses; or of the preference for them, in both directions (BiPO)"
    )
    layers: tuple[int, ...] | Literal["all"] = Field("all", description="the blocks that get a vector each")
    beside: tuple[Point, ...] = Field(
        (), description="other points of these blocks that get one too, beside extract.point"
    )
    start: Literal["zero", "mean_difference"] = "zero"
    epochs: int = Field(8, ge=1, description="passes over the pairs; the best on a held-out sixth is kept")
    learning_rate: float = Field(0.02, gt=0, description="how far a step moves a vector, in norms of the stream")
    batch_tokens: int = Field(256, ge=64, description="padded tokens of a batch, one step each")
    l2: float = Field(1.0, ge=0, description="times the sum of the vectors' squared norms, relative to the stream's")
    beta: float = Field(0.1, gt=0, description="of bipo: how sharply a preference counts")

    @field_validator("layers")
    @classmethod
    def _blocks(cls, layers: tuple[int, ...] | str) -> tuple[int, ...] | str:
        if isinstance(layers, tuple) and (not layers or min(layers) < 0 or len(set(layers)) < len(layers)):
            raise ValueError("give block numbers from 0 on, each once, or 'all'")
        return layers


class Imported(Section):
    """Vectors that another tool made, read from its file."""

    file: Path | None = Field(None, description="the file or folder, relative to the recipe")
    format: Format | None = Field(None, description="of the file, where its name does not tell")
    layer_convention: LayerConvention | None = Field(
        None, description="what number k in a GGUF or .svec is of: the output of block k, or hidden_states[k]"
    )
    layer: int | None = Field(None, ge=0, description="the block that a bare tensor is of, where its name does not say")
    index: int | None = Field(None, ge=0, description="which row of a SAELens folder, or of AxBench's concepts")
    joint: tuple[int, ...] | Literal["all"] | None = Field(
        None, description="the blocks whose vectors are added all at once; otherwise each block is a candidate"
    )

    @field_validator("joint")
    @classmethod
    def _blocks(cls, joint: tuple[int, ...] | str | None) -> tuple[int, ...] | str | None:
        if isinstance(joint, tuple) and (not joint or min(joint) < 0 or len(set(joint)) < len(joint)):
            raise ValueError("give block numbers from 0 on, each once, or 'all'")
        return joint


class Extract(Section):
    """How a direction is found: from contrast pairs, labelled questions, training, or a file; and what it is for."""

    method: Method = "mean_difference"
    model: str | None = Field(
        None, description="another model of the same shape and tokenizer to take the directions from, for the recipe's"
    )
    readout: Readout = "response_mean"
    point: Point = "resid_post"
    pairs: int | None = Field(None, ge=2, description="use only the first so many training pairs, or questions")
    shuffled: int = Field(
        12, ge=1, description="directions from shuffled labels, as controls; of method trained each is a training"
    )
    operation: Literal["add", "clamp", "ablate"] = Field(
        "add",
        description="clamp: give the projection on the direction the value that the positive side has; "
        "ablate: take the direction out of everything that the model writes",
    )
    length: Literal["own", "unit", "stream"] = Field(
        "own",
        description="of the direction, what a coefficient of 1 adds: the method's, 1, or the stream's median norm",
    )
    off_by_one: bool = Field(
        False, description="read each block's input for its output, as the published code of PAS does"
    )
    trained: Trained = Trained()
    imported: Imported = Imported()

    @model_validator(mode="after")
    def _fits(self) -> Self:
        own = self.length == "own"
        clashes = {
            f"imported: these options are of method imported, not of {self.method}": (
                self.method != "imported" and self.imported != Imported()
            ),
            "method imported needs extract.imported.file: the file or folder of the vectors": (
                self.method == "imported" and self.imported.file is None
            ),
            f"the file of method imported says the point; leave out extract.point ({self.point})": (
                self.method == "imported" and self.point != "resid_post"
            ),
            "an ablation is of one direction at a time; leave out extract.imported.joint": (
                self.operation == "ablate" and self.imported.joint is not None
            ),
            f"a clamp needs the activations of a positive side; method {self.method} has none: use operation add": (
                self.method in ("imported", "trained") and self.operation == "clamp"
            ),
            "a clamp has no length: what it sets is the projection; leave out extract.length": (
                self.operation == "clamp" and not own
            ),
            "an ablation has no length: it takes away what there is; leave out extract.length": (
                self.operation == "ablate" and not own
            ),
            "vectors of method trained are made to be added, all at once: use operation add": (
                self.method == "trained" and self.operation == "ablate"
            ),
            f"an ablation is of the stream itself: read the direction at point resid_post, not {self.point}": (
                self.operation == "ablate" and self.point != "resid_post"
            ),
            "off_by_one is about activations at resid_post": (
                self.off_by_one and (self.method in ("imported", "trained") or self.point != "resid_post")
            ),
            f"method {self.method} reads the letter that is the response: use readout response_mean": (
                self.method in get_args(ChoiceMethod) and self.readout != "response_mean"
            ),
            f"shuffled {self.shuffled} is too few for method {self.method}; 5 or more cost nothing": (
                self.method != "trained" and self.shuffled < 5
            ),
            f"trained: these options are of method trained, not of {self.method}": (
                self.method != "trained" and self.trained != Trained()
            ),
            "method trained makes vectors of its own length; leave out extract.length": (
                self.method == "trained" and not own
            ),
            f"trained.beside names a point twice (extract.point is {self.point})": (
                len({self.point, *self.trained.beside}) <= len(self.trained.beside)
            ),
        }
        problems = [message for message, clash in clashes.items() if clash]
        if problems:
            raise ValueError("; ".join(problems))
        return self
