"""Training of the last chunks of blocks only, with the final norm and the heads.

Source: spec/training.md 5.7 (partial freeze).
"""

from __future__ import annotations

from worldvln_edge.config import ConfigError
from worldvln_edge.models.world_model import WorldModel


def freeze_chunks(model: WorldModel, prefix: int) -> None:
    """Freeze everything but the chunks from `prefix` on, the final norm and both heads; 0 trains everything.

    Raises:
        ConfigError: no chunk would be left.
    """
    chunks = model.config.block_chunks
    if not 0 <= prefix < chunks:
        raise ConfigError(
            f"frozen_chunks must be 0..{chunks - 1} (the world model has {chunks} chunks), found {prefix}"
        )
    if prefix == 0:
        return
    model.requires_grad_(False)
    for module in (*model.block_chunks[prefix:], model.norm_hidden_sates, model.head, model.semantic_head2):
        module.requires_grad_(True)
