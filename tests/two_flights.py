"""Two flights by turns on one policy: what tests compare when only the engines differ."""

import numpy as np
from small_models import random_frames

from worldvln_edge.runtime.worldvln.worldvln_policy import WorldVLNPolicy

PROMPTS = ("fly forward 5 m", "turn left to the tower")


def fly(policy: WorldVLNPolicy) -> np.ndarray:
    """Actions of both, each with its own prompt and seed, on the same frames: float32 [2, frames, 6].

    Between segments the sessions work ahead, so everything that a server does with engines and caches happens.
    """
    frames = random_frames(policy.config, policy.config.horizon.points[-2], seed=3)
    sessions = [policy.new_session(prompt, seed=seed) for seed, prompt in enumerate(PROMPTS)]
    actions: list[list[np.ndarray]] = [[] for _ in sessions]
    sent = 0
    for point in policy.config.horizon.points[:-1]:
        for session, found in zip(sessions, actions, strict=True):
            chunk = session.observe(frames[sent:point])
            assert chunk is not None
            found.append(chunk.actions)
            session.work_ahead()
        sent = point
    for session in sessions:
        session.close()
    return np.stack([np.concatenate(found) for found in actions])
