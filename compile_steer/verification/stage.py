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
from compile_steer.models.logprobs import FinalStates, divergence, final_states, fingerprint
from compile_steer.models.reload import reload
from compile_steer.models.tokens import encode
from compile_steer.stats import Equivalence, Interval, Measure, bootstrap_effect_retained, bootstrap_ratio, equivalence
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
    # The compiler's record is empty for a model in less than fp32, whose rounding would hide a difference.
    in_memory = [] if quantized else origin.fingerprint
    on_disk = fingerprint(artifact.model, base) if in_memory else []
    comparable = 0 < len(on_disk) == len(in_memory)
    parity = Parity(
        backend=origin.backend,
        form=origin.form,
        exact=origin.backend in _EXACT_BACKENDS,
        compute_dtype=str(base.model.dtype).removeprefix("torch."),
        compile_seconds=origin.seconds,
        same_tokens=all(
            encode(artifact.tokenizer, text) == encode(base.tokenizer, text) for text in reference.context.data.heldout
        ),
        file_error=float(np.abs(np.subtract(on_disk, in_memory)).max()) if comparable else None,
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
    reasons = check(parity, options.gates)
    return replace(parity, passed=not reasons, reasons=reasons)


def measure_divergence(
    reference: Reference, against: Reference, artifact: LoadedModel, states: FinalStates
) -> Divergence:
    """The next-token distributions; `states` are the artifact's final hidden states on the held-out texts.

    `against` is the reference of the base rounded as the artifact is, where that costs much; for gain and control text.
    """
    kl, kl_base, seed = reference.kl_from_steered(artifact, states), reference.kl_base, reference.context.seed
    # The text is the unit of both intervals: tokens of one text share its topic, so they are not independent.
    mean = bootstrap_ratio(kl.kl, torch.ones_like(kl.kl), states.texts, seed=seed)
    # Least squares of the compiled change of the final hidden states [n, d_model] on the steered change.
    steered = (against.states.steered.response - against.states.base.response).double()
    compiled = (states.response - against.states.base.response).double()
    size = steered.square().sum()
    model, control = against.model.model, against.control_states
    compiled_control = final_states(artifact, against.control).response
    return Divergence(
        kl=Interval(kl.mean, mean.low, mean.high),
        kl_rms=kl.rms,
        kl_p99=kl.p99,
        kl_remaining=bootstrap_ratio(kl.kl, kl_base.kl, states.texts, seed=seed),
        kl_base=kl_base.mean,
        kl_prompt=divergence(
            reference.model.model, reference.states.steered.prompt, artifact.model, states.prompt
        ).mean,
        top1=kl.top1_agreement,
        top1_base=kl_base.top1_agreement,
        gain=float((steered * compiled).sum() / size),
        hidden_error=float(((compiled - steered).square().sum() / size).sqrt()),
        kl_control_steered=divergence(model, control.base, model, control.steered).mean,
        kl_control=divergence(model, control.base, artifact.model, compiled_control).mean,
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
    """Behaviour on the test pairs, the test prompts and the prompt sets; `against` as in `measure_divergence`, for the margins.

    Args:
        margins: the artifact's log-likelihood margins, [n_pairs].
        set_scores: scores of its answers to the prompt sets, [n_prompts]; None where they cannot be scored.
    """
    base, steered = reference.answers
    ((compiled, sample),) = reference.answers_of(artifact, None)
    limits = {**reference.equivalence_margins, "repetition": reference.options.gates.repetition_margin}

    def test(measure: Measure, measured: np.ndarray | None, steered: np.ndarray | None) -> Equivalence | None:
        if measured is None or steered is None or measure not in limits:
            return None
        return equivalence(measure, measured - steered, limits[measure])

    return BehaviourMatch(
        effect_retained=bootstrap_effect_retained(*against.margins, margins, seed=reference.context.seed),
        margin=test("log-likelihood margin", margins, against.margins.steered),
        score=equivalence("score", compiled.scores - steered.scores, limits["score"]),
        score_base=float(base.scores.mean()),
        score_steered=float(steered.scores.mean()),
        score_compiled=float(compiled.scores.mean()),
        prompt_sets=test("score by prompt set", set_scores, reference.prompt_sets.steered_scores),
        repetition=equivalence("repetition", compiled.repetition - steered.repetition, limits["repetition"]),
        repetition_steered=float(steered.repetition.mean()),
        repetition_compiled=float(compiled.repetition.mean()),
        n_pairs=len(margins),
        n_prompts=len(compiled.scores),
        sample=sample,
    )


def require_same_origin(folder: Path, model: str, revision: str, program_sha256: str) -> Provenance:
    """The artifact's provenance; raises `ArtifactError` if it is of another program or base, or damaged."""
    origin = Provenance.read(folder)
    problems = list(origin.edits(folder))
    if origin.program_sha256 != program_sha256:
        problems.append(
            f"{folder} was compiled from another program (SHA-256 {origin.program_sha256[:12]}, found {program_sha256[:12]})."
        )
    if (origin.model, origin.revision) != (model, revision):
        problems.append(
            f"{folder} was compiled for {origin.model} at {origin.revision}; the base here is {model} at {revision}."
        )
    if problems:
        raise ArtifactError([*problems, "Compile again, or name the recipe that made it."])
    return origin


def check(parity: Parity, gates: Gates) -> list[str]:
    """Every gate that the artifact misses, in words; empty where it passes."""
    d, b, rounding, adapter = parity.divergence, parity.behaviour, parity.rounding, parity.adapter
    # The artifact may cost as much as its precision costs the steered model; twice, because the two roundings are independent.
    noise, flips = (2 * rounding.kl_steered, 2 * (1 - rounding.top1_steered)) if rounding else (0.0, 0.0)
    most = (gates.exact_kl if parity.exact else gates.kl_remaining * d.kl_base) + noise
    least = (gates.exact_top1 if parity.exact else gates.top1) - flips
    written = (
        "it is not what was compiled: mean log p of a fixed text is {:.1e} nats a token from what the compiler's weights "
        "gave before they were written; at most {:.0e}"
    )
    control_limit = d.kl_control_steered + gates.control_kl_margin
    # (message, value, limit)
    at_most = [
        (written, parity.file_error or 0.0, _FILE_MARGIN),
        (f"KL {{:.2e}} nats a token (remaining {d.kl_remaining.value:.2%}); at most {{:.2e}}", d.kl.value, most),
        ("control text: KL from the base {:.4f} nats a token; at most {:.4f}", d.kl_control, control_limit),
    ]
    at_least = [("top-1 agreement {:.2%}; at least {:.2%}", d.top1, least)]
    if rounding and parity.form.startswith("gguf-"):
        # Quantising may cost more than a wrong compile does, so the compile is measured on the base quantised the same way.
        # What is left of the quantisation there is that edited matrices are rounded anew.
        most = (gates.exact_kl if parity.exact else gates.kl_remaining * rounding.kl_changed) + 2 * rounding.kl_edited
        against = f"(remaining {rounding.kl_remaining:.2%}) from the hooks on the base quantised the same way"
        at_most.append((f"KL {{:.2e}} nats a token {against}; at most {{:.2e}}", rounding.kl, most))
    if parity.exact and noise == 0:
        # Exact backends agree here to about 1e-11. For others there is no threshold that sound artifacts were measured
        # against, what rounding costs here is not measured, and a remaining KL of few tokens is not certain.
        places = {"at the prompts' positions": d.kl_prompt} | {f"on {s.name} prompts": s.kl for s in parity.prompt_sets}
        message = "KL {{:.2e}} nats a token {}; at most {{:.2e}}"
        at_most += [(message.format(place), kl, gates.exact_kl) for place, kl in places.items()]
    if adapter:
        # Other scales are only reported: a change that was trained at one strength need not scale with it.
        message = "KL(base||adapter at scale 0) {:.2e} nats a token: something else has changed"
        at_most += [(message, measured.kl, gates.exact_kl) for measured in adapter.scales if measured.scale == 0]
    if b.effect_retained:
        low = b.effect_retained.low
        at_least.append(("effect retained {:.3f}; at least {:g}", b.effect_retained.value, gates.effect_retained))
        at_least.append(("effect retained, lower bound {:.3f}; at least {:g}", low, gates.effect_retained_low))
    # NaN compares false, so it misses every gate.
    reasons = [message.format(value, limit) for message, value, limit in at_most if not value <= limit]
    reasons += [message.format(value, limit) for message, value, limit in at_least if not value >= limit]
    return reasons + [message for missed, message in _other_gates(parity) if missed]


def _other_gates(parity: Parity) -> Iterator[tuple[bool, str]]:
    """The gates that are no comparison with one limit: whether the artifact misses it, and the message."""
    b, adapter, gain = parity.behaviour, parity.adapter, parity.divergence.gain
    yield not parity.same_tokens, "the artifact's tokenizer splits held-out prompts differently from the base's"
    off = not abs(gain - 1) <= _GAIN_MARGIN
    yield off, f"the gain is {gain:.3f} of the steered model's change; needed 1 +- {_GAIN_MARGIN:g}"
    unmoved = "the steered model's log-likelihood margin does not differ from the base's: there is no effect to retain"
    yield b.effect_retained is None, unmoved
    if b.margin:
        yield not b.margin.equivalent, str(b.margin)
    for test in (b.score, b.prompt_sets):
        # Scores of so few prompts that no artifact could show equivalence are no reason.
        if test and test.enough:
            yield not test.equivalent, str(test)
    more = f"{b.repetition_compiled:.2f} of its 3-grams, steered {b.repetition_steered:.2f}; {b.repetition}"
    # The whole interval must lie above the margin: answers that differ repeat more or less by chance.
    yield b.repetition.low > b.repetition.margin, f"it repeats itself more than the steered model: {more}"
    if lost := parity.capability:
        yield lost.worse, f"it can do less than the steered model: {lost}; {lost.test}"
    if adapter:
        random = max(adapter.random)
        yield (
            not adapter.effect > random,
            f"a random adapter of the same norms moves the test pairs as much ({random:.3f} against "
            f"{adapter.effect:.3f} nats a token): what it does is not the behaviour",
        )
