"""The two action heads: from VAE features, or from frames, to the actions of a segment.

Legend: F frames of a segment's windows (left context and the segment), K windows, N tokens of a frame, D width.
Source: spec/action_decoder.md 1-5, 8.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn

from worldvln_edge.action_windows import LabelStats, segment_actions, window_starts
from worldvln_edge.config import ActionDecoderConfig
from worldvln_edge.images import rgb_head_input
from worldvln_edge.models.adapter import Adapter
from worldvln_edge.models.timesformer import TimesFormer


class LatentActionHead(nn.Module):
    """Last up-block features to motions. State-dict keys: `adapter.*`, `tsformer.*`.

    Args:
        config: sizes of both halves.
        feature_channels: `VideoVAEConfig.feature_channels`.
        use_skip: see `Adapter`.
        time_embed_std: see `TimesFormer`.
    """

    def __init__(
        self,
        config: ActionDecoderConfig,
        feature_channels: int,
        *,
        use_skip: bool = False,
        time_embed_std: float = 0.02,
    ):
        super().__init__()
        self.config = config
        self.adapter = Adapter(config.adapter, feature_channels, config.latent_head.width, use_skip=use_skip)
        self.tsformer = TimesFormer(config.latent_head, time_embed_std=time_embed_std)

    def tokens(self, features_BCTHW: Tensor) -> Tensor:
        """Patch tokens of every frame, [B*T, N, D]; computed once, however many windows look at a frame."""
        return self.adapter(features_BCTHW)

    def forward(self, features_1CTHW: Tensor) -> Tensor:
        """Logits [K, outputs] of all windows (stride 1) over the frames of one sequence.

        Raises:
            ValueError: a batch, fewer frames than one window, or another channel count.
        """
        if features_1CTHW.shape[0] != 1:
            raise ValueError(f"windows run over one sequence, found a batch of {features_1CTHW.shape[0]}")
        return self.logits(self.tokens(features_1CTHW))

    def logits(self, tokens_FND: Tensor) -> Tensor:
        """Logits [K, outputs] of all windows (stride 1) over the frames of `tokens`."""
        starts = window_starts(tokens_FND.shape[0], self.config.latent_head.window)
        return self.tsformer.forward_frames(tokens_FND, starts)

    @torch.no_grad()
    def actions(
        self, tokens_FND: Tensor, stats: LabelStats | None, *, observed_frames: int, next_observed_frames: int
    ) -> np.ndarray:
        """Actions of one segment: float32 [next_observed_frames - observed_frames, 6], cm and deg.

        Args:
            tokens_FND: of frames `context_frame(observed_frames, left_context)` .. `next_observed_frames`.
            stats: label statistics; None uses the logits as rad and m.

        Raises:
            ValueError: another number of frames.
        """
        return segment_actions(
            self.logits(tokens_FND).float().cpu().numpy(),
            stats,
            observed_frames=observed_frames,
            next_observed_frames=next_observed_frames,
            left_context=self.config.left_context,
            window=self.config.latent_head.window,
        )


class RgbActionHead(nn.Module):
    """Frames to motions: a TimesFormer of its own. State-dict keys: `tsformer.*`."""

    def __init__(self, config: ActionDecoderConfig, *, time_embed_std: float = 0.02):
        super().__init__()
        self.config = config
        self.tsformer = TimesFormer(config.rgb_head, time_embed_std=time_embed_std)

    def preprocess(self, frames: Sequence[np.ndarray], pre_resize_hw: tuple[int, int] | None = None) -> Tensor:
        """Normalised frames, float32 [F, 3, *image_hw], on the head's device. See `images.rgb_head_input`."""
        pixels = rgb_head_input(
            frames, self.config.rgb_head.image_hw, self.config.rgb_mean, self.config.rgb_std, pre_resize_hw
        )
        return torch.from_numpy(pixels).to(self.tsformer.pos_embed.device)

    def tokens(self, frames_F3HW: Tensor) -> Tensor:
        """Patch tokens [F, N, D] of normalised frames; reusable across windows and segments."""
        return self.tsformer.patch_tokens(frames_F3HW)

    def forward(self, frames_F3HW: Tensor) -> Tensor:
        """Logits [K, outputs] of all windows (stride 1) over normalised frames."""
        return self.logits(self.tokens(frames_F3HW))

    def logits(self, tokens_FND: Tensor, *, stride: int = 1, batch_size: int | None = None) -> Tensor:
        """Logits [K, outputs] of the windows over `tokens`; the last window is aligned to the end.

        Args:
            tokens_FND: from `tokens`.
            stride: frames between windows, 1 to window-1 so that every frame is covered.
            batch_size: windows per pass; None runs all at once.

        Raises:
            ValueError: stride or batch size out of range, or fewer frames than one window.
        """
        window = self.config.rgb_head.window
        if not 1 <= stride < window:
            raise ValueError(f"stride must be 1..{window - 1}, so that every motion is predicted; found {stride}")
        if batch_size is not None and batch_size < 1:
            raise ValueError(f"batch_size must be >= 1, found {batch_size}")
        starts = window_starts(tokens_FND.shape[0], window, stride)
        chunk = batch_size or len(starts)
        passes = [starts[i : i + chunk] for i in range(0, len(starts), chunk)]
        return torch.cat([self.tsformer.forward_frames(tokens_FND, some) for some in passes])

    @torch.no_grad()
    def actions(
        self,
        frames: Sequence[np.ndarray],
        stats: LabelStats | None,
        *,
        observed_frames: int,
        next_observed_frames: int,
        stride: int = 1,
        batch_size: int | None = 8,
        pre_resize_hw: tuple[int, int] | None = None,
    ) -> np.ndarray:
        """Actions of one segment: float32 [next_observed_frames - observed_frames, 6], cm and deg.

        Args:
            frames: uint8 RGB [H, W, 3], from `context_frame(observed_frames, left_context)` to `next_observed_frames`.
            stats: label statistics; None uses the logits as rad and m.
            stride, batch_size: see `logits`.
            pre_resize_hw: resize to this size first.

        Raises:
            ValueError: another number of frames, or a wrong option.
        """
        tokens = self.tokens(self.preprocess(frames, pre_resize_hw))
        return segment_actions(
            self.logits(tokens, stride=stride, batch_size=batch_size).float().cpu().numpy(),
            stats,
            observed_frames=observed_frames,
            next_observed_frames=next_observed_frames,
            left_context=self.config.left_context,
            window=self.config.rgb_head.window,
            stride=stride,
        )
