"""Task vectors: scaled sums of patches of one base, cut to a rank, as a new patch; and a report on its matrices.

W_new = W_base + patch, so a patch times -1 takes away what it gives, and the sum of two gives both (Ilharco et al.
2212.04089; the arithmetic is `WeightPatch`'s). This is exact for the weights; what the model then does is for `verify`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from compile_steer.artifacts.files import digest
from compile_steer.artifacts.paths import real_path
from compile_steer.artifacts.provenance import Provenance, artifact_sha256
from compile_steer.common.errors import ArtifactError
from compile_steer.export.adapter import is_adapter, read_patch, write_patch
from compile_steer.lowering.plan import BACKENDS
from compile_steer.pipeline.run import Run
from compile_steer.report.card import model_card
from compile_steer.steering.layout import Layout
from compile_steer.steering.patch import WeightPatch
from compile_steer.steering.program import Program
from compile_steer.verification.parity import own_parity

_ENERGY = 0.99  # of the squared norm, for rank_99


@dataclass(frozen=True)
class MatrixReport:
    """One changed matrix.

    `cosine`, without sign, is of the top singular direction on the stream's side (what an output projection writes, what any
    other Linear reads) with the nearest steering vector at or below the block; None where there is none. What is read is the
    normed stream, so there it is approximate.
    """

    name: str
    norm: float  # Frobenius
    stable_rank: float  # squared norm over the square of the largest singular value
    rank_99: int  # number of singular values that hold 99 % of the squared norm
    cosine: float | None


@dataclass(frozen=True)
class TaskVector:
    """The folder that was written, what its matrices hold, and what was measured that speaks against its scale ('' for nothing)."""

    folder: Path
    form: str
    matrices: list[MatrixReport]
    remark: str = ""


def recombine(run: Run, sources: Sequence[Path], scale: float, rank: int | None, name: str) -> TaskVector:
    """Write `scale` x the first patch + the others, cut to `rank` (None: not cut), to `run.paths.adapter(name)`.

    Raises:
        ArtifactError: a folder holds no patch, or of another base than the run's; scale, rank or name cannot be used.
    """
    loaded, folder = run.model, run.paths.adapter(name)
    program = run.program if run.paths.program.is_file() else None  # the report compares with its vectors
    problems, patches, provenances = list[str](), list[WeightPatch](), list[Provenance]()
    if not math.isfinite(scale) or scale == 0.0:
        problems.append(f"the scale is {scale:g}; needed: a finite number other than 0.")
    if rank is not None and rank < 1:
        problems.append(f"the rank to cut to is {rank}; needed: 1 or more.")
    if Path(name).name != name or name in BACKENDS:
        problems.append(f"'{name}' cannot be the new name: a word without slashes that is no backend's is needed.")
    # Written to a temporary folder and exchanged, but the parents' hashes would be of folders that are gone.
    if real_path(folder) in [real_path(source) for source in sources]:
        problems.append(f"{folder} is read from and would be replaced; give another name.")
    for source in sources:
        try:
            provenances.append(Provenance.read_unedited(source, (loaded.id, loaded.revision)))
            patches.append(read_patch(source))
        except ArtifactError as error:
            problems += error.problems
    if problems:
        raise ArtifactError(problems)
    patch = scale * patches[0]
    for other in patches[1:]:
        patch = patch + other
    if rank is not None:
        patch = patch.truncated(rank, loaded.layout)
    parents = [artifact_sha256(source) for source in sources]
    words = " + ".join([f"{scale:g} x {sources[0].name}", *(source.name for source in sources[1:])])
    words += f", cut to rank {rank}" if rank else ""
    # The first patch's provenance, without the claims that no longer hold: nothing validated this combination.
    provenance = replace(
        provenances[0],
        name=run.paths.name,
        backend=name,
        form="adapter" if is_adapter(patch, loaded) else "patch",
        validation_sha256="",
        verdict="none",
        forced=any(provenance.forced or provenance.verdict != "pass" for provenance in provenances),
        seconds=0.0,
        inputs=digest([parents, scale, rank]),
        parent=" ".join(parents),
        recombined=words,
        described=words,
        biases=len(patch.bias),
    )
    write_patch(folder, patch, loaded, provenance, model_card(provenance, folder, None))
    parity = own_parity(sources[0]) if scale != 1 else None
    remark = parity.adapter.scale_remark if parity and parity.adapter else ""
    return TaskVector(folder, provenance.form, matrix_reports(patch, loaded.layout, program), remark)


def matrix_reports(patch: WeightPatch, layout: Layout, program: Program | None) -> list[MatrixReport]:
    """A report on every matrix that the patch changes, in the order of the blocks."""
    blocks = {name: block for block in range(layout.n_layers) for name in layout.linears(block)}
    order = {name: number for number, name in enumerate(blocks)}
    reports = []
    for name in sorted(patch.matrices, key=lambda name: order.get(name, -1)):  # embeddings come first
        U, S, V = patch.decompose(name, layout)
        squares = S.double().square()
        total = float(squares.sum())
        if total == 0.0:  # a direction of nothing is not defined
            reports.append(MatrixReport(name, 0.0, 0.0, 0, None))
            continue
        vector = vector_at(program, blocks[name]) if program is not None and name in blocks else None
        top = U[:, 0] if name in layout.output_projections else V[0]
        reports.append(
            MatrixReport(
                name,
                norm=total**0.5,
                stable_rank=total / float(squares[0]),
                rank_99=int((squares.cumsum(0) < _ENERGY * total).sum()) + 1,
                cosine=None if vector is None else abs(float(torch.cosine_similarity(top, vector, dim=0))),
            )
        )
    return reports


def vector_at(program: Program, block: int) -> Tensor | None:
    """The vector of the last active intervention at or below `block`."""
    below = [intervention for intervention in program.active if intervention.site.changes_from <= block]
    return max(below, key=lambda intervention: intervention.site.changes_from).vector.float() if below else None
