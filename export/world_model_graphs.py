"""World model graphs: context pass and generation step, with the KV cache written in place and sampling inside.

The cache has a fixed size; the host says where to write and how much of it is valid, so one graph serves text, observed
scales and generated scales of every size. Both heads run on every token and a mask picks the scale's own bits: that
keeps one graph for all scales, and the heads are tiny beside the blocks.

Legend: B guidance rows, n tokens = T*h*w, C width, D latent channels, H W latent grid, M cache capacity,
bits = semantic_bits + detail_bits.
Source: spec/world_model.md 2.3, 6; ONNX opset 24 (TensorScatter, Attention with nonpad_kv_seqlen).
"""

import torch
from torch import Tensor, nn

from worldvln_edge.models.world_model import Block, WorldModel, rotate

ATTENTION_OPSET = 24


def _scatter(cache_BHMD: Tensor, update_BHnD: Tensor, write_index_B: Tensor) -> Tensor:
    return torch.onnx.ops.symbolic(
        "TensorScatter",
        (cache_BHMD, update_BHnD, write_index_B),
        attrs={"axis": 2, "mode": "linear"},
        dtype=cache_BHMD.dtype,
        shape=cache_BHMD.shape,
        version=ATTENTION_OPSET,
    )


def _attend(q_BHnD: Tensor, key_BHMD: Tensor, value_BHMD: Tensor, kv_length_B: Tensor) -> Tensor:
    return torch.onnx.ops.symbolic(
        "Attention",
        (q_BHnD, key_BHMD, value_BHMD, None, None, None, kv_length_B),
        attrs={"scale": float(q_BHnD.shape[-1]) ** -0.5, "is_causal": 0},
        dtype=q_BHnD.dtype,
        shape=q_BHnD.shape,
        version=ATTENTION_OPSET,
    )


class _CachedBlocks(nn.Module):
    """All blocks over a fixed cache. `kv_only_last` skips what nobody reads of the last block in a context pass."""

    def __init__(self, model: WorldModel):
        super().__init__()
        self.blocks = nn.ModuleList(model.iterate_blocks())

    def forward(
        self,
        x_BnC: Tensor,
        rope: Tensor,
        write_index: Tensor,
        kv_length: Tensor,
        caches: tuple[Tensor, ...],
        kv_only_last: bool,
    ) -> tuple[Tensor, list[Tensor]]:
        present: list[Tensor] = []
        for index, block in enumerate(self.blocks):
            only_kv = kv_only_last and index == len(self.blocks) - 1
            past = caches[2 * index : 2 * index + 2]
            x_BnC, own = _run_block(block, x_BnC, rope, write_index, kv_length, past, only_kv)
            present.extend(own)
        return x_BnC, present


def _run_block(
    block: Block,
    x_BnC: Tensor,
    rope: Tensor,
    write_index: Tensor,
    kv_length: Tensor,
    past: tuple[Tensor, ...],
    only_kv: bool,
) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    attn = block.attn
    h = block.input_layernorm(x_BnC)

    def heads(x: Tensor) -> Tensor:
        return x.unflatten(-1, (-1, attn.head_dim)).transpose(1, 2)

    key = _scatter(past[0], rotate(attn.k_norm(heads(attn.k_proj(h))), rope), write_index)
    value = _scatter(past[1], heads(attn.v_proj(h)), write_index)
    if only_kv:
        return x_BnC, (key, value)
    q = rotate(attn.q_norm(heads(attn.q_proj(h))), rope)
    x_BnC = x_BnC + attn.o_proj(_attend(q, key, value, kv_length).transpose(1, 2).flatten(2))
    return x_BnC + block.mlp(block.post_attention_layernorm(x_BnC)), (key, value)


class ContextGraph(nn.Module):
    """Keys and values of text or of an observed scale; nothing else is computed."""

    def __init__(self, model: WorldModel):
        super().__init__()
        self.cached = _CachedBlocks(model)

    def forward(self, embeds: Tensor, rope: Tensor, write_index: Tensor, kv_length: Tensor, *caches: Tensor):
        _, present = self.cached(embeds, rope, write_index, kv_length, caches, True)
        return tuple(present)


class LatentEmbedGraph(nn.Module):
    """Latent tokens of an observed scale to the residual stream."""

    def __init__(self, model: WorldModel):
        super().__init__()
        self.word_embed = model.word_embed

    def forward(self, latents: Tensor) -> Tensor:
        return self.word_embed(latents)


class StepGraph(nn.Module):
    """One generation step: codes so far in, codes with this step's bits out (`runtime/graphs.py` lists the inputs)."""

    def __init__(self, model: WorldModel, *, guidance_rows: int, norm_threshold: float, eta: float):
        super().__init__()
        self.word_embed = model.word_embed
        self.cached = _CachedBlocks(model)
        self.norm = model.norm_hidden_sates
        self.semantic_head = model.semantic_head2
        self.detail_head = model.head
        self.rows = guidance_rows
        self.norm_threshold = norm_threshold
        self.eta = eta

    def forward(
        self,
        codes: Tensor,
        area_h: Tensor,
        area_w: Tensor,
        up_channels: Tensor,
        up_h: Tensor,
        up_w: Tensor,
        bit_mask: Tensor,
        code_value: Tensor,
        inverse_tau: Tensor,
        guidance: Tensor,
        uniforms: Tensor,
        forced_bits: Tensor,
        force: Tensor,
        rope: Tensor,
        write_index: Tensor,
        kv_length: Tensor,
        *caches: Tensor,
    ):
        small = torch.matmul(torch.matmul(area_h, codes), area_w.transpose(0, 1))  # [1, D, T, h, w]
        tokens = small.permute(0, 2, 3, 4, 1).flatten(1, 3)
        x = self.word_embed(tokens).expand(self.rows, -1, -1)
        hidden, present = self.cached(x, rope.flatten(1, 3), write_index, kv_length, caches, False)
        z = self.norm(hidden)
        heads = [head(z).unflatten(-1, (-1, 2)) for head in (self.semantic_head, self.detail_head)]
        logits = torch.cat(heads, 2) * (bit_mask[:, None] * inverse_tau)  # [B, n, bits, 2]
        guided = logits[0] if self.rows == 1 else self._guide(logits[0], logits[1], bit_mask, guidance)
        probabilities = torch.sigmoid(guided[..., 1] - guided[..., 0]).reshape(uniforms.shape)
        drawn = (uniforms < probabilities).to(codes.dtype)
        bits = force * forced_bits + (1 - force) * drawn
        code = (bits * 2 - 1) * (bit_mask * code_value)  # [T, h, w, bits]
        wide = torch.matmul(code, up_channels.transpose(0, 1)).permute(3, 0, 1, 2)  # [D, T, h, w]
        added = torch.matmul(torch.matmul(up_h, wide), up_w.transpose(0, 1))
        return (codes + added[None], bits, probabilities, *present)

    def _guide(self, conditional: Tensor, unconditional: Tensor, bit_mask: Tensor, guidance: Tensor) -> Tensor:
        # Masked bits are zero in both rows, so sums over all bits are sums over the scale's own.
        tokens = torch.ones_like(conditional[:, :1, 0]).sum()
        entries = tokens * bit_mask.sum() * 2
        difference = conditional - unconditional
        if self.norm_threshold > 0:
            rms = torch.sqrt(difference.square().sum() / entries)
            difference = difference * torch.clamp(self.norm_threshold / torch.clamp(rms, min=1e-30), max=1.0)
        direction = conditional / torch.clamp(torch.sqrt(conditional.square().sum()), min=1e-12)
        parallel = (difference * direction).sum() * direction
        update = difference - parallel + self.eta * parallel
        return conditional + (guidance - 1) * update
