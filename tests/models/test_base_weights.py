"""Training that begins with a base model: what fits is taken, what does not keeps its initial value and is named."""

from pathlib import Path

import msgspec
import pytest
import torch
from safetensors.torch import save_file
from small_models import tiny_config

from worldvln_edge.models.base_weights import load_base_weights
from worldvln_edge.models.checkpoint_file import CheckpointError
from worldvln_edge.models.world_model import WorldModel, initial_cfg_uncond

CONFIG = tiny_config().world_model


@pytest.fixture
def model() -> WorldModel:
    torch.manual_seed(0)
    return WorldModel(CONFIG)


@pytest.fixture
def base() -> dict[str, torch.Tensor]:
    torch.manual_seed(1)
    return {key: torch.randn_like(tensor) for key, tensor in WorldModel(CONFIG).state_dict().items()}


def _save(folder: Path, state: dict[str, torch.Tensor]) -> Path:
    path = folder / "base.safetensors"
    save_file(state, path)
    return path


def test_everything_that_fits_is_taken(tmp_path, model, base):
    found = load_base_weights(model, _save(tmp_path, base))
    assert set(found.loaded) == set(base)
    assert found.reshaped == found.missing == found.unused == ()
    assert all(torch.equal(tensor, base[key]) for key, tensor in model.state_dict().items())


def test_heads_of_other_bits_keep_their_initial_values(tmp_path, model, base):
    other = msgspec.structs.replace(CONFIG, latent_channels=8, semantic_bits=5, detail_bits=8)
    base = {key: torch.randn_like(tensor) for key, tensor in WorldModel(other).state_dict().items()}
    initial = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    found = load_base_weights(model, _save(tmp_path, base))
    expected = {"word_embed.weight", "head.weight", "head.bias", "semantic_head2.weight", "semantic_head2.bias"}
    assert set(found.reshaped) == expected
    for key, tensor in model.state_dict().items():
        assert torch.equal(tensor, initial[key] if key in expected else base[key]), key


def test_the_older_name_of_the_semantic_head_is_known(tmp_path, model, base):
    old = {key.replace("semantic_head2.", "semantic_head."): tensor for key, tensor in base.items()}
    found = load_base_weights(model, _save(tmp_path, old))
    assert found.missing == found.unused == ()
    assert torch.equal(model.semantic_head2.weight, base["semantic_head2.weight"])


@pytest.mark.parametrize("rows", [CONFIG.text_max_tokens + 3, CONFIG.text_max_tokens - 3])
def test_unconditional_text_is_cut_or_filled_up(tmp_path, model, base, rows: int):
    base["cfg_uncond"] = torch.randn(rows, CONFIG.text_channels)
    load_base_weights(model, _save(tmp_path, base))
    kept = min(rows, CONFIG.text_max_tokens)
    assert torch.equal(model.cfg_uncond[:kept], base["cfg_uncond"][:kept])
    assert torch.equal(model.cfg_uncond[kept:], initial_cfg_uncond(CONFIG)[kept:])


def test_what_is_missing_or_unknown_is_named(tmp_path, model, base):
    del base["sos_token"]
    base["lvl_1L"] = torch.zeros(3)
    found = load_base_weights(model, _save(tmp_path, base))
    assert found.missing == ("sos_token",)
    assert found.unused == ("lvl_1L",)


def test_blocks_must_fit(tmp_path, model, base):
    fewer = {key: tensor for key, tensor in base.items() if not key.startswith("block_chunks.1.")}
    with pytest.raises(CheckpointError, match=r"tensors of blocks are missing .*choose the preset"):
        load_base_weights(model, _save(tmp_path, fewer))
    base["block_chunks.0.module.0.attn.q_proj.weight"] = torch.zeros(8, 8)
    with pytest.raises(CheckpointError, match=r"q_proj.weight has shape \[8, 8\], the configuration says \[32, 32\]"):
        load_base_weights(model, _save(tmp_path, base))
    with pytest.raises(CheckpointError, match="no weights at"):
        load_base_weights(model, tmp_path / "nothing")
