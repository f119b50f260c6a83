"""Texts and measures that the tests of the fitted backends share."""

from __future__ import annotations

from collections.abc import Sequence

from torch.nn import functional

from compile_steer.lowering import closed_form
from compile_steer.lowering.closed_form import Stage, plan_stages
from compile_steer.lowering.job import Lowering
from compile_steer.lowering.options import CompileOptions
from compile_steer.models.load import LoadedModel
from compile_steer.models.tokens import Encoded
from compile_steer.steering.hooks import steered
from compile_steer.steering.passes import canonical
from compile_steer.steering.patch import WeightPatch, with_patch
from compile_steer.steering.program import Intervention, Program
from tests.helpers.tiny import Padded, logits, program, texts

FAMILIES = ("llama", "gpt2", "gemma2", "granite")


def random_texts(count: int, seed: int) -> list[Encoded]:
    return texts([(4 + n % 5, 12 + n % 7) for n in range(count)], seed=seed)


CALIBRATION, HELD_OUT, TRAINING = random_texts(60, 1), random_texts(20, 2), random_texts(40, 3)


def canonical_program(family: str, *interventions: Intervention) -> Program:
    return canonical(program(family, *interventions))


def job(tiny: LoadedModel, steering: Program, options: CompileOptions | None = None) -> Lowering:
    return Lowering(steering, tiny, (), options or CompileOptions())


def stages_of(tiny: LoadedModel, steering: Program, options: CompileOptions | None = None) -> list[Stage]:
    return plan_stages(steering, tiny.layout, (options or CompileOptions()).closed_form)


def solve(
    tiny: LoadedModel,
    steering: Program,
    stages: Sequence[Stage],
    rows: Sequence[Encoded] = CALIBRATION,
    *,
    dial: bool = False,
) -> WeightPatch:
    lowering = job(tiny, steering, CompileOptions(dial=dial))
    lowering.__dict__["regression_texts"] = rows
    return closed_form.lower(lowering, stages)


def kl(tiny: LoadedModel, steering: Program, patch: WeightPatch, rows: Sequence[Encoded] = HELD_OUT) -> float:
    """Mean KL(steered || patched) in nats a token, from whole passes with explicit roles."""
    batch = Padded.of(rows, "right")
    with steered(tiny.model, steering, roles=batch.roles):
        steered_logprobs = logits(tiny.model, batch).double().log_softmax(dim=-1)
    with with_patch(tiny.model, patch):
        patched_logprobs = logits(tiny.model, batch).double().log_softmax(dim=-1)
    return float(functional.kl_div(patched_logprobs, steered_logprobs, log_target=True, reduction="batchmean"))


def remaining_kl(tiny: LoadedModel, steering: Program, patch: WeightPatch) -> float:
    return kl(tiny, steering, patch) / kl(tiny, steering, WeightPatch())
