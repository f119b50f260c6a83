"""`distill`: a low-rank patch trained to be the steered model, block by block and then end to end.

First the closed form's walk, in which each intervened block is also trained on its own output (`block_fit`): that is
where the error is made, and a step there costs a fraction of a full one. Then the objective, end to end (`train`).
"""

from __future__ import annotations

from collections.abc import Sequence

from compile_steer.common.progress import Advance
from compile_steer.lower import closed_form, likelihood
from compile_steer.lower.block_fit import fit_block, random_edits
from compile_steer.lower.job import Job
from compile_steer.lower.optimise import adamw, require_rank, trainable, worn
from compile_steer.lower.teacher_student import Walk
from compile_steer.lower.train import train
from compile_steer.models.tokens import Encoded
from compile_steer.steering.layout import Layout
from compile_steer.steering.low_rank import LowRank
from compile_steer.steering.patch import WeightPatch


def lower(job: Job) -> WeightPatch:
    """Return the start patch trained end to end, or the start itself if training made it worse."""
    options = job.options.distill
    require_rank(job.loaded.layout, job.program.first_layer, options.rank, "compile.distill.rank")
    if options.objective == "likelihood":
        likelihood.require_trl()
    if options.start == "closed_form":
        start = fitted_patch(job)
    else:
        start = random_patch(job.loaded.layout, job.program.first_layer, options.rank, job.seed)
    texts = job.training_texts
    with job.progress.phase(f"distill: {options.objective}", options.epochs * len(texts)) as advance:
        return distil(job, texts, start, advance)


def distil(job: Job, texts: Sequence[Encoded], start: WeightPatch, advance: Advance) -> WeightPatch:
    """Train `start` end to end on `texts` by the recipe's objective.

    A sixth of the batches is held out; `start` is returned where the result's KL is not lower on it.
    """
    options = job.options.distill
    if options.objective == "likelihood":
        return likelihood.train(job, texts, start, advance)
    factors = trainable(start.low_rank, job.loaded.device)
    optimizer = adamw(factors, options.learning_rate)
    before, after = train(job, texts, worn(factors), optimizer, options, options.objective, "distill", advance)
    trained = {name: LowRank(B.detach().cpu(), A.detach().cpu()) for name, (B, A) in factors.items()}
    return WeightPatch(trained) if after < before else start


def fitted_patch(job: Job) -> WeightPatch:
    """The closed form's walk, with every intervened block trained on its own output before the next is solved."""
    options, texts = job.options.distill, job.regression_texts
    stages = closed_form.plan_stages(job)
    blocks = {one.site.changes_from for one in job.program.interventions}
    total = (1 + len(stages)) * len(texts) + options.block_steps * len(blocks)
    with job.progress.phase("distill: block by block", total) as advance:

        def refine(walk: Walk, block: int) -> None:
            if block in blocks and options.block_steps > 0:
                walk.curves[f"block {block}"] = fit_block(
                    walk,
                    block,
                    rank=options.rank,
                    steps=options.block_steps,
                    rate=options.block_learning_rate,
                    seed=job.seed,
                    advance=advance,
                )

        walk = closed_form.solve_stages(
            job.program,
            job.loaded,
            texts,
            stages,
            advance,
            refine=refine,
            max_tokens=options.block_batch_tokens,
            work=job.work,
            name="distill.blocks",
        )
    job.curves.update(walk.curves)
    return walk.patch


def random_patch(layout: Layout, first: int, rank: int, seed: int) -> WeightPatch:
    """LoRA's own start for every Linear of the blocks from `first` on."""
    edits: dict[str, LowRank] = {}
    for block in range(first, layout.n_layers):
        edits.update(random_edits(layout, block, rank, seed))
    return WeightPatch(edits)
