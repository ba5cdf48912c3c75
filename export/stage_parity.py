"""Every stage of a bundle against PyTorch with the bundle's weights, flight by flight; only sums are kept.

| row               | both sides get                    | compared                                            |
|-------------------|-----------------------------------|-----------------------------------------------------|
| text_encoder      | token ids                         | projected text of both guidance rows                |
| vae_encoder       | frames (streamed against whole)   | raw latents                                         |
| quantiser         | PyTorch's latents                 | bits, sums of codes                                 |
| world_model       | PyTorch's bits, observed and drawn| probability of every bit, sums of codes             |
| vae_decoder       | PyTorch's codes                   | last up-block features                              |
| vae_pixels        | PyTorch's features and codes      | pixels                                              |
| action_head       | PyTorch's features                | logits                                              |
| rgb_head          | frames                            | logits                                              |
| actions           | PyTorch's bits                    | actions of all segments, cm and deg                 |

`mean_abs` of world_model is the share of draws that would differ: a draw differs when its uniform number falls between
the two probabilities. The free flight is compared in `flight_parity`.
Source: spec/world_model.md 6, 9.6.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable

import numpy as np
import torch

from worldvln_edge.action_windows import context_frame, segment_actions
from worldvln_edge.bundle import Bundle
from worldvln_edge.export.forced_flight import clip_bits, forced_clips, observed_clips, probabilities, records_of
from worldvln_edge.export.parity_bounds import (
    Differences,
    ParityRow,
    StageBounds,
    action_difference,
    action_values,
    bounded_row,
)
from worldvln_edge.export.torch_flight import TorchSegment
from worldvln_edge.images import rgb_head_input, transform
from worldvln_edge.models.worldvln import Checkpoint
from worldvln_edge.runtime.engines.engine import Engine, OnnxEngine
from worldvln_edge.runtime.worldvln import graphs
from worldvln_edge.runtime.worldvln.video_stream import FeatureDecoder, FrameEncoder
from worldvln_edge.runtime.worldvln.worldvln_policy import WorldVLNPolicy

STAGES = (
    "text_encoder",
    "vae_encoder",
    "quantiser",
    "world_model",
    "vae_decoder",
    "vae_pixels",
    "action_head",
    "rgb_head",
    "actions",
)
_PIXELS = tuple(graphs.first_or_next(graphs.VAE_PIXELS, first) for first in (True, False))


class StageParity:
    """Sums over flights.

    Args:
        bundle: gives the graphs that a flight does not need.
        checkpoint: in float32.
        policy: of the bundle.
    """

    def __init__(self, bundle: Bundle, checkpoint: Checkpoint, policy: WorldVLNPolicy):
        self.checkpoint, self.policy = checkpoint, policy
        self.config, self.model = checkpoint.config, checkpoint.model
        self.has_rgb_head = graphs.RGB_HEAD in bundle.manifest.graphs
        side = (*_PIXELS, graphs.RGB_HEAD) if self.has_rgb_head else _PIXELS
        self.side_engines: dict[str, Engine] = {name: OnnxEngine(bundle.graph_path(name)) for name in side}
        self.differences: dict[str, Differences] = defaultdict(Differences)
        self.codes = Differences()
        self.equal_bits = self.bits = 0
        self.actions: list[np.ndarray] = []  # differences, [N, 6]

    @torch.no_grad()
    def add(
        self,
        instruction: str,
        ids_1L: np.ndarray,
        video: list[np.ndarray],
        segments: list[TorchSegment],
        progress: Callable[[str], None],
    ) -> None:
        """Compare all stages on one flight that was flown in PyTorch.

        Args:
            instruction, ids_1L: of the flight.
            video: uint8 RGB frames.
            segments: what `fly_in_torch` made of them.
            progress: called with a stage's name before it runs.
        """
        last = segments[-1]
        runs: dict[str, Callable[[], None]] = {
            "text_encoder": lambda: self._text(ids_1L),
            "vae_encoder": lambda: self._encoder(video, last),
            "quantiser": lambda: self._quantiser(last),
            "world_model": lambda: self._world_model(instruction, segments),
            "vae_decoder": lambda: self._decoder(last),
            "vae_pixels": lambda: self._pixels(last),
            "action_head": lambda: self._action_head(segments),
            "rgb_head": lambda: self._rgb_head(video),
            "actions": lambda: self._actions(segments),
        }
        for name in STAGES:
            progress(name)
            runs[name]()

    def rows(self, bounds: dict[str, StageBounds]) -> list[ParityRow]:
        """The table so far."""
        rows = []
        for name in STAGES:
            if name == "rgb_head" and not self.has_rgb_head:
                rows.append(ParityRow(name, note="the checkpoint has no RGB head"))
                continue
            values = self.differences[name].values() if name != "actions" else action_values(self.actions)
            if name == "quantiser":
                values["bits_equal"] = self.equal_bits / max(self.bits, 1)
            if name == "world_model":
                values["mean_abs"] = self.differences[name].mean_abs
                values["codes_max_abs"] = self.codes.max_abs
            rows.append(bounded_row(name, values, bounds[name]))
        return rows

    def _text(self, ids: np.ndarray) -> None:
        outputs = self.policy.engines[graphs.TEXT_ENCODER].run({"ids": ids})
        world, features = self.model.world_model, self.model.text_encoder(torch.from_numpy(ids))
        self.differences["text_encoder"].add(outputs["text_embeds"], world.project_text(features).numpy())
        uncond = world.project_text(world.cfg_uncond[: ids.shape[1]][None])
        self.differences["text_encoder"].add(outputs["uncond_embeds"], uncond.numpy())

    def _encoder(self, video: list[np.ndarray], segment: TorchSegment) -> None:
        encoder = FrameEncoder(self.policy.engines, self.config.video_vae.temporal_stride)
        latents: list[np.ndarray] = []
        for frame in video[: self.config.horizon.points[-2]]:
            latents += encoder.push([transform(frame, self.config.image_hw)])
        self.differences["vae_encoder"].add(np.stack(latents, 1), segment.latents_DTHW.numpy())

    def _quantiser(self, segment: TorchSegment) -> None:
        for index, observed in enumerate(observed_clips(self.policy, segment)):
            for found, expected in zip(
                observed.bits, clip_bits(self.policy, segment.observed_bits, index), strict=True
            ):
                self.equal_bits, self.bits = self.equal_bits + int((found == expected).sum()), self.bits + expected.size
            frames = self.policy.tables.schedule.clips[index].frame_slice
            self.differences["quantiser"].add(observed.codes, segment.generated.summed_BcTHW[0, :, frames].numpy())

    def _world_model(self, instruction: str, segments: list[TorchSegment]) -> None:
        for segment, index, clip in forced_clips(self.policy, instruction, segments):
            frames = self.policy.tables.schedule.clips[index].frame_slice
            self.codes.add(clip.codes, segment.generated.summed_BcTHW[0, :, frames].numpy())
            for record, found in zip(records_of(segment, index), clip.probabilities, strict=True):
                self.differences["world_model"].add(found, probabilities(record).reshape(found.shape))

    def _decoder(self, segment: TorchSegment) -> None:
        self.differences["vae_decoder"].add(self._decode(segment), segment.features_1CFhw.numpy())

    def _decode(self, segment: TorchSegment) -> np.ndarray:
        codes, decoder = segment.generated.summed_BcTHW[0].numpy(), FeatureDecoder(self.policy.engines)
        clips = [clip.frame_slice for clip in self.policy.tables.schedule.clips if clip.first_frame < codes.shape[1]]
        return np.concatenate(
            [decoder.commit(np.ascontiguousarray(codes[:, frames]), fetch=True) for frames in clips], 2
        )

    def _pixels(self, segment: TorchSegment) -> None:
        decoder = FeatureDecoder(self.side_engines)
        codes, features = segment.generated.summed_BcTHW, segment.features_1CFhw
        expected, _ = self.model.vae.decode_pixels(features, codes)
        given = features.numpy().astype(self.policy.input_dtype(_PIXELS[0], "features"))
        stride, parts = self.config.video_vae.temporal_stride, []
        for clip in self.policy.tables.schedule.clips:
            if clip.first_frame >= codes.shape[2]:
                break
            start = 0 if clip.first_frame == 0 else 1 + (clip.first_frame - 1) * stride
            end = 1 + (clip.first_frame + clip.frames - 1) * stride
            parts.append(decoder.commit_pixels(given[:, :, start:end], codes[0, :, clip.frame_slice].numpy()))
        self.differences["vae_pixels"].add(np.concatenate(parts, 2), expected.numpy())

    def _action_head(self, segments: list[TorchSegment]) -> None:
        for segment in segments:
            features = segment.features_1CFhw[:, :, -segment.tokens_FND.shape[0] :].numpy()
            self.differences["action_head"].add(self._logits(features), segment.logits.numpy())

    def _logits(self, features: np.ndarray) -> np.ndarray:
        features = features.astype(self.policy.input_dtype(graphs.ACTION_ADAPTER, "features"))
        tokens = self.policy.engines[graphs.ACTION_ADAPTER].run({"features": features})["tokens"]
        return self.policy.engines[graphs.ACTION_HEAD].run({"tokens": tokens})["logits"]

    def _rgb_head(self, video: list[np.ndarray]) -> None:
        if not self.has_rgb_head:
            return
        head = self.config.action_decoder
        frames = video[: self.config.horizon.step + 1]
        images = rgb_head_input(frames, head.rgb_head.image_hw, head.rgb_mean, head.rgb_std, None)
        expected = self.model.rgb_head(torch.from_numpy(images)).numpy()
        self.differences["rgb_head"].add(self.side_engines[graphs.RGB_HEAD].run({"images": images})["logits"], expected)

    def _actions(self, segments: list[TorchSegment]) -> None:
        head, points = self.config.action_decoder, self.config.horizon.points
        for index, segment in enumerate(segments):
            first = context_frame(points[index], head.left_context)
            found = segment_actions(
                self._logits(self._decode(segment)[:, :, first - 1 :]),
                self.policy.manifest.latent_head_stats,
                observed_frames=points[index],
                next_observed_frames=points[index + 1],
                left_context=head.left_context,
                window=head.latent_head.window,
            )
            self.actions.append(action_difference(found, segment.actions))
