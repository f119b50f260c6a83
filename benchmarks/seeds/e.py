"""Seed E, painless activation steering (Cui & Chen 2509.22739): labelled questions, answered by a letter.

Steering at the last prompt position changes nothing before it, so a grid point is one token a question on top
of a kept cache. Many splits of the same questions, as in the paper.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from scipy.stats import t as student
from torch import Tensor
from transformers import DynamicCache

from benchmarks.record import ROOT, table
from compile_steer.artifacts.revision import EMBEDDED
from compile_steer.common.progress import Progress
from compile_steer.data.behaviour import Question
from compile_steer.extraction import choices
from compile_steer.extraction.choices import Item
from compile_steer.models.load import LoadedModel, load
from compile_steer.models.text import Text
from compile_steer.models.tokens import encode
from compile_steer.recipe import read_recipe
from compile_steer.scoring.model_based import letter_tokens
from compile_steer.steering.directions import as_long_as
from compile_steer.steering.hooks import steered
from compile_steer.steering.program import Intervention, Program
from compile_steer.steering.sites import Site

HEADING = "E. Painless activation steering (PAS, 2509.22739)"
RECIPE = ROOT / "recipes" / "pas.yaml"
SEEDS = 5  # splits; the paper has 15
# The paper's 8, 11, 13 to 17, 19, 22, 25 of 32 blocks are 8 to 23 of 30; of these, and of its 14 strengths from .25 to 32:
LAYERS = (8, 12, 15, 18, 22)
STRENGTHS = (0.5, 1.0, 4.0, 10.0, 22.0)
SHOTS = 2
CONDITIONS = ("PASf", "iPASa", "iPASwo", "PASf, off by one", "shuffled labels", "random direction")
AUTHORS = "+10.1 points on bias, +5.2 on morality, +34.8 on alignment (iPAS, 8B models)"


@dataclass(frozen=True)
class Prompts:
    """Prompts up to their last token as a cache, and that token; row n is question n."""

    loaded: LoadedModel
    questions: Sequence[Question]
    cache: DynamicCache
    last: Tensor
    mask: Tensor

    @staticmethod
    def of(loaded: LoadedModel, questions: Sequence[Question], history: tuple[tuple[str, str], ...] = ()) -> Prompts:
        """Left-padded, so that all last tokens are in one column."""
        texts = [encode(loaded.tokenizer, Text(question.prompt, history=history)).ids for question in questions]
        width = max(map(len, texts))
        ids = torch.full((len(texts), width), loaded.pad_id)
        mask = torch.zeros(len(texts), width, dtype=torch.long)
        for row, text in enumerate(texts):
            ids[row, width - len(text) :] = torch.tensor(text)
            mask[row, width - len(text) :] = 1
        cache = DynamicCache()
        positions = (mask.cumsum(dim=1) - 1).clamp(min=0)
        with torch.no_grad():
            loaded.layout.backbone(
                input_ids=ids[:, :-1],
                attention_mask=mask[:, :-1],
                position_ids=positions[:, :-1],
                past_key_values=cache,
            )
        return Prompts(loaded, questions, cache, ids[:, -1:], mask)

    def only(self, rows: Sequence[int]) -> Prompts:
        cache = copy.deepcopy(self.cache)
        index = torch.tensor(rows)
        cache.batch_select_indices(index)
        return Prompts(self.loaded, [self.questions[n] for n in rows], cache, self.last[index], self.mask[index])

    def right(self, program: Program | None = None) -> np.ndarray:
        """[n] whether the likeliest letter is the right one, under a program at the last token alone."""
        with torch.no_grad(), steered(self.loaded.model, program or Program((), self.loaded.id, self.loaded.revision)):
            logits = self.loaded.model(
                input_ids=self.last,
                attention_mask=self.mask,
                position_ids=self.mask.sum(dim=1, keepdim=True) - 1,
                past_key_values=self.cache,
            ).logits[:, -1]
        self.cache.crop(-1)
        found = []
        for question, row in zip(self.questions, logits, strict=True):
            tokens = letter_tokens(self.loaded.tokenizer, question.letters)
            found.append(int(row[tokens].argmax()) == question.answer)
        return np.array(found, dtype=float)


@dataclass(frozen=True)
class Outcome:
    """One condition on one split: accuracies on test, and the grid point that was best on validation."""

    steered: float
    shot: float
    layer: int
    strength: float


@dataclass(frozen=True)
class Base:
    """The unsteered model on one split: its accuracy, that with examples, and the fraction of its answers that are A."""

    plain: float
    shot: float
    said_a: float


def read_questions() -> list[Question]:
    """All questions of the recipe."""
    recipe = read_recipe(RECIPE)
    return list(recipe.data.read(recipe.folder).questions.values())


def fitted(items: Sequence[Item], seed: int) -> dict[str, Tensor]:
    """[L, d] of every condition, from the training items."""
    found = {
        "PASf": choices.with_controls(items, "pasf", 1, seed),
        "iPASa": choices.with_controls(items, "ipasa", 1, seed),
        "iPASwo": choices.with_controls(items, "ipaswo", 1, seed),
    }
    vectors = {name: one.vectors for name, one in found.items()}
    vectors["PASf, off by one"] = vectors["PASf"].roll(1, dims=0)  # a block's input is the output of the one before
    vectors["shuffled labels"] = as_long_as(found["PASf"].shuffled[0], vectors["PASf"])
    noise = torch.randn(vectors["PASf"].shape, generator=torch.Generator().manual_seed(seed))
    vectors["random direction"] = as_long_as(noise, vectors["PASf"])
    return vectors


def search(prompts: Prompts, vector: Tensor) -> Program:
    """The best grid point on validation questions; of equals the mildest, at the first layer."""
    best, most = Program((), prompts.loaded.id, prompts.loaded.revision), -1.0
    for strength in STRENGTHS:
        for layer in LAYERS:
            one = Intervention(Site(layer), "add", vector[layer], strength)
            program = Program((one,), prompts.loaded.id, prompts.loaded.revision)
            accuracy = float(prompts.right(program).mean())
            if accuracy > most:
                best, most = program, accuracy
    return best


def split(n: int, seed: int) -> tuple[list[int], list[int], list[int]]:
    """60/20/20."""
    order = np.random.default_rng(seed).permutation(n).tolist()
    first, second = round(0.6 * n), round(0.8 * n)
    return order[:first], order[first:second], order[second:]


def t_interval(values: Sequence[float]) -> tuple[float, float, float]:
    """Mean with a 95 % t-interval over splits, as in the paper: (mean, low, high)."""
    mean, error = float(np.mean(values)), float(np.std(values, ddof=1)) / math.sqrt(len(values))
    half = float(student.ppf(0.975, len(values) - 1)) * error
    return mean, mean - half, mean + half


def measure(
    model: LoadedModel, questions: Sequence[Question], progress: Progress
) -> tuple[dict[str, list[Outcome]], list[Base]]:
    """Outcomes by condition, and the base's, of every split."""
    with progress.phase("seed E: activations of all answers", 2 * len(questions)) as advance:
        items = choices.read_items(model, questions, "resid_post", advance)
        everything = Prompts.of(model, questions)
    outcomes: dict[str, list[Outcome]] = {name: [] for name in CONDITIONS}
    bases = []
    with progress.phase("seed E: splits", SEEDS * len(CONDITIONS)) as advance:
        for seed in range(SEEDS):
            train, validation, test = split(len(questions), seed)
            candidates, held_out = everything.only(validation), everything.only(test)
            wrong = [n for n in train if items[n].own != items[n].right][:SHOTS]
            examples = tuple((questions[n].prompt, questions[n].letters[questions[n].answer]) for n in wrong)
            taught = Prompts.of(model, [questions[n] for n in test], examples)
            said_a = float(np.mean([items[n].own == 0 for n in test]))
            bases.append(Base(float(held_out.right().mean()), float(taught.right().mean()), said_a))
            for name, vector in fitted([items[n] for n in train], seed).items():
                program = search(candidates, vector)
                (one,) = program.interventions
                steered_, shot = (float(prompts.right(program).mean()) for prompts in (held_out, taught))
                outcomes[name].append(Outcome(steered_, shot, one.site.layer, one.coefficient))
                advance(1)
    return outcomes, bases


def section(progress: Progress) -> list[str]:
    """The lines of docs/SEEDS.md."""
    questions = read_questions()
    return report(*measure(load(EMBEDDED), questions, progress), len(questions))


def report(outcomes: Mapping[str, Sequence[Outcome]], bases: Sequence[Base], n: int) -> list[str]:
    """The section, from what was measured on `n` questions."""
    rows, low_over_base, low_over_controls = [], {}, {}
    # The better of the two controls of the same split.
    controls = [
        max(pair) for pair in zip(*([one.steered for one in outcomes[name]] for name in CONDITIONS[-2:]), strict=True)
    ]
    for name, found in outcomes.items():
        gain = t_interval([one.steered - base.plain for one, base in zip(found, bases, strict=True)])
        added = t_interval([one.shot - base.shot for one, base in zip(found, bases, strict=True)])
        low_over_base[name] = gain[1]
        low_over_controls[name] = t_interval([one.steered - c for one, c in zip(found, controls, strict=True)])[1]
        intervals = (f"{mean:+.3f} [{low:+.3f}, {high:+.3f}]" for mean, low, high in (gain, added))
        layers, strengths = (
            ", ".join(f"{x:g}" for x in column) for column in zip(*((o.layer, o.strength) for o in found), strict=True)
        )
        rows.append((name, f"{np.mean([one.steered for one in found]):.3f}", *intervals, layers, strengths))
    better = [name for name in CONDITIONS[:-2] if low_over_base[name] > 0]
    certain = [name for name in better if low_over_controls[name] > 0]
    plain, shot, said_a = (
        np.mean(column) for column in zip(*((b.plain, b.shot, b.said_a) for b in bases), strict=True)
    )
    return [
        f"{n} questions of `recipes/pas.yaml` (which reply is kinder, A or B), {SEEDS} random splits of 60/20/20. Vectors from "
        f"the training part, layer ({', '.join(map(str, LAYERS))}) and strength ({', '.join(f'{s:g}' for s in STRENGTHS)}) "
        "from validation, everything below from test; intervals are 95 % t-intervals over splits. Steered at the last "
        "prompt position alone.",
        "",
        f"Base accuracy {plain:.3f} (chance 0.5), of its answers {said_a:.0%} are A; with {SHOTS} worked "
        f"examples that it got wrong before the question {shot:.3f}. The authors: {AUTHORS}.",
        "",
        *table("vectors | accuracy | over the base | on top of examples | chosen layers | chosen strengths", rows),
        "",
        f"Above the base with an interval that leaves out 0: {', '.join(better) or 'none'}. Of these also above the better "
        f"of the two controls of the same split: {', '.join(certain) or 'none'}.",
    ]
