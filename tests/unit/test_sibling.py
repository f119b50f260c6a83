"""Directions from another model of the same shape, and prompts put in a format of the recipe's own."""

from __future__ import annotations

import copy
import shutil
from pathlib import Path

import pytest
import torch
from tokenizers.processors import TemplateProcessing
from transformers import AutoTokenizer

from compile_steer.artifacts.paths import RunPaths
from compile_steer.common.errors import LayoutError, RecipeError
from compile_steer.data.behaviour import Context
from compile_steer.models.chat import completion_template
from compile_steer.models.generate import continue_prompts
from compile_steer.models.load import LoadedModel, load
from compile_steer.models.text import Text
from compile_steer.models.tokens import encode
from compile_steer.pipeline.run import Run
from compile_steer.recipe import read_recipe
from compile_steer.steering.directions import EVERY_BLOCK, Directions
from compile_steer.tools.describe import describe_artifact
from tests.helpers.extraction import extract_with, tiny_recipe, training_data
from tests.helpers.rounding import assert_close_to_rounding
from tests.helpers.tiny import VOCAB, build, chat_tokenizer, loaded, tokenizer
from tests.unit.test_trained import PAIRS, trained

DATA = training_data(*PAIRS)


def on_disk(folder: Path, seed: int = 0, **changes: object) -> LoadedModel:
    """A tiny model of its own in `folder`, loaded from there."""
    build("llama", seed, **changes).save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return load(str(folder), device="cpu")


def related(folder: Path, base: LoadedModel, size: float = 0.02) -> LoadedModel:
    """What a little training would have made of `base`: every weight moved by a share of its own spread."""
    model = build("llama")
    generator = torch.Generator().manual_seed(9)
    with torch.no_grad():
        for mine, theirs in zip(model.parameters(), base.model.parameters(), strict=True):
            mine.copy_(theirs + size * theirs.std() * torch.randn(theirs.shape, generator=generator))
    model.save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return load(str(folder), device="cpu")


@pytest.mark.parametrize("method", ["mean_difference", "trained"])
def test_directions_of_a_sibling_are_its_own_and_made_for_the_recipes_model(tmp_path: Path, method: str) -> None:
    base = on_disk(tmp_path / "base")
    sibling = related(tmp_path / "tuned", base)
    options: dict[str, object] = {"method": method, "shuffled": 5 if method == "mean_difference" else 1}
    directions = extract_with(base, DATA, **options, model=str(tmp_path / "tuned"))
    its_own = extract_with(sibling, DATA, **options)
    on_base = extract_with(base, DATA, **options)
    # The sibling was loaded twice, and a training of several steps multiplies what differs.
    assert_close_to_rounding(directions.vectors, its_own.vectors, 1e-3 if method == "trained" else 1e-5)
    assert not torch.allclose(directions.vectors, on_base.vectors)
    assert float(torch.nn.functional.cosine_similarity(directions.vectors, on_base.vectors).min()) > 0.5
    assert (directions.model, directions.revision) == (base.id, base.revision)
    assert directions.source is not None
    assert (directions.source.model, directions.source.revision) == (sibling.id, sibling.revision)
    program = directions.program(EVERY_BLOCK if directions.joint else 2, 1.4, "all")
    prompts = [Text("w20 w21"), Text("w33")]
    assert continue_prompts(base, prompts, program, max_new_tokens=6) != continue_prompts(
        base, prompts, max_new_tokens=6
    )
    directions.save(tmp_path / "a.safetensors")
    assert Directions.load(tmp_path / "a.safetensors").source == directions.source
    assert describe_artifact(tmp_path / "a.safetensors")["source"] == {
        "model": sibling.id,
        "revision": sibling.revision,
    }


def test_a_sibling_of_another_shape_or_tokenizer_is_refused_with_every_difference(tmp_path: Path) -> None:
    base = on_disk(tmp_path / "base")
    on_disk(tmp_path / "other", num_hidden_layers=3, hidden_size=40, vocab_size=VOCAB + 1)
    other = AutoTokenizer.from_pretrained(tmp_path / "other")
    other.add_tokens(["w1000"])
    other.save_pretrained(tmp_path / "other")
    with pytest.raises(LayoutError) as error:
        extract_with(base, DATA, model=str(tmp_path / "other"))
    for line in (
        "has 3 blocks; ",
        "has 40 dimensions of the stream; ",
        "has another tokenizer than ",
        "(1 entries differ)",
    ):
        assert line in str(error.value)


def test_a_sibling_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="no such folder"):
        extract_with(loaded("llama"), DATA, model=str(tmp_path / "none"))


def test_kept_directions_are_made_anew_when_the_sibling_changes(tmp_path: Path) -> None:
    base = on_disk(tmp_path / "base")
    related(tmp_path / "tuned", base)
    recipe = tiny_recipe(model=str(tmp_path / "tuned"))
    run = Run(recipe, RunPaths(tmp_path, "a"), Context(base, DATA))
    first, again = run.extract(), run.extract()
    assert torch.equal(first.vectors, again.vectors)
    shutil.rmtree(tmp_path / "tuned")
    related(tmp_path / "tuned", base, size=0.4)
    assert not torch.allclose(run.extract().vectors, first.vectors)


def test_trained_directions_are_made_anew_for_other_positions(tmp_path: Path) -> None:
    base = on_disk(tmp_path / "base")
    options = trained()
    runs = [
        Run(tiny_recipe(positions, **options), RunPaths(tmp_path, "a"), Context(base, DATA))
        for positions in ("all", "response")
    ]
    first, other = (run.extract() for run in runs)
    assert first.inputs != other.inputs
    assert not torch.allclose(first.vectors, other.vectors)


# ------------------------------------------------------------------------------------ prompt format

FORMAT = 'w20 "\\ {prompt} {w21}\n'


def test_a_prompt_format_is_what_the_model_reads_and_travels_with_the_tokenizer(tmp_path: Path) -> None:
    on_disk(tmp_path)
    tiny = load(str(tmp_path), device="cpu", prompt_format=FORMAT)
    text = str(tiny.tokenizer.apply_chat_template([{"role": "user", "content": "w30 {{ w31 }}"}], tokenize=False))
    assert text == 'w20 "\\ w30 {{ w31 }} {w21}\n'
    tiny.tokenizer.save_pretrained(tmp_path / "merged")
    again = AutoTokenizer.from_pretrained(tmp_path / "merged")
    assert encode(again, Text("w30", "w40")) == encode(tiny.tokenizer, Text("w30", "w40"))
    history = encode(tiny.tokenizer, Text("w30", "w40 w41", (("w50", "w51 w52"),)))
    (start, stop), n = history.earlier[0], history.n_prompt
    assert (history.ids[start:stop], history.ids[n:]) == ((51, 52), (40, 41))
    assert history.ids[stop] == tiny.tokenizer.eos_token_id


def test_a_tokenizer_that_begins_every_text_begins_these_too() -> None:
    assert "bos_token" not in completion_template(FORMAT, chat_tokenizer())
    raw = copy.deepcopy(chat_tokenizer())
    raw.backend_tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    raw.chat_template = completion_template(FORMAT, raw)
    assert encode(raw, Text("w30", "w40")).ids[0] == raw.bos_token_id


@pytest.mark.parametrize("prompt_format", ["w20", "{prompt} w20", "{prompt} {prompt}\n"])
def test_a_format_without_one_prompt_or_an_end_is_refused(tmp_path: Path, prompt_format: str) -> None:
    path = tmp_path / "a.yaml"
    path.write_text("name: a\nmodel: b\n")
    with pytest.raises(RecipeError, match="prompt_format: .*a line break at the end"):
        read_recipe(path, [f"prompt_format={prompt_format!r}".replace("'", '"')])
