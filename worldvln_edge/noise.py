"""Counter-based random draws of generation: a draw depends on (seed, clip, step, position) and nothing else.

Source: spec/world_model.md 6 ("RNG", Product).
"""

import numpy as np


def step_uniforms(seed: int, clip: int, step_in_clip: int, thw: tuple[int, int, int], bits: int) -> np.ndarray:
    """Uniform numbers in [0, 1) for the bits of one step: float32 [T, h, w, bits].

    A bit is 1 iff its number lies below the bit's probability.
    """
    key = np.array([seed % 2**64, (clip << 32) + step_in_clip], np.uint64)
    return np.random.Generator(np.random.Philox(key=key)).random((*thw, bits), dtype=np.float32)
