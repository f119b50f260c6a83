"""What is equal is in memory once, and what computes in half precision does not copy the head to single."""

from __future__ import annotations

import hashlib
from pathlib import Path

import torch

from compile_steer.artifacts.tensors import Checkpoint
from compile_steer.export.adapter import write_patch
from compile_steer.export.merged import write_merged
from compile_steer.models.load import frozen
from compile_steer.models.reload import fresh_copy, reload, shallow_copy, share_equal
from tests.contract.test_adapters import origin
from tests.helpers.tiny import Padded, build, logits, random_patch, saved, texts


def pointers(model: torch.nn.Module) -> set[int]:
    return {parameter.data_ptr() for parameter in model.parameters()}


def test_an_artifact_shares_what_is_the_bases_own(tmp_path: Path) -> None:
    one = saved("llama", tmp_path / "base")
    patch, batch = random_patch(one), Padded.of(texts(), "right")
    write_patch(tmp_path / "adapter", patch, one, origin(one), "")
    write_merged(tmp_path / "merged", patch, one, "fp32", origin(one, "merged-fp32"), "")
    assert pointers(fresh_copy(one).model) == pointers(one.model)
    adapted = reload(tmp_path / "adapter", one)
    assert pointers(adapted.model) > pointers(one.model)  # the factors alone are its own
    merged = reload(tmp_path / "merged", one)
    shared = len(pointers(merged.model) & pointers(one.model))
    assert shared == len(pointers(one.model)) - len(patch.low_rank)
    before = logits(one.model, batch)
    assert torch.allclose(logits(adapted.model, batch), logits(merged.model, batch), atol=1e-5)
    assert torch.equal(logits(one.model, batch), before) and not torch.equal(logits(merged.model, batch), before)


def test_other_tensors_of_a_shallow_copy_leave_the_base_alone(tmp_path: Path) -> None:
    one = saved("qwen2", tmp_path / "base")  # tied
    before = {name: value.clone() for name, value in one.model.state_dict().items()}
    rounded = shallow_copy(one)
    assert pointers(rounded.model) == pointers(one.model)
    for parameter in rounded.model.parameters():
        parameter.data = parameter.to(torch.bfloat16).to(parameter)
    assert rounded.model.lm_head.weight is rounded.model.model.embed_tokens.weight
    assert all(torch.equal(value, before[name]) for name, value in one.model.state_dict().items())
    again = shallow_copy(one)
    for parameter in again.model.parameters():
        parameter.data = parameter.to(torch.bfloat16).to(parameter)
    share_equal(again.model, rounded.model)
    assert pointers(again.model) == pointers(rounded.model)


def test_values_of_another_type_or_nan_are_not_shared() -> None:
    one, other, damaged = build("llama"), build("llama").bfloat16(), build("llama")
    share_equal(other, one)
    assert not pointers(other) & pointers(one)
    with torch.no_grad():
        damaged.lm_head.weight[0, 0] = torch.nan
    share_equal(damaged, damaged_copy := build("llama"))
    assert damaged.lm_head.weight.data_ptr() != damaged_copy.lm_head.weight.data_ptr()


def test_the_head_is_given_whole_rows_in_half_precision() -> None:
    for dtype in (torch.bfloat16, torch.float16):
        model = frozen(build("llama").to(dtype), torch.device("cpu"))
        seen: list[bool] = []
        model.lm_head.register_forward_pre_hook(lambda _head, args, seen=seen: seen.append(args[0].is_contiguous()))
        model.generate(torch.randint(6, 90, (2, 7)), max_new_tokens=2, min_new_tokens=2)
        assert seen == [True, True]


def test_the_revision_is_of_the_stored_bytes(tmp_path: Path) -> None:
    build("llama").to(torch.bfloat16).save_pretrained(tmp_path)
    checkpoint = Checkpoint(tmp_path)
    total = hashlib.sha256()
    for name in sorted(checkpoint.files):
        tensor = checkpoint.tensor(name)
        assert tensor is not None
        total.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        total.update(tensor.contiguous().flatten().view(torch.uint8).numpy().data)
    assert checkpoint.sha256 == total.hexdigest()
