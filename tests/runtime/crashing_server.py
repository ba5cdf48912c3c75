"""A server in a process of its own, to be killed: actions depend on every frame, the prompt and the seed."""

import sys
from dataclasses import replace
from pathlib import Path

import numpy as np

from worldvln_edge.runtime.doors.server import serve
from worldvln_edge.runtime.sessions.null_policy import NullPolicy, NullSession
from worldvln_edge.runtime.sessions.session_journal import SessionJournal


class SeeingSession(NullSession):
    """Actions are a number made of all that was seen and said."""

    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        self.seen = 0

    def _look(self, frames) -> None:
        for frame in frames:
            self.seen = (self.seen * 31 + int(frame.sum())) % 10_007

    def observe(self, frames, **options):
        room = self._policy.info.horizon.num_frames - self.frames
        self._look(frames[:room])
        chunk = super().observe(frames, **options)
        number = self.seen + len(self.prompt) + 100 * self._seed
        return chunk and replace(chunk, actions=chunk.actions + np.float32(number))

    def restore(self, frames, emitted):
        super().restore(frames, emitted)
        self._look(frames)


class SeeingPolicy(NullPolicy):
    def new_session(self, prompt, *, seed=0, negative_prompt="", emit="ahead"):
        return SeeingSession(self, prompt, seed=seed, emit=emit, negative_prompt=negative_prompt)


if __name__ == "__main__":
    port, folder, infer_s = int(sys.argv[1]), Path(sys.argv[2]), float(sys.argv[3])
    serve(
        SeeingPolicy(infer_s=infer_s),
        port=port,
        warm_up=False,
        journal=SessionJournal(folder),
        on_ready=lambda url: print(url, flush=True),
    )
