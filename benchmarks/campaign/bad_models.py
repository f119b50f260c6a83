"""Checkpoints that are wrong: tensors, settings, tokenizers, chat templates, and files that are something else."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from benchmarks.campaign.case import Bad, Case
from benchmarks.campaign.edits import HEADERS, SPOILS, as_folder, as_link, edit_json, edit_tensors, remove
from tests.helpers.foreign_files import gguf, gguf_bytes
from tests.helpers.tiny import vector

UP = "model.layers.2.mlp.up_proj.weight"
EMBEDDINGS = "model.embed_tokens.weight"
Tensors = dict[str, Tensor]
NOTHING: tuple[str, ...] = ()


def _renamed(prefix: str, tensors: Tensors) -> None:
    for name in list(tensors):
        tensors[prefix + name] = tensors.pop(name)


def _one_value(name: str, value: float, tensors: Tensors) -> None:
    tensors[name].view(-1)[7] = value


def _float8(tensors: Tensors) -> None:
    for name in [name for name in tensors if name.endswith("proj.weight")]:
        scale = tensors[name].abs().max() / 448
        tensors[name.replace("weight", "weight_scale_inv")] = scale.reshape(1, 1)
        tensors[name] = (tensors[name] / scale).to(torch.float8_e4m3fn)


TENSORS: dict[str, tuple[Callable[[Tensors], object], tuple[str, ...]]] = {
    "a tensor missing": (lambda t: t.pop(UP), (UP,)),
    "embeddings missing": (lambda t: t.pop(EMBEDDINGS), ("embed_tokens",)),
    "head missing": (lambda t: t.pop("lm_head.weight"), ("lm_head",)),
    "a norm missing": (lambda t: t.pop("model.norm.weight"), ("model.norm",)),
    "a block missing": (lambda t: [t.pop(n) for n in list(t) if ".layers.3." in n], ("layers.3",)),
    "a tensor too many": (lambda t: t.update({"model.layers.2.mlp.extra.weight": torch.ones(3)}), ("extra",)),
    "a block too many": (lambda t: t.update({UP.replace("2", "9"): t[UP].clone()}), ("layers.9",)),
    "a bias too many": (lambda t: t.update({UP.replace("weight", "bias"): torch.ones(48)}), ("up_proj.bias",)),
    "a foreign prefix": (partial(_renamed, "foo."), ("foo.",)),
    "a wrapper's prefix": (partial(_renamed, "_orig_mod."), ("_orig_mod.",)),
    "no tensors": (lambda t: t.clear(), NOTHING),
    "a matrix transposed": (lambda t: t.update({UP: t[UP].T}), (UP,)),
    "a matrix flat": (lambda t: t.update({UP: t[UP].flatten()}), (UP,)),
    "a matrix cut": (lambda t: t.update({UP: t[UP][:-1]}), (UP,)),
    "embeddings cut": (lambda t: t.update({EMBEDDINGS: t[EMBEDDINGS][:50]}), ("embed_tokens",)),
    "NaN in a matrix": (partial(_one_value, UP, float("nan")), ("damaged|NaN or infinity",)),
    "infinity in a matrix": (partial(_one_value, UP, float("inf")), ("damaged|NaN or infinity",)),
    "NaN in the embeddings": (partial(_one_value, EMBEDDINGS, float("nan")), ("damaged|NaN or infinity",)),
    "all NaN": (lambda t: [v.fill_(float("nan")) for v in t.values()], NOTHING),
    "an integer matrix": (lambda t: t.update({UP: (t[UP] * 100).to(torch.int8)}), (UP,)),
    "a float8 matrix": (lambda t: t.update({UP: t[UP].to(torch.float8_e4m3fn)}), (UP,)),
    "float8 with scales": (_float8, ("quantised",)),
    "packed nibbles": (lambda t: t.update({UP: torch.zeros(24, 32, dtype=torch.uint8)}), (UP,)),
    "an adapter's tensors within": (lambda t: t.update({UP.replace("weight", "lora_A.weight"): torch.ones(2, 32)}), ("lora_A",)),
}  # fmt: skip
# Settings of config.json, and words of the message.
CONFIG: tuple[tuple[dict[str, Any], tuple[str, ...]], ...] = (
    ({"num_hidden_layers": 3}, ("layers.3",)),
    ({"num_hidden_layers": 5}, ("layers.4",)),
    ({"num_hidden_layers": "4"}, ("num_hidden_layers",)),
    ({"num_hidden_layers": 4.5}, ("num_hidden_layers",)),
    ({"num_hidden_layers": -1}, NOTHING),
    ({"num_hidden_layers": 0}, NOTHING),
    ({"num_hidden_layers": None}, ("num_hidden_layers",)),
    ({"num_hidden_layers": 10**9}, NOTHING),
    ({"text_config": {"num_hidden_layers": 10**9}}, ("text_config.num_hidden_layers",)),
    ({"num_labels": 10**9}, ("num_labels",)),
    ({"hidden_size": 36}, NOTHING),
    ({"hidden_size": "32"}, ("hidden_size",)),
    ({"hidden_size": 2**40}, NOTHING),
    ({"intermediate_size": 47}, ("mlp",)),
    ({"intermediate_size": None}, ("intermediate_size",)),
    ({"num_attention_heads": 3}, NOTHING),
    ({"num_attention_heads": 0}, NOTHING),
    ({"num_key_value_heads": 3}, NOTHING),
    ({"num_key_value_heads": "2"}, ("num_key_value_heads",)),
    ({"head_dim": 8}, NOTHING),
    ({"head_dim": "12"}, ("head_dim",)),
    ({"vocab_size": 50}, NOTHING),
    ({"vocab_size": 200}, NOTHING),
    ({"vocab_size": 10**9}, ("vocab_size",)),
    ({"vocab_size": "97"}, ("vocab_size",)),
    ({"rms_norm_eps": "tiny"}, ("rms_norm_eps",)),
    ({"rms_norm_eps": None}, ("rms_norm_eps",)),
    ({"rms_norm_eps": float("nan")}, NOTHING),
    ({"hidden_act": "magic"}, ("magic",)),
    ({"hidden_act": 7}, ("hidden_act",)),
    ({"max_position_embeddings": "many"}, ("max_position_embeddings",)),
    ({"max_position_embeddings": -1}, NOTHING),
    ({"tie_word_embeddings": "no"}, ("tie_word_embeddings",)),
    ({"attention_bias": True}, ("bias",)),
    ({"mlp_bias": True}, ("bias",)),
    ({"rope_parameters": {"rope_type": "magic", "rope_theta": 1e4}}, ("magic",)),
    ({"rope_parameters": {"rope_type": "default", "rope_theta": "1e4"}}, ("rope_theta|config.json",)),
    ({"rope_parameters": {"rope_type": "default", "rope_theta": 0}}, ("inv_freq",)),
    ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4}}, NOTHING),
    ({"rope_parameters": 7}, ("rope_parameters",)),
    ({"dtype": "float7"}, ("float7",)),
    ({"model_type": "magic"}, ("magic",)),
    ({"model_type": "bert"}, ("bert",)),
    ({"model_type": "t5"}, ("t5",)),
    ({"model_type": "qwen2"}, NOTHING),
    ({"model_type": "gpt2"}, NOTHING),
    ({"model_type": ["llama"]}, ("model_type",)),
    ({"model_type": None}, ("model_type",)),
    ({"pad_token_id": 5000}, ("pad_token_id",)),
    ({"eos_token_id": 5000}, ("eos_token_id",)),
    ({"eos_token_id": "</s>"}, ("eos_token_id",)),
    ({"bos_token_id": 97}, ("bos_token_id",)),
    ({"quantization_config": {"quant_method": "fp8", "weight_block_size": [32, 32]}}, ("quantization_config|quantised",)),
    ({"quantization_config": {"quant_method": "gptq", "bits": 4, "group_size": 32}}, ("quantization_config|quantised",)),
    ({"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}}, ("quantization_config|quantised",)),
    ({"quantization_config": {"quant_method": "mxfp4"}}, ("quantization_config|quantised",)),
    ({"quantization_config": {"quant_method": "magic"}}, ("quantization_config|quantised",)),
    ({"quantization_config": "int8"}, ("quantization_config|quantised",)),
    ({"auto_map": {"AutoModelForCausalLM": "modeling.Model"}, "model_type": "magic"}, NOTHING),
)  # fmt: skip
START, END = (
    "{% for m in messages %}<s> {{ m['role'] }} ",
    " {% endfor %}{% if add_generation_prompt %}<s> assistant {% endif %}",
)
TEMPLATES: dict[str, tuple[str, tuple[str, ...]]] = {
    "empty": ("", NOTHING),
    "a syntax error": ("{% for m in messages %}{{ m['content'] }", NOTHING),
    "an unknown filter": (START + "{{ m['content'] | magic }}" + END, ("magic",)),
    "an unknown name": (START + "{{ magic(m['content']) }}" + END, ("magic",)),
    "an error of its own": ("{{ raise_exception('no such role') }}", ("no such role",)),
    "a division by zero": (START + "{{ m['content'] }}{{ 1 / 0 }}" + END, ("zero",)),
    "parts of content": (START + "{% for c in m['content'] %}{{ c['text'] if c['type'] == 'text' }}{% endfor %}" + END, NOTHING),
    "no content": (START + END, NOTHING),
    "content cut": (START + "{{ m['content'][:4] }}" + END, NOTHING),
    "content changed": (START + "{{ m['content'] | replace('w', 'v') }}" + END, NOTHING),
    "content in capitals": (START + "{{ m['content'] | upper }}" + END, NOTHING),
    "only the first message": ("{{ messages[0]['role'] }}", NOTHING),
    "an endless loop": (2 * "{% for i in range(99999) %}" + 2 * "{% endfor %}" + START + "{{ m['content'] }}" + END, NOTHING),
    "a gigabyte of text": (START + "{{ m['content'] * 300000000 }}" + END, NOTHING),
    "endless recursion": ("{% macro f(x) %}{{ f(x) }}{% endmacro %}{{ f(1) }}", NOTHING),
    "a file included": ("{% include 'tokenizer.json' %}" + START + "{{ m['content'] }}" + END, NOTHING),
    "a way out of the sandbox": ("{{ ''.__class__.__mro__[1].__subclasses__() }}" + START + "{{ m['content'] }}" + END, NOTHING),
}  # fmt: skip


def _named(case: Case, *names: str) -> None:
    remove(case.model / "chat_template.jinja")
    templates = [{"name": name, "template": START + "{{ m['content'] }}" + END} for name in names]
    edit_json(case.model / "tokenizer_config.json", lambda found: found.update(chat_template=templates))


def _tokenizer(change: Callable[[Any], object], case: Case) -> None:
    edit_json(case.model / "tokenizer.json", change)


def _settings_text(text: str, case: Case) -> None:
    (case.model / "tokenizer_config.json").write_text(text)


TOKENIZERS: dict[str, tuple[Callable[[Case], object], tuple[str, ...]]] = {
    "no tokenizer": (lambda case: remove(*case.model.glob("tokenizer*")), NOTHING),
    "ids beyond the embeddings": (partial(_tokenizer, lambda t: t["model"]["vocab"].update(w96=500)), NOTHING),
    "an added token beyond the embeddings": (
        partial(_tokenizer, lambda t: t["added_tokens"].append({**t["added_tokens"][0], "id": 97, "content": "<new>"})),
        ("97",),
    ),
    "an unknown model": (partial(_tokenizer, lambda t: t["model"].update(type="Magic")), ("tokenizer",)),
    "an unknown pre-tokenizer": (partial(_tokenizer, lambda t: t.update(pre_tokenizer={"type": "Magic"})), ("tokenizer",)),
    "an unknown normalizer": (partial(_tokenizer, lambda t: t.update(normalizer={"type": "Magic"})), ("tokenizer",)),
    "no vocabulary": (partial(_tokenizer, lambda t: t["model"].update(vocab={})), NOTHING),
    "vocabulary of a wrong type": (partial(_tokenizer, lambda t: t["model"].update(vocab=[1])), ("tokenizer",)),
    "dropout": (
        partial(_tokenizer, lambda t: t.update(model={"type": "BPE", "vocab": {"x": 6}, "merges": [], "dropout": 0.5})),
        ("tokenizer.json",),
    ),
    "no model": (partial(_tokenizer, lambda t: t.pop("model")), ("tokenizer",)),
    "code of its own": (
        lambda case: edit_json(
            case.model / "tokenizer_config.json",
            lambda t: t.update(tokenizer_class="Magic", auto_map={"AutoTokenizer": ["magic.Magic", None]}),
        ),
        NOTHING,
    ),
    "a configuration that is a list": (partial(_settings_text, "[]"), ("tokenizer_config.json",)),
    "a configuration that is no JSON": (partial(_settings_text, "{'a'}"), ("tokenizer_config.json",)),
    "a template of Latin-1": (lambda case: (case.model / "chat_template.jinja").write_bytes(b"caf\xe9"), ("chat_template",)),
    "two named templates": (lambda case: _named(case, "tool_use", "rag"), ("tool_use", "rag")),
}  # fmt: skip


def _adapter_beside(case: Case) -> None:
    for file in case.adapter.glob("adapter_*"):
        (case.model / file.name).write_bytes(file.read_bytes())


def _sharded(case: Case, change: Callable[[dict[str, Any]], object], without: str = "") -> None:
    """Write the tensors as two shards with an index, which is then changed; leave one file out."""
    tensors = load_file(case.model / "model.safetensors")
    (case.model / "model.safetensors").unlink()
    index: dict[str, Any] = {"metadata": {}, "weight_map": {}}
    for number in (1, 2):
        shard = {name: v for n, (name, v) in enumerate(sorted(tensors.items())) if n % 2 == number - 1}
        file = f"model-0000{number}-of-00002.safetensors"
        save_file(shard, case.model / file, metadata={"format": "pt"})
        index["weight_map"] |= dict.fromkeys(shard, file)
    change(index)
    (case.model / "model.safetensors.index.json").write_text(json.dumps(index))
    if without:
        remove(case.model / without)


def _pickled(case: Case) -> None:
    torch.save(
        load_file(case.model / "model.safetensors") | {"x": partial(print, "run")}, case.model / "pytorch_model.bin"
    )
    (case.model / "model.safetensors").unlink()


def _outside(index: dict[str, Any]) -> None:
    index["weight_map"][UP] = "../recipes/tide.yaml"


SECOND = "model-00002-of-00002.safetensors"
FOLDERS: dict[str, tuple[Callable[[Case], object], tuple[str, ...]]] = {
    "an adapter beside": (_adapter_beside, ("adapter_config.json",)),
    "no weights": (lambda case: (case.model / "model.safetensors").unlink(), NOTHING),
    "weights that are a folder": (lambda case: as_folder(case.model / "model.safetensors"), NOTHING),
    "weights linked to nowhere": (lambda case: as_link(case.model / "model.safetensors", "gone"), NOTHING),
    "no config.json": (lambda case: (case.model / "config.json").unlink(), ("config.json",)),
    "a pickle that runs code": (_pickled, NOTHING),
    "a shard missing": (lambda case: _sharded(case, lambda _: None, SECOND), (SECOND,)),
    "a tensor in no shard": (lambda case: _sharded(case, lambda i: i["weight_map"].update(extra=SECOND)), ("extra",)),
    "a shard outside the folder": (lambda case: _sharded(case, _outside), NOTHING),
    "an index that is a list": (lambda case: _sharded(case, lambda i: i.update(weight_map=[])), ("index.json",)),
    "an index of numbers": (lambda case: _sharded(case, lambda i: i["weight_map"].update({UP: 7})), ("index.json",)),
}  # fmt: skip
GGUF: dict[str, Callable[[Case], object]] = {
    "control vector": lambda case: gguf(case.root / "base.gguf", {1: vector(1)}),
    "another architecture": lambda case: gguf(case.root / "base.gguf", {1: vector(1)}, "magic"),
    "llama without settings": lambda case: gguf(case.root / "base.gguf", {1: vector(1)}, "llama"),
    "2^60 tensors": lambda case: (case.root / "base.gguf").write_bytes(b"GGUF\3\0\0\0" + (2**60).to_bytes(8, "little") * 2),
    "no tensors": lambda case: (case.root / "base.gguf").write_bytes(gguf_bytes({}, {"general.architecture": "llama"})),
}  # fmt: skip


WEIGHTS = "model.safetensors"


def _tensors(change: Callable[[Tensors], object], case: Case) -> None:
    edit_tensors(case.model / WEIGHTS, change)


def _config(settings: dict[str, Any], case: Case) -> None:
    edit_json(case.model / "config.json", lambda found: found.update(settings))


def template(text: str, case: Case) -> None:
    """Replace the chat template."""
    (case.model / "chat_template.jinja").write_text(text)


def _file(name: str, edit: Callable[[Path], object], case: Case) -> None:
    edit(case.model / name)


def _gguf(edit: Callable[[Case], object], case: Case) -> None:
    edit(case)
    case.set(model="base.gguf")


def inputs() -> Iterator[Bad]:
    """Edited tensors, settings, templates, tokenizers and folders; files of something else; GGUF files."""
    for name, (change, words) in TENSORS.items():
        yield Bad(f"model: {name}", partial(_tensors, change), words)
    for settings, words in CONFIG:
        yield Bad(f"model: config {json.dumps(settings)[1:-1][:70]}", partial(_config, settings), words)
    for name, (text, words) in TEMPLATES.items():
        yield Bad(f"model: template with {name}", partial(template, text), ("template", *words))
    for name, (edit, words) in (TOKENIZERS | FOLDERS).items():
        yield Bad(f"model: {name}", edit, words, finished=edit is _adapter_beside)
    for file in (WEIGHTS, "config.json", "tokenizer.json"):
        for name, spoil in SPOILS.items():
            yield Bad(f"model: {file} is {name}", partial(_file, file, spoil), (file,))
    for name, content in HEADERS.items():
        spoil = partial(Path.write_bytes, data=content)
        yield Bad(f"model: weights with {name}", partial(_file, WEIGHTS, spoil), (WEIGHTS,))
    for name, edit in GGUF.items():
        yield Bad(f"model: GGUF of {name}", partial(_gguf, edit), ("base.gguf",))
