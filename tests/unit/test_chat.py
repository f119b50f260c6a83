"""Chat templates of strangers: what they may not do, what they are given, and that no clock but ours is read."""

from __future__ import annotations

import copy
import re
from pathlib import Path
from typing import Any

import pytest

from compile_steer.common.errors import RecipeError
from compile_steer.export.adapter import patch_provenance
from compile_steer.models import chat
from compile_steer.models.chat import ChatSettings, configure, open_reasoning, render
from compile_steer.models.load import LoadedModel
from compile_steer.models.reload import reload
from compile_steer.models.text import Text
from compile_steer.models.tokens import encode, prompt_text
from compile_steer.recipe import CHAT_KEYS, Recipe, read_recipe
from compile_steer.steering.patch import WeightPatch
from compile_steer.steering.program import Program
from tests.helpers.byte_level import VOCAB, saved, tokenizer
from tests.helpers.tiny import CHAT_TEMPLATE, build, intervention

ASK = [("user", "hi there")]
ENDLESS = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"


def with_template(template: Any) -> Any:
    made = tokenizer()
    made.chat_template = template
    return made


@pytest.mark.parametrize(
    ("template", "problem"),
    [
        ("{{ 1 / 0 }}", r"ZeroDivisionError: division by zero \(its line 1\)"),
        ("\n\n{{ 1 + 'a' }}", r"TypeError: .*\(its line 3\)"),
        ("{{ nothing.at.all }}", "UndefinedError: 'nothing' is undefined"),
        ("{{ messages[7].content }}", "UndefinedError"),
        ("{% for %}", "syntax error"),
        ("{{ raise_exception('only two turns') }}", "only two turns"),
        ("{{ messages() }}", "TypeError"),
        ("{{ ''.__class__.__mro__ }}", "SecurityError"),
        ("{% extends 'other' %}", "no loader"),
        ("{% include '/etc/passwd' %}", "no loader"),
        ("{% macro a() %}{{ a() }}{% endmacro %}{{ a() }}", "RecursionError"),
        ("{% for i in range(10**12) %}{% endfor %}", "Range too big"),
        ("{{ '%099999999999d' % 1 }}", "1 GiB of memory"),
        ("{{ '{:>99999999999}'.format(1) }}", "1 GiB of memory"),
        ("{% for i in range(20000) %}{{ 'a' * 1000 }}{% endfor %}", "a prompt of 20,000,000 characters"),
        ("{{ messages | length | int('x') }}{{ [1] | sum(attribute='z') }}", "Error"),
        ("{{ [1, 'a'] | sort }}", "TypeError"),
    ],
)
def test_whatever_goes_wrong_in_a_template_is_one_error(template: str, problem: str) -> None:
    with pytest.raises(RecipeError, match=rf"the chat template refuses a conversation \(.*{problem}"):
        render(with_template(template), ASK)
    assert render(with_template(CHAT_TEMPLATE), ASK).endswith("<s> assistant ")


def test_a_template_that_does_not_end_is_stopped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chat, "SECONDS", 0.05)
    with pytest.raises(RecipeError, match=r"does not end; it was stopped after 0\.05 seconds"):
        render(with_template(ENDLESS), ASK)
    assert render(with_template(CHAT_TEMPLATE), [("user", "the next is answered")])


def test_an_interrupted_request_does_not_answer_the_next(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(_text: str) -> str:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr("compile_steer.models.chat.json.loads", interrupted)
        with pytest.raises(KeyboardInterrupt):
            render(with_template(CHAT_TEMPLATE), [("user", "one")])
    assert "two" in render(with_template(CHAT_TEMPLATE), [("user", "two")])


def test_a_worker_that_was_killed_between_two_requests_is_started_again() -> None:
    render(with_template(CHAT_TEMPLATE), [("user", "before")])
    process = chat._WORKER._process
    assert process is not None
    process.kill()
    process.wait()
    assert "after" in render(with_template(CHAT_TEMPLATE), [("user", "after")])


PARTS = "{% for m in messages %}{% for c in m['content'] %}{{ c['text'] }}{% endfor %}{% endfor %}: "


@pytest.mark.parametrize(
    ("template", "problem"),
    [
        (PARTS, "leaves the prompt out"),
        ("", "leaves the prompt out"),
        ("{{ messages[0]['content'] | upper }}", "leaves the prompt out"),
        ("{{ messages[0]['content'] }}</s>", "ends a prompt with the end-of-text token </s>"),
        ("{{ messages[0]['content'] }}</s>\n", "ends a prompt with the end-of-text token </s>"),
        (
            {"tool_use": CHAT_TEMPLATE, "rag": CHAT_TEMPLATE},
            "several chat templates .tool_use, rag.*chat_template_name",
        ),
        (["a", "b"], "a chat template of type list"),
        (7, "a chat template of type int"),
    ],
)
def test_a_template_that_cannot_be_used_is_refused(template: Any, problem: str) -> None:
    with pytest.raises(RecipeError, match=problem):
        made = with_template(template)
        configure(made, "MODEL")
        render(made, ASK)


def test_of_several_templates_the_named_one_is_used() -> None:
    other = CHAT_TEMPLATE.replace("assistant", "w9")
    several = {"default": CHAT_TEMPLATE, "rag": other}
    for name, expected in ((None, CHAT_TEMPLATE), ("default", CHAT_TEMPLATE), ("rag", other)):
        made = with_template(several)
        configure(made, "MODEL", chat=ChatSettings(name=name))
        assert render(made, ASK) == render(with_template(expected), ASK)
    with pytest.raises(RecipeError, match="none called rga"):
        configure(with_template(several), "MODEL", chat=ChatSettings(name="rga"))
    with pytest.raises(RecipeError, match="has no chat templates with names"):
        configure(with_template(CHAT_TEMPLATE), "MODEL", chat=ChatSettings(name="rag"))


THINKING = "{{ messages[0]['content'] }}\n{% if enable_thinking is not defined or enable_thinking %}<think>{% else %}-{% endif %}\n"


@pytest.mark.parametrize(
    "start", ["", "\n", "\n\n", "  {% if true %}", " ", "{%- if true %}", "{# note #}\n", "\t{% set a = 1 %}\n"]
)
def test_arguments_become_defaults_and_nothing_else_changes(start: str) -> None:
    end = "{% endif %}" if "if true" in start else ""
    template = start + THINKING + end
    for value, given in ((False, "-"), (True, "<think>")):
        made, settings = with_template(template), ChatSettings({"enable_thinking": value})
        configure(made, "MODEL", chat=settings)
        plain = with_template(template).apply_chat_template(
            [{"role": "user", "content": "hi"}], tokenize=False, enable_thinking=value
        )
        assert render(made, [("user", "hi")]) == plain
        assert given in plain
        configure(made, "MODEL", chat=settings)
        assert made.chat_template.count("is not defined %}") == 1, "doing it twice is doing it once"
        other = made.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False, enable_thinking=not value)
        assert given not in other, "a default can still be changed"


def test_arguments_of_every_kind_reach_the_template() -> None:
    value = {"text": 'a"b\\c\n{{ x }} é', "n": [1, -2.5, None, True], "inner": {"k": "v"}}
    made = with_template("{{ messages[0]['content'] }} {{ given | tojson }}")
    configure(made, "MODEL", chat=ChatSettings({"given": value}))
    plain = with_template("{{ messages[0]['content'] }} {{ given | tojson }}")
    assert render(made, ASK) == plain.apply_chat_template(
        [{"role": "user", "content": "hi there"}], tokenize=False, given=value
    )


def test_an_argument_that_no_template_reads_is_refused() -> None:
    with pytest.raises(RecipeError, match="does not read enable_thinkng; it reads enable_thinking"):
        configure(with_template(THINKING), "MODEL", chat=ChatSettings({"enable_thinkng": False}))
    with pytest.raises(RecipeError, match="has no chat template that could take arguments"):
        configure(with_template(None), "MODEL", chat=ChatSettings({"enable_thinking": False}))


def test_a_template_that_prints_the_date_is_told_a_fixed_one() -> None:
    dated = "Today: {{ strftime_now('%d %B %Y %H:%M') }}. {{ messages[0]['content'] }} > "
    assert render(with_template(dated), ASK) == "Today: 01 January 2026 12:00. hi there > "
    made = with_template(dated)
    configure(made, "MODEL", chat=ChatSettings(date="2024-07-26"))
    assert render(made, ASK) == "Today: 26 July 2024 12:00. hi there > "
    both = with_template(dated + "{{ x }}")
    configure(both, "MODEL", chat=ChatSettings({"x": 1}, date="2024-07-26"))
    assert render(both, ASK) == "Today: 26 July 2024 12:00. hi there > 1"


@pytest.mark.parametrize(
    ("end", "remark"),
    [
        ("<think>\n", "inside <think>.*a template that closes it"),
        ("<|thinking|>", "inside <thinking>"),
        ("[THINK]", "inside <THINK>"),
        ("{% if enable_thinking is not defined %}<think>{% endif %}", r"chat_template: \{enable_thinking: false\}"),
        ("<think>\n\n</think>\n\n", ""),
        ("assistant: ", ""),
    ],
)
def test_a_prompt_that_ends_within_reasoning_is_said_with_the_cure(end: str, remark: str) -> None:
    said = open_reasoning(with_template("{{ messages[0]['content'] }}\n" + end))
    assert re.search(remark, said) if remark else said == ""


def test_the_prompt_itself_may_speak_of_thinking() -> None:
    made = with_template(CHAT_TEMPLATE)
    assert "<think>" in render(made, [("user", "what is <think>?")])
    assert open_reasoning(made) == ""
    assert open_reasoning(with_template(None)) == ""


def test_a_template_that_drops_a_later_prompt_is_refused() -> None:
    first_only = (
        "{{ messages[0]['content'] }}{% for m in messages[1:] %}{% if m['role'] == 'assistant' %}: {{ m['content'] }}"
        "{% endif %}{% endfor %}: "
    )
    with pytest.raises(RecipeError, match="leaves out or changes the prompt 'second'"):
        encode(with_template(first_only), Text("second", history=(("first", "answer"),)))
    cut = "{{ messages[0]['content'][:9] }}: "
    assert encode(with_template(cut), Text("short")).ids
    with pytest.raises(RecipeError, match="leaves out or changes the prompt 'a prompt of"):
        encode(with_template(cut), Text("a prompt of many words"))


# ----------------------------------------------------------------------------------- recipe and artifacts


def test_an_artifact_is_read_with_the_settings_of_its_base(tmp_path: Path) -> None:
    saved("llama", tmp_path)
    two = with_template({"default": CHAT_TEMPLATE, "slow": THINKING + "{{ strftime_now('%Y') }}"})
    settings = ChatSettings({"enable_thinking": False}, "slow", "2024-07-26")
    for name in ("all templates", "the one that was used"):
        base = LoadedModel(build("llama", vocab_size=VOCAB), copy.deepcopy(two), "m", "r", "", chat=settings)
        configure(base.tokenizer, "m", chat=settings)
        (two if name == "all templates" else base.tokenizer).save_pretrained(tmp_path)
        artifact = reload(tmp_path, base)
        assert artifact.chat == settings
        assert prompt_text(artifact.tokenizer, Text("he")) == prompt_text(base.tokenizer, Text("he")) == "he\n-2024"
    program = Program((intervention(),), "m", "r")
    assert patch_provenance("n", "bias", WeightPatch(), base, program, 0.0).chat == {
        "arguments": {"enable_thinking": False},
        "name": "slow",
        "date": "2024-07-26",
    }


RECIPE = "name: a\nmodel: m\ndata: {train: t, validation: v, test: x}\nvalidate: {score: {kind: ended}}\n"


def test_the_settings_of_a_recipe_are_recorded_and_old_records_are_read(tmp_path: Path) -> None:
    path = tmp_path / "a.yaml"
    path.write_text(RECIPE)
    recipe = read_recipe(path, ["chat_template={a: [1, x]}", "chat_template_name=rag", "chat_template_date=2024-07-26"])
    assert recipe.chat == ChatSettings({"a": [1, "x"]}, "rag", "2024-07-26")
    assert Recipe.recall(recipe.record, tmp_path).chat == recipe.chat
    old = {key: value for key, value in recipe.record.items() if key not in CHAT_KEYS}
    assert Recipe.recall(old, tmp_path).chat == ChatSettings()


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ("chat_template={messages: 1}", "'messages' cannot be"),
        ("chat_template={strftime_now: x}", "'strftime_now' cannot be"),
        ("chat_template={'a b': 1}", "'a b' cannot be"),
        ("chat_template={'x %}{{ 1 }}': 1}", "cannot be"),
        ("chat_template={a: .nan}", ".nan is read as a number or as text"),
        ("chat_template=thinking", "chat_template"),
        ("chat_template_date=yesterday", "chat_template_date"),
        ("chat_template_name=[a]", "chat_template_name"),
        ('prompt_format="{prompt}\\n"', "prompt_format takes the place of the chat template"),
    ],
)
def test_settings_that_cannot_be_are_refused_by_their_key(tmp_path: Path, change: str, problem: str) -> None:
    path = tmp_path / "a.yaml"
    path.write_text(RECIPE)
    changes = [change] if change.startswith("chat") else ["chat_template={a: 1}", change]
    with pytest.raises(RecipeError, match=problem):
        read_recipe(path, changes)
