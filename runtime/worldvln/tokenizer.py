"""Prompt to token ids, with the tokenizer that lies in the checkpoint and in the bundle (`tokenizer.json`).

Source: spec/world_model.md 4.
"""

from pathlib import Path

import numpy as np
from tokenizers import Tokenizer


class TokenizerError(ValueError):
    """A `tokenizer.json` that cannot be used."""


class PromptTokenizer:
    """Wraps a `tokenizers` file; truncates to the model's text length, end-of-text token included."""

    def __init__(self, tokenizer: Tokenizer, max_tokens: int):
        self._tokenizer = tokenizer
        self._tokenizer.enable_truncation(max_tokens)
        self._tokenizer.no_padding()

    @classmethod
    def load(cls, path: Path, max_tokens: int) -> "PromptTokenizer":
        """Read `tokenizer.json`. Raises TokenizerError for a file that is not a tokenizer."""
        try:
            tokenizer = Tokenizer.from_str(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise
        except Exception as error:  # the library raises bare Exception for a broken file
            raise TokenizerError(f"{path}: not a tokenizer file ({error}); export the bundle again") from error
        return cls(tokenizer, max_tokens)

    def encode(self, prompt: str) -> np.ndarray:
        """Token ids of one prompt: int64 [L], 1 <= L <= max_tokens."""
        return np.array(self._tokenizer.encode(prompt).ids, np.int64)
