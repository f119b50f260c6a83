"""What each engine reads of each form of artifact: how it is loaded, and what the engine drops or refuses.

Read off the sources of llama.cpp (as llama-cpp-python 0.3.36 has it) and vLLM 0.32, and tried where docs/ENGINES.md says so.
The exporter and the model card both read the tables here.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from compile_steer.artifacts.provenance import EngineName, Provenance
from compile_steer.artifacts.revision import is_gguf
from compile_steer.common.errors import shell_word

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

    from compile_steer.artifacts.tensors import Checkpoint

Form = Literal["adapter", "checkpoint", "gguf", "program"]

GGUF_FILE = "model.gguf"
PLUGIN = "vllm-lens"
"""The plugin that adds vectors to activations in vLLM, which cannot do that by itself."""

# vLLM refuses adapters of a higher rank.
_MAX_VLLM_RANK = 512
# Graphs that add a bias behind o_proj and down_proj; the others have no tensor for it and refuse a file that holds one.
_LLAMA_CPP_BIASES = ("llama", "granite", "gpt2", "gpt_neox", "phi", "gpt_oss")
# Of output projections, as the families that an engine reads without biases call them.
_OUTPUT_BIASES = (".o_proj.bias", ".down_proj.bias")
# vLLM builds their o_proj with bias=False whatever the config says, and skips a bias that has no place without a word.
_VLLM_NO_BIAS = ("qwen3", "qwen3_moe")
_VLLM_NO_LORA = ("gpt2",)

_LOAD: dict[tuple[EngineName, Form], str] = {
    ("transformers", "adapter"): (
        "from peft import PeftModel\n"
        "from transformers import AutoModelForCausalLM\n"
        "\n"
        "base = AutoModelForCausalLM.from_pretrained({base!r})\n"
        "model = PeftModel.from_pretrained(base, {folder!r})"
    ),
    ("transformers", "checkpoint"): (
        "from transformers import AutoModelForCausalLM\n\nmodel = AutoModelForCausalLM.from_pretrained({folder!r})"
    ),
    ("transformers", "gguf"): (
        "from transformers import AutoModelForCausalLM, GgufConfig\n"
        "\n"
        "model = AutoModelForCausalLM.from_pretrained({folder!r}, gguf_file={file!r},\n"
        "                                             quantization_config=GgufConfig(dequantize=True))"
    ),
    ("vllm", "adapter"): "vllm serve {base} --enable-lora --lora-modules {name}={folder} --max-lora-rank {rank}",
    ("vllm", "checkpoint"): "vllm serve {folder}",
    ("vllm", "program"): (
        f"pip install {PLUGIN} && vllm serve {{base}}\n"
        '"vllm_xargs": {{"apply_steering_vectors": TEXT OF {path}}} in a request, or in Python\n'
        'SamplingParams(extra_args={{"apply_steering_vectors": Path({path!r}).read_text()}})'
    ),
    ("llama.cpp", "adapter"): "llama-cli -m BASE.gguf --lora {path}",
    ("llama.cpp", "checkpoint"): "llama-cli -m {path}",
    ("llama.cpp", "gguf"): "llama-cli -m {file}",
    ("llama.cpp", "program"): "llama-cli -m BASE.gguf --control-vector {path}",
}


class _Name(str):
    """A name in a line to copy: as a Python literal where the line says `!r`, else as a word of the shell."""

    def __format__(self, _spec: str) -> str:
        return shell_word(str(self))


def load_commands(engine: EngineName, form: Form, **names: object) -> tuple[str, ...]:
    """The lines that load a form in an engine; `names` fill in folder, file, base, name and rank where they occur."""
    path = f"{names.get('folder')}/{names.get('file')}"
    words = {key: _Name(name) for key, name in {**names, "path": path}.items()}
    return tuple(line.format(**words) for line in _LOAD[engine, form].split("\n"))


def reads_biases(engine: EngineName, family: str) -> bool:
    """True if an engine's code of that family adds the biases that transformers can give its output projections."""
    return family in _LLAMA_CPP_BIASES if engine == "llama.cpp" else engine != "vllm" or family not in _VLLM_NO_BIAS


def checkpoint_refusals(engine: EngineName, config: PreTrainedConfig, weights: Checkpoint) -> list[str]:
    """Why an engine would not compute what a checkpoint says; empty where it would, or where nothing is known."""
    family = str(config.model_type)
    if reads_biases(engine, family):
        return []
    tensors = ((name, weights.tensor(name)) for name in sorted(weights.files) if name.endswith(_OUTPUT_BIASES))
    biases = [name for name, bias in tensors if bias is not None and bool(bias.any())]
    more = f", nor are {len(biases) - 1} more" if len(biases) > 1 else ""
    return [
        f"{name} is not zero{more}, and {engine}'s {family} has no place for it: the model would run without the steering. "
        "Compile to an adapter (closed_form or distill), or serve with transformers."
        for name in biases[:1]
    ]


def adapter_refusals(engine: EngineName, family: str | None, rank: int) -> list[str]:
    """Why an engine does not load a plain LoRA of that rank; the base's `family` is None where it is not known."""
    problems = []
    if engine == "vllm" and rank > _MAX_VLLM_RANK:
        problems.append(
            f"rank {rank}; vLLM takes up to {_MAX_VLLM_RANK}. Merge it, or cut it: 'compile-steer task-vector --cut'."
        )
    if engine == "vllm" and family in _VLLM_NO_LORA:
        problems.append(f"vLLM's {family} takes no adapters. Merge it, and export the checkpoint.")
    return problems


@dataclass(frozen=True)
class EngineSupport:
    """Whether an engine loads an artifact: the commands if it does, and what to know."""

    name: str
    commands: tuple[str, ...]
    note: str = ""


def engine_support(artifact: Provenance) -> list[EngineSupport]:
    """What transformers, vLLM and llama.cpp do with an artifact, as far as it was tried: for its card."""
    if artifact.form == "patch":
        note = (
            "none of them loads this patch: it holds biases, whole weights or another architecture, which no stock adapter "
            "format does. 'compile-steer merge' writes the checkpoint that holds it"
        )
        end = " (with --artifact)." if artifact.recombined else "."
        return [EngineSupport("transformers, vLLM, llama.cpp", (), note + end)]
    from_gguf = is_gguf(artifact.model)
    base = artifact.model if artifact.revision.startswith("hub:") else "BASE" if from_gguf else "PATH OR ID OF THE BASE"
    names = {"folder": "THIS_FOLDER", "base": base, "name": artifact.name, "rank": "RANK", "file": GGUF_FILE}
    if artifact.form.startswith("gguf-"):
        # A GGUF file has no field for a bias switch of the config, and without it transformers' llama has no bias.
        dropped = "; it drops the biases that hold the steering, unless its config is given mlp_bias or attention_bias"
        note = f"de-quantised{dropped if artifact.biases else ''}."
        return [
            EngineSupport("llama.cpp", load_commands("llama.cpp", "gguf", **names)),
            EngineSupport("transformers", load_commands("transformers", "gguf", **names), note),
        ]
    adapter = artifact.form == "adapter"
    form: Form = "adapter" if adapter else "checkpoint"
    support = [EngineSupport("transformers", load_commands("transformers", form, **names))]
    if adapter and from_gguf:
        note = "it is a GGUF file, which neither takes an adapter in transformers nor in vLLM. BASE is its weights as a folder."
        write = f"compile-steer base {shell_word(artifact.model)} --out BASE"
        support.insert(0, EngineSupport("The base", (write,), note))
    titles: dict[EngineName, str] = {"vllm": "vLLM", "llama.cpp": "llama.cpp"}
    for engine, title in titles.items():
        reads = adapter or not artifact.biases or reads_biases(engine, artifact.architecture)
        note = _ADAPTER_NOTES[engine] if adapter else _bias_note(artifact, reads)
        commands = load_commands(engine, form, **names)
        if engine == "llama.cpp":
            exported = {"folder": "DIR", "file": "THIS_FOLDER.lora.gguf" if adapter else "THIS_FOLDER-f16.gguf"}
            export = f"compile-steer export THIS_FOLDER --for llama.cpp {f'--base {shell_word(base)} ' if adapter else ''}--out DIR"
            commands = (export, *load_commands(engine, form, **exported))
        support.append(EngineSupport(title, commands if reads else (), note))
    return support


_ADAPTER_NOTES: dict[EngineName, str] = {
    "vllm": "a plain LoRA with alpha = rank: RANK is r of adapter_config.json.",
    "llama.cpp": "for bases of the families that its writer knows; it says so where it does not.",
}


def _bias_note(artifact: Provenance, reads: bool) -> str:
    """Whether an engine that `reads` them or not adds the biases of a merged model that hold its steering."""
    family = artifact.architecture
    untried = "" if family == "llama" else f"not tried with {family}."
    if not artifact.biases:
        return untried
    holds = f"the steering is in biases of {family}, which its own code"
    return f"{holds} adds{f'; {untried}' if untried else '.'}" if reads else f"cannot hold it: {holds} does not add."
