"""What each seed's authors do, item by item: shown where, or not done and why."""

from __future__ import annotations

from dataclasses import dataclass

TITLE = "The authors' checklist:"


@dataclass(frozen=True)
class Item:
    """A step of the authors'; `why_not` is empty where it was done."""

    what: str
    where: str = ""
    why_not: str = ""

    def __str__(self) -> str:
        said = f": {self.where}" if self.where else ""
        return f"- [ ] {self.what}: {self.why_not}" if self.why_not else f"- [x] {self.what}{said}"


CHECKLIST: dict[str, tuple[Item, ...]] = {
    "a": (
        Item("one trained vector a block, and the arm with three sites", "the table"),
        Item(
            "language-model loss with an L2 sweep",
            "0, 1 and 10, and 0 and 10 at a higher rate; a rate ten times as high is in docs/LOG.md",
        ),
        Item("end-of-turn rate, identity questions", "ended, identity and unasked"),
        Item(
            "LoRA of as many parameters on the same data",
            "the table: as low a loss as the vectors with l2 10, a lower one than with 0 or 1",
        ),
        Item("compiled: per-layer vectors are biases", "exact, read back from disk"),
        Item(
            "a base model", why_not="no base checkpoint is installed; the embedded model outside its template instead"
        ),
    ),
    "b": (
        Item(
            "normalised difference with and without the instruction, at the last prompt token", "`recipes/format.yaml`"
        ),
        Item("clamp to the mean projection, at every position and step of one layer", "formats"),
        Item(
            "layer search with the guard against degenerate answers",
            "4 layers, 3 examples a kind (theirs: every second, 8)",
        ),
        Item("perplexity under GPT-2 in that guard", why_not="not installed; the base's own, given no prompt"),
        Item("words: additive; exclusion by subtracting the inclusion vector", "words"),
        Item("length at a fixed coefficient", "one level of concision at three doses (theirs: five levels)"),
        Item("two instructions at once, at two layers", "below the tables"),
        Item("a matched contrast as a control", "another instruction's vector"),
        Item("with and without the instruction in the prompt, compiled as well as steered", "the table, and compiled"),
        Item(
            "vectors of an instruction-tuned model on its base",
            why_not="no base checkpoint of the embedded model is installed; `extract.model` does it, tested on tiny models",
        ),
    ),
    "c": (
        Item("20 matched pairs, listening against suggesting", "`recipes/listening.yaml`"),
        Item("the difference at each layer", "the first table"),
        Item("tried on novel held-out scenarios", "the verdict, on test scenarios"),
        Item("strength calibrated, over-correction shown", "the dial"),
        Item("several vectors at once, each toggled and scaled", "two behaviours on the pairs of both"),
        Item(
            "trained so that the natural activations become the steered ones",
            "hidden states' error of what was compiled",
        ),
        Item("APOLLO", "docs/LOG.md, whole weights: beside AdamW, rank 8 and Mini"),
        Item("hook removed, the behaviour stays", "the last table"),
        Item("task vector: rank, cosine with v, scaled, negated, added", "docs/LOG.md; `compile-steer task-vector`"),
        Item("the claim that editing W_q equals h + v", "tested, and false: docs/LOG.md"),
        Item(
            "vectors in vLLM before any training",
            why_not="vLLM was not run; `export-vector` writes the GGUF that plugins read",
        ),
    ),
    "d": (
        Item("coefficient sweep up to collapse, drawn", "the table and the figure"),
        Item("coherence curve", "neutral perplexity, repetition and end of turn"),
        Item("same dose over prompts", "the slopes"),
        Item("random-direction control", "at four doses"),
        Item("relative dose", "second column"),
        Item("several vectors at several layers", "four blocks, a quarter of the dose each"),
        Item("an adaptive arm", "the clamp"),
        Item(
            "features of a sparse autoencoder",
            why_not="none is published for the embedded model; SAELens and Neuronpedia files are read, tested on made ones",
        ),
    ),
    "e": (
        Item("PASf, iPASa, iPASwo; raw vectors, last token", "the table"),
        Item("added at the last prompt position alone; the likeliest letter answers", "`positions: last_prompt`"),
        Item("layer x strength on validation, measured on test", "5 layers x 5 strengths (theirs: 10 x 14)"),
        Item("60/20/20, 95 % t-interval", "5 splits (theirs: 15 seeds)"),
        Item("on top of in-context examples", "third column"),
        Item("the off-by-one of the published code", "an arm"),
        Item(
            "on top of supervised fine-tuning; knowledge tasks", why_not="not run: at chance there is nothing to add to"
        ),
    ),
}


def ticked(section: str, name: str) -> str:
    """The section with its checklist at the end, in the place of an older one."""
    body = section.split(f"\n{TITLE}", maxsplit=1)[0].rstrip()
    return "\n".join([body, "", TITLE, "", *map(str, CHECKLIST[name])]) + "\n\n"
