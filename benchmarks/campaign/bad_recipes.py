"""Recipes that are wrong: as YAML, as settings, and in the type of every single key."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

from pydantic import BaseModel

from benchmarks.campaign.case import RUN, Bad, Case
from benchmarks.campaign.edits import as_folder
from compile_steer.recipe import Recipe

FILE = "tide.yaml"
LAUGHS = "a: &a [x,x,x,x,x,x,x,x,x]\n" + "".join(
    f"{b}: &{b} [{','.join(['*' + a] * 9)}]\n" for a, b in zip("abcdefgh", "bcdefghi", strict=True)
)


def _write(content: str | bytes, case: Case) -> None:
    case.recipe.write_bytes(content.encode() if isinstance(content, str) else content)


def _append(text: str, case: Case) -> None:
    case.recipe.write_text(case.recipe.read_text() + text)


def _encode(encoding: str, case: Case) -> None:
    case.recipe.write_bytes(case.recipe.read_text().replace("w7 w8", "w7 é w8").encode(encoding))


FILES: dict[str, tuple[Callable[[Case], object], tuple[str, ...]]] = {
    "missing": (lambda case: case.recipe.unlink(), (FILE,)),
    "a folder": (lambda case: as_folder(case.recipe), (FILE,)),
    "empty": (partial(_write, ""), (FILE,)),
    "only a comment": (partial(_write, "# name: tide\n"), (FILE,)),
    "a list": (partial(_write, "- name: tide\n"), (FILE, "list")),
    "a text": (partial(_write, "name tide\n"), (FILE, "str")),
    "a number": (partial(_write, "7\n"), (FILE, "int")),
    "two documents": (partial(_append, "---\nname: ebb\n"), (FILE,)),
    "key twice": (partial(_append, "seed: 7\n"), (FILE, "seed")),
    "section twice": (partial(_append, "verify: {long: 0}\n"), (FILE, "verify")),
    "tab as indent": (partial(_append, "extract:\n\tpairs: 4\n"), (FILE, "line")),
    "bracket left open": (partial(_append, "extract: {pairs: 4\n"), (FILE, "line")),
    "quote left open": (partial(_append, 'prompt_format: "{prompt}\n'), (FILE, "line")),
    "unknown alias": (partial(_append, "extract: *other\n"), (FILE, "other")),
    "aliases of aliases": (partial(_append, LAUGHS), (FILE,)),
    "alias of itself": (partial(_append, "extract: &e {trained: *e}\n"), (FILE,)),
    "python object": (partial(_append, "extract: !!python/object/apply:os.system ['touch canary']\n"), (FILE,)),
    "unknown tag": (partial(_append, "extract: !include other.yaml\n"), (FILE, "!include")),
    "deep brackets": (partial(_append, "extract: " + "[" * 5000 + "]" * 5000 + "\n"), (FILE,)),
    "deep braces": (partial(_append, "extract: " + "{a: " * 3000 + "1" + "}" * 3000 + "\n"), (FILE,)),
    "UTF-16": (partial(_encode, "utf-16"), (FILE, "UTF-8")),
    "Latin-1": (partial(_encode, "latin-1"), (FILE, "UTF-8")),
    "binary": (partial(_write, bytes(range(256)) * 8), (FILE,)),
    "control codes": (partial(_append, "ask: 'a\x1b[2J\x07b'\n"), (FILE,)),
    "null bytes": (partial(_append, "ask: 'a\0b'\n"), (FILE,)),
    "lone surrogate": (partial(_append, 'extract: {readout: "\\ud83d"}\n'), (FILE,)),
    "a megabyte of digits": (partial(_append, "too_high: " + "9" * 10**6 + "\n"), (FILE,)),
    "merge key of a text": (partial(_append, "extract: {<<: text}\n"), (FILE,)),
    "binary value": (partial(_append, "prompt_format: !!binary aGVsbG8=\n"), (FILE,)),
    "a set": (partial(_append, "extract: !!set {pairs}\n"), (FILE,)),
    "a date": (partial(_append, "prompt_format: 2026-11-28\n"), (FILE, "prompt_format")),
}

# Key, value, words beside the key.
SETTINGS: tuple[tuple[str, Any, tuple[str, ...]], ...] = (
    ("name", "../up", ()),
    ("name", "", ()),
    ("name", "-x", ()),
    ("name", "a/b", ()),
    ("name", "x" * 5000, ()),
    ("nmae", "tide", ("'name'",)),
    ("model", "", ()),
    ("model", "./nowhere", ("nowhere",)),
    ("model", "nowhere.gguf", ("nowhere.gguf",)),
    ("model", "recipes", ("recipes",)),
    ("model", "recipes/tide.yaml", ("tide.yaml",)),
    ("model", "nobody/no-such-model", ("nobody/no-such-model",)),
    ("model", "a b\nc", ()),
    ("prompt_format", "no gap\n", ("{prompt}",)),
    ("prompt_format", "{prompt}{prompt}\n", ("{prompt}",)),
    ("seed", -(2**70), ()),
    ("seed", 2**70, ()),
    ("device", "cuda:99", ()),
    ("device", "toaster", ("toaster",)),
    ("device", "meta", ("meta",)),
    ("dtype", "float64", ("float64",)),
    ("dtype", "int8", ("int8",)),
    ("too_high", 1, ()),
    ("data__train", "data/nothing.jsonl", ("nothing.jsonl",)),
    ("data__train", "data", ("data",)),
    ("data__train", {"source": "json"}, ()),
    ("data__train", {"source": "csv", "data_files": ["data/train.jsonl"]}, ()),
    ("data__train", {"source": "nowhere/at-all"}, ("nowhere/at-all",)),
    ("data__kind", "pears", ("pears",)),
    ("data__positive_template", "no gap", ("{prompt}",)),
    ("data__test", "data/train.jsonl", ("overlap",)),
    ("extract__method", "magic", ("magic",)),
    ("extract__point", "resid_mid", ("resid_mid",)),
    ("extract__pairs", 10_000, ("data.train",)),
    ("extract__length", 0, ()),
    ("validate__layers", [99], ("99",)),
    ("validate__layers", [], ()),
    ("validate__layers", [1, 1], ()),
    ("validate__layers", [1.5], ()),
    ("validate__coefficients", [0], ()),
    ("validate__coefficients", [], ()),
    ("validate__coefficients", [1e300], ()),
    ("validate__coefficients", {"kl": 0.1, "perplexity_limit": 2}, ()),
    ("validate__positions", "everywhere", ("everywhere",)),
    ("validate__score", {"kind": "keywords", "patterns": ["("]}, ()),
    ("validate__score", {"kind": "keywords", "patterns": []}, ()),
    ("validate__score", {"kind": "magic"}, ("magic",)),
    ("validate__score", {"kind": "all", "all_of": []}, ("all_of",)),
    ("validate__score", {"kind": "judge", "model": "m", "base_url": "file:///etc/passwd"}, ()),
    ("validate__other_behaviour", "data/nothing.jsonl", ("nothing.jsonl",)),
    ("validate__max_new_tokens", 10**12, ()),
    ("validate__random_directions", 10**12, ()),
    ("compile__backends", [], ()),
    ("compile__backends", ["bias", "bias"], ()),
    ("compile__backends", ["magic"], ("magic",)),
    ("compile__calibration__batch", 0, ()),
    ("compile__closed_form", {"stages": [{"offset": 99, "projection": "mlp", "rank": 1}]}, ("block 100",)),
    ("compile__closed_form", {"stages": [{"offset": 0, "projection": "mlp", "rank": 10**9}]}, ("1000000000",)),
    ("compile__distill__rank", 10**9, ("rank",)),
    ("compile__distill__objective", "likelihoods", ("likelihood",)),
    ("verify__forms", ["adaptor"], ("adaptor",)),
    ("verify__forms", [], ()),
    ("verify__max_new_tokens", 10**12, ()),
    ("verify__gate", {}, ("'gates'",)),
)


def inputs() -> Iterator[Bad]:
    """Files, settings by hand, a wrong type for every key of the schema, and NaN for every number."""
    for name, (edit, words) in FILES.items():
        yield Bad(f"recipe: {name}", edit, words)
    for key, value, words in SETTINGS:
        dotted = key.replace("__", ".")
        shown = str(value) if len(str(value)) < 60 else f"{str(value)[:30]}...{str(value)[-12:]}"
        late = any(name in key for name in ("closed_form", "distill__rank"))
        words = (f"{dotted.split('.')[-1]}|line ", *words)
        yield Bad(f"recipe: {dotted} is {shown}", partial(_set, key, value), words, RUN, late=late)
    for path, kind in leaves(Recipe):
        dotted = ".".join(path)
        place = "trained" if "trained" in path else dotted  # options of a method that the recipe does not use
        wrong = partial(_set, "__".join(path), [{"wrong": ["type"]}])
        yield Bad(f"recipe: {dotted} of a wrong type", wrong, (dotted,), RUN)
        if kind in (int, float):
            for value in ("nan", "inf"):
                yield Bad(
                    f"recipe: {dotted} is {value}",
                    partial(_set, "__".join(path), float(value)),
                    (f"{place}|line ",),
                    RUN,
                )


def _set(key: str, value: Any, case: Case) -> None:
    case.set(**{key: value})


def leaves(section: type[BaseModel], path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    """The keys of a section that are no sections themselves, with their annotation."""
    for name, field in section.model_fields.items():
        here = (*path, field.alias or name)
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            yield from leaves(field.annotation, here)
        elif name != "folder":
            yield here, field.annotation
