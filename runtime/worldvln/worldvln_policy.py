"""WorldVLN as a policy: the engines of one bundle and what its sessions share.

Source: spec/world_model.md 4, 7.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Collection, Mapping, Sequence
from contextlib import ExitStack
from functools import cached_property
from pathlib import Path

import numpy as np

from worldvln_edge.action_windows import segment_actions
from worldvln_edge.bundle import TOKENIZER_FILE, Bundle, Manifest
from worldvln_edge.config import ConfigError
from worldvln_edge.generation_profile import EXACT, GenerationProfile, find_profile, model_profiles
from worldvln_edge.images import fit_frame
from worldvln_edge.prompts import tagged_prompt
from worldvln_edge.runtime.engines.backends import Backend, BackendName, host_backend, open_engines
from worldvln_edge.runtime.engines.engine import Engine, Tensor
from worldvln_edge.runtime.sessions.policy import Emit, PolicyInfo
from worldvln_edge.runtime.worldvln import graphs
from worldvln_edge.runtime.worldvln.flight_times import FlightTimes
from worldvln_edge.runtime.worldvln.kv_cache import KVWorkspace
from worldvln_edge.runtime.worldvln.latency_model import DeadlineChooser, LatencyModel, graphs_sha256, read_model
from worldvln_edge.runtime.worldvln.scale_tables import ScaleTables
from worldvln_edge.runtime.worldvln.session_memory import SessionMemory, bundle_session_memory
from worldvln_edge.runtime.worldvln.speculation import SpeculationConfig
from worldvln_edge.runtime.worldvln.text_cache import TextCache
from worldvln_edge.runtime.worldvln.tokenizer import PromptTokenizer
from worldvln_edge.runtime.worldvln.worldvln_session import WorldVLNSession

FLIGHT_GRAPHS = (
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
)
PREVIEW_GRAPHS = tuple(graphs.first_or_next(graphs.VAE_PIXELS, first) for first in (True, False))
"""Side graphs that show what a session predicts."""
"""What a flight needs of a bundle's graphs."""

_log = logging.getLogger(__name__)


class WorldVLNPolicy:
    """The engines and constant tables of one bundle. Sessions share them and run one at a time."""

    def __init__(
        self,
        manifest: Manifest,
        engines: Mapping[str, Engine],
        tokenizer: PromptTokenizer,
        *,
        backend: Backend | None = None,
        profiles: Mapping[str, GenerationProfile] | None = None,
        profile: str = EXACT,
        latency: LatencyModel | None = None,
        speculation: SpeculationConfig | None = None,
        step_engines: Mapping[str, Engine] | None = None,
    ):
        """
        Args:
            manifest: of the bundle.
            engines: graph name -> engine, of every graph that a flight needs.
            tokenizer: of the bundle.
            backend: that the engines run on; the policy closes it. None: ONNX Runtime on the CPU.
            profiles: besides the built-in ones (generation_profile.py).
            profile: that sessions start with, and the deepest that a deadline may choose.
            latency: measured times; without them deadlines change nothing.
            speculation: generate segments before their frames are there; None does not.
            step_engines: precision -> `world_model_step`, for profiles that name another than the bundle's.

        Raises:
            ConfigError: an unknown profile, or one that does not fit the model.
        """
        self.manifest = manifest
        self.config = manifest.model
        self.engines = engines
        self.tokenizer = tokenizer
        self.step_engines = dict(step_engines or {})
        self.profiles = model_profiles(self.config, profiles)
        for each in self.profiles.values():
            loaded = (manifest.precision, *self.step_engines)
            if each.precision is not None and each.precision not in loaded:
                raise ConfigError(
                    f"profile {each.name}: no {each.precision} weights are loaded, only {', '.join(loaded)}; "
                    f"export the checkpoint in {each.precision}, and name that bundle with --also"
                )
        self.profile = find_profile(self.profiles, profile)
        self.chooser = None if latency is None else DeadlineChooser(latency, self.profiles)
        self.times = FlightTimes()
        self.speculation = speculation
        self.tables = ScaleTables(self.config)
        self.texts = TextCache()
        self.turn = threading.Lock()
        """Held by the session that computes: the workspace has room for one."""
        self.backend = backend or host_backend(manifest)
        self.workspace = KVWorkspace(self.backend.kv_memory)
        self.info = PolicyInfo(
            name=self.config.name,
            precision=manifest.precision,
            backend=self.backend.runner,
            device=self.backend.device,
            horizon=self.config.horizon,
            image_hw=self.config.image_hw,
            weights=graphs_sha256(manifest),
        )

    @property
    def shows_predictions(self) -> bool:
        """Were the graphs of `PREVIEW_GRAPHS` loaded?"""
        return all(name in self.engines for name in PREVIEW_GRAPHS)

    def new_session(
        self, prompt: str, *, seed: int = 0, negative_prompt: str = "", emit: Emit = "ahead", record: bool = False
    ) -> WorldVLNSession:
        """See `Policy.new_session`; with `record`, `last_prediction` holds bits and probabilities."""
        return WorldVLNSession(self, prompt, seed=seed, negative_prompt=negative_prompt, emit=emit, record=record)

    @property
    def session_bytes(self) -> int:
        """See `Policy.session_bytes`; of what: `session_memory`."""
        return self.session_memory.total

    @cached_property
    def session_memory(self) -> SessionMemory:
        """What one session holds at most, by what it is."""
        return bundle_session_memory(
            self.manifest, speculates=self.speculation is not None, shows_predictions=self.shows_predictions
        )

    def available_bytes(self) -> int | None:
        """See `Policy.available_bytes`."""
        return self.backend.available_bytes()

    def fit_frame(self, frame: np.ndarray) -> np.ndarray:
        """See `Policy.fit_frame`."""
        return fit_frame(frame, self.config.image_hw)

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

    def close(self) -> None:
        """Give back what lies on a device; no session may fly any more. Twice does no harm.

        What ONNX Runtime holds ends with its engines, that is with the policy.
        """
        with self.turn:
            self.backend.close()

    def actions(self, tokens_FND: np.ndarray, observed_frames: int, next_observed_frames: int) -> np.ndarray:
        """Actions of a segment: float32 [N, 6], cm and deg.

        Args:
            tokens_FND: of its frames and the context frames in front of them, in the action head's dtype.
            observed_frames: where the segment starts.
            next_observed_frames: where it ends.
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

    def tokens(self, features: Tensor) -> np.ndarray:
        """Patch tokens of decoded frames, from the decoder's features: [F, N, D]."""
        return self.engines[graphs.ACTION_ADAPTER].run({"features": features})["tokens"]

    def latent_end(self, frames: int) -> int:
        """Latent frames of that many frames."""
        return 1 + (frames - 1) // self.config.video_vae.temporal_stride

    def clips_of(self, segment: int) -> list[int]:
        """Clips that a segment generates."""
        points = self.config.horizon.points
        first, end = self.latent_end(points[segment]), self.latent_end(points[segment + 1])
        return [clip.index for clip in self.tables.schedule.clips if first <= clip.first_frame < end]

    def input_dtype(self, graph: str, name: str) -> np.dtype:
        """Dtype of a graph's input, as the manifest says."""
        specs = self.manifest.graphs[graph].inputs
        return np.dtype(next(spec.dtype for spec in specs if spec.name == name))


def load_policy(
    bundle_folder: Path,
    *,
    backend: BackendName = "cpu",
    threads: int = 0,
    profiles: Mapping[str, GenerationProfile] | None = None,
    profile: str = EXACT,
    speculation: SpeculationConfig | None = None,
    side_graphs: Collection[str] = (),
    also: Sequence[Path] = (),
) -> WorldVLNPolicy:
    """Open a bundle, check it, and load the graphs that a flight needs.

    Args:
        bundle_folder: what `worldvln-edge export` wrote.
        backend: what runs the graphs, see `backends.open_engines`.
        threads: CPU threads per engine call; 0 lets ONNX Runtime choose.
        profiles: see `WorldVLNPolicy`.
        profile: see `WorldVLNPolicy`.
        speculation: see `WorldVLNPolicy`.
        side_graphs: to load besides those that a flight needs.
        also: other exports of the same checkpoint, whose world model's steps profiles may use by their precision.

    Raises:
        BundleError: missing or corrupt bundle.
        ConfigError: an unknown profile, or one that does not fit the model.
        LatencyModelError: the bundle was tuned here, and exported again since.
        BackendError: the backend cannot fly the bundle here.
        EngineError: a graph does not load here.
        DeviceMemoryError: the GPU has no room.
    """
    bundle = Bundle.open(bundle_folder)
    tokenizer = PromptTokenizer.load(
        bundle.file_path(TOKENIZER_FILE), bundle.manifest.model.world_model.text_max_tokens
    )
    engines, opened = open_engines(bundle, (*FLIGHT_GRAPHS, *side_graphs), backend=backend, threads=threads)
    with ExitStack() as undo:
        undo.callback(opened.close)
        step_engines: dict[str, Engine] = {}
        for folder in also:
            other = Bundle.open(folder)
            _check_alike(bundle, other)
            loaded, on = open_engines(other, (graphs.WORLD_MODEL_STEP,), backend=backend, threads=threads)
            opened.ends.callback(on.close)
            step_engines[other.manifest.precision] = loaded[graphs.WORLD_MODEL_STEP]
        policy = WorldVLNPolicy(
            bundle.manifest,
            engines,
            tokenizer,
            backend=opened,
            profiles=profiles,
            profile=profile,
            latency=read_model(bundle.folder, bundle.manifest, opened.machine, threads),
            speculation=speculation,
            step_engines=step_engines,
        )
        undo.pop_all()
    return policy


def _check_alike(bundle: Bundle, other: Bundle) -> None:
    """Raise ConfigError unless both are the same model, and their steps can share one cache."""
    ours, theirs = bundle.manifest, other.manifest
    where = f"{other.folder} cannot be flown together with {bundle.folder}"
    if (ours.checkpoint_sha256, ours.model) != (theirs.checkpoint_sha256, theirs.model):
        raise ConfigError(f"{where}: it was exported from another checkpoint; export both from the same one")
    if theirs.precision == ours.precision:
        raise ConfigError(f"{where}: both are {ours.precision}; name an export of another precision")
    step = graphs.WORLD_MODEL_STEP
    if (ours.graphs[step].inputs, ours.kv_flavour) != (theirs.graphs[step].inputs, theirs.kv_flavour):
        raise ConfigError(
            f"{where}: it computes in {theirs.compute} with a {theirs.kv_flavour} cache, the other in {ours.compute} "
            f"with a {ours.kv_flavour} one; export it with --compute {ours.compute} and the same cache"
        )
