"""Every stage on a random Llama of the shape of an 8B model, in bfloat16 on the GPU, over what its arithmetic would take.

    python -m benchmarks.gpu [--shape 8b|1b|135m|tiny] [--folder DIR]

Nothing is downloaded: weights and texts are random. DIR (default: a temporary one) needs room for twice the weights. Without
a GPU it runs in float32 on the CPU, where the shape tiny, which the tests run, takes seconds.
"""

from __future__ import annotations

import argparse
import shutil
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from compile_steer.artifacts.files import save_json
from compile_steer.cli.run_tables import print_profile
from compile_steer.common.profile import Phase, Profile
from compile_steer.common.progress import Progress
from compile_steer.common.terminal import Terminal
from compile_steer.export.merged import MergedCheckpoint
from compile_steer.lowering import closed_form, distill
from compile_steer.lowering.job import Lowering
from compile_steer.lowering.options import CompileOptions, DistillOptions
from compile_steer.models.forward import read_activations, run_blocks
from compile_steer.models.load import LoadedModel, frozen
from compile_steer.models.logprobs import divergence, final_states
from compile_steer.models.reload import reload
from compile_steer.models.text import Text
from compile_steer.models.tokens import Encoded, batches
from compile_steer.steering.passes import canonical
from compile_steer.steering.program import Intervention, Program
from compile_steer.steering.sites import Site


@dataclass(frozen=True)
class Shape:
    """A Llama: width, MLP, blocks, heads, key-value heads, vocabulary; and how many tokens each stage gets."""

    d_model: int
    d_mlp: int
    blocks: int
    heads: int
    kv_heads: int
    vocabulary: int
    pairs: int
    calibration: int
    steps: int


SHAPES = {
    "8b": Shape(4096, 14336, 32, 32, 8, 128256, pairs=128, calibration=100_000, steps=20),
    "1b": Shape(2048, 8192, 16, 32, 8, 128256, pairs=128, calibration=100_000, steps=20),
    "135m": Shape(576, 1536, 30, 9, 3, 49152, pairs=16, calibration=8_000, steps=2),
    "tiny": Shape(64, 160, 4, 4, 2, 512, pairs=4, calibration=1_500, steps=2),
}
_LENGTH, _PROMPT = 100, 20  # tokens of a text, and of its prompt


def random_model(shape: Shape, folder: Path, device: torch.device, dtype: torch.dtype) -> LoadedModel:
    """The model on the device, and in `folder` as a user would have it."""
    config = LlamaConfig(
        hidden_size=shape.d_model,
        intermediate_size=shape.d_mlp,
        num_hidden_layers=shape.blocks,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        vocab_size=shape.vocabulary,
        max_position_embeddings=2048,
        rope_theta=5e5,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        dtype=dtype,
    )
    torch.manual_seed(0)
    torch.set_default_dtype(dtype)
    try:
        with device:
            model = LlamaForCausalLM(config)
    finally:
        torch.set_default_dtype(torch.float32)
    words = {"<pad>": 0, "<s>": 1, "</s>": 2, "<unk>": 3, **{f"w{n}": n for n in range(4, shape.vocabulary)}}
    raw = Tokenizer(WordLevel(words, unk_token="<unk>"))
    raw.pre_tokenizer = WhitespaceSplit()
    special = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, **special)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return LoadedModel(frozen(model, device), tokenizer, "random", "sha256:random", str(folder))


def random_texts(shape: Shape, tokens: int) -> list[Encoded]:
    """Texts of random tokens, so many tokens in all."""
    ids = torch.randint(4, shape.vocabulary, (max(6, tokens // _LENGTH), _LENGTH))
    return [Encoded(tuple(row), _PROMPT) for row in ids.tolist()]


def measure(shape: Shape, folder: Path, device: torch.device) -> tuple[Profile, list[Phase], list[str]]:
    """Run the stages; returns what was measured, and what compares two of them."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    profile = Profile(Progress(), str(device), str(dtype).removeprefix("torch."))
    with profile.phase("random weights, saved to disk", 1):
        loaded = random_model(shape, folder / "base", device, dtype)
        layer = loaded.layout.n_layers // 2  # measures the layout
    texts = random_texts(shape, shape.calibration)

    def as_text(text: Encoded) -> Text:
        words = [f"w{n}" for n in text.ids]
        return Text(" ".join(words[:_PROMPT]), " ".join(words[_PROMPT:]))

    with profile.phase("extract: activations of all blocks", 1):
        sides = [as_text(text) for text in random_texts(shape, 2 * shape.pairs * _LENGTH)]
        activations = read_activations(loaded, sides, point="resid_post", readout="response_mean")
    direction = (activations[::2] - activations[1::2])[:, layer].mean(dim=0)
    size = float(activations[:, layer].norm(dim=-1).mean())
    vector = direction * (0.5 * size / float(direction.norm()))
    program = canonical(
        Program((Intervention(Site(layer, "resid_post"), "add", vector, 1.0, "all"),), loaded.id, loaded.revision)
    )
    with profile.phase("one forward pass of the calibration tokens", 1), torch.no_grad():
        for batch in batches(loaded, texts):
            run_blocks(loaded.model, batch.input_ids, batch.attention_mask)
    options = CompileOptions(
        distill=DistillOptions(start="random", epochs=1.0, batch_tokens=20 * _LENGTH, base_kl_weight=0.0)
    )
    lowering = Lowering(program, loaded, (), options)
    training = random_texts(shape, shape.steps * 20 * _LENGTH)
    lowering.__dict__.update(regression_texts=texts, training_texts=training)  # the place of what a model would write
    with profile.phase("closed form", 1):
        patch = closed_form.lower(lowering)
    with profile.phase("distill", 1):
        distill.lower(lowering)
    with profile.phase("copy of the files", 1):
        shutil.copytree(folder / "base", folder / "copied")
    shutil.rmtree(folder / "copied")
    merged = folder / "merged"
    merged.mkdir()
    with profile.phase("merge", 1):
        MergedCheckpoint(folder / "base", patch).write_weights(merged, dtype)
    for file in ("config.json", "tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        shutil.copyfile(folder / "base" / file, merged / file)
    with profile.phase("verify: reload from disk", 1):
        artifact = reload(merged, loaded)
    with profile.phase("verify: states and distributions", 1):
        held_out = random_texts(shape, min(64, shape.calibration // 50) * _LENGTH)
        steered, base = (final_states(loaded, held_out, under).response for under in (program, None))
        compiled = final_states(artifact, held_out).response
        kl = divergence(loaded.model, steered, artifact.model, compiled).mean
        kl_base = divergence(loaded.model, steered, loaded.model, base).mean
    phases = {phase.label: phase for phase in profile.close()}
    save_json(folder / "profile.json", profile.record())
    own = phases["closed form"].seconds / phases["one forward pass of the calibration tokens"].seconds
    copying = phases["merge"].seconds / phases["copy of the files"].seconds
    remarks = [
        f"closed form over one forward pass of its {shape.calibration:,} tokens: {own:.2f} x (goal 1.5 x)",
        f"merge over a copy of its files: {copying:.2f} x (goal 2 x)",
        f"KL(steered || compiled) {kl:.3g} of KL(steered || base) {kl_base:.3g} nats a token, on random texts",
    ]
    return profile, list(phases.values()), remarks


def main() -> None:
    """Measure, and print the table for docs/BENCHMARKS.md."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    gpu = torch.cuda.is_available()
    parser.add_argument("--shape", choices=SHAPES, default="8b" if gpu else "tiny")
    parser.add_argument("--folder", type=Path)
    options = parser.parse_args()
    device, started, console = torch.device("cuda" if gpu else "cpu"), time.perf_counter(), Terminal()
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        profile, phases, remarks = measure(SHAPES[options.shape], Path(folder), device)
        name = torch.cuda.get_device_name() if gpu else "CPU"
        console.print(f"Llama of shape {options.shape} on {name}, {time.perf_counter() - started:.0f} s in all")
        print_profile(console, phases, profile.rate, Path(folder) / "profile.json")
    for remark in remarks:
        console.print(remark, highlight=False)


if __name__ == "__main__":
    main()
