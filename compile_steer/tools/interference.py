"""Run base, hooks and adapters on the same texts and pairs, in every combination that tells them apart.

Programs interfere by themselves, because the blocks above the first are not linear in the stream. What the compiled
weights add to that is told apart: each adapter's own error, and the cross term that appears only when they are on together.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from pathlib import Path

import numpy as np
from torch import Tensor

from compile_steer.artifacts.files import digest, sha256
from compile_steer.common.errors import RecipeError
from compile_steer.common.progress import Progress
from compile_steer.data.behaviour import Behaviour
from compile_steer.models.generate import continue_prompts
from compile_steer.models.load import LoadedModel
from compile_steer.models.logprobs import TokenDivergence, divergence, encode_pairs, final_states, logprob_margins
from compile_steer.models.reload import reload_adapters, set_adapter_scales
from compile_steer.models.tokens import Encoded
from compile_steer.recipe import Recipe
from compile_steer.stats import Interval, bootstrap_mean
from compile_steer.steering.program import Program
from compile_steer.tools.interference_report import Composition, Fit, Interplay, Row

STACKED, JOINT = "stacked", "joint"  # composed adapters
LOADED = "loaded"  # the members' own, all on at once


@dataclass(frozen=True)
class Member:
    """One behaviour of a composition: its recipe and data, its program, the adapter compiled from it, and its dial."""

    recipe: Recipe
    behaviour: Behaviour
    program: Program
    adapter: Path
    dial: float

    @property
    def name(self) -> str:
        return self.recipe.name


def summed(members: Sequence[Member], dials: Sequence[float]) -> Program:
    """Every member's program at its dial, one after the other."""
    return reduce(operator.add, (dial * one.program for one, dial in zip(members, dials, strict=True)))


# How to run the model: under a program's hooks, with adapters on at their dials, or as it is.
Way = Program | Mapping[str, float] | None


class _Scene:
    """The base, and one copy of it that holds every adapter."""

    def __init__(self, base: LoadedModel, members: Sequence[Member], folders: Mapping[str, Path]) -> None:
        self.base = base
        own = {_adapter(n): one.adapter for n, one in enumerate(members)}
        self._adapters = reload_adapters({**own, **folders}, base)

    def under(self, way: Way) -> tuple[LoadedModel, Program | None]:
        """The model, and the hooks, that make it run that way; holds until the next call."""
        if way is None or isinstance(way, Program):
            return self.base, way
        set_adapter_scales(self._adapters, way)
        return self._adapters, None

    def states(self, texts: Sequence[Encoded], way: Way) -> Tensor:
        """Final hidden states [n_tokens, d_model] at the positions that predict the response."""
        loaded, program = self.under(way)
        return final_states(loaded, texts, program).response

    def contrast(self, pairs: Sequence[Encoded], way: Way) -> np.ndarray:
        loaded, program = self.under(way)
        return logprob_margins(loaded, pairs, program)

    def divergence(self, p: Tensor, q: Tensor) -> TokenDivergence:
        """No adapter touches the head, so the base's reads out every state."""
        return divergence(self.base.model, p, self.base.model, q)


def measure(
    base: LoadedModel, members: Sequence[Member], backend: str, folders: Mapping[str, Path], progress: Progress
) -> Composition:
    """Hold the members' adapters, loaded at once, and the composed ones in `folders` (stacked, joint), against all
    programs' hooks.

    Each adapter was fitted with the others off, so at once they are off by more than alone: an adapter reads its constant
    (the A of a rank-1 edit) off activations that another one below it has moved. How much more is `Interplay.cross`.
    That the programs' own effects do not add up (`Interplay.programs`) is none of the compile's doing: hooks show it too.

    Raises:
        ArtifactError: an adapter cannot be loaded. RecipeError: no prompt, or no test pair, is left that no compile saw.
    """
    pairs = [_test_pairs(base, members, one) for one in members]
    scene = _Scene(base, members, folders)
    dials = tuple(one.dial for one in members)
    texts = _texts(base, members, summed(members, dials), progress)
    plain = scene.states(texts, None)
    alone = [tuple(dial if n == m else 0.0 for m, dial in enumerate(dials)) for n in range(len(dials))]
    halved = [tuple(dial / 2 if n == m else dial for m, dial in enumerate(dials)) for n in range(len(dials))]
    settings, hooked, loaded = [], [], []
    with progress.phase("each dial: hooks against adapters", 1 + 2 * len(dials)) as advance:
        for setting in (dials, *alone, *halved):
            hooked.append(scene.states(texts, summed(members, setting)))
            loaded.append(scene.states(texts, _on(setting)))
            settings.append(_fit(scene, setting, hooked[-1], loaded[-1], plain))
            advance(1)
    shipped = {LOADED: loaded[0]} | {way: scene.states(texts, {way: 1.0}) for way in folders}
    artifacts = {way: _fit(scene, dials, hooked[0], states, plain) for way, states in shipped.items()}
    count = 1 + len(dials)
    return Composition(
        names=[one.name for one in members],
        dials=list(dials),
        backend=backend,
        matrix=_matrix(scene, members, pairs, alone, tuple(folders), progress),
        artifacts=artifacts,
        settings=settings,
        stacked_from_loaded=scene.divergence(loaded[0], shipped[STACKED]).mean if STACKED in shipped else None,
        interplay=_interplay(plain, hooked[:count], loaded[1:count], shipped),
        n_tokens=plain.shape[0],
        sha256={way: sha256(folder) for way, folder in folders.items()}
        | {"texts": digest([list(one.ids) for one in texts]), "base": base.revision},
        reasons=list(_reasons(members, artifacts)),
    )


def _adapter(number: int) -> str:
    return f"member{number}"  # not the recipe's name: PEFT takes no dot in it


def _on(dials: Sequence[float]) -> dict[str, float]:
    return {_adapter(n): dial for n, dial in enumerate(dials) if dial}


def _texts(base: LoadedModel, members: Sequence[Member], program: Program, progress: Progress) -> list[Encoded]:
    """Every member's held-out prompts, continued by the model under all hooks; none that any compile has seen."""
    met = _calibrated(members)
    found: list[Encoded] = []
    with progress.phase("reference: the model under all hooks", len(members)) as advance:
        for one in members:
            options = one.recipe.verify
            prompts = [text for text in one.behaviour.heldout if text.prompt not in met][: options.heldout]
            met |= {text.prompt for text in prompts}  # files may be shared
            if prompts:
                limit, seed = options.max_new_tokens, one.recipe.seed + 1
                found += continue_prompts(base, prompts, program, max_new_tokens=limit, temperature=1.0, seed=seed)
            advance(1)
    if not found:
        raise RecipeError(
            "data.heldout: every prompt is among a recipe's calibration prompts; give prompts of their own."
        )
    return found


def _calibrated(members: Sequence[Member]) -> set[str]:
    return {text.prompt for one in members for text in one.behaviour.calibration}


def _fit(scene: _Scene, dials: tuple[float, ...], hooked: Tensor, compiled: Tensor, plain: Tensor) -> Fit:
    found = scene.divergence(hooked, compiled)
    return Fit(dials, found.mean, scene.divergence(hooked, plain).mean, found.top1_agreement)


def _test_pairs(base: LoadedModel, members: Sequence[Member], one: Member) -> list[Encoded]:
    """Both sides of a member's own test pairs, but those whose prompt a compile has seen; raises `RecipeError`."""
    met = _calibrated(members)
    fresh = [pair for pair in one.behaviour.test if pair.prompt not in met][: one.recipe.verify.pairs]
    if not fresh:
        raise RecipeError(f"data.test: every prompt of {one.name} is among a recipe's calibration prompts.")
    return encode_pairs(base, fresh)


def _matrix(
    scene: _Scene,
    members: Sequence[Member],
    pairs: Sequence[Sequence[Encoded]],
    alone: Sequence[tuple[float, ...]],
    composed: Sequence[str],
    progress: Progress,
) -> list[Row]:
    """A row a behaviour, a column a way to run."""
    everything = summed(members, [one.dial for one in members])
    ways: dict[str, Way] = {f"hooks {m.name}": summed(members, on) for m, on in zip(members, alone, strict=True)}
    ways |= {"hooks all": everything}
    ways |= {f"adapter {m.name}": _on(on) for m, on in zip(members, alone, strict=True)}
    ways |= {LOADED: _on([one.dial for one in members])} | {way: {way: 1.0} for way in composed}
    rows = []
    with progress.phase("the interference matrix", len(members) * (1 + len(ways))) as advance:
        for one, own in zip(members, pairs, strict=True):
            found = {}
            for label, way in {"base": None, **ways}.items():
                found[label] = scene.contrast(own, way)
                advance(1)
            plain = found.pop("base")
            changes = {label: values - plain for label, values in found.items()}
            rows.append(_row(one, [m.name for m in members], (LOADED, *composed), changes))
    return rows


def _row(member: Member, names: Sequence[str], shipped: Sequence[str], changes: Mapping[str, np.ndarray]) -> Row:
    """Intervals over pairs, of the changes [n_pairs] and of their differences pair by pair."""

    def interval(values: np.ndarray) -> Interval:
        return bootstrap_mean(values, seed=member.recipe.seed)

    def summed_alone(kind: str) -> np.ndarray:
        return np.asarray(np.sum([changes[f"{kind} {name}"] for name in names], axis=0))

    together = changes["hooks all"]
    return Row(
        behaviour=member.name,
        n_pairs=len(together),
        effects={label: interval(values) for label, values in changes.items()},
        cross={
            "hooks": interval(together - summed_alone("hooks")),
            "adapters": interval(changes[LOADED] - summed_alone("adapter")),
        },
        missed={way: interval(changes[way] - together) for way in shipped},
    )


def _interplay(
    plain: Tensor, hooked: Sequence[Tensor], alone: Sequence[Tensor], shipped: Mapping[str, Tensor]
) -> Interplay:
    """`hooked`: all programs, then each; `alone`: each adapter; all [n_tokens, d_model]."""
    together, *each = (states.double() - plain.double() for states in hooked)
    errors = sum(
        (got.double() - plain.double() - wanted for got, wanted in zip(alone, each, strict=True)), 0 * together
    )
    missed = {way: states.double() - plain.double() - together for way, states in shipped.items()}
    size = float(sum(one.square().sum() for one in each)) ** 0.5
    return Interplay(
        programs=float((together - sum(each)).norm()) / size,
        alone=float(errors.norm()) / size,
        errors={way: float(one.norm()) / size for way, one in missed.items()},
        cross=float((missed[LOADED] - errors).norm()) / size,
    )


def _reasons(members: Sequence[Member], artifacts: Mapping[str, Fit]) -> Iterator[str]:
    """Why an artifact is not the steered model, by the strictest of the recipes' gates."""
    gates = [one.recipe.verify.gates for one in members]
    for way, fit in artifacts.items():
        allowed = min(gate.kl_remaining for gate in gates) * fit.kl_base + min(gate.exact_kl for gate in gates)
        if not fit.kl <= allowed:
            yield f"{way}: KL {fit.kl:.2e} nats a token against all hooks at once; at most {allowed:.2e}"
