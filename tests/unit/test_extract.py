"""Directions from pairs against the definition of each method, and what the stage makes of them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from compile_steer.common.errors import ArtifactError, RecipeError
from compile_steer.extraction.options import PairMethod
from compile_steer.extraction.pair_methods import fit, with_controls
from compile_steer.models.forward import read_activations
from compile_steer.models.text import Pair, Text
from compile_steer.models.tokens import encode
from compile_steer.steering.directions import Directions
from compile_steer.validation.options import ValidateOptions
from compile_steer.validation.sweep import candidates
from tests.helpers.captures import captured
from tests.helpers.extraction import extract_with, training_data
from tests.helpers.tiny import HIDDEN, LAYERS, Padded, loaded, logits

METHODS: tuple[PairMethod, ...] = ("mean_difference", "pca", "logistic")


# -------------------------------------------------------------------------------------- directions


def sides(n: int = 14, noise: float = 0.3, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Activations [n, 2, d] of both sides that differ along a known unit direction, by 2 and 5 at the two layers."""
    generator = torch.Generator().manual_seed(seed)
    unit = torch.nn.functional.normalize(torch.randn(HIDDEN, generator=generator), dim=0)
    length = torch.tensor([2.0, 5.0])[None, :, None] * (1 + 0.5 * torch.rand(n, 1, 1, generator=generator))
    negative = 3.0 * torch.randn(n, 2, HIDDEN, generator=generator)
    return negative + length * unit + noise * torch.randn(n, 2, HIDDEN, generator=generator), negative, unit


@pytest.mark.parametrize("method", METHODS)
def test_every_method_finds_the_direction_with_its_sign_at_the_length_of_the_mean_difference(
    method: PairMethod,
) -> None:
    positive, negative, unit = sides()
    directions = fit(positive, negative, method)
    mean = (positive - negative).mean(dim=0)
    assert torch.allclose(directions.norm(dim=-1), mean.norm(dim=-1), rtol=1e-5)
    assert bool((torch.nn.functional.cosine_similarity(directions, unit.expand(2, -1)) > 0.97).all())
    assert torch.allclose(fit(negative, positive, method), -directions, atol=1e-4)


def test_the_mean_difference_is_the_difference_of_the_means() -> None:
    positive, negative, _unit = sides(noise=2.0)
    assert torch.allclose(
        fit(positive, negative, "mean_difference"), positive.mean(dim=0) - negative.mean(dim=0), atol=1e-5
    )


def test_pca_is_the_axis_of_the_largest_second_moment_of_the_differences() -> None:
    positive, negative, _unit = sides(noise=2.0)
    directions = fit(positive, negative, "pca")
    for layer in range(2):
        differences = (positive - negative)[:, layer].double()
        values, vectors = torch.linalg.eigh(differences.T @ differences)
        cosine = torch.nn.functional.cosine_similarity(directions[layer].double(), vectors[:, -1], dim=0)
        assert float(values[-1]) > float(values[-2])
        assert abs(float(cosine)) > 0.9999


def test_the_sign_is_that_of_the_mean_difference_even_if_the_first_pair_goes_the_other_way() -> None:
    positive, negative, unit = sides()
    positive[0], negative[0] = negative[0].clone(), positive[0].clone()
    axis = torch.linalg.svd((positive - negative)[:, 1], full_matrices=False)[2][0]
    assert float(axis @ unit) < -0.9, "the raw axis must point the wrong way here"
    for method in METHODS:
        assert float(fit(positive, negative, method)[1] @ unit) > 1.0


def test_the_logistic_direction_is_a_minimum_of_its_penalised_loss() -> None:
    positive, negative, _unit = sides(noise=2.0)
    directions = fit(positive, negative, "logistic")[0].double()
    differences = (positive - negative)[:, 0].double()
    differences = differences / differences.norm(dim=-1).mean()

    def loss(weights: Tensor) -> Tensor:
        return (
            torch.nn.functional.softplus(-(differences @ weights)).mean()
            + 0.5 / len(differences) * weights.square().sum()
        )

    weights = torch.zeros(HIDDEN, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([weights], max_iter=200, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        value = loss(weights)
        value.backward()
        return value

    optimizer.step(closure)
    assert float(torch.nn.functional.cosine_similarity(directions, weights.detach(), dim=0)) > 0.9999


@pytest.mark.parametrize("method", METHODS)
def test_shuffled_labels_give_what_the_method_finds_in_them(method: PairMethod) -> None:
    positive, negative, unit = sides(noise=1.0)
    extracted = with_controls(positive, negative, method, 5, seed=3)
    shuffled = extracted.shuffled
    assert torch.equal(extracted.vectors, fit(positive, negative, method))
    assert tuple(shuffled.shape) == (5, 2, HIDDEN)
    length = (positive - negative).mean(dim=0).norm(dim=-1)
    assert bool((shuffled.norm(dim=-1) < 0.9 * length).all())  # what the pairs have in common has cancelled
    assert torch.equal(shuffled, with_controls(positive, negative, method, 5, seed=3).shuffled)
    assert not torch.allclose(shuffled, with_controls(positive, negative, method, 5, seed=4).shuffled)
    if method != "pca":  # an axis does not care for the sides
        real = torch.nn.functional.cosine_similarity(fit(positive, negative, method), unit.expand(2, -1)).min()
        assert float((shuffled @ unit / shuffled.norm(dim=-1)).abs().max()) < 0.7 * float(real)


def test_a_control_of_a_clamp_has_the_projection_of_its_own_labels() -> None:
    positive, negative, _unit = sides(noise=1.0)
    directions = with_controls(positive, negative, "mean_difference", 4, seed=3)
    projections = directions.projections()
    assert projections is not None and directions.positive is not None
    assert tuple(projections.shape) == (5, 2)
    for n, vectors in enumerate([directions.vectors, *directions.shuffled]):
        along = torch.nn.functional.normalize(vectors, dim=-1)
        assert torch.allclose(projections[n], (directions.positive[n] * along).sum(dim=-1), atol=1e-4)
        # The sides' means lie to both sides of the middle, by half of their difference.
        middle = (positive + negative).mean(dim=0) / 2
        assert torch.allclose(directions.positive[n], middle + vectors / 2, atol=1e-4)


# -------------------------------------------------------------------------------------------- stage


PAIRS = tuple(Pair(Text(f"w{n} w60 w8", f"w4{n} w50"), Text(f"w{n} w70 w8", f"w5{n}"), f"w{n}") for n in range(6, 10))


def test_directions_are_fitted_to_the_first_pairs_and_are_the_same_after_saving(tmp_path: Path) -> None:
    tiny = loaded("granite")
    options = {"pairs": 3, "point": "mlp_out", "method": "pca", "shuffled": 6}
    directions = extract_with(tiny, training_data(*PAIRS), **options)
    positive, negative = (
        read_activations(tiny, side, point="mlp_out", readout="response_mean")
        for side in ([p.positive for p in PAIRS[:3]], [p.negative for p in PAIRS[:3]])
    )
    assert torch.allclose(directions.vectors, fit(positive, negative, "pca"), atol=1e-5)
    assert torch.allclose(directions.shuffled, with_controls(positive, negative, "pca", 6, 3).shuffled, atol=1e-4)
    assert (directions.model, directions.revision, directions.point, directions.inputs) == (
        tiny.id,
        tiny.revision,
        "mlp_out",
        "",
    )
    directions.save(tmp_path / "a.safetensors")
    again = Directions.load(tmp_path / "a.safetensors")
    assert torch.equal(again.vectors, directions.vectors)
    assert torch.equal(again.shuffled, directions.shuffled)
    assert replace(again, vectors=directions.vectors, shuffled=directions.shuffled) == directions


def test_files_without_directions_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    for metadata in ({}, {"directions": "{"}, {"directions": "{}"}, {"directions": '{"x": 1}'}):
        save_file({"directions": torch.ones(2, 3), "shuffled": torch.ones(1, 2, 3)}, str(path), metadata=metadata)
        with pytest.raises(
            ArtifactError,
            match="'directions' in its metadata|'directions' metadata is damaged.*'compile-steer extract'",
        ):
            Directions.load(path)


def test_more_pairs_than_the_data_have_are_refused() -> None:
    with pytest.raises(RecipeError, match=r"extract\.pairs: found 4 pairs in data\.train; needed: 9"):
        extract_with(loaded("llama"), training_data(*PAIRS), pairs=9)


def test_the_same_prompt_on_both_sides_cannot_be_read_at_its_last_token() -> None:
    same = [replace(p, negative=Text(p.positive.prompt, "w50")) for p in PAIRS[:2]]
    with pytest.raises(RecipeError, match="2 of 4 pairs have the same prompt on both sides"):
        extract_with(loaded("llama"), training_data(*same, *PAIRS[2:]), readout="last_prompt")


def test_sides_that_are_the_same_text_have_no_direction() -> None:
    same = [replace(p, negative=p.positive) for p in PAIRS]
    with pytest.raises(RecipeError, match="there is no direction between them"):
        extract_with(loaded("llama"), training_data(*same))


@pytest.mark.parametrize("method", METHODS)
def test_equal_embeddings_below_do_not_hide_the_directions_above(method: PairMethod) -> None:
    """The prompts end in one and the same token, as every chat template's do: only the input of block 0 is equal."""
    directions = extract_with(
        loaded("llama"), training_data(*PAIRS), point="resid_pre", readout="last_prompt", method=method
    )
    assert float(directions.vectors[1:].norm(dim=-1).min()) > 0.1
    assert bool(torch.isfinite(directions.vectors).all())
    assert bool(torch.isfinite(directions.shuffled).all())


# ------------------------------------------------------------------------ clamps, lengths, other layers


ASKED = tuple(
    replace(p, positive=Text(f"{p.prompt} w90 w{20 + n}"), negative=Text(p.prompt)) for n, p in enumerate(PAIRS)
)


def test_an_instruction_gives_the_direction_and_target_of_stolfo() -> None:
    """u = normalised mean of x(q + instruction) - x(q), t = mean of x(q + instruction) . u, both at the last token."""
    tiny = loaded("llama")
    directions = extract_with(tiny, training_data(*ASKED), readout="last_prompt", operation="clamp")
    states = []
    for side in ([p.positive for p in ASKED], [p.negative for p in ASKED]):
        rows = []
        for text in side:
            with captured("llama", tiny.model) as streams:
                logits(tiny.model, Padded.of([encode(tiny.tokenizer, text)], "right"))
            rows.append(streams.after[2][0, -1])
        states.append(torch.stack(rows))
    mean = (states[0] - states[1]).mean(dim=0)
    unit = mean / mean.norm()
    intervention = directions.program(2, 0.8, "all").interventions[0]
    assert (intervention.operation, intervention.coefficient) == ("clamp", 0.8)
    assert torch.allclose(intervention.vector, unit, atol=1e-5)
    assert intervention.projection == pytest.approx(float((states[0] @ unit).mean()), rel=1e-4)


def test_a_response_that_is_not_read_changes_nothing() -> None:
    answered = [replace(p, positive=replace(p.positive, response="w33 w34")) for p in ASKED]
    first, second = (
        extract_with(loaded("llama"), training_data(*pairs), readout="last_prompt") for pairs in (ASKED, answered)
    )
    assert torch.equal(first.vectors, second.vectors)


def test_lengths_are_that_of_the_method_or_1_or_the_median_norm_of_the_stream() -> None:
    tiny = loaded("granite")
    neutral = (Text("w8 w9", "w10 w11 w12"), Text("w13", "w14 w15"), Text("w40 w41", "w42"))
    whole = replace(training_data(*PAIRS), neutral=neutral)
    own, unit, stream = (
        extract_with(tiny, whole, length=length, point="mlp_out") for length in ("own", "unit", "stream")
    )
    norms: list[list[float]] = [[] for _ in range(LAYERS)]
    for text in neutral:
        with captured("granite", tiny.model) as streams:
            logits(tiny.model, Padded.of([encode(tiny.tokenizer, text)], "right"))
        for layer in range(LAYERS):
            norms[layer] += streams.mlp[layer][0].norm(dim=-1).tolist()
    median = torch.tensor(norms).median(dim=1).values
    assert torch.allclose(unit.vectors.norm(dim=-1), torch.ones(LAYERS), atol=1e-5)
    assert torch.allclose(stream.vectors.norm(dim=-1), median, rtol=1e-4)
    assert torch.allclose(stream.shuffled.norm(dim=-1), median.expand(len(stream.shuffled), LAYERS), rtol=1e-4)
    for other in (unit, stream):
        assert torch.nn.functional.cosine_similarity(other.vectors, own.vectors).min() > 0.9999


def test_only_layers_with_a_direction_are_swept() -> None:
    directions = extract_with(loaded("llama"), training_data(*PAIRS))
    assert directions.layers == tuple(range(LAYERS))
    options = ValidateOptions.model_validate({"score": {"kind": "lowercase"}})
    assert candidates(options, directions) == [1, 2, 3]
    tiny = replace(directions, vectors=torch.where(torch.arange(LAYERS)[:, None] == 3, directions.vectors, 0.0))
    assert tiny.layers == (3,)
    assert candidates(options, tiny) == [3]
    assert candidates(options.model_copy(update={"layers": (3,)}), tiny) == [3]
    with pytest.raises(RecipeError, match=r"validate\.layers: 0, 2 without a direction; there is one for 3"):
        candidates(options.model_copy(update={"layers": (2, 0, 3)}), tiny)


def test_negative_coefficients_are_legal_for_exclusion() -> None:
    assert ValidateOptions.model_validate({"score": {"kind": "lowercase"}, "coefficients": [-1.5]}).coefficients == (
        -1.5,
    )
