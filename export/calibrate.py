"""Measuring activations over real flights, one block of the world model in memory at a time.

Each block is read, run over all steps of all flights with a recorder in front of every quantised linear, and dropped.
The hidden states between two blocks are what is kept. Steps are those that a bundle runs, with the bits of the flights'
own frames (`teacher_forcing`), and both rows of guidance.

Free generation would need all blocks for every step. It would show the same linears inputs of the same kind: bits
that a trained model draws are distributed as those of frames, and only their statistics over all tokens are kept.
On the shipped model, measured on three flights and applied to five others, drawn bits' probabilities are off by 0.0157
(int4) and 0.0053 (int8) on average, against 0.0161 and 0.0054 with ranges of free generation.

Legend: F frames, H W pixels, L tokens, C width, Ct text channels.
Source: spec/world_model.md 2.3 (block), 4 (text rows), 6 (loop).
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from worldvln_edge.export.activation_recorder import recording
from worldvln_edge.export.calibration import ActivationStatistics, Calibration, CalibrationError
from worldvln_edge.export.hidden_states import HiddenStates
from worldvln_edge.export.progress import Progress
from worldvln_edge.export.streamed_weights import weights_in, weights_while_called
from worldvln_edge.export.teacher_forcing import ForcedStep, forced_inputs, forced_steps
from worldvln_edge.models.checkpoint_source import CheckpointSource
from worldvln_edge.models.generation import TextCondition
from worldvln_edge.models.key_values import ReferenceKV
from worldvln_edge.models.worldvln import WorldVLN
from worldvln_edge.prompts import tagged_prompt
from worldvln_edge.rope import text_rope, visual_rope
from worldvln_edge.runtime.worldvln.tokenizer import PromptTokenizer

Flight = tuple[np.ndarray, str]
"""(uint8 RGB [F, H, W, 3], instruction)"""

_NOISE = 0.8  # neighbouring pixels of independent noise differ by 1 in these units, those of pictures by far less


@torch.no_grad()
def collect(
    source: CheckpointSource,
    flights: Iterable[Flight],
    *,
    frames_from: str,
    device: str = "cpu",
    folder: Path | None = None,
    progress: Progress | None = None,
) -> Calibration:
    """Measure. Computed in float32.

    Args:
        source: the checkpoint.
        flights: frames of any size, as many as the horizon has (more are ignored), and their instructions.
        frames_from: where the flights come from, for the manifest.
        device: `cpu`, `cuda` or `cuda:N`.
        folder: takes hidden states that are too many for memory. [default: the system's temporary folder]
        progress: called before each flight of each block.

    Raises:
        CalibrationError: no flights, frames that are constant, noise or too few, activations that are not finite, no
            such device, or no room for the hidden states.
        CheckpointError: unreadable weights, or a checkpoint that changed meanwhile.
        TokenizerError: the checkpoint's tokenizer is unusable.
    """
    config, flown = source.config, list(flights)
    if not flown:
        raise CalibrationError(f"no activation was measured on {frames_from}; give at least one flight")
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise CalibrationError(f"device {device} is not here: torch {torch.__version__} sees no CUDA GPU; take cpu")
    for index, (frames, _) in enumerate(flown):
        check_frames(frames, f"flight {index} of {frames_from}", at_least=config.horizon.num_frames)
    with torch.device("meta"):
        model = WorldVLN(config)
    place = torch.device(device)
    pass_ = _Pass(source, model.requires_grad_(False).eval(), place, progress or (lambda what, done, total: None))
    statistics = pass_.run(flown, Path(folder or tempfile.gettempdir()))
    checkpoint_sha256 = source.fingerprint()
    source.check_unchanged()
    return Calibration.build(
        statistics,
        config=config,
        checkpoint_sha256=checkpoint_sha256,
        source=frames_from,
        flights=len(flown),
        frames=len(flown) * config.horizon.num_frames,
    )


def check_frames(frames: np.ndarray, place: str, *, at_least: int) -> None:
    """Raise CalibrationError for frames that no camera took, or too few of them.

    Args:
        frames: uint8 [F, H, W, 3].
        place: names them in the error.
        at_least: frames that a flight needs.
    """
    if frames.dtype != np.uint8 or frames.ndim != 4 or frames.shape[-1] != 3 or min(frames.shape[1:3]) < 2:
        raise CalibrationError(f"{place}: {frames.dtype} {list(frames.shape)}, needed are uint8 RGB [F, H, W, 3]")
    if len(frames) < at_least:
        raise CalibrationError(f"{place}: {len(frames)} frames, the horizon needs {at_least}; use longer flights")
    sample = frames[:: max(1, len(frames) // 8)].astype(np.float32)
    spread = float(sample.var())
    if spread < 1:
        raise CalibrationError(
            f"{place}: the frames are of one colour; calibrate on frames of real or simulated flights"
        )
    difference = float(np.square(np.diff(sample, axis=2)).mean()) / (2 * spread)
    if difference > _NOISE:
        raise CalibrationError(
            f"{place}: the frames look like random noise, on which ranges are wrong; calibrate on frames of real or "
            "simulated flights"
        )


@dataclass(frozen=True)
class _Sequence:
    """One row (conditional or not) of one flight: its text, then its steps."""

    flight: int
    row: int
    first: int  # index of its text's hidden states; those of its steps follow
    text_tokens: int


class _Pass:
    """All blocks over all flights. `model` has no weights."""

    def __init__(self, source: CheckpointSource, model: WorldVLN, device: torch.device, progress: Progress):
        self.source, self.model, self.device, self.progress = source, model, device, progress
        self.config = source.config
        self.steps = forced_steps(self.config)
        self.ropes = [self._rope(forced) for forced in self.steps]

    def run(self, flights: Sequence[Flight], folder: Path) -> dict[str, ActivationStatistics]:
        world = self.model.world_model
        texts = self._text_features([instruction for _, instruction in flights])
        rows = 1 if self.config.generation.cfg == 1 else 2
        sequences: list[_Sequence] = []
        shapes: list[tuple[int, int, int]] = []
        for flight, text in enumerate(texts):
            for row in range(rows):
                sequences.append(_Sequence(flight, row, len(shapes), len(text)))
                tokens = [len(text), *(forced.step.tokens for forced in self.steps)]
                shapes += [(1, count, world.config.width) for count in tokens]
        with HiddenStates(shapes, folder) as hidden:
            self._embed(flights, texts, sequences, hidden)
            found: dict[str, ActivationStatistics] = {}
            blocks = self._blocks()
            for index, (prefix, block) in enumerate(blocks.items()):
                is_last = index == len(blocks) - 1
                with (
                    weights_in(block, prefix, self.source, self.device),
                    recording(block, prefix, self.device) as recorders,
                ):
                    for number, sequence in enumerate(sequences):
                        done, total = index * len(sequences) + number, len(blocks) * len(sequences)
                        self.progress(f"block {index + 1} of {len(blocks)}", done, total)
                        self._run_block(block, sequence, hidden, is_last)
                found |= {key: recorder.statistics(key) for key, recorder in recorders.items()}
        return found

    def _blocks(self) -> dict[str, nn.Module]:
        """By the prefix of their checkpoint keys, first to last."""
        names = {id(module): name for name, module in self.model.named_modules()}
        return {f"{names[id(block)]}.": block for block in self.model.world_model.iterate_blocks()}

    def _text_features(self, instructions: Sequence[str]) -> list[Tensor]:
        """Features float32 [L, Ct] of every instruction, in one pass over the text encoder's blocks."""
        tokenizer = PromptTokenizer.load(self.source.tokenizer_file, self.config.world_model.text_max_tokens)
        prompts = [torch.from_numpy(tokenizer.encode(tagged_prompt(one, self.config.horizon))) for one in instructions]
        longest = max(map(len, prompts))
        ids = torch.zeros(len(prompts), longest, dtype=torch.int64)
        mask = torch.zeros_like(ids)
        for row, prompt in enumerate(prompts):
            ids[row, : len(prompt)], mask[row, : len(prompt)] = prompt, 1
        encoder, prefix = self.model.text_encoder, "text_encoder."
        blocks = {f"{prefix}t5.encoder.block.{i}.": block for i, block in enumerate(encoder.t5.encoder.block)}
        self.progress("text", 0, 0)
        with (
            weights_in(encoder, prefix, self.source, self.device, without=("t5.encoder.block.",)),
            weights_while_called(blocks, self.source, self.device),
        ):
            features = encoder(ids.to(self.device), mask.to(self.device))
        return [features[row, : len(prompt)] for row, prompt in enumerate(prompts)]

    def _embed(
        self, flights: Sequence[Flight], texts: Sequence[Tensor], sequences: Sequence[_Sequence], hidden: HiddenStates
    ) -> None:
        """Write what the first block reads."""
        world, guided = self.model.world_model, self.config.generation.cfg != 1
        with (
            weights_in(self.model.vae, "vae.", self.source, self.device),
            weights_in(world, "world_model.", self.source, self.device, without=("block",)),
        ):
            for index, ((frames, _), text) in enumerate(zip(flights, texts, strict=True)):
                self.progress(f"frames of flight {index + 1} of {len(flights)}", 0, 0)
                own = [sequence for sequence in sequences if sequence.flight == index]
                condition = TextCondition.build(world, text, guided=guided)
                for sequence in own:
                    hidden[sequence.first] = condition.rows_RLC[sequence.row, None]
                for place, latents in enumerate(forced_inputs(self.model.vae, self.config, frames), 1):
                    x_1LC = world.embed_latents(latents)
                    for sequence in own:
                        hidden[sequence.first + place] = x_1LC

    def _run_block(self, block: nn.Module, sequence: _Sequence, hidden: HiddenStates, is_last: bool) -> None:
        """One block over one sequence; hidden states are replaced, unless nobody reads them."""
        rope = torch.from_numpy(text_rope(sequence.text_tokens, self.config.world_model.head_dim)).to(self.device)
        x, text_kv = block(hidden[sequence.first].to(self.device), rope)
        if not is_last:
            hidden[sequence.first] = x
        kv = ReferenceKV([text_kv])
        for place, (forced, rope) in enumerate(zip(self.steps, self.ropes, strict=True), sequence.first + 1):
            x, own = block(hidden[place].to(self.device), rope, kv.context(forced.references)[0])
            if forced.is_kept:
                kv.keep((forced.step.clip, forced.step.scale), [own])
            if not is_last:
                hidden[place] = x

    def _rope(self, forced: ForcedStep) -> Tensor:
        world = self.config.world_model
        table = visual_rope(
            forced.step, forced.first_frame, self.config.schedule.latent_hw, world.text_max_tokens, world.head_dim
        )
        return torch.from_numpy(table).to(self.device)
