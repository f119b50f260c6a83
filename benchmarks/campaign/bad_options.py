"""Command lines that are wrong."""

from __future__ import annotations

from collections.abc import Iterator

from benchmarks.campaign.case import NAME, Bad

RECIPE = f"recipes/{NAME}.yaml"
ADAPTER = f"finished/adapters/{NAME}-closed_form"
# The command, and words of its message.
LINES: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("rnu {recipe}", ("rnu",)),
    ("run", ("'recipe'",)),
    ("run {recipe} {recipe}", ()),
    ("run {recipe} --fast", ("--fast",)),
    ("run {recipe} --out", ("--out",)),
    ("run {recipe} --out recipes/tide.yaml", ("recipes/tide.yaml",)),
    ("run {recipe} --out recipes/tide.yaml/out", ("recipes/tide.yaml",)),
    ("run {recipe} --out /proc/out", ("/proc/out",)),
    ("run {recipe} --out out --seed many", ("--seed",)),
    ("run {recipe} --out out --seed -99999999999999999999999", ("seed",)),
    ("run {recipe} --out out --device cuda:99", ("cuda:99",)),
    ("run {recipe} --out out --dtype float8", ("float8",)),
    ("run {recipe} --out out --set", ("--set",)),
    ("run {recipe} --out out --set seed", ("--set",)),
    ("run {recipe} --out out --set =3", ("--set",)),
    ("run {recipe} --out out --set seed=[", ("--set",)),
    ("run {recipe} --out out --set seed=", ("seed",)),
    ("run {recipe} --out out --set seed.more=3", ("seed",)),
    ("run {recipe} --out out --set .seed=3", (".seed",)),
    ("run {recipe} --out out --set validate..layers=[1]", ("validate..layers",)),
    ("run {recipe} --out out --set validate.layers.0=1", ("validate.layers",)),
    ("run {recipe} --out out --set extract.methd=pca", ("'method'",)),
    ("run {recipe} --out out --set folder=/", ("folder",)),
    ("run {recipe} --out out --set seed=!!python/name:os.system", ("--set",)),
    ("run {recipe} --out out --set validate.coefficients=[&a,*a]", ("validate.coefficients",)),
    ("compile {recipe} --out out", ("tide.safetensors",)),
    ("merge {recipe} --out out", ("tide.safetensors",)),
    ("verify {recipe} --out out", ("tide.safetensors",)),
    ("generate-pairs {recipe} --out out", ("data.kind",)),
    ("import {recipe} --out out", ("--from",)),
    ("import {recipe} --out out --from nowhere.gguf --to new", ("nowhere.gguf",)),
    ("import {recipe} --out out --from model --to new", ("model",)),
    ("export-vector {recipe} --out out", ("tide.safetensors",)),
    ("decompile {recipe} --out out --artifact nowhere", ("nowhere",)),
    ("decompile {recipe} --out out --artifact recipes", ("recipes",)),
    ("task-vector {recipe} --out out --artifact nowhere", ("nowhere",)),
    ("compose {recipe}", ("two",)),
    ("compose {recipe} {recipe}", ("tide",)),
    ("co-load {recipe} {recipe} --scale x", ("--scale",)),
    ("show nowhere", ("nowhere",)),
    ("show recipes", ("recipes",)),
    ("show {recipe}", ("tide.yaml",)),
    ("show /dev/null", ("/dev/null",)),
    ("reproduce nowhere", ("nowhere",)),
    ("reproduce recipes --to out", ("recipes",)),
    ("audit nowhere model", ("nowhere",)),
    ("audit model nowhere", ("nowhere",)),
    ("audit model recipes", ("recipes",)),
    ("audit model model --program {recipe}", ("tide.yaml",)),
    ("audit model model --threshold nan", ("threshold",)),
    ("audit model model --threshold 7", ("threshold",)),
    ("push nowhere --to a/b", ("nowhere",)),
    ("push recipes --to a/b", ("recipes",)),
    ("export nowhere --for vllm --out out", ("nowhere",)),
    ("export model --for tgi --out out", ("tgi",)),
    ("export recipes --for vllm --out out", ("recipes",)),
    ("export model --for llama.cpp --out out --precision q3", ("q3",)),
    ("verify-engines model --engine tgi", ("tgi",)),
    ("glossary no-such-term", ("no-such-term",)),
)
# Of the finished run.
FINISHED: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("merge {recipe} --out finished --artifact nowhere", ("nowhere",)),
    ("merge {recipe} --out finished --artifact model", ("model",)),
    ("verify {recipe} --out finished --artifact nowhere", ("nowhere",)),
    ("verify {recipe} --out finished --artifact model", ("model",)),
    ("verify {recipe} --out finished --artifact recipes", ("recipes",)),
    ("export-vector {recipe} --out finished --format magic", ("magic",)),
    ("export-vector {recipe} --out finished --layer-convention bloc", ("bloc",)),
    ("task-vector {recipe} --out finished --artifact {adapter} --scale nan", ("scale",)),
    ("task-vector {recipe} --out finished --artifact {adapter} --scale inf", ("scale",)),
    ("task-vector {recipe} --out finished --artifact {adapter} --scale 1e300", ("scale|not finite",)),
    ("task-vector {recipe} --out finished --artifact {adapter} --cut 0", ("cut",)),
    ("task-vector {recipe} --out finished --artifact {adapter} --cut -3", ("cut",)),
    ("task-vector {recipe} --out finished --artifact {adapter} --to ../../../up", ("../../../up",)),
    ("task-vector {recipe} --out finished --artifact {adapter} --to bias", ("bias",)),
    ("task-vector {recipe} --out finished --artifact model", ("model",)),
    ("reproduce {adapter} --to finished", ("finished",)),
    ("reproduce {adapter} --tolerance nan", ("tolerance",)),
    ("reproduce {adapter} --tolerance -1", ("tolerance",)),
    ("reproduce {adapter} --recipes nowhere", ("nowhere",)),
    ("show {adapter} --recipes nowhere", ("nowhere",)),
    ("push {adapter} --to tide", ("--to",)),
    ("push {adapter} --to ../x", ("--to",)),
    ("export {adapter} --for vllm --out model", ("model",)),
    ("export {adapter} --for vllm --out recipes/tide.yaml", ("tide.yaml",)),
    ("export {adapter} --for vllm --out out --base recipes", ("recipes",)),
    ("verify-engines {adapter} --engine vllm --limit nan", ()),
    ("verify-engines {adapter} --engine vllm --limit -1", ()),
)


def inputs() -> Iterator[Bad]:
    """Wrong commands, options and values."""
    for lines, finished in ((LINES, False), (FINISHED, True)):
        for line, words in lines:
            command = tuple(part.format(recipe=RECIPE, adapter=ADAPTER) for part in line.split())
            yield Bad(f"command: {line}", lambda _case: None, words, command, finished)
