"""Directions from another model than the one that they are for: an instruction-tuned sibling of a base model.

Vectors of Gemma-2's instruction-tuned models steer its base models (Stolfo et al. 2410.12877, section 6): what both
share is the residual stream, so only models of the same shape and tokenizer are taken.
"""

from __future__ import annotations

from compile_steer.common.errors import LayoutError
from compile_steer.models.load import LoadedModel, load


def load_sibling(reference: str, target: LoadedModel, dtype: str) -> LoadedModel:
    """The other model, which reads its data through its own chat template; raises `LayoutError` for another shape."""
    source = load(reference, device=str(target.device), dtype=dtype)
    problems = []
    for what, found, wanted in (
        ("blocks", source.layout.n_layers, target.layout.n_layers),
        ("dimensions of the stream", source.layout.d_model, target.layout.d_model),
    ):
        if found != wanted:
            problems.append(f"extract.model '{reference}' has {found} {what}; '{target.id}' has {wanted}.")
    mine, theirs = target.tokenizer.get_vocab(), source.tokenizer.get_vocab()
    if mine != theirs:
        differ = len(set(mine.items()) ^ set(theirs.items()))
        problems.append(
            f"extract.model '{reference}' has another tokenizer than '{target.id}' ({differ} entries differ)."
        )
    if problems:
        raise LayoutError([*problems, "A direction means the same only in two trainings of one base model."])
    return source
