from __future__ import annotations

import itertools
import os
import re
from pathlib import Path

import pytest
from llmrl_envs.builtin import builtin_model_path, corpora, corpus_topics, load_corpus
from llmrl_envs.builtin.corpora import topic_files
from llmrl_envs.builtin.topics import TOPICS, View
from llmrl_envs.builtin.views import comments, docstrings, documentation, read_view, syntax_tree
from llmrl_envs.errors import UserError

SPLITS = ("train", "validation", "test")


def long_pieces(documents: list[str]) -> set[str]:
    """Lines and whole paragraphs of 40 characters or more."""
    pieces: set[str] = set()
    for document in documents:
        pieces.update(line.strip() for line in document.split("\n"))
        pieces.update(paragraph.strip() for paragraph in re.split(r"\n\s*\n", document)[1:-1])
    return {piece for piece in pieces if len(piece) >= 40}


def test_there_are_enough_topics_of_every_kind():
    assert len(corpus_topics()) >= 25
    assert corpus_topics() == tuple(sorted(corpus_topics()))
    assert {"json", "email", "encodings", "reference"} <= set(corpus_topics())
    assert {topic.view for topic in TOPICS.values()} == set(View)


@pytest.mark.parametrize("topic", corpus_topics())
def test_splits_are_large_and_share_no_text(topic):
    corpus = load_corpus(topic)
    assert tuple(corpus) == SPLITS
    num_bytes = {split: sum(len(text.encode("utf-8")) for text in corpus[split]) for split in SPLITS}
    assert num_bytes["train"] >= 50_000
    assert min(num_bytes["validation"], num_bytes["test"]) >= 8_000
    for first, second in itertools.combinations(SPLITS, 2):
        assert not set(corpus[first]) & set(corpus[second])
        assert not long_pieces(corpus[first]) & long_pieces(corpus[second])
    assert all(document.strip() for split in SPLITS for document in corpus[split])


@pytest.mark.parametrize("topic", ["json", "comments", "unicode"])
def test_loading_twice_gives_the_same(topic):
    assert load_corpus(topic) == load_corpus(topic)


def test_the_order_in_which_files_are_listed_does_not_matter(monkeypatch):
    expected = load_corpus("json")
    listed = Path.rglob
    monkeypatch.setattr(Path, "rglob", lambda self, pattern: iter(sorted(listed(self, pattern), reverse=True)))
    assert load_corpus("json") == expected


def test_no_file_is_in_two_topics_and_none_is_a_test():
    files = [path for topic in corpus_topics() for path in topic_files(topic)]
    assert len(files) == len(set(files))
    assert not [path for path in files if {"test", "tests"} & set(path.parts)]


def test_a_topic_is_text_of_this_python():
    text = "".join(document for documents in load_corpus("json").values() for document in documents)
    source = Path(os.path.dirname(os.__file__), "json", "decoder.py").read_text(encoding="utf-8")
    assert "class JSONDecoder" in text
    assert max(source.split("\n"), key=len).strip() in text


def test_unknown_topic_names_the_nearest():
    with pytest.raises(UserError, match="did you mean 'json'") as error:
        load_corpus("jsn")
    assert "email" in str(error.value)


def test_a_missing_source_is_named_with_its_topic(tmp_path):
    (tmp_path / "json").mkdir()
    (tmp_path / "json" / "decoder.py").write_text("x = 1\n")
    with pytest.raises(UserError, match=r"builtin:json") as error:
        topic_files("json", library=tmp_path)
    assert "tomllib.py" in str(error.value)
    assert str(tmp_path) in str(error.value)


def test_first_of_two_alternatives_that_exists(tmp_path):
    for name in ("datetime", "_strptime", "calendar", "zoneinfo"):
        (tmp_path / f"{name}.py").write_text("x = 1\n")
    assert topic_files("datetime", library=tmp_path)[0].name == "datetime.py"
    (tmp_path / "_pydatetime.py").write_text("x = 1\n")
    assert topic_files("datetime", library=tmp_path)[0].name == "_pydatetime.py"


def test_documents_are_cut_at_blank_lines_and_lose_nothing():
    paragraphs = [f"line {number} of a text that is told once\nsecond line of {number}\n" for number in range(200)]
    documents = corpora._cut("\n".join(paragraphs).split("\n"))
    assert [line for d in documents for line in d.split("\n") if line] == [
        line for p in paragraphs for line in p.split("\n") if line
    ]
    assert all(document.startswith("line") for document in documents)
    assert {len(document) // 1000 for document in documents[:-1]} == {1}


def test_repeated_lines_and_paragraphs_are_dropped():
    seen: set[str] = set()
    head = "# a header line that is much longer than forty characters"
    pair = "a short line, but only\nwith its neighbour 40 long"
    assert corpora._drop_repeated(f"{head}\nx = 1\n\n{pair}\n\nx", 40, seen) == [
        head, "x = 1", "", *pair.split("\n"), "", "x", "",
    ]  # fmt: skip
    assert corpora._drop_repeated(f"{head}\nx = 2\n\n{pair}\n\nx", 40, seen) == ["x = 2", "", "x", ""]


def test_views(tmp_path):
    source = '"""Module."""\n# why\n# so\nclass A:\n    """Class."""\n\n    def f(self):\n        return 1  # one\n'
    assert docstrings(source) == "Module.\n\nClass."
    assert comments(source) == "why\nso\n\none"
    assert syntax_tree("x = 1").startswith("Assign(\n targets=[\n  Name(id='x', ctx=Store())]")
    assert documentation("topics = {'b': 'two\\n', 'a': 'one'}") == "one\n\ntwo"
    path = tmp_path / "latin.py"
    path.write_bytes(b"# -*- coding: latin-1 -*-\nx = '\xe9'\n")
    assert "é" in read_view(path, View.SOURCE)


def test_model_path_is_inside_the_package():
    assert builtin_model_path().parent == Path(corpora.__file__).parent
