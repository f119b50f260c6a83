"""Interference of several programs: base, hooks and adapters on the same texts and pairs, in every combination.

Programs interfere by themselves, because the blocks above the first are not linear in the residual stream. What compiled
weights add to that is measured apart: each adapter's own error, and the cross term that appears only when all are on.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial, reduce
from pathlib import Path
from typing import Literal

import numpy as np
from torch import Tensor

from compile_steer.artifacts.files import digest, sha256
from compile_steer.artifacts.provenance import Provenance
from compile_steer.common.errors import RecipeError
from compile_steer.common.progress import Progress
from compile_steer.data.behaviour import Behaviour
from compile_steer.models.generate import continue_prompts
from compile_steer.models.load import LoadedModel
from compile_steer.models.logprobs import divergence, encode_pairs, final_states, logprob_margins
from compile_steer.models.reload import reload_adapters, set_adapter_scales
from compile_steer.models.tokens import Encoded
from compile_steer.stats import Interval, bootstrap_mean
from compile_steer.steering.program import Program
from compile_steer.verification.options import VerifyOptions

STACKED, JOINT = "stacked", "joint"  # adapters that were composed of the members'
CO_LOADED = "co-loaded"  # the members' own adapters, all on at once
# nats per token: hooks that are closer to the base than this cancel, and a fraction of their KL means nothing
_NO_KL = 1e-9


@dataclass(frozen=True)
class Member:
    """One behaviour of a composition: its data and program, the adapter compiled from it, and the scale of both."""

    name: str
    data: Behaviour
    options: VerifyOptions
    seed: int
    program: Program
    adapter: Path
    provenance: Provenance
    scale: float


@dataclass(frozen=True)
class MatrixRow:
    """Mean change of one behaviour's log-likelihood margin from the base, nats per token, with 95 % bootstrap intervals."""

    behaviour: str
    n_pairs: int
    effects: dict[
        str, Interval
    ]  # under the hooks of each program and of all, each adapter, and each of `Composition.artifacts`
    cross: dict[str, Interval]  # all at once minus the sum of each alone, for hooks and for adapters
    errors: dict[str, Interval]  # each artifact minus the hooks of all


@dataclass(frozen=True)
class Fit:
    """Hooks and adapters at the same scales."""

    scales: tuple[float, ...]
    kl: float  # mean KL(hooks||adapters), nats per token
    kl_base: float  # mean KL(hooks||base)
    top1: float  # agreement of hooks and adapters

    @property
    def kl_remaining(self) -> float | None:
        """KL(hooks||adapters) as a fraction of KL(hooks||base); None where the hooks cancel."""
        return self.kl / self.kl_base if self.kl_base > _NO_KL else None


@dataclass(frozen=True)
class StateInterference:
    """Norms of changes of the final hidden states, relative to the root of the summed squares of each program's change alone."""

    programs: float  # all hooks at once minus the sum of each alone
    alone: float  # the summed errors of the adapters, each alone against its own hooks
    errors: dict[str, float]  # of each artifact against the hooks of all
    cross: float  # the co-loaded adapters' error minus `alone`


@dataclass(frozen=True, kw_only=True)
class Composition:
    """The interference matrix, and the artifacts and the co-loaded adapters compared with the hooks."""

    kind: Literal["composition"] = "composition"
    names: list[str]
    scales: list[float]
    backend: str
    matrix: list[MatrixRow]
    artifacts: dict[str, Fit]  # co-loaded, stacked, joint: against the hooks of all programs
    settings: list[Fit]  # the co-loaded adapters at other scales too: each alone, and each at half its scale
    stacked_from_loaded: float | None  # mean KL(co-loaded||stacked), nats per token, which is rounding
    states: StateInterference
    n_tokens: int
    sha256: dict[str, str]
    passed: bool
    reasons: list[str]


def sum_programs(members: Sequence[Member], scales: Sequence[float]) -> Program:
    """Every member's program at its scale, one after the other."""
    return reduce(operator.add, (scale * member.program for member, scale in zip(members, scales, strict=True)))


Condition = Program | Mapping[str, float] | None  # a program's hooks, adapters by name with their scales, or the base


def measure_interference(
    base: LoadedModel, members: Sequence[Member], backend: str, folders: Mapping[str, Path], progress: Progress
) -> Composition:
    """Compare the members' adapters, co-loaded, and the composed ones in `folders` (stacked, joint), with all hooks at once.

    Each adapter was fitted with the others off, so together their error is larger than alone: an adapter reads its constant
    (the A of a rank-1 edit) from activations that another one below it has moved. How much larger is `states.cross`. That
    the programs' own effects do not add up (`states.programs`) is not caused by the compile: hooks show it too.

    Raises:
        RecipeError: no prompt, or no test pair, is left that no compile saw.
    """
    pairs, scales = unseen_pairs(base, members), tuple(member.scale for member in members)
    names = [f"member{n}" for n in range(len(members))]  # not the recipes' names: PEFT takes no dot in one
    own = {name: member.adapter for name, member in zip(names, members, strict=True)}
    adapted = reload_adapters({**own, **folders}, base)
    texts = unseen_texts(base, members, progress)

    def under(condition: Condition) -> tuple[LoadedModel, Program | None]:
        if condition is None or isinstance(condition, Program):
            return base, condition
        set_adapter_scales(adapted, condition)  # until the next call
        return adapted, None

    def states_under(condition: Condition) -> Tensor:
        model, program = under(condition)
        return final_states(model, texts, program).response

    def adapters(setting: Sequence[float]) -> dict[str, float]:
        return {name: scale for name, scale in zip(names, setting, strict=True) if scale}

    plain, head = states_under(None), base.model

    def fit(setting: tuple[float, ...], hooks: Tensor, compiled: Tensor) -> Fit:
        kl = divergence(head, hooks, head, compiled)  # no adapter touches the head, so the base's reads all states
        return Fit(setting, kl.mean, divergence(head, hooks, head, plain).mean, kl.top1_agreement)

    # Hooks and adapters: all at once, each alone, and each at half its scale beside the others.
    alone = [tuple(scale if n == m else 0.0 for m, scale in enumerate(scales)) for n in range(len(scales))]
    halved = [tuple(scale / 2 if n == m else scale for m, scale in enumerate(scales)) for n in range(len(scales))]
    settings, hooked, loaded = [], [], []
    with progress.phase("each scale: hooks and adapters", 1 + 2 * len(scales)) as advance:
        for setting in (scales, *alone, *halved):
            hooked.append(states_under(sum_programs(members, setting)))
            loaded.append(states_under(adapters(setting)))
            settings.append(fit(setting, hooked[-1], loaded[-1]))
            advance(1)
    states = {CO_LOADED: loaded[0]} | {name: states_under({name: 1.0}) for name in folders}
    artifacts = {name: fit(scales, hooked[0], compiled) for name, compiled in states.items()}

    # The conditions of the matrix.
    labelled = [(member.name, setting) for member, setting in zip(members, alone, strict=True)]
    columns: dict[str, Condition] = {f"hooks {name}": sum_programs(members, setting) for name, setting in labelled}
    columns |= {"hooks all": sum_programs(members, scales)}
    columns |= {f"adapter {name}": adapters(setting) for name, setting in labelled}
    columns |= {CO_LOADED: adapters(scales)} | {name: {name: 1.0} for name in folders}

    reasons = list(_missed(members, artifacts, settings[1 : 1 + len(members)]))
    return Composition(
        names=[member.name for member in members],
        scales=list(scales),
        backend=backend,
        matrix=_matrix(members, pairs, columns, under, list(artifacts), progress),
        artifacts=artifacts,
        settings=settings,
        stacked_from_loaded=divergence(head, loaded[0], head, states[STACKED]).mean if STACKED in states else None,
        states=_state_interference(plain, hooked[: 1 + len(scales)], loaded[1 : 1 + len(scales)], states),
        n_tokens=plain.shape[0],
        sha256={name: sha256(folder) for name, folder in folders.items()}
        | {"texts": digest([list(text.ids) for text in texts]), "base": base.revision},
        passed=not reasons,
        reasons=reasons,
    )


def _missed(members: Sequence[Member], artifacts: Mapping[str, Fit], alone: Sequence[Fit]) -> Iterator[str]:
    """Which artifacts are not the model under all hooks, and which members alone are not at their scale, `alone`."""
    # The strictest of the members' gates hold for all.
    gates = [member.options.gates for member in members]
    remaining, exact = min(gate.kl_remaining for gate in gates), min(gate.exact_kl for gate in gates)
    missed = {name: fit for name, fit in artifacts.items() if not fit.kl <= remaining * fit.kl_base + exact}
    for name, fit in missed.items():
        yield f"{name}: KL {fit.kl:.2e} nats a token against all hooks at once; at most {remaining * fit.kl_base + exact:.2e}"
    for member, fit in zip(members, alone, strict=True) if missed else ():
        if member.scale != 1 and (fit.kl_remaining or 0.0) > remaining:
            yield (
                f"{member.name}: its adapter alone, at scale {member.scale:g}, leaves {fit.kl_remaining:.0%} of the KL. One whose "
                "scale is the coefficient is compiled with compile.dial: true"
            )


def unseen_texts(base: LoadedModel, members: Sequence[Member], progress: Progress) -> list[Encoded]:
    """Every member's held-out prompts that no compile has seen, continued by the model under the hooks of all."""
    program = sum_programs(members, [member.scale for member in members])
    seen = {text.prompt for member in members for text in member.data.calibration}
    texts: list[Encoded] = []
    with progress.phase("reference: the model under all hooks", len(members)) as advance:
        for member in members:
            prompts = [text for text in member.data.heldout if text.prompt not in seen][: member.options.heldout]
            seen |= {text.prompt for text in prompts}  # members may share their files
            if prompts:
                limit, seed = member.options.max_new_tokens, member.seed + 1
                texts += continue_prompts(base, prompts, program, max_new_tokens=limit, temperature=1.0, seed=seed)
            advance(1)
    if not texts:
        raise RecipeError("data.heldout: every prompt is among a recipe's calibration prompts; give others.")
    return texts


def unseen_pairs(base: LoadedModel, members: Sequence[Member]) -> list[list[Encoded]]:
    """Both sides of every member's own test pairs whose prompt no compile has seen; raises `RecipeError` if one has none."""
    seen, encoded = {text.prompt for member in members for text in member.data.calibration}, []
    for member in members:
        pairs = [pair for pair in member.data.test if pair.prompt not in seen][: member.options.pairs]
        if not pairs:
            raise RecipeError(f"data.test: every prompt of {member.name} is among a recipe's calibration prompts.")
        encoded.append(encode_pairs(base, pairs))
    return encoded


def _matrix(
    members: Sequence[Member],
    pairs: Sequence[Sequence[Encoded]],
    columns: Mapping[str, Condition],
    under: Callable[[Condition], tuple[LoadedModel, Program | None]],
    artifacts: Sequence[str],
    progress: Progress,
) -> list[MatrixRow]:
    """Every member's own pairs under every condition of `columns`, which `under` makes a model and its hooks."""
    matrix = []
    with progress.phase("the interference matrix", len(members) * (1 + len(columns))) as advance:
        for member, encoded in zip(members, pairs, strict=True):
            margins = {}
            for label, condition in {"base": None, **columns}.items():
                model, program = under(condition)
                margins[label] = logprob_margins(model, encoded, program)
                advance(1)
            changes = {label: margins[label] - margins["base"] for label in columns}  # [n_pairs] each
            # Intervals over pairs, of the changes and of their differences pair by pair.
            interval, hooks = partial(bootstrap_mean, seed=member.seed), changes["hooks all"]
            hooks_alone, adapters_alone = (
                np.sum([changes[f"{kind} {other.name}"] for other in members], axis=0) for kind in ("hooks", "adapter")
            )
            cross = {"hooks": hooks - hooks_alone, "adapters": changes[CO_LOADED] - adapters_alone}
            row = MatrixRow(
                behaviour=member.name,
                n_pairs=len(hooks),
                effects={label: interval(values) for label, values in changes.items()},
                cross={kind: interval(values) for kind, values in cross.items()},
                errors={name: interval(changes[name] - hooks) for name in artifacts},
            )
            matrix.append(row)
    return matrix


def _state_interference(
    plain: Tensor, hooked: Sequence[Tensor], alone: Sequence[Tensor], artifacts: Mapping[str, Tensor]
) -> StateInterference:
    """`hooked`: all programs, then each; `alone`: each adapter; all [n_tokens, d_model]."""
    # In float64: the cross term is a small difference of large sums.
    together, *each = (states.double() - plain.double() for states in hooked)
    adapter_errors = sum(
        (states.double() - plain.double() - change for states, change in zip(alone, each, strict=True)), 0 * together
    )
    errors = {name: states.double() - plain.double() - together for name, states in artifacts.items()}
    size = float(sum(change.square().sum() for change in each)) ** 0.5
    return StateInterference(
        programs=float((together - sum(each)).norm()) / size,
        alone=float(adapter_errors.norm()) / size,
        errors={name: float(error.norm()) / size for name, error in errors.items()},
        cross=float((errors[CO_LOADED] - adapter_errors).norm()) / size,
    )
