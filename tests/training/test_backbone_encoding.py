"""What the backbone is shown and what it must say: the published arrays, with flips and repetitions."""

import msgspec
import numpy as np
import pytest
import torch

from worldvln_edge.config import ScheduleConfig
from worldvln_edge.models.attention_mask import all_scales
from worldvln_edge.models.quantizer import SelfCorrection, encode_for_training
from worldvln_edge.presets import preset
from worldvln_edge.scale_schedule import ScaleSchedule
from worldvln_edge.training.stages.backbone_rows import RowsCorruption


class RecordedCorruption:
    """The flips and repetitions that a golden file holds, in the order in which they were drawn."""

    def __init__(self, data):
        self._data = data
        self._next = 0
        self._last_scale = len(data["schedule"]) - 1
        self._scales = len(data["image_repetition"])

    def flips(self, step, shape, device):
        index = step.clip * self._scales + step.scale
        if index == self._last_scale:
            return None
        call, self._next = self._next, self._next + 1
        assert self._data["flip_scale_index"][call] == index
        assert tuple(self._data[f"flipshape_{call}"]) == shape
        return torch.from_numpy(_unpack(self._data[f"flip_{call}"], shape))

    def repetition(self, clip, scale, count, batch):
        return torch.full((batch,), int(self._data["selected_repetition"][clip * self._scales + scale]))

    @property
    def calls(self) -> int:
        return self._next


def _unpack(packed: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    return np.unpackbits(packed.ravel(), count=int(np.prod(shape))).astype(bool).reshape(shape)


@pytest.mark.golden
def test_inputs_labels_and_positions_are_the_published_ones(golden):
    data = np.load(golden("training") / "multiscale_encode.npz")
    scales = len(data["image_repetition"])
    hw = tuple((int(h), int(w)) for _, h, w in data["schedule"][:scales])
    schedule = ScaleSchedule(
        ScheduleConfig(
            scale_hw=hw,
            image_repetition=tuple(int(n) for n in data["image_repetition"]),
            video_repetition=tuple(int(n) for n in data["video_repetition"]),
            semantic_scales=sum(h * w < int(data["detail_min_tokens"]) for h, w in hw),
            frames_inner_clip=2,
        ),
        data["features"].shape[2],
    )
    np.testing.assert_array_equal([schedule.last_step(*key).thw for key in all_scales(schedule)], data["schedule"])
    config = msgspec.structs.replace(preset("worldvln-8b").world_model, semantic_bits=16, detail_bits=64)
    features, corruption = torch.from_numpy(data["features"]), RecordedCorruption(data)
    encoded = [
        scale
        for clip in schedule.clips
        for scale in encode_for_training(features[:, :, clip.frame_slice], clip, config, corruption)
    ]
    assert corruption.calls == len(data["flip_scale_index"])
    inputs = torch.cat([scale.input_BLC for scale in encoded], 1)
    np.testing.assert_allclose(inputs, data["x_BLC"], rtol=0, atol=1e-6)
    for index, scale in enumerate(encoded):
        shape = (int(data["gt_tokens"][index]), int(data["gt_dims"][index]))
        np.testing.assert_array_equal(scale.label_bits_BLd[0], _unpack(data[f"gt_{index}"], shape))
        assert [index, int(scale.real_scale_id_B[0])] == data["rope_scale_coord"][index].tolist()


def test_rows_encoded_together_draw_as_if_alone():
    schedule = ScaleSchedule(
        ScheduleConfig(scale_hw=((1, 1), (2, 2)), image_repetition=(2, 2), video_repetition=(2, 1), semantic_scales=1),
        5,
    )
    config = msgspec.structs.replace(preset("nano").world_model, latent_channels=8, semantic_bits=4, detail_bits=8)
    features = torch.randn(3, 8, 5, 2, 2, generator=torch.Generator().manual_seed(0))

    def encode(rows: list[int]):
        corruption = RowsCorruption([SelfCorrection(schedule, 0.3, torch.Generator().manual_seed(row)) for row in rows])
        return [
            scale
            for clip in schedule.clips
            for scale in encode_for_training(features[rows][:, :, clip.frame_slice], clip, config, corruption)
        ]

    together = encode([0, 1, 2])
    for row in range(3):
        for ours, theirs in zip(encode([row]), together, strict=True):
            assert int(ours.real_scale_id_B[0]) == int(theirs.real_scale_id_B[row])
            assert torch.equal(ours.label_bits_BLd[0], theirs.label_bits_BLd[row])
            torch.testing.assert_close(ours.input_BLC[0], theirs.input_BLC[row])
