"""Train a vector for every block at once while the model is frozen ("instruct vectors", and BiPO).

The losses of a response, with the model steered by the vectors v:

    likelihood  - log p(r_T | q, v), per token
    bipo        - log sigmoid(d b [log p(r_T | q, d v) / p(r_T | q) - log p(r_O | q, d v) / p(r_O | q)])

Here q is a prompt, r_T and r_O are its positive and negative response, b is the recipe's `beta`, and d is a sign that is
drawn anew for every step: the vectors are to raise the preference for r_T where they are added, and to reverse it where
they are subtracted (Cao et al. 2406.00045, equation 3). Instruct vectors: the likelihood at all blocks of a base model
("Instruct Vectors", LessWrong). A `bias` compiles the result exactly.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor, nn

from compile_steer.common.errors import RecipeError
from compile_steer.common.progress import Advance
from compile_steer.data.behaviour import Context
from compile_steer.extraction.options import ExtractOptions, TrainedOptions
from compile_steer.extraction.pair_methods import fit
from compile_steer.models.forward import read_activations, run_blocks
from compile_steer.models.load import LoadedModel
from compile_steer.models.logprobs import response_logprobs
from compile_steer.models.text import Pair, Text
from compile_steer.models.tokens import Batch, Encoded, batches, encode, pad
from compile_steer.steering.directions import Directions, as_long_as
from compile_steer.steering.hooks import steered
from compile_steer.steering.program import Intervention, Program
from compile_steer.steering.sites import Point, Site

_HELD_OUT_EVERY = 6  # a sixth of the pairs chooses the epoch; too few would choose at random


@dataclass(frozen=True)
class Start:
    """Where training begins."""

    sites: tuple[Site, ...]
    vectors: Tensor  # [n_sites, d_model]
    norms: Tensor  # of the stream at each site's block, [n_sites, 1]


@dataclass(frozen=True)
class TrainedVectors:
    """The vectors [n_sites, d_model] of the epoch with the lowest held-out loss, and those of the last epoch."""

    best: Tensor
    last: Tensor
    # By epoch: mean `loss`, `held_out` loss (first before any step), mean `norm` relative to the stream's.
    curves: dict[str, list[float]]


def trained_directions(context: Context, options: ExtractOptions, positions: str) -> Directions:
    """Train the vectors, and as controls others on pairs of which a random half has its sides swapped.

    The controls are those of the last epoch, with the length of the real ones at every site: they still contain what
    all responses have in common, but not what tells the two sides apart.

    Raises `RecipeError` for too few pairs, a block that the model lacks, a loss that is not finite or never fell.
    """
    model, seed, n_layers = context.model, context.seed, context.model.layout.n_layers
    pairs = options.first(context.data.train, "pairs")
    problems = []
    if len(pairs) < _HELD_OUT_EVERY:
        problems.append(f"holds out a sixth of the pairs; found {len(pairs)} pairs, needed {_HELD_OUT_EVERY} or more.")
    missing = [] if options.trained.layers == "all" else [str(k) for k in options.trained.layers if k >= n_layers]
    if missing:
        problems.append(
            f"trained.layers: {', '.join(missing)} not in this model, which has blocks 0 to {n_layers - 1}."
        )
    if problems:
        raise RecipeError([f"extract, method trained: {problem}" for problem in problems])
    model.require_resident("extract.method trained")
    start = starting_point(model, pairs, options)
    n_epochs = (1 + options.shuffled) * options.trained.epochs
    with context.progress.phase("training vectors, and their controls", n_epochs) as advance:
        real = train(model, pairs, start, options.trained, positions, seed, advance)
        before, *after = real.curves["held_out"]
        if min(after) >= before:
            raise RecipeError(
                f"extract.trained: the held-out loss was never below its start ({before:.3f}); the epochs gave "
                f"{', '.join(f'{value:.3f}' for value in after)}. Use a lower learning_rate, a higher l2, or more pairs."
            )
        vectors = [real.best]
        for n in range(options.shuffled):
            half = set(random.Random(seed + n).sample(range(len(pairs)), len(pairs) // 2))
            swapped = [
                replace(pair, positive=pair.negative, negative=pair.positive) if row in half else pair
                for row, pair in enumerate(pairs)
            ]
            control = train(model, swapped, start, options.trained, positions, seed + n, advance)
            vectors.append(as_long_as(control.last, real.best))
    # [1 + n_controls, n_sites, d] -> by point [1 + n_controls, n_layers, d], zero where a block has no site.
    stacked = torch.stack(vectors)
    empty = stacked.new_zeros(stacked.shape[0], n_layers, stacked.shape[2])
    by_point: dict[Point, Tensor] = {site.point: empty.clone() for site in start.sites}
    for n, site in enumerate(start.sites):
        by_point[site.point][:, site.layer] = stacked[:, n]
    own = by_point.pop(options.point)
    directions = Directions(own[0], own[1:], model.id, model.revision, options.point, inputs="")
    return replace(directions, joint=True, other_points=by_point, curves=real.curves)


def starting_point(loaded: LoadedModel, pairs: Sequence[Pair], options: ExtractOptions) -> Start:
    """Return the sites, the vectors to start from, and by block the median norm of the responses' mean stream."""
    layers = range(loaded.layout.n_layers) if options.trained.layers == "all" else options.trained.layers
    points: tuple[Point, ...] = (options.point, *options.trained.other_points)
    sites = tuple(Site(k, point) for point in points for k in layers)
    positive, negative = [pair.positive for pair in pairs], [pair.negative for pair in pairs]
    stream = read_activations(loaded, positive, point="resid_post", readout="response_mean")
    norms = stream.norm(dim=-1).median(dim=0).values
    vectors = torch.zeros(len(points), loaded.layout.n_layers, loaded.layout.d_model)
    if options.trained.start == "mean_difference":
        for n, point in enumerate(points):
            high, low = (
                read_activations(loaded, side, point=point, readout=options.readout) for side in (positive, negative)
            )
            # Each block's difference already holds what the blocks below it add: together they count once.
            vectors[n] = fit(high, low, "mean_difference") / (len(points) * len(layers))
    chosen = torch.stack([vectors[points.index(site.point), site.layer] for site in sites])
    return Start(sites, chosen, torch.stack([norms[site.layer] for site in sites]).unsqueeze(1))


def train(
    loaded: LoadedModel,
    pairs: Sequence[Pair],
    start: Start,
    options: TrainedOptions,
    positions: str,
    seed: int,
    advance: Advance,
) -> TrainedVectors:
    """Train the vectors from `start` by AdamW; raises `RecipeError` where the loss is not finite.

    The parameters are w in v = s w, where s is the stream's norm after the site's block, so that one learning rate and
    one penalty fit all blocks of all models. The loss is that of the recipe plus l2 * sum ||w||^2.
    """
    # Hold out every sixth pair, and run the blocks below the first site once for all steps.
    shuffled = random.Random(seed).sample(list(pairs), len(pairs))
    objective = Objective(loaded, options.loss, options.beta, min(site.changes_from for site in start.sites))
    held_out = objective.prepare(shuffled[::_HELD_OUT_EVERY], options.batch_tokens)
    seen = objective.prepare([p for n, p in enumerate(shuffled) if n % _HELD_OUT_EVERY], options.batch_tokens)

    norms = start.norms.to(loaded.device)
    weights = nn.Parameter(start.vectors.to(loaded.device) / norms)
    # A step of AdamW moves every coordinate by the rate, so a vector of d coordinates by sqrt(d) times as much.
    rate = options.learning_rate / math.sqrt(weights.shape[1])
    optimizer = torch.optim.AdamW([weights], lr=rate, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, options.epochs * len(seen))

    def program(vectors: Tensor) -> Program:
        parts = (Intervention(site, "add", v, 1.0, positions) for site, v in zip(start.sites, vectors, strict=True))
        return Program(tuple(parts), loaded.id, loaded.revision)

    best = vectors = (norms * weights).detach()
    curves = {"loss": [], "held_out": [objective.evaluate(held_out, program(vectors))], "norm": []}
    draw = random.Random(seed)
    for epoch in range(options.epochs):
        # One step a batch, in a new order, each under a sign that the loss draws from.
        losses = []
        for batch in draw.sample(seen, len(seen)):
            sign = draw.choice(objective.signs)
            optimizer.zero_grad()
            with torch.enable_grad():
                loss = objective.loss(batch, program(norms * weights), sign)
                (loss + options.l2 * weights.square().sum()).backward()
            gradient = torch.zeros(()) if weights.grad is None else weights.grad
            if not (bool(torch.isfinite(loss)) and bool(torch.isfinite(gradient).all())):
                raise RecipeError(
                    f"extract.trained: the loss is {float(loss.detach())} in epoch {epoch + 1}. Use a lower "
                    "learning_rate; in float16 or bfloat16 the model itself may overflow (--dtype float32)."
                )
            optimizer.step()
            schedule.step()
            losses.append(float(loss.detach()))
        # Keep the vectors of the epoch with the lowest held-out loss.
        vectors = (norms * weights).detach()
        curves["loss"].append(sum(losses) / len(losses))
        curves["held_out"].append(objective.evaluate(held_out, program(vectors)))
        curves["norm"].append(float(weights.detach().norm(dim=1).mean()))
        if curves["held_out"][-1] == min(curves["held_out"]):
            best = vectors
        advance(1)
    return TrainedVectors(best.cpu(), vectors.cpu(), curves)


@dataclass(frozen=True)
class PreparedBatch:
    """A batch of responses (for bipo the positives of some pairs, then their negatives) with what is computed once."""

    batch: Batch
    prefix: Tensor | None  # input of the first trained block, [batch, time, d_model]; None if that is block 0
    count: int  # what the loss is the mean over: response tokens, or pairs
    reference: Tensor | None = None  # the base's log p(response), [batch]; for bipo alone


@dataclass(frozen=True)
class Objective:
    """A loss of the recipe, on a model that is run from block `first` on."""

    loaded: LoadedModel
    kind: Literal["likelihood", "bipo"]
    beta: float
    first: int

    @property
    def signs(self) -> tuple[float, ...]:
        """The signs that a step draws from, and that an evaluation takes the mean over."""
        return (1.0,) if self.kind == "likelihood" else (1.0, -1.0)

    def prepare(self, pairs: Sequence[Pair], max_tokens: int) -> list[PreparedBatch]:
        """Return the pairs in batches of at most `max_tokens` padded tokens."""
        texts = [self._encode(pair.prompt, pair.positive.response) for pair in pairs]
        if self.kind == "likelihood":
            return [self._prepare(batch) for batch in batches(self.loaded, texts, max_tokens=max_tokens)]
        # Both sides of a pair must be in the same batch: group the pairs by their longer side.
        texts += [self._encode(pair.prompt, pair.negative.response) for pair in pairs]
        longer = [max(texts[n], texts[n + len(pairs)], key=lambda text: len(text.ids)) for n in range(len(pairs))]
        groups = [batch.rows for batch in batches(self.loaded, longer, max_tokens=max_tokens // 2)]
        rows = [[*group, *(row + len(pairs) for row in group)] for group in groups]
        return [self._prepare(pad(texts, both, self.loaded.pad_id).to(self.loaded.device)) for both in rows]

    def _encode(self, prompt: str, response: str) -> Encoded:
        """Encode the response to the plain prompt, with the token that ends the turn: it is part of the response."""
        text, end = encode(self.loaded.tokenizer, Text(prompt, response)), self.loaded.tokenizer.eos_token_id
        return text if end is None else replace(text, ids=(*text.ids, int(end)))

    def _prepare(self, batch: Batch) -> PreparedBatch:
        model = self.loaded.model
        with torch.no_grad():
            prefix = run_blocks(model, batch.input_ids, batch.attention_mask, stop=self.first) if self.first else None
            if self.kind == "likelihood":
                return PreparedBatch(batch, prefix, int(batch.predicts_response.sum()))
            prepared = PreparedBatch(batch, prefix, len(batch.rows) // 2)
            return replace(prepared, reference=self._logprobs(prepared, None))

    def loss(self, prepared: PreparedBatch, program: Program, sign: float) -> Tensor:
        """Return the batch's mean loss under `sign` times `program`, in nats, per token or per pair; differentiable."""
        logprobs = self._logprobs(prepared, program if sign == 1 else program.scaled(sign))
        if prepared.reference is not None:
            return bipo_loss(logprobs, prepared.reference, self.beta, sign)
        return -logprobs.sum() / prepared.count

    def evaluate(self, data: Sequence[PreparedBatch], program: Program) -> float:
        """Return the mean loss over all batches and signs."""
        total = 0.0
        with torch.no_grad():
            for prepared in data:
                losses = sum(float(self.loss(prepared, program, sign)) for sign in self.signs)
                total += prepared.count * losses / len(self.signs)
        return total / sum(prepared.count for prepared in data)

    def _logprobs(self, prepared: PreparedBatch, program: Program | None) -> Tensor:
        """Return log p(response) [batch] in nats, steered by `program` if given; differentiable."""
        batch, model = prepared.batch, self.loaded.model
        with steered(model, program, roles=batch.roles):
            hidden = run_blocks(model, batch.input_ids, batch.attention_mask, start=self.first, hidden=prepared.prefix)
        return response_logprobs(model, batch, hidden)


def bipo_loss(logprobs: Tensor, reference: Tensor, beta: float, sign: float) -> Tensor:
    """Return the mean loss of n pairs, from log p(response) of the steered and the base model, [2 n], positives first."""
    positive, negative = (logprobs - reference).chunk(2)
    return nn.functional.softplus(-sign * beta * (positive - negative)).mean()
