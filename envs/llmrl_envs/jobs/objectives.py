"""Examples to tokens and labels, one function an objective."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from typing import Any

from llmrl_envs.errors import UserError
from llmrl_envs.jobs.batches import IGNORED, TokenizedSplit
from llmrl_envs.jobs.examples import ClassificationExample, InstructionExample, Message, TextExample

PROMPT_SHARE = 0.25
"""Share of the length that a prompt keeps when its completion is too long as well."""


def tokenize_texts(examples: Sequence[TextExample], tokenizer: Any, max_length: int) -> TokenizedSplit:
    """Language modelling: the documents, joined with end-of-sequence tokens, in blocks of `max_length`.

    Every token is a target. A tokenizer that puts a beginning token in front of a text does so for every document. What
    does not fill the last block is dropped, unless it is all there is.
    """
    prefix, end = beginning_tokens(tokenizer), end_tokens(tokenizer)
    stream: list[int] = []
    for tokens in plain_tokens([example.text for example in examples], tokenizer):
        stream += [*prefix, *tokens, *end]
    length = min(max_length, len(stream))
    if length < 2:
        raise UserError("text is too short to learn from", where=str(examples[0].place), expected="at least 2 tokens")
    blocks = [stream[start : start + length] for start in range(0, len(stream) - length + 1, length)]
    return TokenizedSplit(blocks, blocks, padding_token(tokenizer))


def tokenize_instructions(examples: Sequence[InstructionExample], tokenizer: Any, max_length: int) -> TokenizedSplit:
    """Prompt and completion: the loss is on the completion only, which ends with the end-of-sequence token.

    A prompt that is too long is cut from the left, so that the completion keeps its targets. It keeps at least
    `PROMPT_SHARE` of the length; a completion longer than the rest is cut from the right.
    """
    pairs = [_chat_texts(example, tokenizer) or plain_texts(example) for example in examples]
    # A chat template writes its own beginning token.
    prefix = [] if has_chat_template(tokenizer) else beginning_tokens(tokenizer)
    end = end_tokens(tokenizer)
    prompts = plain_tokens([prompt for prompt, _ in pairs], tokenizer)
    completions = plain_tokens([completion for _, completion in pairs], tokenizer)
    input_ids, labels = [], []
    for prompt, completion in zip(prompts, completions, strict=True):
        # Something has to come first, or the completion's first token could not be told from anything.
        first = prefix or ([] if prompt else end)
        kept, answer = fit([*first, *prompt], [*completion, *end], max_length, num_kept=len(first))
        input_ids.append(kept + answer)
        labels.append([IGNORED] * len(kept) + answer)
    return TokenizedSplit(input_ids, labels, padding_token(tokenizer))


def fit(prompt: list[int], completion: list[int], max_length: int, num_kept: int = 0) -> tuple[list[int], list[int]]:
    """Shortens a prompt from the left and, if it must, a completion from the right, to `max_length` tokens in all.

    The first `num_kept` tokens of the prompt stay where they are.

    >>> fit([1, 5, 6, 7], [8, 9], max_length=4, num_kept=1)
    ([1, 7], [8, 9])
    """
    least = min(len(prompt), max(1, int(PROMPT_SHARE * max_length)))
    completion = completion[: max_length - least]
    room = max_length - len(completion)
    if len(prompt) > room:
        num_kept = min(num_kept, room)
        prompt = prompt[:num_kept] + prompt[len(prompt) - (room - num_kept) :]
    return prompt, completion


def has_chat_template(tokenizer: Any) -> bool:
    """Whether the tokenizer knows how its model writes conversations."""
    return getattr(tokenizer, "chat_template", None) is not None


def plain_texts(example: InstructionExample) -> tuple[str, str]:
    r"""Prompt and completion for a model without a chat template.

    One message is the prompt, followed by a line break. Several are lines `User: ...`, `Assistant: ...`, and the prompt
    ends with `Assistant: `.
    """
    if len(example.prompt) == 1:
        return f"{example.prompt[0].content}\n", example.completion
    turns = "".join(f"{message.role.capitalize()}: {message.content}\n" for message in example.prompt)
    return f"{turns}Assistant: ", example.completion


def _chat_texts(example: InstructionExample, tokenizer: Any) -> tuple[str, str] | None:
    """Prompt and completion as the chat template writes them; None where there is no template."""
    if not has_chat_template(tokenizer):
        return None
    messages = [message._asdict() for message in example.prompt]
    answer = Message("assistant", example.completion)._asdict()
    try:
        prompt = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        whole = tokenizer.apply_chat_template([*messages, answer], tokenize=False)
    except Exception as error:
        # A template is a program that came with the model; it refuses, for instance, roles that it does not know.
        got = f"{type(error).__name__}: {error}"
        raise UserError(
            "the model's chat template refuses this conversation", where=str(example.place), got=got
        ) from None
    # Some templates rewrite the answer (for instance cut reasoning out of it): then it is taken as it is.
    completion = whole.removeprefix(prompt) if whole.startswith(prompt) else example.completion
    # The template's own end of turn is often the end-of-sequence token, which is appended once for all.
    return prompt, completion.rstrip().removesuffix(tokenizer.eos_token or "")


def tokenize_classification(
    examples: Sequence[ClassificationExample], labels: Sequence[int], tokenizer: Any, max_length: int
) -> TokenizedSplit:
    """Sequence classification: a text or a pair of texts, cut to `max_length`, and one class.

    Args:
        examples: The texts.
        labels: Class of each example.
        tokenizer: The model's tokenizer; it adds its special tokens.
        max_length: Longest example in tokens; of a pair the longer text is cut.
    """
    texts = [example.text for example in examples]
    pairs = [example.text_pair or "" for example in examples]
    is_paired = any(example.text_pair is not None for example in examples)
    encoded = tokenizer(texts, pairs if is_paired else None, truncation=True, max_length=max_length)
    types = encoded.get("token_type_ids")
    # Segment numbers that are all zero are what models assume anyway, and not every model takes them.
    types = types if types is not None and any(any(row) for row in types) else None
    input_ids = [tokens or [padding_token(tokenizer)] for tokens in encoded["input_ids"]]
    return TokenizedSplit(input_ids, labels, padding_token(tokenizer), types)


def resolve_labels(
    splits: Mapping[str, Sequence[ClassificationExample]], names: tuple[str, ...] | None, num_labels: int | None
) -> tuple[dict[str, list[int]], tuple[str, ...]]:
    """Numbers the classes over all splits.

    Names are numbered in the order of `names`, or sorted where none are given. Numbers stay as they are.

    Args:
        splits: Examples of each split.
        names: Names of the classes, where the data states them.
        num_labels: Number of classes; None counts the names, or takes the highest number and adds one.

    Returns:
        Classes of each split's examples, and the names of all classes.

    Raises:
        UserError: A label is not below the number of classes, or is not among the names.
    """
    everything = [example for examples in splits.values() for example in examples]
    if names is None and any(isinstance(example.label, str) for example in everything):
        names = tuple(sorted({str(example.label) for example in everything}))
        number: Mapping[int | str, int] = {name: index for index, name in enumerate(names)}
        number = number | {example.label: number[str(example.label)] for example in everything}  # type: ignore[operator]
    else:
        number = {name: index for index, name in enumerate(names or ())}
    highest = max((example.label for example in everything if isinstance(example.label, int)), default=0)
    count = num_labels or (len(names) if names else max(highest + 1, 2))
    classes = {split: [_class_of(example, number, count) for example in examples] for split, examples in splits.items()}
    known = tuple((names or ())[:count])
    return classes, known + tuple(str(index) for index in range(len(known), count))


def _class_of(example: ClassificationExample, number: Mapping[int | str, int], count: int) -> int:
    label = example.label
    if isinstance(label, str) and label not in number:
        close = difflib.get_close_matches(label, [name for name in number if isinstance(name, str)], n=1)
        hint = f"; did you mean {close[0]!r}?" if close else ""
        expected = f"one of {', '.join(str(name) for name in list(number)[:20])}"
        raise UserError("unknown label", where=str(example.place), expected=expected, got=f"{label!r}{hint}")
    index = number.get(label, label)
    if isinstance(index, int) and 0 <= index < count:
        return index
    expected = f"0 .. {count - 1} ({count} classes)"
    raise UserError("label out of range", where=str(example.place), expected=expected, got=label)


def plain_tokens(texts: list[str], tokenizer: Any) -> list[list[int]]:
    """Tokens of each text, without special tokens."""
    if not texts:
        return []
    tokens: list[list[int]] = tokenizer(texts, add_special_tokens=False)["input_ids"]
    return tokens


def beginning_tokens(tokenizer: Any) -> list[int]:
    """The beginning token, if the tokenizer puts it in front of a text by itself."""
    bos = tokenizer.bos_token_id
    return [bos] if bos is not None and list(tokenizer("")["input_ids"][:1]) == [bos] else []


def end_tokens(tokenizer: Any) -> list[int]:
    """The end-of-sequence token, if there is one."""
    return [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]


def padding_token(tokenizer: Any) -> int:
    """The token that fills up a batch; any will do, since padding is masked."""
    return 0 if tokenizer.pad_token_id is None else int(tokenizer.pad_token_id)
