"""The stage: sweep on validation, then one measurement on test, then the verdict."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from compile_steer.common.progress import Progress
from compile_steer.data.behaviour import Behaviour
from compile_steer.models.forward import read_activations
from compile_steer.models.load import LoadedModel
from compile_steer.models.text import Pair
from compile_steer.recipe import Recipe
from compile_steer.scoring.answers import Request, answer
from compile_steer.scoring.base import Score, require_discrimination
from compile_steer.stats import PowerAnalysis, bootstrap_mean, power_analysis, sign_flip
from compile_steer.steering.directions import EVERY_BLOCK, Directions
from compile_steer.steering.program import Program
from compile_steer.validate.conditions import answer_arms, pair_rows
from compile_steer.validate.controls import Stream, measure_controls, mismatched_directions, separability
from compile_steer.validate.evaluator import Bench
from compile_steer.validate.report import Coherence, Controls, GridPoint, Separability, ValidationReport
from compile_steer.validate.strengths import dose_response
from compile_steer.validate.sweep import Sweep, candidates, sweep
from compile_steer.validate.verdict import judge, remarks


@dataclass(frozen=True)
class Validation:
    """One run of the stage: what everything in it is measured with."""

    recipe: Recipe
    loaded: LoadedModel
    behaviour: Behaviour
    directions: Directions
    score: Score
    mismatched: Directions | None
    progress: Progress

    @property
    def test(self) -> Sequence[Pair]:
        """The test pairs that are measured."""
        return self.behaviour.test[: self.recipe.validate_.pairs]

    def make(self, layer: int, coefficient: float, instead: Directions | None = None) -> Program:
        return (instead or self.directions).program(layer, coefficient, self.recipe.validate_.positions)


def validate(
    recipe: Recipe,
    loaded: LoadedModel,
    behaviour: Behaviour,
    directions: Directions,
    keep: Callable[[Program], str],
    inputs: str,
    progress: Progress,
) -> tuple[ValidationReport, list[dict[str, Any]]]:
    """Choose the program, measure it on test data and judge it; returns the report and a row a test pair and prompt.

    Args:
        keep: writes the chosen program and returns its file's hash, for the report.
        inputs: fingerprint of what the report depends on.

    Raises:
        RecipeError: no cell of the sweep is coherent. LayoutError: a layer is not in the model.
    """
    options = recipe.validate_
    layers = candidates(options, directions)
    score = options.score.bind(loaded, behaviour)
    require_discrimination(options.score, score, loaded, behaviour)
    mismatched = _mismatched(recipe, loaded, behaviour, directions, progress)
    run = Validation(recipe, loaded, behaviour, directions, score, mismatched, progress)
    pairs = behaviour.validation[: options.sweep_pairs]
    bench = Bench(loaded, pairs, behaviour.neutral[: options.sweep_neutral])
    powers = _powers(run, bench)
    swept = sweep(loaded, behaviour, options, layers, run.make, bench, score, recipe.seed, progress)
    program = run.make(swept.best.layer, swept.best.coefficient)
    report, rows = _measure(run, program, swept, powers)
    verdict, reasons = judge(report, options)
    report = replace(report, verdict=verdict, reasons=reasons, notes=remarks(report))
    return replace(report, program_hash=keep(program), inputs=inputs), rows


def _mismatched(
    recipe: Recipe, loaded: LoadedModel, behaviour: Behaviour, directions: Directions, progress: Progress
) -> Directions | None:
    """Another behaviour's, if its pairs were given."""
    pairs = behaviour.mismatched[: recipe.validate_.control_pairs]
    if not pairs:
        return None
    with progress.phase("another behaviour's direction", 1) as advance:
        found = mismatched_directions(loaded, pairs, directions)
        advance(1)
    return found


def _powers(run: Validation, bench: Bench) -> list[PowerAnalysis]:
    """How many pairs and prompts the claims need, told before the sweep begins."""
    options, behaviour = run.recipe.validate_, run.behaviour
    prompts = [pair.prompt for pair in behaviour.validation[: options.sweep_prompts]]
    with run.progress.phase("base: answers to validation prompts", 1) as advance:
        (base,) = answer(run.loaded, [Request(prompts)], run.score, options.max_new_tokens, behaviour.questions)
        advance(1)
    mean, claim = float(base.scores.mean()), options.claim
    # The most that a paired change of scores in 0 to 1 can spread: two answers independent of each other, each 0 or 1.
    after = min(mean + claim.score, 1.0)
    score_spread = math.sqrt(max(mean * (1 - mean) + after * (1 - after), 0.01))
    found = [
        power_analysis(
            "difference",
            "log-likelihood margin",
            claim.contrast,
            float(bench.base_contrast.std(ddof=1)),
            len(run.test),
            "assumed: pairs change as differently as they differ in the base",
        ),
        power_analysis(
            "difference",
            "score",
            claim.score,
            score_spread,
            len(behaviour.test[: options.prompts]),
            f"from the base's {mean:.2f}, at the most a paired change can spread",
        ),
    ]
    for one in found:
        run.progress.note(str(one))
    return found


def _measure(
    run: Validation, program: Program, swept: Sweep, powers: list[PowerAnalysis]
) -> tuple[ValidationReport, list[dict[str, Any]]]:
    """Everything that is measured on test data, once. The verdict is left open."""
    recipe, loaded, behaviour, progress = run.recipe, run.loaded, run.behaviour, run.progress
    options, best = recipe.validate_, swept.best
    with progress.phase("test: all pairs, neutral text", 1) as advance:
        bench = Bench(loaded, run.test, behaviour.neutral)
        bench.advance(program)
        (change,) = bench.effects([program])
        ratio = bench.perplexity_ratio(program)
        stream = Stream.of(loaded, behaviour.neutral, run.directions.point, program)
        advance(1)
    few = Bench(loaded, run.test[: options.control_pairs])
    random = stream.random(program, options.random_directions, recipe.seed)
    controls = _controls(run, few, best, program, stream, random)
    with progress.phase("test: dose-response", 1) as advance:
        dosed = Bench(loaded, run.test[: options.dose_prompts], behaviour.neutral[: options.dose_prompts])
        doses = dose_response(dosed, program, best.coefficient, options.max_perplexity_ratio)
        advance(1)
    with progress.phase("test: answers of every arm and dose", 1) as advance:
        arms = answer_arms(recipe, loaded, behaviour, program, random, doses, run.score)
        advance(1)
    report = ValidationReport(
        name=recipe.name,
        layer=best.layer,
        coefficient=best.coefficient,
        grid=swept.cells,
        layer_search=swept.rungs,
        power=powers,
        margin=bootstrap_mean(change, seed=recipe.seed),
        p_margin=sign_flip(change, recipe.seed),
        scores=arms.scores(recipe.seed),
        controls=controls,
        separability=_separability(run, best.layer),
        steerability=float(swept.slopes.mean()),
        wrong_way=float((swept.slopes < 0).mean()),
        coherence=Coherence(
            perplexity_ratio=ratio,
            repetition_base=float(arms.base.repetition.mean()),
            repetition_steered=float(arms.steered.repetition.mean()),
            ended_base=float(arms.base.ended.mean()),
            ended_steered=float(arms.steered.ended.mean()),
            strength=stream.strength(program),
        ),
        coefficient_sweep=arms.doses,
        samples=arms.samples,
        program_hash="",
        inputs="",
        n_pairs=len(run.test),
        n_prompts=len(arms.prompts),
    )
    return report, [*pair_rows(run.test, bench.base_contrast, change), *arms.rows()]


def _controls(
    run: Validation, bench: Bench, best: GridPoint, program: Program, stream: Stream, random: list[Program]
) -> Controls:
    def instead(directions: Directions) -> Program:
        return run.make(best.layer, best.coefficient, directions)

    # Shuffled labels are put through the same extraction, and what it finds through the same dial: a shorter vector
    # is part of what labels that say nothing give. Another behaviour's has a length of its own, so it gets this dose.
    shuffled = [instead(run.directions.control(n)) for n in range(len(run.directions.shuffled))]
    mismatched = None if run.mismatched is None else stream.like(program, instead(run.mismatched))
    total = 2 + len(random) + len(shuffled) + (mismatched is not None)
    with run.progress.phase("test: control directions", total) as advance:
        found = measure_controls(bench, program, random, shuffled, mismatched, advance)
    return replace(found, shuffled_kind=run.directions.controls)


def _separability(run: Validation, layer: int) -> Separability:
    """On the activations of the block, or of `EVERY_BLOCK` side by side, as the program acts on them together."""
    sides = [pair.positive for pair in run.test], [pair.negative for pair in run.test]
    readout, point = run.recipe.extract.readout, run.directions.point
    layers = list(run.directions.layers) if layer == EVERY_BLOCK else [layer]
    with run.progress.phase("test: separability of held-out pairs", 2 * len(run.test)) as advance:
        positive, negative = (
            read_activations(run.loaded, side, point=point, readout=readout, through=max(layers), advance=advance)[
                :, layers
            ].flatten(1)
            for side in sides
        )
    return separability(positive, negative, run.directions.vectors[layers].flatten())
