"""Word-level tokenizer of the small presets: one token a word, number, mark or duration tag, `</s>` at the end."""

from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, processors

_PAD, _END, _UNKNOWN = "<pad>", "</s>", "<unk>"
_PIECES = r"<<<t=\d+s>>>|\d+(?:\.\d+)?|[a-z]+(?:'[a-z]+)?|[^\sa-z\d]"


def build_word_tokenizer(words: tuple[str, ...], duration_tag: str, size: int) -> Tokenizer:
    """A tokenizer over a fixed list of words.

    Args:
        words: lower-case words, numbers and punctuation marks.
        duration_tag: the tag that `prompts.tagged_prompt` puts in front.
        size: most entries that the text encoder's embedding table holds.

    Raises:
        ValueError: more words than `size` entries.
    """
    entries = [_PAD, _END, _UNKNOWN, duration_tag, *sorted(set(words))]
    if len(entries) > size:
        raise ValueError(f"{len(entries)} words do not fit text_encoder.vocabulary {size}; raise it in the preset")
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(entries)}, unk_token=_UNKNOWN))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(_PIECES), behavior="removed", invert=True)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"$A {_END}", special_tokens=[(_END, entries.index(_END))]
    )
    return tokenizer
