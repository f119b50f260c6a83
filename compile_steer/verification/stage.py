"""Reload one artifact from disk, compare it with the steered model, and check it against every gate."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, replace
from importlib.metadata import version
from pathlib import Path
from types import MappingProxyType

import torch

from compile_steer.artifacts.contents import unchanged
from compile_steer.artifacts.files import digest
from compile_steer.artifacts.provenance import REPORTS, Provenance, weights_sha256
from compile_steer.models.fingerprint import fingerprint, fingerprints_apart
from compile_steer.models.load import LoadedModel
from compile_steer.models.logprobs import final_states
from compile_steer.models.reload import reload, share_equal
from compile_steer.stats import Interval, bootstrap_effect_retained, bootstrap_ratio, equivalence
from compile_steer.verification.controls import adapter_controls, capability_retention
from compile_steer.verification.gates import judged
from compile_steer.verification.measured import Measured, ReadArtifact, measure, reads_alike, same_as, same_weights
from compile_steer.verification.parity import BehaviourMatch, Divergence, Parity
from compile_steer.verification.precision import measure_rounding, require_finite, require_half_range
from compile_steer.verification.reference import Reference

_EXACT_BACKENDS = frozenset({"bias", "orthogonalise", "retarget"})
_SHOWN = 8  # answered test prompts that a report keeps

_NOTHING: Mapping[str, str] = MappingProxyType({})


def verify_artifact(
    reference: Reference,
    folder: Path,
    program_sha256: str,
    inputs: Mapping[str, str] = _NOTHING,
    unmeasured: Mapping[str, str] = _NOTHING,
) -> Parity:
    """Measure the artifact at `folder` and check it. A missed gate is a result, not an exception.

    Args:
        inputs: hashes of what the reference was made from (recipe, data), which the report records.
        unmeasured: what the caller knows that this report cannot check, and why.

    Raises:
        ArtifactError: the artifact is missing, damaged, computes NaN, belongs to another program or base, or was written
            to while it was measured.
    """
    base, heldout, options = reference.model, reference.heldout, reference.options
    Provenance.read(folder)  # a folder that is not there is refused before its files are hashed
    with unchanged(folder, without=REPORTS) as hashes:
        origin = Provenance.read_unedited(folder, (base.id, base.revision), program_sha256, hashes)
        loaded_sha256 = weights_sha256(folder, hashes)
        # All that a report says of an artifact beside its names.
        recorded = [origin.form, origin.fingerprint, origin.chat, bool(origin.files_sha256)]
        key = digest([loaded_sha256, _is_exact(origin), *recorded])
        known = reference.by_files.get(key)
        parity = _with_names_of(origin, known) if known else _measure(reference, folder, origin)
    reference.by_files.setdefault(key, parity)  # now that nothing was written there meanwhile
    settings = {
        "verify": options.model_dump(mode="json"),
        "seed": reference.context.seed,
        "ask": reference.ask,
        "compile_steer": version("compile_steer"),  # whose rules the verdict follows
    }
    bound_to = {
        **inputs,
        "artifact": loaded_sha256,
        "program": program_sha256,
        "base": base.revision,
        "texts": digest([list(text.ids) for text in heldout]),
    }
    parity = replace(parity, settings=settings, sha256=bound_to, unmeasured={**parity.unmeasured, **unmeasured})
    return judged(parity, options.gates)


def _with_names_of(origin: Provenance, known: Parity) -> Parity:
    """What was measured of another artifact with the same files."""
    inherited = f"measurements are those of {known.backend} {known.form}: the files are the same"
    return replace(known, backend=origin.backend, compile_seconds=origin.seconds, inherited=inherited)


def _is_exact(origin: Provenance) -> bool:
    return origin.backend in _EXACT_BACKENDS


def _measure(reference: Reference, folder: Path, origin: Provenance) -> Parity:
    """Measure the artifact whose provenance is `origin`; nothing is checked yet."""
    base, options = reference.model, reference.options
    # Reload it as a user's stack would.
    artifact = reload(folder, base)
    # Quantising costs so much by itself that what a GGUF file changes is measured from the base quantised the same way. A
    # cast to half precision costs little beside a compile.
    quantized = reference.quantized(origin.form, folder)
    if quantized:  # all but the edited matrices, which are as large as the base
        share_equal(artifact.model, quantized.model.model)
    artifact = replace(artifact, below=(quantized or reference).model.below)
    against = quantized if quantized and origin.form.startswith("gguf-") else reference
    log_p = [] if quantized else fingerprint(artifact.model, base)
    read = ReadArtifact(origin, artifact, reference.texts_of(artifact), log_p)
    measured, inherited = _measured_once(reference, against, folder, read, quantized)
    capability = None
    if options.capability:
        capability = capability_retention(*against.correct, measured.correct, options.gates.score_margin)
    controls = None
    if origin.form == "adapter":
        controls = adapter_controls(reference, artifact, measured.states, measured.margins)
    file_error, unmeasured = _measure_file(read, rounded=quantized is not None)
    if not origin.files_sha256:
        unmeasured["files"] = (
            "the record has no hashes of its files: whether they are as they were written is not known"
        )
    return Parity(
        backend=origin.backend,
        form=origin.form,
        exact=_is_exact(origin),
        compute_dtype=str(base.model.dtype).removeprefix("torch."),
        compile_seconds=origin.seconds,
        same_tokens=read.texts.heldout == reference.texts.heldout,
        file_error=file_error,
        inherited=inherited,
        divergence=measure_divergence(reference, against, measured),
        behaviour=measure_behaviour(reference, against, measured),
        prompt_sets=measured.prompt_sets,
        wordings=measured.wordings,
        contexts=measured.contexts,
        capability=capability,
        adapter=controls,
        rounding=measure_rounding(reference, quantized, artifact, measured.states, quantising=against is quantized)
        if quantized
        else None,
        remarks=[
            *reference.context.notes,
            *_other_prompts(base, origin),
            *reference.prompt_sets.remarks,
            *reference.contexts.remarks,
        ],
        unmeasured=unmeasured,
        sha256={},
    )


def _measured_once(
    reference: Reference, against: Reference, folder: Path, read: ReadArtifact, quantized: Reference | None
) -> tuple[Measured, str]:
    """What the artifact does, and of which other model that was measured, '' if of none.

    `against` as in `measure_divergence`; `quantized` is the reference of the base rounded as the artifact is.
    """
    origin, artifact = read.origin, read.loaded
    alike = reads_alike(reference, read, quantized.model if quantized else None)
    if same := same_weights(reference, read) if alike else None:
        measured, reason = same
        inherited = f"KL, behaviour, control text and capability are those of {measured.name}: {reason}"
    else:
        states = final_states(artifact, reference.heldout)
        require_finite(folder, artifact, reference.heldout, states)  # NaN compares with nothing
        if origin.form == "merged-fp16":
            require_half_range(folder, artifact, reference.heldout)
        kl = reference.kl_from_steered(artifact, states)
        near = same_as(reference, artifact, states, kl, rounded=quantized is not None) if alike else None
        if near:
            known, reason = near
            inherited = f"behaviour, control text and capability are those of {known.name}: {reason}"
            log_p = read.fingerprint
            measured = replace(known, name=read.name, model=artifact, states=states, kl=kl, fingerprint=log_p)
        else:
            inherited, measured = "", measure(reference, against, read, states, kl)
    # Of the forms with fewer bits many weights are their own: kept, each would be a model in memory.
    if alike and not same and origin.has_all_bits:
        reference.measured.append(measured)
    return measured, inherited


def _other_prompts(base: LoadedModel, origin: Provenance) -> list[str]:
    """A remark where the artifact was compiled for prompts that the chat template makes differently here."""
    if not origin.chat or origin.chat == asdict(base.chat):
        return []
    return [f"compiled with the chat template's settings {origin.chat}, verified with {asdict(base.chat)}"]


def _measure_file(read: ReadArtifact, *, rounded: bool) -> tuple[float | None, dict[str, str]]:
    """How far the file is from the weights that the compiler had in memory; None, and why, where that cannot be measured."""
    origin, recorded, on_disk, dtype = read.origin, read.origin.fingerprint, read.fingerprint, read.loaded.model.dtype
    if rounded:
        reason = f"{origin.form} stores fewer bits than the compiler had in memory: rounding would hide a difference"
    elif dtype != torch.float32:
        reason = f"computed in {str(dtype).removeprefix('torch.')}, whose rounding would hide a difference"
    elif not recorded:
        reason = (
            "the compiler recorded no log p of its weights in memory (it computed in less than float32, or is older)"
        )
    else:
        if len(on_disk) == len(recorded):
            return fingerprints_apart(on_disk, recorded), {}
        reason = f"the compiler recorded log p of {len(recorded)} texts, this version reads {len(on_disk)}"
    return None, {"on disk": reason}


def measure_divergence(reference: Reference, against: Reference, measured: Measured) -> Divergence:
    """The next-token distributions on the held-out texts.

    `against` is the reference of the base rounded as the artifact is, where that costs much; for gain and control text.
    """
    states, kl = measured.states, measured.kl
    kl_base, seed = reference.kl_base, reference.context.seed
    # The text is the unit of both intervals: tokens of one text share its topic, so they are not independent.
    mean = bootstrap_ratio(kl.kl, torch.ones_like(kl.kl), states.texts, seed=seed)
    # Least squares of the compiled change of the final hidden states [n, d_model] on the steered change.
    steered = (against.states.steered.response - against.states.base.response).double()
    compiled = (states.response - against.states.base.response).double()
    size = steered.square().sum()
    return Divergence(
        kl=Interval(kl.mean, mean.low, mean.high),
        kl_rms=kl.rms,
        kl_p99=kl.p99,
        kl_remaining=bootstrap_ratio(kl.kl, kl_base.kl, states.texts, seed=seed),
        kl_base=kl_base.mean,
        kl_prompt=measured.kl_prompt,
        top1=kl.top1_agreement,
        top1_interval=bootstrap_ratio(kl.same_top1, torch.ones_like(kl.kl), states.texts, seed=seed),
        top1_base=kl_base.top1_agreement,
        gain=float((steered * compiled).sum() / size),
        hidden_error=float(((compiled - steered).square().sum() / size).sqrt()),
        kl_control_steered=against.kl_control_steered,
        kl_control=measured.kl_control,
        n_tokens=len(kl.kl),
        n_texts=len(reference.heldout),
    )


def measure_behaviour(reference: Reference, against: Reference, measured: Measured) -> BehaviourMatch:
    """Behaviour on the test pairs and prompts; `against` as in `measure_divergence`, for the margins."""
    base, steered = reference.answers
    compiled, margins = measured.answers, measured.margins
    limits, gates = reference.equivalence_margins, reference.options.gates
    within = limits.get("log-likelihood margin")
    sampled, score = measured.score
    return BehaviourMatch(
        effect_retained=bootstrap_effect_retained(*against.margins, margins, seed=reference.context.seed),
        margin=equivalence("log-likelihood margin", margins - against.margins.steered, within) if within else None,
        score=score or equivalence("score", compiled.scores - steered.scores, limits["score"]),
        sampled=sampled,
        answers=[
            dict(zip(("prompt", "base", "steered", "compiled"), row, strict=True))
            for row in zip(reference.prompts[:_SHOWN], base.texts, steered.texts, compiled.texts, strict=False)
        ],
        score_base=float(base.scores.mean()),
        score_steered=float(steered.scores.mean()),
        score_compiled=float(compiled.scores.mean()),
        repetition=equivalence("repetition", compiled.repetition - steered.repetition, gates.repetition_margin),
        repetition_steered=float(steered.repetition.mean()),
        repetition_compiled=float(compiled.repetition.mean()),
        n_pairs=len(margins),
        n_prompts=len(compiled.scores),
        sample=measured.sample,
    )
