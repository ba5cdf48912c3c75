"""The released text encoder: a Hugging Face T5 folder (flan-t5-xl), of which only the encoder is used.

Source: spec/world_model.md 4 (flan-t5-xl encoder), 8 (strictness).
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from worldvln_edge.config import TextEncoderConfig
from worldvln_edge.models.checkpoint_file import CheckpointError, check_layout
from worldvln_edge.models.stored_tensors import FileTensors, TorchFile, open_safetensors, open_shards
from worldvln_edge.models.text_encoder import TextEncoder

HF_CONFIG_FILE, HF_TOKENIZER_FILE = "config.json", "tokenizer.json"
# Parts of a full T5 (`T5ForConditionalGeneration`) that an encoder does not have.
_IGNORED = ("decoder.", "lm_head.")
_TABLE_NAMES = ("shared.weight", "encoder.embed_tokens.weight")
_FIELDS = {
    "d_model": "width",
    "num_layers": "layers",
    "num_heads": "heads",
    "d_kv": "head_dim",
    "d_ff": "feed_forward",
    "vocab_size": "vocabulary",
    "relative_attention_num_buckets": "relative_buckets",
    "relative_attention_max_distance": "relative_max_distance",
}


def open_text_encoder(path: Path, config: TextEncoderConfig, *, trust_pickle: bool = False) -> FileTensors:
    """Exactly the tensors of `TextEncoder(config).t5.state_dict()`, in its order, unread.

    The token table may stand under either of its two names; a full T5's decoder and output head are left out.

    Args:
        path: Hugging Face folder (`config.json`, safetensors shards or `pytorch_model.bin`), or one weight file.
        config: sizes the weights must have.
        trust_pickle: see `checkpoint_file.read_torch_file`.

    Raises:
        CheckpointError: nothing there, unreadable, another T5 than configured, missing or unexpected keys.
    """
    path = Path(path)
    if not path.exists():
        raise CheckpointError(f"no text encoder at {path}; give a Hugging Face folder of flan-t5")
    if path.is_dir():
        _check_config(path / HF_CONFIG_FILE, config)
        tensors = open_shards(path, trust_pickle=trust_pickle)
    elif path.suffix == ".safetensors":
        tensors = open_safetensors(path)
    else:
        tensors = TorchFile(path, trust_pickle=trust_pickle).tensors()
    tensors = {key: tensor for key, tensor in tensors.items() if not _is_decoder(key, tensors)}
    for alias, stored in (_TABLE_NAMES, _TABLE_NAMES[::-1]):
        if alias not in tensors and stored in tensors:
            tensors[alias] = tensors[stored]
    with torch.device("meta"):
        expected = TextEncoder(config).t5.state_dict()
    check_layout(expected, tensors, f"{path} (text encoder)")
    return {key: tensors[key] for key in expected}


def _is_decoder(key: str, tensors: Mapping[str, Any]) -> bool:
    # Only beside a T5 encoder: a video VAE has keys `decoder.` too, and has to be called what it is.
    return key.startswith(_IGNORED) and any(name in tensors for name in _TABLE_NAMES)


def _check_config(path: Path, config: TextEncoderConfig) -> None:
    """The folder's own description, where it has one, must agree: tensors do not show all of it."""
    if not path.is_file():
        return
    try:
        found = json.loads(path.read_bytes())
    except ValueError as error:
        raise CheckpointError(f"{path}: not JSON ({error}); download it again") from error
    if not isinstance(found, dict) or not str(found.get("model_type", "t5")).endswith("t5"):
        kind = found.get("model_type") if isinstance(found, dict) else type(found).__name__
        raise CheckpointError(f"{path} describes a {kind}, a t5 is expected; give the flan-t5 folder of this model")
    differing = [
        f"{name} {found[name]} (expected {getattr(config, field)})"
        for name, field in _FIELDS.items()
        if name in found and found[name] != getattr(config, field)
    ]
    if found.get("feed_forward_proj", "gated-gelu") != "gated-gelu":
        differing.append(f"feed_forward_proj {found['feed_forward_proj']} (expected gated-gelu)")
    if differing:
        raise CheckpointError(
            f"{path} describes another T5: {', '.join(differing)}; give the text encoder that belongs to the preset"
        )
