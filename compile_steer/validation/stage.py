"""The stage: a sweep on validation data, then one measurement on test data, then the verdict."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from compile_steer.common.errors import RecipeError
from compile_steer.data.behaviour import Behaviour, Context
from compile_steer.models.text import Pair, Readout
from compile_steer.scoring.answers import Answers, Request, answer
from compile_steer.scoring.base import Score, require_discrimination
from compile_steer.scoring.questions import PlainQuestion
from compile_steer.stats import Interval, PowerAnalysis, bootstrap_mean, sign_flip
from compile_steer.steering.directions import FROM_LABELS, Directions
from compile_steer.steering.program import Program
from compile_steer.validation.coefficients import coefficient_sweep, sweep_coefficients
from compile_steer.validation.conditions import answer_conditions, compare_scores
from compile_steer.validation.confounds import Feature, find_confounds, on_direction
from compile_steer.validation.controls import StreamStatistics, measure_controls, other_directions, separability
from compile_steer.validation.evaluator import ContrastEvaluator
from compile_steer.validation.options import ValidateOptions
from compile_steer.validation.power import margin_power, score_power
from compile_steer.validation.report import Coherence, Confound, Controls, ValidationReport
from compile_steer.validation.side_effects import askable, measure_side_effects
from compile_steer.validation.sweep import Sweep, candidates, sweep
from compile_steer.validation.verdict import decide, remarks
from compile_steer.validation.wordings import measure_wordings


@dataclass(frozen=True, repr=False)
class Validation:
    """The chosen program, the report on it, and one row per test pair and per test prompt.

    The report does not know the program's file or its own inputs yet: whoever saves it fills these in.
    """

    program: Program
    report: ValidationReport
    rows: list[dict[str, Any]]

    def __repr__(self) -> str:
        return f"Validation of {self.program!r}\n{self.report!r}"


@dataclass(frozen=True)
class _Choice:
    """What the validation data chose, and what they and the training data showed before the test data were read."""

    program: Program
    sweep: Sweep
    score: Score
    questions: Sequence[PlainQuestion]
    power: list[PowerAnalysis]
    suspects: list[tuple[Feature, Confound]]
    other: Directions | None
    notes: list[str]


def validate(
    context: Context,
    directions: Directions,
    options: ValidateOptions,
    *,
    readout: Readout,
    ask: str,
    too_high: float,
    name: str,
) -> Validation:
    """Choose the program on validation data, measure it once on test data and decide.

    Base and steered model answer `ask` for the report, also at `too_high` times the coefficient. Raises `RecipeError` if no
    point of the sweep is coherent, `LayoutError` if a layer is not in the model.

    Args:
        readout: of the held-out activations that the direction is to separate.
    """
    choice = _choose(context, directions, options, readout)
    model, data, seed, progress = context.model, context.data, context.seed, context.progress
    program, best = choice.program, choice.sweep.best
    test, limit = data.test[: options.pairs], options.max_perplexity_ratio
    # Its effect and its cost on all test pairs and control texts.
    with progress.phase("test: all pairs, control text", 1):
        evaluator = ContrastEvaluator(model, test, data.neutral, choice.questions)
        evaluator.advance(program)
        (effects,) = evaluator.effects([program])
        perplexity = bootstrap_mean(evaluator.log_perplexity(program), seed=seed)
        stream = StreamStatistics.of(model, data.neutral, directions.point, program)
    with progress.phase("test: side effects", 1):
        side_effects, unmeasured = measure_side_effects(context, options, program, evaluator, choice.questions)
    with progress.phase("test: other wordings", 1):
        wordings, missing = measure_wordings(context, program, options.wordings)
    random = stream.random(program, options.random_directions, seed)
    controls = _controls(context, directions, options, choice, stream, random)
    # The same program at other coefficients, and the answers under every condition.
    with progress.phase("test: other coefficients, all answers", 1):
        few = ContrastEvaluator(model, test[: options.dose_prompts], data.neutral[: options.dose_prompts])
        settings = sweep_coefficients(few, program, best.coefficient, limit)
        answers, samples, points, note = answer_conditions(
            context, options, choice.score, program, random, settings, ask, too_high
        )
    report = ValidationReport(
        name=name,
        layer=best.layer,
        coefficient=best.coefficient,
        grid=choice.sweep.grid,
        layer_search=choice.sweep.layer_search,
        power=choice.power,
        margin=bootstrap_mean(effects, seed=seed),
        p_margin=sign_flip(effects, seed),
        scores=compare_scores({name: condition.scores for name, condition in answers.items()}, seed),
        controls=controls,
        separability=separability(context, test, directions, best.layer, readout),
        steerability=float(choice.sweep.slopes.mean()),
        wrong_way=float((choice.sweep.slopes < 0).mean()),
        coherence=_coherence(answers, perplexity, stream.strength(program)),
        coefficient_sweep=coefficient_sweep(points, limit),
        samples=samples,
        n_pairs=len(test),
        n_prompts=len(answers["base"].texts),
        confounds=on_direction(choice.suspects, data, test, effects),
        side_effects=side_effects,
        wordings=wordings,
    )
    verdict, reasons = decide(report, options)
    notes = [*context.notes, *choice.notes, *unmeasured, *missing, *note, *remarks(report)]
    report = replace(report, verdict=verdict, reasons=reasons, notes=notes)
    return Validation(program, report, _rows(test, evaluator.base_margins, effects, answers))


def _choose(context: Context, directions: Directions, options: ValidateOptions, readout: Readout) -> _Choice:
    """Choose the program on validation data; raises as `validate`, for input that cannot work before any long computation."""
    model, data = context.model, context.data
    _require_pairs(data)
    layers = candidates(options, directions)
    score = options.score.bind(model, data)
    require_discrimination(options.score, score, model, data)
    other = other_directions(context, options, directions)
    questions, unasked = askable(model, options.questions)

    def program_at(layer: int, coefficient: float) -> Program:
        return directions.program(layer, coefficient, options.positions)

    few_questions = questions[: max(4, len(questions) // 2)]
    pairs, control = data.validation[: options.sweep_pairs], data.neutral[: options.sweep_neutral]
    evaluator = ContrastEvaluator(model, pairs, control, few_questions)
    power, base = _power(context, options, evaluator.base_margins, score)
    suspects = _confounds(context, options, directions, score, readout)
    chosen = sweep(context, options, layers, program_at, evaluator, score, base)
    program = program_at(chosen.best.layer, chosen.best.coefficient)
    return _Choice(program, chosen, score, questions, power, suspects, other, [unasked] if unasked else [])


def _controls(
    context: Context,
    directions: Directions,
    options: ValidateOptions,
    choice: _Choice,
    stream: StreamStatistics,
    random: Sequence[Program],
) -> Controls:
    """The effect of other directions on some of the test pairs.

    Directions from shuffled labels have gone through the same extraction and get the same coefficient: a shorter vector is
    part of what meaningless labels give. Another behaviour's has a length of its own, so it gets the same strength.
    """
    program, at = choice.program, (choice.sweep.best.layer, choice.sweep.best.coefficient, options.positions)
    shuffled = [directions.control(n).program(*at) for n in range(len(directions.shuffled))]
    unrelated = None if choice.other is None else stream.like(program, choice.other.program(*at))
    few = ContrastEvaluator(context.model, context.data.test[: options.pairs][: options.control_pairs])
    return measure_controls(few, program, random, shuffled, directions.controls, unrelated, context.progress)


def _confounds(
    context: Context, options: ValidateOptions, directions: Directions, score: Score, readout: Readout
) -> list[tuple[Feature, Confound]]:
    """What else the pairs of the directions differ in, noted before the sweep begins."""
    data = context.data
    # A vector of another tool was not made of these pairs; of prompts alone, their instruction is what is wanted.
    own = directions.controls == FROM_LABELS and readout == "response_mean"
    instructions = [options.instruction]
    instructions += [pair.positive.prompt.replace(pair.prompt, "") + pair.positive.system for pair in data.train]
    labelled = options.score.needs_no_labels or all(pair.prompt in data.checks for pair in data.train)
    can_score = labelled and not any(part.unfit_for_data_texts for part in options.score.parts)
    suspects = find_confounds(data, data.train if own else (), score if can_score else None, " ".join(instructions))
    for _feature, confound in suspects:
        context.progress.note(str(confound))
    return suspects


def _require_pairs(data: Behaviour) -> None:
    """Raise `RecipeError` where a split has no two pairs: a spread cannot be measured on one."""
    counts = {name: len(data.split(name)) for name in ("validation", "test")}
    problems = [
        f"data.{name} has {n} pairs; needed: 2 or more, 24 to show much." for name, n in counts.items() if n < 2
    ]
    if problems:
        raise RecipeError(problems)


def _power(
    context: Context, options: ValidateOptions, base_margins: np.ndarray, score: Score
) -> tuple[list[PowerAnalysis], Answers]:
    """How many pairs and prompts the minimum effects need, printed before the sweep; and the base's answers."""
    data, minimum = context.data, options.minimum_effect
    prompts = [pair.prompt for pair in data.validation[: options.sweep_prompts]]
    with context.progress.phase("base: answers to validation prompts", 1):
        (base,) = answer(context.model, [Request(prompts)], score, options.max_new_tokens, data.questions)
    n_pairs, n_prompts = len(data.test[: options.pairs]), len(data.test[: options.prompts])
    analyses = [
        margin_power(minimum.margin, float(base_margins.std(ddof=1)), n_pairs),
        score_power(float(base.scores.mean()), minimum.score, n_prompts),
    ]
    for analysis in analyses:
        context.progress.remark(str(analysis))
    return analyses, base


def _rows(
    pairs: Sequence[Pair], base: np.ndarray, effects: np.ndarray, answers: Mapping[str, Answers]
) -> list[dict[str, Any]]:
    """One row for each pair with its margins, then one for each prompt that was answered, under each condition."""
    measured: list[dict[str, Any]] = [
        {"kind": "pair", "prompt": pair.prompt, "base": float(before), "steered": float(before + effect)}
        for pair, before, effect in zip(pairs, base, effects, strict=True)
    ]
    rows: list[dict[str, Any]] = [{"kind": "answer", "prompt": pair.prompt} for pair in pairs]
    for name, a in answers.items():
        # Not strict: fewer prompts are answered than pairs are measured.
        for row, text, score, repeats in zip(rows, a.texts, a.scores, a.repetition, strict=False):
            row[name] = {"text": text, "score": float(score), "repetition": float(repeats)}
    return measured + [row for row in rows if "base" in row]


def _coherence(answers: Mapping[str, Answers], log_perplexity: Interval, strength: float) -> Coherence:
    base, steered = answers["base"], answers["steered"]
    return Coherence(
        perplexity_ratio=math.exp(log_perplexity.value),
        log_perplexity=log_perplexity,
        repetition_base=float(base.repetition.mean()),
        repetition_steered=float(steered.repetition.mean()),
        ended_base=float(base.ended.mean()),
        ended_steered=float(steered.ended.mean()),
        strength=strength,
    )
