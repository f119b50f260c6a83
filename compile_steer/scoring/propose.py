"""Find a scorer that tells the two sides of contrast pairs apart: the default of a recipe for which nobody chose one.

Plain rules first, which a person can read and change: lower case, punctuation, words, length; then a classifier.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from compile_steer.common.errors import RecipeError, brief
from compile_steer.scoring.base import ScorerBase
from compile_steer.scoring.classifier import Classifier, trained_probability
from compile_steer.scoring.text import Keywords, Length, Lowercase, TextScorer
from compile_steer.stats import auroc

_FOUND, _WRONG = 0.6, 0.1  # least fraction of one side that a rule finds, largest fraction of the other
_MAX_WORDS = 12
_MIN_AUROC = 0.7
_FOLDS = 4
_SIGNS = {
    r"\?": "a question mark",
    "!": "an exclamation mark",
    "[\N{CYCLONE}-\U0001faff]": "an emoji",
    r"(?m)^\s*([-*\u2022]|\d+[.)])\s": "a list",
}


@dataclass(frozen=True)
class Proposal:
    """A scorer, and why it was chosen, as a phrase."""

    scorer: ScorerBase
    reason: str


def propose_score(
    positive: Sequence[str], negative: Sequence[str], others: Sequence[str] = (), echo: str = ""
) -> Proposal:
    """Return the plainest scorer that tells the responses of the two sides apart.

    Args:
        others: texts without the behaviour, whose words are none of it either.
        echo: words that the positive side may only repeat, of a request for the behaviour.

    Raises:
        RecipeError: nothing tells them apart, not even a classifier (AUROC in cross-validation below 0.7).
    """
    best, proposal = 0.0, None
    for scorer, description in _rules(positive, negative, others, echo):
        hits, errors = (float(np.mean([scorer.score(text) for text in side])) for side in (positive, negative))
        absent = isinstance(scorer, Keywords) and bool(scorer.absent)
        enough = errors <= 1 - _FOUND and hits >= 1 - _WRONG if absent else hits >= _FOUND and errors <= _WRONG
        if enough and hits - errors > best + 1e-9:  # of equals the first, which is the plainest
            best = hits - errors
            proposal = Proposal(scorer, f"{description}: {hits:.0%} of the positive and {errors:.0%} of the negative")
    if proposal is not None:
        return proposal
    area = _cross_validated(positive, negative)
    if not area >= _MIN_AUROC:
        raise RecipeError(
            f"validate.score: nothing tells the {len(positive)} positive responses from the {len(negative)} negative ones: no word, "
            f"sign or length is in {_FOUND:.0%} of one side and {_WRONG:.0%} of the other, and a classifier has an AUROC of "
            f"{area:.2f} (needed: {_MIN_AUROC}; 0.5 is chance). For example {brief(positive[0])} and {brief(negative[0])}."
        )
    return Proposal(
        Classifier(kind="classifier"),
        f"no word or sign tells them apart, a classifier does: AUROC {area:.2f} in cross-validation",
    )


def _rules(
    positive: Sequence[str], negative: Sequence[str], others: Sequence[str], echo: str
) -> list[tuple[TextScorer, str]]:
    """Scorers that may fit, the plainest first, each with what it looks for."""
    rules: list[tuple[TextScorer, str]] = [(Lowercase(kind="lowercase"), "lower case")]
    rules += [(Keywords(kind="keywords", patterns=(sign,)), name) for sign, name in _SIGNS.items()]
    if words := _frequent(positive, [*negative, *others], _words(echo)):
        pattern = rf"\b({'|'.join(words)})\b"
        rules.append((Keywords(kind="keywords", patterns=(pattern,)), "words of the positive side"))
    lengths = [[len(text.split()) for text in side] for side in (positive, negative)]
    middle = round(float(np.mean([np.median(side) for side in lengths])))
    shorter = np.median(lengths[0]) < np.median(lengths[1])
    limits = {"max_words": max(middle, 1)} if shorter else {"min_words": middle + 1}
    # What the positive side lacks: anything broken lacks it too, so this comes late. Of words it would hardly ever be right.
    rules += [
        (Keywords(kind="keywords", patterns=(r"\w",), absent=(sign,)), f"without {name}")
        for sign, name in _SIGNS.items()
    ]
    rules.append((Length.model_validate({"kind": "length", **limits}), "length"))
    return rules


def _frequent(texts: Sequence[str], others: Sequence[str], excluded: set[str]) -> list[str]:
    """Words of which most of `texts` have one and hardly any of `others`, each the one that most of the rest have."""
    sets = [_words(text) - excluded for text in texts]
    elsewhere = Counter(word for text in others for word in _words(text))
    allowed, chosen = 0.02 * len(others), list[str]()
    while sets and len(chosen) < _MAX_WORDS:
        counts = Counter(word for words in sets for word in words if elsewhere[word] <= allowed)
        word, n = min(counts.items(), key=lambda item: (-item[1], elsewhere[item[0]], item[0]), default=("", 0))
        if n < max(2, 0.04 * len(texts)):  # one text may say anything
            break
        chosen.append(word)
        sets = [words for words in sets if word not in words]
    return chosen


def _words(text: str) -> set[str]:
    return set(re.findall(r"[^\W\d_]+(?:'[^\W\d_]+)?", text.casefold().replace("\N{RIGHT SINGLE QUOTATION MARK}", "'")))


def _cross_validated(positive: Sequence[str], negative: Sequence[str]) -> float:
    """AUROC of a classifier between the sides, of each pair by one that was trained on the others."""
    rated: list[tuple[float, float]] = []
    pairs = list(zip(positive, negative, strict=True))
    for fold in range(_FOLDS):
        rest = [pair for n, pair in enumerate(pairs) if n % _FOLDS != fold]
        probability: Callable[[Sequence[str]], np.ndarray] = trained_probability(*map(list, zip(*rest, strict=True)))
        rated += [tuple(probability(pair)) for pair in pairs[fold::_FOLDS]]
    return auroc(*np.array(rated).T)
