"""Trained vectors: what is trained and what is not, the losses against their definitions, and what is refused."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from compile_steer.common.errors import RecipeError
from compile_steer.data.behaviour import Context
from compile_steer.extraction.options import ExtractOptions, TrainedOptions
from compile_steer.extraction.pair_methods import fit
from compile_steer.extraction.stage import extract
from compile_steer.extraction.trained import Objective, Start, bipo_loss, starting_point, train
from compile_steer.models.generate import continue_prompts
from compile_steer.models.load import LoadedModel
from compile_steer.models.text import Pair, Text
from compile_steer.steering.directions import EVERY_BLOCK, Directions
from compile_steer.steering.hooks import steered
from compile_steer.steering.program import Intervention, Program
from compile_steer.steering.sites import Site
from compile_steer.tools.describe import describe_artifact
from tests.helpers.captures import n_hooks
from tests.helpers.extraction import SEED, extract_with, training_data
from tests.helpers.tiny import EOS_ID, HIDDEN, LAYERS, build, loaded, vector

N_PAIRS = 13
PAIRS = tuple(
    Pair(Text(f"w{n} w60", f"w4{n % 3} w50 w51"), Text(f"w{n} w60", f"w8{n % 2} w90"), f"w{n} w60")
    for n in range(10, 10 + N_PAIRS)
)
QUICK = {"epochs": 3, "learning_rate": 0.07, "batch_tokens": 64, "l2": 0.003}


def misleading(tiny: LoadedModel, seed: int) -> tuple[Pair, ...]:
    """Pairs of which those that `seed` holds out say what the base would, and the rest says something else."""
    held_out = random.Random(seed).sample(range(N_PAIRS), N_PAIRS)[::6]
    own = continue_prompts(tiny, [Text(pair.prompt) for pair in PAIRS], max_new_tokens=8)
    responses = [" ".join(f"w{token}" for token in text.ids[text.n_prompt :] if token > EOS_ID + 3) for text in own]
    assert all(len(text.split()) > 3 for text in responses)
    return tuple(
        replace(pair, positive=Text(pair.prompt, responses[n] if n in held_out else "w40 w41 w42 w43 w44"))
        for n, pair in enumerate(PAIRS)
    )


def extract_trained(
    tiny: LoadedModel, positions: str = "all", pairs: Sequence[Pair] = PAIRS, **options: object
) -> Directions:
    return extract_with(tiny, training_data(*pairs), positions, **trained(**options))


def trained(**options: object) -> dict[str, object]:
    """Extract options for a quick training."""
    inner = options.pop("trained", {})
    assert isinstance(inner, dict)
    return {"method": "trained", "shuffled": 2, **options, "trained": {**QUICK, **inner}}


def response_sums(tiny: LoadedModel, program: Program, sides: Sequence[str]) -> list[float]:
    """log p(response and end of turn) of each text from whole passes of its own: no batch, no chunk, no prefix."""
    sums = []
    for pair, side in zip(PAIRS, sides, strict=True):
        prompt = tiny.tokenizer(pair.prompt, add_special_tokens=False)["input_ids"]
        response = tiny.tokenizer(getattr(pair, side).response, add_special_tokens=False)["input_ids"] + [EOS_ID]
        ids = torch.tensor([prompt + response])
        with steered(tiny.model, program), torch.no_grad():
            log_p = tiny.model(input_ids=ids).logits[0].log_softmax(dim=-1)
        sums.append(sum(float(log_p[len(prompt) + n - 1, token]) for n, token in enumerate(response)))
    return sums


def program(tiny: LoadedModel, coefficient: float = 1.7) -> Program:
    """Vectors at two blocks and two points."""
    sites = (Site(1), Site(2, "attn_out"))
    return Program(
        tuple(Intervention(site, "add", vector(n), coefficient) for n, site in enumerate(sites)), tiny.id, tiny.revision
    )


# ------------------------------------------------------------------------------------------- losses


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2"])
def test_the_likelihood_is_that_of_the_responses_and_their_ends_of_turn(family: str) -> None:
    tiny = loaded(family)
    objective = Objective(tiny, "likelihood", 0.1, first=1)
    items = objective.prepare(PAIRS, 30)
    assert len(items) > 2, "the batches must be several"
    measured = objective.evaluate(items, program(tiny))
    sums = response_sums(tiny, program(tiny), ["positive"] * N_PAIRS)
    assert measured == pytest.approx(-sum(sums) / (4 * N_PAIRS), rel=1e-4)  # three words and the end, each


@pytest.mark.parametrize("family", ["llama", "granite"])
def test_bipo_is_the_papers_equation(family: str) -> None:
    tiny, beta = loaded(family), 0.23
    objective = Objective(tiny, "bipo", beta, first=1)
    items = objective.prepare(PAIRS, 30)
    assert len(items) > 2, "the batches must be several"
    empty = Program((), tiny.id, tiny.revision)
    losses = []
    for d in (1.0, -1.0):
        r_t, r_o, r_t_base, r_o_base = (
            torch.tensor(response_sums(tiny, under, [side] * N_PAIRS))
            for under in (program(tiny).scaled(d), empty)
            for side in ("positive", "negative")
        )
        losses.append(-torch.log(torch.sigmoid(d * beta * (r_t - r_t_base) - d * beta * (r_o - r_o_base))).mean())
        losses_of_items = [objective.loss(item, program(tiny), d) * item.count for item in items]
        assert float(sum(losses_of_items)) / N_PAIRS == pytest.approx(float(losses[-1]), rel=1e-3)
    assert losses[0] != losses[1]
    assert objective.evaluate(items, program(tiny)) == pytest.approx(float(sum(losses)) / 2, rel=1e-3)


def test_without_vectors_a_preference_is_undecided() -> None:
    reference = torch.tensor([-3.0, -5.0, -2.0, -9.0])
    for sign in (1.0, -1.0):
        assert float(bipo_loss(reference, reference, 0.4, sign)) == pytest.approx(0.6931, abs=1e-4)


# ----------------------------------------------------------------------------------------- training


@pytest.mark.parametrize("loss", ["likelihood", "bipo"])
@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen3_moe"])
def test_training_lowers_the_held_out_loss_and_leaves_the_model_as_it_was(family: str, loss: str) -> None:
    tiny = replace(loaded(family), model=build(family))
    weights = {name: value.clone() for name, value in tiny.model.state_dict().items()}
    hooks = n_hooks(tiny.model)
    directions = extract_trained(tiny, trained={"loss": loss, "beta": 0.7})
    held_out = directions.curves["held_out"]
    assert len(held_out) == 1 + 3
    assert min(held_out) < 0.97 * held_out[0]
    assert bool((directions.vectors.norm(dim=1) > 0).all()), "every block has a vector"
    assert not any(parameter.requires_grad or parameter.grad is not None for parameter in tiny.model.parameters())
    assert all(torch.equal(value, weights[name]) for name, value in tiny.model.state_dict().items())
    assert n_hooks(tiny.model) == hooks


def test_the_kept_vectors_are_those_of_the_best_epoch() -> None:
    tiny = loaded("llama")
    options = TrainedOptions.model_validate({**QUICK, "epochs": 10, "l2": 10.0})
    start = starting_point(tiny, PAIRS, ExtractOptions(method="trained", trained=options))
    fitted = train(tiny, PAIRS, start, options, "all", 3, lambda _n: None)
    held_out = fitted.curves["held_out"]
    assert min(held_out) < min(held_out[0], held_out[-1]), "neither the first nor the last must be the best here"
    objective = Objective(tiny, "likelihood", 0.1, 0)
    items = objective.prepare(random.Random(3).sample(list(PAIRS), N_PAIRS)[::6], 64)
    for vectors, expected in ((fitted.best, min(held_out)), (fitted.last, held_out[-1])):
        parts = tuple(Intervention(site, "add", v) for site, v in zip(start.sites, vectors, strict=True))
        assert objective.evaluate(items, Program(parts, tiny.id, tiny.revision)) == pytest.approx(expected, rel=1e-4)


def test_the_penalty_keeps_the_vectors_short() -> None:
    norms = []
    for l2 in (0.0, 3.0, 10.0):
        curves = extract_trained(loaded("llama"), trained={"l2": l2, "epochs": 12}).curves
        norms.append(curves["norm"][-1])
    assert norms[0] > 1.2 * norms[1] > 1.5 * norms[2]


def test_the_same_seed_gives_the_same_vectors_and_another_seed_others() -> None:
    tiny = loaded("llama")
    first, again = extract_trained(tiny), extract_trained(tiny)
    assert torch.equal(first.vectors, again.vectors)
    assert torch.equal(first.shuffled, again.shuffled)
    options = ExtractOptions.model_validate(trained())
    other = extract(Context(tiny, training_data(*PAIRS), seed=4), options)
    assert not torch.allclose(first.vectors, other.vectors)


def test_vectors_are_trained_where_they_will_act() -> None:
    tiny = loaded("llama")
    assert not torch.allclose(extract_trained(tiny).vectors, extract_trained(tiny, "response").vectors)


def test_nothing_below_the_first_trained_block_is_run_again() -> None:
    tiny = replace(loaded("llama"), model=build("llama"))
    runs = [0, 0]
    for n, layer in enumerate((0, 2)):

        def count(*_args: object, n: int = n) -> None:
            runs[n] += 1

        tiny.layout.output_projection(layer, "mlp").module.register_forward_hook(count)
    options = TrainedOptions.model_validate({**QUICK, "layers": (2,)})
    start = Start((Site(2),), torch.zeros(1, HIDDEN), torch.tensor([[5.0]]))
    train(tiny, PAIRS, start, options, "all", 0, lambda _n: None)
    assert runs == [2, 4 + 3]  # two batches: one held out and measured 4 times, one trained on in each of 3 epochs


def test_training_from_the_mean_difference_begins_there() -> None:
    tiny = loaded("llama")
    options = ExtractOptions.model_validate(
        {"method": "trained", "trained": {"start": "mean_difference", "layers": (1, 3), "other_points": ("attn_out",)}}
    )
    start = starting_point(tiny, PAIRS, options)
    assert [str(site) for site in start.sites] == ["resid_post 1", "resid_post 3", "attn_out 1", "attn_out 3"]
    from compile_steer.models.forward import read_activations

    for n, site in enumerate(start.sites):
        positive, negative = (
            read_activations(tiny, side, point=site.point, readout="response_mean")
            for side in ([p.positive for p in PAIRS], [p.negative for p in PAIRS])
        )
        expected = fit(positive, negative, "mean_difference")[site.layer] / 4
        assert torch.allclose(start.vectors[n], expected, atol=1e-6)


# --------------------------------------------------------------------------------------- directions


def test_the_program_holds_a_vector_at_every_trained_block_and_point(tmp_path: Path) -> None:
    tiny = loaded("llama")
    directions = extract_trained(tiny, trained={"layers": (1, 3), "other_points": ("attn_out", "mlp_out")})
    made = directions.program(EVERY_BLOCK, 0.6, "response")
    sites = {str(i.site): i for i in made.interventions}
    assert set(sites) == {f"{point} {k}" for point in ("resid_post", "attn_out", "mlp_out") for k in (1, 3)}
    assert all((i.coefficient, i.positions) == (0.6, "response") for i in made.interventions)
    assert torch.equal(sites["attn_out 3"].vector, directions.other_points["attn_out"][0, 3])
    directions.save(tmp_path / "a.safetensors")
    again = Directions.load(tmp_path / "a.safetensors")
    assert again.curves == directions.curves
    assert again.joint
    assert [(i.site, i.vector.tolist()) for i in again.program(EVERY_BLOCK, 0.6, "all").interventions] == [
        (i.site, i.vector.tolist()) for i in made.interventions
    ]
    assert describe_artifact(tmp_path / "a.safetensors")["curves"] == directions.curves


def test_a_control_is_a_training_on_swapped_sides_of_the_same_length() -> None:
    tiny = loaded("llama")
    directions = extract_trained(tiny, shuffled=2, trained={"other_points": ("attn_out",)})
    assert tuple(directions.shuffled.shape) == (2, LAYERS, HIDDEN)
    real = directions.program(EVERY_BLOCK, 1.3, "all")
    for index in range(2):
        control = directions.control(index).program(EVERY_BLOCK, 1.3, "all")
        assert [i.site for i in control.interventions] == [i.site for i in real.interventions]
        for mine, other in zip(real.interventions, control.interventions, strict=True):
            assert float(other.vector.norm()) == pytest.approx(float(mine.vector.norm()), rel=1e-4)
        cosine = torch.nn.functional.cosine_similarity(directions.vectors, directions.shuffled[index])
        assert float(cosine.max()) < 0.99
    assert not torch.allclose(directions.shuffled[0], directions.shuffled[1])


def test_controls_raise_the_preference_less_than_the_vectors() -> None:
    tiny = loaded("llama")
    directions = extract_trained(tiny, trained={"loss": "bipo", "beta": 0.7, "epochs": 6})

    def preference(some: Directions) -> Tensor:
        under = some.program(EVERY_BLOCK, 1.0, "all")
        positive, negative = (torch.tensor(response_sums(tiny, under, [s] * N_PAIRS)) for s in ("positive", "negative"))
        return (positive - negative).mean()

    assert preference(directions) > preference(directions.control(0)) + 1.0


# ---------------------------------------------------------------------------------------- bad input


def test_options_that_do_not_fit_are_refused_all_at_once() -> None:
    with pytest.raises(ValueError, match=r"shuffled 2 is too few for method pca.*these options are of method trained"):
        ExtractOptions.model_validate({"method": "pca", "shuffled": 2, "trained": {"epochs": 3}})
    with pytest.raises(ValueError, match="names a point twice"):
        ExtractOptions.model_validate({"method": "trained", "trained": {"other_points": ["resid_post"]}})
    with pytest.raises(ValueError, match="greater than 0"):
        TrainedOptions.model_validate({"learning_rate": 0})
    for layers in ([], [-1], [2, 2]):
        with pytest.raises(ValueError, match="each once, or 'all'"):
            TrainedOptions.model_validate({"layers": layers})


def test_too_few_pairs_and_blocks_that_are_missing_are_refused() -> None:
    with pytest.raises(RecipeError) as error:
        extract_trained(loaded("llama"), pairs=PAIRS[:4], trained={"layers": (1, 9)})
    assert "found 4 pairs, needed 6 or more" in str(error.value)
    assert "trained.layers: 9 not in this model, which has blocks 0 to 3" in str(error.value)


def test_a_loss_that_is_not_finite_is_refused() -> None:
    tiny = loaded("llama")
    model = build("llama")
    with torch.no_grad():
        model.get_parameter("model.norm.weight").fill_(torch.nan)
    with pytest.raises(RecipeError, match="the loss is nan in epoch 1. Use a lower learning_rate"):
        extract_trained(replace(tiny, model=model))


def test_a_training_that_learns_nothing_is_refused() -> None:
    tiny = loaded("llama")
    with pytest.raises(RecipeError, match="held-out loss was never below its start"):
        extract_trained(tiny, pairs=misleading(tiny, SEED), trained={"learning_rate": 30.0, "l2": 0.0})
