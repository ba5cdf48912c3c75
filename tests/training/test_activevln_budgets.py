"""Budgets of ActiveVLN's episodes are the published ones."""

import json

import pytest

from worldvln_edge.training.environments.activevln_budgets import BudgetConfig, EpisodeBudget, episode_budget


def test_every_recorded_budget_is_given_alike(golden):
    cases = json.loads((golden("seed_systems") / "activevln_env.json").read_text())["step_budget"]
    assert len(cases) == 37
    for case in cases:
        config = BudgetConfig(
            tolerance=case["tol"],
            most_steps=case["n_max"],
            warmup_ratio=case["warmup_ratio"],
            exponent=case["alpha"],
            fewest_own=case["n_min"],
        )
        found = episode_budget(case["n_gt_actions"], step=case["step"], total_steps=case["total_steps"], config=config)
        recorded = EpisodeBudget(steps=case["step_budget"], turns=case["turn_budget"], history=case["n_history"])
        assert found == recorded, case
        assert case["n_gt_actions"] - found.history == case["n_drop"]


def test_an_episode_may_be_flown_from_its_start_in_spite_of_the_curriculum():
    config = BudgetConfig(warmup_ratio=0.5)
    assert episode_budget(36, step=1, total_steps=500, config=config).history == 34
    assert episode_budget(36, step=1, total_steps=500, config=config, from_start=True) == EpisodeBudget(
        steps=72, turns=40, history=0
    )
    assert episode_budget(1, step=1, total_steps=500, config=config) == EpisodeBudget(steps=2, turns=40, history=0)


def test_impossible_budgets_are_refused():
    with pytest.raises(ValueError, match=">= 1 actions of the expert in a step >= 1, found 0 and 1"):
        episode_budget(0, step=1, total_steps=1)
    with pytest.raises(ValueError, match=r"warmup_ratio in \[0, 1\]"):
        BudgetConfig(warmup_ratio=2)
    with pytest.raises(ValueError, match="most_steps and fewest_own must be >= 1"):
        BudgetConfig(fewest_own=0)
