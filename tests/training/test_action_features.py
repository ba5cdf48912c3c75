"""Kept decoder features: what they are, what they are found by, and what happens when the disk misbehaves."""

import msgspec
import pytest
import torch
from memory_flights import MemoryFlights
from safetensors.torch import save_file
from small_models import random_model, tiny_config
from torch import Tensor

from worldvln_edge.config import ConfigError
from worldvln_edge.scale_schedule import ScaleSchedule
from worldvln_edge.training.sim.shards import FlightDataError
from worldvln_edge.training.stages.decoder_features import (
    DecoderFeatures,
    decode_flight,
    observed_codes,
    weights_digest,
)
from worldvln_edge.training.stages.flight_subset import FlightSubset
from worldvln_edge.training.stages.vae import frames_to_video

CONFIG = tiny_config(clips_per_segment=2)
FRAMES = CONFIG.horizon.num_frames
MODEL = random_model(CONFIG)


class ShiftedPredictor:
    """Draws from the generator of every row, so that rows can be told apart."""

    def __init__(self, name: str = "shifted"):
        self.name = name

    def digest(self, instruction: str) -> str:
        return f"{self.name} {instruction}"

    def predict(self, latents_BCTHW, schedule, instructions, generators) -> Tensor:
        noise = torch.stack([torch.randn(latents_BCTHW.shape[1:], generator=own) for own in generators])
        return (latents_BCTHW + noise)[:, :, 1:]


@pytest.fixture
def flights() -> MemoryFlights:
    return MemoryFlights(CONFIG, (FRAMES, 9, FRAMES))


def latents_of(flights: MemoryFlights, row: int) -> Tensor:
    with torch.no_grad():
        return MODEL.vae.raw_features(MODEL.vae.encode(frames_to_video(torch.from_numpy(flights.frames(row))[None]))[0])


def test_kept_features_are_those_of_the_observed_codes(flights, tmp_path):
    features = DecoderFeatures(tmp_path, flights, MODEL.vae, CONFIG)
    assert features.prepare() == 3
    for row in range(3):
        latents = latents_of(flights, row)
        codes = observed_codes(latents, ScaleSchedule(CONFIG.schedule, latents.shape[2]), CONFIG)
        with torch.no_grad():
            expected, _ = MODEL.vae.decode_features(codes)
        kept = features.load(row)
        assert kept.true.dtype == torch.float16
        assert kept.predicted is None
        torch.testing.assert_close(kept.true.float(), expected[0], atol=1e-2, rtol=2e-3)
        assert features.decode(kept).true.dtype == torch.float32


def test_kept_codes_decode_to_the_features(flights, tmp_path):
    both = {
        keep: DecoderFeatures(tmp_path, flights, MODEL.vae, CONFIG, keep=keep, predictor=ShiftedPredictor())
        for keep in ("features", "codes")
    }
    for features in both.values():
        features.prepare()
    for row in range(3):
        codes, kept = both["codes"].load(row), both["features"].load(row)
        assert codes.true.shape[1] == 1 + codes.predicted.shape[1]
        assert kept.true.shape[1] == flights.frame_count(row) == 1 + kept.predicted.shape[1]
        with torch.no_grad():
            decoded = both["codes"].decode(codes)
        torch.testing.assert_close(decoded.true, kept.true.float(), atol=1e-2, rtol=2e-3)
        torch.testing.assert_close(decoded.predicted, kept.predicted.float(), atol=1e-2, rtol=2e-3)


def test_a_predicted_clip_is_decoded_behind_the_true_ones():
    latents = torch.randn(2, 16, 5, *CONFIG.schedule.latent_hw, generator=torch.Generator().manual_seed(0))
    schedule = ScaleSchedule(CONFIG.schedule, 5)
    with torch.no_grad():
        true, predicted = decode_flight(MODEL.vae, schedule, latents, latents[:, :, 1:])
        torch.testing.assert_close(predicted, true[:, :, 1:])  # what was predicted right decodes to the true features
        whole, _ = MODEL.vae.decode_features(latents)
        torch.testing.assert_close(true, whole, atol=1e-4, rtol=1e-4)
        other = latents[:, :, 1:].clone()
        last = schedule.clips[-1].frame_slice
        other[:, :, : last.start - 1] += 1  # another prediction of the first clips
        _, changed = decode_flight(MODEL.vae, schedule, latents, other)
    frames = (last.stop - last.start) * CONFIG.video_vae.temporal_stride
    torch.testing.assert_close(changed[:, :, -frames:], predicted[:, :, -frames:])
    assert not torch.allclose(changed[:, :, :-frames], predicted[:, :, :-frames])


def test_features_do_not_depend_on_the_rows_beside(flights, tmp_path):
    kept = []
    for folder, batch in (("one", 1), ("many", 4)):
        features = DecoderFeatures(tmp_path / folder, flights, MODEL.vae, CONFIG, predictor=ShiftedPredictor())
        features.prepare(batch=batch)
        kept.append([features.load(row) for row in range(3)])
    for one, many in zip(*kept, strict=True):
        torch.testing.assert_close(one.true, many.true, atol=1e-2, rtol=2e-3)
        torch.testing.assert_close(one.predicted, many.predicted, atol=1e-2, rtol=2e-3)


class RecordedFlights(MemoryFlights):
    """Flights with latents beside their frames."""

    scale = 1.0

    def latents(self, row: int) -> Tensor:
        generator = torch.Generator().manual_seed(row)
        frames = 1 + (self.frame_count(row) - 1) // CONFIG.video_vae.temporal_stride
        return self.scale * torch.randn(1, 16, frames, 2 + row, 3, generator=generator)


def test_recorded_latents_are_decoded_as_they_are(tmp_path):
    flights = RecordedFlights(CONFIG, (FRAMES, 9, FRAMES))
    for source in (flights, FlightSubset(flights, range(3))):
        features = DecoderFeatures(tmp_path, source, MODEL.vae, CONFIG)
        features.prepare()
        for row in range(3):
            with torch.no_grad():
                expected, _ = MODEL.vae.decode_features(flights.latents(row))
            torch.testing.assert_close(features.load(row).true.float(), expected[0], atol=1e-2, rtol=2e-3)
    flights.scale = 2.0
    assert DecoderFeatures(tmp_path, flights, MODEL.vae, CONFIG).prepare() == 3  # other latents of the same frames


def test_latents_of_another_vae_are_refused(tmp_path):
    flights = RecordedFlights(CONFIG, (9,))
    flights.latents = lambda row: torch.zeros(1, 64, 5, 2, 3)
    with pytest.raises(FlightDataError, match=r"memory row 0: latents must be \[1, 16, T, h, w\], found \[1, 64"):
        DecoderFeatures(tmp_path, flights, MODEL.vae, CONFIG).prepare()


def test_a_single_frame_has_features_and_nothing_to_predict(tmp_path):
    for keep in ("features", "codes"):
        flights = MemoryFlights(CONFIG, (1,))
        features = DecoderFeatures(tmp_path, flights, MODEL.vae, CONFIG, keep=keep, predictor=ShiftedPredictor())
        assert features.prepare() == 1
        kept = features.load(0)
        assert (kept.true.shape[1], kept.predicted) == (1, None)


def test_nothing_is_computed_twice_and_only_what_was_asked_for(flights, tmp_path):
    features = DecoderFeatures(tmp_path, flights, MODEL.vae, CONFIG)
    assert features.prepare([1]) == 1
    assert features.prepare() == 2
    assert features.prepare() == 0
    assert DecoderFeatures(tmp_path, flights, MODEL.vae, CONFIG).prepare() == 0


def test_a_change_of_content_is_computed_again(flights, tmp_path):
    def computed(flights=flights, vae=MODEL.vae, **options) -> int:
        return DecoderFeatures(tmp_path, flights, vae, CONFIG, **options).prepare()

    assert computed(predictor=ShiftedPredictor()) == 3
    assert computed(predictor=ShiftedPredictor()) == 0
    assert computed(predictor=ShiftedPredictor("other weights")) == 3
    assert computed(predictor=ShiftedPredictor(), seed=1) == 3
    assert computed(seed=0) == 3  # without predictions
    assert computed(seed=1) == 0  # draws nothing
    assert computed(keep="codes") == 3
    assert computed(flights=MemoryFlights(CONFIG, (FRAMES, 9, FRAMES), seed=1)) == 3
    assert computed(vae=random_model(CONFIG, seed=1).vae) == 3
    other_decoder = random_model(CONFIG).vae
    with torch.no_grad():
        other_decoder.proj_up.weight.add_(1)
    assert computed(vae=other_decoder, keep="codes") == 0  # codes come from the encoder
    assert computed(vae=other_decoder) == 3


def test_digests_see_every_weight():
    a, b = random_model(CONFIG).vae, random_model(CONFIG).vae
    assert weights_digest(a) == weights_digest(b)
    with torch.no_grad():
        b.decoder.conv_in.conv.bias[0] += 1e-3
    assert weights_digest(a) != weights_digest(b)
    assert weights_digest(a, without=("decoder.",)) == weights_digest(b, without=("decoder.",))


def test_missing_and_damaged_files_are_named_and_mended(flights, tmp_path):
    features = DecoderFeatures(tmp_path, flights, MODEL.vae, CONFIG)
    with pytest.raises(FlightDataError, match=r"memory row 0: no decoder features in .*give the same command again"):
        features.load(0)
    features.prepare([1])
    (damaged,) = tmp_path.rglob("*.safetensors")
    damaged.write_bytes(damaged.read_bytes()[:200])
    with pytest.raises(FlightDataError, match=r"decoder features of memory row 1 are damaged; delete the file"):
        features.load(1)
    assert features.prepare([1]) == 1
    save_file({"other": torch.zeros(1)}, damaged)
    with pytest.raises(FlightDataError, match="are damaged"):
        features.load(1)
    assert features.prepare([1]) == 1
    assert features.load(1).true.shape[1] == flights.frame_count(1)


def test_a_folder_that_cannot_be_written_is_named_and_holds_nothing_half_written(flights, tmp_path):
    taken = tmp_path / "taken"
    taken.write_text("a file", encoding="utf-8")
    with pytest.raises(FlightDataError, match=r"taken/.*cannot be written"):
        DecoderFeatures(taken, flights, MODEL.vae, CONFIG).prepare()
    assert [path.name for path in tmp_path.iterdir()] == ["taken"]


def test_numbers_that_are_not_finite_are_named_and_not_kept(flights, tmp_path):
    vae = random_model(CONFIG).vae
    with torch.no_grad():
        vae.decoder.conv_in.conv.bias[0] = float("nan")
    with pytest.raises(FlightDataError, match=r"memory row \d: its decoder features hold NaN"):
        DecoderFeatures(tmp_path, flights, vae, CONFIG).prepare()
    assert not list(tmp_path.rglob("*.safetensors"))


def test_an_unknown_kind_is_refused(flights, tmp_path):
    with pytest.raises(ConfigError, match="'features' or 'codes'"):
        DecoderFeatures(tmp_path, flights, MODEL.vae, CONFIG, keep="pixels")


def test_the_world_model_predicts_from_the_rows_own_draws(tmp_path):
    """Predictions of a row do not depend on its batch, and its instruction belongs to the key."""
    from small_models import WORDS

    from worldvln_edge.config import GenerationConfig
    from worldvln_edge.runtime.worldvln.tokenizer import PromptTokenizer
    from worldvln_edge.training.stages.flight_prediction import WorldModelPredictor
    from worldvln_edge.training.stages.tokenizer import build_word_tokenizer

    config = msgspec.structs.replace(CONFIG, generation=GenerationConfig(cfg=2.0))
    flights = MemoryFlights(config, (FRAMES, FRAMES))
    tokenizer = PromptTokenizer(build_word_tokenizer(WORDS, "<<<t=6s>>>", 32), 12)
    predictor = WorldModelPredictor(MODEL.world_model, MODEL.text_encoder, tokenizer, config)
    assert predictor.digest("turn left") != predictor.digest("climb")
    kept = []
    for folder, batch in (("one", 1), ("two", 2)):
        features = DecoderFeatures(
            tmp_path / folder, flights, MODEL.vae, config, keep="codes", predictor=predictor, seed=3
        )
        features.prepare(batch=batch)
        kept.append([features.load(row).predicted for row in range(2)])
    assert kept[0][0].shape == (16, (FRAMES - 1) // 2, *config.schedule.latent_hw)
    for one, two in zip(*kept, strict=True):
        torch.testing.assert_close(one, two, atol=1e-5, rtol=1e-5)
    assert not torch.allclose(kept[0][0], kept[0][1])
