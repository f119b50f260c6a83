"""Reload one artifact from disk, compare it with the steered model, and check it against every gate."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from compile_steer.artifacts.files import digest
from compile_steer.artifacts.provenance import Provenance, weights_sha256
from compile_steer.common.errors import ArtifactError
from compile_steer.models.load import LoadedModel
from compile_steer.models.logprobs import FinalStates, final_states, fingerprint
from compile_steer.models.reload import reload
from compile_steer.models.tokens import encode
from compile_steer.stats import Interval, bootstrap_ratio, bootstrap_recovery, equivalence
from compile_steer.verification.controls import adapter_controls, capability_retention, correct_answers
from compile_steer.verification.gates import check
from compile_steer.verification.parity import BehaviourMatch, Divergence, Parity
from compile_steer.verification.precision import measure_rounding, require_finite, require_half_range
from compile_steer.verification.reference import Reference

_EXACT_BACKENDS = frozenset({"bias", "orthogonalise", "retarget"})


def verify_artifact(reference: Reference, folder: Path, program_sha256: str) -> Parity:
    """Measure the artifact at `folder` and check it. A missed gate is a result, not an exception.

    Raises:
        ArtifactError: the artifact is missing, damaged, computes NaN, or belongs to another program or base.
    """
    base, texts, options = reference.model, reference.texts, reference.options
    origin = require_same_origin(folder, base.id, base.revision, program_sha256)

    # Reload it as a user's stack would, and refuse what has overflowed: NaN compares with nothing.
    artifact = reload(folder, base)
    states = final_states(artifact, texts.heldout)
    require_finite(folder, artifact, texts.heldout, states)
    if origin.form == "merged-fp16":
        require_half_range(folder, artifact, texts.heldout)

    # Quantising costs so much by itself that what a GGUF file changes is measured from the base quantised the same way. A
    # cast to half precision costs little beside a compile.
    quantized = reference.quantized(origin.form, folder)
    against = quantized if quantized is not None and origin.form.startswith("gguf-") else reference

    # Measure.
    margins = reference.margins_of(artifact)
    sets, set_scores = reference.prompt_sets.compare(artifact)
    capability = None
    if options.capability:
        correct = correct_answers(artifact, options.capability)
        capability = capability_retention(
            against.base_correct, against.steered_correct, correct, options.gates.score_margin
        )
    parity = Parity(
        backend=origin.backend,
        form=origin.form,
        exact=origin.backend in _EXACT_BACKENDS,
        compute_dtype=str(base.model.dtype).removeprefix("torch."),
        compile_seconds=origin.seconds,
        same_tokens=all(
            encode(artifact.tokenizer, text) == encode(base.tokenizer, text) for text in reference.context.data.heldout
        ),
        file_error=None
        if quantized is not None
        else _file_error(fingerprint(artifact.model, base), origin.fingerprint),
        divergence=measure_divergence(reference, against, artifact, states),
        behaviour=measure_behaviour(reference, against, artifact, margins, set_scores),
        prompt_sets=sets,
        capability=capability,
        adapter=adapter_controls(reference, artifact, margins) if origin.form == "adapter" else None,
        rounding=None if quantized is None else measure_rounding(reference, quantized, artifact, states),
        remarks=reference.prompt_sets.remarks,
        sha256={
            "artifact": weights_sha256(folder),
            "program": program_sha256,
            "base": base.revision,
            "texts": digest([list(text.ids) for text in texts.heldout]),
        },
    )

    # Check.
    reasons = check(parity, options.gates)
    return replace(parity, passed=not reasons, reasons=reasons)


def measure_divergence(
    reference: Reference, against: Reference, artifact: LoadedModel, states: FinalStates
) -> Divergence:
    """The next-token distributions, given the artifact's `states` on the held-out texts; gain and control text `against` the
    base rounded as the artifact is, if that costs much."""
    kl, kl_base, seed = reference.kl_from_steered(artifact, states), reference.kl_base, reference.context.seed
    # The text is the unit of both intervals: tokens of one text share its topic, so they are not independent.
    mean = bootstrap_ratio(kl.kl, torch.ones_like(kl.kl), states.texts, seed=seed)
    remaining = bootstrap_ratio(kl.kl, kl_base.kl, states.texts, seed=seed)
    # Least squares of the compiled change of the final hidden states [n, d_model] on the steered change.
    steered = (against.steered_heldout.response - against.base_heldout.response).double()
    compiled = (states.response - against.base_heldout.response).double()
    size = steered.square().sum()
    return Divergence(
        kl=Interval(kl.mean, mean.low, mean.high),
        kl_rms=kl.rms,
        kl_p99=kl.p99,
        kl_remaining=remaining,
        kl_base=kl_base.mean,
        kl_prompt=reference.kl_prompt(artifact, states),
        top1=kl.top1_agreement,
        top1_base=kl_base.top1_agreement,
        gain=float((steered * compiled).sum() / size),
        hidden_error=float(((compiled - steered).square().sum() / size).sqrt()),
        kl_control_steered=against.kl_control,
        kl_control=against.kl_from_base_on_control(artifact),
        n_tokens=len(kl.kl),
        n_texts=len(reference.texts.heldout),
    )


def measure_behaviour(
    reference: Reference,
    against: Reference,
    artifact: LoadedModel,
    margins: np.ndarray,
    set_scores: np.ndarray | None,
) -> BehaviourMatch:
    """Behaviour on the test pairs, given the artifact's log-likelihood `margins` [n_pairs], and on prompts, given the scores
    of its answers to the prompt sets [n_prompts]."""
    limits, gates = reference.equivalence_margins, reference.options.gates
    base, steered = reference.answers
    ((compiled, sample),) = reference.answers_of(artifact, None)
    margin = sets = None
    if limits.margin:
        margin = equivalence("log-likelihood margin", margins - against.steered_margins, limits.margin)
    steered_set_scores = reference.prompt_sets.steered_scores
    if set_scores is not None and steered_set_scores is not None and limits.prompt_sets is not None:
        sets = equivalence("score by prompt set", set_scores - steered_set_scores, limits.prompt_sets)
    return BehaviourMatch(
        effect_retained=bootstrap_recovery(
            against.base_margins, against.steered_margins, margins, seed=reference.context.seed
        ),
        margin=margin,
        score=equivalence("score", compiled.scores - steered.scores, limits.score),
        score_base=float(base.scores.mean()),
        score_steered=float(steered.scores.mean()),
        score_compiled=float(compiled.scores.mean()),
        prompt_sets=sets,
        repetition=equivalence("repetition", compiled.repetition - steered.repetition, gates.repetition_margin),
        repetition_steered=float(steered.repetition.mean()),
        repetition_compiled=float(compiled.repetition.mean()),
        n_pairs=len(margins),
        n_prompts=len(compiled.scores),
        sample=sample,
    )


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


def _file_error(now: list[float], compiled: list[float]) -> float | None:
    """The largest difference of the mean log p of the fixed texts from what the compiler recorded; None if it did not."""
    if not compiled or len(now) != len(compiled):
        return None
    return max(abs(one - other) for one, other in zip(now, compiled, strict=True))
