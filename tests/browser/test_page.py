"""The page of a run in a real browser: what stands in which column, in which light, on which width."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from compile_steer.report.page import write_page
from compile_steer.report.recommendation import recommend
from compile_steer.validation.report import ValidationReport
from compile_steer.verification.parity import Parity
from tests.helpers.small_run import SETTINGS, SmallRun


def written(run: SmallRun, path: Path, **changes: str) -> Path:
    """The page of the run at `path`; in each answer the model KEY shows what the model VALUE answered."""
    folders = [run.paths.merged("bias", "fp32"), run.paths.adapter("closed_form")]
    parities = [Parity.load(folder / "parity.json") for folder in folders]
    answers = [{**row, **{key: row[value] for key, value in changes.items()}} for row in parities[0].behaviour.answers]
    parities[0] = replace(parities[0], behaviour=replace(parities[0].behaviour, answers=answers))
    report = ValidationReport.load(run.paths.validation)
    shipped = recommend(parities, folders)
    write_page(path, run.read(), "add", [], report, parities, shipped, {}, n_validation=8)
    return path


def stranger(folder: Path, prompts: list[str]) -> list[str]:
    """What the checkpoint answers in stock transformers."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype="float32")
    answers = []
    for prompt in prompts:
        chat = [{"role": "user", "content": prompt}]
        tokens = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=True, return_tensors="pt")
        with torch.no_grad():
            whole = model.generate(**tokens, max_new_tokens=SETTINGS["verify"]["max_new_tokens"], do_sample=False)
        answers.append(tokenizer.decode(whole[0, tokens["input_ids"].shape[1] :], skip_special_tokens=True))
    return answers


def check_columns(page: Any, folder: Path, base: Path) -> None:
    """The compiled column is what the file on disk answers, and the base's column what the base answers."""
    prompts = page.locator(".prompt").all_inner_texts()
    assert len(prompts) == 8
    compiled, unchanged = (page.locator(f".answer.{name}").all_inner_texts() for name in ("compiled", "base"))
    assert compiled == stranger(folder, prompts)
    assert unchanged == stranger(base, prompts)
    assert compiled != unchanged
    # A difference is marked where there is one, and only there.
    steered = page.locator(".answer.steered").all_inner_texts()
    marked = [bool(text) for text in page.locator(".answer.compiled mark").all_text_contents()]
    assert marked == [one != other for one, other in zip(compiled, steered, strict=True)]


def test_the_compiled_column_is_what_the_file_answers(page: Any, original: SmallRun, tmp_path: Path) -> None:
    merged, base = original.paths.merged("bias", "fp32"), original.root / "model"
    page.goto(written(original, tmp_path / "run.html").as_uri())
    check_columns(page, merged, base)
    for changes in ({"compiled": "base"}, {"steered": "base", "compiled": "base"}, {"base": "steered"}):
        page.goto(written(original, tmp_path / "wrong.html", **changes).as_uri())
        with pytest.raises(AssertionError):
            check_columns(page, merged, base)


def test_the_page_fits_a_phone_is_dark_where_asked_and_opens_at_its_anchors(
    page: Any, original: SmallRun, tmp_path: Path
) -> None:
    page.goto(written(original, tmp_path / "run.html").as_uri())
    light = page.evaluate("getComputedStyle(document.body).backgroundColor")
    page.emulate_media(color_scheme="dark")
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") != light
    ink = page.evaluate("getComputedStyle(document.body).color")
    assert page.evaluate("getComputedStyle(document.querySelector('svg text')).fill") == ink
    for width in (1300, 400):
        page.set_viewport_size({"width": width, "height": 900})
        assert page.evaluate("document.documentElement.scrollWidth") <= width
    for link in page.locator("nav a").all():
        link.click()
        target = page.locator(link.get_attribute("href"))
        assert target.count() == 1 and -1 <= target.bounding_box()["y"] < 900
    columns = "getComputedStyle(document.querySelector('.three')).gridTemplateColumns.split(' ').length"
    assert page.evaluate(columns) == 1 and not page.locator("details table").first.is_visible()
    page.emulate_media(media="print")
    assert page.evaluate(columns) == 3 and not page.locator("nav").is_visible()
