"""What a session can hold is known before it is opened, and not guessed far too high."""

import asyncio
import gc
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import FunctionType, ModuleType

import msgspec
import numpy as np
import onnxruntime as ort
import pytest
from click.testing import CliRunner
from small_models import random_frames, tiny_config

from worldvln_edge.bundle import Bundle, Manifest
from worldvln_edge.cli import main
from worldvln_edge.config import ModelConfig
from worldvln_edge.presets import preset
from worldvln_edge.protocol import Observe, ProtocolError, Start
from worldvln_edge.runtime.sessions.session_manager import SessionManager
from worldvln_edge.runtime.worldvln.session_memory import (
    SessionSizes,
    bundle_session_memory,
    held_bytes,
    session_memory,
)
from worldvln_edge.runtime.worldvln.speculation import SpeculationConfig
from worldvln_edge.runtime.worldvln.worldvln_policy import WorldVLNPolicy, load_policy
from worldvln_edge.runtime.worldvln.worldvln_session import WorldVLNSession
from worldvln_edge.scale_schedule import ScaleSchedule

LONGEST_PROMPT, OTHER_LONGEST_PROMPT = "fly " * 20, "turn " * 20  # cut to the most tokens that the model takes
SIZES = SessionSizes(
    guidance_rows=2, kv_itemsize=2, token_itemsize=2, encoder_state_bytes=1000, decoder_state_bytes=2000
)


@pytest.fixture(scope="module")
def manifest(tiny_bundle: Path) -> Manifest:
    return Bundle.open(tiny_bundle).manifest


@pytest.fixture(scope="module")
def loaded(tiny_bundle: Path) -> WorldVLNPolicy:
    return load_policy(tiny_bundle, threads=1)


class Watched:
    """An engine that measures the session in front of every call."""

    def __init__(self, engine, measure: Callable[[], None]):
        self.engine, self.measure = engine, measure

    def run(self, inputs, in_place=None, *, fetch=None):
        self.measure()
        return self.engine.run(inputs, in_place, fetch=fetch)


class WatchedFlights:
    """Flights of one policy, and the most that a session held between and inside of its calls."""

    def __init__(self, loaded: WorldVLNPolicy, manifest: Manifest, speculation: SpeculationConfig | None = None):
        self.most_bytes, self._session = 0, None
        engines = {name: Watched(engine, self.measure) for name, engine in loaded.engines.items()}
        self.policy = WorldVLNPolicy(manifest, engines, loaded.tokenizer, speculation=speculation)
        self.frames = random_frames(self.policy.config, self.policy.config.horizon.num_frames, seed=3, hw=(30, 50))

    def measure(self) -> None:
        if self._session is not None:
            held = self._session.held_bytes
            assert held <= self.policy.session_bytes
            self.most_bytes = max(self.most_bytes, held)

    def fly(self, flight: "Flight") -> WorldVLNSession:
        self._session = session = self.policy.new_session(LONGEST_PROMPT, seed=1, emit=flight.emit)
        session.profile = self.policy.profiles[flight.profile]
        for count in flight.calls:
            if flight.changes_prompt and session.emitted == session._config.horizon.segments - 2:
                session.set_prompt(OTHER_LONGEST_PROMPT)
                session.set_seed(7)
            chunk = session.observe(self.frames[session.frames : session.frames + count])
            while chunk is not None:
                self.measure()
                if flight.works_ahead:
                    session.work_ahead()
                self.measure()
                chunk = session.observe(())
        assert session.done
        return session


@dataclass(frozen=True, kw_only=True)
class Flight:
    calls: tuple[int, ...] = (1, 4, 4, 4)  # frames each
    emit: str = "ahead"
    profile: str = "exact"
    works_ahead: bool = True
    changes_prompt: bool = False


FLIGHTS = [
    Flight(),
    Flight(works_ahead=False),
    Flight(changes_prompt=True),
    Flight(emit="behind"),
    Flight(emit="behind", changes_prompt=True, calls=(1,) * 13),
    Flight(calls=(1,) * 13),
    Flight(calls=(13,)),
    Flight(calls=(13,), emit="behind", works_ahead=False),
    Flight(calls=(3, 8, 2), profile="balanced"),
    Flight(profile="fast", changes_prompt=True),
]


def one_row(manifest: Manifest) -> Manifest:
    """The same graphs flown without guidance; their rows are open."""
    generation = msgspec.structs.replace(manifest.model.generation, cfg=1.0)
    model = msgspec.structs.replace(manifest.model, generation=generation)
    return msgspec.structs.replace(manifest, model=model, guidance_rows=1)


@pytest.mark.parametrize("rows", [1, 2])
def test_no_flight_holds_more_than_the_bound_and_some_hold_two_thirds_of_it(loaded, manifest, rows: int):
    flights = WatchedFlights(loaded, manifest if rows == 2 else one_row(manifest))
    for flight in FLIGHTS:
        flights.fly(flight)
    assert flights.most_bytes <= flights.policy.session_bytes <= 1.5 * flights.most_bytes


@pytest.mark.parametrize("threshold", [0.0, 1.0])
def test_no_flight_that_speculates_holds_more_than_the_bound(loaded, manifest, threshold: float):
    flights = WatchedFlights(loaded, manifest, SpeculationConfig(threshold=threshold))
    for flight in FLIGHTS:
        flights.fly(flight)
    assert flights.most_bytes <= flights.policy.session_bytes <= 1.5 * flights.most_bytes


def reachable_tensors(session: WorldVLNSession) -> Iterator:
    """Everything that hangs on a session by the interpreter's own account, but for what its policy shares."""
    policy = session._policy
    shared = (policy, policy.engines, policy.tables, policy.workspace, policy.config, policy.manifest)
    seen, waiting = {id(each) for each in shared}, [session]
    while waiting:
        each = waiting.pop()
        if id(each) in seen or isinstance(each, type | ModuleType | FunctionType):
            continue
        seen.add(id(each))
        if isinstance(each, np.ndarray | ort.OrtValue):
            yield each
        else:
            waiting += gc.get_referents(each)


@pytest.mark.parametrize("speculates", [False, True])
def test_session_counts_everything_that_hangs_on_it(loaded, manifest, speculates: bool):
    flights = WatchedFlights(loaded, manifest, SpeculationConfig(threshold=0.5) if speculates else None)
    session = flights.policy.new_session(LONGEST_PROMPT, seed=1)
    assert session.held_bytes == held_bytes(reachable_tensors(session)) == 0
    held = []
    for count in (1, 3, 1, 4, 4):
        for _ in range(2):
            session.observe(flights.frames[session.frames : session.frames + count])
            count = 0
            held.append(session.held_bytes)
            assert held[-1] == held_bytes(reachable_tensors(session))
            session.work_ahead()
            assert session.held_bytes == held_bytes(reachable_tensors(session))
    assert session.done
    assert 0 < held[-1] < max(held)  # its keys and values are gone


@pytest.mark.parametrize("flight", [Flight(), Flight(calls=(13,), emit="behind", works_ahead=False)])
def test_done_session_holds_its_clips_and_its_prediction_and_a_closed_one_the_prediction(loaded, manifest, flight):
    flights = WatchedFlights(loaded, manifest)
    session = flights.fly(flight)
    bound = flights.policy.session_memory
    assert session.held_bytes <= bound.clips + bound.prediction
    assert len(session.observed_clips) == 3
    session.close()
    assert 0 < session.held_bytes <= bound.prediction
    assert session.observed_clips == ()


def test_server_counts_open_sessions_with_the_bound_and_done_ones_with_what_they_hold(loaded):
    frames = random_frames(loaded.config, 9, seed=3)
    h, w = frames[0].shape[:2]

    async def scenario() -> tuple[int, int]:
        manager = SessionManager(loaded, session_memory_bytes=round(2.1 * loaded.session_bytes))
        for name in ("a", "b"):
            await manager.start("", Start(id=1, session=name, prompt=LONGEST_PROMPT))
        with pytest.raises(ProtocolError, match="another session may need"):
            await manager.start("", Start(id=2, session="c", prompt="go"))
        for first, end in ((1, 1), (2, 5), (6, 9)):
            images = [frame.tobytes() for frame in frames[first - 1 : end]]
            await manager.observe("", Observe(id=3, session="a", first=first, frames=images, fmt="rgb8", w=w, h=h))
        done = manager._table.find(("", "a"))
        assert done.is_done
        await manager.start("", Start(id=4, session="c", prompt="go"))
        manager.close()
        return done.counted_bytes, done.policy_session.held_bytes

    counted, held = asyncio.run(scenario())
    assert held <= counted < loaded.session_bytes  # it was closed meanwhile


def test_server_without_memory_for_one_session_does_not_start(tiny_bundle: Path):
    options = ["--session-memory-mb", "0.01", "--ws", "127.0.0.1:0", "--backend", "cpu"]
    result = CliRunner().invoke(main, ["serve", str(tiny_bundle), *options])
    assert result.exit_code == 1
    assert "kB, and sessions may use 10.0 kB; allow more (--session-memory-mb)" in result.stderr


def test_view_counts_as_the_array_that_it_keeps_and_every_array_once():
    array = np.zeros((4, 8), np.float32)
    value = ort.OrtValue.ortvalue_from_numpy(np.zeros((2, 3), np.float16))
    assert held_bytes([array[1:], array[:, 2], array[0][1:]]) == array.nbytes
    assert held_bytes([array, array.copy(), value, value]) == 2 * array.nbytes + 12
    assert held_bytes([]) == 0


def simulated_entries(config: ModelConfig) -> int:
    """Most entries of a flight whose prompt changes in front of every segment, scale by scale as the driver does it."""
    stride, points = config.video_vae.temporal_stride, config.horizon.points
    schedule = ScaleSchedule(config.schedule, 1 + (config.horizon.num_frames - 1) // stride)
    most = 0
    for point in points[:-1]:
        observed = sum(1 for clip in schedule.clips if clip.first_frame < 1 + (point - 1) // stride)
        stored: set[tuple[int, int]] = set()

        def make(key: tuple[int, int], stored: set[tuple[int, int]] = stored) -> None:
            for reference in schedule.references_of_scale(*key):
                make(reference)
            stored.add(key)

        for key in schedule.references(observed):
            make(key)
        most = max(most, sum(schedule.last_step(*key).tokens for key in stored))
    return config.world_model.text_max_tokens + most


@pytest.mark.parametrize("name", ["worldvln-8b", "narrow", "nano"])
def test_keys_and_values_of_presets_are_those_of_a_prompt_that_changes_late(name: str):
    config = preset(name)
    model = config.world_model
    per_entry = model.depth * 2 * SIZES.guidance_rows * model.kv_heads * model.head_dim * SIZES.kv_itemsize
    assert session_memory(config, SIZES).keys_and_values == simulated_entries(config) * per_entry


@pytest.mark.parametrize("options", [{"clips_per_segment": 2}, {"context_from_largest_no": 0}, {"context_interval": 0}])
def test_bound_covers_schedules_that_keep_generated_scales(options: dict):
    config = tiny_config(**options)
    model = config.world_model
    per_entry = model.depth * 2 * SIZES.guidance_rows * model.kv_heads * model.head_dim * SIZES.kv_itemsize
    assert session_memory(config, SIZES).keys_and_values >= simulated_entries(config) * per_entry


def test_sizes_come_from_the_signatures_of_the_graphs(manifest):
    memory = bundle_session_memory(manifest)
    states = [
        np.zeros(spec.shape, spec.dtype).nbytes
        for graph in ("vae_encoder_next", "vae_decoder_next")
        for spec in manifest.graphs[graph].outputs
        if spec.name.startswith("next_state_")
    ]
    assert memory.vae_states == sum(states)
    assert memory.total == sum(msgspec.structs.astuple(memory))
    assert bundle_session_memory(one_row(manifest)).keys_and_values * 2 == memory.keys_and_values
    assert bundle_session_memory(manifest, speculates=True).speculation > memory.keys_and_values
