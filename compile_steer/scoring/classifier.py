"""A small local classifier that learns the behaviour from the data's own texts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal, Self

import numpy as np
from pydantic import Field, model_validator

from compile_steer.artifacts.paths import home_path
from compile_steer.common.errors import RecipeError
from compile_steer.scoring.base import Reply, Score, ScorerBase
from compile_steer.stats import auroc

if TYPE_CHECKING:
    import torch

    from compile_steer.data.behaviour import Behaviour
    from compile_steer.models.load import LoadedModel
    from compile_steer.models.text import Pair

Probability = Callable[[Sequence[str]], np.ndarray]


class Classifier(ScorerBase):
    """The probability that the reply is of the positive side, by a classifier of words and letters.

    A logistic regression on TF-IDF of words, word pairs and 2- to 4-grams of letters, trained on the responses of
    data.train; or with `model`, the probability of `label` by the sequence classifier in that local folder. It must tell
    the responses of data.validation apart with an AUROC of at least `min_auroc`. Wrong if the sides differ in something
    else as well: it learns whatever tells them apart, length and topic included, and rates text unlike either side by
    what little it has in common with one. An empty reply is 0.
    """

    kind: Literal["classifier"]
    model: str | None = Field(None, description="local folder of a sequence classifier; none trains one on data.train")
    label: str | None = Field(None, description="the classifier's label that is the behaviour")
    min_auroc: float = Field(0.7, gt=0.5, lt=1, description="least AUROC between the two sides of data.validation")

    @model_validator(mode="after")
    def _model_has_a_label(self) -> Self:
        if (self.model is None) != (self.label is None):
            raise ValueError(
                "model and label belong together: the classifier, and which of its labels is the behaviour"
            )
        return self

    @cached_property
    def revision(self) -> str:
        from compile_steer.models.source import revision_of

        return revision_of(self.model) if self.model and home_path(self.model).is_dir() else ""

    def bind(self, loaded: LoadedModel, behaviour: Behaviour) -> Score:
        if self.model is None or self.label is None:
            texts = _responses(behaviour.train, "train")
            probability = trained_probability(texts[: len(texts) // 2], texts[len(texts) // 2 :])
        else:
            probability = _pretrained(self.model, self.label, loaded.device)
        texts = _responses(behaviour.validation, "validation")
        area = auroc(*np.split(probability(texts), 2))
        if area < self.min_auroc:
            raise RecipeError(
                f"validate.score classifier cannot tell the two sides of data.validation apart: AUROC {area:.2f} on its "
                f"{len(texts)} responses; needed {self.min_auroc:g}, and 0.5 is chance. Give more training pairs, or use "
                "another scorer."
            )

        def score(replies: Sequence[Reply]) -> np.ndarray:
            # Nothing written has no words: the classifier would return the bias that it was trained to.
            written = np.array([bool(reply.text.strip()) for reply in replies], dtype=float)
            return written * probability([reply.text for reply in replies]) if len(replies) else written

        return score


def _responses(pairs: Sequence[Pair], split: str) -> list[str]:
    """Return the positive responses, then the negative ones; raise `RecipeError` if one is empty."""
    texts = [pair.positive.response for pair in pairs] + [pair.negative.response for pair in pairs]
    if not all(text.strip() for text in texts):
        raise RecipeError(
            f"validate.score classifier needs the responses of both sides; data.{split} has prompts without."
        )
    return texts


def trained_probability(positive: Sequence[str], negative: Sequence[str]) -> Probability:
    """Train a classifier of the two sides' texts; returns the probability of the positive one, [n] texts -> [n]."""
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline, make_union

    features = make_union(
        TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True, token_pattern=r"(?u)\b\w+\b"),
        # With upper case: a behaviour may be a style.
        TfidfVectorizer(analyzer="char_wb", ngram_range=(2, 4), sublinear_tf=True, lowercase=False),
    )
    # A weak penalty: behaviours have a few dozen pairs, and the default C of 1 leaves all probabilities near 0.5.
    model = make_pipeline(features, LogisticRegression(C=10.0, max_iter=1000))
    model.fit([*positive, *negative], [1] * len(positive) + [0] * len(negative))
    return lambda texts: np.asarray(model.predict_proba(texts)[:, 1])


def _pretrained(reference: str, label: str, device: torch.device) -> Probability:
    """Raises `RecipeError` if the model is missing or has no such label, and as `read_model` and `read_tokenizer`."""
    import torch
    from transformers import AutoModelForSequenceClassification

    from compile_steer.models.checked import read_model, read_tokenizer

    folder = home_path(reference)
    if not folder.is_dir():
        raise RecipeError(
            f"validate.score classifier: model '{reference}' is no folder; needed: one with config.json and weights."
        )

    def explain(reason: str) -> RecipeError:
        problem = f"validate.score classifier: model '{reference}' cannot be loaded as a sequence classifier"
        return RecipeError(f"{problem} ({reason}).")

    # In float32 whatever the file holds: it is small, and half precision may order two texts otherwise.
    model: Any = read_model(folder, torch.float32, explain, AutoModelForSequenceClassification)
    tokenizer = read_tokenizer(folder, model, explain)
    model.config.pad_token_id = tokenizer.pad_token_id  # by which decoders find a text's last token
    limit = min(
        tokenizer.model_max_length, getattr(model.config, "max_position_embeddings", tokenizer.model_max_length)
    )
    several = model.config.problem_type == "multi_label_classification"  # each label has a probability of its own
    labels = {str(name): int(index) for index, name in model.config.id2label.items()}
    if label not in labels:
        raise RecipeError(
            f"validate.score classifier: '{reference}' has no label '{label}'; it has {', '.join(labels)}."
        )
    model.to(device).eval()

    def probability(texts: Sequence[str]) -> np.ndarray:
        batches = []
        for start in range(0, len(texts), 32):
            batch = list(texts[start : start + 32])
            inputs = tokenizer(batch, padding=True, truncation=True, max_length=limit, return_tensors="pt")
            with torch.no_grad():
                logits = model(**inputs.to(device)).logits.float()
            rated = logits.sigmoid() if several else logits.softmax(dim=-1)
            batches.append(rated[:, labels[label]].cpu().numpy())
        return np.concatenate(batches)

    return probability
