"""Files that a run may start from besides its preset or checkpoint: a base model, a distilled adapter, a TimesFormer.

Source: spec/training.md 2.7 (init of the world model), 3 and 4.4 (init of the action head).
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

from worldvln_edge.models.base_weights import load_base_weights
from worldvln_edge.models.released_action import load_timesformer, open_timesformer
from worldvln_edge.models.released_adapter import load_adapter, read_adapter_checkpoint
from worldvln_edge.models.worldvln import WorldVLN

_LISTED = 4


@dataclass(frozen=True, kw_only=True)
class StartFiles:
    """See the module; each may be missing."""

    base_model: Path | None = None
    """A world model of another training; what of it does not fit keeps its first values."""
    adapter: Path | None = None
    """`stage1_adapter_*.pt`, or the file that its distillation exports."""
    timesformer: Path | None = None
    """Of the latent head; the adapter's teacher is that of the RGB head, which `released.json` names."""
    trust_pickle: bool = False

    def paths(self) -> list[tuple[str, Path]]:
        """(what it is, path) of every file."""
        named = (("base_model", self.base_model), ("adapter", self.adapter), ("timesformer", self.timesformer))
        return [(name, path) for name, path in named if path is not None]

    def load_into(self, model: WorldVLN, parts: Collection[str] | None = None) -> list[str]:
        """Copy the weights over those of a model; of the named parts only, where some are named.

        Returns:
            What was left as it was, a sentence per kind, for the log.

        Raises:
            CheckpointError: a file that cannot be read, or that belongs to another preset.
        """
        has_world_model, has_head = (parts is None or part in parts for part in ("world_model", "latent_head"))
        left: list[str] = []
        if self.base_model is not None and has_world_model:
            found = load_base_weights(model.world_model, self.base_model, trust_pickle=self.trust_pickle)
            for what, names in (
                ("has another shape", found.reshaped),
                ("is not in the file", found.missing),
                ("is in the file only", found.unused),
            ):
                if names:
                    listed = ", ".join(names[:_LISTED]) + (", ..." if len(names) > _LISTED else "")
                    left.append(f"{self.base_model}: {what}: {listed} ({len(names)} tensors)")
        if self.adapter is not None and has_head:
            load_adapter(
                model.latent_head.adapter, read_adapter_checkpoint(self.adapter, trust_pickle=self.trust_pickle)
            )
        if self.timesformer is not None and has_head:
            tensors = open_timesformer(self.timesformer, trust_pickle=self.trust_pickle)
            load_timesformer(model.latent_head.tsformer, tensors, str(self.timesformer))
        return left
