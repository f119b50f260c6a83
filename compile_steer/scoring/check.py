"""Before a sweep: can the score tell the two sides of the data apart at all?"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from compile_steer.common.errors import RecipeError
from compile_steer.data.behaviour import Behaviour
from compile_steer.models.load import LoadedModel
from compile_steer.scoring.reply import Reply, Score, ScorerBase
from compile_steer.stats import auroc


@dataclass(frozen=True)
class Discrimination:
    """Mean scores of the validation pairs' positive and negative responses, and the AUROC between them.

    All None where `skipped` says why the texts cannot tell.
    """

    positive: float | None = None
    negative: float | None = None
    auroc: float | None = None
    skipped: str = ""


def require_discrimination(
    scorer: ScorerBase, score: Score, loaded: LoadedModel, behaviour: Behaviour
) -> Discrimination:
    """Score both sides' responses of the validation pairs, as replies that ended.

    Args:
        score: the `scorer` bound to this model and data.

    Raises:
        RecipeError: every text has the same score, or the negative ones have a higher mean.
    """
    able = scorer.on_texts()
    if isinstance(able, str):
        return Discrimination(skipped=able)
    pairs = behaviour.validation
    if all(pair.positive.response == pair.negative.response for pair in pairs):
        return Discrimination(skipped="the two sides of the pairs have the same responses, or none")
    texts = [Reply(pair.prompt, pair.positive.response, True) for pair in pairs]
    texts += [Reply(pair.prompt, pair.negative.response, True) for pair in pairs]
    if able is not scorer:  # some of its parts alone
        score = able.bind(loaded, behaviour)
    positive, negative = np.split(score(texts), 2)
    if np.ptp([*positive, *negative]) == 0:
        how = {0.0: "it never fires", 1.0: "it always fires"}.get(float(positive[0]), "it sees no difference")
        raise RecipeError(
            f"validate.score gives {positive[0]:.2f} to all {len(texts)} texts of data.validation, on both sides: {how}, so it "
            "could not tell what steering does. Mend validate.score, or the data."
        )
    if negative.mean() > positive.mean():
        raise RecipeError(
            f"validate.score gives the negative texts of data.validation more than the positive ones, {negative.mean():.2f} "
            f"against {positive.mean():.2f} on average: it scores the opposite of the behaviour. Mend validate.score, or "
            "exchange the two sides."
        )
    return Discrimination(float(positive.mean()), float(negative.mean()), auroc(positive, negative))
