"""Every number of every option is finite and in its range before any work; nothing else is taken for a number."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import pytest
from pydantic import ValidationError

from compile_steer.common.errors import RecipeError
from compile_steer.common.options import Section
from compile_steer.data.pairs import Pairs
from compile_steer.recipe import Recipe, read_recipe
from tests.unit.test_recipe import GOOD


def sections(section: type[Section]) -> Iterator[type[Section]]:
    for inner in section.__subclasses__():
        yield inner
        yield from sections(inner)


def has_numbers(annotation: Any) -> bool:
    return annotation in (int, float) or any(map(has_numbers, get_args(annotation)))


FIELDS = sorted(
    {
        (section, field.alias or name, "tuple" in str(field.annotation))
        for section in sections(Section)
        if section.__module__.startswith("compile_steer.")
        for name, field in section.model_fields.items()
        if has_numbers(field.annotation)
    },
    key=str,
)


def accepts(section: type[Section], key: str, value: Any) -> bool:
    try:
        section.model_validate({key: value})
    except ValidationError as error:
        return not any(problem["loc"][:1] == (key,) for problem in error.errors())
    return True


@pytest.mark.parametrize(("section", "key", "many"), FIELDS, ids=[f"{s.__name__}.{key}" for s, key, _many in FIELDS])
def test_no_option_takes_what_is_no_number_in_range(section: type[Section], key: str, many: bool) -> None:
    values: tuple[Any, ...] = (math.nan, math.inf, -math.inf, 2**70, 10**400, 1e300, True, "3", [[3]], {})
    for value in values:
        assert not accepts(section, key, [value] if many else value), value


def test_all_numbers_of_a_recipe_are_among_them() -> None:
    assert len(FIELDS) > 90
    assert {"seed", "too_high"} == {key for section, key, _many in FIELDS if section is Recipe}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("seed=-1", "seed: found -1; input should be greater than or equal to 0"),
        ("seed=1.5", "seed: found 1.5; input should be a valid integer"),
        ("seed=4294967296", "seed: found 4294967296; input should be less than or equal to 4294967295"),
        ("seed=yes", "seed: found 'yes'; input should be a valid integer"),
        ("seed='3'", "seed: found '3'; input should be a valid integer"),
        ("seed=true", "seed: found True; input should be a valid integer"),
        ("seed=", "seed: found None; input should be a valid integer"),
        ("seed=1_000", "--set 'seed=1_000': the value is not valid YAML (line 1: 1_000 is read as a number or as text"),
        ("seed=1e400", "the number 1e400 is too large for a float"),
        ("validate.coefficients=[1.0, .nan]", ".nan is read as"),
        ("validate.coefficients=[1.0, '2']", "validate.coefficients.1: found '2'; input should be a valid number"),
        ("validate.coefficients=[1e10]", "validate.coefficients.0: found 10000000000.0; input should be less than or equal to 1000000000"),
        ("validate.random_directions=1000000", "validate.random_directions: found 1000000; input should be less than or equal to 1000"),
        ("extract.off_by_one=yes", "extract.off_by_one: found 'yes'; input should be a valid boolean"),
        ("extract.off_by_one=1", "extract.off_by_one: found 1; input should be a valid boolean"),
        ("seed=2024-01-01", "seed: found '2024-01-01'; input should be a valid integer"),
        ("validate.layers=[1, 1]", "validate.layers: found"),
        ("compile.backends=[]", "compile.backends: found"),
        ("compile.backends=[bias, bias]", "each once"),
        ("verify.forms=[adapter, adapter]", "each once"),
        ("verify.max_new_tokens=1000000", "input should be less than or equal to 100000"),
        (".seed=3", "--set '.seed=3': needed: key.to.set=value"),
        ("validate..layers=[1]", "needed: key.to.set=value"),
        ("ask=3", "ask: found 3; input should be a valid string"),
        ('name="\x07"', "name"),
    ],
)  # fmt: skip
def test_a_value_of_the_command_line_is_refused_by_its_key(tmp_path: Path, change: str, message: str) -> None:
    (tmp_path / "tiny.yaml").write_text(GOOD)
    with pytest.raises(RecipeError, match=re.escape(message)):
        read_recipe(tmp_path / "tiny.yaml", [change])


def test_fractions_are_numbers() -> None:
    pairs = Pairs.from_list([(f"p{n}", "a", "b") for n in range(9)])
    for fractions in ((math.nan, 0.5, 0.5), (math.inf, 0.2, 0.2), (0.6, 0.4, -0.0)):
        with pytest.raises(RecipeError, match="needed: all above 0, with the sum 1"):
            pairs.split(*fractions)
