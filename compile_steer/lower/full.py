"""`full`: whole weights trained end to end on the divergence from the steered model. The result is a task vector.

The weights themselves stay as they are: what is trained is W_new - W_base, zero at first and applied by hooks, so
that the base beneath is the teacher too. The objectives are `distill`'s, the start is the base. `full_cut` is
the same task vector with each matrix cut to its best approximation of a low rank, which a LoRA holds.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import cast

import torch
from torch import Tensor, nn

from compile_steer.common.errors import CannotLower
from compile_steer.lower.apollo import Apollo
from compile_steer.lower.job import Job
from compile_steer.lower.optimise import BETAS, require_rank
from compile_steer.lower.options import Full
from compile_steer.lower.train import train
from compile_steer.steering.layout import Layout
from compile_steer.steering.patch import WeightPatch
from compile_steer.steering.program import Program


def adapter_refusal(_program: Program, _layout: Layout) -> str:
    """Why the result cannot ship as a stock PEFT adapter."""
    return "its changes have full rank: merged checkpoint only, or full_cut"


def lower(job: Job) -> WeightPatch:
    """Return the trained task vector.

    Raises:
        CannotLower: the modules that the recipe names do not exist, or training did not beat the base on texts
            that were held out.
    """
    options, first = job.options.full, job.program.first_layer
    weights = chosen_weights(job.loaded.layout, first, options.modules)
    texts = [*job.regression_texts, *job.training_texts]
    deltas = {name: nn.Parameter(torch.zeros_like(weight, dtype=torch.float32)) for name, weight in weights.items()}
    optimizer = optimizer_of(deltas, weights, options, job.seed)
    with job.progress.phase(f"full: {options.optimizer}", options.epochs * len(texts)) as advance:
        worn = WeightPatch(dense=deltas)
        before, after = train(job, texts, worn, optimizer, options, options.objective, "full", advance)
    if not after < before:
        raise CannotLower(
            f"full: training left KL {after:.3g} nats a token on held-out texts, where the base itself has {before:.3g}; "
            f"nothing was learned. Lower compile.full.learning_rate ({options.learning_rate:g}), raise "
            "compile.full.epochs, train more modules or give more calibration prompts."
        )
    return WeightPatch(dense={name: delta.detach().cpu() for name, delta in deltas.items()})


def lower_cut(job: Job) -> WeightPatch:
    """Return the task vector cut to `cut_rank`; trains only where `full` has not run."""
    require_rank(job.loaded.layout, job.program.first_layer, job.options.full.cut_rank, "compile.full.cut_rank")
    whole = job.finished.get("full") or lower(job)
    return whole.truncated(job.options.full.cut_rank, job.loaded.layout)


def chosen_weights(layout: Layout, first: int, endings: tuple[str, ...]) -> dict[str, Tensor]:
    """The weights to train by module name: of the Linears of the blocks from `first` on whose name ends so.

    Raises:
        CannotLower: naming every ending that no module has.
    """
    names: dict[str, nn.Module] = {}
    for block in range(first, layout.n_layers):
        names.update(layout.linears(block))
    unknown = [ending for ending in endings if not any(_ends(name, ending) for name in names)]
    if unknown:
        prefix = f"{layout.family.blocks}.{first}."
        known = ", ".join(name.removeprefix(prefix) for name in layout.linears(first))
        raise CannotLower(
            f"compile.full.modules: no Linear from block {first} on ends in {', '.join(unknown)}. A block has: {known}."
        )
    wanted = [name for name in names if not endings or any(_ends(name, ending) for ending in endings)]
    return {name: cast(Tensor, names[name].weight) for name in wanted}


def _ends(name: str, ending: str) -> bool:
    return f".{name}".endswith(f".{ending}")


def optimizer_of(
    deltas: Mapping[str, nn.Parameter], weights: Mapping[str, Tensor], options: Full, seed: int
) -> torch.optim.Optimizer:
    """AdamW or APOLLO, with a rate for each delta relative to the root mean square of its weight."""
    groups = [
        {"params": [delta], "lr": options.learning_rate * float(weights[name].float().square().mean().sqrt())}
        for name, delta in deltas.items()
    ]
    if options.optimizer == "adamw":
        return torch.optim.AdamW(groups, weight_decay=0.0, betas=BETAS)
    return Apollo(groups, rank=options.apollo_rank, seed=seed, betas=BETAS)
