"""World model graphs: context pass and generation step, with the KV cache written in place and sampling inside.

The cache has a fixed size; the host says where to write and how much of it is valid, so one graph serves text, observed
scales and generated scales of every size. Both heads run on every token and a mask picks the scale's own bits: that
keeps one graph for all scales, and the heads are tiny beside the blocks.

Legend: B guidance rows, n tokens = T*h*w, C width, D latent channels, H W latent grid, M cache capacity,
bits = semantic_bits + detail_bits.
Two flavours of the cache have the same inputs and outputs: `inplace` uses the operators of opset 24 (TensorScatter,
Attention with nonpad_kv_seqlen), `portable` spells both out in plain operators for engines that do not have them.

Source: spec/world_model.md 2.3, 2.6 (dtypes), 6.
"""

from typing import Literal

import torch
from torch import Tensor, nn

from worldvln_edge.models.world_model import Block, WorldModel, rotate

ATTENTION_OPSET = 24


KVFlavour = Literal["inplace", "portable"]


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


def _scatter_plainly(cache_BHMD: Tensor, update_BHnD: Tensor, write_index_B: Tensor) -> Tensor:
    rows, heads, tokens = update_BHnD.shape[:3]
    places_BHn = (write_index_B[:, None, None] + torch.arange(tokens)).expand(rows, heads, tokens)
    rows_BHn = torch.arange(rows)[:, None, None].expand(rows, heads, tokens)
    heads_BHn = torch.arange(heads)[None, :, None].expand(rows, heads, tokens)
    return torch.onnx.ops.symbolic(
        "ScatterND",
        (cache_BHMD, torch.stack((rows_BHn, heads_BHn, places_BHn), -1), update_BHnD),
        attrs={"reduction": "none"},
        dtype=cache_BHMD.dtype,
        shape=cache_BHMD.shape,
    )


def _attend_plainly(q_BHnD: Tensor, key_BHMD: Tensor, value_BHMD: Tensor, kv_length_B: Tensor) -> Tensor:
    heads, size = q_BHnD.shape[1], q_BHnD.shape[3]
    kv_heads, capacity = key_BHMD.shape[1:3]
    # The query heads of a group share their key head by broadcasting: no key is repeated.
    q = (q_BHnD * size**-0.5).unflatten(1, (kv_heads, heads // kv_heads))
    hidden = torch.arange(capacity) >= kv_length_B[:, None, None, None, None]
    lowest = torch.full((), torch.finfo(q.dtype).min, dtype=q.dtype)
    scores = torch.where(hidden, lowest, torch.matmul(q, key_BHMD[:, :, None].transpose(3, 4)))
    weights = torch.softmax(scores.float(), -1).to(q.dtype)
    return torch.matmul(weights, value_BHMD[:, :, None]).flatten(1, 2)


class BlockGraph(nn.Module):
    """One block over its two caches. With `only_kv` it writes keys and values and computes nothing else.

    x [B, n, C], past_key and past_value [B, kv_heads, M, hd] -> (x unless `only_kv`), present_key, present_value
    """

    def __init__(self, block: Block, *, kv: KVFlavour, only_kv: bool):
        super().__init__()
        self.block, self.only_kv = block, only_kv
        self.scatter, self.attend = (_scatter, _attend) if kv == "inplace" else (_scatter_plainly, _attend_plainly)

    def forward(
        self,
        x: Tensor,
        rope: Tensor,
        write_index: Tensor,
        kv_length: Tensor,
        past_key: Tensor,
        past_value: Tensor,
    ):
        block, attn = self.block, self.block.attn
        h = block.input_layernorm(x)

        def heads(y: Tensor) -> Tensor:
            return y.unflatten(-1, (-1, attn.head_dim)).transpose(1, 2)

        key = self.scatter(past_key, rotate(attn.k_norm(heads(attn.k_proj(h))), rope), write_index)
        value = self.scatter(past_value, heads(attn.v_proj(h)), write_index)
        if self.only_kv:
            return key, value
        q = rotate(attn.q_norm(heads(attn.q_proj(h))), rope)
        x = x + attn.o_proj(self.attend(q, key, value, kv_length).transpose(1, 2).flatten(2))
        return x + block.mlp(block.post_attention_layernorm(x)), key, value


BLOCKS_DOMAIN, BLOCKS_OP = "worldvln", "Blocks"


def _blocks(
    x_BnC: Tensor, rope: Tensor, write_index: Tensor, kv_length: Tensor, caches: tuple[Tensor, ...], *, only_kv: bool
) -> tuple[Tensor, ...]:
    """All blocks as one node, which `tracing.py` replaces by copies of a traced `BlockGraph`: they are all alike.

    Returns:
        x, unless only the keys and values are wanted; then the caches.
    """
    outputs = caches if only_kv else (x_BnC, *caches)
    return tuple(
        torch.onnx.ops.symbolic_multi_out(
            f"{BLOCKS_DOMAIN}::{BLOCKS_OP}",
            (x_BnC, rope, write_index, kv_length, *caches),
            dtypes=[output.dtype for output in outputs],
            shapes=[output.shape for output in outputs],
            version=1,
        )
    )


class ContextGraph(nn.Module):
    """Keys and values of text or of an observed scale; nothing else is computed."""

    def __init__(self, model: WorldModel):
        super().__init__()
        self.dtype = model.block_dtype

    def forward(self, embeds: Tensor, rope: Tensor, write_index: Tensor, kv_length: Tensor, *caches: Tensor):
        return _blocks(embeds.to(self.dtype), rope, write_index, kv_length, caches, only_kv=True)


class LatentEmbedGraph(nn.Module):
    """Latent tokens of an observed scale to the residual stream."""

    def __init__(self, model: WorldModel):
        super().__init__()
        self.word_embed = model.word_embed

    def forward(self, latents: Tensor) -> Tensor:
        return self.word_embed(latents)


class StepGraph(nn.Module):
    """One generation step: codes so far in, codes with this step's bits out (inputs: `runtime/worldvln/graphs.py`)."""

    def __init__(self, model: WorldModel, *, is_guided: bool, norm_threshold: float, eta: float):
        super().__init__()
        self.word_embed = model.word_embed
        self.dtype = model.block_dtype
        self.norm = model.norm_hidden_sates
        self.semantic_head = model.semantic_head2
        self.detail_head = model.head
        self.is_guided = is_guided
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
        x = self.word_embed(tokens).expand(write_index.shape[0], -1, -1)
        flat_rope = rope.flatten(1, 3)
        hidden, *present = _blocks(x.to(self.dtype), flat_rope, write_index, kv_length, caches, only_kv=False)
        z = self.norm(hidden.float())
        heads = [head(z).unflatten(-1, (-1, 2)) for head in (self.semantic_head, self.detail_head)]
        logits = torch.cat(heads, 2) * (bit_mask[:, None] * inverse_tau)  # [B, n, bits, 2]
        guided = logits[0]
        if self.is_guided:
            # The last row is the unconditional one; in a call without it, it is the instruction's own, and the
            # difference between the two is zero.
            last = logits.narrow(0, logits.shape[0] - 1, 1)[0]
            guided = self._guide(guided, last, bit_mask, guidance)
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
