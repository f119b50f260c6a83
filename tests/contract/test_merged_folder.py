"""A merged folder is the base's own folder: its files byte for byte, its tensors where they were, and nothing else of it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from compile_steer.artifacts.files import read_json
from compile_steer.common.errors import ArtifactError
from compile_steer.export.merged import merged_model, write_merged
from compile_steer.models.load import LoadedModel, load
from compile_steer.models.reload import reload
from compile_steer.steering.patch import WeightPatch
from compile_steer.tools.serving.export import export
from tests.contract.test_adapters import origin
from tests.helpers import byte_level
from tests.helpers.rounding import assert_same_weights
from tests.helpers.tiny import build, random_patch, vector

DOWN = "model.layers.2.mlp.down_proj"
BIAS = WeightPatch(bias={DOWN: vector(0)}, config_flags=("mlp_bias",))
KEPT = (
    *(
        "LICENSE",
        "LICENSE-MIT.txt",
        "Notice.md",
        "USE_POLICY.md",
        "tokenizer.model",
        "tokenizer.model.v3",
        "qwen.tiktoken",
    ),
    *("merges.txt", "vocab.json", "added_tokens.json", "special_tokens_map.json", "preprocessor_config.json"),
    *("processor_config.json", "chat_template.json", "additional_chat_templates/rag.jinja", "generation_config.json"),
)
LEFT = (
    *(
        "modeling_llama.py",
        "LICENSE.py",
        "license.env",
        ".env",
        ".git/config",
        ".tokenizer.json",
        "id_rsa",
        "key.pem",
        "hf_token",
    ),
    *("pytorch_model.bin", "old.pt", "tokenizer.pkl", "consolidated.safetensors", "model-00009-of-00009.safetensors"),
    *("original/params.json", "onnx/config.json", "additional_chat_templates/x.py", "training_args.bin", "notes.json"),
)


@pytest.fixture
def base(tmp_path: Path) -> LoadedModel:
    return byte_level.saved("llama", tmp_path / "base")


def merged(one: LoadedModel, patch: WeightPatch, precision: str = "fp32") -> Path:
    folder = Path(one.source).parent / "merged"
    write_merged(folder, patch, one, precision, origin(one, form=f"merged-{precision}"), "the card")
    return folder


def exported(one: LoadedModel, _patch: WeightPatch) -> Path:
    export(Path(one.source), "transformers", Path(one.source).parent / "merged")
    return Path(one.source).parent / "merged"


def edit_json(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps({**read_json(path, ""), **changes}), encoding="utf-8")


def tensors(folder: Path) -> dict[str, Tensor]:
    return {name: value for file in folder.glob("*.safetensors") for name, value in load_file(str(file)).items()}


@pytest.mark.parametrize("make", [merged, exported])
def test_what_belongs_to_the_model_is_kept_and_nothing_else(
    base: LoadedModel, make: Callable[[LoadedModel, WeightPatch], Path]
) -> None:
    source = Path(base.source)
    for name in (*KEPT, *LEFT, "README.md"):
        (source / name).parent.mkdir(exist_ok=True)
        (source / name).write_text(f'{{"of": "{name}"}}', encoding="utf-8")
    (source / "hosts.txt").symlink_to("/etc/hosts")
    folder = make(base, random_patch(base))
    for name in (*KEPT, "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        assert (folder / name).read_bytes() == (source / name).read_bytes(), name
    assert not [name for name in (*LEFT, "hosts.txt") if (folder / name).exists()]
    ours = {"config.json", "model.safetensors", "compile_steer.json", "README.md", "export.json"}
    found = {str(file.relative_to(folder)) for file in folder.rglob("*") if file.is_file()}
    assert found - ours == {*KEPT, "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"}
    assert make is exported or (folder / "README.md").read_text("utf-8") == "the card"


@pytest.mark.parametrize("make", [merged, exported])
@pytest.mark.parametrize("name", ["tokenizer.json", "LICENSE", "chat_template.jinja"])
def test_a_link_to_outside_is_refused(
    base: LoadedModel, make: Callable[[LoadedModel, WeightPatch], Path], name: str
) -> None:
    outside, file = Path(base.source).parent / "secret", Path(base.source) / name
    outside.write_text("{}", encoding="utf-8")
    file.unlink(missing_ok=True)
    file.symlink_to(outside)
    with pytest.raises(ArtifactError, match=rf"{name} is a link to .*secret, outside of the folder"):
        make(base, random_patch(base))
    assert sorted(path.name for path in Path(base.source).parent.iterdir()) == ["base", "secret"]


def test_a_snapshot_of_the_hub_is_followed_to_its_blobs(base: LoadedModel, tmp_path: Path) -> None:
    snapshot, blobs = tmp_path / "hub" / "snapshots" / "0123", tmp_path / "hub" / "blobs"
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    for file in Path(base.source).iterdir():
        shutil.copyfile(file, blobs / f"sha-of-{file.name}")
        (snapshot / file.name).symlink_to(f"../../blobs/sha-of-{file.name}")
    write_merged(tmp_path / "ours", random_patch(base), replace(base, source=str(snapshot)), "fp32", origin(base), "")
    files = list((tmp_path / "ours").iterdir())
    assert (tmp_path / "ours" / "tokenizer.json") in files and not any(file.is_symlink() for file in files)


def test_the_tokenizer_is_the_bases_own_and_not_what_the_library_makes_of_it(base: LoadedModel) -> None:
    source = Path(base.source)
    digits = [{"type": "Digits", "individual_digits": True}, {"type": "ByteLevel", "add_prefix_space": False}]
    digits[1] |= {"trim_offsets": True, "use_regex": False}
    edit_json(source / "tokenizer.json", pre_tokenizer={"type": "Sequence", "pretokenizers": digits})
    edit_json(source / "tokenizer_config.json", tokenizer_class="GPT2Tokenizer")
    folder = merged(load(base.source, device="cpu"), random_patch(base))
    assert read_json(folder / "tokenizer.json", "")["pre_tokenizer"]["pretokenizers"] == digits
    assert read_json(folder / "tokenizer_config.json", "")["tokenizer_class"] == "GPT2Tokenizer"


def test_a_template_made_from_the_recipe_takes_the_place_of_every_other(base: LoadedModel) -> None:
    source = Path(base.source)
    edit_json(source / "tokenizer_config.json", chat_template="{{ theirs }}", pad_token=None)
    (source / "chat_template.json").write_text('{"chat_template": "{{ theirs }}"}', encoding="utf-8")
    one = load(base.source, device="cpu", prompt_format="User: {prompt}\nAssistant:\n")
    folder = merged(one, random_patch(one))
    assert "theirs" not in "".join(
        file.read_text("utf-8") for file in folder.iterdir() if file.suffix != ".safetensors"
    )
    again = reload(folder, one)
    assert again.tokenizer.chat_template == one.tokenizer.chat_template and again.pad_id == one.pad_id == 2


# ------------------------------------------------------------------------------------------- tensors


def test_every_tensor_stays_in_its_file_and_only_the_edited_ones_change(base: LoadedModel) -> None:
    source = Path(base.source)
    shutil.rmtree(source)
    base.model.save_pretrained(source, max_shard_size="20KB")
    base.tokenizer.save_pretrained(source)
    save_file({f"{DOWN}.weight": torch.zeros(1)}, str(source / "model-00001-of-00001.safetensors"))  # a stale shard
    folder = merged(base, BIAS)
    old, new = (read_json(at / "model.safetensors.index.json", "") for at in (source, folder))
    files = {file.name for file in folder.glob("*.safetensors")}
    assert files == set(old["weight_map"].values()) and len(files) > 3
    biases = {name for name in new["weight_map"] if name.endswith("bias")}
    assert len(biases) == 12 and f"{DOWN}.bias" in biases
    assert all(new["weight_map"][name] == old["weight_map"][f"{name[:-4]}weight"] for name in biases)
    before, after = tensors(source), tensors(folder)
    assert torch.equal(after[f"{DOWN}.bias"], vector(0))
    assert all(not after[name].any() for name in biases - {f"{DOWN}.bias"})
    kept = old["weight_map"].keys() - {f"{DOWN}.weight"}
    assert all(torch.equal(before[name], after[name]) for name in kept)
    assert new["metadata"]["total_size"] == sum(value.nbytes for value in after.values())
    assert {**new["metadata"], "total_size": 0} == {**old["metadata"], "total_size": 0}
    assert_same_weights(
        reload(shutil.copytree(folder, folder.with_name("copy")), base).model, merged_model(str(source), BIAS)
    )


@pytest.mark.parametrize("prefix", ["", "transformer."])
def test_names_on_disk_stay_what_they_were(tmp_path: Path, prefix: str) -> None:
    """GPT-2's own files lack the prefix that its modules have in memory, and hold masks that no module has."""
    one = byte_level.saved("gpt2", tmp_path / "base")
    file = tmp_path / "base" / "model.safetensors"
    stored = {name.replace("transformer.", prefix): value for name, value in load_file(str(file)).items()}
    stored[f"{prefix}h.0.attn.bias"] = torch.ones(1, 1, 4, 4)
    save_file(stored, str(file), metadata={"format": "pt", "from": "elsewhere"})
    patch = random_patch(one)
    folder = merged(one, patch, "bf16")
    after = tensors(folder)
    assert after.keys() == stored.keys()
    assert after[f"{prefix}h.0.attn.bias"].dtype == torch.float32, "what no module loads is kept as it is"
    assert {value.dtype for name, value in after.items() if not name.endswith("h.0.attn.bias")} == {torch.bfloat16}
    changed = {name for name, value in after.items() if not torch.equal(value, stored[name].to(value.dtype))}
    assert changed == {f"{name}.weight".replace("transformer.", prefix) for name in patch.low_rank}
    expected = merged_model(str(tmp_path / "base"), patch).to(torch.bfloat16)
    assert_same_weights(reload(folder, one).model.to(torch.bfloat16), expected)


def test_what_lies_in_other_pieces_on_disk_is_refused(tmp_path: Path) -> None:
    one = byte_level.saved("qwen3_moe", tmp_path / "base")
    patch = WeightPatch(bias={"model.layers.1.mlp.experts.down_proj": torch.ones(24)})
    with pytest.raises(
        ArtifactError, match=r"edits model\.layers\.1\.mlp\.experts\.down_proj, which .* holds in other pieces"
    ):
        merged(one, patch)
    assert not (tmp_path / "merged").exists()
    folder = merged(one, random_patch(one), "bf16")
    stored, after = tensors(tmp_path / "base"), tensors(folder)
    name = "model.layers.1.mlp.experts.3.down_proj.weight"
    assert torch.equal(after[name], stored[name].bfloat16())


# ------------------------------------------------------------------------------------------- config


@pytest.mark.parametrize("spelling", [("dtype",), ("torch_dtype",), ("dtype", "torch_dtype"), ()])
def test_the_config_is_the_bases_with_the_keys_that_the_patch_needs(
    base: LoadedModel, spelling: tuple[str, ...]
) -> None:
    path = Path(base.source) / "config.json"
    content = {key: value for key, value in read_json(path, "").items() if key not in ("dtype", "rope_parameters")}
    content |= {"rope_theta": 5e5, "of_their_own": [1, 2], "auto_map": {"AutoModel": "theirs--code.Model"}}
    path.write_text(json.dumps({**content, **dict.fromkeys(spelling, "float32")}), encoding="utf-8")
    folder = merged(base, BIAS, "fp16")
    del content["auto_map"]
    expected = {**content, "mlp_bias": True, **dict.fromkeys(spelling or ("torch_dtype",), "float16")}
    assert read_json(folder / "config.json", "") == expected
    assert reload(folder, base).model.config.rope_parameters["rope_theta"] == 5e5


@pytest.mark.parametrize("family", ["mistral", "qwen2"])
def test_what_a_config_leaves_out_keeps_its_meaning_in_another_family(tmp_path: Path, family: str) -> None:
    one = byte_level.saved(family, tmp_path / "base", tie_word_embeddings=False, max_position_embeddings=64)
    path = tmp_path / "base" / "config.json"
    content = read_json(path, "")
    defaults = type(one.model.config)().to_dict()
    for key in [key for key, value in content.items() if key in defaults and defaults[key] == value]:
        content.pop(key)
    path.write_text(json.dumps({"model_type": family, **content}), encoding="utf-8")
    folder = merged(one, replace(BIAS, architecture="llama"))
    found = reload(folder, one).model.config
    assert (
        found.model_type == "llama"
        and not {"sliding_window", "layer_types"} & read_json(folder / "config.json", "").keys()
    )
    shared = {key for key in one.model.config.to_dict() if hasattr(found, key)} - {"model_type", "architectures"}
    own = build(family, vocab_size=byte_level.VOCAB, tie_word_embeddings=False).config
    assert {
        key: getattr(found, key) for key in shared - {"dtype", "head_dim", "transformers_version", "_name_or_path"}
    } == {key: getattr(own, key) for key in shared - {"dtype", "head_dim", "transformers_version", "_name_or_path"}}
