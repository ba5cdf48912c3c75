"""Policy losses: the golden numbers, where the clip takes the gradient away, and that following it pays."""

import numpy as np
import pytest
import torch

from worldvln_edge.config import ConfigError
from worldvln_edge.training.grpo.advantages import NotFiniteError, group_advantages
from worldvln_edge.training.grpo.objective import ObjectiveConfig, sample_losses


@pytest.fixture(scope="module")
def arrays(golden):
    return np.load(golden("training") / "grpo_loss.npz")


@pytest.mark.golden
def test_the_product_objective_and_its_gradient_are_the_golden_ones(arrays):
    config = ObjectiveConfig(eps=float(arrays["product_eps"]), beta=float(arrays["product_beta"]))
    new = torch.from_numpy(arrays["bit_new"]).requires_grad_()
    old, ref, mask, advantages = (torch.from_numpy(arrays[k]) for k in ("bit_old", "bit_ref", "bit_mask", "adv_signed"))
    losses = sample_losses(new, old, ref, mask, advantages, config)
    loss = (losses.policy + config.beta * losses.divergence).mean()
    loss.backward()
    found = {
        "product_ratio": losses.ratio,
        "product_objective": -losses.policy.detach(),
        "product_k3": losses.k3,
        "product_loss": loss.detach(),
        "product_grad_bit_new": new.grad,
    }
    for name, value in found.items():
        np.testing.assert_allclose(value.numpy(), arrays[name], rtol=1e-9, atol=1e-14, err_msg=name)


def spread(sums: np.ndarray, counts: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
    """Bits of equal log-probability that add up to the sums."""
    is_bit = torch.arange(int(counts.max())) < torch.from_numpy(counts)[:, None]
    return torch.where(is_bit, torch.from_numpy(sums / counts)[:, None], 0), is_bit


@pytest.mark.golden
def test_the_published_objective_is_the_golden_one_without_its_inverted_sign(arrays):
    counts = arrays["bit_count"]
    config = ObjectiveConfig(
        kind="published", eps=float(arrays["eps"]), beta=float(arrays["beta"]), aux=float(arrays["aux"])
    )
    (new, is_bit), (old, _), (ref, _) = (spread(arrays[f"{k}_logprob"], counts) for k in ("new", "old", "ref"))
    losses = sample_losses(new, old, ref, is_bit, torch.from_numpy(arrays["adv_nonneg"]), config)
    np.testing.assert_allclose(losses.ratio.numpy(), arrays["reference_ratio"], rtol=1e-9)
    total = losses.policy + config.beta * losses.divergence
    np.testing.assert_allclose(total.numpy(), arrays["reference_loss_with_kl_aux"], rtol=1e-9)
    plain = ObjectiveConfig(kind="published", eps=0.15)
    signed = torch.from_numpy(arrays["adv_signed"])
    np.testing.assert_allclose(
        sample_losses(new, old, ref, is_bit, torch.from_numpy(arrays["adv_nonneg"]), plain).policy.numpy(),
        arrays["reference_pg_nonneg"],
        rtol=1e-9,
    )
    pessimistic = sample_losses(new, old, ref, is_bit, signed, plain).policy.numpy()
    inverted = arrays["reference_pg_signed_buggy"]
    assert not np.allclose(pessimistic, inverted)
    np.testing.assert_allclose(pessimistic[signed >= 0], inverted[signed >= 0], rtol=1e-9)
    assert (pessimistic[signed < 0] >= inverted[signed < 0] - 1e-12).all()


@pytest.mark.parametrize("advantage", [1.0, -1.0])
@pytest.mark.parametrize("kind", ["product", "published"])
def test_the_gradient_is_zero_exactly_where_the_clip_is_active_with_the_sign_of_the_advantage(kind, advantage: float):
    bits = 8
    changes = torch.tensor([-0.5, -0.01, 0.0, 0.01, 0.5], dtype=torch.float64)
    old = torch.full((5, bits), -0.7, dtype=torch.float64)
    new = (old + (changes if kind == "product" else changes / bits)[:, None]).requires_grad_()
    config = ObjectiveConfig(kind=kind, eps=0.05, beta=0.0)
    losses = sample_losses(new, old, old, torch.ones(5, bits, dtype=torch.bool), torch.full((5,), advantage), config)
    losses.policy.sum().backward()
    moves = (new.grad.abs().sum(1) > 0).tolist()
    # Too likely already and good, or too unlikely already and bad: no more of it.
    assert moves == ([True, True, True, True, False] if advantage > 0 else [False, True, True, True, True])
    assert losses.is_clipped.tolist() == [1, 0, 0, 0, 1]
    assert (new.grad[2] < 0).all() if advantage > 0 else (new.grad[2] > 0).all()


def test_bits_behind_the_end_of_a_sample_count_for_nothing():
    torch.manual_seed(0)
    new, old, ref = (-torch.rand(2, 6).double() for _ in range(3))
    is_bit = torch.tensor([[True] * 6, [True] * 4 + [False] * 2])
    advantages = torch.tensor([0.5, -0.5])
    config = ObjectiveConfig()
    both = sample_losses(new.requires_grad_(), old, ref, is_bit, advantages, config)
    (both.policy + both.divergence).sum().backward()
    assert not new.grad[1, 4:].any()
    alone = sample_losses(new[1:, :4], old[1:, :4], ref[1:, :4], is_bit[1:, :4], advantages[1:], config)
    for one, other in zip(both, alone, strict=True):
        assert float(one[1]) == pytest.approx(float(other[0]), rel=1e-12)


def test_advantages_are_limited_on_both_sides():
    same = torch.zeros(2, 3)
    losses = sample_losses(
        same,
        same,
        same,
        torch.ones(2, 3, dtype=torch.bool),
        torch.tensor([9.0, -9.0]),
        ObjectiveConfig(advantage_limit=2.0),
    )
    assert losses.policy.tolist() == [-2.0, 2.0]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"eps": 0.0}, r"eps must be in \(0, 1\), found 0.0"),
        ({"beta": -0.1}, "beta must be finite and >= 0"),
        ({"advantage_limit": 0.0}, "advantage_limit must be finite and > 0"),
        ({"aux": 0.1}, "aux is of the published objective only"),
    ],
)
def test_objectives_out_of_range_are_refused(values, message: str):
    with pytest.raises(ConfigError, match=message):
        ObjectiveConfig(**values)


def test_a_group_is_centred_scaled_limited_and_dropped_where_it_says_nothing():
    found = group_advantages(np.array([1.0, 2.0, 6.0]))
    assert found is not None
    assert found.mean() == pytest.approx(0, abs=1e-12)
    assert found.std() == pytest.approx(1, rel=1e-3)
    outlier = group_advantages(np.array([0.0] * 99 + [1.0]))
    assert outlier is not None
    assert outlier.max() == 5.0
    assert group_advantages(np.array([0.3])) is None
    assert group_advantages(np.array([0.3, 0.3 + 1e-9])) is None
    with pytest.raises(NotFiniteError, match=r"returns of a group must be finite, found \[1.0, nan\]"):
        group_advantages(np.array([1.0, np.nan]))
    with pytest.raises(ValueError, match="the group is empty"):
        group_advantages(np.array([]))


@pytest.mark.parametrize("kind", ["product", "published"])
def test_following_the_gradient_raises_the_reward_of_a_small_policy(kind):
    """Eight independent bits; the reward is the share of them that equal a pattern."""
    torch.manual_seed(0)
    pattern = torch.tensor([1, 0, 1, 1, 0, 0, 1, 0]).bool()
    logits = torch.zeros(8, requires_grad=True)
    optimiser = torch.optim.Adam([logits], lr=0.05)
    config = ObjectiveConfig(kind=kind, eps=0.2, beta=0.0)
    rewards = []
    for _ in range(30):
        with torch.no_grad():
            bits = torch.rand(64, 8) < torch.sigmoid(logits)
            reward = (bits == pattern).float().mean(1)
            rewards.append(float(reward.mean()))
            old = torch.nn.functional.logsigmoid(torch.where(bits, logits, -logits))
            reference = torch.nn.functional.logsigmoid(torch.zeros(64, 8))
        signed = torch.from_numpy(group_advantages(reward.numpy())).float()
        advantages = signed if kind == "product" else signed.clamp(0, 1)
        for _ in range(2):
            new = torch.nn.functional.logsigmoid(torch.where(bits, logits, -logits))
            losses = sample_losses(new, old, reference, torch.ones_like(bits), advantages, config)
            optimiser.zero_grad()
            losses.policy.mean().backward()
            optimiser.step()
    assert np.mean(rewards[:3]) < 0.6
    assert np.mean(rewards[-3:]) > 0.8
