"""World model driver: text and observed clips into the KV cache, then one clip generated scale by scale.

Holds the state of one flight. The engine does all arithmetic on tokens; this file is the schedule.

Legend: B guidance rows, n tokens of a step, C width, D latent channels, T latent frames, H W latent rows and columns.
Source: spec/world_model.md 6, 9.2.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np

from worldvln_edge.generation_profile import EXACT, GenerationProfile
from worldvln_edge.noise import step_uniforms
from worldvln_edge.rope import text_rope
from worldvln_edge.runtime.engines.engine import Engine, Tensor
from worldvln_edge.runtime.sessions.policy import StoppedError
from worldvln_edge.runtime.worldvln.graphs import LATENT_EMBED, WORLD_MODEL_CONTEXT, WORLD_MODEL_STEP, cache_stems
from worldvln_edge.runtime.worldvln.kv_cache import TEXT, Key, KVCache, KVEntries
from worldvln_edge.runtime.worldvln.multiscale import ObservedClip
from worldvln_edge.runtime.worldvln.scale_tables import ScaleTables
from worldvln_edge.scale_schedule import ScaleStep

EXACT_PROFILE = GenerationProfile(name=EXACT)
T = TypeVar("T")
_NO_GUIDANCE = np.ones((), np.float32)  # the guided sum is then the instruction's row


@dataclass(frozen=True, kw_only=True)
class GeneratedClip:
    """What a generation left behind."""

    codes: np.ndarray  # float32 [D, T, H, W]
    bits: tuple[np.ndarray, ...]  # per step: bool [T, h, w, d]
    probabilities: tuple[np.ndarray, ...]  # per step: float32 [T, h, w, d], of bit = 1

    @property
    def arrays(self) -> tuple[np.ndarray, ...]:
        """All of them."""
        return (self.codes, *self.bits, *self.probabilities)


def run_to_end(steps: Generator[None, None, T], should_stop: Callable[[], bool] = lambda: False) -> T:
    """What a generator returns, all its steps taken at once.

    Raises:
        StoppedError: `should_stop` said so between two steps.
    """
    while True:
        if should_stop():
            raise StoppedError("stopped between two steps of the world model")
        try:
            next(steps)
        except StopIteration as end:
            return end.value


class WorldModelDriver:
    """Context and generation of one flight.

    Keys and values of an observed scale are made when a clip that refers to it is prepared, not before: `prepare` is
    what a segment has to wait for, `work_ahead` what may be done while its actions are flown.

    A call that an engine failed in may be made again: engines write behind the visible part of the cache, and what
    such a call kept before it failed stays kept.
    """

    def __init__(
        self,
        engines: Mapping[str, Engine],
        tables: ScaleTables,
        cache: KVCache,
        *,
        step_engines: Mapping[str, Engine] | None = None,
    ):
        """
        Args:
            engines: graph name -> engine.
            tables: of the schedule.
            cache: of this flight.
            step_engines: precision -> `world_model_step` for the profiles that name another than the bundle's.
        """
        self._engines, self._step_engines = engines, step_engines or {}
        self._tables = tables
        self._cache = cache
        self._stems = cache_stems(tables.config.world_model.depth)
        self._rows = cache.workspace.memory.rows
        self._observed: list[ObservedClip] = []
        self._draws: dict[tuple[int, int], tuple[np.ndarray, ...]] = {}
        self.token_steps = 0  # tokens per guidance row, the measure of spec/world_model.md 9.3
        self.row_steps = 0  # the same over all rows: a step without guidance counts half of one with it
        self.calls = 0

    def branch(self) -> WorldModelDriver:
        """A driver that goes on from here by itself: it shares what was stored, and counts its own work."""
        other = WorldModelDriver(self._engines, self._tables, self._cache.branch(), step_engines=self._step_engines)
        other._observed = list(self._observed)
        other._draws = dict(self._draws)
        return other

    @property
    def has_text(self) -> bool:
        return self._cache.holds(TEXT)

    @property
    def stored_scales(self) -> tuple[tuple[int, int], ...]:
        """(clip, scale) pairs whose keys and values are stored."""
        return tuple(key for key in self._cache.stored_keys if not isinstance(key, str))

    @property
    def kv_bytes(self) -> int:
        """Keys and values that are stored, the text's included."""
        return self._cache.size_bytes

    @property
    def held(self) -> Iterator[Tensor]:
        """Everything that the flight holds here: keys and values, observed clips, draws."""
        yield from self._cache.held
        for clip in self._observed:
            yield from clip.arrays
        for draws in self._draws.values():
            yield from draws

    def set_text(self, text_embeds: np.ndarray) -> KVEntries:
        """Start over with another prompt: keys and values of the text are made, those of observed clips forgotten.

        Args:
            text_embeds: float32 [B, L, C].

        Returns:
            What another session with the same prompt can take over.
        """
        self._cache.clear()
        length = text_embeds.shape[1]
        rope = text_rope(length, self._tables.config.world_model.head_dim)
        self._cache.show([])
        self._run(self._engines[WORLD_MODEL_CONTEXT], length, self._rows, {"embeds": text_embeds, "rope": rope})
        return self._cache.keep(TEXT, length, self._rows)

    def take_text(self, entries: KVEntries) -> None:
        """As `set_text`, with keys and values that are there already."""
        self._cache.clear()
        self._cache.put(TEXT, entries)

    def forget_text(self) -> None:
        """The prompt changed: nothing that depends on it is kept; the observed clips are."""
        self._cache.clear()

    def finish(self) -> None:
        """No clip follows: keys, values and draws go, the observed clips are kept."""
        self._cache.clear()
        self._draws.clear()

    def clear(self) -> None:
        """Forget everything."""
        self._cache.clear()
        self._observed.clear()
        self._draws.clear()

    def observe(self, observed: ObservedClip) -> None:
        """The next clip as it was observed; what was generated in its place goes, and what was drawn for it."""
        self._observed.append(observed)
        self._draws = {key: draws for key, draws in self._draws.items() if key[1] >= len(self._observed)}
        before = [key for key in self.stored_scales if key[0] < len(self._observed) - 1]
        self._cache.drop_except([TEXT, *before])
        self._cache.drop_except([TEXT, *self._needed()])

    def rows_of(self, profile: GenerationProfile) -> int:
        """Guidance rows that a profile needs keys and values of."""
        return self._rows if profile.is_guided_at_all() else 1

    def prepare(self, clip_index: int, profile: GenerationProfile = EXACT_PROFILE) -> None:
        """Keys and values of all observed scales that a clip refers to, as far as they are missing."""
        for key in self._tables.schedule.references(clip_index):
            self._make(key, self.rows_of(profile))

    def work_ahead(self, clips: Sequence[int], seed: int, profile: GenerationProfile = EXACT_PROFILE) -> None:
        """What can be done for clips whose turn comes later: keys and values, draws; and free what nobody needs.

        Args:
            clips: of the next segment; the clips just before them are observed meanwhile.
            seed: of the draws.
            profile: that the next segment will probably be generated with.
        """
        rows = self.rows_of(profile)
        schedule, observed = self._tables.schedule, len(self._observed)
        later = range(observed, len(schedule.clips))
        lasting = {key for clip in later for key in schedule.references(clip)}
        soon = {key for clip in clips for key in schedule.references(clip)}
        for key in sorted(lasting):
            clip, scale = key
            if clip >= observed or self._cache.holds(key, rows):
                continue
            # A scale that is needed much later is made now only if what it refers to would have to be kept for it.
            if key in soon or not lasting.issuperset(schedule.references_of_scale(clip, scale)):
                self._make(key, rows)
        self._cache.drop_except([TEXT, *self._needed()])
        wanted = {(seed, clip) for clip in clips}
        self._draws = {key: value for key, value in self._draws.items() if key in wanted}
        for clip in clips:
            self._clip_draws(clip, seed)

    def generate(
        self,
        clip_index: int,
        seed: int,
        *,
        forced_bits: Sequence[np.ndarray] | None = None,
        more_follow: bool = False,
        record: bool = True,
        profile: GenerationProfile = EXACT_PROFILE,
    ) -> GeneratedClip:
        """`generation`, from its first step to its last."""
        steps = self.generation(
            clip_index, seed, forced_bits=forced_bits, more_follow=more_follow, record=record, profile=profile
        )
        return run_to_end(steps)

    def generation(
        self,
        clip_index: int,
        seed: int,
        *,
        forced_bits: Sequence[np.ndarray] | None = None,
        more_follow: bool = False,
        record: bool = True,
        profile: GenerationProfile = EXACT_PROFILE,
    ) -> Generator[None, None, GeneratedClip]:
        """Generate one clip from what was observed before it, a step at a time; others may use the engines in between.

        Args:
            clip_index: the clip; all clips before it were observed, or generated with `more_follow`.
            seed: of the draws.
            forced_bits: per step of the schedule bool [T, h, w, d] that replace the draws (tests and parity).
            more_follow: another clip of the same segment comes next and may refer to this one.
            record: bring bits and probabilities to the host; without it those of the result are empty.
            profile: how deep.
        """
        self.prepare(clip_index, profile)
        clip, config = self._tables.schedule.clips[clip_index], self._tables.config
        kept = set(self._tables.schedule.scales_referred_to(clip_index)) if more_follow else set()
        if config.schedule.context_from_largest_no <= 0:
            kept = set(range(config.schedule.scales_per_clip))  # later scales of this clip see the earlier ones
        draws = self._clip_draws(clip_index, seed) if forced_bits is None else None
        steps = list(profile.steps(clip, config.schedule.scales_per_clip))
        codes: Tensor = self._tables.no_codes(clip)
        all_bits, all_probabilities = [], []
        for each in steps:
            step = each.step
            is_kept = each.is_last_repetition and step.scale in kept
            rows = self._rows if each.is_guided or (is_kept and profile.is_guided_at_all()) else 1
            outputs = self._step(
                step,
                codes,
                rows=rows,
                is_guided=each.is_guided,
                precision=profile.precision,
                uniforms=None if draws is None else draws[step.step_in_clip],
                forced_bits=None if forced_bits is None else forced_bits[step.step_in_clip],
                fetch=[
                    *(("next_codes",) if each is steps[-1] else ()),
                    *(("bits", "probabilities") if record else ()),
                ],
            )
            codes = outputs["next_codes"]
            if is_kept:
                self._cache.keep((clip_index, step.scale), step.tokens, rows)
            if record:
                own = self._tables.bit_slice(step)
                all_bits.append(outputs["bits"][..., own] > 0)
                all_probabilities.append(outputs["probabilities"][..., own])
            yield
        return GeneratedClip(codes=codes[0], bits=tuple(all_bits), probabilities=tuple(all_probabilities))

    def _step(
        self,
        step: ScaleStep,
        codes: Tensor,
        *,
        rows: int,
        is_guided: bool = True,
        precision: str | None = None,
        uniforms: np.ndarray | None,
        forced_bits: np.ndarray | None,
        fetch: Collection[str],
    ) -> dict[str, Any]:
        """One repetition of one scale: codes so far in, codes with its bits out.

        Args:
            step: which; what it refers to is in the cache.
            codes: float32 [1, D, T, H, W].
            rows: guidance rows to run.
            is_guided: False: the instruction's row alone decides.
            precision: of the weights; None: the bundle's.
            uniforms: float32 [T, h, w, joint bits]; None only with forced bits.
            forced_bits: bool [T, h, w, d] that replace the draws.
            fetch: outputs that are wanted on the host.
        """
        self._cache.show([TEXT, *self._tables.schedule.references_of_scale(step.clip, step.scale)])
        forced = nothing = self._tables.no_bits(step)
        if forced_bits is not None:
            forced = nothing.copy()
            forced[..., self._tables.bit_slice(step)] = forced_bits
        inputs = {
            **self._tables.constants(step),
            "codes": codes,
            "uniforms": nothing if uniforms is None else uniforms,
            "forced_bits": forced,
            "force": np.float32(forced_bits is not None).reshape(()),
            "rope": self._tables.rope(step).reshape(2, *step.thw, -1),
        }
        if not is_guided:
            inputs["guidance"] = _NO_GUIDANCE
        engine = self._step_engines.get(precision or "", self._engines[WORLD_MODEL_STEP])
        return self._run(engine, step.tokens, rows, inputs, fetch=fetch)

    def _needed(self) -> set[Key]:
        """What later clips refer to, and what the missing part of that refers to in turn."""
        schedule = self._tables.schedule
        found: set[Key] = set()
        waiting = [key for clip in range(len(self._observed), len(schedule.clips)) for key in schedule.references(clip)]
        while waiting:
            key = waiting.pop()
            if key in found:
                continue
            found.add(key)
            if not self._cache.holds(key):
                waiting += schedule.references_of_scale(*key)
        return found

    def _make(self, key: tuple[int, int], rows: int) -> None:
        """Keys and values of an observed scale, and of what it refers to."""
        if self._cache.holds(key, rows):
            return
        clip, scale = key
        references = self._tables.schedule.references_of_scale(clip, scale)
        for reference in references:
            self._make(reference, rows)
        step = self._tables.schedule.last_step(clip, scale)
        tokens = np.repeat(self._observed[clip].inputs[step.step_in_clip][None], rows, axis=0)
        embeds = self._engines[LATENT_EMBED].run({"latents": tokens}, fetch=())["embeds"]
        self._cache.show([TEXT, *references])
        context = self._engines[WORLD_MODEL_CONTEXT]
        self._run(context, step.tokens, rows, {"embeds": embeds, "rope": self._tables.rope(step)})
        self._cache.keep(key, step.tokens, rows)

    def _clip_draws(self, clip_index: int, seed: int) -> tuple[np.ndarray, ...]:
        """Uniform numbers of every step of a clip: float32 [T, h, w, bits], zero where another head's bits are."""
        key = (seed, clip_index)
        if key not in self._draws:
            draws = []
            for step in self._tables.schedule.clips[clip_index].steps:
                own, uniforms = self._tables.bit_slice(step), self._tables.no_bits(step).copy()
                width = uniforms[..., own].shape[-1]
                uniforms[..., own] = step_uniforms(seed, clip_index, step.step_in_clip, step.thw, width)
                draws.append(uniforms)
            # Draws of a seed that was replaced are not wanted any more.
            self._draws = {known: drawn for known, drawn in self._draws.items() if known[0] == seed}
            self._draws[key] = tuple(draws)
        return self._draws[key]

    def _run(
        self,
        engine: Engine,
        tokens: int,
        rows: int,
        inputs: dict[str, Tensor],
        fetch: Collection[str] | None = None,
    ) -> dict[str, Any]:
        start, end = self._cache.length, self._cache.length + tokens
        self._cache.workspace.check_room(end)
        inputs["write_index"] = np.full(rows, start, np.int64)
        inputs["kv_length"] = np.full(rows, end, np.int64)
        buffers = self._cache.workspace.memory.buffers(rows)
        results = engine.run(inputs, dict(zip(self._stems, buffers, strict=True)), fetch=fetch)
        self.token_steps += tokens
        self.row_steps += tokens * rows
        self.calls += 1
        return results
