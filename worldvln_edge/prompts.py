"""The prompt that the text encoder sees: duration tag and instruction, one function for training, rollout and serving.

Source: spec/world_model.md 4, spec/session_protocol.md 1, spec/training.md 1.3 (Product).
"""

from worldvln_edge.config import HorizonConfig


def tagged_prompt(instruction: str, horizon: HorizonConfig) -> str:
    """`<<<t=3s>>>` + instruction for 49 frames at 16 fps: always the whole horizon, in whole seconds."""
    return f"<<<t={(horizon.num_frames - 1) // horizon.fps}s>>>{instruction}"
