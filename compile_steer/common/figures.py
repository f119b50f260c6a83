"""Numbers in messages."""

from __future__ import annotations


def decisive(value: float, limit: float, form: str) -> tuple[str, str]:
    """Both numbers in a format (".2f", ".2e", ".1%"), with as many more digits as tell them apart: 0.204 and 0.2, not 0.20."""
    texts = "", ""
    for digits in range(int(form[1:-1]), 17):
        texts = f"{value:.{digits}{form[-1]}}", f"{limit:.{digits}{form[-1]}}"
        if texts[0] != texts[1] or value == limit:
            break
    return texts[0], f"{limit:g}" if form.endswith("f") and float(f"{limit:g}") == limit else texts[1]


def probability(p: float) -> str:
    """ "p = 0.004", or "p < 0.001"."""
    return f"p = {p:.3f}" if p >= 0.0005 else "p < 0.001"
