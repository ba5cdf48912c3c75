"""TimesFormer over short windows: divided space-time attention, one class token per window.

Legend: F frames, K windows, T frames of a window, N patch tokens of a frame (row-major), D width.
Source: spec/action_decoder.md 2, 8, 10 (last block); spec/training.md 8.6 (time embedding).
"""

from collections.abc import Sequence
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from worldvln_edge.config import ConfigError, TimesFormerConfig


class Attention(nn.Module):
    """Multi-head self-attention with one `qkv` linear."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x_BLD: Tensor) -> Tensor:
        b, length, width = x_BLD.shape
        qkv = self.qkv(x_BLD).reshape(b, length, 3, self.heads, width // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        return self._project(F.scaled_dot_product_attention(q, k, v))

    def first_token(self, x_BLD: Tensor) -> Tensor:
        """Only the first row of the result, [B, 1, D]: keys and values of all tokens, one query."""
        b, length, width = x_BLD.shape
        weight, bias = self.qkv.weight, self.qkv.bias
        q = F.linear(x_BLD[:, :1], weight[:width], bias[:width])
        q = q.reshape(b, 1, self.heads, width // self.heads).transpose(1, 2)
        kv = F.linear(x_BLD, weight[width:], bias[width:]).reshape(b, length, 2, self.heads, width // self.heads)
        k, v = kv.permute(2, 0, 3, 1, 4).unbind(0)
        return self._project(F.scaled_dot_product_attention(q, k, v))

    def _project(self, attended_BHLd: Tensor) -> Tensor:
        return self.proj(attended_BHLd.transpose(1, 2).flatten(2))


class Mlp(nn.Module):
    def __init__(self, width: int, hidden: int):
        super().__init__()
        self.fc1 = nn.Linear(width, hidden)
        self.fc2 = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x)))


class Block(nn.Module):
    """Temporal attention, spatial attention, MLP.

    `drop_path` is the probability with which training skips a residual branch of a row.
    """

    def __init__(self, config: TimesFormerConfig, drop_path: float):
        super().__init__()
        width = config.width
        self.drop_path = drop_path
        self.norm1 = nn.LayerNorm(width, eps=1e-6)
        self.attn = Attention(width, config.heads)
        self.temporal_norm1 = nn.LayerNorm(width, eps=1e-6)
        self.temporal_attn = Attention(width, config.heads)
        self.temporal_fc = nn.Linear(width, width)
        self.norm2 = nn.LayerNorm(width, eps=1e-6)
        self.mlp = Mlp(width, width * config.mlp_ratio)

    def forward(self, x_KTND: Tensor, c_KD: Tensor) -> tuple[Tensor, Tensor]:
        """Patches and class token after the block."""
        k, t, n, d = x_KTND.shape
        x_KTND = x_KTND + self._temporal(x_KTND)
        spatial = self._drop(self.attn(self.norm1(_with_class_token(x_KTND, c_KD)))).reshape(k, t, 1 + n, d)
        x_KTND = x_KTND + spatial[:, :, 1:]
        c_KD = c_KD + spatial[:, :, 0].mean(1)
        tokens = torch.cat([c_KD[:, None], x_KTND.reshape(k, t * n, d)], dim=1)
        tokens = tokens + self._drop(self.mlp(self.norm2(tokens)))
        return tokens[:, 1:].reshape(k, t, n, d), tokens[:, 0]

    def class_token(self, x_KTND: Tensor, c_KD: Tensor) -> Tensor:
        """Class token after the block, [K, D]: all that the last block is read for."""
        k, t, _, d = x_KTND.shape
        x_KTND = x_KTND + self._temporal(x_KTND)
        spatial = self._drop(self.attn.first_token(self.norm1(_with_class_token(x_KTND, c_KD)))).reshape(k, t, d)
        c_KD = c_KD + spatial.mean(1)
        return c_KD + self._drop(self.mlp(self.norm2(c_KD)))

    def _temporal(self, x_KTND: Tensor) -> Tensor:
        k, t, n, d = x_KTND.shape
        rows = x_KTND.transpose(1, 2).reshape(k * n, t, d)
        moved = self.temporal_fc(self._drop(self.temporal_attn(self.temporal_norm1(rows))))
        return moved.reshape(k, n, t, d).transpose(1, 2)

    def _drop(self, branch: Tensor) -> Tensor:
        if not self.training or self.drop_path == 0.0:
            return branch
        keep = 1.0 - self.drop_path
        rows = torch.rand(branch.shape[0], *[1] * (branch.ndim - 1), device=branch.device) < keep
        return branch * (rows.to(branch.dtype) / keep)


class PatchEmbed(nn.Module):
    """Frames to patch tokens (RGB head only; the released latent head carries it unused)."""

    def __init__(self, config: TimesFormerConfig):
        super().__init__()
        self.proj = nn.Conv2d(3, config.width, config.patch, stride=config.patch)

    def forward(self, frames_F3HW: Tensor) -> Tensor:
        return self.proj(frames_F3HW).flatten(2).transpose(1, 2)


class TimesFormer(nn.Module):
    """Windows of frames to motions, with the released state-dict keys.

    Args:
        config: sizes.
        drop_path: stochastic depth of the last block; it grows linearly from 0 at the first.
        time_embed_std: spread of the initial time embedding. Small models learn motion only from a large one.

    Raises:
        ConfigError: sizes that do not divide.
    """

    def __init__(self, config: TimesFormerConfig, *, drop_path: float = 0.1, time_embed_std: float = 0.02):
        super().__init__()
        if config.image_hw[0] % config.patch or config.image_hw[1] % config.patch or config.width % config.heads:
            raise ConfigError(
                f"timesformer: image_hw {config.image_hw} must divide by patch {config.patch} and width {config.width} "
                f"by heads {config.heads}"
            )
        if config.depth < 1 or config.window < 2:
            raise ConfigError(
                f"timesformer: depth must be >= 1 and window >= 2, found {config.depth} and {config.window}"
            )
        self.config = config
        self.cls_token = nn.Parameter(torch.empty(1, 1, config.width))
        self.pos_embed = nn.Parameter(torch.empty(1, 1 + config.tokens_per_frame, config.width))
        self.time_embed = nn.Parameter(torch.empty(1, config.window, config.width))
        self.patch_embed = PatchEmbed(config)
        rates = [drop_path * i / max(1, config.depth - 1) for i in range(config.depth)]
        self.blocks = nn.ModuleList(Block(config, rate) for rate in rates)
        self.norm = nn.LayerNorm(config.width, eps=1e-6)
        self.head = nn.Linear(config.width, config.outputs)
        self._initialise(time_embed_std)

    def _initialise(self, time_embed_std: float) -> None:
        for parameter, std in ((self.cls_token, 0.02), (self.pos_embed, 0.02), (self.time_embed, time_embed_std)):
            nn.init.trunc_normal_(parameter, std=std, a=-2 * std, b=2 * std)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)
        # All blocks but the first start as plain image transformer blocks.
        for block in list(self.blocks)[1:]:
            nn.init.zeros_(cast(Block, block).temporal_fc.weight)

    @property
    def compute_dtype(self) -> torch.dtype:
        """Of tokens and blocks. The final norm and the head may be wider."""
        return self.pos_embed.dtype

    def patch_tokens(self, frames_F3HW: Tensor) -> Tensor:
        """Tokens of normalised frames: [F, N, D].

        Raises:
            ValueError: not [F, 3, *image_hw].
        """
        if frames_F3HW.ndim != 4 or tuple(frames_F3HW.shape[1:]) != (3, *self.config.image_hw):
            raise ValueError(
                f"frames must be [F, 3, {self.config.image_hw[0]}, {self.config.image_hw[1]}], found "
                f"{list(frames_F3HW.shape)}"
            )
        return self.patch_embed(frames_F3HW.to(self.compute_dtype))

    def forward(self, windows_KTND: Tensor, trace: list[tuple[Tensor, Tensor]] | None = None) -> Tensor:
        """Motions of every window.

        Args:
            windows_KTND: patch tokens without any embedding.
            trace: if given, (patches [K, T, N, D], class token [K, D]) after every block is appended to it.

        Returns:
            Logits [K, outputs]; group j of 6 is the motion from frame j to j+1 of the window.

        Raises:
            ValueError: another number of frames, tokens or channels; embeddings are never interpolated.
        """
        config = self.config
        if windows_KTND.ndim != 4 or tuple(windows_KTND.shape[1:]) != (
            config.window,
            config.tokens_per_frame,
            config.width,
        ):
            raise ValueError(
                f"windows must be [K, {config.window}, {config.tokens_per_frame}, {config.width}], found "
                f"{list(windows_KTND.shape)}"
            )
        return self._forward(windows_KTND + self.pos_embed[:, None, 1:], trace)

    def forward_frames(self, tokens_FND: Tensor, starts: Sequence[int]) -> Tensor:
        """Motions of the windows that begin at frames `starts` (0-based): logits [K, outputs].

        Raises:
            ValueError: wrong token shape, or a window that leaves the frames.
        """
        config = self.config
        if tokens_FND.ndim != 3 or tuple(tokens_FND.shape[1:]) != (config.tokens_per_frame, config.width):
            raise ValueError(
                f"tokens must be [F, {config.tokens_per_frame}, {config.width}], found {list(tokens_FND.shape)}"
            )
        if not starts or min(starts) < 0 or max(starts) + config.window > tokens_FND.shape[0]:
            raise ValueError(
                f"windows of {config.window} starting at {list(starts)} do not lie inside {tokens_FND.shape[0]} frames"
            )
        placed_FND = tokens_FND + self.pos_embed[:, 1:]  # once per frame, not per window
        frames = torch.tensor([s + i for s in starts for i in range(config.window)], device=tokens_FND.device)
        windows = placed_FND.index_select(0, frames)
        return self._forward(windows.reshape(len(starts), config.window, *tokens_FND.shape[1:]), None)

    def _forward(self, placed_KTND: Tensor, trace: list[tuple[Tensor, Tensor]] | None) -> Tensor:
        x_KTND = placed_KTND + self.time_embed[:, :, None]
        c_KD = (self.cls_token + self.pos_embed[:, :1])[:, 0].expand(x_KTND.shape[0], -1)
        for block in self.blocks[:-1]:
            x_KTND, c_KD = block(x_KTND, c_KD)
            if trace is not None:
                trace.append((x_KTND, c_KD))
        if trace is None:
            c_KD = cast(Block, self.blocks[-1]).class_token(x_KTND, c_KD)
        else:
            x_KTND, c_KD = self.blocks[-1](x_KTND, c_KD)
            trace.append((x_KTND, c_KD))
        return self.head(self.norm(c_KD.to(self.norm.weight.dtype)))


def _with_class_token(x_KTND: Tensor, c_KD: Tensor) -> Tensor:
    """One sequence per frame, each with the window's class token in front: [K*T, 1+N, D]."""
    k, t, n, d = x_KTND.shape
    c = c_KD[:, None, None].expand(k, t, 1, d)
    return torch.cat([c, x_KTND], dim=2).reshape(k * t, 1 + n, d)
