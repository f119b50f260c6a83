"""Identities that hold for every program, on a tiny model with hooks on."""

from __future__ import annotations

import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from compile_steer.steering.hooks import steered
from compile_steer.steering.passes import canonical
from compile_steer.steering.program import Intervention, Program
from compile_steer.steering.sites import OPERATIONS, POINTS, OperationName, Point, Site
from tests.helpers.captures import captured
from tests.helpers.rounding import assert_close_to_rounding
from tests.helpers.tiny import LAYERS, Padded, edit, loaded, logits, program, relative_error, texts, vector

FAMILY = "granite"  # its residual multiplier is not 1
MODEL = loaded(FAMILY).model
BATCH = Padded.of(texts(((3, 4), (5, 1))), "left")

sizes = st.floats(0.2, 3.0).map(lambda x: round(x, 2))
numbers = st.builds(lambda size, sign: sign * size, sizes, st.sampled_from((-1.0, 1.0)))
seeds = st.integers(0, 5)
sites = st.builds(Site, st.integers(0, LAYERS - 1), st.sampled_from(POINTS))
scopes = st.sampled_from(("all", "prompt", "response", "last_prompt", "last_prompt+response"))


@st.composite
def interventions(draw: st.DrawFn) -> Intervention:
    name: OperationName = draw(st.sampled_from(OPERATIONS))
    return Intervention(
        draw(sites),
        name,
        vector(draw(seeds), draw(sizes) if name == "add" else 1.0),
        draw(numbers),
        draw(scopes),
        projection=draw(numbers) if name == "clamp" else None,
        enabled=draw(st.sampled_from((True, True, True, False))),
    )


programs = st.lists(interventions(), min_size=1, max_size=4).map(lambda edits: program(FAMILY, *edits))


def at(layer: int, point: Point, operation: OperationName, seed: int, **rest: Any) -> Intervention:
    unit = vector(seed, 1.0)
    return Intervention(Site(layer, point), operation, unit, **{"coefficient": 0.8, **rest})


def output(steering: Program) -> Tensor:
    with steered(MODEL, steering, roles=BATCH.roles):
        return logits(MODEL, BATCH)


def activation(site: Site, *steps: Intervention) -> Tensor:
    """The activation at `site` of the real tokens under a program, [n_tokens, d_model], in double."""
    with steered(MODEL, program(FAMILY, *steps), roles=BATCH.roles), captured(FAMILY, MODEL) as streams:
        logits(MODEL, BATCH)
    scope = streams.before if site.point == "resid_pre" else streams.after
    # What a sublayer adds is read off the stream: the block's output for the MLP, the middle for the attention.
    if site.point in ("attn_out", "mlp_out"):
        scope = streams.attn if site.point == "attn_out" else streams.mlp
    return torch.cat(BATCH.rows(scope[site.layer])).double()


def everywhere(site: Site, operation: OperationName, seed: int, coefficient: float, **rest: float) -> Intervention:
    v = vector(seed, 1.7 if operation == "add" else 1.0)
    return Intervention(site, operation, v, coefficient, projection=rest.get("projection"))


# ----------------------------------------------------------------------------------------- identities


@given(sites, seeds)
def test_ablating_twice_is_ablating_once(site: Site, seed: int) -> None:
    action = everywhere(site, "ablate", seed, 1.0)
    once, twice = activation(site, action), activation(site, action, action)
    assert relative_error(twice, once) < 1e-5
    assert float((once @ action.vector.double()).abs().max()) < 1e-4 * float(once.abs().max())
    assert relative_error(activation(site), once) > 1e-4


@given(sites, seeds, numbers)
def test_clamping_sets_the_projection_and_keeps_the_rest(site: Site, seed: int, projection: float) -> None:
    action = everywhere(site, "clamp", seed, 1.0, projection=projection)
    unit = action.vector.double()
    clamped, base = activation(site, action), activation(site)
    assert float((clamped @ unit - projection).abs().max()) < 1e-4
    across, before = (h - torch.outer(h @ unit, unit) for h in (clamped, base))
    assert relative_error(across, before) < 1e-5


@given(sites, seeds, numbers)
def test_adding_and_taking_away_restores_the_base(site: Site, seed: int, coefficient: float) -> None:
    added = program(FAMILY, everywhere(site, "add", seed, coefficient))
    assert relative_error(output(added + -added), output(program(FAMILY))) < 2e-5
    assert relative_error(output(added), output(program(FAMILY))) > 1e-4


@given(interventions(), numbers)
def test_the_change_at_a_site_is_linear_in_the_coefficient(action: Intervention, factor: float) -> None:
    alone = program(FAMILY, action).toggled(0, True)
    (single,), (scaled,) = alone.interventions, alone.scaled(factor).interventions
    base = activation(action.site)
    change = activation(action.site, single) - base
    assert torch.allclose(
        activation(action.site, scaled) - base, factor * change, atol=1e-5 * float(base.abs().max() + 10)
    )


@given(sites, st.lists(st.tuples(st.sampled_from(OPERATIONS), seeds, numbers), min_size=2, max_size=4))
def test_composed_edits_are_the_edits_in_turn(site: Site, steps: list[tuple[OperationName, int, float]]) -> None:
    edits = [
        everywhere(site, name, seed, c, **({"projection": c} if name == "clamp" else {})) for name, seed, c in steps
    ]
    expected = activation(site)
    for action in edits:
        expected = edit(action, expected)
    assert relative_error(activation(site, *edits), expected) < 1e-5


@given(programs, numbers, numbers)
def test_scaling_by_two_factors_is_scaling_by_their_product(steering: Program, first: float, second: float) -> None:
    assert relative_error(output(steering * first * second), output((first * second) * steering)) < 1e-4


@given(programs, st.integers(0, 3))
def test_an_intervention_switched_off_is_one_left_out(steering: Program, index: int) -> None:
    index %= len(steering.interventions)
    rest = (i for n, i in enumerate(steering.interventions) if n != index)
    assert relative_error(output(steering.toggled(index, False)), output(program(FAMILY, *rest))) < 1e-6


# --------------------------------------------------------------------------------------------- passes


@settings(max_examples=2 * settings().max_examples)  # whole programs are the most varied
@example(program(FAMILY, at(2, "resid_pre", "clamp", 1, projection=2.5), at(1, "resid_post", "add", 1)))
@example(
    program(
        FAMILY,
        at(2, "resid_pre", "add", 1),
        at(1, "resid_post", "clamp", 1, projection=2.5),
        at(2, "resid_pre", "add", 1),
    )
)
@example(
    program(
        FAMILY, at(1, "mlp_out", "add", 1), at(1, "mlp_out", "add", 2, coefficient=-1.9), at(2, "resid_pre", "add", 1)
    )
)
@given(programs)
def test_the_canonical_program_steers_exactly_as_the_program(steering: Program) -> None:
    canonical_form = canonical(steering)
    assert relative_error(output(canonical_form), output(steering)) < 1e-5
    assert all(i.enabled and i.coefficient != 0 for i in canonical_form.interventions)
    assert all(i.site.point != "resid_pre" or i.site.layer == 0 for i in canonical_form.interventions)
    assert canonical_form.first_layer == steering.first_layer


@given(programs)
def test_the_canonical_program_is_its_own_canonical_program(steering: Program) -> None:
    once = canonical(steering)
    twice = canonical(once)
    assert [i.describe() for i in twice.interventions] == [i.describe() for i in once.interventions]
    assert all(torch.equal(a.vector, b.vector) for a, b in zip(once.interventions, twice.interventions, strict=True))


# ----------------------------------------------------------------------------------------------- disk


@given(programs)
def test_a_saved_program_has_the_same_vectors_and_steers_the_same(steering: Program) -> None:
    separate = Program(
        tuple(replace(i, vector=i.vector.clone()) for i in steering.interventions),
        steering.model,
        steering.revision,
    )
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "program.safetensors"
        separate.save(path)
        reread = Program.load(path)
    assert reread.describe() == steering.describe()
    assert all(
        torch.equal(a.vector, b.vector) for a, b in zip(reread.interventions, steering.interventions, strict=True)
    )
    assert_close_to_rounding(output(reread), output(steering))
