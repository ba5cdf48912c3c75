"""WorldVLN as a policy: the engines of one bundle, and sessions that fly with them.

The walk of a frame: preprocess -> VAE encoder -> bit labels -> keys and values of the observed clip; then, when a
segment is ready: generate its clips -> VAE decoder -> adapter -> TimesFormer windows -> 16 actions.
Source: spec/world_model.md 7, 9.2; spec/video_vae.md 8; spec/action_decoder.md 4, 10; spec/session_protocol.md 2.6.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from worldvln_edge.action_windows import segment_actions
from worldvln_edge.bundle import TOKENIZER_FILE, Bundle, Manifest
from worldvln_edge.images import check_rgb, transform
from worldvln_edge.prompts import tagged_prompt
from worldvln_edge.runtime import graphs
from worldvln_edge.runtime.engine import Engine, OnnxEngine
from worldvln_edge.runtime.kv_cache import KVCache
from worldvln_edge.runtime.multiscale import ObservedClip, encode_clip
from worldvln_edge.runtime.policy import ActionChunk, Emit, NonFiniteActionsError, PolicyInfo
from worldvln_edge.runtime.tokenizer import PromptTokenizer
from worldvln_edge.runtime.video_stream import FeatureDecoder, FrameEncoder
from worldvln_edge.runtime.world_model import GeneratedClip, ScaleTables, WorldModelDriver

_log = logging.getLogger(__name__)


class WorldVLNPolicy:
    """The engines and constant tables of one bundle. Sessions share them and run one at a time."""

    def __init__(self, manifest: Manifest, engines: Mapping[str, Engine], tokenizer: PromptTokenizer):
        self.manifest = manifest
        self.config = manifest.model
        self.engines = engines
        self.tokenizer = tokenizer
        self.tables = ScaleTables(self.config)
        self.info = PolicyInfo(
            name=self.config.name,
            precision=manifest.precision,
            backend="onnx",
            device="cpu",
            horizon=self.config.horizon,
            image_hw=self.config.image_hw,
        )

    def new_session(
        self, prompt: str, *, seed: int = 0, negative_prompt: str = "", emit: Emit = "ahead"
    ) -> WorldVLNSession:
        return WorldVLNSession(self, prompt, seed=seed, negative_prompt=negative_prompt, emit=emit)

    def encode_text(self, prompt: str, negative_prompt: str) -> np.ndarray:
        """Projected text of both guidance rows: float32 [B, L, C] (spec/world_model.md 4)."""
        run = self.engines[graphs.TEXT_ENCODER].run
        outputs = run({"ids": self.tokenizer.encode(tagged_prompt(prompt, self.config.horizon))[None]})
        text = outputs["text_embeds"]
        if self.manifest.guidance_rows == 1:
            return text
        other = outputs["uncond_embeds"]
        if negative_prompt:
            negative = run({"ids": self.tokenizer.encode(negative_prompt)[None]})["text_embeds"]
            if negative.shape[1] > text.shape[1]:
                _log.warning("negative prompt of %d tokens cut to %d", negative.shape[1], text.shape[1])
            other = np.zeros_like(text)  # rows behind a shorter negative prompt are zero, and attended
            kept = min(negative.shape[1], text.shape[1])
            other[:, :kept] = negative[:, :kept]
        return np.concatenate([text, other])

    def new_cache(self) -> KVCache:
        model = self.config.world_model
        return KVCache(
            layers=model.depth,
            rows=self.manifest.guidance_rows,
            kv_heads=model.kv_heads,
            capacity=self.manifest.kv_capacity,
            head_dim=model.head_dim,
            dtype=self.input_dtype(graphs.WORLD_MODEL_STEP, "past_key_0"),
        )

    def input_dtype(self, graph: str, name: str) -> np.dtype:
        """Dtype of a graph's input, as the manifest says."""
        specs = self.manifest.graphs[graph].inputs
        return np.dtype(next(spec.dtype for spec in specs if spec.name == name))


class WorldVLNSession:
    """One flight: a prompt, its frames in order, and everything that was computed from them.

    Whatever an engine raises leaves the flight as it was before that step: every step computes first and is taken
    over when all of its engines have answered. `frames` tells whether the frames of the failed call were taken; the
    next `observe` goes on from there.
    """

    def __init__(self, policy: WorldVLNPolicy, prompt: str, *, seed: int, negative_prompt: str, emit: Emit):
        self._policy = policy
        self._config = policy.config
        self._prompt, self._negative_prompt = prompt, negative_prompt
        self._seed, self._emit = seed, emit
        self._encoder = FrameEncoder(policy.engines, self._config.video_vae.temporal_stride)
        self._decoder = FeatureDecoder(policy.engines)
        self._driver = WorldModelDriver(policy.engines, policy.tables, policy.new_cache())
        self._has_text = False
        self._latents: list[np.ndarray] = []  # of the clip that is being observed
        self._clips: list[ObservedClip] = []
        tokens = policy.input_dtype(graphs.ACTION_HEAD, "tokens")
        self._context_tokens = np.zeros((0, *self._token_shape), tokens)
        self._timings_ms: dict[str, float] = {}
        self.frames = 0
        self.emitted = -1
        self.last_prediction: tuple[GeneratedClip, ...] = ()
        """The clips behind the last action chunk (recorder, parity tests)."""

    @property
    def _token_shape(self) -> tuple[int, int]:
        head = self._config.action_decoder.latent_head
        return head.tokens_per_frame, head.width

    @property
    def observed_clips(self) -> tuple[ObservedClip, ...]:
        """Bit labels and codes of the clips that the next segment rests on (recorder, parity tests)."""
        return tuple(self._clips)

    @property
    def counters(self) -> dict[str, int]:
        """Work done so far in this flight (spec/world_model.md 9.3)."""
        return {
            "token_steps": self._driver.token_steps,
            "world_model_calls": self._driver.calls,
            "frames_encoded": self._encoder.frames_encoded,
            "latents_decoded": self._decoder.latents_decoded,
        }

    @property
    def need(self) -> int:
        if self.done:
            return 0
        points = self._config.horizon.points
        wanted = points[self.emitted + 1] if self._emit == "ahead" else points[self.emitted + 2]
        return max(0, wanted - self.frames)

    @property
    def done(self) -> bool:
        return self.emitted + 1 >= self._config.horizon.segments

    def set_prompt(self, prompt: str) -> None:
        """Replace the prompt for the segments still to come: keys and values are made anew, bit labels stay."""
        if prompt != self._prompt:
            self._prompt = prompt
            self._has_text = False

    def close(self) -> None:
        self._driver.clear()
        self._clips.clear()
        self._latents.clear()

    def observe(self, frames: Sequence[np.ndarray]) -> ActionChunk | None:
        """See `PolicySession.observe`."""
        horizon = self._config.horizon
        for frame in frames:
            check_rgb(frame)
        # Frames behind the last segment's start are counted, not encoded: nothing that comes later could use them.
        useful = max(0, horizon.points[-2] - self.frames)
        with self._timed("preprocess"):
            ready = [transform(frame, self._config.image_hw) for frame in frames[:useful]]
        with self._timed("vae_encoder"):
            latents = self._encoder.push(ready)
        self._latents += latents
        self.frames = min(horizon.num_frames, self.frames + len(frames))
        self._take_observed_clips()
        if self.done or self.need:
            return None
        return self._emit_segment(self.emitted + 1)

    def _take_observed_clips(self) -> None:
        # A segment rests on the frames up to its start, even when later ones are already here.
        schedule, stride = self._policy.tables.schedule, self._config.video_vae.temporal_stride
        while not self.done:
            clip = schedule.clips[len(self._clips)]
            last_frame = 1 + (clip.first_frame + clip.frames - 1) * stride
            if last_frame > self._config.horizon.points[self.emitted + 1] or len(self._latents) < clip.frames:
                return
            with self._timed("quantiser"):
                observed = encode_clip(np.stack(self._latents[: clip.frames], 1), clip, self._config.world_model)
            with self._timed("vae_decoder"):
                features, decoder_state = self._decoder.decode(observed.codes)
            with self._timed("action_decoder"):
                left = self._config.action_decoder.left_context
                tokens = self._adapter(features[:, :, -left:])
            if self._has_text:  # the last engine call of the clip, because it cannot be repeated once it succeeded
                with self._timed("world_model_context"):
                    self._driver.observe(clip.index, observed)
            del self._latents[: clip.frames]
            self._clips.append(observed)
            self._decoder.go_on_from(decoder_state)
            self._context_tokens = np.concatenate([self._context_tokens, tokens])[-left:]

    def _emit_segment(self, segment: int) -> ActionChunk:
        points = self._config.horizon.points
        observed, following = points[segment], points[segment + 1]
        self._prepare_text()
        with self._timed("world_model_step"):
            generated = self._generate(observed, following)
        with self._timed("vae_decoder"):
            features = self._decoder.peek(np.concatenate([clip.codes for clip in generated], axis=1))
        with self._timed("action_decoder"):
            tokens = np.concatenate([self._context_tokens, self._adapter(features)])
            logits = self._policy.engines[graphs.ACTION_HEAD].run({"tokens": tokens})["logits"]
            head = self._config.action_decoder
            actions = segment_actions(
                logits,
                self._policy.manifest.latent_head_stats,
                observed_frames=observed,
                next_observed_frames=following,
                left_context=head.left_context,
                window=head.latent_head.window,
            )
        timings, self._timings_ms = self._timings_ms, {}
        if not np.isfinite(actions).all():
            raise NonFiniteActionsError(f"segment {segment}: the action decoder gave NaN or infinity")
        self.emitted, self.last_prediction = segment, generated
        return ActionChunk(
            segment=segment, actions=actions, observed_frames=self.frames, seed=self._seed, timings_ms=timings
        )

    def _prepare_text(self) -> None:
        if self._has_text:
            return
        with self._timed("text_encoder"):
            self._driver.set_text(self._policy.encode_text(self._prompt, self._negative_prompt))
        with self._timed("world_model_context"):
            for index, observed in enumerate(self._clips):
                self._driver.observe(index, observed)
        self._has_text = True

    def _generate(self, observed_frames: int, next_observed_frames: int) -> tuple[GeneratedClip, ...]:
        stride, schedule = self._config.video_vae.temporal_stride, self._policy.tables.schedule
        first, end = 1 + (observed_frames - 1) // stride, 1 + (next_observed_frames - 1) // stride
        indices = [clip.index for clip in schedule.clips if first <= clip.first_frame < end]
        return tuple(self._driver.generate(index, self._seed, more_follow=index != indices[-1]) for index in indices)

    def _adapter(self, features: np.ndarray) -> np.ndarray:
        return self._policy.engines[graphs.ACTION_ADAPTER].run({"features": features})["tokens"]

    @contextmanager
    def _timed(self, stage: str):
        start = time.perf_counter()
        try:
            yield
        finally:
            spent_ms = (time.perf_counter() - start) * 1e3
            self._timings_ms[stage] = self._timings_ms.get(stage, 0.0) + spent_ms


def load_policy(bundle_folder: Path, *, threads: int = 0) -> WorldVLNPolicy:
    """Open a bundle, check it, and load the graphs that a flight needs.

    Args:
        bundle_folder: what `worldvln-edge export` wrote.
        threads: CPU threads per engine call; 0 lets ONNX Runtime choose.

    Raises:
        BundleError: missing or corrupt bundle.
        EngineError: a graph does not load here.
    """
    bundle = Bundle.open(bundle_folder)
    names = [
        graphs.TEXT_ENCODER,
        graphs.LATENT_EMBED,
        graphs.WORLD_MODEL_CONTEXT,
        graphs.WORLD_MODEL_STEP,
        *(
            graphs.first_or_next(stem, first)
            for stem in (graphs.VAE_ENCODER, graphs.VAE_DECODER)
            for first in (True, False)
        ),
        graphs.ACTION_ADAPTER,
        graphs.ACTION_HEAD,
    ]
    engines = {name: OnnxEngine(bundle.graph_path(name), threads=threads) for name in names}
    tokenizer = PromptTokenizer.load(
        bundle.file_path(TOKENIZER_FILE), bundle.manifest.model.world_model.text_max_tokens
    )
    return WorldVLNPolicy(bundle.manifest, engines, tokenizer)
