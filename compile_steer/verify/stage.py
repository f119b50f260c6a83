"""Reload one artifact from disk and hold it against the reference."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Protocol

import numpy as np
import torch

from compile_steer.artifacts.files import digest
from compile_steer.artifacts.provenance import Provenance, weights_sha256
from compile_steer.common.errors import ArtifactError
from compile_steer.models.load import LoadedModel
from compile_steer.models.logprobs import FinalStates, final_states, fingerprint
from compile_steer.models.reload import reload
from compile_steer.models.tokens import encode
from compile_steer.stats import Equivalence, bootstrap_ratio, bootstrap_recovery, equivalence
from compile_steer.verify.adapter_controls import adapter_controls
from compile_steer.verify.adapter_scale import dials
from compile_steer.verify.capability import Capability, answered, compared
from compile_steer.verify.options import Gates
from compile_steer.verify.overflow import require_finite, require_half_range
from compile_steer.verify.parity import Distance, Likeness, Parity, Rounding, judge
from compile_steer.verify.quantized import Rounded, rounding_of
from compile_steer.verify.reference import CONTROL_PAIRS, Behaving, Reference, behave

_EXACT_BACKENDS = frozenset({"bias", "orthogonalise", "retarget"})


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
    stored = rounding_of(origin.form, folder, reference.base)
    rounded = None if stored is None else reference.rounded(*stored)
    ends: Ends = rounded if rounded is not None and origin.form.startswith("gguf-") else reference
    (behaving,) = behave(artifact, reference.behaviour, reference.recipe, reference.score, [None])
    kinds, scores = reference.kinds.measure(artifact)
    adapter = origin.form == "adapter"
    parity = Parity(
        **vars(_distance(reference, artifact, states, rounded, ends)),
        **vars(_likeness(reference, behaving, ends)),
        backend=origin.backend,
        form=origin.form,
        exact=origin.backend in _EXACT_BACKENDS,
        kinds=kinds,
        neutral_drift_steered=ends.neutral_drift,
        neutral_drift_compiled=ends.drift(artifact, final_states(artifact, reference.neutral)),
        same_tokens=_same_tokens(reference, artifact),
        compile_seconds=origin.seconds,
        sha256={
            "artifact": weights_sha256(folder),
            "program": program_sha256,
            "base": reference.base.revision,
            "texts": digest([list(one.ids) for one in reference.heldout]),
        },
        compute_dtype=str(reference.base.model.dtype).removeprefix("torch."),
        capability=_capability(reference, artifact, ends),
        rounding=None if rounded is None else _rounding(rounded, artifact, states),
        controls=adapter_controls(reference, artifact, behaving.contrast, CONTROL_PAIRS) if adapter else None,
        dial=dials(reference, artifact) if adapter else [],
        score_by_kind=_score_by_kind(reference, scores),
        file_error=_file_error(reference, artifact, origin) if rounded is None else None,
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
    problems += origin.edits(folder)
    if problems:
        raise ArtifactError([*problems, "Compile again, or name the recipe that made it."])
    return origin


def _same_tokens(reference: Reference, artifact: LoadedModel) -> bool:
    return all(
        encode(artifact.tokenizer, prompt) == encode(reference.base.tokenizer, prompt)
        for prompt in reference.behaviour.heldout
    )


class Ends(Protocol):
    """A model without and with the program's hooks: what a compiled model lies between, and is to be the second of."""

    base_heldout: FinalStates
    steered_heldout: FinalStates

    @property
    def base_contrast(self) -> np.ndarray: ...

    @property
    def steered_contrast(self) -> np.ndarray: ...

    @property
    def base_able(self) -> np.ndarray: ...

    @property
    def steered_able(self) -> np.ndarray: ...

    @property
    def neutral_drift(self) -> float: ...

    def drift(self, other: LoadedModel, states: FinalStates) -> float: ...


def _rounding(rounded: Rounded, artifact: LoadedModel, states: FinalStates) -> Rounding:
    found, edited = rounded.from_steered(artifact, states), rounded.edited(artifact)
    return Rounding(
        kl_base=rounded.kl_base,
        kl=found.mean,
        share=found.mean / rounded.changed,
        kl_changed=rounded.changed,
        edited=len(edited),
        kl_edited=rounded.cost_of(edited),
    )


def _distance(
    reference: Reference, artifact: LoadedModel, states: FinalStates, rounded: Rounded | None, ends: Ends
) -> Distance:
    noise = None if rounded is None else rounded.noise
    found, base = reference.from_steered(artifact, states), reference.base_divergence
    seed, ones = reference.recipe.seed, torch.ones_like(found.kl)
    kl, share = (bootstrap_ratio(found.kl, below, states.texts, seed=seed) for below in (ones, base.kl))
    dose, error = _dose(ends.base_heldout.response, ends.steered_heldout.response, states.response)
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


def _likeness(reference: Reference, behaving: Behaving, ends: Ends) -> Likeness:
    base, steered, margins = reference.base_behaving, reference.steered_behaving, reference.margins
    recovery = bootstrap_recovery(
        ends.base_contrast, ends.steered_contrast, behaving.contrast, seed=reference.recipe.seed
    )
    moves = margins.contrast != 0
    return Likeness(
        recovery=None if recovery is None else recovery.value,
        recovery_low=None if recovery is None else recovery.low,
        recovery_high=None if recovery is None else recovery.high,
        score_base=float(base.scores.mean()),
        score_steered=float(steered.scores.mean()),
        score_compiled=float(behaving.scores.mean()),
        contrast=equivalence("log-likelihood margin", behaving.contrast - ends.steered_contrast, margins.contrast)
        if moves
        else None,
        score=equivalence("score", behaving.scores - steered.scores, margins.score),
        repetition_steered=float(steered.repetition.mean()),
        repetition_compiled=float(behaving.repetition.mean()),
        n_pairs=len(base.contrast),
        n_prompts=len(base.scores),
        sample=behaving.sample,
    )


def _file_error(reference: Reference, artifact: LoadedModel, origin: Provenance) -> float | None:
    if not origin.fingerprint:
        return None
    found = fingerprint(artifact.model, reference.base)
    if len(found) != len(origin.fingerprint):
        return None
    return max(abs(one - other) for one, other in zip(found, origin.fingerprint, strict=True))


def _score_by_kind(reference: Reference, found: np.ndarray | None) -> Equivalence | None:
    steered, margin = reference.kinds.steered_scores, reference.margins.by_kind
    if found is None or steered is None or margin is None:
        return None
    return equivalence("score by prompt set", found - steered, margin)


def _capability(reference: Reference, artifact: LoadedModel, ends: Ends) -> Capability | None:
    options = reference.recipe.verify
    if not options.capability:
        return None
    found = answered(artifact, options.capability)
    return compared(ends.base_able, ends.steered_able, found, options.gates.score_margin)


def _dose(base: torch.Tensor, steered: torch.Tensor, compiled: torch.Tensor) -> tuple[float, float]:
    """(factor, relative error) of the compiled change of the states [n, d] fitted on the steered change."""
    wanted, got = (steered - base).double(), (compiled - base).double()
    size = wanted.square().sum()
    return float((wanted * got).sum() / size), float(((got - wanted).square().sum() / size).sqrt())
