"""A model is loaded only where every weight comes from its files and every token has a row; each refusal names what it found."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from compile_steer.common.errors import CompileSteerError
from compile_steer.export.adapter import write_patch
from compile_steer.export.merged import merged_model
from compile_steer.formats.lora import ADAPTER_WEIGHTS
from compile_steer.models.fingerprint import reference_logprobs
from compile_steer.models.load import LoadedModel, load
from compile_steer.models.reload import fresh_copy, reload
from tests.contract.test_adapters import origin
from tests.helpers.tiny import FAMILIES, build, chat_tokenizer, random_patch

Change = Callable[[Path], object]
UP = "model.layers.2.mlp.up_proj.weight"


@pytest.fixture(scope="module")
def saved_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("llama")
    build("llama").save_pretrained(folder)
    chat_tokenizer().save_pretrained(folder)
    return folder


def tensors(change: Callable[[dict[str, Tensor]], object], name: str = "model.safetensors") -> Change:
    def apply(folder: Path) -> None:
        content = load_file(folder / name)
        change(content)
        save_file(content, folder / name, metadata={"format": "pt"})

    return apply


def edited(name: str, **changes: Any) -> Change:
    def apply(folder: Path) -> None:
        path = folder / name
        content = json.loads(path.read_text(encoding="utf-8"))
        path.write_text(json.dumps({**content, **changes}), encoding="utf-8")

    return apply


def config(**changes: Any) -> Change:
    return edited("config.json", **changes)


def text(name: str, content: str) -> Change:
    return lambda folder: (folder / name).write_text(content, encoding="utf-8")


def both(*changes: Change) -> Change:
    return lambda folder: [change(folder) for change in changes]


def filled(value: float) -> Callable[[dict[str, Tensor]], object]:
    def change(content: dict[str, Tensor]) -> None:
        content[UP][1, 2] = value

    return change


def stored_as(dtype: torch.dtype) -> Change:
    return tensors(lambda content: content.update({UP: content[UP].to(dtype)}))


def renamed(prefix: str, new: str) -> Callable[[dict[str, Tensor]], object]:
    def change(content: dict[str, Tensor]) -> None:
        for name in [name for name in content if name.startswith(prefix)]:
            content[new + name.removeprefix(prefix)] = content.pop(name)

    return change


def with_token(number: int) -> Change:
    def apply(folder: Path) -> None:
        path = folder / "tokenizer.json"
        content = json.loads(path.read_text(encoding="utf-8"))
        added = {"id": number, "content": "<extra>", "special": True}
        flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
        content["added_tokens"].append(flags | added)
        path.write_text(json.dumps(content), encoding="utf-8")

    return apply


REFUSED: dict[str, tuple[Change, str]] = {
    "missing tensor": (
        tensors(lambda content: content.pop(UP)),
        rf"lacks 1 weight that .*LlamaForCausalLM needs: {UP}; ",
    ),
    "foreign prefix": (
        tensors(renamed("", "foo.")),
        r"lacks 39 weights .* and 36 more; [^\n]*\n.*holds 39 weights that .* has no place for: foo\.lm_head",
    ),
    "too few blocks asked for": (config(num_hidden_layers=3), r"no place for: model\.layers\.3\..* and 6 more"),
    "too many blocks asked for": (config(num_hidden_layers=6), r"lacks 18 weights .* model\.layers\.4\."),
    "no head": (tensors(lambda content: content.pop("lm_head.weight")), "lacks 1 weight that .* needs: lm_head.weight"),
    "left over": (tensors(lambda content: content.update(value_head=torch.ones(2))), "no place for: value_head"),
    "other family": (
        config(model_type="qwen3", architectures=["Qwen3ForCausalLM"]),
        "Qwen3ForCausalLM needs: .*q_norm",
    ),
    "other vocabulary": (config(vocab_size=50), r"lm_head.weight is \[97, 32\], needed \[50, 32\]"),
    "other heads": (config(num_key_value_heads=4), r"k_proj.weight is \[24, 32\], needed \[48, 32\]"),
    "truncated tensor": (tensors(lambda content: content.update({UP: content[UP][:-1].clone()})), "needed .48, 32"),
    "untied head": (config(tie_word_embeddings=True), "tie_word_embeddings, but the head's weights are others"),
    "NaN": (tensors(filled(float("nan"))), rf"NaN or infinity, in float32, in {UP}\."),
    "infinity": (tensors(filled(float("-inf"))), rf"NaN or infinity, in float32, in {UP}\."),
    "adapter beside": (text("adapter_config.json", "{}"), r"adapter_config.json\) beside the model.*Merge it first"),
    "quantised": (config(quantization_config={"quant_method": "fp8"}), "is quantised, by fp8: .* unquantised release"),
    "quantised text model": (config(text_config={"quantization_config": {"quant_method": "mxfp4"}}), "by mxfp4"),
    "quantised, oddly": (config(quantization_config="int8"), "is quantised, by its config.json"),
    "compressed": (config(compression_config={"quant_method": "compressed-tensors"}), "by compressed-tensors"),
    "float8": (stored_as(torch.float8_e4m3fn), rf"is quantised, as {UP} \(F8_E4M3\) is"),
    "int8": (stored_as(torch.int8), rf"{UP} \(I8\)"),
    "packed": (tensors(lambda content: content.update({"model.x.qweight": torch.ones(2, dtype=torch.int32)})), "I32"),
    "named weights": (config(transformers_weights="other.safetensors"), "transformers_weights names other files"),
    "distributed": (text("shard-00000-model-00001-of-00001.safetensors", ""), "a part of a distributed checkpoint"),
    "token without a row": (with_token(97), "97 rows, for tokens 0 to 96; '<extra>' is 97"),
    "pad without a row": (config(pad_token_id=97), "Padding_idx must be within|pad_token_id"),
    "end that is a text": (
        edited("generation_config.json", eos_token_id="</s>"),
        r"generation_config\.json: eos_.*'</s>'",
    ),
    "end that is true": (edited("generation_config.json", eos_token_id=[True]), r"eos_token_id is \[True\]; needed"),
    "rotations by zero": (
        config(rope_parameters={"rope_type": "default", "rope_theta": 0}),
        "infinity, .* in .*inv_freq",
    ),
    "end without a row": (edited("generation_config.json", eos_token_id=[2, 500]), "eos_token_id is 500"),
    "config no object": (text("config.json", "[]"), "needed: a JSON object"),
    "config no JSON": (text("config.json", "{"), "config.json"),
    "word for a number": (config(num_hidden_layers="four"), "num_hidden_layers.* Compare its config.json"),
    "list for a number": (config(rms_norm_eps=[1]), "cannot be loaded .*rms_norm_eps"),
    "null": (config(hidden_size=None), "cannot be loaded"),
    "zero": (config(num_attention_heads=0), "cannot be loaded|other shapes|needed"),
    "negative": (config(num_hidden_layers=-1), "no place for|cannot be loaded"),
    "unknown activation": (config(hidden_act="magic"), "cannot be loaded .*magic"),
    "unknown family": (config(model_type="magic"), r"model_type 'magic' is no family of transformers [\d.]+\. Needed"),
    "code of its own": (config(model_type="magic", auto_map={}), "code that comes with it .auto_map. is never run"),
    "encoder-decoder": (config(model_type="t5", architectures=["T5Model"]), "'T5Model', of the family t5, .*a decoder"),
    "no family": (config(model_type=None), r"config\.json: model_type is None; needed: the name of its family"),
    "encoder saved as nothing": (config(model_type="t5", architectures=3), "is a 't5', of the family t5, .*a decoder"),
    "saved as nothing": (config(num_hidden_layers=6, architectures={"a": 1}), "lacks 18 weights"),
    "model without its head": (
        both(config(architectures=["LlamaModel"]), tensors(lambda content: content.pop("lm_head.weight"))),
        "It was saved as a 'LlamaModel'; needed: a LlamaForCausalLM",
    ),
    "unknown rope": (config(rope_parameters={"rope_type": "magic", "rope_theta": 1e4}), "cannot be loaded"),
    "damaged tokenizer": (text("tokenizer.json", '{"model": 3}'), "cannot be loaded"),
    "no tokenizer": (lambda folder: (folder / "tokenizer.json").unlink(), "cannot be loaded"),
    "damaged generation": (text("generation_config.json", "{"), r"generation_config\.json .*line 1, column 1"),
    "list of settings": (text("tokenizer_config.json", "[]"), r"tokenizer_config\.json .*found list"),
    "settings no JSON": (text("tokenizer_config.json", "{'a'}"), r"tokenizer_config\.json .*line 1, column 2"),
    "cut tokenizer": (text("tokenizer.json", '{"model": 3,\n'), r"tokenizer\.json .*line 2"),
    "key twice": (
        text("special_tokens_map.json", '{"a": 1, "a": 2}'),
        r"special_tokens_map\.json .*'a' is given twice",
    ),
    "template in Latin-1": (
        lambda folder: (folder / "chat_template.jinja").write_bytes(b"{{ messages }}\ncaf\xe9"),
        r"chat_template\.jinja .*line 2, column 4: byte 0xe9 is not UTF-8",
    ),
    "folder for a file": (lambda folder: (folder / "added_tokens.json").mkdir(), r"added_tokens\.json is not a file"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_folder_that_is_not_one_whole_model_is_refused(tmp_path: Path, saved_llama: Path, case: str) -> None:
    change, problem = REFUSED[case]
    shutil.copytree(saved_llama, tmp_path / "m")
    change(tmp_path / "m")
    with pytest.raises(CompileSteerError, match=problem):
        load(str(tmp_path / "m"), device="cpu")


def test_value_beyond_the_type_that_was_asked_for_is_refused(tmp_path: Path, saved_llama: Path) -> None:
    shutil.copytree(saved_llama, tmp_path / "m")
    tensors(filled(1e5))(tmp_path / "m")
    assert float(load(str(tmp_path / "m"), device="cpu").model.get_parameter(UP).max()) == 1e5
    with pytest.raises(CompileSteerError, match=rf"NaN or infinity, in float16, in {UP}"):
        load(str(tmp_path / "m"), device="cpu", dtype="float16")


def old_buffers(content: dict[str, Tensor]) -> None:
    content["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(6)


ACCEPTED: dict[str, Change] = {
    "buffers of older versions": tensors(old_buffers),
    "side files": both(text("LICENSE", "kept?"), text("tokenizer.model", "?"), text("old.safetensors", "damaged")),
    "sharded": lambda folder: build("llama").save_pretrained(folder, max_shard_size="20KB"),
    "remote code that is not run": config(auto_map={"AutoModelForCausalLM": "modeling.Own"}),
    "negative padding": config(pad_token_id=-1),
    "longer embeddings": lambda folder: build("llama", vocab_size=112).save_pretrained(folder),
}


@pytest.mark.parametrize("case", ACCEPTED)
def test_whole_model_with_something_beside_it_is_loaded(tmp_path: Path, saved_llama: Path, case: str) -> None:
    shutil.copytree(saved_llama, tmp_path / "m")
    if case == "sharded":
        (tmp_path / "m" / "model.safetensors").unlink()
    ACCEPTED[case](tmp_path / "m")
    model = load(str(tmp_path / "m"), device="cpu").model
    if case != "longer embeddings":
        assert torch.equal(model.get_parameter(UP), build("llama").get_parameter(UP))


@pytest.mark.parametrize("kernel", ["flash_attention_2", "nobody/kernels", "eager"])
def test_config_chooses_neither_attention_code_nor_form_of_outputs(
    tmp_path: Path, saved_llama: Path, kernel: str
) -> None:
    shutil.copytree(saved_llama, tmp_path / "m")
    outputs = {"return_dict": False, "output_attentions": True, "output_hidden_states": True}
    config(attn_implementation=kernel, experts_implementation=kernel, **outputs)(tmp_path / "m")
    config(_attn_implementation=kernel, _attn_implementation_internal=kernel)(tmp_path / "m")
    plain, base = load(str(saved_llama), device="cpu"), load(str(tmp_path / "m"), device="cpu")
    expected = reference_logprobs(plain.model, [[5, 6, 7, 8]])
    for loaded in (base, reload(tmp_path / "m", base), fresh_copy(base)):
        assert loaded.model.config._attn_implementation == plain.model.config._attn_implementation
        assert (reference_logprobs(loaded.model, [[5, 6, 7, 8]]) == expected).all()
    merged_model(base.source, random_patch(base))


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_is_loaded_as_it_was_saved(tmp_path: Path, family: str) -> None:
    model = build(family)
    model.save_pretrained(tmp_path)
    chat_tokenizer().save_pretrained(tmp_path)
    again = load(str(tmp_path), device="cpu").model
    assert all(torch.equal(value, again.get_parameter(name)) for name, value in model.named_parameters())


@pytest.mark.parametrize(
    ("family", "buffers"),
    [("gpt2", ["transformer.h.0.attn.bias"]), ("gpt_neox", ["gpt_neox.layers.0.attention.bias"])],
)
def test_masks_of_older_checkpoints_are_no_weights(tmp_path: Path, family: str, buffers: list[str]) -> None:
    build(family).save_pretrained(tmp_path)
    chat_tokenizer().save_pretrained(tmp_path)
    masks = {name: torch.ones(1, 1, 4, 4, dtype=torch.uint8) for name in buffers}
    tensors(lambda content: content.update(masks))(tmp_path)
    load(str(tmp_path), device="cpu")


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (lambda content: content.popitem(), "1 are missing or left over, the first base_model.model.model.layers"),
        (lambda content: content.update(extra=torch.ones(2)), "1 are missing or left over, the first extra"),
        (renamed("base_model.model.model", "base_model.model.other"), "56 are missing or left over"),
        (lambda content: content.clear(), "no tensor of adapter_model.safetensors has; the widest is 0 wide"),
    ],
)
def test_adapter_that_does_not_hold_what_its_config_asks_for_is_refused(
    tmp_path: Path, saved_llama: Path, change: Callable[[dict[str, Tensor]], object], problem: str
) -> None:
    base: LoadedModel = load(str(saved_llama), device="cpu")
    write_patch(tmp_path / "a", random_patch(base), base, origin(base), "")
    reload(tmp_path / "a", base)
    tensors(change, ADAPTER_WEIGHTS)(tmp_path / "a")
    with pytest.raises(CompileSteerError, match=problem):
        reload(tmp_path / "a", base)


def test_merged_folder_is_checked_as_a_base_is(tmp_path: Path, saved_llama: Path) -> None:
    base = load(str(saved_llama), device="cpu")
    shutil.copytree(saved_llama, tmp_path / "m")
    reload(tmp_path / "m", base)
    config(num_hidden_layers=3)(tmp_path / "m")
    with pytest.raises(CompileSteerError, match=r"no place for: model\.layers\.3"):
        reload(tmp_path / "m", base)
