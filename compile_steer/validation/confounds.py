"""What else than the behaviour the two sides of the pairs differ in, and whether the direction moves it.

A direction is the mean difference of the two sides, whatever makes it. So every plain feature of a text is tried as a
classifier of the sides by itself: its AUROC with an interval over pairs, and a permutation test over all features at
once. What the scorer looks at is the behaviour and no confound: the scores of the two sides no longer differ once both
are made equal in the feature.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from compile_steer.data.behaviour import Behaviour
from compile_steer.models.text import Pair
from compile_steer.scoring.base import Reply, Score
from compile_steer.scoring.language import LANGUAGES, languages, words_of
from compile_steer.stats import LEVEL, Interval
from compile_steer.validation.report import Confound

_SEPARATES = 0.75  # AUROC that the interval must lie above; below, a feature is part of a style
_MAX_LABELS = 8
_MAX_PAIRS = 500  # of more, every second one or fewer is looked at
_MIN_GROUP = 3  # test pairs on either side of a comparison

Parts = Callable[[str], set[str]]


@dataclass(frozen=True)
class Feature:
    """What both sides of a pair have more or less of: `values` of a pair are the positive's and the negative's.

    `equal` returns the two texts without a difference in it; `part` is what of a text it looks for.
    """

    kind: str
    name: str
    values: Callable[[Pair], tuple[float, float]]
    equal: Callable[[str, str], tuple[str, str]] = lambda one, other: (one, other)
    part: str = ""


def find_confounds(
    data: Behaviour, pairs: Sequence[Pair], score: Score | None, instructions: str
) -> list[tuple[Feature, Confound]]:
    """Return what the sides of `pairs` differ in besides the behaviour, the plainest of each kind.

    Args:
        score: of given texts; None where they cannot be scored, and no feature is taken for the behaviour.
        instructions: what the positive side is asked for; a word or language in it is the behaviour.
    """
    suspects: list[tuple[Feature, Confound]] = []
    pairs = pairs[:: 1 + len(pairs) // _MAX_PAIRS]
    apart = sum(not (p.prompt in p.positive.prompt and p.prompt in p.negative.prompt) for p in pairs)
    if apart > LEVEL * len(pairs):
        differ = f"the two sides answer different prompts in {apart} of {len(pairs)} training pairs"
        cure = "Give both sides of a pair the same prompt; an instruction for one of them goes into its template."
        suspects.append((Feature("prompts", "", lambda _pair: (0.0, 0.0)), Confound("different prompts", differ, cure)))
    features = _features(data, pairs)
    if len(pairs) < 2 or not features:
        return suspects
    values = np.array([[feature.values(pair) for feature in features] for pair in pairs]).transpose(2, 0, 1)
    auroc, p_values = _separation(values)
    # Of two labels the positive one comes first.
    for n in sorted(range(len(features)), key=lambda n: (-round(abs(auroc[n].value - 0.5), 9), -auroc[n].value)):
        feature, area = features[n], auroc[n]
        # A label is all that a response says, so any imbalance is in the direction.
        least = 0.5 if feature.kind == "answer" else _SEPARATES
        known = any(
            feature.kind == other.kind or (feature.part and feature.part == other.part) for other, _ in suspects
        )
        if (
            known
            or max(area.low, 1 - area.high) <= least
            or p_values[n] > LEVEL
            or feature.part in words_of(instructions)
        ):
            continue
        if score is not None and _is_scored(feature, pairs, score):
            continue
        with_more, against = ("positive", values[0] > values[1]), ("negative", values[0] < values[1])
        side, more = with_more if area.value > 0.5 else against
        has = "alone has it" if set(np.unique(values[:, :, n])) <= {0.0, 1.0} else "has more of it"
        evidence = (
            f"the {side} side {has} in {more[:, n].sum()} of {len(pairs)} training pairs (AUROC {area}, permutation "
            f"p = {p_values[n]:.4f})"
        )
        suspects.append(
            (feature, Confound(feature.name, evidence, _cure(feature, data), auroc=area, p_value=p_values[n]))
        )
    return suspects


def _cure(feature: Feature, data: Behaviour) -> str:
    if feature.kind != "answer":
        return f"Give both sides the same {feature.kind}, or add pairs in which it is the other way round."
    if data.questions:
        return "Set data.balance_letters: true, which puts the right choice under each letter equally often."
    return "Read the rows as data.kind: choices, which puts the right choice under each letter equally often."


def on_direction(
    suspects: Sequence[tuple[Feature, Confound]], data: Behaviour, pairs: Sequence[Pair], effects: np.ndarray
) -> list[Confound]:
    """Add to each confound what steering does with it and against it, and the labels that it moves, right or wrong.

    Args:
        pairs: the test pairs, n of them.
        effects: [n] change of each one's log-likelihood margin, nats per token.
    """
    result = [replace(confound, on_test=_split(feature, pairs, effects)[0]) for feature, confound in suspects]
    labels = [feature for feature in _features(data, pairs) if feature.kind == "answer"]
    if not any(feature.kind == "answer" for feature, _confound in suspects):
        for feature in labels:
            on_test, dominates = _split(feature, pairs, effects)
            if dominates:  # of two labels the other one moves as much the other way
                evidence = "the training pairs are balanced in it, but steering moves it whichever answer is right"
                cure = "Try other layers, or read more questions."
                return [*result, Confound(feature.name, evidence, cure, on_test)]
    return result


def _split(feature: Feature, pairs: Sequence[Pair], effects: np.ndarray) -> tuple[str, bool]:
    """The effect on pairs with the feature and against it, in words; True if that decides more than the behaviour."""
    from scipy.stats import t

    difference = np.array([positive - negative for positive, negative in map(feature.values, pairs)])
    with_it, against = effects[difference > 0], effects[difference < 0]
    counts = f"on {len(with_it)} test pairs whose positive side has more of it, {len(against)} whose negative side has"
    if min(len(with_it), len(against)) < _MIN_GROUP:
        return f"the test cannot tell the two apart ({counts})", False
    # Welch's interval, because the two groups need not spread alike, with the fewest degrees of freedom that it can have.
    error = np.sqrt(with_it.var(ddof=1) / len(with_it) + against.var(ddof=1) / len(against)) / 2
    reach = error * t.ppf(1 - LEVEL / _MAX_LABELS / 2, min(len(with_it), len(against)) - 1)
    own, behaviour = (with_it.mean() - against.mean()) / 2, (with_it.mean() + against.mean()) / 2
    dominates = abs(own) > max(reach, abs(behaviour) / 2)
    text = f"steering moves the margin by {with_it.mean():+.3f} and {against.mean():+.3f} nats/token ({counts})"
    return text, bool(dominates)


def _features(data: Behaviour, pairs: Sequence[Pair]) -> list[Feature]:
    """The features that could tell most of one side from most of the other."""
    plain = [[_label(text) for text in _responses(pair)] for pair in pairs]
    distinct = sorted({label for both in plain for label in both})
    if data.questions or (len(distinct) <= min(_MAX_LABELS, len(pairs)) and all(0 < len(x) <= 12 for x in distinct)):
        answers = [_has("answer", f"the answer {x}", lambda text: {_label(text)}, x) for x in distinct]
        questions = [data.questions[pair.prompt] for pair in pairs if pair.prompt in data.questions]
        if len(questions) < len(pairs) or not all(question.choices for question in questions):
            return answers

        def of_choices(pair: Pair) -> tuple[float, float]:
            question = data.questions[pair.prompt]
            lengths = list(map(len, question.choices))
            right = lengths.pop(question.answer)
            return float(right), float(np.mean(lengths))

        return [*answers, Feature("length of choices", "the length of a choice", of_choices)]

    def frequent(parts: Parts) -> list[str]:
        # What is in no more than half of either side cannot separate as well as is asked for.
        sides = zip(*map(_responses, pairs), strict=True)
        counts = (Counter(part for text in side for part in parts(text)) for side in sides)
        return sorted({part for count in counts for part, n in count.items() if n > len(pairs) / 2})

    features = [
        Feature("length", "the length", _of_both(len), _same_length),
        Feature("capitals", "capital letters", _of_both(_capitals), lambda a, b: (a.casefold(), b.casefold())),
    ]
    features += [_has("first word", f"the first word '{word}'", _first, word, r"^\W*\S+") for word in frequent(_first)]
    features += [
        _has("words", f"the word '{word}'", _content, word, rf"\b{re.escape(word)}\b") for word in frequent(_content)
    ]
    for mark in frequent(_marks):
        features.append(
            _has("format", "line breaks" if mark == "\n" else f"the character {mark}", _marks, mark, re.escape(mark))
        )
    return features + [_has("language", f"the language ({x})", languages, x, r"(?!)") for x in frequent(languages)]


def _has(kind: str, name: str, parts: Parts, part: str, pattern: str = "") -> Feature:
    """Whether a text has the `part`; `pattern` finds it, or what stands for it."""

    def drop(*texts: str) -> tuple[str, str]:
        positive, negative = (re.sub(pattern, " ", text, flags=re.IGNORECASE) if pattern else text for text in texts)
        return positive, negative

    return Feature(kind, name, _of_both(lambda text: part in parts(text)), drop, part.casefold() if pattern else "")


def _of_both(value: Callable[[str], float]) -> Callable[[Pair], tuple[float, float]]:
    return lambda pair: (float(value(pair.positive.response)), float(value(pair.negative.response)))


def _separation(values: np.ndarray) -> tuple[list[Interval], list[float]]:
    """The AUROC of each of f features [2, n, f] of n pairs with its 95 % interval, and p-values of all f together.

    The interval is DeLong's with the pair as the unit (Obuchowski 1997); the test swaps the sides of random pairs and
    takes the largest of all features (Westfall and Young 1993), so that the search among them is paid for.
    """
    from scipy.stats import norm, rankdata

    n = values.shape[1]
    ranks = rankdata(values.reshape(2 * n, -1), axis=0).reshape(values.shape)
    # The fraction of the other side that each text is above.
    above = (ranks - np.array([rankdata(side, axis=0) for side in values])) / n
    area, spread = above[0].mean(axis=0), (above[0] - above[1]).std(axis=0, ddof=1) / np.sqrt(n)
    reach = float(norm.ppf(1 - LEVEL / 2)) * spread
    # Ranks among all texts stay as they are when sides are swapped, and the AUROC is linear in them.
    swaps = np.random.default_rng(0).choice([-1.0, 1.0], size=(4999, n))
    largest = np.abs(swaps @ (ranks[0] - ranks[1]) / (2 * n * n)).max(axis=1)
    p_values = [float((1 + (largest >= abs(a - 0.5) - 1e-9).sum()) / (1 + len(largest))) for a in area]
    bounds = zip(area, np.clip(area - reach, 0, 1), np.clip(area + reach, 0, 1), strict=True)
    return [Interval(float(a), float(low), float(high)) for a, low, high in bounds], p_values


def _is_scored(feature: Feature, pairs: Sequence[Pair], score: Score) -> bool:
    """True if at most half of the difference of the two sides' scores is left where both are equal in the feature."""

    def gap(sides: Sequence[tuple[str, str]]) -> float:
        replies = [Reply(pair.prompt, side[n], True) for n in (0, 1) for pair, side in zip(pairs, sides, strict=True)]
        positive, negative = np.split(score(replies), 2)
        return float(positive.mean() - negative.mean())

    sides = [_responses(pair) for pair in pairs]
    before = gap(sides)
    return before > 0 and gap([feature.equal(*side) for side in sides]) <= before / 2


def _responses(pair: Pair) -> tuple[str, str]:
    return pair.positive.response, pair.negative.response


def _label(text: str) -> str:
    return re.sub(r"\W+", "", text).upper()


def _first(text: str) -> set[str]:
    return set(words_of(text)[:1])


def _content(text: str) -> set[str]:
    return {word for word in words_of(text) if len(word) > 2 and not any(word in known for known in LANGUAGES.values())}


def _marks(text: str) -> set[str]:
    return {c for c in text.strip() if c == "\n" or not (c.isalnum() or c.isspace())}


def _capitals(text: str) -> float:
    return sum(c.isupper() for c in text) / max(1, sum(c.isalpha() for c in text))


def _same_length(positive: str, negative: str) -> tuple[str, str]:
    n = min(len(positive), len(negative))
    return positive[:n], negative[:n]
