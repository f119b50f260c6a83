"""Reload one artifact from disk, compare it with the steered model, and check it against every gate."""

from __future__ import annotations

from collections.abc import Iterator
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
from compile_steer.stats import Interval, bootstrap_effect_retained, bootstrap_ratio, equivalence
from compile_steer.verification.controls import adapter_controls, capability_retention, correct_answers
from compile_steer.verification.options import Gates
from compile_steer.verification.parity import BehaviourMatch, Divergence, Parity
from compile_steer.verification.precision import measure_rounding, require_finite, require_half_range
from compile_steer.verification.reference import Reference

_EXACT_BACKENDS = frozenset({"bias", "orthogonalise", "retarget"})
# KL grows only with the square of the error of the strength, so a small divergence alone lets 10 % too much or too little
# pass. The gain shows it directly.
_GAIN_MARGIN = 0.05
# nats per token: summing in another order in fp32 changes a hundredth of this. A compile may be 2 % off; its file may not be.
_FILE_MARGIN = 1e-4


def verify_artifact(reference: Reference, folder: Path, program_sha256: str) -> Parity:
    """Measure the artifact at `folder` and check it. A missed gate is a result, not an exception.

    Raises:
        ArtifactError: the artifact is missing, damaged, computes NaN, or belongs to another program or base.
    """
    base, heldout, options = reference.model, reference.heldout, reference.options
    origin = require_same_origin(folder, base.id, base.revision, program_sha256)

    # Reload it as a user's stack would, and refuse what has overflowed: NaN compares with nothing.
    artifact = reload(folder, base)
    states = final_states(artifact, heldout)
    require_finite(folder, artifact, heldout, states)
    if origin.form == "merged-fp16":
        require_half_range(folder, artifact, heldout)

    # Quantising costs so much by itself that what a GGUF file changes is measured from the base quantised the same way. A
    # cast to half precision costs little beside a compile.
    quantized = reference.quantized(origin.form, folder)
    against = quantized if quantized and origin.form.startswith("gguf-") else reference

    # Measure, in the order of the report's sections.
    margins = reference.margins_of(artifact)
    sets, set_scores = reference.prompt_sets.compare(artifact)
    capability = None
    if options.capability:
        correct = correct_answers(artifact, options.capability)
        capability = capability_retention(*against.correct, correct, options.gates.score_margin)
    parity = Parity(
        backend=origin.backend,
        form=origin.form,
        exact=origin.backend in _EXACT_BACKENDS,
        compute_dtype=str(base.model.dtype).removeprefix("torch."),
        compile_seconds=origin.seconds,
        same_tokens=all(
            encode(artifact.tokenizer, text) == encode(base.tokenizer, text) for text in reference.context.data.heldout
        ),
        file_error=None if quantized else _file_error(fingerprint(artifact.model, base), origin.fingerprint),
        divergence=measure_divergence(reference, against, artifact, states),
        behaviour=measure_behaviour(reference, against, artifact, margins, set_scores),
        prompt_sets=sets,
        capability=capability,
        adapter=adapter_controls(reference, artifact, margins) if origin.form == "adapter" else None,
        rounding=measure_rounding(reference, quantized, artifact, states) if quantized else None,
        remarks=reference.prompt_sets.remarks,
        sha256={
            "artifact": weights_sha256(folder),
            "program": program_sha256,
            "base": base.revision,
            "texts": digest([list(text.ids) for text in heldout]),
        },
    )

    # Check.
    reasons = check(parity, options.gates)
    return replace(parity, passed=not reasons, reasons=reasons)


def measure_divergence(
    reference: Reference, against: Reference, artifact: LoadedModel, states: FinalStates
) -> Divergence:
    """The next-token distributions.

    Args:
        against: the reference of the base rounded as the artifact is, where that costs much; for gain and control text.
        states: the artifact's final hidden states on the held-out texts.
    """
    kl, kl_base, seed = reference.kl_from_steered(artifact, states), reference.kl_base, reference.context.seed
    # The text is the unit of both intervals: tokens of one text share its topic, so they are not independent.
    mean = bootstrap_ratio(kl.kl, torch.ones_like(kl.kl), states.texts, seed=seed)
    remaining = bootstrap_ratio(kl.kl, kl_base.kl, states.texts, seed=seed)
    # Least squares of the compiled change of the final hidden states [n, d_model] on the steered change.
    steered = (against.states.steered.response - against.states.base.response).double()
    compiled = (states.response - against.states.base.response).double()
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
        n_texts=len(reference.heldout),
    )


def measure_behaviour(
    reference: Reference,
    against: Reference,
    artifact: LoadedModel,
    margins: np.ndarray,
    set_scores: np.ndarray | None,
) -> BehaviourMatch:
    """Behaviour on the test pairs, the test prompts and the prompt sets.

    Args:
        against: as in `measure_divergence`; for the margins.
        margins: the artifact's log-likelihood margins, [n_pairs].
        set_scores: scores of its answers to the prompt sets, [n_prompts]; None where they cannot be scored.
    """
    limits, gates = reference.equivalence_margins, reference.options.gates
    base, steered = reference.answers
    ((compiled, sample),) = reference.answers_of(artifact, None)
    steered_set_scores = reference.prompt_sets.steered_scores
    margin = sets = None
    if "log-likelihood margin" in limits:
        limit = limits["log-likelihood margin"]
        margin = equivalence("log-likelihood margin", margins - against.margins.steered, limit)
    if set_scores is not None and steered_set_scores is not None:
        sets = equivalence("score by prompt set", set_scores - steered_set_scores, limits["score by prompt set"])
    return BehaviourMatch(
        effect_retained=bootstrap_effect_retained(*against.margins, margins, seed=reference.context.seed),
        margin=margin,
        score=equivalence("score", compiled.scores - steered.scores, limits["score"]),
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
    """The largest difference of the reference texts' mean log p from what the compiler recorded; None if it recorded none."""
    if not compiled or len(now) != len(compiled):
        return None
    return max(abs(one - other) for one, other in zip(now, compiled, strict=True))


# ------------------------------------------------------------------------------------------ gates


def check(parity: Parity, gates: Gates) -> list[str]:
    """Every gate that the artifact misses, in words; empty where it passes."""
    checks = (check_divergence, check_behaviour, check_prompt_sets, check_adapter)
    return [*check_file(parity), *(reason for one in checks for reason in one(parity, gates))]


def check_file(parity: Parity) -> Iterator[str]:
    """The file is what was compiled, and its tokenizer is the base's."""
    if parity.file_error is not None and not parity.file_error <= _FILE_MARGIN:
        yield (
            f"it is not what was compiled: mean log p of a fixed text is {parity.file_error:.1e} nats a token from what the "
            f"compiler's weights gave before they were written; at most {_FILE_MARGIN:.0e}"
        )
    if not parity.same_tokens:
        yield "the artifact's tokenizer splits held-out prompts differently from the base's"


def check_divergence(parity: Parity, gates: Gates) -> Iterator[str]:
    """The next-token distributions on held-out and control text are the steered model's."""
    d, rounding, noise_kl = parity.divergence, parity.rounding, parity.noise_kl
    # The artifact may cost as much as its precision costs the steered model; twice, because the two roundings are independent.
    most = (gates.exact_kl if parity.exact else gates.kl_remaining * d.kl_base) + 2 * noise_kl
    least = (gates.exact_top1 if parity.exact else gates.top1) - 2 * (1 - (rounding.top1_steered if rounding else 1.0))
    if not d.kl.value <= most:
        yield f"KL {d.kl.value:.2e} nats a token (remaining {d.kl_remaining.value:.2%}); at most {most:.2e}"
    if rounding is not None and parity.form.startswith("gguf-"):
        # Quantising may cost more than a wrong compile does, so the compile is measured on the base quantised the same way.
        # What is left of the quantisation there is that edited matrices are rounded anew.
        most = gates.exact_kl if parity.exact else gates.kl_remaining * rounding.kl_changed
        most += 2 * rounding.kl_edited
        if not rounding.kl <= most:
            yield (
                f"KL {rounding.kl:.2e} nats a token (remaining {rounding.kl_remaining:.2%}) from the hooks on the base "
                f"quantised the same way; at most {most:.2e}"
            )
    # Exact backends agree at the prompts' positions to about 1e-11, so this cannot fail one. For other backends there is no
    # threshold that sound artifacts were measured against, and what rounding costs there is not measured.
    if parity.exact and noise_kl == 0 and not d.kl_prompt <= gates.exact_kl:
        yield f"KL {d.kl_prompt:.2e} nats a token at the prompts' positions; at most {gates.exact_kl:.2e}"
    if not d.top1 >= least:
        yield f"top-1 agreement {d.top1:.2%}; at least {least:.2%}"
    if not abs(d.gain - 1) <= _GAIN_MARGIN:
        yield f"the gain is {d.gain:.3f} of the steered model's change; needed 1 +- {_GAIN_MARGIN:g}"
    most = d.kl_control_steered + gates.control_kl_margin
    if not d.kl_control <= most:
        yield f"control text: KL from the base {d.kl_control:.4f} nats a token; at most {most:.4f}"


def check_behaviour(parity: Parity, gates: Gates) -> Iterator[str]:
    """The behaviour is the steered model's, and no ability was lost."""
    b = parity.behaviour
    if b.effect_retained is None:
        yield "the steered model's log-likelihood margin does not differ from the base's: there is no effect to retain"
    else:
        if not b.effect_retained.value >= gates.effect_retained:
            yield f"effect retained {b.effect_retained.value:.3f}; at least {gates.effect_retained:g}"
        if not b.effect_retained.low >= gates.effect_retained_low:
            yield f"effect retained, lower bound {b.effect_retained.low:.3f}; at least {gates.effect_retained_low:g}"
    # Scores of so few prompts that no artifact could show equivalence are no reason.
    scores = [test for test in (b.score, b.prompt_sets) if test is not None and test.enough]
    yield from (str(test) for test in (b.margin, *scores) if test is not None and not test.equivalent)
    # The whole interval must lie above the margin: answers that differ repeat more or less by chance.
    if b.repetition.low > b.repetition.margin:
        yield (
            f"it repeats itself more than the steered model: {b.repetition_compiled:.2f} of its 3-grams, steered "
            f"{b.repetition_steered:.2f}; {b.repetition}"
        )
    if parity.capability is not None and parity.capability.worse:
        yield f"it can do less than the steered model: {parity.capability}; {parity.capability.test}"


def check_prompt_sets(parity: Parity, gates: Gates) -> Iterator[str]:
    """An exact artifact in full precision is exact on every prompt set."""
    # What rounding costs is not measured there, and a remaining KL of few tokens is not certain: those are only reported.
    if parity.exact and parity.noise_kl == 0:
        for prompts in parity.prompt_sets:
            if not prompts.kl <= gates.exact_kl:
                yield f"KL {prompts.kl:.2e} nats a token on {prompts.name} prompts; at most {gates.exact_kl:.2e}"


def check_adapter(parity: Parity, gates: Gates) -> Iterator[str]:
    """The adapter at scale 0 is the base, and a random adapter does less."""
    if parity.adapter is None:
        return
    # Other scales are only reported: a change that was trained at one strength need not scale with it.
    for measured in parity.adapter.scales:
        if measured.scale == 0 and not measured.kl <= gates.exact_kl:
            yield f"KL(base||adapter at scale 0) {measured.kl:.2e} nats a token: something else has changed"
    if not parity.adapter.effect > max(parity.adapter.random):
        yield (
            f"a random adapter of the same norms moves the test pairs as much ({max(parity.adapter.random):.3f} against "
            f"{parity.adapter.effect:.3f} nats a token): what it does is not the behaviour"
        )
