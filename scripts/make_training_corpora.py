"""Corpora for the default policy to learn on, cut from the built-in ones: known and strange text, answers, labels.

    python scripts/make_training_corpora.py --output training/corpora

The built-in model knows Python's library; real jobs also teach a model what it has never seen. So topics are written in
other ways, which is as far from what the model knows as another language is:

    text-WRITING-NUMBER      documents of a topic, enciphered, reversed, in hexadecimal digits, in the other case, in
                             Greek or Japanese letters, whose bytes base models hardly know
    answers-WRITING-NUMBER   prompt: the beginning of a line; completion: how it goes on, or the same in another writing
    labels-K-NUMBER          classification: from which of K topics a piece of text is; in some a share of the training
                             labels is wrong

Each is a folder of train.jsonl, validation.jsonl and test.jsonl. Topics that policies are judged on are left out. Same
Python version, same files.
"""

from __future__ import annotations

import argparse
import json
import string
from collections.abc import Callable
from pathlib import Path

import numpy as np
from llmrl_envs.builtin import corpus_topics, load_corpus

JUDGED_ON = frozenset({"html", "email", "unicode", "tarfile", "syntax_trees", "typing"})
TOPICS = tuple(topic for topic in corpus_topics() if topic not in JUDGED_ON)
WRONG_LABELS = {2: (0.0, 0.2), 3: (0.0,), 4: (0.0,), 6: (0.1,), 8: (0.0,), 12: (0.3,)}
"""By number of classes: the share of wrong training labels of each set."""
MOST_CHARACTERS, MOST_ROWS = 1_500, 3_000

Rows = list[dict[str, str]]


def _cipher(seed: int) -> Callable[[str], str]:
    letters = string.ascii_lowercase
    mixed = "".join(np.random.default_rng(seed).permutation(list(letters)))
    table = str.maketrans(letters + letters.upper(), mixed + mixed.upper())
    return lambda text: text.translate(table)


def _letters_from(first: str) -> Callable[[str], str]:
    """Every letter as one of 26 characters from `first` on; in UTF-8 two or three bytes each."""
    table = {ord(letter): ord(first) + place for place, letter in enumerate(string.ascii_lowercase)}
    return lambda text: text.lower().translate(table)[:MOST_CHARACTERS]


KNOWN_LETTERS: dict[str, Callable[[str], str]] = {
    "cipher": _cipher(1),
    "cipher2": _cipher(2),
    "reversed": lambda text: text[::-1],
    "upper": str.upper,
    "hex": lambda text: text.encode().hex()[:MOST_CHARACTERS],
    "swapped": str.swapcase,
}
OTHER_LETTERS: dict[str, Callable[[str], str]] = {"greek": _letters_from("α"), "kana": _letters_from("あ")}
WRITINGS = KNOWN_LETTERS | OTHER_LETTERS


def texts(topic: str, writing: str) -> dict[str, Rows]:
    """Documents of a topic in another writing."""
    return {split: [{"text": WRITINGS[writing](text)} for text in docs] for split, docs in load_corpus(topic).items()}


def answers(topic: str, writing: str, rng: np.random.Generator) -> dict[str, Rows]:
    """Beginnings of lines with how they go on ("continue") or with the same in another writing."""
    found: dict[str, Rows] = {}
    for split, documents in load_corpus(topic).items():
        lines = [line.strip()[:60] for text in documents for line in text.split("\n") if len(line.strip()) >= 24]
        if writing == "continue":
            rows = [{"prompt": line[: len(line) // 2], "completion": line[len(line) // 2 :]} for line in lines]
        else:
            rows = [{"prompt": line[:24], "completion": WRITINGS[writing](line[:24])} for line in lines]
        found[split] = [rows[index] for index in rng.permutation(len(rows))[:MOST_ROWS]]
    return found


def labels(topics: list[str], wrong: float, size: int, rng: np.random.Generator) -> dict[str, Rows]:
    """Pieces of text with the topic that they are from; a share of the training labels is drawn at random."""
    found: dict[str, Rows] = {}
    for split in ("train", "validation", "test"):
        rows = [
            {"text": text[start : start + size], "label": topic}
            for topic in topics
            for text in load_corpus(topic)[split]
            for start in range(0, min(len(text) - 20, 600), size)
        ]
        if split == "train":
            rows = [row if rng.random() >= wrong else {**row, "label": str(rng.choice(topics))} for row in rows]
        found[split] = [rows[index] for index in rng.permutation(len(rows))[:MOST_ROWS]]
    return found


def corpora(rng: np.random.Generator) -> dict[str, dict[str, Rows]]:
    """All of them by name; two topics, or one set, each."""
    found: dict[str, dict[str, Rows]] = {}
    for writing in KNOWN_LETTERS:
        for number, topic in enumerate(rng.choice(TOPICS, 2, replace=False)):
            found[f"text-{writing}-{number}"] = texts(str(topic), writing)
    for writing in ("continue", "upper", "cipher", "reversed"):
        for number, topic in enumerate(rng.choice(TOPICS, 2, replace=False)):
            found[f"answers-{writing}-{number}"] = answers(str(topic), writing, rng)
    for classes, shares in WRONG_LABELS.items():
        for number, wrong in enumerate(shares):
            chosen = [str(topic) for topic in rng.choice(TOPICS, classes, replace=False)]
            found[f"labels-{classes}-{number}"] = labels(chosen, wrong, int(rng.choice([40, 80, 120])), rng)
    for writing in OTHER_LETTERS:
        for number, topic in enumerate(rng.choice(TOPICS, 4, replace=False)):
            kind, rows = (
                ("text", texts(str(topic), writing)) if number < 2 else ("answers", answers(str(topic), writing, rng))
            )
            found[f"{kind}-{writing}-{number % 2}"] = rows
    return found


def main() -> None:
    """Writes the folders."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True)
    output: Path = parser.parse_args().output
    for name, splits in corpora(np.random.default_rng(0)).items():
        folder = output / name
        folder.mkdir(parents=True, exist_ok=True)
        for split, rows in splits.items():
            text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
            (folder / f"{split}.jsonl").write_text(text, encoding="utf-8")
    print(f"{output}: {len(list(output.iterdir()))} corpora")


if __name__ == "__main__":
    main()
