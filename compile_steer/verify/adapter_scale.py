"""Does the adapter's scale do what the program's coefficient does? Measured between doses, where nothing was fitted."""

from __future__ import annotations

from dataclasses import dataclass

from compile_steer.models.load import LoadedModel
from compile_steer.models.logprobs import divergence, final_states
from compile_steer.models.reload import adapter_scaled
from compile_steer.verify.reference import Reference


@dataclass(frozen=True)
class Dial:
    """KL(steered||compiled), nats a token, with program and adapter both at `scale` times what they are.

    `share` is over KL(steered||base) at that scale; None at 0, where steered is the base.
    """

    scale: float
    kl: float
    share: float | None

    def __str__(self) -> str:
        off = "the base" if self.kl == 0 else f"{self.kl:.1e} nats/token off the base"
        return f"x{self.scale:g} {off if self.share is None else f'share {self.share:.2%}'}"


def dials(reference: Reference, artifact: LoadedModel) -> list[Dial]:
    """Hold the adapter at each of the reference's scales against the hooks at that scale.

    Args:
        artifact: the base with the reloaded adapter; left as it was.
    """
    base, found = reference.base, []
    plain = reference.dialled[0.0]
    for scale, wanted in reference.dialled.items():
        with adapter_scaled(artifact, scale):
            got = final_states(artifact, reference.dial_texts).response
        kl = divergence(base.model, wanted, artifact.model, got).mean
        changed = divergence(base.model, wanted, base.model, plain).mean
        found.append(Dial(scale, kl, kl / changed if changed else None))
    return found
