"""Which graph calls a segment needs, what a session keeps in memory, and a roofline estimate of the seconds.

Two schedules: the exact minimal one, and the full horizon that the reference runs for every segment.
Legend: L text tokens.
Source: spec/world_model.md 6.1, 7, 9.1-9.3; spec/video_vae.md 8; spec/action_decoder.md 4, 10.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from worldvln_edge.action_windows import context_frame
from worldvln_edge.export.cost_model import CallCost, CostModel
from worldvln_edge.export.devices import Device
from worldvln_edge.runtime.worldvln.graphs import TEXT_ENCODER, WORLD_MODEL_CONTEXT, WORLD_MODEL_STEP
from worldvln_edge.scale_schedule import Clip, ScaleSchedule

Key = tuple[int, int]  # (clip, scale)


@dataclass(frozen=True, kw_only=True)
class SegmentCost:
    """All graph calls of one segment, in order."""

    calls: tuple[CallCost, ...]

    @property
    def token_steps(self) -> int:
        """Tokens per guidance row through the world model."""
        return sum(call.tokens for call in self.calls)

    @property
    def world_model_calls(self) -> int:
        return sum(call.graph in (WORLD_MODEL_CONTEXT, WORLD_MODEL_STEP) for call in self.calls)

    @property
    def flops(self) -> int:
        return sum(call.flops for call in self.calls)

    @property
    def flops_by_graph(self) -> dict[str, int]:
        sums: dict[str, int] = {}
        for call in self.calls:
            sums[call.graph] = sums.get(call.graph, 0) + call.flops
        return sums


@dataclass(frozen=True, kw_only=True)
class GraphWeights:
    """What a call of a graph reads before it can compute."""

    size_bytes: int
    precision: str  # of most of the weights
    compute: str  # of the activations: fp32, fp16 or bf16

    @property
    def activation_bytes(self) -> int:
        return 4 if self.compute == "fp32" else 2

    @property
    def product_precision(self) -> str:
        """What products with the weights are computed in: 4-bit weights are widened first."""
        return self.compute if self.precision == "int4" else self.precision


class FlightCosts:
    """Calls of every segment of a flight.

    Args:
        model: cost formulas of the graphs.
        text_tokens: L, prompt tokens.
    """

    def __init__(self, model: CostModel, text_tokens: int):
        self.model = model
        self.text_tokens = text_tokens
        horizon, self._stride = model.config.horizon, model.config.video_vae.temporal_stride
        self.points = horizon.points
        self.segments = horizon.segments
        self.schedule = ScaleSchedule(model.config.schedule, 1 + (horizon.num_frames - 1) // self._stride)

    def minimal(self, segment: int) -> SegmentCost:
        """Calls when nothing is computed twice and keys are computed when they are first needed (9.2).

        The runtime computes the same keys and values as soon as their clip is observed: same total over a flight, the
        first segment up to the third differ by a few hundred tokens.
        """
        calls = self._observe(segment)
        generated = self._generated(segment)
        if segment == 0:
            calls += [self.model.text_encoder(self.text_tokens), self.model.context(self.text_tokens, 0)]
        ready = {key for earlier in range(segment) for key in self._needed(earlier)}
        for key in sorted(self._needed(segment) - ready):
            step = self.schedule.last_step(*key)
            calls.append(self.model.latent_embed(step.tokens))
            calls.append(self.model.context(step.tokens, self._past(*key)))
        for clip in generated:
            calls += [self.model.step(step.thw, self._past(clip.index, step.scale)) for step in clip.steps]
        calls.append(self.model.vae_decoder(False, sum(clip.frames for clip in generated)))
        observed, following = self.points[segment], self.points[segment + 1]
        left = self.model.config.action_decoder.left_context
        calls.append(self.model.action_adapter(following - observed))
        calls.append(self.model.action_head(following - context_frame(observed, left) + 1))
        return SegmentCost(calls=tuple(calls))

    def full_horizon(self, segment: int) -> SegmentCost:
        """Calls of the reference: text, all steps of all clips, VAE and adapter over the whole horizon (7, 9.3).

        Its debug videos and its dead observation cache are left out.
        """
        model, stride = self.model, self._stride
        observed, following = self.points[segment], self.points[segment + 1]
        calls = [model.text_encoder(self.text_tokens), model.context(self.text_tokens, 0)]
        calls.append(model.vae_encoder(True, 1))
        calls.append(model.vae_decoder(True, 1))  # the decoded prefix is not used
        if observed > 1:
            calls.append(model.vae_encoder(False, observed - 1))
            calls.append(model.vae_decoder(False, (observed - 1) // stride))
        calls += [model.step(step.thw, self._past(step.clip, step.scale)) for step in self.schedule.steps()]
        calls += [model.vae_decoder(True, 1), model.vae_decoder(False, self.schedule.latent_frames - 1)]
        calls.append(model.action_adapter(1 + stride * (self.schedule.latent_frames - 1)))
        left = model.config.action_decoder.left_context
        calls.append(model.action_head(following - context_frame(observed, left) + 1))
        return SegmentCost(calls=tuple(calls))

    def stored_entries(self) -> int:
        """Most entries of earlier scales that a session keeps beside its cache, text included.

        Follows `runtime/worldvln/kv_cache.py`: a scale is stored when it was computed and dropped after the next
        clip was observed, if no later clip refers to it.
        """
        stored: dict[Key, int] = {}
        most = 0
        for segment in range(self.segments):
            for clip in self._observed(segment):
                scales = self._kept_scales(clip.index)
                stored.update({(clip.index, s): self.schedule.last_step(clip.index, s).tokens for s in scales})
                most = max(most, sum(stored.values()))
                later = range(clip.index + 1, len(self.schedule.clips))
                wanted = {key for index in later for key in self.schedule.references(index)}
                stored = {key: tokens for key, tokens in stored.items() if key in wanted}
            generated = self._generated(segment)
            for clip in generated:
                own = self.model.config.schedule.context_from_largest_no <= 0
                scales = range(self.schedule.config.scales_per_clip) if own else self._kept_scales(clip.index)
                if own or clip is not generated[-1]:
                    stored.update({(clip.index, s): self.schedule.last_step(clip.index, s).tokens for s in scales})
            most = max(most, sum(stored.values()))
        return self.text_tokens + most

    def activation_peak(self, segment_calls: tuple[CallCost, ...], weights: Mapping[str, GraphWeights]) -> int:
        """Bytes of the widest call. An estimate: engines reuse, fuse and pad as they like."""
        return max(call.activation_elements * weights[call.graph].activation_bytes for call in segment_calls)

    def _observe(self, segment: int) -> list[CallCost]:
        """Encoder, committed decode and context tokens of the clips that a segment newly rests on."""
        calls = []
        left = self.model.config.action_decoder.left_context
        for clip in self._observed(segment):
            first = clip.index == 0
            frames = 1 if first else clip.frames * self._stride
            calls.append(self.model.vae_encoder(first, frames))
            calls.append(self.model.vae_decoder(first, clip.frames))
            calls.append(self.model.action_adapter(min(left, frames)))
        return calls

    def _observed(self, segment: int) -> list[Clip]:
        start = self._latents(self.points[segment - 1]) if segment else 0
        return [clip for clip in self.schedule.clips if start <= clip.first_frame < self._latents(self.points[segment])]

    def _generated(self, segment: int) -> list[Clip]:
        first, end = self._latents(self.points[segment]), self._latents(self.points[segment + 1])
        return [clip for clip in self.schedule.clips if first <= clip.first_frame < end]

    def _latents(self, frames: int) -> int:
        return 1 + (frames - 1) // self._stride

    def _kept_scales(self, clip: int) -> tuple[int, ...]:
        return self.schedule.scales_referred_to(clip)

    def _needed(self, segment: int) -> set[Key]:
        """Observed scales that the generated clips refer to, and what those refer to in turn (9.1 c)."""
        made = {clip.index for clip in self._generated(segment)}
        waiting = [key for clip in made for key in self.schedule.references(clip)]
        needed: set[Key] = set()
        while waiting:
            key = waiting.pop()
            if key[0] in made or key in needed:
                continue
            needed.add(key)
            waiting += self.schedule.references_of_scale(*key)
        return needed

    def _past(self, clip: int, scale: int) -> int:
        """Visible entries in front of a scale's own: text and referred scales."""
        keys = self.schedule.references_of_scale(clip, scale)
        return self.text_tokens + sum(self.schedule.last_step(*key).tokens for key in keys)


def roofline_seconds(cost: SegmentCost, device: Device, weights: Mapping[str, GraphWeights]) -> float:
    """Lower bound of a segment's seconds: sum over calls of max(operations / peak rate, bytes / bandwidth).

    Every call reads its weights once. Nothing is added for launches, for elementwise work, for activations that leave
    the chip inside a graph, or for what the host does; no engine reaches its peak. Real segments take longer.

    Args:
        cost: calls of the segment.
        device: peak figures.
        weights: graph name -> its weights and what it computes in.
    """
    seconds = 0.0
    for call in cost.calls:
        graph = weights[call.graph]
        moved = graph.size_bytes + (call.kv_elements + call.io_elements) * graph.activation_bytes
        if call.graph == TEXT_ENCODER:
            moved = graph.size_bytes  # of the vocabulary only a few rows are read, which the weights' bytes outweigh
        compute = 2 * call.weight_macs / device.rate(graph.product_precision)
        compute += 2 * call.attention_macs / device.rate(graph.compute)
        seconds += max(compute, moved / device.bandwidth)
    return seconds
