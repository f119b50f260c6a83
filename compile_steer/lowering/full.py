"""`full`: whole weights trained end to end on the divergence from the steered model. The result is a task vector.

The weights themselves are not touched: what is trained is W_new - W_base, zero at first and added by hooks, so that the
base beneath is the teacher too. The objectives are `distill`'s, the start is the base. `full_cut` is the same task
vector with each matrix cut to its best approximation of a low rank, which a LoRA holds.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from compile_steer.common.errors import CannotLower
from compile_steer.lowering.job import Lowering, require_rank
from compile_steer.lowering.optimizer import BETAS
from compile_steer.lowering.training import train
from compile_steer.steering.layout import Layout
from compile_steer.steering.patch import WeightPatch

# The paper's: an update may grow by 1 % from one step to the next, and the scale for rank 1.
_GROWTH = 1.01
_MINI_SCALE = math.sqrt(128)


def lower(lowering: Lowering) -> WeightPatch:
    """The trained task vector.

    Raises:
        CannotLower: the modules that the recipe names do not exist, or training did not beat the base on texts
            that were held out.
    """
    options = lowering.options.full
    lowering.loaded.require_resident("compile.full")
    weights = chosen_weights(lowering.loaded.layout, lowering.program.first_layer, options.modules)
    texts = [*lowering.regression_texts, *lowering.training_texts]
    # float32 whatever the base's type: in bfloat16 a small step would vanish.
    deltas = {name: nn.Parameter(torch.zeros_like(weight, dtype=torch.float32)) for name, weight in weights.items()}
    # A rate for each delta relative to the root mean square of its weight.
    groups: list[dict[str, Any]] = [
        {"params": [delta], "lr": options.learning_rate * float(weights[name].float().square().mean().sqrt())}
        for name, delta in deltas.items()
    ]
    optimizer: Optimizer
    if options.optimizer == "adamw":
        optimizer = torch.optim.AdamW(groups, weight_decay=0.0, betas=BETAS)
    else:
        optimizer = Apollo(groups, rank=options.apollo_rank, seed=lowering.seed, betas=BETAS)
    with lowering.progress.phase(f"full: {options.optimizer}", options.epochs * len(texts)) as advance:
        patch = WeightPatch(dense=deltas)
        before, after = train(lowering, texts, patch, optimizer, options, "full", advance)
    if not after < before:  # written so that NaN is refused too
        raise CannotLower(
            f"full: training left KL {after:.3g} nats a token on held-out texts, where the base itself has {before:.3g}; "
            f"nothing was learned. Lower compile.full.learning_rate ({options.learning_rate:g}), raise "
            "compile.full.epochs, train more modules or give more calibration prompts."
        )
    return WeightPatch(dense={name: delta.detach().cpu() for name, delta in deltas.items()})


def lower_cut(lowering: Lowering) -> WeightPatch:
    """The task vector cut to `cut_rank`; trains only where `full` has not run."""
    rank, layout = lowering.options.full.cut_rank, lowering.loaded.layout
    require_rank(layout, lowering.program.first_layer, rank, "compile.full.cut_rank")
    return (lowering.patches.get("full") or lower(lowering)).truncated(rank, layout)


def chosen_weights(layout: Layout, first: int, endings: tuple[str, ...]) -> dict[str, Tensor]:
    """The weights to train by module name: of the Linears of the blocks from `first` on whose name ends so.

    Raises:
        CannotLower: naming every ending that no module has.
    """
    modules: dict[str, nn.Module] = {}
    for block in range(first, layout.n_layers):
        modules.update(layout.linears(block))
    # Whole parts of the name: `proj` is not the end of `down_proj`.
    chosen = {ending: [name for name in modules if f".{name}".endswith(f".{ending}")] for ending in endings}
    unknown = [ending for ending, names in chosen.items() if not names]
    if unknown:
        prefix = f"{layout.measured.blocks}.{first}."
        known = ", ".join(name.removeprefix(prefix) for name in layout.linears(first))
        raise CannotLower(
            f"compile.full.modules: no Linear from block {first} on ends in {', '.join(unknown)}. A block has: {known}."
        )
    named = {name for names in chosen.values() for name in names}
    return {name: cast(Tensor, m.weight) for name, m in modules.items() if not endings or name in named}


class Apollo(Optimizer):
    """APOLLO (Zhu et al. 2412.05270) without weight decay for matrices: AdamW's step sizes, one a channel, estimated in
    a small random subspace.

    For a gradient G [m, n] with m <= n, transposed where its rows are the longer side:

        R = P G,  P [r, m] ~ N(0, 1/r),  drawn again every `refresh` steps from a seed
        R~ = AdamW's direction for R, from moments of R alone
        s_j = ||R~[:, j]|| / ||R[:, j]||        for each of the n channels; for r = 1 one s for the whole matrix
        W <- W - rate * limited(alpha G diag(s))

    An update whose norm is above 1.01 times the one before is scaled down to that. The norms of R and R~ compare as if
    there were r rows and not m, which alpha = sqrt(m / r) corrects (the paper's theorem on the ratio); for r = 1
    (APOLLO-Mini) alpha is the paper's sqrt(128). State: two r x n matrices, a seed and a norm.

    Args:
        groups: dicts of `params` and `lr`, as every optimizer of torch takes them.
        rank: of the random subspace; a matrix with a shorter side is not projected beyond that side.
        refresh: steps between projections.
        seed: of the projections; each matrix has its own.
    """

    def __init__(
        self,
        groups: Iterable[dict[str, Any]],
        *,
        rank: int,
        seed: int,
        betas: tuple[float, float] = (0.9, 0.99),
        epsilon: float = 1e-8,
        refresh: int = 200,
    ) -> None:
        super().__init__(groups, {})
        self._rank, self._seed, self._refresh = rank, seed, refresh
        self._betas, self._epsilon = betas, epsilon

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]  # torch overloads it
        """One update of every matrix that has a gradient; returns the closure's loss, if there is a closure."""
        loss = None if closure is None else torch.enable_grad()(closure)()
        parameters = [(group["lr"], parameter) for group in self.param_groups for parameter in group["params"]]
        for number, (rate, parameter) in enumerate(parameters, start=1):
            if parameter.grad is not None:
                parameter.add_(self._update(parameter.grad.float(), self.state[parameter], number), alpha=-rate)
        return loss

    def _update(self, grad: Tensor, state: dict[str, Any], number: int) -> Tensor:
        tall = grad.shape[0] > grad.shape[1]
        G = grad.T if tall else grad
        rank = min(self._rank, G.shape[0])
        if not state:
            zeros = G.new_zeros(rank, G.shape[1])
            state |= {"step": 0, "first": zeros, "second": zeros.clone(), "norm": math.inf}
        # 1. The gradient in the random subspace.
        R = projection(G, rank, (self._seed, number, state["step"] // self._refresh)) @ G
        step = state["step"] = state["step"] + 1
        # 2. AdamW's direction there: the bias-corrected first moment over the root of the second.
        beta1, beta2 = self._betas
        state["first"].lerp_(R, 1 - beta1)
        state["second"].mul_(beta2).addcmul_(R, R, value=1 - beta2)
        root = (state["second"] / (1 - beta2**step)).sqrt()
        direction = state["first"] / (1 - beta1**step) / (root + self._epsilon)
        # 3. How much AdamW rescales each channel, applied to the whole gradient.
        channels = None if rank == 1 else 0
        norms = torch.linalg.vector_norm(R, dim=channels).clamp(min=torch.finfo(R.dtype).tiny)
        scale = torch.linalg.vector_norm(direction, dim=channels) / norms
        update = G * scale * (_MINI_SCALE if rank == 1 else math.sqrt(G.shape[0] / rank))
        # 4. Limit the growth of the update.
        norm = float(update.norm())
        limit = _GROWTH * state["norm"]
        if norm > limit > 0:
            update, norm = update * (limit / norm), limit
        state["norm"] = norm
        oriented: Tensor = update.T if tall else update
        return oriented


def projection(G: Tensor, rank: int, seed: tuple[int, int, int]) -> Tensor:
    """P [rank, m] ~ N(0, 1 / rank), the same for the same seed, so that it need not be kept."""
    generator = torch.Generator().manual_seed(hash(seed) % 2**63)
    return torch.randn(rank, G.shape[0], generator=generator).to(G) / math.sqrt(rank)
