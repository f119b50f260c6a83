"""What an error at each token counts in a fit: all alike where every token is changed, less where none is compared."""

from __future__ import annotations

import pytest
import torch

from compile_steer.lowering.options import DistillOptions
from compile_steer.lowering.teacher_student import SuffixModel, TeacherStudent, token_weights
from compile_steer.lowering.training import _base_texts
from compile_steer.models.tokens import Encoded, pad
from compile_steer.steering.patch import WeightPatch
from tests.helpers.fitting import CALIBRATION, canonical_program, job
from tests.helpers.tiny import intervention, loaded

# Two turns, and a shorter text.
TEXTS = [Encoded(tuple(range(1, 11)), 8, ((3, 5),)), Encoded((1, 2, 3, 4, 5), 3)]
LESS = 0.1


@pytest.mark.parametrize(
    ("positions", "expected"),
    [
        ("all", [[1] * 10, [1] * 5 + [0] * 5]),
        # What predicts a response, and the whole prompt or the whole response, which are changed.
        ("prompt", [[1] * 4 + [LESS] + [1] * 4 + [LESS], [1] * 4 + [LESS] + [0] * 5]),
        ("response", [[LESS] * 2 + [1] * 3 + [LESS] * 2 + [1] * 3, [LESS] * 2 + [1] * 3 + [0] * 5]),
        (
            "last_prompt",
            [[LESS] * 2 + [1] * 2 + [LESS] * 3 + [1] * 2 + [LESS], [LESS] * 2 + [1] * 2 + [LESS] + [0] * 5],
        ),
    ],
)
def test_a_token_counts_less_where_nothing_is_changed_and_nothing_compared(
    positions: str, expected: list[list[float]]
) -> None:
    batch = pad(TEXTS, range(2), pad_id=0)
    steering = canonical_program("llama", intervention(positions=positions))
    found = token_weights(batch, steering)
    assert torch.allclose(found, torch.tensor(expected, dtype=torch.float32))


def test_fits_and_trainings_weigh_the_same_tokens_alike() -> None:
    tiny, steering = loaded("llama"), canonical_program("llama", intervention(positions="response"))
    suffix = SuffixModel(tiny, steering, first=1)
    taught = suffix.batches(CALIBRATION, 256)
    models = TeacherStudent(steering, tiny, CALIBRATION, 256, lambda _done: None)
    for trained, fitted in zip(taught, models.batches, strict=True):
        assert torch.equal(trained.weights, fitted.weights[fitted.real])
        assert trained.total_weight == pytest.approx(float(fitted.weights.sum()))
        assert 0 < trained.total_weight < int(fitted.real.sum())
    # The mean over tokens is over their weights: by hand for one batch.
    one = taught[0]
    with torch.no_grad():
        log_p, log_q = (
            tiny.model.lm_head(states).double().log_softmax(dim=-1) for states in (one.teacher, suffix.student(one))
        )
    kl = (log_p.exp() * (log_p - log_q)).sum(dim=-1)
    by_hand = float((one.weights * kl).sum() / one.weights.sum())
    assert suffix.mean_kl([one], WeightPatch()) == pytest.approx(by_hand, rel=1e-4)
    assert by_hand != pytest.approx(float(kl.mean()), rel=0.01)


@pytest.mark.parametrize(("positions", "least"), [("all", 1.0), ("response", LESS)])
def test_texts_of_the_base_weigh_as_those_of_the_program(positions: str, least: float) -> None:
    tiny, steering = loaded("llama"), canonical_program("llama", intervention(positions=positions))
    suffix = SuffixModel(tiny, steering, first=1)
    ((batch, _kl),) = _base_texts(job(tiny, steering), suffix, CALIBRATION[:4], DistillOptions())
    assert float(batch.weights.min()) == pytest.approx(least)
    assert batch.total_weight == pytest.approx(float(batch.weights.sum()))
