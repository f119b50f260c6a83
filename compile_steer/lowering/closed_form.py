"""`closed_form`: a low-rank patch solved by regression, with no gradients.

Stage by stage, for an output projection W (d_in -> d_model) of a block k at or after the first intervened one, with x its
input in the student (base plus what has been patched so far) and y = h_steered - h_student at the block's output, dW is
the reduced-rank ridge solution of y ~ dW x over calibration tokens. Each stage corrects what the stages before it left
over. For a constant shift at every position the target of the first stage is one vector, so its solution has rank 1
whatever rank is asked for.

Under several processes each has a share of every batch's texts; only the sums are exchanged, once a stage.

Memory: d_in^2 + d_in * d_model for the sums, and the hidden states of `TeacherStudent`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from compile_steer.common import distributed
from compile_steer.common.errors import CannotLower
from compile_steer.common.progress import Advance
from compile_steer.lowering.job import Lowering
from compile_steer.lowering.options import ClosedFormOptions
from compile_steer.lowering.post_norm import Behind, behind_norm, norm_weights, regression_targets
from compile_steer.lowering.regression import RidgeFitter
from compile_steer.lowering.teacher_student import SuffixModel, TeacherStudent, measure_sensitivity
from compile_steer.models.tokens import Batch, Encoded
from compile_steer.steering.layout import Layout, OutputProjection
from compile_steer.steering.low_rank import LowRank, linear_shape
from compile_steer.steering.measure import ProjectionKind
from compile_steer.steering.patch import WeightPatch, with_patch
from compile_steer.steering.program import Program

_HELD_OUT_EVERY = 5  # one text in five chooses the ridge
_JUDGED = 8  # of these, that the whole patch has to help on
_CORRECTION_RANK = 8
_DROWNED = 10.0  # times what the projection writes; where all is well it is below 1 (Gemma 3, two fifths of the MLP's norm added)
_ROUNDING = 1e-5  # of the largest part of a solution, in float32
_CORRECTION_BLOCKS = 3  # blocks above the last intervened one: what they could still correct is small

Refine = Callable[[TeacherStudent, int, Advance], None]


@dataclass(frozen=True)
class Stage:
    """One regression: an output projection of block `layer`, cut to `rank`."""

    layer: int
    projection: ProjectionKind
    rank: int


def lower(
    lowering: Lowering,
    stages: Sequence[Stage] | None = None,
    *,
    refine: Refine | None = None,
    refine_steps: int = 0,
    max_tokens: int = 4096,
    name: str = "closed form",
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
    with lowering.progress.phase(name, len(texts) * (1 + len(stages)) + refine_steps) as advance:
        models = TeacherStudent(program, loaded, texts, max_tokens, advance)
        # A run that was killed goes on after the last block that it solved.
        blocks = sorted({stage.layer for stage in stages if loaded.layout.norm(stage.layer, stage.projection)})
        models.sensitivity = measure_sensitivity(program, loaded, texts, blocks, lowering.seed)
        state = lowering.state(name, stages, texts, max_tokens, lowering.options)
        saved = state.load() or {"next": 0, "solved": {}, "curves": {}}
        models.solved = {module: LowRank(*factors).to(loaded.device) for module, factors in saved["solved"].items()}
        lowering.curves.update(saved["curves"])
        last = max(stage.layer for stage in stages)
        for block in range(program.first_layer, last + 1):
            models.run_teacher(block)
            if block >= saved["next"]:
                for stage in (stage for stage in stages if stage.layer == block):
                    projection = loaded.layout.output_projection(block, stage.projection)
                    edit = solve_stage(models, projection, stage.rank, advance, lowering.progress.note)
                    if edit is not None:
                        models.solved[projection.name] = edit
                if refine is not None:
                    refine(models, block, advance)
                factors = {module: (edit.B, edit.A) for module, edit in models.solved.items()}
                state.save({"next": block + 1, "solved": factors, "curves": lowering.curves})
            if block < last:
                models.run_student(block)
    if not _helps(models, texts, max_tokens):
        models.solved.clear()
    if not models.solved:
        # Nothing helps, as for a program that cancels itself: the artifact that changes nothing.
        projection = loaded.layout.output_projection(stages[0].layer, stages[0].projection)
        d_out, d_in = linear_shape(projection.module)
        models.solved[projection.name] = LowRank(torch.zeros(d_out, 1), torch.zeros(1, d_in))
    return models.patch


def plan_stages(program: Program, layout: Layout, options: ClosedFormOptions) -> list[Stage]:
    """The recipe's stages, or by default those of each intervened block, then those of the next few.

    In an intervened block the MLP's projection comes first and makes the change; the attention's corrects a small rest,
    which the block's own nonlinearity hardly sees (the other way round the MLP would answer to the whole change); then
    the first is solved again beside it. A change of what the attention writes is made there, and the MLP's projection
    corrects the MLP's answer to it.
    """
    if options.stages is not None:
        return [Stage(program.first_layer + s.offset, s.projection, s.rank) for s in options.stages]
    intervened = {i.site.changes_from for i in program.interventions}
    later = {block + n for block in intervened for n in range(1, _CORRECTION_BLOCKS + 1)} - intervened
    stages = []
    for block in sorted({*intervened, *later}):
        here = [i for i in program.interventions if i.site.changes_from == block]
        constant = bool(here) and all(i.operation == "add" and "all" in i.scopes for i in here)
        rank = 1 if constant else _CORRECTION_RANK  # the target of a constant shift is one vector
        order: list[tuple[ProjectionKind, int]] = [("attn", _CORRECTION_RANK), ("mlp", _CORRECTION_RANK)]
        if any(i.site.point == "attn_out" for i in here):
            order = [("attn", rank), ("mlp", _CORRECTION_RANK)]
        elif here:
            order = [("mlp", rank), ("attn", rank), ("mlp", _CORRECTION_RANK)]
        if block < layout.n_layers:
            stages += [Stage(block, kind, r) for kind, r in order if kind in layout.projection_kinds(block)]
    return stages


def _require_stages(stages: Sequence[Stage], layout: Layout) -> None:
    problems = []
    for s in stages:
        name = f"stage {s.projection} of block {s.layer}"
        if s.layer >= layout.n_layers:
            problems.append(f"{name}: the model has blocks 0 to {layout.n_layers - 1}.")
        elif s.projection not in layout.projection_kinds(s.layer):
            problems.append(f"{name}: {layout.no_projection(s.layer, s.projection)}.")
        elif s.rank > min(shape := linear_shape(layout.output_projection(s.layer, s.projection).module)):
            problems.append(f"{name}: rank {s.rank} is above what its matrix ({shape[0]} x {shape[1]}) can have.")
    if problems:
        raise CannotLower(["compile.closed_form.stages:", *problems])


def solve_stage(
    models: TeacherStudent, projection: OutputProjection, rank: int, advance: Advance, note: Callable[[str], None]
) -> LowRank | None:
    """The edit of one output projection that best corrects the current block's output, in the place of its earlier one.

    None, where a norm follows and no edit does better than none on held-out texts. `note` is told of an edit in front of a norm
    that writes many times what its projection does, which is not used.
    """
    layout = models.loaded.layout
    _d_model, d_in = linear_shape(projection.module)
    gain, multiplier = norm_weights(layout, projection), layout.sublayer(projection.layer, projection.kind).multiplier
    if gain is not None:
        # Not every target can be met there, so errors count by what the blocks above make of them.
        gain = gain * models.sensitivity[projection.layer]
    fitter = RidgeFitter(d_in, layout.d_model, layout.device_of(projection.layer))
    # Without its own earlier edit, which the new one replaces.
    earlier = models.solved.pop(projection.name, None)
    for batch, real, x, written, missing, weight in _run_student(models, projection):
        # 1. What is still missing in the stream, as a change of the projection's output.
        y, weight = regression_targets(missing, written, weight, multiplier, gain)
        # 2. Add the tokens to the sums.
        fitter.update(x, y, weight, _is_held_out(batch).to(real.device).unsqueeze(1).expand_as(real)[real])
        advance(len(batch.rows) * distributed.count())
    # 3. Solve over the texts of all processes.
    edit, penalty, helps = fitter.fit(rank)
    edit = LowRank(edit.B.float(), edit.A.float())
    if gain is None:
        # The held-out error of hidden states is no guide: on SmolLM2 the corrections of later blocks leave it as it was, and
        # take an eighth of the remaining KL away.
        return edit
    # What is rounding alone in a solution of lower rank would be read, as large as it takes, by the next step.
    sizes = edit.B.norm(dim=0) * edit.A.norm(dim=1)
    real_parts = sizes > _ROUNDING * sizes.max()
    edit = LowRank(edit.B[:, real_parts], edit.A[real_parts])
    # 4. Where a norm follows, solve what is written again, for the regression takes the norm's scale as given.
    candidates = [None, earlier]
    if helps:
        tokens = [
            Behind(x @ edit.A.T, written, missing / multiplier, weight)
            for _batch, _real, x, written, missing, weight in _run_student(models, projection)
        ]
        solved = behind_norm(edit, gain, tokens, penalty)
        own = torch.stack([part.written.square().sum() for part in tokens]).sum()
        moved = torch.stack([(part.read @ solved.B.T).square().sum() for part in tokens]).sum()
        distributed.sum_over_all(own, moved)
        times = float(moved / own) ** 0.5
        if times < _DROWNED:
            candidates.append(solved)
        else:
            # The norm would divide by what the edit writes: nothing of the projection's own output would be left.
            note(
                f"{projection.name}: the edit found writes {times:.0f} times what the projection does, so it is not used"
            )
    return min(candidates, key=lambda candidate: _held_out_error(models, projection, candidate))


def _run_student(
    models: TeacherStudent, projection: OutputProjection
) -> Iterator[tuple[Batch, Tensor, Tensor, Tensor, Tensor, Tensor]]:
    """Run the student through the projection's block, one batch after the other.

    Yields:
        The batch; boolean [batch, time], its real tokens; and of these the projection's input x [n, d_in], its output
        [n, d_model], what the block's output lacks of the steered model's, [n, d_model], by its sensitivity, and what a squared
        error of that counts, [n].
    """
    captured: list[tuple[Tensor, Tensor]] = []

    def capture(_module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        captured.append((args[0], output))

    with with_patch(models.loaded.model, models.patch), torch.no_grad():
        # Registered after the patch's hooks, so that the captured output holds the patch's share.
        handle = projection.module.register_forward_hook(capture)
        try:
            for activations in models.batches:
                batch, real = activations.batch, activations.real
                student = models.run_block(batch, activations.student, projection.layer)
                # Some models hand their MLP all tokens in one row.
                inputs, outputs = (value.view(*real.shape, -1) for value in captured.pop())
                missing = (activations.target - student)[real].float()
                if projection.layer in models.sensitivity:
                    missing *= models.sensitivity[projection.layer]
                # Relative to ||h||^2, for the blocks above see the stream normalised; the first token, whose norm is a hundred
                # times that of the others, would otherwise rule the sums.
                size = student[real].float().square().sum(dim=1).clamp(min=1e-12)
                weight = activations.weights.to(real.device)[real] / size
                yield batch, real, inputs[real].float(), outputs[real].float(), missing, weight
        finally:
            handle.remove()


def _helps(models: TeacherStudent, texts: Sequence[Encoded], max_tokens: int) -> bool:
    """Whether the edits together leave less KL(steered || plain) than none on held-out texts of all processes."""
    suffix = SuffixModel(models.loaded, models.program, models.program.first_layer)
    # A few: a patch that helps leaves hundredths.
    held_out = suffix.batches(texts[::_HELD_OUT_EVERY][:_JUDGED], max_tokens)
    patches = models.patch, WeightPatch()
    helped, unhelped = (suffix.mean_kl(held_out, patch) for patch in patches)
    return helped < unhelped


def _is_held_out(batch: Batch) -> Tensor:
    """Boolean [batch]: the texts that choose."""
    return torch.tensor(batch.rows, device=batch.input_ids.device) % _HELD_OUT_EVERY == 0


def _held_out_error(models: TeacherStudent, projection: OutputProjection, edit: LowRank | None) -> float:
    """Weighted sum of ||S (h_steered - h_student)||^2 / ||h_steered||^2 over the held-out texts, with `edit` in the projection
    and S the sensitivity."""
    patch = WeightPatch(models.solved if edit is None else {**models.solved, projection.name: edit})
    total = torch.zeros((), dtype=torch.float64, device=models.loaded.device)
    with with_patch(models.loaded.model, patch), torch.no_grad():
        for activations in models.batches:
            held_out = activations.select(_is_held_out(activations.batch))
            if held_out.batch.rows:
                student = models.run_block(held_out.batch, held_out.student, projection.layer)[held_out.real].float()
                target = held_out.target[held_out.real].float()
                missing = (target - student) * models.sensitivity.get(projection.layer, 1.0)
                error = missing.square().sum(dim=1) / target.square().sum(dim=1).clamp(min=1e-12)
                total += (held_out.weights.to(error.device)[held_out.real] * error).sum()
    distributed.sum_over_all(total)
    return float(total)
