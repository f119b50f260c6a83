"""The language of a text, by its script or its most frequent small words."""

from __future__ import annotations

import re
import unicodedata
from collections import Counter

_FUNCTION_WORDS = {
    "English": "the of and to in is that it for with as on are this you be not have but from they we he she",
    "French": "le la les de des du et est un une dans que qui pour pas sur avec ce il elle nous vous au aux",
    "German": "der die das und ist nicht ein eine den dem mit auf von zu im es ich sie wir auch für sich",
    "Spanish": "el la los las de del y es un una en que por con para no se su lo al como más pero muy",
    "Italian": "il lo la gli le di del della e è un una in che per con non si sono al come più ma anche",
    "Portuguese": "o a os as de do da e é um uma em que por com para não se seu no na como mais mas",
    "Dutch": "de het een en is van in dat niet op met voor zijn te aan ook maar je ik wij er om",
}
LANGUAGES = {name: frozenset(words.split()) for name, words in _FUNCTION_WORDS.items()}


def words_of(text: str) -> list[str]:
    """The words of a text, case-folded."""
    return re.findall(r"\w+(?:['\N{RIGHT SINGLE QUOTATION MARK}]\w+)*", text.casefold())


def languages(text: str, least: int = 2) -> set[str]:
    """The script of most letters, or of Latin ones the language whose function words are the most, if there are `least`."""
    script = Counter(unicodedata.name(c, "?").split()[0] for c in text if c.isalpha()).most_common(1)
    if script and script[0][0] != "LATIN":
        return {script[0][0].title()}
    hits = {name: sum(word in known for word in words_of(text)) for name, known in LANGUAGES.items()}
    best = max(hits, key=lambda name: hits[name])
    return {best} if hits[best] >= least else set()
