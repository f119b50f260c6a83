"""The first Python program of the README runs as it stands there."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import compile_steer as cs
from compile_steer.models.load import LoadedModel
from compile_steer.verification.parity import Parity
from tests.end_to_end.conftest import ROOT, SMALL
from tests.helpers import tiny

BLOCK = re.compile(r"<!-- program:start -->\n```python\n(.*?)```\n<!-- program:end -->", re.DOTALL)


# On fewer texts; the program itself is not changed.
FEWER: dict[str, dict[str, Any]] = {
    "extract": SMALL["extract"],
    "validate": SMALL["validate"] | {"max_perplexity_ratio": 1e9, "max_new_tokens": 8},
    "verify": {key: value for key, value in SMALL["verify"].items() if key != "forms"} | {"long": 0},
}


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> LoadedModel:
    """The embedded model's tokenizer, and twelve narrow blocks of random weights."""
    folder, tokenizer = tmp_path_factory.mktemp("small"), cs.load("smollm2-135m-instruct").tokenizer
    tokenizer.save_pretrained(folder)
    ids = {key: getattr(tokenizer, key) for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
    shape = {"vocab_size": len(tokenizer), "num_hidden_layers": 12, "max_position_embeddings": 2048}
    tiny.build("llama", **shape, **ids).save_pretrained(folder)
    return cs.load(str(folder))


def readme_program() -> str:
    match = BLOCK.search((ROOT / "README.md").read_text(encoding="utf-8"))
    assert match is not None, "README.md has no program between its markers"
    return match[1]


def with_options(function: Callable[..., Any], options: dict[str, Any]) -> Callable[..., Any]:
    """The function with `options` in place of what the program gives."""
    return lambda *values, **named: function(*values, **{**named, **options})


def test_readme_program_ends_in_a_verified_adapter(
    small: LoadedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The same stages run on the real model in the small run, from the command line.
    monkeypatch.setattr(cs, "load", {"smollm2-135m-instruct": small}.__getitem__, raising=False)
    for name, changes in FEWER.items():
        monkeypatch.setattr(cs, name, with_options(getattr(cs, name), changes), raising=False)
    (tmp_path / "recipes").symlink_to(ROOT / "recipes")
    monkeypatch.chdir(tmp_path)
    variables: dict[str, Any] = {}
    exec(compile(readme_program(), "README.md", "exec"), variables)
    parity = variables["parity"]
    assert isinstance(parity, Parity) and parity.form == "adapter"
    assert (tmp_path / "ocean-adapter" / "adapter_model.safetensors").is_file()
    assert parity.divergence.kl_remaining.value < 0.03 and abs(parity.divergence.gain - 1) < 0.05
    assert parity.file_error is not None and parity.file_error < 1e-4
