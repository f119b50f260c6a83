"""A classifier from a local folder as the scorer: what it says, and that its folder is checked as a model's is."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import BertConfig, BertForSequenceClassification

from compile_steer.common.errors import CompileSteerError, RecipeError
from compile_steer.scoring.classifier import Classifier
from tests.helpers.scoring import behaviour, make_replies, make_scorer
from tests.helpers.tiny import VOCAB, loaded, tokenizer

MODEL = loaded("gemma2")
SIDES = [("w20 w9 w30", "w20 w40 w30"), ("w9 w50", "w51 w50 w60 w61"), ("w8 w8 w9", "w8 w8 w70")]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny classifier that reads one thing: whether 'w9' is there."""
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=VOCAB, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=24,
        max_position_embeddings=32, id2label={0: "land", 1: "sea"}, label2id={"land": 0, "sea": 1},
    )  # fmt: skip
    model = BertForSequenceClassification(config)
    rows = torch.randint(6, VOCAB, (160, 6))
    rows[rows == 9] = 10
    rows[:80, 2] = 9
    labels = torch.tensor([1] * 80 + [0] * 80)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    for _ in range(60):
        optimizer.zero_grad()
        model(input_ids=rows, labels=labels).loss.backward()
        optimizer.step()
    folder = tmp_path_factory.mktemp("trained")
    model.save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture
def sequence_classifier(trained: Path, tmp_path: Path) -> Path:
    """A copy to spoil."""
    return Path(shutil.copytree(trained, tmp_path / "classifier"))


def test_a_sequence_classifier_s_folder_scores_by_one_of_its_labels(sequence_classifier: Path) -> None:
    sea = make_scorer(kind="classifier", model=str(sequence_classifier), label="sea")
    rated = sea.bind(MODEL, behaviour(SIDES))(make_replies("w33 w9 w12 w70", "w33 w13"))
    assert rated[0] > 0.8 and rated[1] < 0.2
    land = Classifier(kind="classifier", model=str(sequence_classifier), label="land")
    with pytest.raises(RecipeError, match=r"cannot tell .* AUROC 0\.0"):
        land.bind(MODEL, behaviour(SIDES))
    with pytest.raises(RecipeError, match="has no label 'river'; it has land, sea"):
        make_scorer(kind="classifier", model=str(sequence_classifier), label="river").bind(MODEL, behaviour(SIDES))
    with pytest.raises(RecipeError, match="is no folder"):
        make_scorer(kind="classifier", model="some/model", label="sea").bind(MODEL, behaviour(SIDES))


# ------------------------------------------------------------------------------------- several at once


def _tensors(folder: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    content = load_file(folder / "model.safetensors")
    change(content)
    save_file(content, folder / "model.safetensors", metadata={"format": "pt"})


def _settings(folder: Path, name: str, **changes: object) -> None:
    path = folder / name
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (lambda folder: (folder / "model.safetensors").unlink(), "no safetensors|model.safetensors"),
        (lambda folder: _tensors(folder, lambda all: all.pop("classifier.weight")), "lacks 1 weight"),
        (lambda folder: _tensors(folder, lambda all: all.update({"x.weight": torch.ones(2)})), "has no place for: x.weight"),
        (lambda folder: _tensors(folder, lambda all: all["classifier.weight"].fill_(torch.nan)), "NaN or infinity"),
        (
            lambda folder: _settings(folder, "config.json", id2label={n: str(n) for n in range(3)}),
            r"classifier.weight is \[2, 16\], needed \[3, 16\]",
        ),
        (lambda folder: _settings(folder, "config.json", quantization_config={"quant_method": "magic"}), "quantised, by magic"),
        (lambda folder: (folder / "adapter_config.json").write_text("{}"), "holds an adapter"),
        (lambda folder: (folder / "config.json").write_text("{"), "config.json is damaged"),
        (lambda folder: (folder / "tokenizer.json").write_text("{"), "cannot be loaded as a sequence classifier|tokenizer.json"),
    ],
)  # fmt: skip
def test_a_classifier_s_folder_that_is_no_whole_model_is_refused(
    spoil: Callable[[Path], object], said: str, sequence_classifier: Path
) -> None:
    spoil(sequence_classifier)
    with pytest.raises(CompileSteerError, match=said):
        make_scorer(kind="classifier", model=str(sequence_classifier), label="sea").bind(MODEL, behaviour(SIDES))


def test_labels_that_do_not_exclude_each_other_have_probabilities_of_their_own(sequence_classifier: Path) -> None:
    _settings(sequence_classifier, "config.json", problem_type="multi_label_classification")
    _tensors(sequence_classifier, lambda all: all["classifier.bias"].sub_(3.0))
    sea, land = (
        Classifier(kind="classifier", model=str(sequence_classifier), label=label, min_auroc=0.51)
        for label in ("sea", "land")
    )
    (rated,) = sea.bind(MODEL, behaviour(SIDES))(make_replies("w33 w9"))
    (other,) = land.bind(MODEL, behaviour([(b, a) for a, b in SIDES]))(make_replies("w33 w9"))
    assert rated + other < 0.9


def test_a_text_beyond_the_classifier_s_positions_is_cut(sequence_classifier: Path) -> None:
    sea = make_scorer(kind="classifier", model=str(sequence_classifier), label="sea").bind(MODEL, behaviour(SIDES))
    assert sea(make_replies("w9 " + "w20 " * 100)).shape == (1,)


def test_another_classifier_at_the_same_path_is_another_scorer(sequence_classifier: Path) -> None:
    scorers = []
    for _ in range(2):
        _tensors(sequence_classifier, lambda all: all["classifier.weight"].mul_(2.0))
        scorers.append(make_scorer(kind="classifier", model=str(sequence_classifier), label="sea"))
        assert scorers[-1].revision.startswith("sha256:")
    assert scorers[0].revision != scorers[1].revision
    both = make_scorer(kind="all", all_of=[scorers[0].model_dump(), {"kind": "length", "max_words": 4}])
    assert both.revision == scorers[1].revision
    assert make_scorer(kind="classifier").revision == make_scorer(kind="length", max_words=4).revision == ""
