"""The stage: sweep on validation, then one measurement on test, then the verdict."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import torch

from compile_steer.activations import read_activations
from compile_steer.answers import Answers, Request, answer
from compile_steer.behaviour import Behaviour
from compile_steer.contrast import contrast_scores, encode_pairs
from compile_steer.directions import Directions
from compile_steer.hooks import PAD
from compile_steer.metrics import Interval, bootstrap_mean
from compile_steer.models import Loaded
from compile_steer.program import Program
from compile_steer.progress import Meter
from compile_steer.recipe import Recipe
from compile_steer.replay import run_span
from compile_steer.scoring import require_discrimination
from compile_steer.tokens import Text, batches, encode
from compile_steer.validate.controls import measure_controls, separability
from compile_steer.validate.report import Coherence, Controls, Scores, Separability, ValidationReport, judge
from compile_steer.validate.shared import SharedPrefix
from compile_steer.validate.sweep import Sweep, sweep, with_directions


def validate(
    recipe: Recipe,
    loaded: Loaded,
    behaviour: Behaviour,
    directions: Directions,
    keep: Callable[[Program], str],
    inputs: str,
    meter: Meter,
) -> ValidationReport:
    """Choose the program, measure it on test data and judge it.

    Args:
        keep: writes the chosen program and returns its file's hash, for the report.
        inputs: fingerprint of what the report depends on.

    Raises:
        RecipeError: the score cannot tell the two sides apart, or no cell of the sweep is coherent.
        LayoutError: a layer is not in the model.
    """
    options = with_directions(recipe.validate_, directions)
    require_discrimination(options.score, loaded, behaviour)

    def make(layer: int, coefficient: float) -> Program:
        return directions.program(layer, coefficient, options.positions)

    swept = sweep(loaded, behaviour, options, make, meter)
    program = make(swept.best.layer, swept.best.coefficient)
    report = _measure(recipe, loaded, behaviour, directions, program, swept, meter)
    verdict, reasons = judge(report, options)
    return replace(report, verdict=verdict, reasons=reasons, program_hash=keep(program), inputs=inputs)


def _measure(
    recipe: Recipe,
    loaded: Loaded,
    behaviour: Behaviour,
    directions: Directions,
    program: Program,
    swept: Sweep,
    meter: Meter,
) -> ValidationReport:
    """Everything that is measured on test data, once. The verdict is left open."""
    layer, slopes = swept.best.layer, swept.slopes
    contrast, perplexity_ratio = _effect(recipe, loaded, behaviour, program, meter)
    controls = _controls(recipe, loaded, behaviour, directions, program, meter)
    base, under, instructed, samples = _answers(recipe, loaded, behaviour, program, meter)
    return ValidationReport(
        name=recipe.name,
        layer=layer,
        coefficient=swept.best.coefficient,
        sweep=swept.cells,
        contrast=contrast,
        scores=Scores(
            base=float(base.scores.mean()),
            steered=float(under.scores.mean()),
            instructed=None if instructed is None else float(instructed.scores.mean()),
            effect=bootstrap_mean(under.scores - base.scores, seed=recipe.seed),
        ),
        controls=controls,
        separability=_separability(recipe, loaded, behaviour, directions, layer, meter),
        steerability=float(slopes.mean()),
        wrong_way=float((slopes < 0).mean()),
        coherence=Coherence(
            perplexity_ratio=perplexity_ratio,
            repetition_base=float(base.repetition.mean()),
            repetition_steered=float(under.repetition.mean()),
            ended_base=float(base.ended.mean()),
            ended_steered=float(under.ended.mean()),
            relative_dose=_relative_dose(loaded, behaviour, program),
        ),
        samples=samples,
        program_hash="",
        inputs="",
        n_pairs=len(behaviour.test),
        n_prompts=len(base.texts),
    )


def _effect(
    recipe: Recipe, loaded: Loaded, behaviour: Behaviour, program: Program, meter: Meter
) -> tuple[Interval, float]:
    """The mean contrast effect on all test pairs with its interval, and the perplexity ratio on neutral text."""
    n_pairs = len(behaviour.test)
    with meter.phase("test: all pairs, neutral text", 1) as tick:
        neutral = [encode(loaded.tokenizer, text) for text in behaviour.neutral]
        shared = SharedPrefix(loaded, encode_pairs(loaded, behaviour.test) + neutral)
        shared.advance(program.first_layer)
        change = shared.under(program) - shared.base()
        tick(1)
    effect = bootstrap_mean(contrast_scores(change[: 2 * n_pairs]), seed=recipe.seed)
    return effect, float(np.exp(-change[2 * n_pairs :].mean()))


def _controls(
    recipe: Recipe, loaded: Loaded, behaviour: Behaviour, directions: Directions, program: Program, meter: Meter
) -> Controls:
    options, (intervention,) = recipe.validate_, program.interventions
    shuffled = directions.shuffled[:, intervention.site.layer]
    pairs = behaviour.test[: options.control_pairs]
    with meter.phase("test: control directions", options.random_directions + len(shuffled) + 2) as tick:
        return measure_controls(loaded, pairs, program, shuffled, options.random_directions, recipe.seed, tick)


def _separability(
    recipe: Recipe, loaded: Loaded, behaviour: Behaviour, directions: Directions, layer: int, meter: Meter
) -> Separability:
    sides = [p.positive for p in behaviour.test], [p.negative for p in behaviour.test]
    readout, point = recipe.extract.readout, directions.point
    with meter.phase("test: separability of held-out pairs", 2 * len(behaviour.test)) as tick:
        positive, negative = (
            read_activations(loaded, side, point=point, readout=readout, tick=tick)[:, layer] for side in sides
        )
    return separability(positive, negative, directions.vectors[layer])


def _answers(
    recipe: Recipe, loaded: Loaded, behaviour: Behaviour, program: Program, meter: Meter
) -> tuple[Answers, Answers, Answers | None, dict[str, str]]:
    """Test prompts answered by base, steered, and base asked with the instruction (if there is one); and one
    prompt answered by base, steered, and steered too hard: what the dial does."""
    options = recipe.validate_
    prompts = [pair.prompt for pair in behaviour.test[: options.prompts]]
    dial = {"base": None, "steered": program, "too_high": program.scaled(recipe.too_high)}
    requests = [Request(prompts), Request(prompts, program)]
    requests.append(Request(prompts if options.instruction else [], ask=lambda p: Text(f"{p} {options.instruction}")))
    requests += [Request([recipe.ask], setting, scored=False) for setting in dial.values()]
    with meter.phase("test: answers of base and steered", 1) as tick:
        base, under, instructed, *samples = answer(
            loaded, requests, options.score.bind(loaded, behaviour), options.max_new_tokens, behaviour.questions
        )
        tick(1)
    texts = {name: one.texts[0] for name, one in zip(dial, samples, strict=True)}
    return base, under, instructed if options.instruction else None, texts


def _relative_dose(loaded: Loaded, behaviour: Behaviour, program: Program) -> float:
    """||c v|| over the median norm of the residual stream after the steered block, on neutral text.

    The median, because the first token's norm is a hundred times the others' in many models.
    """
    (intervention,) = program.interventions
    encoded = [encode(loaded.tokenizer, text) for text in behaviour.neutral]
    norms = []
    for batch in batches(encoded, int(loaded.tokenizer.pad_token_id)):
        batch = batch.to(loaded.device)
        after = intervention.site.changes_from + 1
        with torch.no_grad():
            hidden = run_span(
                loaded.model,
                batch.input_ids,
                batch.attention_mask,
                stop=None if after == loaded.layout.n_layers else after,
            )
        norms.append(hidden[batch.roles != PAD].float().norm(dim=-1).cpu())
    dose = abs(intervention.coefficient) * float(intervention.vector.norm())
    return dose / float(torch.cat(norms).median())
