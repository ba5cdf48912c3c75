"""The prompt that the text encoder sees: duration tag and instruction, one function for training, rollout and serving.

Source: spec/world_model.md 4, spec/session_protocol.md 1, spec/training.md 1.3 (Product).
"""

from worldvln_edge.config import HorizonConfig


def tagged_prompt(instruction: str, horizon: HorizonConfig, num_frames: int | None = None) -> str:
    """`<<<t=3s>>>` + instruction for 49 frames at 16 fps, in whole seconds.

    Args:
        instruction: without a tag.
        horizon: what serving generates: always the whole of it.
        num_frames: of a training flight that is shorter; None: the whole horizon.
    """
    return f"<<<t={((num_frames or horizon.num_frames) - 1) // horizon.fps}s>>>{instruction}"
