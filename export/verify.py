"""Parity of a bundle with its checkpoint: every stage on the same input, then whole flights.

| row               | both sides get                    | compared                                          |
|-------------------|-----------------------------------|---------------------------------------------------|
| text_encoder      | token ids                         | projected text of both guidance rows              |
| vae_encoder       | frames (streamed against whole)   | raw latents                                       |
| quantiser         | PyTorch's latents                 | bits, sums of codes                               |
| world_model       | PyTorch's bits, observed and drawn| probability of every bit, sums of codes           |
| vae_decoder       | PyTorch's codes                   | last up-block features                            |
| vae_pixels        | PyTorch's features and codes      | pixels                                            |
| action_head       | PyTorch's features                | logits                                            |
| rgb_head          | frames                            | logits                                            |
| actions           | PyTorch's bits                    | actions of all segments, cm and deg               |
| flight            | frames, prompt, seed              | drawn bits; the first that differs must be a tie  |

A bit is a tie when its uniform number lies within `TIE` of its probability: rounding may then decide either way, and
everything drawn later may differ. Source: spec/world_model.md 6, 9.6.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch

from worldvln_edge.action_windows import context_frame, segment_actions
from worldvln_edge.bundle import Bundle, file_entry
from worldvln_edge.export.torch_flight import TorchSegment, fly_in_torch
from worldvln_edge.images import rgb_head_input, transform
from worldvln_edge.models.worldvln import Checkpoint, load_checkpoint
from worldvln_edge.noise import step_uniforms
from worldvln_edge.prompts import tagged_prompt
from worldvln_edge.runtime import graphs
from worldvln_edge.runtime.engine import OnnxEngine
from worldvln_edge.runtime.multiscale import ObservedClip, encode_clip
from worldvln_edge.runtime.video_stream import FeatureDecoder, FrameEncoder
from worldvln_edge.runtime.world_model import WorldModelDriver
from worldvln_edge.runtime.worldvln_policy import WorldVLNPolicy, load_policy

TIE = 1e-4
INSTRUCTIONS = (
    "fly forward 6 meters",
    "turn left by 45 degrees",
    "climb 2 meters",
    "approach the red tower",
    "strafe right for 4 meters",
)


class VerifyError(ValueError):
    """A bundle that cannot be compared with this checkpoint."""


@dataclass(frozen=True, kw_only=True)
class Bounds:
    """Largest differences that pass."""

    max_abs: float
    relative_rms: float
    action_cm: float
    action_deg: float
    quantiser_bits: float  # share of bits that must agree on given latents
    observed_bits: float  # share of bits that must agree on latents of its own


# fp32 against fp32: two orders of summation. Guidance and long chains amplify rounding; observed values lie a decade
# below these bounds (run `worldvln-edge verify` for them).
BOUNDS = {
    "fp32": Bounds(
        max_abs=1e-3,
        relative_rms=1e-4,
        action_cm=1e-2,
        action_deg=1e-2,
        quantiser_bits=1.0 - 1e-5,
        observed_bits=0.999,
    )
}


@dataclass
class ParityRow:
    """One line of the table; a measure that does not apply is None."""

    stage: str
    max_abs: float | None = None
    relative_rms: float | None = None
    bit_agreement: float | None = None
    action_cm: float | None = None
    action_deg: float | None = None
    first_flip_margin: float | None = None
    failures: list[str] = field(default_factory=list)

    def measures(self) -> dict[str, float]:
        """All numbers that apply, by name."""
        names = ("max_abs", "relative_rms", "bit_agreement", "action_cm", "action_deg", "first_flip_margin")
        return {
            name: float(value) for name in names if (value := getattr(self, name)) is not None and np.isfinite(value)
        }


class _Differences:
    """Collects pairs of arrays of one stage."""

    def __init__(self) -> None:
        self.max_abs, self._error, self._reference = 0.0, 0.0, 0.0

    def add(self, found: np.ndarray, expected: np.ndarray) -> None:
        if found.shape != expected.shape:
            raise VerifyError(f"the bundle gives shape {found.shape} where the checkpoint gives {expected.shape}")
        difference = found.astype(np.float64) - expected.astype(np.float64)
        # A NaN must fail, so it counts as an infinite difference.
        self.max_abs = max(self.max_abs, float(np.nan_to_num(np.abs(difference), nan=np.inf).max(initial=0.0)))
        self._error += float(np.nan_to_num(difference**2, nan=np.inf).sum())
        self._reference += float((expected.astype(np.float64) ** 2).sum())

    def row(self, stage: str, bounds: Bounds) -> ParityRow:
        row = ParityRow(
            stage=stage, max_abs=self.max_abs, relative_rms=float(np.sqrt(self._error / max(self._reference, 1e-30)))
        )
        for name in ("max_abs", "relative_rms"):
            if not getattr(row, name) <= getattr(bounds, name):
                row.failures.append(f"{name} {getattr(row, name):.2g} > {getattr(bounds, name):.2g}")
        return row


def verify_bundle(
    bundle_folder: Path,
    checkpoint_folder: Path,
    *,
    frames: np.ndarray | None = None,
    flights: int = 2,
    seed: int = 0,
    progress: Callable[[str], None] | None = None,
) -> list[ParityRow]:
    """Compare a bundle with the checkpoint it was made from.

    Args:
        bundle_folder, checkpoint_folder: the two sides.
        frames: uint8 [F, H, W, 3] of a real flight; None uses a smooth made-up one.
        flights: whole flights (instructions and seeds) to compare.
        seed: of the first flight.
        progress: called with a stage's name before it runs.

    Returns:
        The table; a row with `failures` is out of bounds.

    Raises:
        VerifyError: the bundle was made from another checkpoint, or too few frames.
        BundleError, CheckpointError, EngineError: either side is unusable.
    """
    bundle = Bundle.open(bundle_folder)
    checkpoint = load_checkpoint(checkpoint_folder)
    found, made_from = file_entry(checkpoint.tensor_file).sha256, bundle.manifest.checkpoint_sha256
    if found != made_from:
        raise VerifyError(
            f"{bundle_folder} was made from a checkpoint with sha256 {made_from[:12]}, {checkpoint_folder} has "
            f"{found[:12]}; name the checkpoint it was made from, or export again"
        )
    if bundle.manifest.precision not in BOUNDS:
        raise VerifyError(f"no bounds for precision {bundle.manifest.precision!r}; known: {', '.join(BOUNDS)}")
    horizon = checkpoint.config.horizon
    video = list(frames) if frames is not None else made_up_flight(checkpoint.config.image_hw, horizon.num_frames)
    if len(video) < horizon.num_frames:
        raise VerifyError(f"{len(video)} frames given, a flight needs {horizon.num_frames}")
    policy = load_policy(bundle_folder)
    sides = _Sides(bundle, checkpoint, policy, video[: horizon.num_frames], BOUNDS[bundle.manifest.precision])
    return sides.compare(flights, seed, progress or (lambda stage: None))


def made_up_flight(image_hw: tuple[int, int], frames: int) -> list[np.ndarray]:
    """A camera that moves and turns over a smooth random texture: uint8 RGB [H, W, 3] each, always the same."""
    height, width = image_hw
    rng = np.random.default_rng(20)
    waves = rng.normal(size=(24, 2)) * 6.0 / max(image_hw)
    phases, colours = rng.uniform(0, 2 * np.pi, (24, 3)), rng.normal(size=(24, 3))
    rows, cols = np.meshgrid(np.arange(height), np.arange(width), indexing="ij")
    video = []
    for t in range(frames):
        angle, shift = 0.004 * t, 0.012 * max(image_hw) * t
        x = cols * np.cos(angle) - rows * np.sin(angle) + shift
        y = cols * np.sin(angle) + rows * np.cos(angle)
        phase = waves[:, 0, None, None] * x + waves[:, 1, None, None] * y
        picture = (np.cos(phase[..., None] + phases[:, None, None]) * colours[:, None, None]).sum(0)
        video.append((255 / (1 + np.exp(-picture / 3))).astype(np.uint8))
    return video


class _Sides:
    """Both sides, and the torch flights that every stage is compared on."""

    def __init__(
        self, bundle: Bundle, checkpoint: Checkpoint, policy: WorldVLNPolicy, video: list[np.ndarray], bounds: Bounds
    ):
        self.bundle, self.checkpoint, self.policy = bundle, checkpoint, policy
        self.config, self.model = checkpoint.config, checkpoint.model
        self.video, self.bounds = video, bounds

    def compare(self, flights: int, seed: int, progress: Callable[[str], None]) -> list[ParityRow]:
        runs = []
        for index in range(flights):
            instruction = INSTRUCTIONS[index % len(INSTRUCTIONS)]
            progress(f"flight {index + 1} in PyTorch")
            ids = self.policy.tokenizer.encode(tagged_prompt(instruction, self.config.horizon))[None]
            segments = fly_in_torch(self.checkpoint, ids, self.video, seed=seed + index)
            runs.append((instruction, seed + index, ids, segments))
        rows: list[ParityRow] = []
        stages: list[tuple[str, Callable[[], ParityRow]]] = [
            ("text_encoder", lambda: self._text([ids for _, _, ids, _ in runs])),
            ("vae_encoder", lambda: self._encoder(runs[0][3])),
            ("quantiser", lambda: self._quantiser(runs[0][3])),
            ("world_model", lambda: self._world_model([(instruction, s) for instruction, _, _, s in runs])),
            ("vae_decoder", lambda: self._decoder(runs[0][3][-1])),
            ("vae_pixels", lambda: self._pixels(runs[0][3][-1])),
            ("action_head", lambda: self._action_head(runs[0][3])),
            ("rgb_head", self._rgb_head),
            ("actions", lambda: self._actions([s for _, _, _, s in runs])),
            ("flight", lambda: self._flight([(instruction, n, s) for instruction, n, _, s in runs])),
        ]
        for name, run in stages:
            progress(name)
            rows.append(run())
        return rows

    def _engine(self, name: str) -> OnnxEngine:
        return OnnxEngine(self.bundle.graph_path(name))

    def _clip_bits(self, bits: list[torch.Tensor], clip_index: int) -> list[np.ndarray]:
        steps = self.policy.tables.schedule.clips[clip_index].steps
        return [bits[step.real_scale_id][0].numpy() for step in steps]

    @torch.no_grad()
    def _text(self, all_ids: list[np.ndarray]) -> ParityRow:
        differences = _Differences()
        for ids in all_ids:
            outputs = self.policy.engines[graphs.TEXT_ENCODER].run({"ids": ids})
            world, features = self.model.world_model, self.model.text_encoder(torch.from_numpy(ids))
            differences.add(outputs["text_embeds"], world.project_text(features).numpy())
            uncond = world.project_text(world.cfg_uncond[: ids.shape[1]][None])
            differences.add(outputs["uncond_embeds"], uncond.numpy())
        return differences.row("text_encoder", self.bounds)

    def _encoder(self, segments: list[TorchSegment]) -> ParityRow:
        expected = segments[-1].latents_DTHW.numpy()
        encoder = FrameEncoder(self.policy.engines, self.config.video_vae.temporal_stride)
        latents: list[np.ndarray] = []
        for frame in self.video[: self.config.horizon.points[-2]]:
            latents += encoder.push([transform(frame, self.config.image_hw)])
        differences = _Differences()
        differences.add(np.stack(latents, 1), expected)
        return differences.row("vae_encoder", self.bounds)

    def _observed(self, segment: TorchSegment) -> list[ObservedClip]:
        latents, clips = segment.latents_DTHW.numpy(), []
        for clip in self.policy.tables.schedule.clips:
            if clip.frame_slice.stop <= latents.shape[1]:
                clips.append(encode_clip(latents[:, clip.frame_slice], clip, self.config.world_model))
        return clips

    def _quantiser(self, segments: list[TorchSegment]) -> ParityRow:
        segment, equal, total = segments[-1], 0, 0
        differences = _Differences()
        for index, observed in enumerate(self._observed(segment)):
            for found, expected in zip(observed.bits, self._clip_bits(segment.observed_bits, index), strict=True):
                equal, total = equal + int((found == expected).sum()), total + expected.size
            frames = self.policy.tables.schedule.clips[index].frame_slice
            differences.add(observed.codes, segment.generated.summed_BcTHW[0, :, frames].numpy())
        row = differences.row("quantiser", self.bounds)
        row.bit_agreement = equal / total
        if row.bit_agreement < self.bounds.quantiser_bits:
            row.failures.append(f"bit agreement {row.bit_agreement:.6f} < {self.bounds.quantiser_bits:.6f}")
        return row

    def _world_model(self, runs: list[tuple[str, list[TorchSegment]]]) -> ParityRow:
        differences = _Differences()
        for instruction, segments in runs:
            driver = WorldModelDriver(self.policy.engines, self.policy.tables, self.policy.new_cache())
            driver.set_text(self.policy.encode_text(instruction, ""))
            seen = 0
            for segment in segments:
                observed = self._observed(segment)
                for index in range(seen, len(observed)):
                    driver.observe(index, observed[index])
                seen = len(observed)
                last = segment.generated.records[-1].step.clip
                for index in range(seen, last + 1):
                    forced = self._clip_bits(segment.generated.bits, index)
                    clip = driver.generate(index, 0, forced_bits=forced, more_follow=index < last)
                    frames = self.policy.tables.schedule.clips[index].frame_slice
                    differences.add(clip.codes, segment.generated.summed_BcTHW[0, :, frames].numpy())
                    for record, found in zip(_records(segment, index), clip.probabilities, strict=True):
                        guided = record.guided_BLd2[0].double()
                        expected = torch.sigmoid(guided[..., 1] - guided[..., 0]).reshape(found.shape)
                        differences.add(found, expected.numpy())
        return differences.row("world_model", self.bounds)

    def _decoder(self, segment: TorchSegment) -> ParityRow:
        differences = _Differences()
        differences.add(self._decode(segment)[0], segment.features_1CFhw.numpy())
        return differences.row("vae_decoder", self.bounds)

    def _decode(self, segment: TorchSegment) -> tuple[np.ndarray, FeatureDecoder]:
        codes, decoder = segment.generated.summed_BcTHW[0].numpy(), FeatureDecoder(self.policy.engines)
        clips = [clip.frame_slice for clip in self.policy.tables.schedule.clips if clip.first_frame < codes.shape[1]]
        features = [decoder.commit(np.ascontiguousarray(codes[:, frames])) for frames in clips]
        return np.concatenate(features, 2), decoder

    @torch.no_grad()
    def _pixels(self, segment: TorchSegment) -> ParityRow:
        names = [graphs.first_or_next(graphs.VAE_PIXELS, first) for first in (True, False)]
        decoder = FeatureDecoder({name: self._engine(name) for name in names})
        codes, features = segment.generated.summed_BcTHW, segment.features_1CFhw
        expected, _ = self.model.vae.decode_pixels(features, codes)
        stride, parts = self.config.video_vae.temporal_stride, []
        for clip in self.policy.tables.schedule.clips:
            if clip.first_frame >= codes.shape[2]:
                break
            start = 0 if clip.first_frame == 0 else 1 + (clip.first_frame - 1) * stride
            end = 1 + (clip.first_frame + clip.frames - 1) * stride
            parts.append(
                decoder.commit_pixels(features[:, :, start:end].numpy(), codes[0, :, clip.frame_slice].numpy())
            )
        differences = _Differences()
        differences.add(np.concatenate(parts, 2), expected.numpy())
        return differences.row("vae_pixels", self.bounds)

    def _action_head(self, segments: list[TorchSegment]) -> ParityRow:
        differences = _Differences()
        for segment in segments:
            features = segment.features_1CFhw[:, :, -segment.tokens_FND.shape[0] :].numpy()
            differences.add(self._logits(features), segment.logits.numpy())
        return differences.row("action_head", self.bounds)

    def _logits(self, features: np.ndarray) -> np.ndarray:
        tokens = self.policy.engines[graphs.ACTION_ADAPTER].run({"features": features})["tokens"]
        return self.policy.engines[graphs.ACTION_HEAD].run({"tokens": tokens})["logits"]

    @torch.no_grad()
    def _rgb_head(self) -> ParityRow:
        head = self.config.action_decoder
        frames = self.video[: self.config.horizon.step + 1]
        images = rgb_head_input(frames, head.rgb_head.image_hw, head.rgb_mean, head.rgb_std, None)
        differences = _Differences()
        expected = self.model.rgb_head(torch.from_numpy(images)).numpy()
        differences.add(self._engine(graphs.RGB_HEAD).run({"images": images})["logits"], expected)
        return differences.row("rgb_head", self.bounds)

    def _actions(self, runs: list[list[TorchSegment]]) -> ParityRow:
        found, expected = [], []
        head, points = self.config.action_decoder, self.config.horizon.points
        for segments in runs:
            for index, segment in enumerate(segments):
                features, _ = self._decode(segment)
                first = context_frame(points[index], head.left_context)
                found.append(
                    segment_actions(
                        self._logits(features[:, :, first - 1 :]),
                        self.policy.manifest.latent_head_stats,
                        observed_frames=points[index],
                        next_observed_frames=points[index + 1],
                        left_context=head.left_context,
                        window=head.latent_head.window,
                    )
                )
                expected.append(segment.actions)
        row = ParityRow(stage="actions")
        _compare_actions(row, np.concatenate(found), np.concatenate(expected), self.bounds)
        return row

    def _flight(self, runs: list[tuple[str, int, list[TorchSegment]]]) -> ParityRow:
        """Free draws. A flip is allowed at a tie only; what follows it is not compared."""
        row, equal, total, observed_equal, observed_total = ParityRow(stage="flight"), 0, 0, 0, 0
        found_actions, expected_actions = [], []
        points = self.config.horizon.points
        for instruction, seed, segments in runs:
            session, sent = self.policy.new_session(instruction, seed=seed), 0
            for index, segment in enumerate(segments):
                chunk = session.observe(self.video[sent : points[index]])
                sent = points[index]
                if chunk is None:
                    raise VerifyError(f"the bundle gave no actions for segment {index}")
                margin = None
                observed = [clip.bits for clip in session.observed_clips]
                for clip_index, clip_bits in enumerate([*observed, *(c.bits for c in session.last_prediction)]):
                    pairs = zip(clip_bits, _records(segment, clip_index), strict=True)
                    for found, record in pairs:
                        same = found == record.bits_BThwd[0].numpy()
                        equal, total = equal + int(same.sum()), total + same.size
                        if clip_index < len(observed):
                            observed_equal += int(same.sum())
                            observed_total += same.size
                        if not same.all() and margin is None:
                            margin = _margin(record, same, seed) if clip_index >= len(observed) else 0.0
                if margin is None:
                    found_actions.append(chunk.actions)
                    expected_actions.append(segment.actions)
                else:
                    row.first_flip_margin = max(row.first_flip_margin or 0.0, margin)
        row.bit_agreement = equal / total
        if row.first_flip_margin is not None and not row.first_flip_margin < TIE:
            row.failures.append(f"a bit flipped whose draw lay {row.first_flip_margin:.2g} from its probability")
        # An observed bit flips where a residual is zero up to rounding: rare, or the frames are treated differently.
        if observed_equal < self.bounds.observed_bits * observed_total:
            share = observed_equal / observed_total
            row.failures.append(f"observed bits agree to {share:.4f} < {self.bounds.observed_bits}")
        if not found_actions:
            row.failures.append("no segment had equal bits, so no actions were compared; try another --seed")
        else:
            _compare_actions(row, np.concatenate(found_actions), np.concatenate(expected_actions), self.bounds)
        return row


def _records(segment: TorchSegment, clip_index: int):
    return [record for record in segment.generated.records if record.step.clip == clip_index]


def _margin(record, same: np.ndarray, seed: int) -> float:
    """Largest distance of draw and probability among the flipped bits of a step."""
    step, bits = record.step, same.shape[-1]
    uniforms = step_uniforms(seed, step.clip, step.step_in_clip, step.thw, bits)
    guided = record.guided_BLd2[0].double()
    probability = torch.sigmoid(guided[..., 1] - guided[..., 0]).reshape(same.shape).numpy()
    return float(np.abs(uniforms - probability)[~same].max())


def _compare_actions(row: ParityRow, found: np.ndarray, expected: np.ndarray, bounds: Bounds) -> None:
    difference = np.nan_to_num(np.abs(found.astype(np.float64) - expected), nan=np.inf)
    row.action_cm, row.action_deg = float(difference[:, :3].max()), float(difference[:, 3:].max())
    for name in ("action_cm", "action_deg"):
        if not getattr(row, name) <= getattr(bounds, name):
            row.failures.append(f"{name} {getattr(row, name):.2g} > {getattr(bounds, name):.2g}")
