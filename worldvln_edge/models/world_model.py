"""World model: a transformer over text and latent scales. Parameter names are those of the released checkpoints.

Legend: B rows, L tokens, C width, n = head_dim/2 rotation angles, P tokens seen from the past, d bits per token.
Attention is never causal: a token sees all of its own scale (or text) and all of the past it is given.
Source: spec/world_model.md 2 (module), 2.7 (training forward); spec/training.md 2.3, 2.6.
"""

from collections.abc import Iterable, Iterator
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask
from torch.utils.checkpoint import checkpoint

from worldvln_edge.config import ConfigError, WorldModelConfig
from worldvln_edge.models.block_attention import block_attention
from worldvln_edge.models.precision import without_autocast

AttentionMask = Tensor | BlockMask
"""True where a query sees a key: bool, or the same as tiles (`attention_mask.SequenceMask`)."""
LayerKV = tuple[Tensor, Tensor]
"""Keys (normalised and rotated) and values of one layer: two tensors [B, kv_heads, tokens, head_dim]."""


class RMSNorm(nn.Module):
    """Root-mean-square norm over the last axis, computed in fp32, returned in the input's dtype."""

    def __init__(self, width: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x.float(), (x.shape[-1],), self.weight.float(), self.eps).to(x.dtype)


def rotate(x_BHLD: Tensor, rope_2Ln: Tensor) -> Tensor:
    """Rotate interleaved pairs (x[2j], x[2j+1]) in fp32.

    Args:
        x_BHLD: queries or keys.
        rope_2Ln: cos and sin, float32 [2, L, n], or [B, 2, L, n] with one table per row.
    """
    cos, sin = rope_2Ln.unbind(-3)
    if rope_2Ln.ndim == 4:
        cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
    even, odd = x_BHLD.float().unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack((even * cos - odd * sin, odd * cos + even * sin), -1).flatten(-2).to(x_BHLD.dtype)


class Attention(nn.Module):
    """Grouped-query attention with per-head query and key norm."""

    def __init__(self, config: WorldModelConfig):
        super().__init__()
        width, head_dim, bias = config.width, config.head_dim, config.qkvo_bias
        self.head_dim = head_dim
        self.grouped = config.heads != config.kv_heads
        self.q_proj = nn.Linear(width, width, bias=bias)
        self.k_proj = nn.Linear(width, config.kv_heads * head_dim, bias=bias)
        self.v_proj = nn.Linear(width, config.kv_heads * head_dim, bias=bias)
        self.o_proj = nn.Linear(width, width, bias=bias)
        self.q_norm = RMSNorm(head_dim, config.norm_eps)
        self.k_norm = RMSNorm(head_dim, config.norm_eps)

    def _heads(self, x_BLE: Tensor) -> Tensor:
        return x_BLE.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)

    def forward(
        self, x_BLC: Tensor, rope_2Ln: Tensor, past: LayerKV | None, mask: AttentionMask | None
    ) -> tuple[Tensor, LayerKV]:
        q = rotate(self.q_norm(self._heads(self.q_proj(x_BLC))), rope_2Ln)
        k = rotate(self.k_norm(self._heads(self.k_proj(x_BLC))), rope_2Ln)
        v = self._heads(self.v_proj(x_BLC))
        keys, values = (k, v) if past is None else (torch.cat((past[0], k), 2), torch.cat((past[1], v), 2))
        if isinstance(mask, BlockMask):
            mixed = block_attention(q, keys, values, mask)
        else:
            mixed = F.scaled_dot_product_attention(q, keys, values, attn_mask=mask, enable_gqa=self.grouped)
        return self.o_proj(mixed.transpose(1, 2).flatten(2)), (k, v)


class FeedForward(nn.Module):
    """SwiGLU."""

    def __init__(self, config: WorldModelConfig):
        super().__init__()
        self.gate_proj = nn.Linear(config.width, config.intermediate, bias=False)
        self.up_proj = nn.Linear(config.width, config.intermediate, bias=False)
        self.down_proj = nn.Linear(config.intermediate, config.width, bias=False)

    def forward(self, x_BLC: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x_BLC)) * self.up_proj(x_BLC))


class Block(nn.Module):
    """Pre-norm attention and feed-forward (2.3)."""

    def __init__(self, config: WorldModelConfig):
        super().__init__()
        self.attn = Attention(config)
        self.mlp = FeedForward(config)
        self.input_layernorm = RMSNorm(config.width, config.norm_eps)
        self.post_attention_layernorm = RMSNorm(config.width, config.norm_eps)

    def forward(
        self, x_BLC: Tensor, rope_2Ln: Tensor, past: LayerKV | None = None, mask: AttentionMask | None = None
    ) -> tuple[Tensor, LayerKV]:
        mixed, own = self.attn(self.input_layernorm(x_BLC), rope_2Ln, past, mask)
        x_BLC = x_BLC + mixed
        return x_BLC + self.mlp(self.post_attention_layernorm(x_BLC)), own


class BlockChunk(nn.Module):
    """Consecutive blocks; exists because the released keys read `block_chunks.{i}.module.{j}`."""

    def __init__(self, config: WorldModelConfig, blocks: int):
        super().__init__()
        self.module = nn.ModuleList(Block(config) for _ in range(blocks))


def initial_cfg_uncond(config: WorldModelConfig) -> Tensor:
    """First value of the learned unconditional text: float32 [text_max_tokens, text_channels], always the same."""
    features = torch.empty(config.text_max_tokens, config.text_channels, device="cpu")
    nn.init.trunc_normal_(features, std=1.2, generator=torch.Generator("cpu").manual_seed(0))
    return features / config.text_channels**0.5


class WorldModel(nn.Module):
    """Next-scale transformer with the released state-dict layout (2.2). Built in fp32, initialised for training."""

    def __init__(self, config: WorldModelConfig):
        super().__init__()
        self.config = config
        width = config.width
        self.cfg_uncond = nn.Parameter(torch.empty(config.text_max_tokens, config.text_channels))
        # Unused by this model; the key exists in every released checkpoint.
        self.sos_token = nn.Parameter(torch.zeros(1, 1, width))
        self.text_proj = nn.Linear(config.text_channels, width)
        self.word_embed = nn.Linear(config.latent_channels, width)
        self.norm_hidden_sates = RMSNorm(width, config.norm_eps)
        self.head = nn.Linear(width, 2 * config.detail_bits)
        self.semantic_head2 = nn.Linear(width, 2 * config.semantic_bits)
        if config.block_chunks == 1:
            self.blocks = nn.ModuleList(Block(config) for _ in range(config.depth))
        else:
            per_chunk = config.depth // config.block_chunks
            self.block_chunks = nn.ModuleList(BlockChunk(config, per_chunk) for _ in range(config.block_chunks))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Linear weights N(0, 0.02), biases 0, norms 1, `cfg_uncond` as `initial_cfg_uncond`."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
            elif isinstance(module, RMSNorm):
                nn.init.ones_(module.weight)
        nn.init.zeros_(self.sos_token)
        if not self.cfg_uncond.is_meta:
            self.cfg_uncond.copy_(initial_cfg_uncond(self.config))

    def iterate_blocks(self) -> Iterator[Block]:
        """All blocks, first to last."""
        chunks = [self.blocks] if self.config.block_chunks == 1 else [chunk.module for chunk in self.block_chunks]
        for chunk in chunks:
            yield from cast("Iterable[Block]", chunk)

    @property
    def block_dtype(self) -> torch.dtype:
        """Dtype of the block weights, hence of the residual stream and of cached keys and values."""
        return next(self.iterate_blocks()).attn.q_proj.weight.dtype

    def cast_blocks(self, dtype: torch.dtype) -> "WorldModel":
        """Cast the blocks in place; heads, embeddings and `cfg_uncond` stay fp32 (2.6). Returns self."""
        for block in self.iterate_blocks():
            block.to(dtype)
        return self

    def embed_latents(self, latents_BLc: Tensor) -> Tensor:
        """Latent tokens (summed codes at a scale) [B, L, latent_channels] -> residual stream [B, L, C]."""
        return self._into_stream(self.word_embed(latents_BLc.float()))

    def project_text(self, features_BLt: Tensor) -> Tensor:
        """Text features [B, L, text_channels] -> residual stream [B, L, C]; always computed in fp32."""
        with without_autocast(features_BLt):
            projected = self.text_proj(features_BLt.float())
        return self._into_stream(projected)  # in the dtype of the latents: one fp32 part would make all of it fp32

    def _into_stream(self, x_BLC: Tensor) -> Tensor:
        device = x_BLC.device.type
        autocast = device != "meta" and torch.is_autocast_enabled(device)
        return x_BLC.to(torch.get_autocast_dtype(device) if autocast else self.block_dtype)

    def forward_blocks(
        self,
        x_BLC: Tensor,
        rope_2Ln: Tensor,
        past: list[LayerKV] | None = None,
        mask: Tensor | None = None,
    ) -> tuple[Tensor, list[LayerKV]]:
        """Run all blocks on the tokens of one step.

        Args:
            x_BLC: embedded tokens (`embed_latents` or `project_text`).
            rope_2Ln: float32 [2, L, head_dim/2].
            past: per layer the keys and values the tokens see besides each other, [B, kv_heads, P, head_dim].
            mask: bool [B, 1, 1, P + L], False for keys that stand for nothing (texts of several lengths).

        Returns:
            (hidden [B, L, C] before the final norm, per layer the own keys and values [B, kv_heads, L, head_dim]).
        """
        own: list[LayerKV] = []
        for index, block in enumerate(self.iterate_blocks()):
            x_BLC, layer = block(x_BLC, rope_2Ln, None if past is None else past[index], mask)
            own.append(layer)
        return x_BLC, own

    def forward_training(
        self,
        latents_BLc: Tensor,
        text_BLt: Tensor,
        rope_2Ln: Tensor,
        mask: AttentionMask,
        checkpoint_activations: bool = False,
    ) -> Tensor:
        """Run whole sequences at once: all visual scales, then the texts, then padding.

        Args:
            latents_BLc: latent inputs of the visual tokens [B, V, latent_channels], shorter sequences filled up with
                zeros.
            text_BLt: text features [B, X, text_channels], shorter texts filled up with anything finite.
            rope_2Ln: float32 [2, L, head_dim/2] or [B, 2, L, head_dim/2], L >= V + X (`attention_mask.lay_out`).
            mask: bool [L, L] or [B, 1, L, L], or block mask: True where the row token sees the column token
                (`attention_mask.SequenceMask`).
            checkpoint_activations: recompute every block in the backward pass instead of storing its activations.

        Returns:
            Hidden states of the visual tokens [B, V, C], before the final norm; feed slices to `logits`.

        Raises:
            ConfigError: rope and mask lengths differ, or are too short for the tokens.
        """
        visual, length = latents_BLc.shape[1], rope_2Ln.shape[-2]
        padding = length - visual - text_BLt.shape[1]
        if padding < 0 or tuple(mask.shape[-2:]) != (length, length):
            raise ConfigError(
                f"training sequence: {visual} visual and {text_BLt.shape[1]} text tokens, rope for {length}, mask "
                f"{list(mask.shape)}; rope and mask must have one length that holds all tokens"
            )
        x_BLC = torch.cat((self.embed_latents(latents_BLc), self.project_text(text_BLt)), 1)
        x_BLC = F.pad(x_BLC, (0, 0, 0, padding))
        for block in self.iterate_blocks():
            if checkpoint_activations:
                x_BLC, _ = checkpoint(block, x_BLC, rope_2Ln, None, mask, use_reentrant=False)
            else:
                x_BLC, _ = block(x_BLC, rope_2Ln, None, mask)
        return x_BLC[:, :visual]

    # Data-parallel wrappers call `forward`; the cached path is inference only and needs no wrapper.
    forward = forward_training

    def logits(self, hidden_BLC: Tensor, semantic: bool) -> Tensor:
        """Two logits per bit, float32 [B, L, d, 2]; index 1 of the last axis means bit set.

        Args:
            hidden_BLC: output of the last block.
            semantic: True for semantic scales (`semantic_head2`), False for detail scales (`head`).
        """
        head = self.semantic_head2 if semantic else self.head
        with without_autocast(hidden_BLC):
            return head(self.norm_hidden_sates(hidden_BLC).float()).unflatten(-1, (-1, 2))
