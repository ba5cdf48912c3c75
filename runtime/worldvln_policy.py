"""WorldVLN as a policy: the engines of one bundle and what its sessions share.

Source: spec/world_model.md 4, 7.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from worldvln_edge.action_windows import segment_actions
from worldvln_edge.bundle import TOKENIZER_FILE, Bundle, Manifest
from worldvln_edge.config import ConfigError
from worldvln_edge.generation_profile import EXACT, GenerationProfile, built_in_profiles
from worldvln_edge.prompts import tagged_prompt
from worldvln_edge.runtime import graphs
from worldvln_edge.runtime.engine import Engine, OnnxEngine
from worldvln_edge.runtime.kv_cache import HostKVMemory, KVWorkspace
from worldvln_edge.runtime.latency_model import DeadlineChooser, LatencyModel, device_name, read_model
from worldvln_edge.runtime.policy import Emit, PolicyInfo
from worldvln_edge.runtime.text_cache import TextCache
from worldvln_edge.runtime.tokenizer import PromptTokenizer
from worldvln_edge.runtime.world_model import ScaleTables
from worldvln_edge.runtime.worldvln_session import WorldVLNSession

_log = logging.getLogger(__name__)


class WorldVLNPolicy:
    """The engines and constant tables of one bundle. Sessions share them and run one at a time."""

    def __init__(
        self,
        manifest: Manifest,
        engines: Mapping[str, Engine],
        tokenizer: PromptTokenizer,
        *,
        profiles: Mapping[str, GenerationProfile] | None = None,
        profile: str = EXACT,
        latency: LatencyModel | None = None,
    ):
        """
        Args:
            manifest: of the bundle.
            engines: graph name -> engine, of every graph that a flight needs.
            tokenizer: of the bundle.
            profiles: besides the built-in ones (generation_profile.py).
            profile: that sessions start with, and the deepest that a deadline may choose.
            latency: measured times; without them deadlines change nothing.

        Raises:
            ConfigError: an unknown profile, or one that does not fit the model.
        """
        self.manifest = manifest
        self.config = manifest.model
        self.engines = engines
        self.tokenizer = tokenizer
        self.profiles = self._checked_profiles(profiles or {})
        self.profile = self.find_profile(profile)
        self.chooser = None if latency is None else DeadlineChooser(latency, self.profiles)
        self.tables = ScaleTables(self.config)
        self.texts = TextCache()
        self.turn = threading.Lock()
        """Held by the session that computes: the workspace has room for one."""
        self.workspace = KVWorkspace(self._new_memory())
        self.info = PolicyInfo(
            name=self.config.name,
            precision=manifest.precision,
            backend="onnx",
            device="cpu",
            horizon=self.config.horizon,
            image_hw=self.config.image_hw,
        )

    def find_profile(self, name: str) -> GenerationProfile:
        """The profile of that name. Raises ConfigError when there is none."""
        if name not in self.profiles:
            raise ConfigError(f"unknown profile {name!r}; choose one of {', '.join(self.profiles)}")
        return self.profiles[name]

    def _checked_profiles(self, own: Mapping[str, GenerationProfile]) -> dict[str, GenerationProfile]:
        config = self.config
        clips = config.horizon.step // config.video_vae.temporal_stride // config.schedule.frames_inner_clip
        built_in = built_in_profiles(config.schedule)
        if clips > 1:  # their clips refer to each other, so no scale may be missing
            built_in = {name: profile for name, profile in built_in.items() if not profile.skipped_scales}
        profiles = {**built_in, **own}
        for profile in profiles.values():
            profile.check(config.schedule, clips_per_segment=clips)
        return profiles

    def new_session(
        self, prompt: str, *, seed: int = 0, negative_prompt: str = "", emit: Emit = "ahead", record: bool = False
    ) -> WorldVLNSession:
        """See `Policy.new_session`; with `record`, `last_prediction` holds bits and probabilities."""
        return WorldVLNSession(self, prompt, seed=seed, negative_prompt=negative_prompt, emit=emit, record=record)

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

    def _new_memory(self) -> HostKVMemory:
        model = self.config.world_model
        return HostKVMemory(
            layers=model.depth,
            rows=self.manifest.guidance_rows,
            kv_heads=model.kv_heads,
            capacity=self.manifest.kv_capacity,
            head_dim=model.head_dim,
            dtype=self.input_dtype(graphs.WORLD_MODEL_STEP, "past_key_0"),
        )

    def actions(self, tokens_FND: np.ndarray, observed_frames: int, next_observed_frames: int) -> np.ndarray:
        """Actions of a segment: float32 [N, 6], cm and deg.

        Args:
            tokens_FND: of its frames and the context frames in front of them, in the action head's dtype.
            observed_frames, next_observed_frames: where the segment starts and ends.
        """
        head = self.config.action_decoder
        return segment_actions(
            self.engines[graphs.ACTION_HEAD].run({"tokens": tokens_FND})["logits"],
            self.manifest.latent_head_stats,
            observed_frames=observed_frames,
            next_observed_frames=next_observed_frames,
            left_context=head.left_context,
            window=head.latent_head.window,
        )

    def input_dtype(self, graph: str, name: str) -> np.dtype:
        """Dtype of a graph's input, as the manifest says."""
        specs = self.manifest.graphs[graph].inputs
        return np.dtype(next(spec.dtype for spec in specs if spec.name == name))


def load_policy(
    bundle_folder: Path,
    *,
    threads: int = 0,
    profiles: Mapping[str, GenerationProfile] | None = None,
    profile: str = EXACT,
) -> WorldVLNPolicy:
    """Open a bundle, check it, and load the graphs that a flight needs.

    Args:
        bundle_folder: what `worldvln-edge export` wrote.
        threads: CPU threads per engine call; 0 lets ONNX Runtime choose.
        profiles, profile: see `WorldVLNPolicy`.

    Raises:
        BundleError: missing or corrupt bundle.
        ConfigError: an unknown profile, or one that does not fit the model.
        LatencyModelError: the bundle was tuned here, and exported again since.
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
    latency = read_model(bundle.folder, bundle.manifest, device_name(), threads)
    return WorldVLNPolicy(bundle.manifest, engines, tokenizer, profiles=profiles, profile=profile, latency=latency)
