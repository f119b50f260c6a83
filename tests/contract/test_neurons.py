"""Neurons of an MLP taken for a constant, pairs that read the stream, for ablations and clamps, and pairs that tell roles."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from compile_steer.lowering import joint
from compile_steer.lowering.block_pass import recorded, run_student
from compile_steer.lowering.closed_form import Stage
from compile_steer.lowering.constant_neuron import ConstantNeuron
from compile_steer.lowering.neurons import GatedMLP, Reader
from compile_steer.lowering.projection import solve_projection
from compile_steer.lowering.role_pair import RolePair
from compile_steer.lowering.stream_pair import StreamPair
from compile_steer.lowering.teacher_student import TeacherStudent
from compile_steer.models.load import LoadedModel
from compile_steer.steering.low_rank import linear_shape
from compile_steer.steering.patch import WeightPatch, with_patch
from compile_steer.steering.sites import OperationName
from tests.helpers.fitting import CALIBRATION, canonical_program, remaining_kl, solve, stages_of
from tests.helpers.tiny import intervention, loaded

LAYER = 1


def models_at(
    family: str, operation: OperationName = "ablate", positions: str = "all", tiny: LoadedModel | None = None
) -> TeacherStudent:
    steering = canonical_program(family, intervention(operation, "resid_post", LAYER, positions=positions))
    models = TeacherStudent(steering, tiny or loaded(family), CALIBRATION, 4096, lambda _texts: None)
    models.run_teacher(LAYER)
    return models


def mlp_of(models: TeacherStudent) -> GatedMLP | None:
    return GatedMLP.of(models, LAYER, models.loaded.layout.output_projection(LAYER, "mlp").name)


def down_input(models: TeacherStudent, mlp: GatedMLP, patch: WeightPatch) -> tuple[Tensor, Tensor]:
    """What the MLP and its output projection read, [n, d_model] and [n, d_mlp]."""
    activations = models.batches[0]
    with (
        recorded(models.loaded.layout.model, [mlp.gate.name, mlp.down]) as calls,
        with_patch(models.loaded.model, patch),
    ):
        models.run_block(activations.batch, activations.student, LAYER)
    return calls[mlp.gate.name][0].flatten(0, -2), calls[mlp.down][0].flatten(0, -2)


@pytest.mark.parametrize(
    ("family", "gate", "up"),
    [
        ("llama", Reader("mlp.gate_proj"), Reader("mlp.up_proj")),
        ("granite", Reader("mlp.gate_proj"), Reader("mlp.up_proj")),
        ("phi3", Reader("mlp.gate_up_proj"), Reader("mlp.gate_up_proj", 48)),
    ],
)
def test_the_gate_is_told_by_what_the_mlp_computes(family: str, gate: Reader, up: Reader) -> None:
    mlp = mlp_of(models_at(family))
    assert mlp is not None
    for found, expected in ((mlp.gate, gate), (mlp.up, up)):
        assert found.name.endswith(expected.name)
        assert found.first == expected.first


def test_a_process_may_have_no_text_of_the_first_batch() -> None:
    models = models_at("llama", "add")
    first = models.batches[0]
    models.batches.insert(0, first.select(torch.zeros(len(first.batch.rows), dtype=torch.bool)))
    mlp = mlp_of(models)
    assert mlp == mlp_of(models_at("llama", "add"))
    assert mlp is not None
    torch.testing.assert_close(mlp.activation(models, torch.full((mlp.width,), -1.0))[0], torch.tensor(-0.26894143))


@pytest.mark.parametrize("family", ["gpt2", "gpt_neox", "phi"])
def test_an_mlp_without_a_gate_has_no_pair(family: str) -> None:
    models = models_at(family)
    assert mlp_of(models) is None
    joint.solve_jointly(models, LAYER, 1, lambda _texts: None, print)
    assert not models.kept


@pytest.mark.parametrize("family", ["llama", "phi3"])
def test_the_difference_of_both_neurons_is_a_product_of_two_reads(family: str) -> None:
    models = models_at(family)
    mlp = mlp_of(models)
    assert mlp is not None
    pair = StreamPair.of(models, mlp)
    edits, kept = pair.edits(models, to_all=True)
    without_columns = kept[mlp.down]
    first, second = without_columns.A.argmax(dim=1).tolist()
    _z, plain = down_input(models, mlp, WeightPatch())
    z, edited = down_input(models, mlp, WeightPatch(edits))
    changed = (edited - plain).abs().amax(dim=0) > 1e-6
    assert changed.nonzero().flatten().tolist() == sorted([first, second])
    gate, read = (
        models.loaded.layout.model.get_submodule(reader.name).weight[reader.first + first]
        + (edits[reader.name].B @ edits[reader.name].A)[reader.first + first]
        for reader in (mlp.gate, mlp.up)
    )
    product = (z @ gate) * (z @ read)
    torch.testing.assert_close(edited[:, first] - edited[:, second], product, rtol=1e-3, atol=1e-4)
    # Until the output projection is solved neither neuron writes anything.
    down = models.loaded.layout.model.get_submodule(mlp.down)
    left = down.weight + without_columns.B @ without_columns.A
    assert float(left[:, [first, second]].detach().abs().max()) < 1e-6 * float(down.weight.detach().abs().max()) + 1e-7


@pytest.mark.parametrize("activation", [nn.SiLU(), nn.GELU(), nn.GELU("tanh"), nn.ReLU()])
def test_a_neuron_is_as_good_as_constant_where_its_read_is_one_but_for_a_few_hundredths(
    activation: nn.Module,
) -> None:
    tiny = copy.deepcopy(loaded("llama"))
    tiny.layout.blocks[LAYER].get_submodule("mlp").act_fn = activation
    models = models_at("llama", "add", tiny=tiny)
    mlp = mlp_of(models)
    assert mlp is not None
    neuron = ConstantNeuron.of(models, mlp)
    gates = torch.linspace(-8, 0, 80_001)
    highest, at = (gates * activation(gates)).max(dim=0)
    if highest == 0:  # ReLU
        assert neuron is None
        return
    assert neuron is not None
    assert neuron.gate == pytest.approx(float(gates[at]), abs=1e-3)
    edits, without_columns = neuron.edits(models, to_all=True)
    z, edited = down_input(models, mlp, WeightPatch(edits))
    (number,) = without_columns.A.argmax(dim=1).tolist()
    module = tiny.layout.model.get_submodule(mlp.gate.name)
    read = z @ (module.weight + edits[mlp.gate.name].B @ edits[mlp.gate.name].A)[number] / neuron.gate
    near = (read - 1).abs() < 0.1
    assert int(near.sum()) > 50
    written = (edited[:, number] / edited[:, number].median())[near]
    assert float((read[near] - 1).abs().max()) > 0.05
    assert float((written - 1).abs().max()) < 0.02


@pytest.mark.parametrize(("family", "times"), [("llama", 0.4), ("granite", 0.4), ("phi3", 0.4), ("qwen3", 0.6)])
def test_less_is_left_of_a_constant_than_by_edits_whose_scale_is_a_dial(family: str, times: float) -> None:
    tiny, steering = loaded(family), canonical_program(family, intervention("add", "resid_post", LAYER))
    stages = stages_of(tiny, steering)
    exact, dial = (solve(tiny, steering, stages, dial=dial) for dial in (False, True))
    assert remaining_kl(tiny, steering, exact) < times * remaining_kl(tiny, steering, dial)
    # Only one of them follows the coefficient.
    negated = [remaining_kl(tiny, -steering, -1.0 * patch) for patch in (exact, dial)]
    assert negated[0] > 1
    assert negated[1] < 0.2


@pytest.mark.parametrize("family", ["granite", "phi3", "qwen3"])
def test_where_the_neuron_leaves_next_to_nothing_there_is_nothing_else(
    family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(joint, "_ENOUGH", 0.02)  # a model of 32 dimensions leaves more
    tiny, steering = loaded(family), canonical_program(family, intervention("add", "resid_post", LAYER))
    mlp, ran = mlp_of(models_at(family, "add")), list[int]()
    assert mlp is not None
    monkeypatch.setattr(TeacherStudent, "run_student", lambda _models, block: ran.append(block))
    patch = solve(tiny, steering, stages_of(tiny, steering))
    fused = 1 + (mlp.gate.name == mlp.up.name)
    ranks = {mlp.gate.name: fused, mlp.up.name: fused, mlp.down: 1}
    assert {name: edit.rank for name, edit in patch.low_rank.items()} == ranks
    assert not ran, "no block above is run"


@pytest.mark.parametrize("operation", ["add", "ablate"])
def test_no_neuron_is_taken_where_the_scale_is_to_be_a_dial(operation: OperationName) -> None:
    models = models_at("llama", operation)
    models.dial = True
    joint.solve_jointly(models, LAYER, 1, lambda _texts: None, print)
    assert not models.kept
    assert models.is_dial(LAYER) == (operation == "add")


@pytest.mark.parametrize("family", ["llama", "phi3"])
def test_the_difference_of_both_neurons_is_a_step_between_roles_that_no_linear_read_is(family: str) -> None:
    models = models_at(family, "add", "response")
    mlp = mlp_of(models)
    assert mlp is not None
    # Tokens that a plane parts, at all distances from it; the first input is nearly the same at each.
    z = torch.randn(600, models.loaded.layout.d_model, generator=torch.Generator().manual_seed(0))
    z[:, 0] = 1 + 0.02 * z[:, 0]
    z = z[z[:, 1].abs() > 0.2]
    chosen, every = z[:, 1] > 0, torch.ones(len(z))
    sizes = torch.ones(linear_shape(models.loaded.layout.model.get_submodule(mlp.down))[1], dtype=torch.float64)
    attn, unread = models.loaded.layout.output_projection(LAYER, "attn").name, torch.zeros(z.shape[1])
    pair = RolePair(mlp, attn, z, z, every, chosen, every < 0, sizes, unread)
    edits, kept = pair.edits(models, to_all=True)
    neurons = kept[mlp.down].A.argmax(dim=1)
    assert attn not in edits, "the MLP reads nothing of what the attention's projection writes"

    def rows(reader: Reader) -> Tensor:
        edit = edits[reader.name]
        weights: Tensor = models.loaded.layout.model.get_submodule(reader.name).weight.detach() + edit.B @ edit.A
        return weights[reader.first + neurons]

    first, second = (torch.nn.functional.silu(z @ rows(mlp.gate).T) * (z @ rows(mlp.up).T)).T
    step = (first - second) / (first - second)[chosen].median()
    linear = z @ torch.linalg.lstsq(z, chosen.float().unsqueeze(1)).solution.squeeze(1)
    errors = [float((read - chosen.float()).square().mean()) for read in (step, linear)]
    assert errors[0] < 0.02
    assert errors[1] > 0.05


@pytest.mark.parametrize("family", ["llama", "phi3", "granite"])
def test_what_the_attention_knows_of_roles_is_written_for_the_pair_and_taken_away_again(family: str) -> None:
    models = models_at(family, "add", "response")
    mlp, attn = mlp_of(models), models.loaded.layout.output_projection(LAYER, "attn")
    assert mlp is not None
    pair = RolePair.of(models, mlp, attn, frozenset({"response"}))
    # RMS norms: what is written moves each dimension of the MLP's input by its weight over the stream's size.
    assert float(pair.response.abs().min()) > 0
    edits, kept = pair.edits(models, to_all=True)
    writer = edits[attn.name]
    assert kept[attn.name] is writer
    assert writer.rank == 1
    assert [one.reads_attention for one in pair.variants] == [True, False]
    # What is written is told from what the MLP's input holds, which it was not before.
    said = pair.a @ writer.A[0]
    models.solved = {attn.name: writer}
    after = torch.cat([own.calls[mlp.gate.name].input for own in run_student(models, LAYER, [mlp.gate.name])])
    fits = [z @ torch.linalg.lstsq(z, said.unsqueeze(1)).solution[:, 0] for z in (pair.z, after)]
    before, now = (float((fit - said).square().mean() / said.square().mean()) for fit in fits)
    assert now < 0.7 * before, (before, now)
    # The third neuron reads it, and is linear in it.
    models.solved = edits
    calls = [own.calls[mlp.down].input for own in run_student(models, LAYER, [mlp.down])]
    third = torch.cat(calls)[:, kept[mlp.down].A.argmax(dim=1)[2]]
    assert float(torch.corrcoef(torch.stack([third, fits[1]]))[0, 1]) > 0.95


@pytest.mark.parametrize("family", ["llama", "phi3", "qwen3"])
def test_less_is_left_of_responses_than_by_the_projections_alone(family: str) -> None:
    tiny = loaded(family)
    steering = canonical_program(family, intervention("add", "resid_post", LAYER, positions="response"))
    stages = stages_of(tiny, steering)
    before = [Stage(LAYER, "mlp", 8), Stage(LAYER, "attn", 8), *stages[1:]]
    new, old = (remaining_kl(tiny, steering, solve(tiny, steering, plan)) for plan in (stages, before))
    assert new < 0.95 * old


@pytest.mark.parametrize("family", ["llama", "granite", "phi3", "qwen3"])
@pytest.mark.parametrize("operation", ["ablate", "clamp"])
def test_less_is_left_than_by_the_projections_alone(family: str, operation: OperationName) -> None:
    steering, tiny = canonical_program(family, intervention(operation, "resid_post", LAYER)), loaded(family)
    stages = stages_of(tiny, steering)
    assert [stage.projection for stage in stages[:2]] == ["both", "mlp"]
    before = [Stage(LAYER, "mlp", 8), Stage(LAYER, "attn", 8), *stages[1:]]
    new, old = (remaining_kl(tiny, steering, solve(tiny, steering, plan)) for plan in (stages, before))
    assert new < 0.6 * old


def test_the_pair_stays_when_the_projection_is_solved_again() -> None:
    models = models_at("llama")
    mlp = mlp_of(models)
    assert mlp is not None
    joint.solve_jointly(models, LAYER, 1, lambda _texts: None, print)
    kept = models.kept[mlp.down]
    projection = models.loaded.layout.output_projection(LAYER, "mlp")
    solve_projection(models, projection, 8, lambda _texts: None, print)
    edit, (_d_model, d_mlp) = models.solved[mlp.down], linear_shape(projection.module)
    assert edit.A.shape[1] == d_mlp
    assert torch.equal(edit.B[:, :2], kept.B)
    assert torch.equal(edit.A[:2], kept.A)


def test_no_pair_is_taken_where_it_helps_nothing_on_texts_that_nothing_was_fitted_to(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # Without an edit, with the neurons, both projections together, one after the other.
    models, errors = models_at("llama"), iter([2.0, 1.0, 0.7, 0.5])
    monkeypatch.setattr(joint, "held_out_error", lambda *_args: next(errors))
    joint.solve_jointly(models, LAYER, 1, lambda _texts: None, print)
    assert not models.kept
    assert {name.rsplit(".", 1)[-1] for name in models.solved} == {"down_proj", "o_proj"}


@pytest.mark.parametrize(("operation", "positions"), [("add", "all"), ("add", "response"), ("ablate", "all")])
def test_every_text_is_counted_four_times_whichever_way_is_taken(operation: OperationName, positions: str) -> None:
    models, counted = models_at("llama", operation, positions), list[float]()
    joint.solve_jointly(models, LAYER, 1, counted.append, print)
    assert sum(counted) == 4 * len(CALIBRATION)
