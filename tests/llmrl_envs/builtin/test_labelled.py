"""Prompts with completions and texts with labels that need no download."""

from collections import Counter

import pytest
from llmrl_envs.builtin import corpus_topics, example_sets, load_examples
from llmrl_envs.builtin.labelled import MODULES, described_functions, snippets
from llmrl_envs.jobs.loading import JobLibrary
from llmrl_envs.jobs.task import FineTuningTask

OBJECTIVES = {
    "summaries": "instruction",
    "signatures": "instruction",
    "modules": "classification",
    "kinds": "classification",
}


def test_no_set_is_called_like_a_topic():
    assert set(example_sets()) == set(OBJECTIVES)
    assert set(example_sets()).isdisjoint(corpus_topics())


@pytest.mark.parametrize("name", example_sets())
def test_no_text_is_in_two_splits(name):
    splits = load_examples(name)
    keys = ("prompt", "completion") if OBJECTIVES[name] == "instruction" else ("text",)
    texts = {split: {row[key] for row in rows for key in keys} for split, rows in splits.items()}
    assert texts["train"].isdisjoint(texts["validation"] | texts["test"])
    assert texts["validation"].isdisjoint(texts["test"])
    assert len(splits["train"]) > 700
    assert min(len(splits["validation"]), len(splits["test"])) > 100
    assert load_examples(name) == splits


@pytest.mark.parametrize("name", ["modules", "kinds"])
def test_labels_are_about_equally_frequent_in_every_split(name):
    for rows in load_examples(name).values():
        counts = Counter(row["label"] for row in rows)
        assert len(counts) == (len(MODULES) if name == "modules" else 7)
        assert max(counts.values()) <= 2.5 * min(counts.values())


def test_functions_without_a_summary_or_with_a_long_one_are_left_out():
    source = f"""
async def late(self, *, now=None):
    \"\"\"Come after the others.

    More of it.
    \"\"\"
def silent(): pass
def wordy():
    "{"x" * 81}"
"""
    assert list(described_functions(source)) == [("def late(self, *, now=None):", "Come after the others.")]


def test_snippets_end_at_line_ends():
    document = "\n".join("word " * 8 for _ in range(7))
    pieces = list(snippets(document))
    assert [len(piece.split("\n")) for piece in pieces] == [3, 3]
    assert all(len(piece) >= 100 for piece in pieces)


@pytest.mark.parametrize("name", example_sets())
def test_the_built_in_model_learns_from_it(name):
    task = FineTuningTask(data=f"builtin:{name}", objective=OBJECTIVES[name], max_length=96, steps=10)
    job = JobLibrary("cpu").job(task)
    assert job.data.num_labels == {"modules": 8, "kinds": 7}.get(name)
    assert job.data.train.num_target_tokens.sum() >= len(job.data.train)
