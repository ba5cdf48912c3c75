"""From flights to a checkpoint: each stage with the trainer, on the weights of those before it.

A work folder holds a folder per stage: the run (`trainer.run_folder`) and, once it is finished, `weights/` with
`model.safetensors` (keys as in a checkpoint folder), `config.json` and the statistics of a head. A stage that is
finished is not repeated; one that was interrupted goes on. `latents/` and `features/` are caches.
Source: spec/training.md 0 (stages), 2.8 (export apart from checkpoints), 8.3.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec
import torch
from tokenizers import Tokenizer
from torch import Tensor

from worldvln_edge.action_windows import LabelStats
from worldvln_edge.atomic import atomic_file
from worldvln_edge.models.worldvln import HeadStats, WorldVLN, save_checkpoint
from worldvln_edge.runtime.worldvln.tokenizer import PromptTokenizer
from worldvln_edge.training.data.flight_source import FlightSource
from worldvln_edge.training.stages.backbone_stage import BackboneStage
from worldvln_edge.training.stages.flight_subset import first_flights
from worldvln_edge.training.stages.released_output import write_released
from worldvln_edge.training.stages.stage_builder import StageBuilder
from worldvln_edge.training.stages.stage_tables import COMMAND_OF_PART, STAGES, ChainConfig
from worldvln_edge.training.stages.stage_weights import (
    WEIGHTS,
    ChainError,
    explained_writes,
    is_finished,
    read_stats,
    read_weights,
    save_weights,
)
from worldvln_edge.training.stages.training_start import Start
from worldvln_edge.training.trainer.distributed import Ranks
from worldvln_edge.training.trainer.gpus import peak_of_device
from worldvln_edge.training.trainer.recipe import Recipe
from worldvln_edge.training.trainer.run_folder import CURVE_FILE, RUN_FILE, identity_hash, is_run
from worldvln_edge.training.trainer.trainer import Trainer, run_identity


class TrainingChain:
    """Stages on one work folder.

    Args:
        start: preset or checkpoint.
        recipe: with the tables of `stage_tables`.
        flights: training rows, at the preset's frame size.
        held_out: rows of validation, or None.
        data_fingerprint, held_out_fingerprint: of these rows, for `run.json`.
        work: folder.
        seed: of initial weights and all draws.
        ranks: the processes.
        show_progress: bars on stderr.
    """

    def __init__(
        self,
        start: Start,
        recipe: Recipe,
        flights: FlightSource,
        work: Path,
        *,
        data_fingerprint: str,
        seed: int,
        ranks: Ranks,
        held_out: FlightSource | None = None,
        held_out_fingerprint: str | None = None,
        show_progress: bool = True,
    ):
        self._start, self._recipe, self._work, self._seed = start, recipe, work, seed
        self._chain: ChainConfig = recipe.tables["chain"]
        self._flights = first_flights(flights, self._chain.limit)
        self._data = {"flights": len(self._flights), "data": data_fingerprint, "held_out": held_out_fingerprint}
        self._ranks, self._show_progress = ranks, show_progress and ranks.is_first
        self._config = start.config
        self._tokenizer_json = start.tokenizer_json(
            [self._flights.instruction(row) for row in range(len(self._flights))],
            {self._flights.frame_count(row) for row in range(len(self._flights))},
        )
        self._builder = StageBuilder(
            start,
            recipe,
            PromptTokenizer(Tokenizer.from_str(self._tokenizer_json), start.config.world_model.text_max_tokens),
            self._flights,
            held_out,
            work,
            seed=seed,
            ranks=ranks,
            show_progress=self._show_progress,
        )

    def check(self, stages: Sequence[str], *, out: Path | None) -> None:
        """Whether every stage will find what it starts from; before anything is computed.

        Args:
            stages: for `run`.
            out: for `write_checkpoint`, if that is to come.

        Raises:
            ChainError: a part that is trained neither here nor in the checkpoint, or lacks for the output; an output
                that would replace files of the start.
            RecipeError: a stage that the recipe does not have.
            WorkFolderError: a stage's folder is another run's.
        """
        sft = self._recipe.stages.get("sft")
        if self._start.source is None and sft is not None and not sft.config.train_text_encoder:
            raise ChainError(
                f"{self._config.name} has a text encoder that is not trained here; give --checkpoint with the released "
                "files instead of --preset"
            )
        finished = self._finished()
        parts = self._parts(finished)
        for name in stages:
            self._recipe.stage(name)
            needs = set(STAGES[name].needs) | ({"world_model"} if self._predicts(name) else set())
            for part in sorted(needs - parts):
                command = COMMAND_OF_PART[part]
                raise ChainError(
                    f"{name} needs a trained {part}: run `worldvln-edge train {command}` with the same --work first, "
                    "or give --checkpoint"
                )
            parts.add(STAGES[name].makes)
        if out is not None:
            self._check_output(out, {*finished, *stages})

    def _check_output(self, out: Path, trained: Collection[str]) -> None:
        lost = next((path for path in self._start.paths() if path.resolve().is_relative_to(out.resolve())), None)
        if lost is not None:
            raise ChainError(f"--out {out} would replace {lost}, which the training starts from; give another folder")
        missing = {STAGES[name].makes for name in STAGES} - self._parts(trained)
        if missing and not self._names_released(trained):
            commands = ", ".join(sorted({COMMAND_OF_PART[part] for part in missing}))
            raise ChainError(
                f"--out writes a whole checkpoint, and {', '.join(sorted(missing))} is not trained: run `worldvln-edge "
                f"train` {commands} with the same --work, or leave --out out"
            )

    def run(self, stages: Sequence[str]) -> None:
        """Train the stages, one after the other; those that are finished are left as they are.

        Raises:
            What `check` and `Trainer.run` raise, and the stages' own errors.
        """
        for name in stages:
            if not self._is_finished(name):
                self._train(name)

    def write_checkpoint(self, out: Path) -> None:
        """Write all parts as a checkpoint folder, with the loss curves and the runs they are from.

        What began as released files is written as such where their layout has a place for all that was trained, see
        `released_output`.

        Raises:
            ChainError: the disk is full; an earlier checkpoint stays as it was.
        """
        if self._ranks.is_first:
            with explained_writes(out):
                self._write(out)
        self._ranks.wait()

    def _write(self, out: Path) -> None:
        finished = self._finished()
        curves = "".join(self._text(name, CURVE_FILE) for name in finished)
        runs = json.dumps({name: json.loads(self._text(name, RUN_FILE)) for name in finished}, indent=1)
        curve_file, runs_file = self._work / CURVE_FILE, self._work / RUN_FILE
        for file, text in ((curve_file, curves), (runs_file, runs + "\n")):
            with atomic_file(file) as building:
                building.write_text(text, encoding="utf-8")
        if self._start.released is not None and self._names_released(finished):
            has_head = bool({"adapter", "action"} & set(finished))
            write_released(
                out,
                self._start.released,
                self._model(),
                has_backbone="sft" in finished,
                action_stats=self._head_stats().latent_head if has_head else None,
                distilled=_below(read_weights(self._work / "adapter"), "latent_head.adapter.")
                if "adapter" in finished
                else None,
            )
            return
        save_checkpoint(
            out,
            self._model(),
            self._head_stats(),
            self._tokenizer_json,
            extra_files={CURVE_FILE: curve_file, RUN_FILE: runs_file},
        )

    def _finished(self) -> list[str]:
        return [name for name in STAGES if self._is_finished(name)]

    def _parts(self, trained: Collection[str]) -> set[str]:
        """Parts of the model that are trained once those stages are."""
        return self._start.parts() | {STAGES[name].makes for name in trained}

    def _names_released(self, trained: Collection[str]) -> bool:
        """Whether the output is a folder with `released.json`, which holds no VAE, text encoder and RGB head."""
        has_text = "sft" in trained and self._recipe.stage("sft").config.trains_text
        return self._start.released is not None and not has_text and set(trained) <= {"sft", "adapter", "action"}

    def _predicts(self, name: str) -> bool:
        """Whether a stage learns from what the world model expects."""
        return name == "action" and self._recipe.stage(name).config.predicted_share > 0

    def _uses(self, name: str) -> set[str]:
        """Parts of the model whose weights this rank needs for a stage."""
        parts = set(STAGES[name].uses) | ({"world_model", "text_encoder"} if self._predicts(name) else set())
        return parts if self._ranks.is_first else parts - {STAGES[name].sharded}

    def _train(self, name: str) -> None:
        model = self._model(self._uses(name))
        torch.manual_seed(self._seed + sum(name.encode()))  # what a stage adds to the networks
        readouts = None
        if name == "vae" and self._is_finished("vae_encoder"):
            readouts = _below(read_weights(self._work / "vae_encoder"), "readouts.")
        stage = self._builder.build(name, model, readouts)
        device = self._ranks.device
        result = Trainer(
            stage,
            self._recipe.stage(name).optimiser,
            self._recipe.trainer,
            self._work / name,
            self._inputs(name),
            seed=self._seed,
            ranks=self._ranks,
            peak_flops=peak_of_device(torch.cuda.get_device_name(device)) if device.type == "cuda" else None,
            show_progress=self._show_progress,
        ).run()
        if self._ranks.is_first:
            exported = stage.exported_state(result.weights) if isinstance(stage, BackboneStage) else result.weights
            weights = STAGES[name].model_weights(exported)
            save_weights(self._work / name, weights, self._config, getattr(stage, "stats", None))
        self._ranks.wait()

    def _model(self, parts: Collection[str] | None = None) -> WorldVLN:
        """The start with the weights of all finished stages over it; parts besides `parts` are on the meta device."""
        model = self._start.model(self._seed, parts)
        for name in self._finished():
            weights = {
                key: tensor
                for key, tensor in read_weights(self._work / name).items()
                if (part := key.partition(".")[0]) != "readouts" and (parts is None or part in parts)
            }
            unknown = model.load_state_dict(weights, strict=False).unexpected_keys
            if unknown:
                raise ChainError(f"{self._work / name / WEIGHTS}: {unknown[0]} is no weight of {self._config.name}")
        return model

    def _inputs(self, name: str) -> dict[str, Any]:
        """What a stage's result depends on, besides seed, optimiser and precision."""
        kept = {"action_flights": self._chain.action_flights, "keep": self._chain.keep}
        before = {other: identity_hash(self._run(other)) for other in STAGES[name].after if self._is_finished(other)}
        return {
            "preset": self._config.name,
            "model_sha256": hashlib.sha256(self._config.to_json()).hexdigest(),
            "checkpoint": self._start.fingerprint(),
            "config": msgspec.to_builtins(self._recipe.stage(name).config),
            **({"chain": kept} if name in ("adapter", "action") else {}),
            **self._data,
            **({"before": before} if before else {}),
        }

    def _run(self, name: str) -> dict[str, Any]:
        recipe = self._recipe.stage(name)
        return run_identity(name, self._seed, self._recipe.trainer, recipe.optimiser, self._inputs(name))

    def _is_finished(self, name: str) -> bool:
        """Whether a stage of this very run is done. Raises WorkFolderError where its folder is another run's."""
        if name not in self._recipe.stages or not is_finished(self._work / name):
            return False
        return is_run(self._work / name, self._run(name))

    def _text(self, name: str, file: str) -> str:
        return (self._work / name / file).read_text(encoding="utf-8")

    def _head_stats(self) -> HeadStats:
        """Statistics of both heads: of the stages that trained them, else of the checkpoint."""
        found: dict[str, LabelStats] = {}
        for stage, head in (("action", "latent_head"), ("rgb_head", "rgb_head")):
            if self._is_finished(stage):
                found[head] = read_stats(self._work / stage)
            else:
                found[head] = getattr(self._start.head_stats(), head)
        return HeadStats(**found)


def _below(weights: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name[len(prefix) :]: tensor for name, tensor in weights.items() if name.startswith(prefix)}
