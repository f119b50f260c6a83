"""The effect on the test pairs where their prompts are put otherwise."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from compile_steer.data.behaviour import Context
from compile_steer.data.wordings import worded
from compile_steer.models.logprobs import encode_pairs, margins
from compile_steer.models.text import Text
from compile_steer.stats import bootstrap_mean
from compile_steer.steering.program import Program
from compile_steer.validation.evaluator import PrefixCache
from compile_steer.validation.report import WordingEffect


def measure_wordings(context: Context, program: Program, n_pairs: int) -> tuple[list[WordingEffect], list[str]]:
    """The change of the margin on the first test pairs in every wording, and a remark on each that the model cannot have."""
    model, pairs = context.model, context.data.test[:n_pairs]
    # The order of `encode_pairs`: all positive sides, then all negative ones.
    sides = [Text(pair.prompt, getattr(pair, side).response) for side in ("positive", "negative") for pair in pairs]
    by_name, remarks = worded(model, sides, context.data.neutral)
    if not pairs or not by_name:
        return [], remarks
    # Only the last response counts: earlier ones are the same on both sides, and would thin out the difference of the means.
    others = ([replace(text, earlier=()) for text in texts] for texts in by_name.values())
    encoded = [encode_pairs(model, pairs), *others]
    cache = PrefixCache(model, [text for texts in encoded for text in texts])
    (base,) = cache.mean_logprobs([None])
    cache.advance(program.first_layer)
    (steered,) = cache.mean_logprobs([program])
    own, *worded_effects = [margins(part) for part in np.split(steered - base, len(encoded))]
    return [
        WordingEffect(name, bootstrap_mean(effects, seed=context.seed), float(own.mean()), len(pairs))
        for name, effects in zip(by_name, worded_effects, strict=True)
    ], remarks
