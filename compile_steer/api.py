"""The main line in Python: load, extract, validate, compile, verify, merge.

Every function takes values and returns a value. Nothing is written but where a folder is named. The command line and
these functions run the same stages.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError
from torch import Tensor, nn

from compile_steer.artifacts.provenance import PROVENANCE, Provenance
from compile_steer.common.errors import ArtifactError, RecipeError
from compile_steer.common.options import Seed, dotted, explain
from compile_steer.common.progress import Progress
from compile_steer.data.behaviour import Behaviour, Context
from compile_steer.data.encoding import check_texts
from compile_steer.export.adapter import patch_provenance, write_patch
from compile_steer.export.merged import PRECISIONS, write_merged
from compile_steer.extraction import stage as extraction
from compile_steer.extraction.options import ExtractOptions
from compile_steer.lowering.options import CompileOptions
from compile_steer.lowering.plan import BACKENDS, lower, plan
from compile_steer.models.load import LoadedModel
from compile_steer.models.text import Text
from compile_steer.report.card import model_card
from compile_steer.scoring.options import Scorer
from compile_steer.steering import hooks
from compile_steer.steering.directions import Directions
from compile_steer.steering.patch import WeightPatch, with_patch
from compile_steer.steering.program import Program
from compile_steer.steering.sites import parse_positions
from compile_steer.validation import stage as validation
from compile_steer.validation.options import ValidateOptions
from compile_steer.verification.options import VerifyOptions
from compile_steer.verification.parity import Parity
from compile_steer.verification.reference import Reference
from compile_steer.verification.stage import verify_artifact


def extract(
    model: LoadedModel,
    data: Behaviour,
    *,
    positions: str = "all",
    seed: int = 0,
    progress: Progress | None = None,
    **options: Any,
) -> Directions:
    """Find a direction at every block from the training pairs of `data`.

    Args:
        positions: where vectors that are trained act meanwhile; the other methods do not depend on it.
        options: the keys of the recipe's section `extract`, for example method="pca" or readout="last_prompt".

    Raises:
        RecipeError: unknown or contradictory options, or pairs from which no direction can be read.
    """
    context = _context(model, data, seed, progress)
    parse_positions(positions)
    return extraction.extract(context, _parse(ExtractOptions, options), positions=positions)


def validate(
    model: LoadedModel,
    data: Behaviour,
    directions: Directions,
    score: Any,
    *,
    seed: int = 0,
    ask: str = "What are you?",
    progress: Progress | None = None,
    **options: Any,
) -> validation.Validation:
    """Choose block and coefficient on validation data, and measure the chosen program once on test data.

    Args:
        score: how a reply is scored, as in a recipe: {"kind": "keywords", "patterns": [...]}.
        ask: a prompt that base and steered model answer for the report.
        options: the keys of the recipe's section `validate`, for example layers=[10, 12] or coefficients=[1, 2].

    Returns:
        The program, the report with its verdict, and a row for each test pair and prompt.

    Raises:
        RecipeError: unknown options, or no coherent point in the grid.
    """
    context = _context(model, data, seed, progress)
    # The scorer by itself first, so that its problems are named score.KEY.
    settings = _parse(ValidateOptions, {"score": _parse(Scorer, score, "score"), **options})
    return validation.validate(
        context, directions, settings, readout="response_mean", ask=ask, too_high=4.0, name="program"
    )


@dataclass(frozen=True)
class CompiledProgram:
    """A program as changes of weights: what `compile` returns.

    `backend` made the `patch` of the base `model` that imitates `program`, in so many `seconds`.
    """

    patch: WeightPatch
    backend: str
    program: Program
    model: LoadedModel
    seconds: float

    def __repr__(self) -> str:
        return f"CompiledProgram({self.backend}, {self.patch!r}, {self.seconds:.1f} s)"

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Run the model with the patch on its modules' outputs, the weights untouched, inside the block."""
        with with_patch(self.model.model, self.patch):
            yield

    def save(self, folder: str | Path) -> Path:
        """Write a stock PEFT adapter, or, where no adapter can hold the patch, the patch to be merged; returns the folder."""
        folder = _own_folder(folder)
        record = self.provenance(folder.name)
        write_patch(folder, self.patch, self.model, record, model_card(record, folder, None))
        return folder

    def provenance(self, name: str) -> Provenance:
        """Return what an artifact called `name` records; it was neither validated nor made from a recipe."""
        return patch_provenance(name, self.backend, self.patch, self.model, self.program, self.seconds)


def compile(
    model: LoadedModel,
    program: Program,
    texts: Sequence[str | Text],
    *,
    backend: str = "auto",
    seed: int = 0,
    progress: Progress | None = None,
    **options: Any,
) -> CompiledProgram:
    """Turn a steering program into changes of weights.

    Args:
        texts: calibration prompts; a fitted backend reads the steered model's own continuations of them.
        backend: 'auto' takes the first that is exact, else the closed form; or the name of one.
        options: the keys of the recipe's section `compile`, for example calibration={"prompts": 60}.

    Raises:
        CannotLower: the backend cannot express the program on this model. RecipeError: unknown options or backend.
    """
    if isinstance(texts, str) or not all(isinstance(text, str | Text) for text in texts):
        raise RecipeError(f"texts: found {texts!r:.60}; needed: a list of prompts.")
    if backend != "auto" and backend not in BACKENDS:
        raise RecipeError(f"backend '{backend}' is unknown; use auto, {', '.join(BACKENDS)}.")
    prompts = [Text(text) if isinstance(text, str) else text for text in texts]
    name = plan(program, model.layout, "auto" if backend == "auto" else (backend,)).chosen[0]
    if BACKENDS[name].fitted and "calibration" not in options:
        # What trains sees other texts than the regression that it starts from.
        own = len(prompts) if name == "closed_form" else len(prompts) * 2 // 3
        options = {"calibration": {"prompts": own}, "distill": {"prompts": len(prompts) - own or 1}, **options}
    parsed = _parse(CompileOptions, options)
    started = time.perf_counter()
    patch = lower(program, model, prompts, parsed, backend=name, seed=seed, progress=progress)
    return CompiledProgram(patch, name, program, model, time.perf_counter() - started)


def merge(compiled: CompiledProgram, folder: str | Path, precision: str = "bf16") -> Path:
    """Write a stock checkpoint with the patch summed into the weights (float32 sum, one cast); returns the folder.

    Args:
        precision: 'fp32', 'bf16' or 'fp16'.
    """
    if precision not in PRECISIONS:
        raise RecipeError(f"precision '{precision}' is unknown; use {', '.join(PRECISIONS)}.")
    folder = _own_folder(folder)
    record = replace(compiled.provenance(folder.name), form=f"merged-{precision}")
    write_merged(folder, compiled.patch, compiled.model, precision, record, model_card(record, folder, None))
    return folder


def verify(
    model: LoadedModel,
    program: Program | str | Path,
    folder: str | Path,
    data: Behaviour,
    score: Any,
    *,
    seed: int = 0,
    ask: str = "What are you?",
    progress: Progress | None = None,
    **options: Any,
) -> Parity:
    """Reload what lies in `folder` as a stock user would, and compare it with the steered model on held-out data.

    Args:
        program: the program, or the file that it was saved to.
        score: how a reply is scored, as in `validate`.
        options: the keys of the recipe's section `verify`, for example heldout=20 or gates={"kl_remaining": 0.01}.

    Returns:
        What was measured, with `passed` and the reasons where it did not.

    Raises:
        ArtifactError: there is no artifact, or it is of another program or base.
    """
    if isinstance(program, str | Path):
        program = Program.load(Path(program))
    context = _context(model, data, seed, progress)
    reference = Reference(context, program, _parse(VerifyOptions, options), _parse(Scorer, score, "score"), ask)
    parity = verify_artifact(reference, Path(folder), program.sha256)
    reference.keep()
    return parity


@contextmanager
def steered(
    model: LoadedModel | nn.Module, program: Program | Sequence[Program], *, roles: Tensor | None = None
) -> Iterator[None]:
    """Run a model, as `load` or transformers gives it, under the program's hooks inside the block.

    Args:
        program: one for every row of a batch, or one per row.
        roles: [batch, time] int8, what each token is; without them the first pass is all prompt (see `hooks.steered`).
    """
    with hooks.steered(model.model if isinstance(model, LoadedModel) else model, program, roles=roles):
        yield


def _context(model: LoadedModel, data: Behaviour, seed: int, progress: Progress | None) -> Context:
    if not isinstance(data, Behaviour):
        raise RecipeError(f"data: found {type(data).__name__}; needed: Behaviour, which Pairs.to_behaviour() returns.")
    return Context(model, data, _parse(Seed, seed, "seed"), progress or Progress(), check_texts(model, data))


def _own_folder(folder: str | Path) -> Path:
    """Return the folder if it is new, empty, or an earlier artifact; what is anybody else's is never replaced."""
    path = Path(folder)
    taken = path.exists() and not (path.is_dir() and ((path / PROVENANCE).is_file() or not any(path.iterdir())))
    if taken:
        raise ArtifactError(f"{path} is there already and is no artifact of compile_steer; name a new folder.")
    return path


def _parse(section: Any, options: Any, *place: str) -> Any:
    """Return the options as `section` of a recipe; raises one `RecipeError` with every problem."""
    try:
        return TypeAdapter(section).validate_python(options)
    except ValidationError as error:
        problems = explain(error, lambda steps: dotted((*place, *steps)))
        raise RecipeError([f"{problem}." for problem in problems]) from error
