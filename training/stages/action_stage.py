"""Latent to action (`action`) as the trainer runs it: decoder features of flights to their motions.

A row is a flight. It shows all windows of its true frames (or, drawn per row, of its segments with predicted frames
behind the observed ones), or a number of windows drawn at random. Tokens are computed once a frame, windows in chunks.

Legend: F frames, K windows of W frames, N tokens of a frame, D width; deltas [dyaw, dpitch, droll, tx, ty, tz].
Source: spec/training.md 4.2-4.6, 8.3, 8.6.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import msgspec
import numpy as np
import torch
from torch import Tensor, nn

from worldvln_edge.action_windows import LabelStats, average_windows, window_starts
from worldvln_edge.config import ConfigError, ModelConfig
from worldvln_edge.models.action_decoder import LatentActionHead
from worldvln_edge.models.video_vae import VideoVAE
from worldvln_edge.training.stages.chunked import adapter_tokens, window_logits
from worldvln_edge.training.stages.decoder_features import DecodedFlight, DecoderFeatures
from worldvln_edge.training.stages.flight_windows import FrameRun, draw_windows, gather_run, segment_runs, whole_run
from worldvln_edge.training.stages.motion_loss import (
    MotionSchedule,
    average_deltas,
    endpoint_loss,
    logged_errors,
    motion_terms,
)
from worldvln_edge.training.stages.motion_validation import MotionValidation
from worldvln_edge.training.stages.row_plan import RowPlan, held_out_deltas, recorded_deltas, require
from worldvln_edge.training.trainer.stage import MicroBatch, ParameterGroup, row_generator


class ActionStageConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Defaults are the published values; those of the small presets stand beside them."""

    step_rows: int = 24
    """Published: 8 sequences, 3 batches accumulated. Small presets: 64."""
    micro_rows: int = 1
    windows: int = 0
    """Windows drawn of a row; 0: all of them. Small presets: 1, so that a step sees many flights."""
    predicted_share: float = 0.0
    """Of rows (of windows, if they are drawn) that see predicted frames behind observed ones. Small presets: 0.6."""
    weights: MotionSchedule = MotionSchedule()
    endpoint: float = 0.0
    """Weight of the endpoint term, in 1/m^2 and 1/rad^2; needs all windows of a row."""
    head_rate: float = 10.0
    """Multiple of the learning rate for the last linear layer. Small presets: 1."""
    adapter_rate: float = 2.0
    """Small presets: 1."""
    freeze_adapter_epochs: int = 6
    """Small presets: 0."""
    freeze_backbone_epochs: int = 0
    """Epochs in which only head and adapter learn, not the rest of the TimesFormer."""
    vae_rate: float = 0.0
    """Multiple of the learning rate for the VAE's decoder; 0: frozen, and no graph of it is built."""
    freeze_vae_epochs: int = 20
    frames_chunk: int = 0
    """Frames that the adapter keeps in memory at once; 0: all."""
    windows_chunk: int = 24
    """Windows that the TimesFormer keeps in memory at once; 0: all."""
    held_out_rows: int = 128

    def __post_init__(self) -> None:
        require(self, "action", ">= 1", lambda n: n >= 1, ("step_rows", "micro_rows"))
        counts = ("windows", "freeze_adapter_epochs", "freeze_backbone_epochs", "freeze_vae_epochs", "frames_chunk")
        rates = ("windows_chunk", "held_out_rows", "endpoint", "head_rate", "adapter_rate", "vae_rate")
        require(self, "action", ">= 0", lambda n: n >= 0, counts + rates)
        require(self, "action", "from 0 to 1", lambda n: 0 <= n <= 1, ("predicted_share",))
        if self.endpoint and self.windows:
            raise ConfigError("action.endpoint needs all windows of a row: set action.windows to 0")


@dataclass(frozen=True, kw_only=True)
class MotionRow:
    """One flight of a batch: its frames, or the codes that they are decoded from, and the runs that are shown of it."""

    flight: DecodedFlight | None
    features_CFhw: Tensor | None
    """Of all frames of all runs, one run behind the other; None where codes are decoded in the step."""
    runs: list[FrameRun]
    target_KW6: Tensor
    """float32 [K, W-1, 6]: normalised motions of every window of the runs."""
    motion_N6: Tensor
    """float32 [F-1, 6]: motions of the whole flight in rad and m."""


def _is_predicted(batch: list[MotionRow], window: int) -> list[bool]:
    """For every window of a batch, whether its run has predicted frames."""
    return [run.has_predictions for row in batch for run in row.runs for _ in range(run.count - window + 1)]


class ActionStage:
    """See `Stage`. `network` holds `head` (a LatentActionHead) and, if it is trained, the VAE's `decoder`, `proj_up`.

    Args:
        head: trained in place.
        config: of the model.
        features: of the training flights; with a predictor if `predicted_share` is above 0.
        training: hyper-parameters.
        seed: of order and draws.
        stats: label statistics; None computes them from the training flights. Kept in `stats`.
        vae: that of `features`; needed if `vae_rate` is above 0.
        held_out: the same of other flights.
        shuffled: control: true latents of the held-out flights as `ShuffledFlights`. None: it is not measured.

    Raises:
        ConfigError: options that do not fit each other.
        StageDataError: no flight is long enough, or one without recorded motion.
    """

    name = "action"

    def __init__(
        self,
        head: LatentActionHead,
        config: ModelConfig,
        features: DecoderFeatures,
        training: ActionStageConfig,
        *,
        seed: int,
        stats: LabelStats | None = None,
        vae: VideoVAE | None = None,
        held_out: DecoderFeatures | None = None,
        shuffled: DecoderFeatures | None = None,
    ):
        if training.predicted_share and not features.has_predictions:
            raise ConfigError("action.predicted_share needs features with a predictor (a trained world model), or 0")
        if training.vae_rate and (vae is None or features.keep != "codes"):
            raise ConfigError("action.vae_rate trains the decoder: keep codes, not features, and pass the VAE; or 0")
        self._config, self._features, self._training, self._seed = config, features, training, seed
        self._window, self._held_out, self._shuffled = head.config.latent_head.window, held_out, shuffled
        self.network = nn.ModuleDict({"head": head})
        if vae is not None:
            vae.requires_grad_(False)
            if training.vae_rate:
                self.network.update({"decoder": vae.decoder, "proj_up": vae.proj_up})
        self._plan = RowPlan(
            features.flights,
            self.name,
            shortest=self._window,
            seed=seed,
            step_rows=training.step_rows,
            micro_rows=training.micro_rows,
        )
        self._held_out_deltas = held_out_deltas(
            held_out.flights if held_out else None, training.held_out_rows, shortest=self._window, stage=self.name
        )
        self._head = head
        self.stats = stats or LabelStats.of_labels(np.concatenate([self._deltas(row) for row in self._plan.rows]))
        self.epoch_started(0)

    def parameter_groups(self) -> Sequence[ParameterGroup]:
        rates, last = self._training, self._head.tsformer.head
        groups = [
            ParameterGroup(parameters=list(last.parameters()), rate=rates.head_rate),
            ParameterGroup(parameters=list(self._head.adapter.parameters()), rate=rates.adapter_rate),
        ]
        if rates.vae_rate:
            groups.append(ParameterGroup(parameters=self._vae_parameters(), rate=rates.vae_rate))
        return groups

    def epoch_started(self, epoch: int) -> None:
        rates, last = self._training, set(self._head.tsformer.head.parameters())
        for parameter in self._head.adapter.parameters():
            parameter.requires_grad_(epoch >= rates.freeze_adapter_epochs)
        for name, parameter in self._head.tsformer.named_parameters():
            is_used = not name.startswith("patch_embed.")  # part of the layout, and read by the RGB head only
            parameter.requires_grad_(is_used and (parameter in last or epoch >= rates.freeze_backbone_epochs))
        for parameter in self._vae_parameters():
            parameter.requires_grad_(epoch >= rates.freeze_vae_epochs)
        coefficients = self._training.weights.at(epoch) | {"endpoint": self._training.endpoint}
        self.coefficients: Mapping[str, float] = {name: weight for name, weight in coefficients.items() if weight}

    def plan(self, epoch: int) -> Sequence[Sequence[MicroBatch]]:
        return self._plan.steps(epoch)

    def row_name(self, row: int) -> str:
        return self._features.flights.name(row)

    def load(self, epoch: int, rows: MicroBatch) -> list[MotionRow]:
        return [self._load_row(row, row_generator(self._seed, epoch, row)) for row in rows]

    def weights(self, batch: list[MotionRow]) -> Mapping[str, float]:
        weights = dict.fromkeys(("rotation", "xy", "z"), float(len(batch)))
        if self._training.endpoint:
            weights["endpoint"] = float(sum(len(row.runs) for row in batch))
        kinds = _is_predicted(batch, self._window)
        counts = {"mse_true": kinds.count(False), "mse_predicted": kinds.count(True)}
        return weights | {name: float(count) for name, count in counts.items() if count}

    def totals(self, batch: list[MotionRow]) -> Mapping[str, Tensor]:
        features = torch.cat([self._row_features(row) for row in batch], 1)
        predicted = self._predict(features, [run for row in batch for run in row.runs])
        target = torch.cat([row.target_KW6 for row in batch]).to(predicted.device)
        # A flight counts alike, whatever its length: its windows share a weight of 1.
        shares = torch.cat([torch.full((len(row.target_KW6),), 1 / len(row.target_KW6)) for row in batch])
        shares = shares.to(predicted.device)
        totals = {name: (values * shares).sum() for name, values in motion_terms(predicted, target).items()}
        squared = logged_errors(predicted, target)
        kinds = torch.tensor(_is_predicted(batch, self._window), device=predicted.device)
        for name, chosen in (("mse_true", ~kinds), ("mse_predicted", kinds)):
            if chosen.any():
                totals[name] = squared[chosen].sum()
        if self._training.endpoint:
            totals["endpoint"] = self._endpoints(predicted, batch)
        return totals

    @property
    def best_metric(self) -> str:
        """Mean endpoint distance; of segments with predicted frames, as in flight, where those are known."""
        has_predictions = self._held_out is not None and self._held_out.has_predictions
        return "predicted_endpoint_m" if has_predictions else "endpoint_m"

    @torch.no_grad()
    def validate(self) -> Mapping[str, float]:
        """Errors over held-out flights, see `MotionValidation.metrics`."""
        if self._held_out is None:
            return {}
        report = MotionValidation(self._config, self.stats)
        for row, deltas in self._held_out_deltas.items():
            flight = self._held_out.decode(self._held_out.load(row))
            whole, ahead, control = whole_run(flight.true.shape[1]), None, None
            if flight.predicted is not None:
                ahead = [
                    self._motion(gather_run(flight.true, flight.predicted, run), run)[run.observed - run.first :]
                    for run in segment_runs(whole.count, self._config)
                ]
            if self._shuffled is not None:
                control = self._motion(self._shuffled.decode(self._shuffled.load(row)).true, whole)
            report.add(deltas, self._motion(flight.true, whole), shuffled_N6=control, ahead=ahead)
        return report.metrics()

    def _load_row(self, row: int, generator: torch.Generator) -> MotionRow:
        flight = self._features.load(row)
        frames, share = self._features.flights.frame_count(row), self._training.predicted_share
        if self._training.windows:
            runs = draw_windows(
                frames,
                self._config,
                window=self._window,
                count=self._training.windows,
                predicted_share=share,
                generator=generator,
            )
        else:
            segments = segment_runs(frames, self._config)
            is_predicted = bool(segments) and float(torch.rand((), generator=generator)) < share
            runs = segments if is_predicted else [whole_run(frames)]
        deltas = self._deltas(row)
        first = np.concatenate([run.first + np.array(window_starts(run.count, self._window)) for run in runs])
        target = self.stats.normalise(deltas)[first[:, None] + np.arange(self._window - 1)]
        if not any(run.has_predictions for run in runs):
            flight = DecodedFlight(true=flight.true, predicted=None)  # codes that nobody looks at are not decoded
        is_decoded = self._features.keep == "features"
        features = [gather_run(flight.true, flight.predicted, run) for run in runs] if is_decoded else []
        return MotionRow(
            flight=None if is_decoded else flight,
            features_CFhw=torch.cat(features, 1) if is_decoded else None,
            runs=runs,
            target_KW6=torch.from_numpy(target),
            motion_N6=torch.from_numpy(deltas),
        )

    def _row_features(self, row: MotionRow) -> Tensor:
        """[C, frames of all runs, h, w], float32 on the head's device."""
        if row.features_CFhw is not None:
            return row.features_CFhw.to(self._device).float()
        assert row.flight is not None
        is_trained = any(parameter.requires_grad for parameter in self._vae_parameters())
        with torch.set_grad_enabled(torch.is_grad_enabled() and is_trained):
            flight = self._features.decode(row.flight)
        return torch.cat([gather_run(flight.true, flight.predicted, run) for run in row.runs], 1).to(self._device)

    def _predict(self, features_CFhw: Tensor, runs: Sequence[FrameRun]) -> Tensor:
        """Normalised motions [K, W-1, 6] of all windows of the runs, whose frames lie one run behind the other."""
        tokens = adapter_tokens(self._head.adapter, features_CFhw, self._training.frames_chunk)
        starts, first = [], 0
        for run in runs:
            starts += [first + start for start in window_starts(run.count, self._window)]
            first += run.count
        logits = window_logits(self._head.tsformer, tokens, starts, self._training.windows_chunk)
        return logits.unflatten(-1, (self._window - 1, 6))

    def _motion(self, features_CFhw: Tensor, run: FrameRun) -> np.ndarray:
        """Averaged motions [count-1, 6] of a run in rad and m."""
        deltas = self.stats.denormalise(self._predict(features_CFhw.to(self._device), [run]).cpu().numpy())
        return average_windows(deltas, window_starts(run.count, self._window), run.count)[1:]

    def _endpoints(self, predicted_KW6: Tensor, batch: list[MotionRow]) -> Tensor:
        """Summed endpoint losses of all runs of all rows."""
        mean, std = (torch.from_numpy(part).to(predicted_KW6) for part in (self.stats.mean, self.stats.std))
        total, first = predicted_KW6.new_zeros(()), 0
        for row in batch:
            true = row.motion_N6.to(predicted_KW6)
            for run in row.runs:
                starts = window_starts(run.count, self._window)
                deltas = predicted_KW6[first : first + len(starts)] * std + mean
                motion = average_deltas(deltas, starts, run.count)
                total = total + endpoint_loss(motion, true[run.first : run.first + run.count - 1])
                first += len(starts)
        return total

    def _deltas(self, row: int) -> np.ndarray:
        return recorded_deltas(self._features.flights, row, self.name)

    def _vae_parameters(self) -> list[nn.Parameter]:
        return [p for name in ("decoder", "proj_up") if name in self.network for p in self.network[name].parameters()]

    @property
    def _device(self) -> torch.device:
        return next(self._head.parameters()).device
