"""The same session code on ONNX Runtime and on PyTorch: two implementations of every operator, one flight."""

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from flight_agreement import agreeing_segments
from torch_engines import torch_engines
from two_flights import fly

from worldvln_edge.bundle import Bundle
from worldvln_edge.models.worldvln import load_checkpoint
from worldvln_edge.runtime.engines.engine import Engine
from worldvln_edge.runtime.worldvln import graphs
from worldvln_edge.runtime.worldvln.worldvln_policy import WorldVLNPolicy, load_policy

ACTION_TOLERANCE = 1e-3  # cm and deg; sums in another order


class Watched:
    """Passes calls on and remembers what kind of values came back."""

    def __init__(self, engine: Engine):
        self._engine = engine
        self.kinds: set[type] = set()

    def run(
        self,
        inputs: Mapping[str, Any],
        in_place: Mapping[str, Any] | None = None,
        *,
        fetch: Collection[str] | None = None,
    ) -> dict[str, Any]:
        outputs = self._engine.run(inputs, in_place, fetch=fetch)
        self.kinds |= {type(value) for value in outputs.values()}
        return outputs


def test_a_flight_in_pytorch_gives_the_actions_of_onnx_runtime(tiny_checkpoint: Path, tiny_bundle: Path) -> None:
    flown = load_policy(tiny_bundle, threads=1)
    engines = {name: Watched(engine) for name, engine in torch_engines(load_checkpoint(tiny_checkpoint).model).items()}
    policy = WorldVLNPolicy(Bundle.open(tiny_bundle).manifest, engines, flown.tokenizer)
    actions = fly(policy)
    np.testing.assert_allclose(actions, fly(flown), atol=ACTION_TOLERANCE)
    assert np.abs(actions[0] - actions[1]).max() > 1  # the flights differ from each other by far more
    bounds = {"border": 1e-4, "tolerance": ACTION_TOLERANCE}
    assert sum(agreeing_segments(flown, policy, seed=seed, **bounds) for seed in range(4)) == 4 * 3
    used = {name: engine.kinds for name, engine in engines.items() if name in flown.engines}
    assert used[graphs.WORLD_MODEL_STEP] == {np.ndarray, torch.Tensor}  # codes stay between the steps
    assert all(kinds for name, kinds in used.items() if name != graphs.WORLD_MODEL_CONTEXT)


def test_engines_of_both_kinds_pass_values_to_each_other(tiny_checkpoint: Path, tiny_bundle: Path) -> None:
    flown = load_policy(tiny_bundle, threads=1)
    of_torch = torch_engines(load_checkpoint(tiny_checkpoint).model)
    names = sorted(flown.engines)
    expected = fly(flown)
    for own in (names[::2], names[1::2]):
        policy = WorldVLNPolicy(
            flown.manifest, {**flown.engines, **{name: of_torch[name] for name in own}}, flown.tokenizer
        )
        np.testing.assert_allclose(fly(policy), expected, atol=ACTION_TOLERANCE)
