"""RGB stage: terms sum over rows, windows carry their motion, and held-out flights show what was learnt."""

import msgspec
import numpy as np
import pytest
import torch
from memory_flights import MemoryFlights
from small_models import tiny_config
from torch import Tensor

from worldvln_edge.config import ConfigError
from worldvln_edge.images import rgb_head_input
from worldvln_edge.models.action_decoder import RgbActionHead
from worldvln_edge.training.stages.motion_loss import motion_terms
from worldvln_edge.training.stages.rgb_stage import RgbStage, RgbStageConfig
from worldvln_edge.training.stages.row_plan import StageDataError

pytestmark = pytest.mark.filterwarnings("ignore:.*are left out")
CONFIG = tiny_config(clips_per_segment=2)
FRAMES = CONFIG.horizon.num_frames
WINDOW = CONFIG.action_decoder.rgb_head.window
FLIGHTS = MemoryFlights(CONFIG, (FRAMES, 9, FRAMES, 3))


def rgb_stage(training: RgbStageConfig | None = None, **options) -> RgbStage:
    torch.manual_seed(0)
    head = RgbActionHead(CONFIG.action_decoder, time_embed_std=0.7).eval()
    return RgbStage(head, CONFIG, FLIGHTS, training or RgbStageConfig(), seed=0, **options)


def loss_of(stage: RgbStage, batches: list) -> Tensor:
    totals, weights = [stage.totals(b) for b in batches], [stage.weights(b) for b in batches]
    return sum(
        coefficient * sum(part[name] for part in totals) / sum(part[name] for part in weights)
        for name, coefficient in stage.coefficients.items()
    )


def gradients(stage: RgbStage, batches: list) -> dict[str, Tensor]:
    stage.network.zero_grad()
    loss_of(stage, batches).backward()
    return {name: p.grad.clone() for name, p in stage.network.named_parameters() if p.grad is not None}


def test_the_cut_into_micro_batches_does_not_matter():
    stage = rgb_stage(RgbStageConfig(windows=2))
    together = gradients(stage, [stage.load(1, [0, 1, 2])])
    apart = gradients(stage, [stage.load(1, [2]), stage.load(1, [0, 1])])
    assert together.keys() == dict(stage.network.named_parameters()).keys()
    for name, gradient in together.items():
        torch.testing.assert_close(apart[name], gradient, atol=1e-5, rtol=1e-4)


def test_the_motion_loss_is_that_of_the_window():
    stage = rgb_stage(RgbStageConfig(flow=0.0))
    batch = stage.load(0, [2])
    starts = [s for s in range(FRAMES - WINDOW + 1) if _images(2, s).equal(batch.images_BW3HW[0])]
    assert len(starts) == 1
    labels = torch.from_numpy(stage.stats.normalise(FLIGHTS.deltas(2)[starts[0] : starts[0] + WINDOW - 1]))
    assert labels.equal(batch.target_BM6[0])
    logits = stage.network["head"](batch.images_BW3HW[0]).unflatten(-1, (WINDOW - 1, 6))
    expected = sum(term.mean() for term in motion_terms(logits, labels[None]).values())
    assert float(loss_of(stage, [batch]).detach()) == pytest.approx(float(expected.detach()), rel=1e-5)


def _images(row: int, start: int) -> Tensor:
    decoder = CONFIG.action_decoder
    frames = list(FLIGHTS.frames(row)[start : start + WINDOW])
    return torch.from_numpy(rgb_head_input(frames, decoder.rgb_head.image_hw, decoder.rgb_mean, decoder.rgb_std))


def test_flow_is_in_units_of_its_deviation_and_can_be_left_out():
    stage = rgb_stage(RgbStageConfig(windows=12))
    spread = float(stage.load(0, [0, 1, 2]).flow_BM2hw.std())
    assert 0.5 < spread < 2
    without = rgb_stage(RgbStageConfig(flow=0.0))
    batch = without.load(0, [0])
    assert "flow" not in without.totals(batch)
    assert set(without.network) == {"head"}
    assert without.totals(batch).keys() == without.weights(batch).keys()


def test_short_flights_are_left_out_and_draws_belong_to_epoch_and_row():
    stage = rgb_stage(RgbStageConfig(step_rows=2))
    assert sorted(row for step in stage.plan(0) for micro in step for row in micro) == [0, 1, 2]
    assert stage.load(1, [0, 2]).images_BW3HW[1].equal(stage.load(1, [2]).images_BW3HW[0])
    assert any(not stage.load(e, [2]).target_BM6.equal(stage.load(0, [2]).target_BM6) for e in range(1, 5))


def test_training_lowers_the_errors_of_validation():
    stage = rgb_stage(RgbStageConfig(windows=8, flow=0.0), held_out=FLIGHTS)
    before = dict(stage.validate())
    optimiser = torch.optim.AdamW(stage.network.parameters(), lr=4e-3)
    for epoch in range(100):
        optimiser.zero_grad()
        loss_of(stage, [stage.load(epoch, [0, 1, 2])]).backward()
        optimiser.step()
    after = dict(stage.validate())
    assert before["nmse_x"] > 0.9
    assert after["nmse_x"] < 0.75
    assert after["shuffled_nmse_x"] > 0.9
    assert {stage.best_metric, "segment_endpoint_m", "yaw_deg"} <= after.keys()
    assert not any(name.startswith("predicted_") for name in after)


def test_without_held_out_flights_there_are_no_metrics():
    assert rgb_stage().validate() == {}


def test_options_and_flights_that_cannot_work_are_refused():
    with pytest.raises(ConfigError, match=r"rgb_head.windows must be >= 1"):
        RgbStageConfig(windows=0)
    with pytest.raises(msgspec.ValidationError, match="unknown field"):
        msgspec.convert({"flow_weight": 1.0}, RgbStageConfig)
    head = RgbActionHead(CONFIG.action_decoder)
    still = MemoryFlights(CONFIG, (FRAMES,), has_motion=False)
    with pytest.raises(StageDataError, match="rgb_head: memory row 0 has no recorded motion"):
        RgbStage(head, CONFIG, still, RgbStageConfig(), seed=0)
    cut = MemoryFlights(CONFIG, (9,))
    cut.motions[0] = np.zeros((3, 6), np.float32)
    with pytest.raises(StageDataError, match="8 rows of 6 finite numbers"):
        RgbStage(head, CONFIG, cut, RgbStageConfig(), seed=0)
