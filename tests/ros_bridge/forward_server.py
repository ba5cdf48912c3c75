"""A server in a process of its own, to be killed: every action flies 5 cm ahead."""

import sys
from dataclasses import replace

import numpy as np

from worldvln_edge.runtime.doors.server import serve
from worldvln_edge.runtime.sessions.null_policy import NullPolicy, NullSession


class ForwardSession(NullSession):
    def observe(self, frames, **options):
        chunk = super().observe(frames, **options)
        return chunk and replace(chunk, actions=chunk.actions + np.array([5, 0, 0, 0, 0, 0], np.float32))


class ForwardPolicy(NullPolicy):
    def new_session(self, prompt, *, seed=0, negative_prompt="", emit="ahead"):
        return ForwardSession(self, prompt, seed=seed, emit=emit, negative_prompt=negative_prompt)


if __name__ == "__main__":
    serve(ForwardPolicy(), port=int(sys.argv[1]), warm_up=False, on_ready=lambda url: print(url, flush=True))
