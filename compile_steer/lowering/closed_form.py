"""`closed_form`: a low-rank patch solved by regression, with no gradients.

Stage by stage, for an output projection W (d_in -> d_model) of a block k at or after the first intervened one, with x its
input in the student (base plus what has been patched so far) and y = h_steered - h_student at the block's output, dW is
the reduced-rank ridge solution of y ~ dW x over calibration tokens. Each stage corrects what the stages before it left
over; one stage may solve both output projections of its block (see `joint`). For a constant shift at every position the
target of the first stage is one vector, so its solution has rank 1 whatever rank is asked for.

Under several processes each has a share of every batch's texts; only the sums are exchanged, once a stage.

Memory: d_in^2 + d_in * d_model for the sums, and the hidden states of `TeacherStudent`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from compile_steer.common.errors import CannotLower
from compile_steer.common.progress import Advance
from compile_steer.lowering.block_pass import HELD_OUT_EVERY
from compile_steer.lowering.job import Lowering
from compile_steer.lowering.joint import has_both, solve_jointly
from compile_steer.lowering.options import ClosedFormOptions
from compile_steer.lowering.projection import solve_projection
from compile_steer.lowering.teacher_student import SuffixModel, TeacherStudent, measure_sensitivity
from compile_steer.models.tokens import Encoded
from compile_steer.steering.layout import Layout
from compile_steer.steering.low_rank import LowRank, linear_shape
from compile_steer.steering.measure import KINDS, ProjectionKind
from compile_steer.steering.patch import WeightPatch
from compile_steer.steering.program import Program

_JUDGED = 8  # of the texts that choose the ridge, that the whole patch has to help on
_CORRECTION_RANK = 8
_CORRECTION_BLOCKS = 3  # blocks above the last intervened one: what they could still correct is small

NAME = "closed form"

Refine = Callable[[TeacherStudent, int, Advance], None]


@dataclass(frozen=True)
class Stage:
    """One regression: an output projection of block `layer`, or both together, cut to `rank`.

    `correction`: of what others leave over; not solved where that is next to nothing.
    """

    layer: int
    projection: ProjectionKind | Literal["both"]
    rank: int
    correction: bool = False

    @property
    def kinds(self) -> tuple[ProjectionKind, ...]:
        """The projections that it solves."""
        return KINDS if self.projection == "both" else (self.projection,)


def lower(
    lowering: Lowering,
    stages: Sequence[Stage] | None = None,
    *,
    refine: Refine | None = None,
    refine_steps: int = 0,
    max_tokens: int = 4096,
    name: str = NAME,
) -> WeightPatch:
    """The patch with which the plain model imitates the program on calibration texts.

    One pass over the blocks from the first intervened one to the last stage's, which solves each block's stages.

    Args:
        stages: in any order of blocks; within a block they are solved in this order, and a projection that is there
            twice is solved again. None: `plan_stages`.
        refine: called with (models, block, advance) after the regressions of each block; may replace edits in
            `models.solved`. `refine_steps` is by how much it advances the progress in all.
        max_tokens: padded tokens of a batch.
        name: of the progress, and under which the edits are saved after each block.

    Raises:
        CannotLower: naming every stage that the model has no matrix for, or none of that rank.
    """
    program, loaded, texts = lowering.program, lowering.loaded, lowering.regression_texts
    if stages is None:
        stages = plan_stages(program, loaded.layout, lowering.options.closed_form)
    _require_stages(stages, loaded.layout)
    with lowering.progress.phase(name, len(texts) * (1 + sum(map(_passes, stages))) + refine_steps) as advance:
        models = TeacherStudent(program, loaded, texts, max_tokens, advance, lowering.options.dial)
        # A run that was killed goes on after the last block that it solved.
        blocks = sorted({stage.layer for stage in stages if _normed(loaded.layout, stage)})
        models.sensitivity = measure_sensitivity(program, loaded, texts, blocks, lowering.seed)
        state = lowering.state(name, stages, texts, max_tokens, lowering.options)
        saved = state.load() or {"next": 0, "solved": {}, "curves": {}, "exact": []}
        models.solved = {module: LowRank(*factors).to(loaded.device) for module, factors in saved["solved"].items()}
        models.exact.update(saved["exact"])
        lowering.curves.update(saved["curves"])
        last = max(stage.layer for stage in stages)
        for block in range(program.first_layer, last + 1):
            models.run_teacher(block)
            if block >= saved["next"]:
                for stage in (stage for stage in stages if stage.layer == block):
                    _solve(models, stage, len(texts), advance, lowering.progress.note)
                if refine is not None:
                    refine(models, block, advance)
                factors = {module: (edit.B, edit.A) for module, edit in models.solved.items()}
                exact = sorted(models.exact)
                state.save({"next": block + 1, "solved": factors, "curves": lowering.curves, "exact": exact})
            above = [stage for stage in stages if stage.layer > block]
            if all(_nothing_left(models, stage) for stage in above):
                advance(len(texts) * sum(map(_passes, above)))
                break
            models.run_student(block)
    if not _helps(models, texts, max_tokens):
        models.solved.clear()
        models.exact.clear()
    if not models.solved:
        # Nothing helps, as for a program that cancels itself: the artifact that changes nothing.
        projection = loaded.layout.output_projection(stages[0].layer, stages[0].kinds[-1])
        d_out, d_in = linear_shape(projection.module)
        models.solved[projection.name] = LowRank(torch.zeros(d_out, 1), torch.zeros(1, d_in))
    lowering.exact[name] = models.exact
    return models.patch


def _solve(models: TeacherStudent, stage: Stage, n_texts: int, advance: Advance, note: Callable[[str], None]) -> None:
    """Solve one stage in the student's current block."""
    if _nothing_left(models, stage):
        advance(n_texts * _passes(stage))
    elif stage.projection == "both":
        solve_jointly(models, stage.layer, stage.rank, advance, note)
    else:
        projection = models.loaded.layout.output_projection(stage.layer, stage.projection)
        solve_projection(models, projection, stage.rank, advance, note)


def _nothing_left(models: TeacherStudent, stage: Stage) -> bool:
    """Whether the stage would correct what the program's blocks up to its own have left, and they have left next to nothing."""
    return stage.correction and models.exact >= {k for k in models.program.changed_blocks if k <= stage.layer}


def plan_stages(program: Program, layout: Layout, options: ClosedFormOptions) -> list[Stage]:
    """The recipe's stages, or by default those of each intervened block, then those of the next few.

    In an intervened block both output projections make the change together (see `joint`), and the MLP's is solved again for what
    is left, if that is more than next to nothing. Where they cannot, the MLP's projection comes first and makes the change; the
    attention's corrects a small rest, which the block's own nonlinearity hardly sees (the other way round the MLP would answer to
    the whole change); then the first is solved again beside it. A change of what the attention writes is made there, and the
    MLP's projection corrects the MLP's answer to it.
    """
    if options.stages is not None:
        return [Stage(program.first_layer + s.offset, s.projection, s.rank) for s in options.stages]
    intervened = program.changed_blocks
    later = {block + n for block in intervened for n in range(1, _CORRECTION_BLOCKS + 1)} - intervened
    stages = []
    for block in sorted({*intervened, *later}):
        here = program.at_block(block)
        # The target of a constant shift is one vector.
        rank = 1 if program.adds_constant(block) else _CORRECTION_RANK
        order = [Stage(block, kind, _CORRECTION_RANK, correction=True) for kind in KINDS]
        if any(i.site.point == "attn_out" for i in here):
            order[0] = Stage(block, "attn", rank)
        elif here and has_both(layout, block):
            order[0] = Stage(block, "both", rank)
        elif here:
            order = [Stage(block, "mlp", rank), Stage(block, "attn", rank), order[1]]
        if block < layout.n_layers:
            stages += [stage for stage in order if set(stage.kinds) <= set(layout.projection_kinds(block))]
    return stages


def _passes(stage: Stage) -> int:
    return 4 if stage.projection == "both" else 1


def _normed(layout: Layout, stage: Stage) -> bool:
    return any(layout.norm(stage.layer, kind) is not None for kind in stage.kinds)


def _require_stages(stages: Sequence[Stage], layout: Layout) -> None:
    problems = []
    for s in stages:
        name = f"stage {s.projection} of block {s.layer}"
        if s.layer >= layout.n_layers:
            problems.append(f"{name}: the model has blocks 0 to {layout.n_layers - 1}.")
            continue
        missing = [kind for kind in s.kinds if kind not in layout.projection_kinds(s.layer)]
        shapes = [linear_shape(layout.output_projection(s.layer, k).module) for k in s.kinds if k not in missing]
        problems += [f"{name}: {layout.no_projection(s.layer, kind)}." for kind in missing]
        problems += [
            f"{name}: rank {s.rank} is above what its matrix ({d_out} x {d_in}) can have."
            for d_out, d_in in shapes
            if s.rank > min(d_out, d_in)
        ]
        if s.projection == "both" and not missing and not has_both(layout, s.layer):
            problems.append(
                f"{name}: it needs an attention and an MLP after it, each written by one matrix without a norm behind it. "
                "Name stages of attn and mlp."
            )
    if problems:
        raise CannotLower(["compile.closed_form.stages:", *problems])


def _helps(models: TeacherStudent, texts: Sequence[Encoded], max_tokens: int) -> bool:
    """Whether the edits together leave less KL(steered || plain) than none on held-out texts of all processes."""
    suffix = SuffixModel(models.loaded, models.program, models.program.first_layer)
    # A few: a patch that helps leaves hundredths.
    held_out = suffix.batches(texts[::HELD_OUT_EVERY][:_JUDGED], max_tokens)
    patches = models.patch, WeightPatch()
    helped, unhelped = (suffix.mean_kl(held_out, patch) for patch in patches)
    return helped < unhelped
