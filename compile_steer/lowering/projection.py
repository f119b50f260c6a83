"""One output projection solved by regression: for what is still missing in its block's output."""

from __future__ import annotations

from collections.abc import Callable

import torch

from compile_steer.common import distributed
from compile_steer.common.progress import Advance
from compile_steer.lowering.block_pass import held_out_error, run_student
from compile_steer.lowering.post_norm import Behind, behind_norm, norm_weights, regression_targets
from compile_steer.lowering.regression import RidgeFitter
from compile_steer.lowering.teacher_student import TeacherStudent
from compile_steer.steering.layout import OutputProjection
from compile_steer.steering.low_rank import LowRank, linear_shape
from compile_steer.steering.patch import WeightPatch

_DROWNED = 10.0  # times what the projection writes; where all is well it is below 1 (Gemma 3, two fifths of the MLP's norm added)
_ROUNDING = 1e-5  # of the largest part of a solution, in float32


def solve_projection(
    models: TeacherStudent,
    projection: OutputProjection,
    rank: int,
    advance: Advance,
    note: Callable[[str], None],
    *,
    to_all: bool = True,
) -> None:
    """Give the student the edit of one output projection that best corrects the current block's output, in the place of its
    earlier one.

    None, where a norm follows and no edit does better than none on held-out texts. `note` is told of an edit in front of a norm
    that writes many times what its projection does, which is not used. `to_all`: see `RidgeFitter.fit`.
    """
    layout = models.loaded.layout
    _d_model, d_in = linear_shape(projection.module)
    gain, multiplier = norm_weights(layout, projection), layout.sublayer(projection.layer, projection.kind).multiplier
    if gain is not None:
        # Not every target can be met there, so errors count by what the blocks above make of them.
        gain = gain * models.sensitivity[projection.layer]
    fitter = RidgeFitter(d_in, layout.d_model, layout.device_of(projection.layer))
    # Without its own earlier edit, which the new one replaces.
    earlier, kept = models.solved.pop(projection.name, None), models.kept.get(projection.name)
    if kept is not None:
        models.solved[projection.name] = kept
    for tokens in run_student(models, projection.layer, [projection.name]):
        # 1. What is still missing in the stream, as a change of the projection's output.
        call = tokens.calls[projection.name]
        y, weight = regression_targets(tokens.missing, call.output, tokens.weight, multiplier, gain)
        # 2. Add the tokens to the sums.
        fitter.update(call.input, y, weight, tokens.held_out)
        advance(len(tokens.batch.rows) * distributed.count())
    # 3. Solve over the texts of all processes.
    fitter.exchange()
    edit, penalty, helps = fitter.fit(rank, to_all=to_all)
    edit = LowRank(edit.B.float(), edit.A.float())
    if gain is None:
        # The held-out error of hidden states is no guide: on SmolLM2 the corrections of later blocks leave it as it was, and
        # take an eighth of the remaining KL away.
        models.solved[projection.name] = edit if kept is None else kept + edit
        return
    # What is rounding alone in a solution of lower rank would be read, as large as it takes, by the next step.
    sizes = edit.B.norm(dim=0) * edit.A.norm(dim=1)
    real_parts = sizes > _ROUNDING * sizes.max()
    edit = LowRank(edit.B[:, real_parts], edit.A[real_parts])
    # 4. Where a norm follows, solve what is written again, for the regression takes the norm's scale as given.
    candidates = [None, earlier]
    if helps:
        behind = [
            Behind(
                tokens.calls[projection.name].input @ edit.A.T,
                tokens.calls[projection.name].output,
                tokens.missing / multiplier,
                tokens.weight,
            )
            for tokens in run_student(models, projection.layer, [projection.name])
        ]
        solved = behind_norm(edit, gain, behind, penalty)
        own = torch.stack([part.written.square().sum() for part in behind]).sum()
        moved = torch.stack([(part.read @ solved.B.T).square().sum() for part in behind]).sum()
        distributed.sum_over_all(own, moved)
        times = float(moved / own) ** 0.5
        if times < _DROWNED:
            candidates.append(solved)
        else:
            # The norm would divide by what the edit writes: nothing of the projection's own output would be left.
            note(
                f"{projection.name}: the edit found writes {times:.0f} times what the projection does, so it is not used"
            )

    def error(candidate: LowRank | None) -> float:
        edits = {} if candidate is None else {projection.name: candidate}
        return held_out_error(models, projection.layer, WeightPatch({**models.solved, **edits}))

    best = min(candidates, key=error)
    if best is not None:
        models.solved[projection.name] = best
