"""Seed B, instructions as steering vectors (Stolfo et al. 2410.12877), with real IFEval prompts.

    COMPILE_STEER_IFEVAL=FOLDER python -m benchmarks.seeds b

Small on purpose: ITEMS and TOKENS say how small.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import islice

import numpy as np
from torch import Tensor

from benchmarks.record import ROOT, prose, table
from benchmarks.seeds.ifeval import EXCLUDE, FORMAT, INCLUDE, Answers, Row, by_kind, follows, read
from compile_steer.artifacts.revision import EMBEDDED
from compile_steer.common.progress import Progress
from compile_steer.data.behaviour import Behaviour
from compile_steer.extraction.pair_methods import ExtractedDirections
from compile_steer.lowering import closed_form
from compile_steer.lowering.job import Lowering
from compile_steer.lowering.options import CalibrationOptions, CompileOptions
from compile_steer.models.forward import median_norms, read_activations
from compile_steer.models.load import LoadedModel, load
from compile_steer.models.text import Text
from compile_steer.recipe import read_recipe
from compile_steer.scoring.base import Reply
from compile_steer.scoring.model_based import perplexities
from compile_steer.steering.patch import with_patch
from compile_steer.steering.program import Intervention, Program
from compile_steer.steering.sites import Site

HEADING = "B. Instructions as steering vectors (Stolfo et al., 2410.12877)"
KINDS = (
    "detectable_format:title",
    "detectable_format:number_bullet_lists",
    "detectable_format:number_highlighted_sections",
    "change_case:english_lowercase",
    "change_case:english_capital",
    "punctuation:no_comma",
    "startend:quotation",
    "detectable_format:json_format",
)
ITEMS, TRAINED, SEARCHED, WORDS, TOKENS = 5, 8, 3, 10, 32  # prompts of a kind for each use, words, new tokens
LAYERS = (8, 14, 20, 26)  # the authors: from a fifth of the depth to its end, in steps of 2
DEGENERATE = 2.5
WORD_LAYER, WORD_SHARE = 24, 0.6  # the authors: layer 24 of 26, weight 40; here a share of the stream's median norm
LENGTH_LAYER = 12
COMPILED_PROMPTS = 48


@dataclass(frozen=True)
class Instruction:
    """One kind of instruction: what was read of its training rows, and the layer that was chosen."""

    kind: str
    found: ExtractedDirections
    search: Sequence[Row]
    test: Sequence[Row]
    layer: int = 0

    def program(self, loaded: LoadedModel, layer: int | None = None) -> Program:
        """Give the projection on the direction the mean value that it has with the instruction, everywhere."""
        at = self.layer if layer is None else layer
        vector, projections = self.found.vectors[at], self.found.projections()
        if projections is None:
            raise ValueError("nothing was read of a positive side")
        clamp = Intervention(Site(at), "clamp", vector / vector.norm(), 1.0, projection=float(projections[0, at]))
        return Program((clamp,), loaded.id, loaded.revision)


def last_token(loaded: LoadedModel, prompts: Sequence[str]) -> Tensor:
    """Mean activation [L, d] at the prompts' last token."""
    texts = [Text(prompt) for prompt in prompts]
    return read_activations(loaded, texts, point="resid_post", readout="last_prompt").mean(dim=0)


def contrast(loaded: LoadedModel, asked: Sequence[str], plain: Sequence[str]) -> ExtractedDirections:
    """The difference [L, d] at the prompt's last token between asking with an instruction and without."""
    high, low = last_token(loaded, asked), last_token(loaded, plain)
    return ExtractedDirections(high - low, high.new_zeros(0, *high.shape), high)


def instructions(loaded: LoadedModel) -> list[Instruction]:
    """Of every kind the last rows are the test's; the others make the vector, and the first of them choose the layer."""
    found = []
    for kind, rows in by_kind(read(FORMAT)).items():
        if kind in KINDS:
            cut = len(rows) - min(ITEMS, len(rows) // 2)
            test, train = rows[cut:], rows[:cut][:TRAINED]
            vector = contrast(loaded, [row.asked for row in train], [row.plain for row in train])
            found.append(Instruction(kind, vector, train[:SEARCHED], test))
    return sorted(found, key=lambda one: KINDS.index(one.kind))


def degenerate(loaded: LoadedModel, replies: Sequence[Reply]) -> int:
    """How many replies the base finds too easy to foresee; the authors ask GPT-2, which is not to be had offline."""
    return int((perplexities(loaded, replies) < DEGENERATE).sum())


def choose_layers(say: Answers, kinds: Sequence[Instruction], progress: Progress) -> list[Instruction]:
    """For every kind the layer with the best accuracy; one with more degenerate answers than unsteered scores 0."""
    prompts = [row.plain for one in kinds for row in one.search]
    base = _parts(say(prompts), [one.search for one in kinds])
    allowed = [degenerate(say.model, replies) for replies in base]
    scores: list[dict[int, float]] = [{} for _ in kinds]
    with progress.phase("seed B: layers", len(LAYERS)) as advance:
        for layer in LAYERS:
            programs = [one.program(say.model, layer) for one in kinds for _row in one.search]
            under = _parts(say(prompts, programs), [one.search for one in kinds])
            for n, (one, replies) in enumerate(zip(kinds, under, strict=True)):
                broken = degenerate(say.model, replies) > allowed[n]
                scores[n][layer] = 0.0 if broken else float(follows(say.model, one.search, replies).mean())
            advance(1)
    return [replace(one, layer=max(found, key=found.__getitem__)) for one, found in zip(kinds, scores, strict=True)]


def _parts(replies: Sequence[Reply], like: Sequence[Sequence[Row]]) -> list[list[Reply]]:
    rest = iter(replies)
    return [list(islice(rest, len(rows))) for rows in like]


def formats(say: Answers, kinds: Sequence[Instruction], progress: Progress) -> list[list[object]]:
    """A row for each kind: with and without the instruction, unsteered and steered, and under another kind's vector."""
    rows = [row for one in kinds for row in one.test]
    plain, asked = [row.plain for row in rows], [row.asked for row in rows]
    own = [one.program(say.model) for one in kinds for _row in one.test]
    others = [kinds[(n + 1) % len(kinds)].program(say.model) for n, one in enumerate(kinds) for _row in one.test]
    conditions = ((plain, None), (plain, own), (plain, others), (asked, None), (asked, own))
    with progress.phase("seed B: formats", len(conditions)) as advance:
        scores = []
        for prompts, programs in conditions:
            scores.append(follows(say.model, rows, say(prompts, programs)))
            advance(1)
    whole, found, start = np.array(scores), [], 0
    for one in kinds:
        stop = start + len(one.test)
        found.append([one.kind, len(one.test), one.layer, *_means(whole[:, start:stop])])
        start = stop
    return [*found, ["all", len(rows), "", *_means(whole)]]


def _means(scores: np.ndarray) -> list[str]:
    return [f"{value:.2f}" for value in scores.mean(axis=1)]


def words(say: Answers, behaviour: Behaviour, progress: Progress) -> list[list[object]]:
    """Inclusion by adding, exclusion by subtracting the inclusion vector: 'include this word' over other prompts."""
    loaded, found = say.model, []
    weight = WORD_SHARE * float(median_norms(loaded, behaviour.neutral, "resid_post")[WORD_LAYER])
    general = [pair.prompt for pair in behaviour.train[:6]]
    without = last_token(loaded, general)
    for label, name, sign in (("inclusion", INCLUDE, 1.0), ("exclusion (negated inclusion)", EXCLUDE, -1.0)):
        # One row for each word, the first in the file.
        rows = list({row.word: row for row in reversed(read(name))}.values())[::-1][:WORDS]
        programs = []
        with progress.phase(f"seed B: word {label}", len(rows)) as advance:
            for row in rows:
                asking = [f'{prompt} Include the word "{row.word}" in your answer.' for prompt in general]
                vector = (last_token(loaded, asking) - without)[WORD_LAYER]
                one = Intervention(Site(WORD_LAYER), "add", vector / vector.norm(), sign * weight)
                programs.append(Program((one,), loaded.id, loaded.revision))
                advance(1)
        plain, asked = [row.plain for row in rows], [row.asked for row in rows]
        conditions = (say(plain), say(plain, programs), say(asked))
        scores = np.array([follows(loaded, rows, replies) for replies in conditions])
        found.append([f"word {label}", len(rows), WORD_LAYER, *_means(scores)])
    return found


def length(say: Answers, behaviour: Behaviour) -> str:
    """Words in an answer under 'be brief', added with a growing coefficient."""
    loaded = say.model
    train, test = ([pair.prompt for pair in split[:12]] for split in (behaviour.train, behaviour.test))
    vector = contrast(loaded, [f"{prompt} Answer in at most five words." for prompt in train], train).vectors[
        LENGTH_LAYER
    ]
    longer = replace(say, max_new_tokens=2 * TOKENS)
    found = []
    for coefficient in (0.0, 1.0, 2.0, 3.0):
        program = Program((Intervention(Site(LENGTH_LAYER), "add", vector, coefficient),), loaded.id, loaded.revision)
        replies = longer(test, [program] * len(test) if coefficient else None)
        mean = np.mean([len(re.findall(r"\w+", one.text)) for one in replies])
        found.append(f"{mean:.0f} words at {coefficient:g} ({np.mean([one.ended for one in replies]):.0%} ended)")
    return (
        f"Length: 'at most five words' as a vector at layer {LENGTH_LAYER}, {len(test)} prompts, at most {2 * TOKENS} tokens: "
        f"{', '.join(found)}."
    )


def composed(say: Answers, kinds: Sequence[Instruction]) -> str:
    """Two clamps at two layers: does each still do its own?"""
    first, second = kinds[0], kinds[3]
    layer = second.layer if second.layer != first.layer else LAYERS[(LAYERS.index(first.layer) + 1) % len(LAYERS)]
    prompts = [row.plain for row in (*first.test, *second.test)]
    both = first.program(say.model) + second.program(say.model, layer)
    parts = []
    for one, alone in ((first, first.program(say.model)), (second, second.program(say.model, layer))):
        rows = [Row(f"{n} {prompt}", prompt, one.test[0].check) for n, prompt in enumerate(prompts)]
        conditions = [None, [alone] * len(rows), [both] * len(rows)]
        scores = [float(follows(say.model, rows, say(prompts, programs)).mean()) for programs in conditions]
        parts.append(f"{one.kind} {scores[0]:.2f} unsteered, {scores[1]:.2f} alone, {scores[2]:.2f} under both")
    return f"Two at once (layers {first.layer} and {layer}), {len(prompts)} prompts: {'; '.join(parts)}."


def compiled(say: Answers, kinds: Sequence[Instruction], behaviour: Behaviour, progress: Progress) -> str:
    """The first kind's clamp lowered by the closed form, and answers of what came out, with no hook."""
    one = kinds[0]
    program, plain = one.program(say.model), [row.plain for row in one.test]
    options = CompileOptions(calibration=CalibrationOptions(prompts=COMPILED_PROMPTS, max_new_tokens=TOKENS))
    patch = closed_form.lower(Lowering(program, say.model, behaviour.calibration, options, 0, progress))
    with with_patch(say.model.model, patch):
        weights = say(plain)
    conditions = [say(plain), say(plain, [program] * len(plain)), weights]
    scores = [float(follows(say.model, one.test, replies).mean()) for replies in conditions]
    same = np.mean([a.text[:20] == b.text[:20] for a, b in zip(conditions[1], conditions[2], strict=True)])
    return (
        f"Compiled: {one.kind}, clamp at layer {one.layer}, by `closed_form` on {COMPILED_PROMPTS} prompts: unsteered "
        f"{scores[0]:.2f}, steered {scores[1]:.2f}, compiled {scores[2]:.2f}; {same:.0%} of the compiled answers begin as the "
        "steered ones do."
    )


def section(progress: Progress) -> list[str]:
    """The lines of docs/SEEDS.md; raises `RecipeError` where the prompts are not given."""
    read(FORMAT)
    loaded = load(EMBEDDED)
    recipe = read_recipe(ROOT / "recipes" / "lowercase.yaml")
    behaviour = recipe.data.read(recipe.folder)
    say = Answers(loaded, TOKENS)
    kinds = choose_layers(say, instructions(loaded), progress)
    sizes = {"tokens": TOKENS, "searched": SEARCHED, "degenerate": DEGENERATE, "share": WORD_SHARE}
    return [
        prose("seed B", layers=", ".join(map(str, LAYERS)), **sizes),
        "",
        *table(
            " | n | layer | without | steered | another's | asked | asked and steered", formats(say, kinds, progress)
        ),
        "",
        *table(" | n | layer | without | steered | asked", words(say, behaviour, progress)),
        "",
        length(say, behaviour),
        "",
        composed(say, kinds),
        "",
        compiled(say, kinds, behaviour, progress),
        "",
    ]
