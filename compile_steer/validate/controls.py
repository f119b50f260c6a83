"""What other directions of the same length do to the same pairs: the effect needs them to mean anything."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from compile_steer.common.errors import RecipeError
from compile_steer.common.progress import Advance
from compile_steer.models.forward import capture, read_activations
from compile_steer.models.load import LoadedModel
from compile_steer.models.text import Pair, Text
from compile_steer.models.tokens import batches, encode
from compile_steer.stats import auroc, outlier_p, rank_p
from compile_steer.steering.directions import Directions, as_long_as, unit
from compile_steer.steering.hooks import PAD, in_scope
from compile_steer.steering.program import Intervention, Program
from compile_steer.steering.sites import Point
from compile_steer.validate.evaluator import Bench
from compile_steer.validate.report import Controls, Separability


@dataclass(frozen=True)
class Stream:
    """The base on neutral text: the mean activation at the directions' point of every block, over the positions
    that are steered, and the median norm of the stream after every block. [n_layers, d_model] and [n_layers], up to
    the last block that the program acts on.

    The median, because the first token's norm is a hundred times the others' in many models.
    """

    means: Tensor
    norms: Tensor

    @staticmethod
    def of(loaded: LoadedModel, texts: Sequence[Text], point: Point, program: Program) -> Stream:
        scopes = frozenset().union(*(i.scopes for i in program.interventions))
        last = max(max(i.site.layer, i.site.changes_from) for i in program.interventions)
        sums, count, norms = None, 0, []
        encoded = [encode(loaded.tokenizer, text) for text in texts]
        for batch in batches(loaded, encoded, max_tokens=2048):
            steered, real = in_scope(batch.roles, scopes), batch.roles != PAD
            here = capture(loaded.layout, batch, point, last)
            after = here if point == "resid_post" else capture(loaded.layout, batch, "resid_post", last)
            total = torch.stack([one[steered].double().sum(dim=0) for one in here]).cpu()
            sums = total if sums is None else sums + total
            count += int(steered.sum())
            norms.append(torch.stack([one[real].float().norm(dim=-1) for one in after]).cpu())
        if sums is None or count == 0:
            raise RecipeError("data.neutral has no text at the steered positions.")
        return Stream((sums / count).float(), torch.cat(norms, dim=1).median(dim=1).values)

    def shift(self, intervention: Intervention) -> float:
        """The mean displacement along the intervention's own direction with its dial at 1."""
        if intervention.operation == "add":
            return float(intervention.vector.norm())
        target = 0.0 if intervention.projection is None else intervention.projection
        return target - float(self.means[intervention.site.layer] @ intervention.vector)

    def strength(self, program: Program) -> float:
        """The largest mean displacement of any site, over the median norm of the stream after its block."""
        return max(
            abs(i.coefficient * self.shift(i)) / float(self.norms[i.site.changes_from]) for i in program.interventions
        )

    def with_vectors(self, program: Program, vectors: Tensor) -> Program:
        """`program` along `vectors` [n_interventions, d_model] at the same mean displacement, site by site.

        An ablation has no displacement to keep: it takes away what there is.
        """
        parts = []
        for one, direction in zip(program.interventions, unit(vectors), strict=True):
            if one.operation == "add":
                parts.append(replace(one, vector=direction * one.vector.norm()))
            elif one.operation == "ablate":
                parts.append(replace(one, vector=direction))
            else:
                projection = float(self.means[one.site.layer] @ direction) + self.shift(one)
                parts.append(replace(one, vector=direction, projection=projection))
        return Program(tuple(parts), program.model, program.revision)

    def like(self, program: Program, other: Program) -> Program:
        """`program` along the directions of `other`, which has the same sites."""
        return self.with_vectors(program, torch.stack([i.vector for i in other.interventions]))

    def random(self, program: Program, count: int, seed: int) -> list[Program]:
        """`count` programs like it, a random direction in the place of each of its own."""
        generator = torch.Generator().manual_seed(seed)
        own, which = torch.stack([i.vector for i in program.interventions]).unique(dim=0, return_inverse=True)
        return [self.with_vectors(program, one[which]) for one in torch.randn((count, *own.shape), generator=generator)]


def measure_controls(
    bench: Bench,
    program: Program,
    random: Sequence[Program],
    shuffled: Sequence[Program],
    mismatched: Program | None,
    advance: Advance,
) -> Controls:
    """Mean contrast effects of the program, of the other directions, and of the opposite sign on the bench's pairs."""
    bench.advance(program)

    def effects(programs: Sequence[Program]) -> list[float]:
        found = [float(value) for value in bench.effects(programs).mean(axis=1)]
        advance(len(programs))
        return found

    effect, opposite, *other = effects([program, -program, *([mismatched] if mismatched else [])])
    by_chance, by_label = effects(random), effects(shuffled)
    return Controls(
        effect=effect,
        random=by_chance,
        shuffled=by_label,
        opposite=opposite,
        other_behaviour=other[0] if other else None,
        p_value=rank_p(effect, by_chance),
        p_random=outlier_p(effect, by_chance),
        p_shuffled=outlier_p(effect, by_label) if len(by_label) > 1 else None,
    )


def mismatched_directions(loaded: LoadedModel, pairs: Sequence[Pair], real: Directions) -> Directions:
    """Another behaviour's mean differences of response means, as long as the real directions and where they are."""

    def instead(point: Point, pattern: Tensor) -> Tensor:
        positive, negative = (
            read_activations(loaded, side, point=point, readout="response_mean")
            for side in ([p.positive for p in pairs], [p.negative for p in pairs])
        )
        return as_long_as((positive - negative).mean(dim=0), pattern)

    beside = {point: instead(point, vectors[0])[None] for point, vectors in real.beside.items()}
    return replace(real, vectors=instead(real.point, real.vectors), beside=beside)


def separability(positive: Tensor, negative: Tensor, direction: Tensor) -> Separability:
    """How the direction [d] tells held-out activations [n, d] of the two sides apart."""
    along = unit(direction)
    high, low = (positive @ along).numpy(), (negative @ along).numpy()
    spread = float(np.sqrt((high.var(ddof=1) + low.var(ddof=1)) / 2))
    differences = positive - negative
    cosines = (differences @ along) / differences.norm(dim=-1).clamp(min=1e-12)
    return Separability(
        auroc=auroc(high, low),
        d_prime=float(high.mean() - low.mean()) / spread if spread > 0 else 0.0,
        mean_cosine=float(cosines.mean()),
    )
