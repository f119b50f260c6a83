"""The backends, which of them lower a program, and the lowering itself: program, model and texts -> `WeightPatch`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from compile_steer.common.errors import CannotLower
from compile_steer.common.progress import Progress
from compile_steer.lowering import closed_form, distill, exact, full
from compile_steer.lowering.job import Lowering
from compile_steer.lowering.options import CompileOptions
from compile_steer.models.load import LoadedModel
from compile_steer.models.text import Text
from compile_steer.steering.layout import Layout
from compile_steer.steering.passes import canonical
from compile_steer.steering.patch import WeightPatch
from compile_steer.steering.program import Program

Refusal = Callable[[Program, Layout], str | None]


@dataclass(frozen=True)
class Backend:
    """One way to lower a canonical program.

    Attributes:
        refusal: why the program cannot be lowered so, or None; decided before any work.
        adapter_refusal: why the result cannot be exported as a stock PEFT adapter, or None.
        lower: the work.
        fitted: it learns from texts of the steered model; the others are exact.
    """

    refusal: Refusal
    adapter_refusal: Refusal
    lower: Callable[[Lowering], WeightPatch]
    fitted: bool = True


def _exact(refusal: Refusal, adapter_refusal: Refusal, patch: Callable[[Program, Layout], WeightPatch]) -> Backend:
    def lower(lowering: Lowering) -> WeightPatch:
        return patch(lowering.program, lowering.loaded.layout)

    return Backend(refusal, adapter_refusal, lower, fitted=False)


def _fitted(lower: Callable[[Lowering], WeightPatch], adapter_refusal: str | None = None, **kind: bool) -> Backend:
    # Any program can be imitated; and low-rank edits of Linears are what a LoRA is.
    return Backend(exact.first_refusal, lambda *_: adapter_refusal, lower, **kind)


# Exact first: `auto` takes the first that does not refuse.
BACKENDS: dict[str, Backend] = {
    "bias": _exact(exact.bias_refusal, lambda *_: exact.NO_ADAPTER_BIAS, exact.bias_patch),
    "orthogonalise": _exact(exact.orthogonalise_refusal, exact.orthogonalise_adapter_refusal, exact.orthogonalise),
    "retarget": _exact(exact.convert_refusal, lambda *_: exact.NO_ADAPTER_BIAS, exact.convert_architecture),
    "closed_form": _fitted(closed_form.lower),
    "distill": _fitted(distill.lower),
    "full": _fitted(full.lower, "its changes have full rank: merged checkpoint only, or full_cut"),
    "full_cut": _fitted(full.lower_cut),
}


@dataclass(frozen=True)
class Choice:
    """What the plan says of one backend.

    Attributes:
        refusal: why it cannot lower the program; None where it is legal.
        chosen: it will run.
        adapter_refusal: why its result cannot be exported as a stock PEFT adapter, or None.
    """

    backend: str
    refusal: str | None
    chosen: bool
    adapter_refusal: str | None


@dataclass(frozen=True)
class Plan:
    """The program in canonical form, and what is said of each backend, in the order of `BACKENDS`."""

    program: Program
    choices: tuple[Choice, ...]

    @property
    def chosen(self) -> list[str]:
        """The backends that will run, in the order of `BACKENDS`."""
        return [choice.backend for choice in self.choices if choice.chosen]


def _peft_refusal(program: Program, layout: Layout) -> str | None:
    """Why PEFT takes no LoRA on the output projections that an edit may change, or None."""
    from peft import LoraConfig
    from peft.tuners.tuners_utils import (
        _check_lora_target_modules_mamba,  # fused code reads some weights past their module
    )

    try:
        for projection in layout.output_projections.values():
            if projection.layer >= program.first_layer:
                name = projection.name.rpartition(".")[2]
                _check_lora_target_modules_mamba(LoraConfig(), layout.model, name)
    except ValueError:
        return f"PEFT takes no LoRA on {name} of {layout.model.config.model_type}: merged checkpoint only"
    return None


def plan(program: Program, layout: Layout, backends: Sequence[str] | Literal["auto"] = "auto") -> Plan:
    """Decide which backends lower the program, before any work.

    Raises:
        CannotLower: a backend that is named refuses, or all do; every reason is given.
    """
    program = canonical(program)
    # All are asked, also those that are not wanted: the plan shows why each is or is not possible.
    refusals = {name: backend.refusal(program, layout) for name, backend in BACKENDS.items()}
    legal = [name for name, refusal in refusals.items() if refusal is None]
    chosen = legal[:1] if backends == "auto" else list(backends)
    blocked = [name for name in chosen if refusals[name] is not None]
    if blocked or not chosen:
        lines = [f"{name}: {refusals[name]}." for name in (blocked or refusals)]
        use = f"Use compile.backends: {', '.join(legal)} or auto." if legal else "Change the program."
        raise CannotLower([*lines, use])
    choices = []
    for name, backend in BACKENDS.items():
        adapter_refusal = backend.adapter_refusal(program, layout) or _peft_refusal(program, layout)
        choices.append(Choice(name, refusals[name], name in chosen, adapter_refusal if name in legal else None))
    return Plan(program, tuple(choices))


def lower(
    program: Program,
    loaded: LoadedModel,
    prompts: Sequence[Text],
    options: CompileOptions | None = None,
    *,
    backend: str = "auto",
    seed: int = 0,
    progress: Progress | None = None,
) -> WeightPatch:
    """The weight patch that does what `program` does on `loaded`.

    Args:
        prompts: calibration prompts, for the fitted backends: they learn from the steered model's own continuations.
        backend: 'auto' takes the first that is legal, exact ones first.

    Raises:
        CannotLower: the backend, or every one, refuses.
        RecipeError: the options need more prompts.
    """
    planned = plan(program, loaded.layout, "auto" if backend == "auto" else (backend,))
    lowering = Lowering(planned.program, loaded, prompts, options or CompileOptions(), seed, progress or Progress())
    return BACKENDS[planned.chosen[0]].lower(lowering)
