"""What each engine reads of each form of artifact: how it is loaded, and what the engine drops or refuses.

Read off the sources of llama.cpp (as llama-cpp-python 0.3.36 has it) and vLLM 0.32, and tried where docs/ENGINES.md says so.
The exporter and the model card both read the tables here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from compile_steer.artifacts.paths import home_path, real_path
from compile_steer.artifacts.provenance import EngineName, Provenance
from compile_steer.artifacts.revision import EMBEDDED
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
        "from transformers import AutoModelForCausalLM, AutoTokenizer\n"
        "\n"
        "tokenizer = AutoTokenizer.from_pretrained({base!r})\n"
        "base = AutoModelForCausalLM.from_pretrained({base!r}, dtype={dtype!r})\n"
        "model = PeftModel.from_pretrained(base, {folder!r})"
    ),
    ("transformers", "checkpoint"): (
        "from transformers import AutoModelForCausalLM, AutoTokenizer\n"
        "\n"
        "tokenizer = AutoTokenizer.from_pretrained({folder!r})\n"
        "model = AutoModelForCausalLM.from_pretrained({folder!r}, dtype={dtype!r})"
    ),
    ("transformers", "gguf"): (
        "from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig\n"
        "\n"
        "tokenizer = AutoTokenizer.from_pretrained({folder!r}, gguf_file={file!r})\n"
        "model = AutoModelForCausalLM.from_pretrained({folder!r}, gguf_file={file!r}, dtype={dtype!r},\n"
        "                                             quantization_config=GgufConfig(dequantize=True))"
    ),
    ("vllm", "adapter"): (
        "vllm serve {base} --dtype {dtype} --enable-lora --lora-modules {name}={folder} --max-lora-rank {rank}"
    ),
    ("vllm", "checkpoint"): "vllm serve {folder} --dtype {dtype}",
    ("vllm", "program"): (
        f"pip install {PLUGIN} && vllm serve {{base}}\n"
        '"vllm_xargs": {{"apply_steering_vectors": TEXT OF {path}}} in a request, or in Python\n'
        'SamplingParams(extra_args={{"apply_steering_vectors": Path({path!r}).read_text()}})'
    ),
    ("llama.cpp", "adapter"): "llama-server -m {base} --lora {path}",
    ("llama.cpp", "checkpoint"): "llama-server -m {path}",
    ("llama.cpp", "gguf"): "llama-server -m {path}",
    ("llama.cpp", "program"): "llama-server -m {base} --control-vector {path}",
}
# Greedy, as the answers in reports are: in the same dtype it prints the same text.
_ANSWER = (
    "prompt = tokenizer.apply_chat_template([{{'role': 'user', 'content': {ask!r}}}], add_generation_prompt=True,\n"
    "                                       return_dict=True, return_tensors='pt')\n"
    "answer = model.generate(**prompt, max_new_tokens={tokens}, do_sample=False)\n"
    "print(tokenizer.decode(answer[0, prompt['input_ids'].shape[1]:], skip_special_tokens=True))"
)


class _Name(str):
    """A name in a line to copy: as a Python literal where the line says `!r`, else as a word of the shell."""

    def __format__(self, _spec: str) -> str:
        return shell_word(str(self))


def load_commands(engine: EngineName, form: Form, **names: object) -> tuple[str, ...]:
    """The lines that load a form in an engine; `names` fill in folder, file, base, name, rank and dtype where they occur."""
    return _filled(_LOAD[engine, form], {"dtype": "auto", **names})


def _filled(lines: str, names: Mapping[str, object]) -> tuple[str, ...]:
    path = f"{names.get('folder')}/{names.get('file')}"
    words = {key: _Name(name) for key, name in {**names, "path": path}.items()}
    return tuple(line.format(**words) for line in lines.split("\n"))


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


def engine_support(artifact: Provenance, folder: Path) -> list[EngineSupport]:
    """How each engine loads an artifact, or why it does not, as far as it was tried: for its card and the run's page.

    The commands work where `folder` is the artifact's path; what they write lies in base/ (or under the embedded model's name) and gguf/.
    """
    if artifact.form == "patch":
        note = (
            "none of them loads this patch: it holds biases, whole weights or another architecture, which no stock adapter "
            "format does. 'compile-steer merge' writes the checkpoint that holds it"
        )
        end = " (with --artifact)." if artifact.recombined else "."
        return [EngineSupport("transformers, vLLM, llama.cpp", (), note + end)]
    from_hub, recipe = artifact.revision.startswith("hub:"), artifact.recipe
    # A base that is on no hub is written to a folder beside: the embedded one as its adapters call it, so that PEFT finds it.
    local = EMBEDDED if artifact.model == EMBEDDED else "base"
    base = artifact.model if from_hub else local
    rank = artifact.rank or 16  # vLLM's default, for a record of an earlier version
    names = {"folder": folder, "base": base, "name": artifact.name, "rank": rank, "file": GGUF_FILE}
    names["dtype"] = recipe.get("dtype", "float32")
    answer: tuple[str, ...] = ()
    if recipe.get("ask") and not recipe.get("prompt_format"):
        tokens = recipe.get("verify", {}).get("max_new_tokens", 48)
        answer = ("", *_filled(_ANSWER, {"ask": recipe["ask"], "tokens": tokens}))
    adapter, gguf = artifact.form == "adapter", artifact.form.startswith("gguf-")
    form: Form = "adapter" if adapter else "gguf" if gguf else "checkpoint"
    loaded = EngineSupport("transformers", (*load_commands("transformers", form, **names), *answer))
    if gguf:
        # A GGUF file has no field for a bias switch of the config, and without it transformers' llama has no bias.
        dropped = "; it drops the biases that hold the steering, unless its config is given mlp_bias or attention_bias"
        note = f"de-quantised{dropped if artifact.biases else ''}."
        return [*_in_llama_cpp(artifact.name, [folder / GGUF_FILE]), replace(loaded, note=note)]
    # A path that a recipe names is relative to where its run was started.
    model = real_path(home_path(artifact.model)) if folder.is_absolute() and not from_hub else artifact.model
    named = "" if artifact.model == EMBEDDED else f"{shell_word(model)} "
    write_base = f"compile-steer base {named}--out {local}"
    support = [loaded]
    if adapter and not from_hub:
        support.insert(0, EngineSupport("The base, as a folder", (write_base,)))
    reads = {name: adapter or not artifact.biases or reads_biases(name, artifact.architecture) for name in _TITLES}
    notes = {name: _ADAPTER_NOTES[name] if adapter else _bias_note(artifact, reads[name]) for name in _TITLES}
    if not adapter:
        serve = (f"transformers serve {shell_word(folder)} --dtype {names['dtype']}",)
        support.append(EngineSupport("transformers serve", serve, "pip install 'transformers[serving]'."))
    support.append(EngineSupport("vLLM", load_commands("vllm", form, **names) if reads["vllm"] else (), notes["vllm"]))
    if not reads["llama.cpp"]:
        return [*support, EngineSupport("llama.cpp", (), notes["llama.cpp"])]
    own = Path("gguf", folder.name)
    lines = [f"compile-steer export {shell_word(folder)} --for llama.cpp --out {shell_word(own)}"]
    files = [own / f"{folder.name}-f16.gguf"]
    if adapter:
        lines = [f"compile-steer export {local} --for llama.cpp --out gguf/{local}", f"{lines[0]} --base {local}"]
        files = [Path("gguf", local, f"{local}-f16.gguf"), own / f"{folder.name}.lora.gguf"]
        lines[:0] = [write_base] * from_hub
    return [*support, *_in_llama_cpp(artifact.name, files, lines, notes["llama.cpp"])]


def _in_llama_cpp(name: str, files: Sequence[Path], lines: Sequence[str] = (), note: str = "") -> list[EngineSupport]:
    """How llama.cpp and Ollama load a model's GGUF file, and a LoRA's on it; `lines` are what makes the files."""
    model, last = files[0], files[-1]
    form: Form = "gguf" if model == last else "adapter"
    serve = load_commands("llama.cpp", form, base=model, folder=last.parent, file=last.name)
    # What does not begin as a path is the name of a model on Ollama's hub.
    paths = " ".join(shell_word(path if path.is_absolute() else f"./{path}") for path in files)
    pattern = "".join(f"{key} %s\\n" for key in ("FROM", "ADAPTER")[: len(files)])
    name, place = shell_word(name), shell_word(f"{name}.Modelfile")
    commands = (f"printf '{pattern}' {paths} > {place}", f"ollama create {name} -f {place}", f"ollama run {name}")
    ollama = "reads the same files; not tried here. It chooses a prompt template by the file's own: 'ollama show --template'."
    return [EngineSupport("llama.cpp", (*lines, *serve), note), EngineSupport("Ollama", commands, ollama)]


_TITLES: dict[EngineName, str] = {"vllm": "vLLM", "llama.cpp": "llama.cpp"}
_ADAPTER_NOTES: dict[EngineName, str] = {
    "vllm": "a plain LoRA; ask for the model by the name before the equals sign.",
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
