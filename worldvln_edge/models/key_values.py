"""Keys and values kept between steps: the text's, and those of scales that later scales refer to.

RoPE is applied before storing, so entries may be dropped or put side by side freely.
Source: spec/world_model.md 3.3, 6.1.
"""

import torch

from worldvln_edge.models.world_model import LayerKV
from worldvln_edge.scale_schedule import ScaleSchedule

Reference = tuple[int, int]
"""(clip, scale inside the clip)."""


class MissingReferenceError(LookupError):
    """A scale is to be seen whose keys and values are not there. `reference` is its (clip, scale)."""

    def __init__(self, reference: Reference, held: list[Reference]):
        super().__init__(
            f"keys and values of clip {reference[0]} scale {reference[1]} are needed but not held (held: {held}); "
            "run its clip first, in order, with this text"
        )
        self.reference = reference


class ReferenceKV:
    """Per-layer keys and values by (clip, scale), with the text's kept apart because every step sees them.

    Args:
        text: per layer the keys and values of the text, [rows, kv_heads, L, head_dim].
    """

    def __init__(self, text: list[LayerKV]):
        self.text = text
        self._scales: dict[Reference, list[LayerKV]] = {}
        self._context: tuple[tuple[Reference, ...], list[LayerKV]] = ((), text)

    @property
    def rows(self) -> int:
        """1 without, 2 with guidance."""
        return self.text[0][0].shape[0]

    @property
    def held(self) -> list[Reference]:
        return sorted(self._scales)

    def keep(self, reference: Reference, layers: list[LayerKV]) -> None:
        """Store the keys and values of a scale's last repetition, replacing earlier ones."""
        self._scales[reference] = layers
        if reference in self._context[0]:
            self._context = ((), self.text)

    def context(self, references: tuple[Reference, ...]) -> list[LayerKV]:
        """What a step sees besides itself: the references in the given order, then the text, joined per layer.

        The last answer is remembered, because all steps of a clip usually ask for the same one.

        Raises:
            MissingReferenceError: a reference is not held.
        """
        if references != self._context[0]:
            for reference in references:
                if reference not in self._scales:
                    raise MissingReferenceError(reference, self.held)
            parts = [self._scales[reference] for reference in references] + [self.text]
            joined = [
                (torch.cat([kv[0] for kv in layer], 2), torch.cat([kv[1] for kv in layer], 2))
                for layer in zip(*parts, strict=True)
            ]
            self._context = (references, joined)
        return self._context[1]

    def drop_unused(self, schedule: ScaleSchedule, clip: int) -> None:
        """Forget what neither `clip` nor a later clip of the schedule refers to."""
        used = {reference for later in range(clip, len(schedule.clips)) for reference in schedule.references(later)}
        self._scales = {reference: layers for reference, layers in self._scales.items() if reference in used}
        self._context = ((), self.text)

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Key shape of the first layer by name: `text`, and `clip.scale` of every kept scale."""
        shapes = {f"{clip}.{scale}": tuple(self._scales[clip, scale][0][0].shape) for clip, scale in self.held}
        return {"text": tuple(self.text[0][0].shape)} | shapes
