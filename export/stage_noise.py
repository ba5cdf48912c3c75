"""Every stage in PyTorch, computed in two ways: the noise that bounds are multiples of.

The same inputs and the same measures as `stage_parity`. The quantiser runs on the host in float32 and has no noise of
its own.
Source: spec/world_model.md 6; `compute_noise` (the other way to compute).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from worldvln_edge.action_windows import context_frame
from worldvln_edge.export.compute_noise import NoisyModel
from worldvln_edge.export.forced_flight import probabilities, records_of
from worldvln_edge.export.parity_bounds import Differences, action_difference, action_values
from worldvln_edge.export.torch_flight import TorchSegment
from worldvln_edge.images import rgb_head_input, transform
from worldvln_edge.models.generation import TextCondition, generate
from worldvln_edge.models.worldvln import Checkpoint, WorldVLN
from worldvln_edge.scale_schedule import ScaleSchedule


class StageNoise:
    """Sums over flights.

    Args:
        checkpoint: float32, weights as the bundle stores them.
        noisy: the same model, computed the other way.
    """

    def __init__(self, checkpoint: Checkpoint, noisy: NoisyModel):
        self.checkpoint, self.noisy, self.config = checkpoint, noisy, checkpoint.config
        self.differences: dict[str, Differences] = defaultdict(Differences)
        self.actions: list[np.ndarray] = []

    def add(self, ids_1L: np.ndarray, video: list[np.ndarray], segments: Sequence[TorchSegment]) -> None:
        """One flight that was flown with `checkpoint`.

        Args:
            ids_1L: int64 token ids of the tagged prompt.
            video: uint8 RGB frames.
            segments: what `fly_in_torch` made of them.
        """
        ids = torch.from_numpy(ids_1L)
        expected = self._side_stages(self.checkpoint.model, ids, video, segments[-1])
        with self.noisy.computing() as model:
            for stage, found in self._side_stages(model, ids, video, segments[-1]).items():
                self.differences[stage].add(found.float().numpy(), expected[stage].numpy())
            self._world_model(model, ids, segments)
            self._vae_and_heads(model, video, segments)

    def values(self) -> dict[str, dict[str, float]]:
        """Stage -> measure -> value."""
        values = {name: found.values() for name, found in self.differences.items()}
        values["world_model"]["mean_abs"] = self.differences["world_model"].mean_abs
        values["actions"] = action_values(self.actions)
        return values

    @torch.no_grad()
    def _side_stages(
        self, model: WorldVLN, ids_1L: Tensor, video: list[np.ndarray], segment: TorchSegment
    ) -> dict[str, Tensor]:
        """Stages of which a segment keeps no result."""
        text = model.world_model.text_proj(model.text_encoder(ids_1L).float())
        features = segment.features_1CFhw.to(model.vae.compute_dtype)
        pixels, _ = model.vae.decode_pixels(features, segment.generated.summed_BcTHW)
        found = {"text_encoder": text, "vae_pixels": pixels}
        if "rgb_head" not in self.checkpoint.missing_parts:
            head = self.config.action_decoder
            frames = video[: self.config.horizon.step + 1]
            images = rgb_head_input(frames, head.rgb_head.image_hw, head.rgb_mean, head.rgb_std, None)
            found["rgb_head"] = model.rgb_head(torch.from_numpy(images))
        return found

    def _world_model(self, model: WorldVLN, ids_1L: Tensor, segments: Sequence[TorchSegment]) -> None:
        features = model.text_encoder(ids_1L)[0]
        text = TextCondition.build(model.world_model, features, guided=self.config.generation.cfg != 1)
        for segment in segments:
            generated = segment.generated
            schedule = ScaleSchedule(self.config.schedule, generated.summed_BcTHW.shape[2])
            noisy = generate(
                model.world_model, schedule, text, self.config.generation, 0, forced_bits=generated.bits, record=True
            )
            first = len(segment.observed_bits)
            for clip in sorted({record.step.clip for record in generated.records[first:]}):
                other = [record for record in noisy.records if record.step.clip == clip]
                for a, b in zip(other, records_of(segment, clip), strict=True):
                    self.differences["world_model"].add(probabilities(a), probabilities(b))

    def _vae_and_heads(self, model: WorldVLN, video: list[np.ndarray], segments: Sequence[TorchSegment]) -> None:
        config, last = self.config, segments[-1]
        observed = config.horizon.points[len(segments) - 1]
        pixels = torch.from_numpy(np.stack([transform(frame, config.image_hw) for frame in video[:observed]], 1))
        self._add("vae_encoder", model.vae.raw_features(model.vae.encode(pixels[None])[0])[0], last.latents_DTHW)
        for index, segment in enumerate(segments):
            start, end = config.horizon.points[index : index + 2]
            first = context_frame(start, config.action_decoder.left_context) - 1
            given = segment.features_1CFhw[:, :, first:end].to(model.vae.compute_dtype)
            self._add("action_head", model.latent_head.logits(model.latent_head.tokens(given)), segment.logits)
            decoded, _ = model.vae.decode_features(segment.generated.summed_BcTHW)
            if segment is last:
                self._add("vae_decoder", decoded, segment.features_1CFhw)
            actions = model.latent_head.actions(
                model.latent_head.tokens(decoded[:, :, first:end]),
                self.checkpoint.stats.latent_head,
                observed_frames=start,
                next_observed_frames=end,
            )
            self.actions.append(action_difference(actions, segment.actions))

    def _add(self, stage: str, found: Tensor, expected: Tensor) -> None:
        self.differences[stage].add(found.float().numpy(), expected.numpy())
