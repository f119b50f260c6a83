"""Directions with and without meaning, put through the whole of validation, and compiled whatever it said.

Each chooses its own layer and coefficient. Pairs and prompts are fewer than in a recipe's own run, so a gate that
chance passes here it would pass there more rarely; the coherence gates are wide, so that it is not they that stop it.
"""

from __future__ import annotations

import time
import zlib
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import torch

from benchmarks.programs import Measure
from compile_steer.common.errors import RecipeError
from compile_steer.common.progress import Progress
from compile_steer.lowering.lowering import Lowering
from compile_steer.lowering.plan import BACKENDS
from compile_steer.models.logprobs import encode_pairs, logprob_margins
from compile_steer.pipeline.run import Run
from compile_steer.scoring.answers import Request, answer
from compile_steer.steering.directions import Directions, as_long_as
from compile_steer.steering.passes import canonical
from compile_steer.steering.patch import with_patch
from compile_steer.steering.program import Program
from compile_steer.validation.report import ValidationReport
from compile_steer.validation.stage import validate

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
    "compile.calibration.prompts=40",
    "compile.calibration.max_new_tokens=32",
]
NEUTRAL, HELD_OUT = 6, 6
COSINES = (0.5, 0.25)  # with the real direction, of a weakened one
Kind = Literal["real", "weakened", "random", "shuffled"]


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
    compiled: Compiled | None = None


def in_place(real: Directions, kind: Kind, index: int, behaviour: str) -> Directions:
    """`real` with its vectors replaced: by random ones as long (each behaviour has its own), by its `index`-th shuffled
    ones as they were found (left out of the controls), or by ones as long at cosine `COSINES[index]` with it."""
    if kind == "real":
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
    started = time.perf_counter()
    try:
        result = validate(
            part.context,
            in_place(real, kind, index, recipe.name),
            recipe.validate_,
            readout=recipe.extract.readout,
            ask=recipe.ask,
            too_high=recipe.too_high,
            name=recipe.name,
        )
    except RecipeError as error:  # no coherent cell: refused before the test
        return Trial(run.recipe.name, kind, index, "refused", str(error), time.perf_counter() - started)
    found = _trial(run.recipe.name, kind, index, result.report, time.perf_counter() - started)
    return replace(found, compiled=compiled(part, result.program) if compiles else None)


def _trial(behaviour: str, kind: Kind, index: int, report: ValidationReport, seconds: float) -> Trial:
    controls, scores = report.controls, report.scores
    return Trial(
        behaviour,
        kind,
        index,
        report.verdict,
        report.reasons[0].split(";")[0],
        seconds,
        layer=report.layer,
        coefficient=report.coefficient,
        contrast=report.margin.value,
        contrast_low=report.margin.low,
        p_random=controls.p_random,
        p_shuffled=controls.p_shuffled,
        score_base=scores.base,
        score=scores.effect.value,
        p_over_random=scores.p_over_random,
        perplexity=report.coherence.perplexity_ratio,
    )


def compiled(run: Run, program: Program) -> Compiled:
    """Closed form, measured on held-out continuations and on the test pairs and prompts that validation used."""
    program, loaded, test, options = canonical(program), run.model, run.data.test, run.recipe.validate_
    patch = BACKENDS["closed_form"].lower(
        Lowering(program, loaded, run.data.calibration, run.recipe.compile, run.recipe.seed, run.progress)
    )
    measure = Measure.of(run, program, HELD_OUT)
    score = options.score.bind(loaded, run.data)
    pairs, prompts = encode_pairs(loaded, test), [pair.prompt for pair in test[: options.prompts]]

    def behaves() -> tuple[np.ndarray, np.ndarray]:
        (found,) = answer(loaded, [Request(prompts)], score, options.max_new_tokens, run.data.questions)
        return logprob_margins(loaded, pairs), found.scores

    before = behaves()
    with with_patch(loaded.model, patch):
        after = behaves()
    share = measure.patched(patch).mean / measure.base.mean
    return Compiled(share, *(float((new - old).mean()) for new, old in zip(after, before, strict=True)))
