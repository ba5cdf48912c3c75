"""GRPO as a stage: the loss of a step, frozen parts, the reference, and the SFT loss beside it."""

import msgspec
import pytest
import torch
from grpo_flights import expert_task, fly, tiny_tokenizer
from grpo_program import MODEL, SMALL, random_policy

from worldvln_edge.config import ConfigError
from worldvln_edge.training.grpo.grpo_config import GrpoConfig
from worldvln_edge.training.grpo.grpo_stage import GrpoBatch
from worldvln_edge.training.grpo.learner import AnchorFlights, Learner
from worldvln_edge.training.grpo.objective import sample_losses
from worldvln_edge.training.grpo.scored_collection import ScoredCollection, judge_collection, padded
from worldvln_edge.training.stages.backbone_rows import LatentSet
from worldvln_edge.training.stages.backbone_stage import BackboneConfig
from worldvln_edge.training.trainer.distributed import Ranks
from worldvln_edge.training.trainer.loading import Position, load_steps
from worldvln_edge.training.trainer.stop_signal import StopSignal

TOKENIZER = tiny_tokenizer(MODEL)
TASKS = {f"task-{i}": expert_task(MODEL, task_id=f"task-{i}", turn_deg=3.0 * i) for i in range(2)}


def make_learner(**changes) -> tuple[Learner, ScoredCollection]:
    """A learner and a collection that it has flown and scored."""
    config = msgspec.convert({**SMALL, "anchor_rows": 2, **changes}, GrpoConfig)
    frames = 1 + MODEL.horizon.segments * MODEL.schedule.frames_inner_clip
    latents = torch.randn(4, 16, frames, 2, 3, generator=torch.Generator().manual_seed(3))
    flights = LatentSet(latents, ["fly forward", "climb", "turn left", "fly back"])
    anchor = AnchorFlights(config=BackboneConfig(pad_multiple=8), flights=flights, held_out=flights)
    model = random_policy()
    learner = Learner(model, TOKENIZER, config, anchor, ranks=Ranks(), seed=0)
    traces = fly(model, TOKENIZER, candidates=3, tasks=2)
    judged = judge_collection(traces, TASKS, config, step=MODEL.horizon.step)
    scores = padded(learner.scores(judged.samples))
    collection = ScoredCollection(
        samples=judged.samples,
        advantages=torch.from_numpy(judged.advantages).float(),
        old_BN=scores,
        ref_BN=padded(learner.reference_scores(judged.samples)),
        numbers={},
    )
    learner.stage.use(collection)
    return learner, collection


def take_steps(learner: Learner, *, epochs: int = 1) -> list[dict[str, float]]:
    steps = load_steps(learner.stage, Position(0, 0), Ranks(), workers=0, seed=0, epochs=epochs)
    return [dict(learner.run.step(one, i, 10, stop=StopSignal()).terms) for i, one in enumerate(steps)]


def test_every_sample_comes_once_a_pass_and_every_step_has_sft_rows():
    learner, collection = make_learner(step_samples=8, micro_samples=5)
    plan = learner.stage.plan(0)
    rows = [row for step in plan for micro in step for row in micro]
    assert sorted(row for row in rows if row >= 0) == list(range(len(collection.samples)))
    assert all(sum(row < 0 for micro in step for row in micro) == 2 for step in plan)
    assert all(len({row >= 0 for row in micro}) == 1 for step in plan for micro in step)
    assert learner.stage.plan(0) == plan != learner.stage.plan(1)


def test_the_first_step_has_ratios_of_1_and_the_loss_is_that_of_the_formulas():
    learner, collection = make_learner(step_samples=99, micro_samples=5)
    first = take_steps(learner)[0]
    assert first["ratio"] == pytest.approx(1, abs=1e-5)
    assert first["clipped"] == 0
    assert first["k3"] == pytest.approx(0, abs=1e-6)
    assert first["policy"] == pytest.approx(-float(collection.advantages.mean()), abs=1e-5)
    loss = first["policy"] + 0.05 * first["divergence"] + 0.1 * first["anchor"]
    assert first["loss"] == pytest.approx(loss, abs=1e-6)
    again = learner.scores(collection.samples)
    whole = sample_losses(
        padded(again),
        collection.old_BN,
        collection.ref_BN,
        torch.ones_like(collection.old_BN, dtype=torch.bool),
        collection.advantages,
        learner.stage.config.objective,
    )
    second = take_steps(learner)[0]
    for name, value in (("policy", whole.policy), ("k3", whole.k3), ("ratio", whole.ratio)):
        assert second[name] == pytest.approx(float(value.mean()), abs=1e-5), name


def test_steps_make_better_flights_likelier_than_worse_ones():
    """Eight steps, without the anchor."""
    learner, collection = make_learner(
        anchor=0.0, step_samples=99, micro_samples=99, objective={"eps": 0.2, "beta": 0.0}
    )
    take_steps(learner, epochs=8)
    change = (padded(learner.scores(collection.samples)) - collection.old_BN).mean(1)
    assert float(torch.corrcoef(torch.stack([change, collection.advantages]))[0, 1]) > 0.5


def test_the_reference_stays_what_the_run_began_with_and_the_policy_moves_on():
    learner, collection = make_learner()
    take_steps(learner)
    samples = collection.samples
    torch.testing.assert_close(padded(learner.reference_scores(samples)), collection.ref_BN, rtol=0, atol=0)
    moved = padded(learner.scores(samples))
    assert not torch.allclose(moved, collection.old_BN, atol=1e-4)
    torch.testing.assert_close(padded(learner.scores(samples)), moved, rtol=0, atol=0)


def test_frozen_parts_have_no_gradient_no_moments_and_do_not_move():
    learner, _ = make_learner(frozen_chunks=1)
    before = {name: tensor.clone() for name, tensor in learner.model.state_dict().items()}
    take_steps(learner)
    trained = {"block_chunks.1.", "norm_hidden_sates", "head", "semantic_head2"}
    moved = {name for name, tensor in learner.model.state_dict().items() if not torch.equal(tensor, before[name])}
    assert moved
    assert all(any(f"world_model.{part}" in name for part in trained) for name in moved)
    for parameter in learner.model.parameters():
        assert parameter.requires_grad or (parameter.grad is None and not learner.run.optimiser.state.get(parameter))


def test_without_an_anchor_there_is_no_sft_loss_and_nothing_to_validate():
    learner, _ = make_learner(anchor=0.0)
    assert "anchor" not in take_steps(learner)[0]
    assert learner.run.validate() == {}
    assert make_learner()[0].run.validate()["loss"] > 0


def test_a_batch_does_not_depend_on_the_process_that_loads_it():
    learner, collection = make_learner()
    one, other = (learner.stage.load(0, [3, 0]) for _ in range(2))
    assert isinstance(one, GrpoBatch)
    assert torch.equal(one.old_BN, collection.old_BN[[3, 0]])
    assert torch.equal(one.policy.latents_RVC, other.policy.latents_RVC)


def test_wrong_settings_are_named():
    with pytest.raises(ConfigError, match=r"frozen_chunks must be 0..1 \(the world model has 2 chunks\), found 2"):
        make_learner(frozen_chunks=2)
    learner, _ = make_learner()
    learner.stage._collection = None
    with pytest.raises(RuntimeError, match="no collection to learn from"):
        learner.stage.plan(0)
