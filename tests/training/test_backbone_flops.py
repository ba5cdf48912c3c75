"""FLOP of a training batch against those that PyTorch counts while it runs."""

import msgspec
import pytest
from backbone_stages import CONFIG, EXACT, MixedFlights, make_stage
from small_models import random_model
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from worldvln_edge.training.stages.backbone_batch import BackboneBatch
from worldvln_edge.training.stages.backbone_stage import BackboneStage
from worldvln_edge.training.stages.lora import LoraConfig
from worldvln_edge.world_model_flops import SequenceTokens, sequence_macs

ONE_FLIGHT = MixedFlights(frames=(7,), instructions=["climb to the red tower"])
TEXT_OUTSIDE = msgspec.structs.replace(EXACT, pad_multiple=1, train_text_encoder=False)


def count(stage: BackboneStage, batch: BackboneBatch) -> tuple[int, int]:
    """FLOP that PyTorch counts in forward and backward: of products with weights, and of attention."""
    stage.totals(batch)  # texts are kept from here on
    # The CPU's fused attention is not counted; the plain products of this way are.
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        stage.totals(batch)["loss"].backward()
    attention = others = 0
    for operator, flops in counter.get_flop_counts()["Global"].items():
        is_attention = "bmm" in str(operator)
        attention, others = attention + flops * is_attention, others + flops * (not is_attention)
    return others, attention


def weights_only(stage: BackboneStage, batch: BackboneBatch) -> int:
    """The stage's own number without attention."""
    model = stage.network.world_model.config
    blocks = model.depth - stage.config.frozen_chunks * (model.depth // model.block_chunks)
    return stage.flops(batch) - 2 * 2 * batch.mask.visible_pairs() * model.width * (model.depth + 2 * blocks)


def test_products_with_weights_are_counted_exactly():
    stage = make_stage(TEXT_OUTSIDE, ONE_FLIGHT)
    batch = stage.load(0, [0])
    visual = len(batch.semantic.place_N) + len(batch.detail.place_N)
    # No gradient goes to the latents: the first product costs its input's part less.
    embeddings = 2 * visual * CONFIG.world_model.latent_channels * CONFIG.world_model.width
    assert count(stage, batch)[0] == weights_only(stage, batch) - embeddings


def test_attention_is_counted_by_visible_pairs():
    """A dense mask computes every pair of tokens; of those, some are visible."""
    stage = make_stage(TEXT_OUTSIDE, ONE_FLIGHT)
    batch = stage.load(0, [0])
    length = batch.mask.documents_BL.shape[1]
    every = SequenceTokens(semantic=0, detail=0, text=0, pairs=length**2)
    forward = 2 * sequence_macs(CONFIG.world_model, every).attention
    assert count(stage, batch)[1] == 3 * forward
    own = stage.flops(batch) - weights_only(stage, batch)
    assert own / (3 * forward) == pytest.approx(float(batch.mask.dense().float().mean()))


def test_what_is_frozen_costs_less():
    whole = make_stage(TEXT_OUTSIDE, ONE_FLIGHT)
    frozen = make_stage(msgspec.structs.replace(TEXT_OUTSIDE, frozen_chunks=1), ONE_FLIGHT, random_model(CONFIG))
    batch = whole.load(0, [0])
    assert count(frozen, batch)[0] == weights_only(frozen, batch)
    assert frozen.flops(batch) < whole.flops(batch)


def test_adapters_cost_two_thirds_of_the_products_with_weights():
    plain = make_stage(TEXT_OUTSIDE, ONE_FLIGHT)
    adapted = make_stage(
        msgspec.structs.replace(TEXT_OUTSIDE, lora=LoraConfig(rank=1)), ONE_FLIGHT, random_model(CONFIG)
    )
    batch = plain.load(0, [0])
    assert weights_only(adapted, batch) == pytest.approx(weights_only(plain, batch) * 2 / 3)


def test_padding_is_not_counted():
    padded = make_stage(msgspec.structs.replace(TEXT_OUTSIDE, pad_multiple=128), ONE_FLIGHT)
    tight = make_stage(TEXT_OUTSIDE, ONE_FLIGHT)
    a, b = padded.load(0, [0]), tight.load(0, [0])
    assert padded.flops(a) == tight.flops(b)
    assert padded.tokens(a) == tight.tokens(b) == b.mask.documents_BL.numel()
