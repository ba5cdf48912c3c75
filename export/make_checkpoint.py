"""A random checkpoint in the released containers, to rehearse the whole pipeline at real size without the weights.

Folder: `backbone/gpt/` (safetensors shards with index: blocks bfloat16, the rest float32), `vae.pth` (entry `vae`),
`text_encoder/` (Hugging Face T5 encoder, float32 as flan-t5 is), `action_decoder.pt` (combined checkpoint with a
decoder of its own and label statistics as numpy arrays), `released.json` (`checkpoint_source.ReleasedParts`).
Source: spec/world_model.md 2.2, 8; spec/video_vae.md 10; spec/action_decoder.md 3.
"""

import json
import shutil
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import msgspec
import numpy as np
import torch

from worldvln_edge.atomic import atomic_directory
from worldvln_edge.config import ModelConfig
from worldvln_edge.export.progress import Progress
from worldvln_edge.export.random_weights import RandomTensor, draw, pieces, plan_tensor
from worldvln_edge.models.checkpoint_source import RELEASED_FILE, ReleasedParts
from worldvln_edge.models.released_text import HF_CONFIG_FILE, HF_TOKENIZER_FILE
from worldvln_edge.models.stored_tensors import INDEX_FILE
from worldvln_edge.models.text_encoder import TextEncoder
from worldvln_edge.models.worldvln import WorldVLN
from worldvln_edge.presets import PRESET_NAMES, preset

BACKBONE, VAE, TEXT, TSFORMER, ADAPTER, DECODER = (
    "backbone",
    "vae",
    "text_encoder",
    "action_decoder.model_state_dict",
    "action_decoder.adapter_state_dict",
    "action_decoder.vae_state_dict",
)
_DTYPE_NAMES = {torch.float32: "F32", torch.bfloat16: "BF16"}
_MASKS = ("quantizer.lfq_semantic.mask", "quantizer.lfq_detail.mask")
_DECODER_SIDE = ("decoder.", "proj_up.", "scale_learnable_parameters")
_LABEL_STATS = {
    "mean_angles": (0.0, 0.0, 0.0),
    "std_angles": (0.05, 0.02, 0.02),
    "mean_t": (0.2, 0.0, 0.0),
    "std_t": (0.2, 0.1, 0.1),
}
_WORDS = (
    "fly forward back left right up down turn climb descend stop to the a and at of over past toward around between "
    "tower building tree road car bridge river red blue green white tall meters degrees"
)


class MakeCheckpointError(ValueError):
    """A checkpoint that cannot be written as asked. The message says what stands in the way."""


@dataclass(frozen=True, kw_only=True)
class MadeCheckpoint:
    folder: Path
    parameters: int
    part_bytes: dict[str, int]
    """Bytes on disk of `backbone`, `vae.pth`, `text_encoder`, `action_decoder.pt`."""


def plan(config: ModelConfig) -> dict[str, list[RandomTensor]]:
    """Every tensor of the released files of a model of these sizes, by part, in the order of the state dict.

    Parts: `BACKBONE`, `VAE`, `TEXT`, and the three state dicts of the combined checkpoint. Nothing is allocated.
    """
    with torch.device("meta"):
        model = WorldVLN(config)

    def tensors(module: torch.nn.Module) -> list[RandomTensor]:
        return [plan_tensor(key, tuple(t.shape), torch.float32) for key, t in module.state_dict().items()]

    vae = tensors(model.vae)
    bits = (config.world_model.semantic_bits, config.world_model.detail_bits)
    masks = [plan_tensor(key, (size,), torch.int64) for key, size in zip(_MASKS, bits, strict=True)]
    masks += [plan_tensor(m.key.replace("quantizer.", "quantize.", 1), m.shape, m.dtype) for m in masks]
    blocks = ("block_chunks.", "blocks.")
    return {
        BACKBONE: [
            plan_tensor(key, tuple(t.shape), torch.bfloat16 if key.startswith(blocks) else torch.float32)
            for key, t in model.world_model.state_dict().items()
        ],
        VAE: vae + masks,
        # The second name of the token table is not stored, as in the released files.
        TEXT: [tensor for tensor in tensors(model.text_encoder.t5) if tensor.key != "encoder.embed_tokens.weight"],
        TSFORMER: tensors(model.latent_head.tsformer),
        ADAPTER: tensors(model.latent_head.adapter),
        DECODER: [tensor for tensor in vae if tensor.key.startswith(_DECODER_SIDE)],
    }


def make_checkpoint(
    config: ModelConfig, out: Path, *, seed: int, shard_bytes: int = 4_000_000_000, progress: Progress | None = None
) -> MadeCheckpoint:
    """Write a random checkpoint, whole or not at all; the same bytes in the shards for the same seed.

    Shards are written piece by piece; the most that is held is the VAE (0.7 GB at the released sizes).

    Args:
        config: sizes.
        out: folder; an earlier one of this kind is replaced.
        seed: of all weights.
        shard_bytes: most bytes of tensors in one shard; a larger tensor has a shard of its own.
        progress: called with (part, bytes written, bytes in all).

    Raises:
        MakeCheckpointError: shard size below 1, or the disk is too small.
        FolderInUseError: `out` holds something else.
    """
    if shard_bytes < 1:
        raise MakeCheckpointError(f"a shard must hold at least 1 byte, found {shard_bytes}")
    planned = plan(config)
    total = sum(tensor.size_bytes for part in planned.values() for tensor in part)
    _check_space(Path(out), total)
    done = 0

    def advance(part: str, count: int) -> None:
        nonlocal done
        done += count
        if progress is not None:
            progress(part, done, total)

    def state(part: str) -> dict[str, torch.Tensor]:
        tensors = {}
        for tensor in planned[part]:
            tensors[tensor.key] = draw(seed, f"{part}/{tensor.key}", tensor)
            advance(part.partition(".")[0], tensor.size_bytes)
        return tensors

    with atomic_directory(out, RELEASED_FILE) as folder:
        for name, part in ((f"{BACKBONE}/gpt", BACKBONE), (TEXT, TEXT)):
            _write_shards(folder / name, part, planned[part], seed, shard_bytes, advance)
        _write_text_description(folder / TEXT, config)
        vae = state(VAE)
        for mask in _MASKS:
            vae[mask.replace("quantizer.", "quantize.", 1)] = vae[mask]
        torch.save({"vae": vae}, folder / "vae.pth")
        del vae
        combined = {
            "format": "stage2_latent2action_combined_v2_resumable",
            "epoch": 0,
            "global_step": 0,
            "model_state_dict": state(TSFORMER),
            "adapter_state_dict": state(ADAPTER),
            "vae_state_dict": state(DECODER),
            "label_stats": {key: np.array(row, np.float32) for key, row in _LABEL_STATS.items()},
            "label_stats_source": f"random checkpoint, seed {seed}",
            "args": _vae_arguments(config),
            "model_config": _timesformer_arguments(config),
        }
        torch.save(combined, folder / "action_decoder.pt")
        is_preset = config.name in PRESET_NAMES and preset(config.name) == config
        parts = ReleasedParts(
            backbone=BACKBONE,
            vae="vae.pth",
            text_encoder=TEXT,
            action_decoder="action_decoder.pt",
            tokenizer=f"{TEXT}/{HF_TOKENIZER_FILE}",
            preset=config.name if is_preset else None,
            config=None if is_preset else config,
        )
        (folder / RELEASED_FILE).write_bytes(msgspec.json.format(msgspec.json.encode(parts), indent=2) + b"\n")
        sizes = {name: _size(folder / name) for name in (BACKBONE, "vae.pth", TEXT, "action_decoder.pt")}
    parameters = sum(
        torch.Size(t.shape).numel() for name in (BACKBONE, VAE, TEXT, TSFORMER, ADAPTER) for t in planned[name]
    )
    return MadeCheckpoint(folder=Path(out), parameters=parameters, part_bytes=sizes)


def shards_of(tensors: Sequence[RandomTensor], shard_bytes: int) -> list[list[RandomTensor]]:
    """Cut a list of tensors, in order, into shards of at most `shard_bytes`."""
    shards: list[list[RandomTensor]] = [[]]
    size = 0
    for tensor in tensors:
        if shards[-1] and size + tensor.size_bytes > shard_bytes:
            shards.append([])
            size = 0
        shards[-1].append(tensor)
        size += tensor.size_bytes
    return shards


def _write_shards(
    folder: Path,
    part: str,
    tensors: Sequence[RandomTensor],
    seed: int,
    shard_bytes: int,
    advance: Callable[[str, int], None],
) -> None:
    folder.mkdir(parents=True)
    shards = shards_of(tensors, shard_bytes)
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(shards, 1):
        name = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        with (folder / name).open("wb") as file:
            _write_shard(file, part, shard, seed, advance)
        weight_map |= {tensor.key: name for tensor in shard}
    index = {"metadata": {"total_size": sum(t.size_bytes for t in tensors)}, "weight_map": weight_map}
    (folder / INDEX_FILE).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _write_shard(
    file: BinaryIO, part: str, tensors: Iterable[RandomTensor], seed: int, advance: Callable[[str, int], None]
) -> None:
    # Wide types first, so that every tensor starts at a multiple of its item size.
    ordered = sorted(tensors, key=lambda tensor: -tensor.dtype.itemsize)
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    start = 0
    for tensor in ordered:
        end = start + tensor.size_bytes
        header[tensor.key] = {
            "dtype": _DTYPE_NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [start, end],
        }
        start = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    file.write(len(text).to_bytes(8, "little") + text)
    for tensor in ordered:
        for piece in pieces(seed, f"{part}/{tensor.key}", tensor):
            file.write(piece.data)
            advance(part, len(piece))


def _write_text_description(folder: Path, config: ModelConfig) -> None:
    with torch.device("meta"):
        t5 = TextEncoder(config.text_encoder).t5
    t5.config.architectures = ["T5EncoderModel"]
    (folder / HF_CONFIG_FILE).write_text(t5.config.to_json_string(use_diff=False), encoding="utf-8")
    entries = ["<pad>", "</s>", "<unk>", *sorted(_WORDS.split()), *map(str, range(10)), *".,:;!?<>="]
    vocabulary = {word: index for index, word in enumerate(entries[: config.text_encoder.vocabulary])}
    end = {"id": "</s>", "ids": [vocabulary["</s>"]], "tokens": ["</s>"]}
    tokenizer = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [],
        "normalizer": {"type": "Lowercase"},
        "pre_tokenizer": {
            "type": "Split",
            "pattern": {"Regex": r"[a-z]+|\d|[^\sa-z\d]"},
            "behavior": "Removed",
            "invert": True,
        },
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [{"Sequence": {"id": "A", "type_id": 0}}, {"SpecialToken": {"id": "</s>", "type_id": 0}}],
            "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
            "special_tokens": {"</s>": end},
        },
        "decoder": None,
        "model": {"type": "WordLevel", "vocab": vocabulary, "unk_token": "<unk>"},
    }
    (folder / HF_TOKENIZER_FILE).write_text(json.dumps(tokenizer, indent=1) + "\n", encoding="utf-8")


def _vae_arguments(config: ModelConfig) -> dict[str, Any]:
    return {
        "semantic_scale_dim": config.world_model.semantic_bits,
        "detail_scale_dim": config.world_model.detail_bits,
        "semantic_scales": config.schedule.semantic_scales,
        "infinitystar_vae_type": config.world_model.latent_channels,
    }


def _timesformer_arguments(config: ModelConfig) -> dict[str, int]:
    head = config.action_decoder.latent_head
    return {
        "num_frames": head.window,
        "embed_dim": head.width,
        "patch_size": head.patch,
        "W_grid": head.grid_hw[1],
    }


def _check_space(out: Path, needed: int) -> None:
    place = next(folder for folder in (out.resolve(), *out.resolve().parents) if folder.is_dir())
    free = shutil.disk_usage(place).free
    # Headers, indices and the archives' own entries come on top.
    needed += 64 << 20
    if free < needed:
        raise MakeCheckpointError(
            f"{out}: {needed / 1e9:.1f} GB are needed and {free / 1e9:.1f} GB are free; choose another disk or a "
            "smaller preset"
        )


def _size(path: Path) -> int:
    files = [path] if path.is_file() else [file for file in path.rglob("*") if file.is_file()]
    return sum(file.stat().st_size for file in files)
