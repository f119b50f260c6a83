"""Train a vector for every block at once while the model is frozen ('instruct vectors', and BiPO).

The vectors are v = s w, s the norm of the stream after their block, so that one learning rate and one penalty fit all
blocks of all models. AdamW minimises the loss plus l2 * sum ||w||^2; the epoch whose loss on a held-out sixth of the
pairs is lowest is kept. A `bias` compiles the result exactly.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from compile_steer.common.errors import RecipeError
from compile_steer.common.progress import Advance, Progress
from compile_steer.extract.options import Extract, Trained
from compile_steer.extract.pairs import fit
from compile_steer.extract.trained_loss import Objective
from compile_steer.models.forward import read_activations
from compile_steer.models.load import LoadedModel
from compile_steer.models.text import Pair
from compile_steer.recipe import Recipe
from compile_steer.steering.directions import Directions, as_long_as
from compile_steer.steering.program import Intervention, Program
from compile_steer.steering.sites import Point, Site

_HELD_OUT_EVERY = 6


@dataclass(frozen=True)
class Start:
    """Where training begins: `vectors` [n_sites, d_model], and the stream's norm [n_sites, 1] there."""

    sites: tuple[Site, ...]
    vectors: Tensor
    sizes: Tensor


@dataclass(frozen=True)
class Fitted:
    """`best` and `last` [n_sites, d_model]: the kept epoch's vectors and the last one's; a number an epoch in `curves`.

    `held_out` begins before the first epoch; `norm` is the mean of the vectors' norms over the stream's.
    """

    best: Tensor
    last: Tensor
    curves: dict[str, list[float]]


def trained_directions(
    recipe: Recipe, loaded: LoadedModel, pairs: Sequence[Pair], inputs: str, progress: Progress
) -> Directions:
    """Train the vectors, and as controls others on pairs of which a random half has its sides swapped.

    The controls are the last epoch's, as long as the real ones at every site: what all responses have in common is
    still in them, what tells the sides apart is not.

    Raises:
        RecipeError: too few pairs, a block that the model lacks, a loss that is not finite or was never lowered.
    """
    options, positions = recipe.extract, recipe.validate_.positions
    _require(options, loaded, pairs)
    start = starting_point(loaded, pairs, options)
    with progress.phase(
        "training vectors, and their controls", (1 + options.shuffled) * options.trained.epochs
    ) as advance:
        real = train(loaded, pairs, start, options.trained, positions, recipe.seed, advance)
        before, best = real.curves["held_out"][0], min(real.curves["held_out"])
        if best >= before:
            raise RecipeError(
                f"extract.trained: the held-out loss was never below its start ({before:.3f}); the epochs gave "
                f"{', '.join(f'{value:.3f}' for value in real.curves['held_out'][1:])}. Use a lower learning_rate, a "
                "higher l2, or more pairs."
            )
        found = [real.best]
        for n in range(options.shuffled):
            swapped = _half_swapped(pairs, recipe.seed + n)
            last = train(loaded, swapped, start, options.trained, positions, recipe.seed + n, advance).last
            found.append(as_long_as(last, real.best))
    whole = _by_point(torch.stack(found), start.sites, loaded.layout.n_layers)
    mine = whole.pop(options.point)
    return Directions(
        mine[0],
        mine[1:],
        loaded.id,
        loaded.revision,
        options.point,
        inputs,
        joint=True,
        beside=whole,
        curves=real.curves,
    )


def _require(options: Extract, loaded: LoadedModel, pairs: Sequence[Pair]) -> None:
    n_layers, layers = loaded.layout.n_layers, options.trained.layers
    problems = []
    if len(pairs) < _HELD_OUT_EVERY:
        problems.append(
            f"method trained keeps a sixth of the pairs apart; found {len(pairs)} pairs, needed {_HELD_OUT_EVERY} or more."
        )
    missing = [] if layers == "all" else [str(k) for k in layers if k >= n_layers]
    if missing:
        problems.append(
            f"trained.layers: {', '.join(missing)} not in this model, which has blocks 0 to {n_layers - 1}."
        )
    if problems:
        raise RecipeError([f"extract: {problem}" for problem in problems])


def starting_point(loaded: LoadedModel, pairs: Sequence[Pair], options: Extract) -> Start:
    """The sites, the vectors to start from, and the median norm of the positive responses' mean stream by block."""
    layers = range(loaded.layout.n_layers) if options.trained.layers == "all" else options.trained.layers
    points: tuple[Point, ...] = (options.point, *options.trained.beside)
    positive = [p.positive for p in pairs]
    stream = read_activations(loaded, positive, point="resid_post", readout="response_mean")
    sizes = stream.norm(dim=-1).median(dim=0).values
    vectors = torch.zeros(len(points), loaded.layout.n_layers, loaded.layout.d_model)
    if options.trained.start == "mean_difference":
        negative = [p.negative for p in pairs]
        for n, point in enumerate(points):
            here, there = (
                read_activations(loaded, side, point=point, readout=options.readout) for side in (positive, negative)
            )
            # Each block's difference holds what the blocks below it have added already: together they count once.
            vectors[n] = fit(here, there, "mean_difference") / (len(points) * len(layers))
    sites = tuple(Site(k, point) for point in points for k in layers)
    chosen = torch.stack([vectors[points.index(site.point), site.layer] for site in sites])
    return Start(sites, chosen, torch.stack([sizes[site.layer] for site in sites]).unsqueeze(1))


def train(
    loaded: LoadedModel,
    pairs: Sequence[Pair],
    start: Start,
    options: Trained,
    positions: str,
    seed: int,
    advance: Advance,
) -> Fitted:
    """Train from `start`; `advance` is called once an epoch.

    Raises:
        RecipeError: the loss is not finite.
    """
    shuffled = random.Random(seed).sample(list(pairs), len(pairs))
    objective = Objective(loaded, options.loss, options.beta, min(site.changes_from for site in start.sites))
    held_out = objective.items(shuffled[::_HELD_OUT_EVERY], options.batch_tokens)
    seen = objective.items([p for n, p in enumerate(shuffled) if n % _HELD_OUT_EVERY], options.batch_tokens)
    sizes = start.sizes.to(loaded.device)
    weights = nn.Parameter(start.vectors.to(loaded.device) / sizes)
    rate = options.learning_rate / math.sqrt(weights.shape[1])  # a step of AdamW moves every coordinate by its rate
    optimizer = torch.optim.AdamW([weights], lr=rate, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, options.epochs * len(seen))

    def program(vectors: Tensor) -> Program:
        parts = (Intervention(site, "add", v, 1.0, positions) for site, v in zip(start.sites, vectors, strict=True))
        return Program(tuple(parts), loaded.id, loaded.revision)

    best = now = (sizes * weights).detach()
    curves = {"loss": [], "held_out": [objective.measure(held_out, program(now))], "norm": []}
    draw = random.Random(seed)
    for epoch in range(options.epochs):
        losses = []
        for item in draw.sample(seen, len(seen)):
            sign = draw.choice(objective.signs)
            optimizer.zero_grad()
            with torch.enable_grad():
                loss = objective.loss(item, program(sizes * weights), sign)
                (loss + options.l2 * weights.square().sum()).backward()
            _require_finite(loss, weights, epoch)
            optimizer.step()
            schedule.step()
            losses.append(float(loss.detach()))
        now = (sizes * weights).detach()
        curves["loss"].append(sum(losses) / len(losses))
        curves["held_out"].append(objective.measure(held_out, program(now)))
        curves["norm"].append(float(weights.detach().norm(dim=1).mean()))
        if curves["held_out"][-1] == min(curves["held_out"]):
            best = now
        advance(1)
    return Fitted(best.cpu(), now.cpu(), curves)


def _require_finite(loss: Tensor, weights: Tensor, epoch: int) -> None:
    if not (
        bool(torch.isfinite(loss)) and bool(torch.isfinite(weights.grad).all() if weights.grad is not None else True)
    ):
        raise RecipeError(
            f"extract.trained: the loss is {float(loss.detach())} in epoch {epoch + 1}. Use a lower learning_rate; in "
            "float16 or bfloat16 the model itself may overflow (--dtype float32)."
        )


def _half_swapped(pairs: Sequence[Pair], seed: int) -> list[Pair]:
    """The pairs, a random half of them with their sides swapped."""
    swapped = set(random.Random(seed).sample(range(len(pairs)), len(pairs) // 2))
    return [replace(p, positive=p.negative, negative=p.positive) if n in swapped else p for n, p in enumerate(pairs)]


def _by_point(vectors: Tensor, sites: Sequence[Site], n_layers: int) -> dict[Point, Tensor]:
    """[m, n_sites, d_model] -> [m, n_layers, d_model] by point, zero where a block has no site."""
    found: dict[Point, Tensor] = {}
    for n, site in enumerate(sites):
        empty = torch.zeros(vectors.shape[0], n_layers, vectors.shape[2])
        found.setdefault(site.point, empty)[:, site.layer] = vectors[:, n]
    return found
