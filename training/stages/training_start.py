"""What a run starts from: a preset with random weights or a checkpoint, and files whose weights go over those.

Source: spec/training.md 2.7 (init), 8.3.
"""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Collection, Iterable
from dataclasses import dataclass, field
from pathlib import Path

import torch

from worldvln_edge.config import ModelConfig
from worldvln_edge.models.action_decoder import RgbActionHead
from worldvln_edge.models.checkpoint_source import IDENTITY_STATS, RELEASED_FILE, CheckpointSource, load_source
from worldvln_edge.models.worldvln import HeadStats, WorldVLN
from worldvln_edge.prompts import tagged_prompt
from worldvln_edge.training.sim.instructions import instruction_vocabulary
from worldvln_edge.training.stages.released_output import ReleasedFolder
from worldvln_edge.training.stages.stage_tables import COMMAND_OF_PART
from worldvln_edge.training.stages.start_files import StartFiles
from worldvln_edge.training.stages.tokenizer import build_word_tokenizer, instruction_words

TIME_EMBED_STD = 0.7  # spec/training.md 8.6: small heads learn motion only from a large time embedding


@dataclass(frozen=True, kw_only=True)
class Start:
    """What a run starts from: a preset, whose weights are random, or a checkpoint."""

    config: ModelConfig
    source: CheckpointSource | None = None
    released: ReleasedFolder | None = None
    """Where `source` comes from, if it is a folder with `released.json`."""
    files: StartFiles = field(default_factory=StartFiles)

    def tokenizer_json(self, instructions: Iterable[str], frame_counts: Iterable[int] = ()) -> str:
        """Text of `tokenizer.json`: the checkpoint's, or words of the simulator's and of these instructions.

        Args:
            instructions: of the training flights.
            frame_counts: of the training flights, whose duration tags are known too.
        """
        if self.source is not None:
            return self.source.tokenizer_file.read_text(encoding="utf-8")
        horizon, vocabulary = self.config.horizon, self.config.text_encoder.vocabulary
        lengths = {*range(1, horizon.num_frames), *frame_counts}
        others = {tagged_prompt("", horizon, frames) for frames in lengths}
        tags = tuple(dict.fromkeys((tagged_prompt("", horizon), *sorted(others))))
        words = instruction_words(instructions, instruction_vocabulary(), vocabulary, tags=len(tags))
        return build_word_tokenizer(words, tags[0], vocabulary, other_tags=tags[1:]).to_str(pretty=True)

    def model(self, seed: int, parts: Collection[str] | None = None) -> WorldVLN:
        """All networks, every parameter trainable; warns of weights of a base model that do not fit.

        Args:
            seed: of random weights.
            parts: these are on the CPU, the others on the meta device, without values. None: all.

        Raises:
            CheckpointError: files that cannot be read, or belong to another preset.
        """
        torch.manual_seed(seed)
        if self.source is None:
            model = WorldVLN(self.config, time_embed_std=TIME_EMBED_STD)
        else:
            model = load_source(self.source, parts).model
            if "rgb_head" in self.source.missing_parts:
                model.rgb_head = RgbActionHead(self.config.action_decoder, time_embed_std=TIME_EMBED_STD)
        for part, network in model.named_children():
            if parts is not None and part not in parts:
                network.to("meta")
        for left in self.files.load_into(model, parts):
            warnings.warn(left, stacklevel=2)
        return model.requires_grad_(True)

    def parts(self) -> set[str]:
        """Parts of the model that are trained already."""
        return set() if self.source is None else set(COMMAND_OF_PART) - self.source.missing_parts

    def paths(self) -> list[Path]:
        """All files that are read, and the `released.json` that names them."""
        named = [*([] if self.source is None else self.source.files), *self.files.paths()]
        listed = [] if self.released is None else [self.released.folder / RELEASED_FILE]
        return [*listed, *(path for _, path in named)]

    def fingerprint(self) -> str | None:
        """sha256 of the names, sizes and times of change of all files; None of a preset alone."""
        named = [*([] if self.source is None else self.source.files), *self.files.paths()]
        if not named:
            return None
        files = sorted([role, str(path.resolve()), *_stamp(path)] for role, path in named)
        return hashlib.sha256(json.dumps(files).encode()).hexdigest()

    def head_stats(self) -> HeadStats:
        """Label statistics of a checkpoint; the identity where it has none: its heads speak in rad and m."""
        unknown = HeadStats(latent_head=IDENTITY_STATS, rgb_head=IDENTITY_STATS)
        return unknown if self.source is None else self.source.stats or unknown


def _stamp(path: Path) -> tuple[int, int]:
    found = path.stat()
    return found.st_size, found.st_mtime_ns
