"""Text encoder graph: token ids to the residual stream of the world model, for both guidance rows.

Source: spec/world_model.md 4.
"""

from torch import Tensor, nn

from worldvln_edge.models.text_encoder import TextEncoder
from worldvln_edge.models.world_model import WorldModel


class TextGraph(nn.Module):
    """ids [1, L] -> text_embeds [1, L, C], uncond_embeds [1, L, C] (the learned unconditional rows)."""

    def __init__(self, encoder: TextEncoder, model: WorldModel):
        super().__init__()
        self.encoder = encoder
        self.text_proj = model.text_proj
        self.cfg_uncond = model.cfg_uncond

    def forward(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        text = self.encoder(ids)
        return self.text_proj(text), self.text_proj(self.cfg_uncond[: ids.shape[1]])[None]
