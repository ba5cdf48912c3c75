"""Low-rank adapters: they begin as nothing, train alone, and are merged into plain weights."""

import pytest
import torch
from torch import nn

from worldvln_edge.config import ConfigError
from worldvln_edge.training.stages.lora import LoraConfig, LoraLinear, add_adapters, merged_state


class TwoLayers(nn.Module):
    def __init__(self):
        super().__init__()
        self.q_proj = nn.Linear(6, 4)
        self.o_proj = nn.Linear(4, 3, bias=False)

    def forward(self, x):
        return self.o_proj(torch.tanh(self.q_proj(x)))


@pytest.fixture
def network() -> TwoLayers:
    torch.manual_seed(0)
    return TwoLayers()


def _move(network: nn.Module) -> None:
    with torch.no_grad():
        for parameter in network.parameters():
            if parameter.requires_grad:
                parameter.normal_()


def test_adapters_begin_as_nothing_and_merge_into_what_they_compute(network: TwoLayers):
    x = torch.randn(5, 6)
    plain = network(x)
    assert add_adapters(network, LoraConfig(rank=2, alpha=3.0, targets=("q_proj", "o_proj")), seed=0) == [
        "q_proj",
        "o_proj",
    ]
    assert torch.equal(network(x), plain)
    _move(network)
    assert not torch.allclose(network(x), plain)
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    merged = merged_state(network.state_dict())
    fresh = TwoLayers()
    assert merged.keys() == fresh.state_dict().keys()
    fresh.load_state_dict(merged)
    torch.testing.assert_close(fresh(x), network(x))
    assert all(torch.equal(tensor, before[name]) for name, tensor in network.state_dict().items())
    change = merged["q_proj.weight"] - before["q_proj.weight"]
    assert torch.linalg.matrix_rank(change) == 2


def test_only_adapters_have_gradients(network: TwoLayers):
    add_adapters(network, LoraConfig(rank=2, targets=("q_proj",)), seed=0)
    network(torch.randn(5, 6)).sum().backward()
    found = {name for name, parameter in network.named_parameters() if parameter.grad is not None}
    assert found == {"q_proj.lora_down", "q_proj.lora_up"}


def test_plain_weights_load_behind_adapters(network: TwoLayers):
    add_adapters(network, LoraConfig(rank=2, targets=("q_proj",)), seed=0)
    other = TwoLayers()
    missing, unexpected = network.load_state_dict(other.state_dict(), strict=False)
    assert not unexpected
    assert set(missing) == {"q_proj.lora_down", "q_proj.lora_up", "q_proj.lora_scale"}
    x = torch.randn(5, 6)
    assert torch.equal(network(x), other(x))


def test_adapters_of_bf16_weights_are_fp32():
    torch.manual_seed(0)
    layer = LoraLinear(nn.Linear(6, 4).to(torch.bfloat16), LoraConfig(rank=2), torch.Generator())
    _move(layer)
    x = torch.randn(5, 6, dtype=torch.bfloat16)
    assert layer.lora_up.dtype == torch.float32
    assert layer(x).dtype == torch.bfloat16
    merged = merged_state(layer.state_dict())
    assert merged["weight"].dtype == torch.bfloat16
    expected = nn.functional.linear(x.float(), merged["weight"].float(), merged["bias"].float())
    torch.testing.assert_close(layer(x).float(), expected, atol=0.1, rtol=0.05)


def test_first_values_depend_on_the_seed_only():
    downs = []
    for seed in (0, 0, 1):
        network = TwoLayers()
        add_adapters(network, LoraConfig(rank=2, targets=("q_proj",)), seed=seed)
        downs.append(network.q_proj.lora_down)
    assert torch.equal(downs[0], downs[1])
    assert not torch.equal(downs[0], downs[2])


def test_a_lone_layer_is_merged_too():
    layer = LoraLinear(nn.Linear(6, 4), LoraConfig(rank=2), torch.Generator())
    _move(layer)
    x = torch.randn(5, 6)
    merged = merged_state(layer.state_dict())
    torch.testing.assert_close(nn.functional.linear(x, merged["weight"], merged["bias"]), layer(x))


def test_settings_that_cannot_work_are_refused(network: TwoLayers):
    with pytest.raises(ConfigError, match="no linear layer is called k_proj; there are o_proj, q_proj"):
        add_adapters(network, LoraConfig(targets=("q_proj", "k_proj")), seed=0)
    with pytest.raises(ConfigError, match=r"lora.rank must be >= 1, found 0"):
        LoraConfig(rank=0)
    with pytest.raises(ConfigError, match=r"lora.alpha must be finite and > 0, found nan"):
        LoraConfig(alpha=float("nan"))
    with pytest.raises(ConfigError, match=r"lora.targets is empty"):
        LoraConfig(targets=())
