"""Reload one artifact from disk and hold it against the reference."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch

from compile_steer.errors import ArtifactError
from compile_steer.files import digest
from compile_steer.metrics import Divergence, bootstrap_ratio, bootstrap_recovery
from compile_steer.models import Loaded
from compile_steer.observe import States, final_states
from compile_steer.provenance import Provenance, weights_sha256
from compile_steer.reload import reload
from compile_steer.settings import Gates
from compile_steer.tokens import encode
from compile_steer.verify.controls import adapter_controls
from compile_steer.verify.dial import dials
from compile_steer.verify.equivalence import equivalence
from compile_steer.verify.overflow import require_finite, require_half_range
from compile_steer.verify.parity import Distance, Likeness, Parity, judge
from compile_steer.verify.reference import CONTROL_PAIRS, Behaving, Reference, behave

_EXACT_BACKENDS = frozenset({"bias", "orthogonalise", "retarget"})
_ROUNDED = {"merged-bf16": torch.bfloat16, "merged-fp16": torch.float16}


def verify_artifact(reference: Reference, folder: Path, program_sha256: str, gates: Gates) -> Parity:
    """Measure the artifact at `folder` and judge it. A failed check is a result, not an exception.

    Raises:
        ArtifactError: the artifact is missing, damaged, computes NaN, or belongs to another program or base.
    """
    origin = require_same_origin(folder, reference.base.id, reference.base.revision, program_sha256)
    artifact = reload(folder, reference.base)
    states = final_states(artifact, reference.heldout)
    require_finite(folder, artifact, reference.heldout, states)
    if origin.form == "merged-fp16":
        require_half_range(folder, artifact, reference.heldout)
    noise = reference.precision_noise(_ROUNDED[origin.form]) if origin.form in _ROUNDED else None
    (behaving,) = behave(artifact, reference.behaviour, reference.recipe, reference.score, [None])
    adapter = origin.form == "adapter"
    parity = Parity(
        **vars(_distance(reference, artifact, states, noise)),
        **vars(_likeness(reference, behaving)),
        backend=origin.backend,
        form=origin.form,
        exact=origin.backend in _EXACT_BACKENDS,
        kinds=reference.kinds.measure(artifact),
        neutral_drift_steered=reference.neutral_drift,
        neutral_drift_compiled=reference.drift(artifact, final_states(artifact, reference.neutral)),
        same_tokens=_same_tokens(reference, artifact),
        compile_seconds=origin.seconds,
        sha256={
            "artifact": weights_sha256(folder),
            "program": program_sha256,
            "base": reference.base.revision,
            "texts": digest([list(one.ids) for one in reference.heldout]),
        },
        compute_dtype=str(reference.base.model.dtype).removeprefix("torch."),
        controls=adapter_controls(reference, artifact, behaving.contrast, CONTROL_PAIRS) if adapter else None,
        dial=dials(reference, artifact) if adapter else [],
        remarks=reference.kinds.remarks,
    )
    reasons = judge(parity, gates)
    return replace(parity, passed=not reasons, reasons=reasons)


def require_same_origin(folder: Path, model: str, revision: str, program_sha256: str) -> Provenance:
    """The artifact's provenance; raises `ArtifactError` if it is of another program or base, or damaged."""
    origin = Provenance.read(folder)
    problems = []
    if origin.program_sha256 != program_sha256:
        problems.append(
            f"{folder} was compiled from another program (SHA-256 {origin.program_sha256[:12]}, found {program_sha256[:12]})."
        )
    if (origin.model, origin.revision) != (model, revision):
        problems.append(
            f"{folder} was compiled for {origin.model} at {origin.revision}; the base here is {model} at {revision}."
        )
    problems += origin.tampered(folder)
    if problems:
        raise ArtifactError([*problems, "Compile again, or name the recipe that made it."])
    return origin


def _same_tokens(reference: Reference, artifact: Loaded) -> bool:
    return all(
        encode(artifact.tokenizer, prompt) == encode(reference.base.tokenizer, prompt)
        for prompt in reference.behaviour.heldout
    )


def _distance(reference: Reference, artifact: Loaded, states: States, noise: Divergence | None) -> Distance:
    found, base = reference.from_steered(artifact, states), reference.base_divergence
    seed, ones = reference.recipe.seed, torch.ones_like(found.kl)
    kl, share = (bootstrap_ratio(found.kl, below, states.texts, seed=seed) for below in (ones, base.kl))
    dose, error = _dose(reference.base_heldout.response, reference.steered_heldout.response, states.response)
    return Distance(
        kl_per_token=found.mean,
        kl_rms=found.rms,
        kl_p99=found.p99,
        kl_low=kl.low,
        kl_high=kl.high,
        kl_share=share.value,
        kl_share_low=share.low,
        kl_share_high=share.high,
        kl_base=base.mean,
        kl_prompt=reference.prompt_kl(artifact, states),
        top1_agreement=found.top1_agreement,
        top1_base=base.top1_agreement,
        noise_kl=0.0 if noise is None else noise.mean,
        noise_top1=1.0 if noise is None else noise.top1_agreement,
        hidden_error=error,
        dose=dose,
        n_tokens=len(found.kl),
        n_texts=len(reference.heldout),
    )


def _likeness(reference: Reference, behaving: Behaving) -> Likeness:
    base, steered, margins = reference.base_behaving, reference.steered_behaving, reference.margins
    recovery = bootstrap_recovery(base.contrast, steered.contrast, behaving.contrast, seed=reference.recipe.seed)
    moves = margins.contrast != 0
    return Likeness(
        recovery=None if recovery is None else recovery.value,
        recovery_low=None if recovery is None else recovery.low,
        recovery_high=None if recovery is None else recovery.high,
        score_base=float(base.scores.mean()),
        score_steered=float(steered.scores.mean()),
        score_compiled=float(behaving.scores.mean()),
        contrast=equivalence("contrast", behaving.contrast - steered.contrast, margins.contrast) if moves else None,
        score=equivalence("score", behaving.scores - steered.scores, margins.score),
        repetition_steered=float(steered.repetition.mean()),
        repetition_compiled=float(behaving.repetition.mean()),
        n_pairs=len(base.contrast),
        n_prompts=len(base.scores),
        sample=behaving.sample,
    )


def _dose(base: torch.Tensor, steered: torch.Tensor, compiled: torch.Tensor) -> tuple[float, float]:
    """(factor, relative error) of the compiled change of the states [n, d] fitted on the steered change."""
    wanted, got = (steered - base).double(), (compiled - base).double()
    size = wanted.square().sum()
    return float((wanted * got).sum() / size), float(((got - wanted).square().sum() / size).sqrt())
