"""The stage: a sweep on validation data, then one measurement on test data, then the verdict."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from compile_steer.common.errors import RecipeError
from compile_steer.data.behaviour import Behaviour, Context
from compile_steer.models.text import Pair, Readout, Text
from compile_steer.models.tokens import encode, require_room
from compile_steer.scoring.answers import Answers, Request, answer
from compile_steer.scoring.base import Score, require_discrimination
from compile_steer.stats import Interval, PowerAnalysis, bootstrap_mean, sign_flip
from compile_steer.steering.directions import FROM_LABELS, Directions
from compile_steer.steering.program import Program
from compile_steer.validation.coefficients import coefficient_sweep, sweep_coefficients
from compile_steer.validation.confounds import Feature, find_confounds, on_direction
from compile_steer.validation.controls import StreamStatistics, measure_controls, other_directions, separability
from compile_steer.validation.evaluator import ContrastEvaluator
from compile_steer.validation.options import ValidateOptions
from compile_steer.validation.power import margin_power, score_power
from compile_steer.validation.report import Coherence, Confound, Scores, SweepPoint, ValidationReport
from compile_steer.validation.side_effects import askable, measure_side_effects
from compile_steer.validation.sweep import candidates, sweep
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
    model, data, seed, progress = context.model, context.data, context.seed, context.progress
    test, limit = data.test[: options.pairs], options.max_perplexity_ratio

    def program_at(layer: int, coefficient: float, source: Directions = directions) -> Program:
        return source.program(layer, coefficient, options.positions)

    # Input that cannot work is refused before any long computation.
    _require_pairs(data)
    layers = candidates(options, directions)
    score = options.score.bind(model, data)
    require_discrimination(options.score, score, model, data)
    other = other_directions(context, options, directions)
    questions, unasked = askable(model, options.questions)
    # Choose the program on validation data.
    few_questions = questions[: max(4, len(questions) // 2)]
    pairs, control = data.validation[: options.sweep_pairs], data.neutral[: options.sweep_neutral]
    evaluator = ContrastEvaluator(model, pairs, control, few_questions)
    power, base = _power(context, options, evaluator.base_margins, score)
    suspects = _confounds(context, options, directions, score, readout)
    chosen = sweep(context, options, layers, program_at, evaluator, score, base)
    layer, coefficient = chosen.best.layer, chosen.best.coefficient
    program = program_at(layer, coefficient)
    # Its effect and its cost on all test pairs and control texts.
    with progress.phase("test: all pairs, control text", 1):
        evaluator = ContrastEvaluator(model, test, data.neutral, questions)
        evaluator.advance(program)
        (effects,) = evaluator.effects([program])
        perplexity = bootstrap_mean(evaluator.log_perplexity(program), seed=seed)
        stream = StreamStatistics.of(model, data.neutral, directions.point, program)
    with progress.phase("test: side effects", 1):
        side_effects, unmeasured = measure_side_effects(context, options, program, evaluator, questions)
    with progress.phase("test: other wordings", 1):
        wordings, missing = measure_wordings(context, program, options.wordings)
    # Directions from shuffled labels have gone through the same extraction and get the same coefficient: a shorter vector
    # is part of what meaningless labels give. Another behaviour's has a length of its own, so it gets the same strength.
    random = stream.random(program, options.random_directions, seed)
    shuffled = [program_at(layer, coefficient, directions.control(n)) for n in range(len(directions.shuffled))]
    unrelated = None if other is None else stream.like(program, program_at(layer, coefficient, other))
    few = ContrastEvaluator(model, test[: options.control_pairs])
    controls = measure_controls(few, program, random, shuffled, directions.controls, unrelated, progress)
    # The same program at other coefficients, and the answers under every condition.
    with progress.phase("test: other coefficients, all answers", 1):
        few = ContrastEvaluator(model, test[: options.dose_prompts], data.neutral[: options.dose_prompts])
        settings = sweep_coefficients(few, program, coefficient, limit)
        answers, samples, points, note = _answer(context, options, score, program, random, settings, ask, too_high)
    report = ValidationReport(
        name=name,
        layer=layer,
        coefficient=coefficient,
        grid=chosen.grid,
        layer_search=chosen.layer_search,
        power=power,
        margin=bootstrap_mean(effects, seed=seed),
        p_margin=sign_flip(effects, seed),
        scores=_scores({name: condition.scores for name, condition in answers.items()}, seed),
        controls=controls,
        separability=separability(context, test, directions, layer, readout),
        steerability=float(chosen.slopes.mean()),
        wrong_way=float((chosen.slopes < 0).mean()),
        coherence=_coherence(answers, perplexity, stream.strength(program)),
        coefficient_sweep=coefficient_sweep(points, limit),
        samples=samples,
        n_pairs=len(test),
        n_prompts=len(answers["base"].texts),
        confounds=on_direction(suspects, data, test, effects),
        side_effects=side_effects,
        wordings=wordings,
    )
    verdict, reasons = decide(report, options)
    report = replace(
        report,
        verdict=verdict,
        reasons=reasons,
        notes=[*context.notes, *filter(None, [unasked]), *unmeasured, *missing, *note, *remarks(report)],
    )
    return Validation(program, report, _rows(test, evaluator.base_margins, effects, answers))


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


def _scores(scores: Mapping[str, np.ndarray], seed: int) -> Scores:
    """The means of each condition's scores [n_prompts], and what steering has over the others."""
    means = {name: float(values.mean()) for name, values in scores.items()}
    lead = {name: scores["steered"] - values for name, values in scores.items()}
    over = {name: bootstrap_mean(values, seed=seed) for name, values in lead.items()}
    return Scores(
        base=means["base"],
        steered=means["steered"],
        random=means["random"],
        instructed=means.get("instructed"),
        few_shot=means.get("few_shot"),
        effect=over["base"],
        p_value=sign_flip(lead["base"], seed),
        over_random=over["random"],
        p_over_random=sign_flip(lead["random"], seed),
        over_instructed=over.get("instructed"),
        over_few_shot=over.get("few_shot"),
    )


def _answer(
    context: Context,
    options: ValidateOptions,
    score: Score,
    program: Program,
    random: Sequence[Program],
    points: Sequence[tuple[Program, SweepPoint]],
    ask: str,
    too_high: float,
) -> tuple[dict[str, Answers], dict[str, str], list[SweepPoint], list[str]]:
    """Answer the test prompts under every condition, a few of them along the sweep, and the recipe's own question.

    Returns the answers by condition (without those that the recipe or the template lacks), the samples, the points with
    their scores, and a remark on a baseline that the recipe asks for but the model cannot have.
    """
    model, data = context.model, context.data
    prompts = [pair.prompt for pair in data.test[: options.prompts]]
    few = prompts[: options.dose_prompts]
    # Another random direction for each prompt tells more about them than one for all.
    by_chance = [random[n % len(random)] for n in range(len(prompts))]
    sampled = {"base": None, "steered": program, "too_high": program.scaled(too_high)}
    requests = [
        Request(prompts),
        Request(prompts, program),
        Request(prompts, by_chance),
        Request(prompts if options.instruction else [], ask=lambda prompt: Text(f"{prompt} {options.instruction}")),
        *(Request([ask], setting, scored=False) for setting in sampled.values()),
        *(Request(few, scaled) for scaled, _point in points),
    ]
    base, steered, chance, instructed, *rest = answer(model, requests, score, options.max_new_tokens, data.questions)
    answers = {"base": base, "steered": steered, "random": chance}
    if options.instruction:
        answers["instructed"] = instructed

    # Examples as earlier turns, in batches of their own: a batch is as long as its longest row.
    history = tuple((pair.prompt, pair.positive.response) for pair in data.train[: options.few_shot])
    remark = list[str]()
    try:
        encoded = [encode(model.tokenizer, Text(prompt, history=history)) for prompt in prompts]
        require_room(model, encoded, options.max_new_tokens)
    except RecipeError as error:  # the chat template cannot have earlier turns, or the model has too few positions
        shown = f"showing {len(history)} examples before the prompt (validate.few_shot)"
        remark = [
            f"{shown} was not measured, so steering is not compared with it: {error.problems[0].removeprefix('data: ')}"
        ]
    if history and not remark:
        request = Request(prompts, ask=lambda prompt: Text(prompt, history=history))
        (answers["few_shot"],) = answer(model, [request], score, options.max_new_tokens, data.questions)

    samples = {name: sample.texts[0] for name, sample in zip(sampled, rest, strict=False)}
    measured = [
        replace(point, score=float(a.scores.mean()), repetition=float(a.repetition.mean()))
        for (_program, point), a in zip(points, rest[len(sampled) :], strict=True)
    ]
    own = float(base.scores[: len(few)].mean()), float(base.repetition[: len(few)].mean())
    return answers, samples, [*measured, SweepPoint(0.0, 0.0, 1.0, *own)], remark
