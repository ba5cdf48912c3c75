"""A GRPO run of a tiny model whose environments are moving pictures: small enough for tests, and real in all else.

Also a program, so that tests can kill it and `torchrun` can start it: see `main`.
"""

import json
import os
import signal
import sys
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import msgspec
import torch
from grpo_flights import INSTRUCTIONS, expert_task, fly_together, tiny_tokenizer
from safetensors.torch import save_file
from small_models import STATS, random_model, tiny_config

from worldvln_edge.models.worldvln import WorldVLN
from worldvln_edge.tasks import Task
from worldvln_edge.training.grpo.candidates import Candidate
from worldvln_edge.training.grpo.grpo_config import GrpoConfig
from worldvln_edge.training.grpo.grpo_run import GrpoResult, GrpoRun
from worldvln_edge.training.grpo.learner import AnchorFlights, Learner
from worldvln_edge.training.grpo.rollout import FlierIdentity
from worldvln_edge.training.grpo.rollout_policy import RolloutPolicy
from worldvln_edge.training.grpo.task_pool import ListedTasks
from worldvln_edge.training.grpo.trace import FlightTrace
from worldvln_edge.training.stages.backbone_rows import LatentSet
from worldvln_edge.training.stages.backbone_stage import BackboneConfig
from worldvln_edge.training.trainer.distributed import Ranks, started_ranks
from worldvln_edge.training.trainer.stage_run import StageRun
from worldvln_edge.training.trainer.trainer import TrainerConfig

MODEL = tiny_config(repetitions=1)
SMALL = {
    "collections": 2,
    "tasks": 2,
    "candidates": 3,
    "rows": 6,
    "step_samples": 9,
    "micro_samples": 5,
    "anchor_rows": 2,
    "learning_rate": 3e-4,
    "evaluation": {"every": 1, "tasks": 2, "rollouts": 2},
    "k3_limit": 10.0,
    "clipped_limit": 1.0,
}


def tasks(count: int, name: str) -> list[Task]:
    return [
        expert_task(MODEL, task_id=f"{name}-{i}", instruction=INSTRUCTIONS[i % len(INSTRUCTIONS)], turn_deg=2.0 * i)
        for i in range(count)
    ]


class NoiseFlier:
    """Flies what waits in groups that go together; `before` is called with the name of every flight it brings."""

    def __init__(self, policy: RolloutPolicy, before: Callable[[str], None]):
        self._policy, self._before = policy, before

    @property
    def identity(self) -> FlierIdentity:
        policy = self._policy
        return FlierIdentity(
            checkpoint_digest=policy.digest,
            policy_scales=policy.policy_scales,
            repetitions=policy.repetitions,
            rows=policy.rows,
            rules=(),
        )

    def check(self, tasks: Sequence[Task]) -> None:
        """Every task can be flown."""

    def fly(self, waiting: deque[Candidate]) -> Iterator[FlightTrace]:
        while waiting:
            own = [waiting.popleft() for _ in range(min(self._policy.rows, len(waiting)))]
            for candidate, trace in zip(own, fly_together(self._policy, own), strict=True):
                self._before(candidate.name)
                yield trace


def random_policy() -> WorldVLN:
    """A random model whose bits are nearly even, as a policy that still explores has them."""
    model = random_model(MODEL)
    with torch.no_grad():
        model.world_model.semantic_head2.weight.mul_(0.1)
    return model


def train(
    folder: Path,
    *,
    before: Callable[[str], None] = lambda name: None,
    ranks: Ranks | None = None,
    trainer: dict | None = None,
    seed: int = 1,
    show: Callable[[str], None] | None = None,
    **changes,
) -> GrpoResult:
    """A run in `folder` with `changes` to `SMALL`."""
    config = msgspec.convert(SMALL | changes, GrpoConfig)
    generator = torch.Generator().manual_seed(7)
    model = random_policy()
    frames = 1 + MODEL.horizon.segments * MODEL.schedule.frames_inner_clip
    latents = torch.randn(6, 16, frames, 2, 3, generator=generator)
    flights = LatentSet(latents, [INSTRUCTIONS[i % 4] for i in range(6)])
    tokenizer = tiny_tokenizer(MODEL)
    anchor = AnchorFlights(config=BackboneConfig(pad_multiple=8), flights=flights, held_out=flights)
    ranks = ranks or Ranks()
    learner = Learner(model, tokenizer, config, anchor, ranks=ranks, seed=seed)
    return GrpoRun(
        learner,
        STATS.latent_head,
        tokenizer,
        config,
        msgspec.convert({"log_every": 1, "tensorboard": False} | (trainer or {}), TrainerConfig),
        lambda policy: NoiseFlier(policy, before),
        ListedTasks(tasks(4, "train"), seed=seed, source="tasks"),
        tasks(config.evaluation.tasks, "held-out"),
        folder,
        {"preset": MODEL.name},
        seed=seed,
        ranks=ranks,
        show=show,
    ).run()


def main() -> None:
    """`grpo_program.py FOLDER OPTIONS`; with `die_at` or `die_at_step` it kills itself before that flight or step."""
    torch.set_num_threads(1)
    folder, options = Path(sys.argv[1]), json.loads(sys.argv[2])
    die_at, die_at_step = options.pop("die_at", None), options.pop("die_at_step", None)
    flown: list[str] = []
    steps: list[int] = []

    def before(name: str) -> None:
        flown.append(name)
        if len(flown) == die_at:
            os.kill(os.getpid(), signal.SIGKILL)

    step = StageRun.step

    def counted(run: StageRun, *args, **keywords):
        steps.append(0)
        if len(steps) == die_at_step:
            os.kill(os.getpid(), signal.SIGKILL)
        return step(run, *args, **keywords)

    StageRun.step = counted
    with started_ranks("cpu") as ranks:
        result = train(folder, before=before, ranks=ranks, **options)
        if ranks.is_first:
            save_file(dict(result.weights), folder / "weights.safetensors")


if __name__ == "__main__":
    main()
