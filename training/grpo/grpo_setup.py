"""From a checkpoint, a recipe and flights to a GRPO run, and from its result to a checkpoint again."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer

from worldvln_edge.atomic import atomic_file
from worldvln_edge.models.worldvln import save_checkpoint
from worldvln_edge.runtime.worldvln.tokenizer import PromptTokenizer
from worldvln_edge.tasks import Task, read_task_list
from worldvln_edge.training.grpo.grpo_config import GrpoConfig
from worldvln_edge.training.grpo.grpo_run import GrpoResult, GrpoRun
from worldvln_edge.training.grpo.learner import AnchorFlights, Learner
from worldvln_edge.training.grpo.policy_steps import check_policy_scales
from worldvln_edge.training.grpo.run_collections import MakeFlier
from worldvln_edge.training.grpo.run_table import TABLE_FILE
from worldvln_edge.training.grpo.scored_collection import GrpoError
from worldvln_edge.training.grpo.task_pool import GeneratedTasks, ListedTasks, TaskPool
from worldvln_edge.training.sim.tasks import generate_task
from worldvln_edge.training.stages.backbone_rows import LatentFlights
from worldvln_edge.training.stages.flight_latents import cache_latents
from worldvln_edge.training.stages.flight_sources import TrainingFlights
from worldvln_edge.training.stages.flight_subset import first_flights
from worldvln_edge.training.stages.released_output import write_released
from worldvln_edge.training.stages.stage_weights import explained_writes
from worldvln_edge.training.stages.training_start import Start
from worldvln_edge.training.trainer.distributed import Ranks
from worldvln_edge.training.trainer.recipe import Recipe
from worldvln_edge.training.trainer.run_folder import CURVE_FILE, RUN_FILE

GRPO_FOLDER, LATENTS = "grpo", "latents"


@dataclass(frozen=True, kw_only=True)
class GrpoInputs:
    """What a run is made of."""

    start: Start
    """With a checkpoint."""
    recipe: Recipe
    flights: TrainingFlights | None
    """Of the SFT loss; None: there is none (`grpo.anchor` 0)."""
    held_out_flights: TrainingFlights | None
    tasks: TaskPool
    held_out_tasks: list[Task]
    work: Path
    seed: int


class GrpoSetup:
    """A run that is ready to go.

    Args:
        inputs: what it is made of.
        make_flier: where the policy flies.
        out: folder of the checkpoint that is to be written.
        ranks: the processes.
        show: takes lines of the live table.

    Raises:
        GrpoError: see `check_start`.
        ConfigError, CheckpointError: see there.
    """

    def __init__(
        self,
        inputs: GrpoInputs,
        make_flier: MakeFlier,
        out: Path,
        ranks: Ranks,
        *,
        show: Callable[[str], None] | None = None,
    ):
        start, self._inputs, self._out, self._ranks = inputs.start, inputs, out, ranks
        config: GrpoConfig = inputs.recipe.tables["grpo"]
        check_start(start, config, out, has_flights=inputs.flights is not None)
        self._tokenizer_json = start.tokenizer_json(())
        tokenizer = PromptTokenizer(Tokenizer.from_str(self._tokenizer_json), start.config.world_model.text_max_tokens)
        model = start.model(inputs.seed).to(ranks.device)
        anchor = None
        if config.anchor > 0:
            anchor = self._anchor(model.vae)
        self._learner = Learner(model, tokenizer, config, anchor, ranks=ranks, seed=inputs.seed)
        self.folder = inputs.work / GRPO_FOLDER
        self._run = GrpoRun(
            self._learner,
            start.head_stats().latent_head,
            tokenizer,
            config,
            inputs.recipe.trainer,
            make_flier,
            inputs.tasks,
            inputs.held_out_tasks,
            self.folder,
            {
                "preset": start.config.name,
                "model_sha256": hashlib.sha256(start.config.to_json()).hexdigest(),
                "checkpoint": start.fingerprint(),
                "data": None if inputs.flights is None else inputs.flights.fingerprint,
            },
            seed=inputs.seed,
            ranks=ranks,
            show=show,
        )

    def run(self) -> GrpoResult:
        """See `GrpoRun.run`; the result is then in the networks that `write_checkpoint` writes."""
        result = self._run.run()
        if self._ranks.is_first:
            self._learner.model.world_model.load_state_dict(result.weights)
        return result

    def write_checkpoint(self) -> None:
        """Write the policy as a checkpoint of the kind that the run began with; its table lies beside it.

        `run.json` and `loss_curve.jsonl` are those of the checkpoint that the run began with, and this run's.

        Raises:
            ChainError: the disk is full; an earlier checkpoint stays as it was.
        """
        if self._ranks.is_first:
            with explained_writes(self._out):
                self._write()
        self._ranks.wait()

    def _write(self) -> None:
        start, model, out = self._inputs.start, self._learner.model, self._out
        runs = _runs_before(start)
        runs[self._learner.stage.name] = json.loads((self.folder / RUN_FILE).read_text(encoding="utf-8"))
        curve = _text_before(start, CURVE_FILE) + (self.folder / CURVE_FILE).read_text(encoding="utf-8")
        files = {name: self._inputs.work / name for name in (CURVE_FILE, RUN_FILE)}
        for name, text in ((CURVE_FILE, curve), (RUN_FILE, json.dumps(runs, indent=1) + "\n")):
            with atomic_file(files[name]) as building:
                building.write_text(text, encoding="utf-8")
        files[TABLE_FILE] = self.folder / TABLE_FILE
        if start.released is not None:
            write_released(out, start.released, model, has_backbone=True, action_stats=None)
            for name, file in files.items():
                shutil.copyfile(file, out / name)
            return
        save_checkpoint(out, model, start.head_stats(), self._tokenizer_json, extra_files=files)

    def _anchor(self, vae: torch.nn.Module) -> AnchorFlights:
        inputs, recipe = self._inputs, self._inputs.recipe
        chain = recipe.tables["chain"]

        def latents(flights: TrainingFlights | None) -> LatentFlights | None:
            if flights is None:
                return None
            return cache_latents(
                vae,
                first_flights(flights.source, chain.limit),
                inputs.work / LATENTS,
                self._ranks,
                temporal_stride=inputs.start.config.video_vae.temporal_stride,
                batch=chain.batch,
                show_progress=self._ranks.is_first,
            )

        training = latents(inputs.flights)
        assert training is not None
        return AnchorFlights(
            config=recipe.stage("sft").config, flights=training, held_out=latents(inputs.held_out_flights)
        )


def _text_before(start: Start, name: str) -> str:
    """A file of the checkpoint that the run began with, if that says how it was trained."""
    if start.source is None or start.released is not None:
        return ""
    file = start.source.tokenizer_file.parent / name
    return file.read_text(encoding="utf-8") if file.is_file() else ""


def _runs_before(start: Start) -> dict[str, Any]:
    """Its stages; none where the file says nothing of stages, which must not cost the run its result."""
    try:
        found = json.loads(_text_before(start, RUN_FILE) or "{}")
    except json.JSONDecodeError:
        return {}
    return found if isinstance(found, dict) else {}


def check_start(start: Start, config: GrpoConfig, out: Path, *, has_flights: bool) -> None:
    """What can be said before anything is computed.

    Raises:
        GrpoError: no checkpoint, no flights for the SFT loss, or an output over what the run begins with.
        ConfigError: policy scales that the model does not have.
    """
    check_policy_scales(start.config, config.policy_scales)
    if start.source is None:
        raise GrpoError("GRPO begins with a trained policy: give --checkpoint")
    lost = next((path for path in start.paths() if path.resolve().is_relative_to(out.resolve())), None)
    if lost is not None:
        raise GrpoError(f"--out {out} would replace {lost}, which the run begins with; give another folder")
    if config.anchor > 0 and not has_flights:
        raise GrpoError(
            "every step adds the SFT loss of recorded flights: give --data FLIGHTS, or --set grpo.anchor=0 for none"
        )


def read_tasks(path: Path | None, *, seed: int) -> TaskPool:
    """Tasks to learn from: of a file or folder, or else the simulator's own of the training split.

    Raises:
        TaskFileError, TaskPoolError: tasks that cannot be read, or told apart.
    """
    if path is None:
        return GeneratedTasks("train")
    return ListedTasks(read_task_list(path), seed=seed, source=str(path))


def read_held_out_tasks(path: Path | None, count: int) -> list[Task]:
    """The first `count` tasks of a file or folder, or else of the simulator's validation split.

    Raises:
        TaskFileError: tasks that cannot be read.
        GrpoError: fewer than `count`.
    """
    if path is None:
        return [generate_task("validation", index) for index in range(count)]
    found = read_task_list(path)
    if len(found) < count:
        raise GrpoError(
            f"{path}: {len(found)} tasks, and {count} are to be evaluated; give more tasks, or --set "
            f"grpo.evaluation.tasks={len(found)}"
        )
    return found[:count]
