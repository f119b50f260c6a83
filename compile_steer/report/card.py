"""The model card: what an artifact is, what was measured of it, what is not known, and what loads it.

Every number is read from a report that is of this very artifact, by its hash; where there is none, the card says so.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from jinja2 import Environment, PackageLoader, StrictUndefined
from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from compile_steer.artifacts.files import save_text
from compile_steer.artifacts.provenance import CARD, EngineRecord, Provenance, load_engine_records
from compile_steer.export.engine_support import EngineName, reads_biases
from compile_steer.export.gguf_model import GGUF_FILE
from compile_steer.validate.report import ValidationReport, own_validation
from compile_steer.verify.parity import Parity, own_parity


@dataclass(frozen=True)
class Engine:
    """Whether one stock engine loads the artifact: the commands if it does, and what to know."""

    name: str
    commands: tuple[str, ...]
    note: str = ""


def model_card(origin: Provenance, validation: Path | None) -> str:
    """The folder's README before anything has judged it.

    Args:
        validation: where the run's validation report lies; it counts only if the artifact was compiled by it. None where
            there can be none.
    """
    return _render(origin, None if validation is None else own_validation(origin, validation), None, (), {})


def update_card(folder: Path, validation: Path) -> None:
    """Write the README of `folder` again, with what the judge and serving engines found; base and licence that somebody filled in stay.

    Raises:
        ArtifactError: the folder is not one of ours.
    """
    origin = Provenance.read(folder)
    report, parity = own_validation(origin, validation), own_parity(folder)
    kept = _filled_in(folder / CARD)
    save_text(folder / CARD, _render(origin, report, parity, load_engine_records(folder), kept))


def _filled_in(path: Path) -> dict[str, str]:
    """What a card's header says that only a person knows."""
    if not path.is_file():
        return {}
    before, _dashes, rest = path.read_text(encoding="utf-8").partition("---\n")
    try:
        found = YAML(typ="safe", pure=True).load(rest.partition("\n---\n")[0]) if not before else None
    except YAMLError:
        found = None  # no header any more: there is nothing to keep
    header = found if isinstance(found, dict) else {}
    return {key: str(header[key]) for key in ("license", "base_model") if header.get(key) is not None}


def _render(
    origin: Provenance,
    validation: ValidationReport | None,
    parity: Parity | None,
    readings: Sequence[EngineRecord],
    kept: dict[str, str],
) -> str:
    environment = Environment(
        loader=PackageLoader("compile_steer", "templates"),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        autoescape=False,
    )
    environment.filters["interval"] = lambda one: f"{one.value:+.3f} [{one.low:+.3f}, {one.high:+.3f}]"
    given = {
        "p": origin,
        "validation": validation,
        "parity": parity,
        "readings": readings,
        "kept": {"license": "", "base_model": "", **kept},
        "engines": engines(origin),
    }
    return environment.get_template("card.md").render(**given)


def engines(origin: Provenance) -> list[Engine]:
    """What transformers, vLLM and llama.cpp do with this form of artifact, as far as it was tried."""
    if origin.form == "patch":
        note = (
            "none of them loads this patch: it holds biases, whole weights or another architecture, which no stock adapter "
            "format does. `compile-steer merge` writes the checkpoint that holds it"
        )
        return [
            Engine("transformers, vLLM, llama.cpp", (), note + (" (with --artifact)." if origin.recombined else "."))
        ]
    if origin.form.startswith("gguf-"):
        return _gguf_engines(origin)
    return _adapter_engines(origin) if origin.form == "adapter" else _merged_engines(origin)


def _gguf_engines(origin: Provenance) -> list[Engine]:
    # Its llama has a bias only where the config says so, which a GGUF file cannot.
    dropped = "; it drops the biases that hold the steering, unless its config is given `mlp_bias` or `attention_bias`"
    load = (
        "from transformers import AutoModelForCausalLM, GgufConfig",
        "",
        f'model = AutoModelForCausalLM.from_pretrained("THIS FOLDER", gguf_file="{GGUF_FILE}",',
        "                                             quantization_config=GgufConfig(dequantize=True))",
    )
    return [
        Engine("llama.cpp", (f"llama-cli -m {GGUF_FILE}",)),
        Engine("transformers", load, f"de-quantised{dropped if origin.biases else ''}."),
    ]


def _adapter_engines(origin: Provenance) -> list[Engine]:
    base = origin.model if origin.revision.startswith("hub:") else "PATH OR ID OF THE BASE"
    return [
        Engine(
            "transformers",
            (
                "from peft import PeftModel",
                "from transformers import AutoModelForCausalLM",
                "",
                f'base = AutoModelForCausalLM.from_pretrained("{base}")',
                'model = PeftModel.from_pretrained(base, "THIS FOLDER")',
            ),
        ),
        Engine(
            "vLLM",
            (f"vllm serve BASE --enable-lora --lora-modules {origin.name}=THIS_FOLDER --max-lora-rank RANK",),
            "a plain LoRA with alpha = rank: RANK is `r` of adapter_config.json.",
        ),
        Engine(
            "llama.cpp",
            (
                f"compile-steer export THIS_FOLDER --for llama.cpp --base {base} --out DIR",
                "llama-cli -m BASE.gguf --lora DIR/THIS_FOLDER.lora.gguf",
            ),
            "for bases of the families that its writer knows; it says so where it does not.",
        ),
    ]


def _merged_engines(origin: Provenance) -> list[Engine]:
    family = origin.architecture
    holds = f"the steering is in biases of `{family}`, which " if origin.biases else ""
    untried = "" if family == "llama" else f"not tried with `{family}`."
    convert = ("compile-steer export THIS_FOLDER --for llama.cpp --out DIR", "llama-cli -m DIR/THIS_FOLDER-f16.gguf")
    return [
        Engine(
            "transformers",
            (
                "from transformers import AutoModelForCausalLM",
                "",
                'model = AutoModelForCausalLM.from_pretrained("THIS FOLDER")',
            ),
        ),
        _reading("vLLM", "vllm", ("vllm serve THIS_FOLDER",), family, holds, untried),
        _reading("llama.cpp", "llama.cpp", convert, family, holds, untried),
    ]


def _reading(name: str, engine: EngineName, commands: tuple[str, ...], family: str, holds: str, untried: str) -> Engine:
    """An engine with what it does to biases, where the steering is in them."""
    if holds and not reads_biases(engine, family):
        return Engine(name, (), f"cannot hold it: {holds}its own code does not add.")
    return Engine(name, commands, f"{holds}its own code adds{f'; {untried}' if untried else '.'}" if holds else untried)
