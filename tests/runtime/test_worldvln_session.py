"""A flight of the runtime: what it computes, what it does not compute, and what it promises to repeat."""

import gc
import os
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pytest
from small_models import random_frames

from worldvln_edge.client import ServerError, SessionClient
from worldvln_edge.runtime.doors.server import BackgroundServer
from worldvln_edge.runtime.sessions.policy import ActionChunk, NonFiniteActionsError, PolicySession, StoppedError
from worldvln_edge.runtime.worldvln import graphs
from worldvln_edge.runtime.worldvln.worldvln_policy import WorldVLNPolicy, WorldVLNSession, load_policy

PROMPT = "fly forward 5 m"
OTHER = "turn left to the tower"
FRAMES, STEP, SEGMENTS = 13, 4, 3
MOTION_TOLERANCE = 1e-3  # cm and deg; another grouping of frames is another order of additions


@pytest.fixture(scope="module")
def policy(tiny_bundle: Path) -> WorldVLNPolicy:
    return load_policy(tiny_bundle, threads=1)


@pytest.fixture(scope="module")
def frames(policy: WorldVLNPolicy) -> list[np.ndarray]:
    return random_frames(policy.config, FRAMES + 4, seed=7, hw=(30, 50))


def fly(session: PolicySession, frames: list[np.ndarray], calls: Iterable[int]) -> list[ActionChunk]:
    """Send frames in calls of given sizes; every call is followed by empty ones until no segment is ready."""
    chunks, first = [], 0
    for count in calls:
        chunk = session.observe(frames[first : first + count])
        first += count
        while chunk is not None:
            chunks.append(chunk)
            chunk = session.observe(())
    return chunks


def actions_of(chunks: list[ActionChunk]) -> np.ndarray:
    assert [chunk.segment for chunk in chunks] == list(range(SEGMENTS))
    return np.concatenate([chunk.actions for chunk in chunks])


@pytest.fixture(scope="module")
def flown(policy: WorldVLNPolicy, frames: list[np.ndarray]) -> np.ndarray:
    """Actions of the ordinary flight: a segment's frames per call."""
    return actions_of(fly(policy.new_session(PROMPT, seed=1), frames, (1, 4, 4)))


@pytest.mark.parametrize("calls", [(1,) * FRAMES, (FRAMES,), (2, 3, 1, 3, 4), (3, 8), (9,), (FRAMES + 4,)])
@pytest.mark.parametrize("emit", ["ahead", "behind"])
def test_actions_do_not_depend_on_how_frames_are_sent(policy, frames, flown, calls: tuple[int, ...], emit):
    session = policy.new_session(PROMPT, seed=1, emit=emit)
    chunks = fly(session, frames, calls)
    if emit == "behind" and sum(calls) < FRAMES:
        assert session.need == FRAMES - sum(calls)
        chunks += fly(session, frames[sum(calls) :], (session.need,))
    np.testing.assert_allclose(actions_of(chunks), flown, atol=MOTION_TOLERANCE)
    assert session.done
    assert session.need == 0


def test_one_call_emits_one_segment(policy, frames):
    session = policy.new_session(PROMPT, seed=1)
    assert [session.observe(frames).segment for _ in range(SEGMENTS)] == [0, 1, 2]
    assert session.observe(frames) is None
    assert session.frames == FRAMES


def test_need_counts_down_to_the_next_segment(policy, frames):
    ahead, behind = policy.new_session(PROMPT), policy.new_session(PROMPT, emit="behind")
    assert (ahead.need, behind.need) == (1, 5)
    assert ahead.observe(frames[:1]) is not None
    assert behind.observe(frames[:1]) is None
    assert (ahead.need, behind.need) == (4, 4)
    assert ahead.observe(frames[1:3]) is None
    assert ahead.need == 2


def test_same_seed_gives_the_same_bytes_and_another_seed_other_actions(policy, frames, flown):
    again = actions_of(fly(policy.new_session(PROMPT, seed=1), frames, (1, 4, 4)))
    np.testing.assert_array_equal(again, flown)
    other = actions_of(fly(policy.new_session(PROMPT, seed=2), frames, (1, 4, 4)))
    assert np.abs(other - flown).max() > 0.1


def test_sessions_in_turn_do_not_disturb_each_other(policy, frames, flown):
    one, two = policy.new_session(PROMPT, seed=1), policy.new_session(OTHER, seed=9)
    chunks, first = [], 0
    for count in (1, 4, 4):
        chunks.append(one.observe(frames[first : first + count]))
        two.observe(frames[first : first + count])
        first += count
    np.testing.assert_array_equal(actions_of(chunks), flown)


def test_new_prompt_counts_from_the_next_segment_on(policy, frames, flown):
    session = policy.new_session(PROMPT, seed=1)
    chunks = fly(session, frames, (1,))
    session.set_prompt(OTHER)
    chunks += fly(session, frames[1:], (4, 4))
    fresh = actions_of(fly(policy.new_session(OTHER, seed=1), frames, (1, 4, 4)))
    mixed = actions_of(chunks)
    np.testing.assert_array_equal(mixed[:STEP], flown[:STEP])
    np.testing.assert_allclose(mixed[STEP:], fresh[STEP:], atol=MOTION_TOLERANCE)
    assert np.abs(fresh[STEP:] - flown[STEP:]).max() > 0.1


def test_same_prompt_again_costs_nothing(policy, frames):
    session = policy.new_session(PROMPT, seed=1)
    session.observe(frames[:1])
    before = session.counters["token_steps"]
    session.set_prompt(PROMPT)
    session.observe(frames[1:2])
    assert session.counters["token_steps"] == before


def test_negative_prompt_changes_the_actions(policy, frames, flown):
    session = policy.new_session(PROMPT, seed=1, negative_prompt="back")
    assert np.abs(actions_of(fly(session, frames, (1, 4, 4))) - flown).max() > 0.1


def test_long_negative_prompt_is_cut_with_a_warning(policy, caplog):
    rows = policy.encode_text("fly", "turn left and right and left and right to the tower")
    assert rows.shape == (2, 3, 32)  # duration tag, one word, end
    assert "cut to 3" in caplog.text


def test_short_negative_prompt_is_followed_by_zero_rows(policy):
    rows = policy.encode_text(PROMPT, "back")
    assert np.abs(rows[1, :2]).max() > 0
    assert np.abs(rows[1, 2:]).max() == 0


@pytest.mark.parametrize("prompt", ["", "zwerge jodeln über dem qwrtz", "fly " * 100, "<<<t=9s>>>", "\n\0 5 m"])
def test_any_prompt_flies(policy, frames, prompt: str):
    chunk = policy.new_session(prompt).observe(frames[:1])
    assert np.isfinite(chunk.actions).all()
    assert 1 <= policy.encode_text(prompt, "").shape[1] <= policy.config.world_model.text_max_tokens


def test_nothing_is_computed_twice_and_nothing_in_vain(policy, frames):
    schedule, config = policy.tables.schedule, policy.config
    fresh = WorldVLNPolicy(policy.manifest, policy.engines, policy.tokenizer)  # no text of an earlier flight
    session = fresh.new_session(PROMPT, seed=1)
    fly(session, frames, (1, 4, 8))
    text = policy.encode_text(PROMPT, "").shape[1]
    observed = [schedule.last_step(c, s).tokens for c in (0, 1, 2) for s in schedule.scales_referred_to(c)]
    generated = [step.tokens for clip in schedule.clips[1:] for step in clip.steps]
    counters = session.counters
    assert counters["token_steps"] == text + sum(observed) + sum(generated)
    assert counters["world_model_calls"] == 1 + len(observed) + len(generated)
    # The last segment's own frames are never looked at.
    assert counters["frames_encoded"] == config.horizon.points[-2]
    # Five observed latents once, two predicted ones a segment.
    assert counters["latents_decoded"] == 5 + 2 * SEGMENTS
    assert len(session.observed_clips) == len(schedule.clips) - 1


def test_new_prompt_repeats_the_world_model_but_not_the_vae(policy, frames):
    session = policy.new_session(PROMPT, seed=1)
    fly(session, frames, (1, 4))
    before = session.counters
    session.set_prompt(OTHER)
    fly(session, frames[5:], (4,))
    after = session.counters
    assert after["frames_encoded"] - before["frames_encoded"] == 4
    assert after["latents_decoded"] - before["latents_decoded"] == 2 + 2


def test_timings_name_every_stage(policy, frames):
    chunk = policy.new_session(PROMPT).observe(frames[:1])
    assert {"preprocess", "vae_encoder", "text_encoder", "world_model_step", "vae_decoder", "action_decoder"} <= set(
        chunk.timings_ms
    )
    assert all(value >= 0 for value in chunk.timings_ms.values())


@pytest.mark.parametrize(
    "frame",
    [
        np.zeros((8, 8, 3), np.float32),
        np.zeros((8, 8), np.uint8),
        np.zeros((8, 8, 4), np.uint8),
        np.zeros((0, 8, 3), np.uint8),
        b"jpeg",
    ],
)
def test_wrong_frame_is_refused_and_nothing_is_stored(policy, frames, flown, frame):
    session = policy.new_session(PROMPT, seed=1)
    with pytest.raises(ValueError, match="uint8"):
        session.observe([*frames[:2], frame])
    assert session.frames == 0
    np.testing.assert_array_equal(actions_of(fly(session, frames, (1, 4, 4))), flown)


class _BrokenHead:
    """The exported action head, until it is told to give NaN."""

    def __init__(self, engine):
        self.engine, self.is_broken = engine, False

    def run(self, inputs, in_place=None, *, fetch=None):
        outputs = self.engine.run(inputs, in_place, fetch=fetch)
        return {name: value * np.nan for name, value in outputs.items()} if self.is_broken else outputs


def test_nan_is_an_error_and_the_flight_goes_on_afterwards(policy, frames, flown):
    head = _BrokenHead(policy.engines[graphs.ACTION_HEAD])
    engines = {**policy.engines, graphs.ACTION_HEAD: head}
    session = WorldVLNPolicy(policy.manifest, engines, policy.tokenizer).new_session(PROMPT, seed=1)
    chunks = [session.observe(frames[:1])]
    head.is_broken = True
    for sent in (frames[1:5], ()):
        with pytest.raises(NonFiniteActionsError, match="segment 1"):
            session.observe(sent)
        assert (session.frames, session.emitted, session.need) == (5, 0, 0)
    head.is_broken = False
    chunks += [session.observe(()), session.observe(frames[5:9])]
    np.testing.assert_allclose(actions_of(chunks), flown, atol=MOTION_TOLERANCE)


class DeviceLostError(RuntimeError):
    """What an engine may raise in the middle of a flight."""


class _FailsOnce:
    """An engine of the bundle that raises at one of its calls: before its work, or when the work is already done."""

    def __init__(self, engine, failing_call: int, *, after_work: bool):
        self.engine, self.failing_call, self.after_work = engine, failing_call, after_work
        self.calls = 0

    def run(self, inputs, in_place=None, *, fetch=None):
        self.calls += 1
        if self.calls == self.failing_call and not self.after_work:
            raise DeviceLostError("device lost")
        outputs = self.engine.run(inputs, in_place, fetch=fetch)
        if self.calls == self.failing_call:
            raise DeviceLostError("device lost")
        return outputs


def _fly_on_after_a_failure(session: PolicySession, frames: list[np.ndarray]) -> tuple[list[ActionChunk], int]:
    """Fly as a server does: frames that the session did not take are given again. Returns the chunks and failures."""
    chunks, failures = [], 0
    for point in (1, 5, 9):
        while len(chunks) <= (point - 1) // STEP:
            try:
                chunks.append(session.observe(frames[session.frames : point]))
            except DeviceLostError:
                assert session.emitted == len(chunks) - 1
                failures += 1
    return chunks, failures


ENGINES = (
    graphs.TEXT_ENCODER,
    graphs.LATENT_EMBED,
    graphs.WORLD_MODEL_CONTEXT,
    graphs.WORLD_MODEL_STEP,
    graphs.first_or_next(graphs.VAE_ENCODER, True),
    graphs.first_or_next(graphs.VAE_ENCODER, False),
    graphs.first_or_next(graphs.VAE_DECODER, True),
    graphs.first_or_next(graphs.VAE_DECODER, False),
    graphs.ACTION_ADAPTER,
    graphs.ACTION_HEAD,
)


@pytest.mark.parametrize("after_work", [False, True])
@pytest.mark.parametrize("name", ENGINES)
def test_engine_that_fails_once_anywhere_changes_neither_actions_nor_counts(policy, frames, flown, name, after_work):
    assert set(ENGINES) == set(policy.engines)
    undisturbed = policy.new_session(PROMPT, seed=1)
    fly(undisturbed, frames, (1, 4, 4))
    failing_call = 0
    while True:
        failing_call += 1
        engine = _FailsOnce(policy.engines[name], failing_call, after_work=after_work)
        failing = WorldVLNPolicy(policy.manifest, {**policy.engines, name: engine}, policy.tokenizer)
        session = failing.new_session(PROMPT, seed=1)
        chunks, failures = _fly_on_after_a_failure(session, frames)
        np.testing.assert_array_equal(actions_of(chunks), flown)
        assert session.counters["frames_encoded"] == undisturbed.counters["frames_encoded"]
        for kept, expected in zip(session.observed_clips, undisturbed.observed_clips, strict=True):
            np.testing.assert_array_equal(kept.codes, expected.codes)
        if not failures:
            break
    assert failing_call > 1


@pytest.mark.parametrize("name", [graphs.WORLD_MODEL_CONTEXT, graphs.LATENT_EMBED, graphs.TEXT_ENCODER])
def test_new_prompt_whose_context_failed_is_made_again(policy, frames, name: str):
    def change_prompt(session: PolicySession) -> ActionChunk:
        fly(session, frames, (1, 4))
        session.set_prompt(OTHER)
        return session.observe(frames[5:9])

    expected = change_prompt(policy.new_session(PROMPT, seed=1))
    counting = _FailsOnce(policy.engines[name], 0, after_work=False)
    engines = {**policy.engines, name: counting}
    change_prompt(WorldVLNPolicy(policy.manifest, engines, policy.tokenizer).new_session(PROMPT, seed=1))
    last = _FailsOnce(policy.engines[name], counting.calls, after_work=True)
    engines = {**policy.engines, name: last}
    session = WorldVLNPolicy(policy.manifest, engines, policy.tokenizer).new_session(PROMPT, seed=1)
    with pytest.raises(DeviceLostError):
        change_prompt(session)
    np.testing.assert_array_equal(session.observe(()).actions, expected.actions)


def test_client_learns_of_a_failed_engine_and_its_second_request_is_answered(policy, frames, flown):
    name = graphs.first_or_next(graphs.VAE_ENCODER, False)
    engines = {**policy.engines, name: _FailsOnce(policy.engines[name], 1, after_work=False)}
    failing = WorldVLNPolicy(policy.manifest, engines, policy.tokenizer)
    with BackgroundServer(failing) as server, SessionClient(server.url, frame_format="rgb8") as client:
        client.start(PROMPT, seed=1)
        answers = [client.observe(frames[:1])]
        with pytest.raises(ServerError, match="once more, and start a new session if it fails again") as refusal:
            client.observe(frames[1:5])
        assert (refusal.value.code, refusal.value.retry, refusal.value.frames) == ("internal", True, 5)
        assert "device lost" not in str(refusal.value)
        answers += [client.observe([]), client.observe(frames[5:9])]
    np.testing.assert_array_equal(np.concatenate([answer.actions for answer in answers]), flown)


def test_memory_does_not_grow_over_two_hundred_segments(policy, frames):
    def flights(count: int) -> None:
        for seed in range(count):
            session = policy.new_session(PROMPT, seed=seed)
            fly(session, frames, (1, 4, 4))
            session.close()

    flights(20)
    gc.collect()
    before = _resident_bytes()
    flights(67)
    gc.collect()
    assert _resident_bytes() - before < 8 * 2**20


def _resident_bytes() -> int:
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def test_closed_session_holds_no_clips(policy, frames):
    session: WorldVLNSession = policy.new_session(PROMPT)
    session.observe(frames[:5])
    session.close()
    assert session.observed_clips == ()


@pytest.mark.parametrize("steps", [0, 1, 4])
def test_a_segment_that_was_stopped_can_be_asked_for_again(policy, frames, flown, steps: int):
    session = policy.new_session(PROMPT, seed=1)
    chunks = [session.observe(frames[:1])]
    asked = iter(range(steps + 1))
    with pytest.raises(StoppedError):
        session.observe(frames[1:5], should_stop=lambda: next(asked) == steps)
    assert (session.frames, session.emitted, session.need) == (5, 0, 0)
    chunks += [session.observe(()), session.observe(frames[5:9])]
    np.testing.assert_allclose(actions_of(chunks), flown, atol=MOTION_TOLERANCE)


@pytest.mark.parametrize("sent", [0, 1, 3, 5, 8, 9, 13])
def test_a_restored_session_goes_on_with_the_same_actions(policy, frames, flown, sent: int):
    before = policy.new_session(PROMPT, seed=1)
    chunks = [chunk for frame in frames[:sent] if (chunk := before.observe([frame])) is not None]
    restored = policy.new_session(PROMPT, seed=1)
    restored.restore(frames[:sent], before.emitted)
    assert (restored.frames, restored.emitted, restored.need) == (before.frames, before.emitted, before.need)
    assert restored.counters["token_steps"] == 0
    chunks += [chunk for frame in frames[sent:FRAMES] if (chunk := restored.observe([frame])) is not None]
    np.testing.assert_allclose(actions_of(chunks), flown, atol=MOTION_TOLERANCE)


def test_a_flight_restored_behind_its_last_segment_holds_as_little_as_one_that_was_flown(policy, frames):
    flown, restored = policy.new_session(PROMPT, seed=1), policy.new_session(PROMPT, seed=1)
    fly(flown, frames, (1, 4, 4))
    restored.restore(frames[:9], 2)
    assert restored.done
    assert restored.kv_bytes == flown.kv_bytes == 0
    assert restored.held_bytes <= flown.held_bytes


@pytest.mark.parametrize(("count", "emitted"), [(0, 0), (4, 1), (9, -2)])
def test_a_segment_that_cannot_rest_on_the_frames_is_not_restored(policy, frames, count: int, emitted: int):
    with pytest.raises(ValueError, match=f"segment {emitted} cannot rest on {count} frames"):
        policy.new_session(PROMPT).restore(frames[:count], emitted)
