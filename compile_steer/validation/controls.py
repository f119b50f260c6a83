"""The effects of other directions of the same strength on the same pairs, without which an effect means nothing."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from compile_steer.common import distributed
from compile_steer.common.errors import RecipeError
from compile_steer.common.progress import Progress
from compile_steer.data.behaviour import Context
from compile_steer.models.forward import capture, read_activations
from compile_steer.models.load import LoadedModel
from compile_steer.models.text import Pair, Readout, Text
from compile_steer.models.tokens import batches, encode
from compile_steer.stats import auroc, outlier_p, rank_p
from compile_steer.steering.directions import EVERY_BLOCK, Directions, as_long_as, unit
from compile_steer.steering.hooks import PAD, in_scope
from compile_steer.steering.program import Intervention, Program
from compile_steer.steering.sites import Point
from compile_steer.validation.evaluator import ContrastEvaluator
from compile_steer.validation.options import ValidateOptions
from compile_steer.validation.report import Controls, Separability


@dataclass(frozen=True)
class StreamStatistics:
    """The base on control text, up to the last block that a program acts on.

    Attributes:
        means: mean activation at the directions' point of every block, over the steered positions, [n_layers, d_model].
        norms: median norm of the stream after every block, [n_layers]. The median, because in many models the first
            token's norm is a hundred times the others'.
    """

    means: Tensor
    norms: Tensor

    @staticmethod
    def of(loaded: LoadedModel, texts: Sequence[Text], point: Point, program: Program) -> StreamStatistics:
        scopes = frozenset().union(*(i.scopes for i in program.interventions))
        last = max(max(i.site.layer, i.site.changes_from) for i in program.interventions)
        sums, count, norms = None, 0, []
        encoded = [encode(loaded.tokenizer, text) for text in distributed.share(texts)]
        # Small batches: the activations of all blocks are held at once.
        for batch in batches(loaded, encoded, max_tokens=2048):
            steered, real = in_scope(batch.roles, scopes), batch.roles != PAD
            here = capture(loaded.layout, batch, point, last)
            after = here if point == "resid_post" else capture(loaded.layout, batch, "resid_post", last)
            # In float64, because thousands of positions are summed.
            total = torch.stack([states[steered].double().sum(dim=0) for states in here]).cpu()
            sums = total if sums is None else sums + total
            count += int(steered.sum())
            norms.append(torch.stack([states[real].float().norm(dim=-1) for states in after]).cpu())
        if sums is None:  # no text, or none of this process
            sums = torch.zeros(last + 1, loaded.layout.d_model, dtype=torch.float64)
        total = torch.tensor(count)
        distributed.sum_over_all(sums, total)
        if not total:
            raise RecipeError("data.neutral has no text at the steered positions.")
        norms = [norm for part in distributed.gather(norms) for norm in part]
        return StreamStatistics((sums / total).float(), torch.cat(norms, dim=1).median(dim=1).values)

    def displacement(self, intervention: Intervention) -> float:
        """The mean displacement along the intervention's own direction at coefficient 1."""
        if intervention.operation == "add":
            return float(intervention.vector.norm())
        target = 0.0 if intervention.projection is None else intervention.projection
        return target - float(self.means[intervention.site.layer] @ intervention.vector)

    def strength(self, program: Program) -> float:
        """The largest mean displacement of any site, over the median norm of the stream after its block."""
        return max(
            abs(i.coefficient * self.displacement(i)) / float(self.norms[i.site.changes_from])
            for i in program.interventions
        )

    def with_vectors(self, program: Program, vectors: Tensor) -> Program:
        """`program` along `vectors` [n_interventions, d_model] with the same mean displacement at each site.

        An ablation has no displacement to keep: it removes what is there.
        """
        parts = []
        for own, direction in zip(program.interventions, unit(vectors), strict=True):
            if own.operation == "add":
                parts.append(replace(own, vector=direction * own.vector.norm()))
            elif own.operation == "ablate":
                parts.append(replace(own, vector=direction))
            else:
                projection = float(self.means[own.site.layer] @ direction) + self.displacement(own)
                parts.append(replace(own, vector=direction, projection=projection))
        return Program(tuple(parts), program.model, program.revision)

    def like(self, program: Program, other: Program) -> Program:
        """`program` along the directions of `other`, which has the same sites."""
        return self.with_vectors(program, torch.stack([i.vector for i in other.interventions]))

    def random(self, program: Program, count: int, seed: int) -> list[Program]:
        """`count` programs like `program`, with a random direction in place of each of its own."""
        generator = torch.Generator().manual_seed(seed)
        # Interventions with the same vector (an ablation at every site) get the same random one.
        own, which = torch.stack([i.vector for i in program.interventions]).unique(dim=0, return_inverse=True)
        draws = torch.randn((count, *own.shape), generator=generator)
        return [self.with_vectors(program, vectors[which]) for vectors in draws]


def other_directions(context: Context, options: ValidateOptions, real: Directions) -> Directions | None:
    """Another behaviour's mean differences of response means, at the points and lengths of the real directions.

    None if the recipe names no pairs of another behaviour.
    """
    pairs = context.data.other_behaviour[: options.control_pairs]
    if not pairs:
        return None

    def at(point: Point, pattern: Tensor) -> Tensor:
        positive, negative = _read_sides(context, pairs, point=point, readout="response_mean")
        return as_long_as((positive - negative).mean(dim=0), pattern)

    with context.progress.phase("another behaviour's direction", 1):
        other_points = {point: at(point, vectors[0])[None] for point, vectors in real.other_points.items()}
        return replace(real, vectors=at(real.point, real.vectors), other_points=other_points)


def measure_controls(
    evaluator: ContrastEvaluator,
    program: Program,
    random: Sequence[Program],
    shuffled: Sequence[Program],
    shuffled_kind: str,
    unrelated: Program | None,
    progress: Progress,
) -> Controls:
    """Mean effects of the program, of the opposite sign and of the other directions on the evaluator's pairs."""
    evaluator.advance(program)
    own = [program, -program, *([] if unrelated is None else [unrelated])]
    means = []
    with progress.phase("test: control directions", len(own) + len(random) + len(shuffled)) as advance:
        for programs in (own, random, shuffled):
            means.append([float(value) for value in evaluator.effects(programs).mean(axis=1)])
            advance(len(programs))
    (effect, opposite, *other), by_chance, by_label = means
    return Controls(
        effect=effect,
        random=by_chance,
        shuffled=by_label,
        opposite=opposite,
        other_behaviour=other[0] if other else None,
        p_value=rank_p(effect, by_chance),
        p_random=outlier_p(effect, by_chance),
        p_shuffled=outlier_p(effect, by_label) if len(by_label) > 1 else None,  # one value has no spread
        shuffled_kind=shuffled_kind,
    )


def separability(
    context: Context, pairs: Sequence[Pair], directions: Directions, layer: int, readout: Readout
) -> Separability:
    """How well the direction separates the activations of held-out pairs.

    Of the block, or of every block side by side where the program acts on all together.
    """
    layers = list(directions.layers) if layer == EVERY_BLOCK else [layer]
    with context.progress.phase("test: separability of held-out pairs", 2 * len(pairs)) as advance:
        settings = {"point": directions.point, "readout": readout, "through": max(layers), "advance": advance}
        sides = _read_sides(context, pairs, **settings)
    positive, negative = (side[:, layers].flatten(1) for side in sides)
    along = unit(directions.vectors[layers].flatten())
    high, low = (positive @ along).numpy(), (negative @ along).numpy()
    spread = float(np.sqrt((high.var(ddof=1) + low.var(ddof=1)) / 2))  # pooled: both sides have as many pairs
    differences = positive - negative
    cosines = (differences @ along) / differences.norm(dim=-1).clamp(min=1e-12)  # sides may be read as the same
    return Separability(
        auroc=auroc(high, low),
        d_prime=float(high.mean() - low.mean()) / spread if spread > 0 else 0.0,
        mean_cosine=float(cosines.mean()),
    )


def _read_sides(context: Context, pairs: Sequence[Pair], **settings: Any) -> list[Tensor]:
    """The activations of the positive and of the negative sides, [n_pairs, n_layers, d_model] each."""
    sides = [pair.positive for pair in pairs], [pair.negative for pair in pairs]
    return [read_activations(context.model, side, **settings) for side in sides]
