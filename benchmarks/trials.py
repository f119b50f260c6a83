"""Directions with and without meaning, put through the whole of validation, and compiled whatever it said.

Each chooses its own layer and coefficient. Pairs and prompts are fewer than in a recipe's own run, so a gate that
chance passes here it would pass there more rarely; the coherence gates are wide, so that it is not they that stop it.
"""

from __future__ import annotations

import zlib
from dataclasses import dataclass, field, replace
from typing import Literal

import numpy as np
import torch

from benchmarks.ocean import HeldOut, lowering_of
from benchmarks.record import timed
from compile_steer.common.errors import RecipeError
from compile_steer.common.progress import Progress
from compile_steer.lowering.plan import BACKENDS
from compile_steer.models.logprobs import encode_pairs, logprob_margins
from compile_steer.pipeline.run import Run
from compile_steer.scoring.answers import Request, answer
from compile_steer.steering.directions import Directions, as_long_as
from compile_steer.steering.patch import with_patch
from compile_steer.steering.program import Program
from compile_steer.validation.options import SolverTarget, ValidateOptions
from compile_steer.validation.stage import Validation, validate

SETTINGS = [
    "extract.shuffled=12",
    "validate.layers=[10,14]",
    "validate.coefficients={perplexity_limit: 2}",
    "validate.instruction=''",
    "validate.few_shot=0",
    "validate.sweep_pairs=4",
    "validate.sweep_neutral=4",
    "validate.sweep_prompts=4",
    "validate.sweep_layers=2",
    "validate.control_pairs=6",
    "validate.dose_prompts=2",
    "validate.prompts=24",
    "validate.max_new_tokens=32",
    "validate.max_perplexity_ratio=2.5",
    "validate.max_repetition=0.5",
    "validate.tolerances={answers: 1, right_answers: 1, refusals: 1, language: 1, instructions: 1}",
    "validate.questions=4",
    "validate.control_prompts=4",
    "validate.wordings=0",
    "compile.calibration.prompts=40",
    "compile.calibration.max_new_tokens=32",
]
# Of a direction that must keep within what a recipe allows that names no limit: the defaults, and all plain questions.
LIMITS = {"coefficients": SolverTarget(perplexity_limit=1.4), "questions": 24, "control_prompts": 12}
LIMITS |= {
    name: ValidateOptions.model_fields[name].default
    for name in ("max_perplexity_ratio", "max_repetition", "tolerances")
}
NEUTRAL, HELD_OUT = 6, 6
COSINES = (0.5, 0.25)  # with the real direction, of a weakened one
Kind = Literal["real", "within limits", "weakened", "random", "shuffled"]


@dataclass(frozen=True)
class Compiled:
    """The closed form of what validation chose: share of KL(steered||base) left, and its own changes of the base."""

    share: float
    contrast: float
    score: float


@dataclass(frozen=True)
class Trial:
    """One direction put in the real one's place, what validation said of it, and what came of compiling it."""

    behaviour: str
    kind: Kind
    index: int
    verdict: str
    reason: str
    seconds: float
    layer: int = 0
    coefficient: float = 0.0
    contrast: float = 0.0
    contrast_low: float = 0.0
    p_random: float = 1.0
    p_shuffled: float | None = None
    score_base: float = 0.0
    score: float = 0.0
    p_over_random: float = 1.0
    perplexity: float = 1.0
    price: list[str] = field(default_factory=list)  # the side effects that are no chance
    compiled: Compiled | None = None


def in_place(real: Directions, kind: Kind, index: int, behaviour: str) -> Directions:
    """`real`, or with its vectors replaced: by random ones as long (each behaviour has its own), by its `index`-th shuffled
    ones as they were found (left out of the controls), or by ones as long at cosine `COSINES[index]` with it."""
    if kind in ("real", "within limits"):
        return real
    if kind == "shuffled":
        others = [n for n in range(len(real.shuffled)) if n != index]
        return replace(real, vectors=real.shuffled[index], shuffled=real.shuffled[others])
    generator = torch.Generator().manual_seed(zlib.crc32(f"{behaviour} {index}".encode()))
    noise = as_long_as(torch.randn(real.vectors.shape, generator=generator), real.vectors)
    if kind == "weakened":
        cosine = COSINES[index]
        noise = as_long_as(cosine * real.vectors + (1 - cosine**2) ** 0.5 * noise, real.vectors)
    return replace(real, vectors=noise)


def trial(run: Run, real: Directions, kind: Kind, index: int, compiles: bool) -> Trial:
    """Validate a direction with the run's recipe on a part of its test data; `compiles` what was chosen."""
    test, neutral = run.data.test[: run.recipe.validate_.prompts], run.data.neutral[:NEUTRAL]
    data = replace(run.data, test=test, neutral=neutral)
    part = replace(run, context=replace(run.context, data=data, progress=Progress()))
    recipe = part.recipe
    options = recipe.validate_.model_copy(update=LIMITS) if kind == "within limits" else recipe.validate_

    def work() -> Validation | RecipeError:
        try:
            return validate(
                part.context,
                in_place(real, kind, index, recipe.name),
                options,
                readout=recipe.extract.readout,
                ask=recipe.ask,
                too_high=recipe.too_high,
                name=recipe.name,
            )
        except RecipeError as error:  # no coherent grid point: refused before the test
            return error

    result, seconds = timed(work)
    if isinstance(result, RecipeError):
        return Trial(recipe.name, kind, index, "refused", str(result), seconds)
    report = result.report
    return Trial(
        recipe.name,
        kind,
        index,
        report.verdict,
        "; ".join(report.reasons if report.verdict != "pass" else report.reasons[:1]),
        seconds,
        layer=report.layer,
        coefficient=report.coefficient,
        contrast=report.margin.value,
        contrast_low=report.margin.low,
        p_random=report.controls.p_random,
        p_shuffled=report.controls.p_shuffled,
        score_base=report.scores.base,
        score=report.scores.effect.value,
        p_over_random=report.scores.p_over_random,
        perplexity=report.coherence.perplexity_ratio,
        price=[str(effect) for effect in report.side_effects if effect.shown],
        compiled=compiled(part, result.program) if compiles else None,
    )


def compiled(run: Run, program: Program) -> Compiled:
    """Closed form, measured on held-out continuations and on the test pairs and prompts that validation used."""
    model, test, options = run.model, run.data.test, run.recipe.validate_
    lowering = lowering_of(run, program)
    patch = BACKENDS["closed_form"].lower(lowering)
    heldout = HeldOut.of(run, lowering.program, HELD_OUT)
    score = options.score.bind(model, run.data)
    pairs, prompts = encode_pairs(model, test), [pair.prompt for pair in test[: options.prompts]]

    def behaves() -> tuple[np.ndarray, np.ndarray]:
        (answers,) = answer(model, [Request(prompts)], score, options.max_new_tokens, run.data.questions)
        return logprob_margins(model, pairs), answers.scores

    before = behaves()
    with with_patch(model.model, patch):
        after = behaves()
    changes = (float((new - old).mean()) for new, old in zip(after, before, strict=True))
    return Compiled(heldout.remaining(heldout.patched(patch)), *changes)
