"""A whole WorldVLN checkpoint, whatever containers it comes in, whose tensors are read one at a time.

Containers: our own folder (`models/worldvln.py`), the released files, and a folder with `released.json` that names
the released files. Keys are those of `WorldVLN(config).state_dict()` in each case.
Source: spec/world_model.md 8; spec/video_vae.md 10; spec/action_decoder.md 3, 8.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

import msgspec
import torch
from torch import Tensor

from worldvln_edge.action_windows import LabelStats
from worldvln_edge.config import ConfigError, ModelConfig, read_model_config
from worldvln_edge.models.checkpoint_file import CheckpointError, check_layout
from worldvln_edge.models.released import open_world_model
from worldvln_edge.models.released_action import open_rgb_checkpoint, read_combined_checkpoint
from worldvln_edge.models.released_text import HF_TOKENIZER_FILE, open_text_encoder
from worldvln_edge.models.released_vae import complete_vae, open_vae_tensors, with_action_decoder
from worldvln_edge.models.stored_tensors import FileTensors, TensorInfo, holds_shards, open_safetensors
from worldvln_edge.models.worldvln import (
    CONFIG_FILE,
    STATS_FILE,
    TENSOR_FILE,
    TOKENIZER_FILE,
    Checkpoint,
    HeadStats,
    WorldVLN,
)
from worldvln_edge.presets import preset as named_preset

__all__ = [
    "CheckpointChangedError",
    "CheckpointSource",
    "ReleasedParts",
    "TensorInfo",
    "load_source",
    "open_any",
    "open_checkpoint",
    "open_parts",
    "open_released",
]

RELEASED_FILE = "released.json"
OPTIONAL_PARTS = frozenset({"rgb_head"})
# What "outputs are rad and m" means as statistics.
IDENTITY_STATS = LabelStats(mean_angles=(0, 0, 0), std_angles=(1, 1, 1), mean_t=(0, 0, 0), std_t=(1, 1, 1))
EXAMPLE_PARTS = (
    '{"preset": "worldvln-8b", "backbone": "gpt-folder-or-file", "vae": "vae.pth", "text_encoder": "flan-t5-xl", '
    '"action_decoder": "stage2.pt"}'
)
"""A complete `released.json`, for messages."""
_HASH_BYTES = 8 << 20


class CheckpointChangedError(CheckpointError):
    """A file of the checkpoint is another than when it was opened, so what was read may be of two checkpoints."""


class ReleasedParts(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """`released.json`: where the parts of a released checkpoint lie, relative to the file's folder."""

    backbone: str
    text_encoder: str
    action_decoder: str
    vae: str | None = None
    """None: in the folder `vae/` of `backbone`."""
    tokenizer: str | None = None
    """None: `tokenizer.json` of `text_encoder`."""
    rgb_head: str | None = None
    rgb_run_config: str | None = None
    preset: str | None = None
    """Name of the configuration, or"""
    config: ModelConfig | None = None
    """the configuration itself."""


class CheckpointSource:
    """Lazy view of a checkpoint. Only shapes and file names are held; every `tensor` call reads from disk.

    Attributes:
        config: sizes.
        stats: label statistics of the heads; None: the released file has none, head outputs are rad and m. A head that
            is in `missing_parts` has the identity.
        tokenizer_file: `tokenizer.json`.
        infos: shape and stored dtype by key, in the order of `WorldVLN(config).state_dict()`: exactly its keys, less
            those of `missing_parts`.
        missing_parts: parts of `WorldVLN` without weights here. Only `rgb_head` may be missing: the released Stage-2
            file has none.
        files: (role, path) of every file that is read.
    """

    def __init__(
        self,
        *,
        config: ModelConfig,
        stats: HeadStats | None,
        tokenizer_file: Path,
        tensors: FileTensors,
        files: list[tuple[str, Path]],
        missing_parts: frozenset[str] = frozenset(),
    ):
        self.config = config
        self.stats = stats
        self.tokenizer_file = tokenizer_file
        self.infos: Mapping[str, TensorInfo] = {
            key: TensorInfo(shape=tensor.shape, dtype=tensor.dtype) for key, tensor in tensors.items()
        }
        self.missing_parts = missing_parts
        self.files = files
        self._tensors = tensors
        self._opened = {path: _stamp(path) for _, path in files}

    def tensor(self, key: str) -> Tensor:
        """Read one tensor: CPU, dtype as stored, not kept.

        Raises:
            CheckpointError: no such key, an unreadable file, or a NaN or infinity in it.
        """
        if key not in self._tensors:
            absent = key.partition(".")[0]
            reason = f"part {absent} is missing" if absent in self.missing_parts else "no such key in this model"
            raise CheckpointError(f"checkpoint of {self.config.name} has no tensor {key}: {reason}")
        return self._tensors[key].read()

    def file_of(self, key: str) -> Path:
        """The file that holds a tensor."""
        return self._tensors[key].file

    def check_unchanged(self) -> None:
        """Raise CheckpointChangedError when a file was replaced, written to or deleted since the checkpoint was opened.

        Size, time of the last change and inode are compared, not contents.
        """
        for path, opened in self._opened.items():
            now = _stamp(path)
            if now != opened:
                what = "is gone" if now is None else f"was changed ({opened[0] if opened else 0} -> {now[0]} bytes)"
                raise CheckpointChangedError(
                    f"{path} {what} since it was opened, so what was read is of no one checkpoint; wait until nothing "
                    "writes to it (a download, a training run) and start again"
                )

    def fingerprint(self, progress: Callable[[int, int], None] | None = None) -> str:
        """sha256 (hex) over the role and the sha256 of every file that is read, and over the configuration.

        The order and the names of shards do not matter.

        Args:
            progress: called with (bytes hashed, bytes in all) after every block.

        Raises:
            CheckpointError: a file is gone.
        """
        sizes: dict[Path, int] = {}
        for _, path in self.files:
            if not path.is_file():
                raise CheckpointError(f"{path} was there when the checkpoint was opened and is gone; restore it")
            sizes[path] = path.stat().st_size
        total, done = sum(sizes.values()), 0
        digests: dict[Path, str] = {}
        for path in sizes:
            digest = hashlib.sha256()
            with path.open("rb") as file:
                while block := file.read(_HASH_BYTES):
                    digest.update(block)
                    done += len(block)
                    if progress is not None:
                        progress(done, total)
            digests[path] = digest.hexdigest()
        lines = sorted(f"{role} {digests[path]}" for role, path in self.files)
        lines.append(f"config {hashlib.sha256(self.config.to_json()).hexdigest()}")
        return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def open_any(path: Path, *, trust_pickle: bool = False) -> CheckpointSource:
    """Open a checkpoint folder of ours, or a folder with `released.json`.

    Raises:
        CheckpointError, ConfigError: neither, or see `open_checkpoint` and `open_released`.
    """
    folder = Path(path)
    if (folder / RELEASED_FILE).is_file():
        return open_parts(_read_parts(folder / RELEASED_FILE), folder, trust_pickle=trust_pickle)
    if folder.is_dir() and not (folder / CONFIG_FILE).is_file() and not (folder / TENSOR_FILE).is_file():
        found = ", ".join(sorted(entry.name for entry in folder.iterdir())[:8]) or "nothing"
        raise CheckpointError(
            f"{folder} is no checkpoint: expected {CONFIG_FILE} and {TENSOR_FILE}, or {RELEASED_FILE}; found {found}. "
            f"Name released parts by --backbone, --vae, --text, --action and --preset, or in {RELEASED_FILE}, such as "
            f"{EXAMPLE_PARTS}"
        )
    return open_checkpoint(folder)


def open_parts(parts: ReleasedParts, folder: Path, *, trust_pickle: bool = False) -> CheckpointSource:
    """Open released files by the description of a `released.json`.

    Args:
        parts: names either a preset or a configuration.
        folder: what the paths are relative to.
        trust_pickle: see `open_released`.

    Raises:
        CheckpointError, ConfigError: see `open_released`.
    """
    preset = parts.preset if parts.preset is not None else parts.config
    if preset is None:
        raise CheckpointError("released parts need either preset (a name) or config (the configuration itself)")

    def place(name: str | None) -> Path | None:
        return None if name is None else folder / name

    return open_released(
        backbone=folder / parts.backbone,
        vae=place(parts.vae),
        text_encoder=folder / parts.text_encoder,
        action_decoder=folder / parts.action_decoder,
        tokenizer=place(parts.tokenizer),
        preset=preset,
        rgb_head=place(parts.rgb_head),
        rgb_run_config=place(parts.rgb_run_config),
        trust_pickle=trust_pickle,
    )


def open_checkpoint(folder: Path) -> CheckpointSource:
    """Open a folder that `save_checkpoint` wrote, strictly.

    Raises:
        CheckpointError: a file is missing or truncated, or keys or shapes differ from the configuration.
        ConfigError: `config.json` does not parse.
    """
    folder = Path(folder)
    for name in (CONFIG_FILE, TENSOR_FILE, TOKENIZER_FILE, STATS_FILE):
        if not (folder / name).is_file():
            found = ", ".join(sorted(p.name for p in folder.iterdir())) if folder.is_dir() else "no such folder"
            raise CheckpointError(f"{folder} is no checkpoint: {name} is missing (found: {found or 'nothing'})")
    config = read_model_config(folder / CONFIG_FILE)
    tensors = open_safetensors(folder / TENSOR_FILE)
    try:
        stats = msgspec.json.decode((folder / STATS_FILE).read_bytes(), type=HeadStats)
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{folder / STATS_FILE}: not label statistics ({error})") from error
    expected = _layout(config)
    check_layout(expected, tensors, f"{folder / TENSOR_FILE} ({config.name})")
    files = [("tensors", folder / TENSOR_FILE), ("tokenizer", folder / TOKENIZER_FILE), ("stats", folder / STATS_FILE)]
    return CheckpointSource(
        config=config,
        stats=stats,
        tokenizer_file=folder / TOKENIZER_FILE,
        tensors={key: tensors[key] for key in expected},
        files=files,
    )


def open_released(
    *,
    backbone: Path,
    vae: Path | None,
    text_encoder: Path,
    action_decoder: Path,
    tokenizer: Path | None,
    preset: str | ModelConfig,
    rgb_head: Path | None = None,
    rgb_run_config: Path | None = None,
    trust_pickle: bool = False,
) -> CheckpointSource:
    """Open the released files as one checkpoint.

    The encoder side of the VAE is the base's; its decoder is the Stage-2 file's where that has one
    (`released_vae.with_action_decoder`), so predicted frames come from that decoder too.

    Args:
        backbone: transformer, see `released.open_world_model`.
        vae: base VAE, see `released_vae.open_vae_tensors`; None: `backbone`'s folder `vae/`. Where both exist, the
            tensors in `backbone`'s `vae/` are laid over it, as the reference does.
        text_encoder: Hugging Face folder of flan-t5.
        action_decoder: combined (Stage-2) checkpoint.
        tokenizer: `tokenizer.json`; None: the one in `text_encoder`.
        preset: name or configuration.
        rgb_head: TimesFormer of the RGB head; None: `missing_parts` is {"rgb_head"}.
        rgb_run_config: its `run_config.json`; needed with `rgb_head`.
        trust_pickle: unpickle torch files without restriction, which runs their code. Only for your own files.

    Raises:
        CheckpointError: a part is missing, unreadable, of another kind, or does not fit the configuration.
        ConfigError: unknown preset.
    """
    config = named_preset(preset) if isinstance(preset, str) else preset
    expected = _layout(config)
    parts: dict[str, FileTensors] = {}
    parts["text_encoder.t5."] = open_text_encoder(text_encoder, config.text_encoder, trust_pickle=trust_pickle)
    parts["world_model."] = open_world_model(backbone, config.world_model, trust_pickle=trust_pickle)
    combined = read_combined_checkpoint(action_decoder, trust_pickle=trust_pickle)
    base = complete_vae(_below(expected, "vae."), *_open_base_vae(Path(backbone), vae, trust_pickle))
    parts["vae."] = with_action_decoder(base, combined.vae, f"{combined.path}: vae_state_dict")
    for prefix, found in (("latent_head.adapter.", combined.adapter), ("latent_head.tsformer.", combined.tsformer)):
        check_layout(_below(expected, prefix), found, f"{combined.path}: {prefix.split('.')[1]}")
        parts[prefix] = found
    rgb_stats = None
    if rgb_head is not None:
        if rgb_run_config is None:
            raise CheckpointError(
                f"the RGB head {rgb_head} needs its run_config.json, which holds its label statistics"
            )
        tensors, rgb_stats = open_rgb_checkpoint(rgb_head, rgb_run_config, trust_pickle=trust_pickle)
        check_layout(_below(expected, "rgb_head.tsformer."), tensors, f"{rgb_head}: TimesFormer")
        parts["rgb_head.tsformer."] = tensors
    joined = {prefix + key: tensor for prefix, part in parts.items() for key, tensor in part.items()}
    missing = OPTIONAL_PARTS - {prefix.partition(".")[0] for prefix in parts}
    tensors = {key: joined[key] for key in expected if key.partition(".")[0] not in missing}
    tokenizer_file = _tokenizer_file(tokenizer, Path(text_encoder))
    files = {(key.partition(".")[0], tensor.file) for key, tensor in tensors.items() if tensor.file.is_file()}
    # Read for scale, which may differ from the base's.
    files |= {("vae", tensor.file) for tensor in combined.vae.values()}
    files.add(("tokenizer", tokenizer_file))
    if rgb_run_config is not None and rgb_head is not None:
        files.add(("stats", Path(rgb_run_config)))
    return CheckpointSource(
        config=config,
        stats=_head_stats(combined.label_stats, rgb_stats),
        tokenizer_file=tokenizer_file,
        tensors=tensors,
        files=sorted(files),
        missing_parts=missing,
    )


def load_source(source: CheckpointSource, parts: Collection[str] | None = None) -> Checkpoint:
    """All weights in memory: float32 modules in eval mode, frozen. A missing part is left out of the module.

    Args:
        source: what to read.
        parts: of `WorldVLN`; the others stay on the meta device, unread. None: all.

    Raises:
        CheckpointError: see `CheckpointSource.tensor`.
    """
    with torch.device("meta"):
        model = WorldVLN(source.config)
    for part in source.missing_parts:
        delattr(model, part)
    for part, module in model.named_children():
        if parts is None or part in parts:
            keys = [key for key in source.infos if key.startswith(f"{part}.")]
            module.load_state_dict({key[len(part) + 1 :]: source.tensor(key).float() for key in keys}, assign=True)
    model.requires_grad_(False).eval()
    first = next(key for key in source.infos if key.startswith("world_model.block"))
    return Checkpoint(
        config=source.config,
        model=model,
        stats=source.stats or HeadStats(latent_head=IDENTITY_STATS, rgb_head=IDENTITY_STATS),
        tokenizer_file=source.tokenizer_file,
        tensor_file=source.file_of(first),
        missing_parts=source.missing_parts,
    )


def _stamp(path: Path) -> tuple[int, int, int] | None:
    """Size, time of the last change in ns, inode; None: no such file."""
    try:
        found = path.stat()
    except FileNotFoundError:
        return None
    return found.st_size, found.st_mtime_ns, found.st_ino


def _layout(config: ModelConfig) -> dict[str, Tensor]:
    with torch.device("meta"):
        return WorldVLN(config).state_dict()


def _below(expected: Mapping[str, Any], prefix: str) -> dict[str, Any]:
    return {key[len(prefix) :]: value for key, value in expected.items() if key.startswith(prefix)}


def _open_base_vae(backbone: Path, vae: Path | None, trust_pickle: bool) -> tuple[FileTensors, str]:
    own = backbone / "vae"
    has_own = backbone.is_dir() and holds_shards(own)
    if vae is None and not has_own:
        raise CheckpointError(
            f"no video VAE: {backbone} has no folder vae/ with *.safetensors; name the VAE's file beside the backbone"
        )
    base = open_vae_tensors(vae, trust_pickle=trust_pickle) if vae is not None else {}
    over = open_vae_tensors(own, trust_pickle=trust_pickle) if has_own else {}
    return base | over, f"{own if vae is None else vae} (video VAE)"


def _tokenizer_file(tokenizer: Path | None, text_encoder: Path) -> Path:
    beside = text_encoder if text_encoder.is_dir() else text_encoder.parent
    path = Path(tokenizer) if tokenizer is not None else beside / HF_TOKENIZER_FILE
    if not path.is_file():
        raise CheckpointError(f"no tokenizer: {path} is no file; give the {HF_TOKENIZER_FILE} of the text encoder")
    return path


def _head_stats(latent: LabelStats | None, rgb: LabelStats | None) -> HeadStats | None:
    if latent is None and rgb is None:
        return None
    return HeadStats(latent_head=latent or IDENTITY_STATS, rgb_head=rgb or IDENTITY_STATS)


def _read_parts(file: Path) -> ReleasedParts:
    try:
        parts = msgspec.json.decode(file.read_bytes(), type=ReleasedParts)
    except (msgspec.MsgspecError, UnicodeDecodeError, ConfigError) as error:
        raise CheckpointError(
            f"{file}: not a list of released parts ({error}); a complete one reads {EXAMPLE_PARTS}"
        ) from error
    if (parts.preset is None) == (parts.config is None):
        raise CheckpointError(f"{file}: give either preset (a name) or config (the configuration itself)")
    return parts
