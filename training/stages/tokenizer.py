"""Word-level tokenizer of the small presets: one token a word, number, mark or duration tag, `</s>` at the end."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Iterable

from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, processors

_PAD, _END, _UNKNOWN = "<pad>", "</s>", "<unk>"
_SPECIAL = 3
"""Entries that are neither words nor duration tags."""
_PIECES = r"<<<t=\d+s>>>|\d+(?:\.\d+)?|[a-z]+(?:'[a-z]+)?|[^\sa-z\d]"
_LISTED = 5


def instruction_words(
    instructions: Iterable[str], first: tuple[str, ...], size: int, *, tags: int = 1
) -> tuple[str, ...]:
    """Words for a tokenizer: `first`, and those of instructions, the most frequent ones where room is short.

    Warns of words that find no room: to the model they are all the same unknown word.

    Args:
        instructions: of the training flights.
        first: words that are there in any case.
        size: as for `build_word_tokenizer`.
        tags: how many duration tags need room too.
    """
    pieces = pre_tokenizers.Split(Regex(_PIECES), behavior="removed", invert=True)
    counts = Counter(word for text in instructions for word, _ in pieces.pre_tokenize_str(text.lower()))
    others = sorted(counts.keys() - set(first), key=lambda word: (-counts[word], word))
    room = max(0, size - len(set(first)) - _SPECIAL - tags)
    if others[room:]:
        listed = ", ".join(others[room : room + _LISTED])
        warnings.warn(
            f"{len(others) - room} words of the instructions are unknown to the model, for which text_encoder."
            f"vocabulary {size} has no room (the most frequent: {listed}); raise it in the preset, or "
            "say the same in fewer words",
            stacklevel=2,
        )
    return (*first, *others[:room])


def build_word_tokenizer(
    words: tuple[str, ...], duration_tag: str, size: int, *, other_tags: tuple[str, ...] = ()
) -> Tokenizer:
    """A tokenizer over a fixed list of words.

    Args:
        words: lower-case words, numbers and punctuation marks.
        duration_tag: the tag that `prompts.tagged_prompt` puts in front.
        size: most entries that the text encoder's embedding table holds.
        other_tags: those of flights that are shorter or longer than the horizon.

    Raises:
        ValueError: more words than `size` entries.
    """
    entries = [_PAD, _END, _UNKNOWN, duration_tag, *sorted(set(words)), *other_tags]
    if len(entries) > size:
        raise ValueError(f"{len(entries)} words do not fit text_encoder.vocabulary {size}; raise it in the preset")
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(entries)}, unk_token=_UNKNOWN))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(_PIECES), behavior="removed", invert=True)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"$A {_END}", special_tokens=[(_END, entries.index(_END))]
    )
    return tokenizer
