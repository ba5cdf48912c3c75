"""openpi's WebSocket policy protocol: an unmodified `openpi_client.WebsocketClientPolicy` flies a session.

Observations and results alternate, one in flight. An error is a text frame, and the connection goes on.
Source: spec/session_protocol.md 6.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping
from functools import partial

import numpy as np
from starlette.websockets import WebSocket, WebSocketDisconnect, WebSocketState

from worldvln_edge.poses import ACTION_ORDER, ACTION_UNITS
from worldvln_edge.protocol import ProtocolError
from worldvln_edge.runtime.doors.entrance import Entrance, client_address
from worldvln_edge.runtime.doors.http_door import prefix_latents
from worldvln_edge.runtime.doors.openpi_codec import REPLIES, Observation, decode_observation, encode_map
from worldvln_edge.runtime.sessions.device_queue import Ticket
from worldvln_edge.runtime.sessions.implicit_session import (
    ImplicitAnswer,
    ImplicitCall,
    ReadinessRule,
    Wording,
    door_session_name,
)
from worldvln_edge.runtime.sessions.policy import ActionChunk
from worldvln_edge.runtime.sessions.session_manager import SessionManager, new_session_name
from worldvln_edge.wire import check_session_name

OPENPI_PATHS = ("/", "/openpi")
_log = logging.getLogger(__name__)
_GOING_AWAY = 1001
_CLOSE_WITHIN_S = 2.0
_LARGE_BYTES = 256 * 1024  # messages above this are parsed on a thread: the event loop must go on answering
_NO_ACTIONS = np.zeros((0, 6), np.float32)
_WORDING = Wording(
    reset_needs_prompt="reset needs a prompt and an image",
    first_call_needs_prompt="the first observation of a session needs a prompt and an image",
    frames_needed="the first observation of a session needs an image",
)


class OpenPIDoor:
    """All openpi clients of one server."""

    def __init__(self, manager: SessionManager, entrance: Entrance):
        self._manager, self._entrance = manager, entrance
        self._clients: set[WebSocket] = set()

    async def serve(self, websocket: WebSocket) -> None:
        """One client, from the upgrade request to the close."""
        async with self._entrance.admit(websocket) as peer:
            if peer is None:
                return
            await websocket.accept()
            self._clients.add(websocket)
            try:
                await _Conversation(self._manager, websocket, peer).run()
            finally:
                self._clients.discard(websocket)

    async def close_all(self) -> None:
        """Close every connection with 1001: the server goes away."""
        await asyncio.gather(*(_close(websocket) for websocket in set(self._clients)))


def metadata(manager: SessionManager) -> dict[str, object]:
    """What a client is told on connect: plain types only (6.2)."""
    info, limits = manager.policy.info, manager.limits
    return {
        "protocol": "worldvln-openpi",
        "version": 1,
        "num_frames": info.horizon.num_frames,
        "step": info.horizon.step,
        "points": list(info.horizon.points),
        "fps": info.horizon.fps,
        "action_order": list(ACTION_ORDER),
        "action_units": list(ACTION_UNITS),
        "action_frame": "body",
        "image_hw": list(info.image_hw),
        "reply": list(REPLIES),
        "model": info.name,
        "limits": {
            "max_bytes": limits.max_msg_bytes,
            "max_images": limits.max_images,
            "max_image_bytes": limits.max_image_bytes,
            "max_pixels": limits.max_pixels,
            "max_side": limits.max_side,
            "max_prompt_chars": limits.max_prompt_chars,
        },
    }


class _Conversation:
    """One connection."""

    def __init__(self, manager: SessionManager, websocket: WebSocket, peer: str):
        self._manager, self._websocket, self._peer = manager, websocket, peer
        self._private_name = new_session_name()
        self._has_private_session = False
        self._previous_total_ms: float | None = None

    async def run(self) -> None:
        """Send the metadata, then answer observations until the client is gone."""
        try:
            if await self._send(encode_map(metadata(self._manager))):
                await self._alternate()
        finally:
            if self._has_private_session:
                await self._manager.end(self._peer, self._private_session, 0)

    async def _send(self, message: bytes | str) -> bool:
        """Send a frame; False if the client is gone, or its connection was closed while we wrote."""
        try:
            if isinstance(message, str):
                await self._websocket.send_text(message)
            else:
                await self._websocket.send_bytes(message)
        except (WebSocketDisconnect, RuntimeError) as error:
            _log.debug("an openpi client is gone: %s", error)
            return False
        return True

    @property
    def _private_session(self) -> str:
        return door_session_name("openpi-connection", self._private_name)

    async def _alternate(self) -> None:
        loop = asyncio.get_running_loop()
        # The next message is waited for while the last one is worked on, because that is how a lost client shows.
        coming = asyncio.create_task(self._websocket.receive())
        try:
            while (message := await coming)["type"] == "websocket.receive":
                arrived_s, ticket = loop.time(), Ticket()
                coming = asyncio.create_task(self._websocket.receive())
                coming.add_done_callback(partial(_cancel_if_gone, ticket))
                answer: bytes | str
                try:
                    answer = encode_map(await self._answer(message.get("bytes"), ticket, arrived_s))
                except ProtocolError as error:
                    answer = f"{error.code}: {error.msg}"
                if not await self._send(answer):
                    return
                self._previous_total_ms = (loop.time() - arrived_s) * 1e3
        finally:
            coming.cancel()
            await asyncio.wait({coming})

    async def _answer(self, data: bytes | None, ticket: Ticket, arrived_s: float) -> dict[str, object]:
        try:
            self._manager.request_rate.take(self._peer or client_address(self._websocket))
            observation = await self._read(data)
        except ProtocolError as error:
            self._manager.meter.refused(error.code)
            raise
        if observation.session_id is None or observation.session_id == self._private_name:
            session_id, name, self._has_private_session = self._private_name, self._private_session, True
        else:
            session_id, name = observation.session_id, door_session_name("openpi", observation.session_id)
        answer = await self._manager.call(self._peer, _call(observation, name), ticket=ticket, arrived_s=arrived_s)
        return self._result(answer, session_id)

    async def _read(self, data: bytes | None) -> Observation:
        if data is None:
            raise ProtocolError("bad_request", "send binary frames of msgpack, not text")
        limits = self._manager.limits
        if len(data) > _LARGE_BYTES:
            observation = await asyncio.to_thread(decode_observation, data, limits)
        else:
            observation = decode_observation(data, limits)
        if observation.session_id is not None:
            check_session_name(observation.session_id, limits)
        return observation

    def _result(self, answer: ImplicitAnswer, session_id: str) -> dict[str, object]:
        horizon = self._manager.policy.info.horizon
        chunk, actions = answer.chunk, _NO_ACTIONS if answer.chunk is None else answer.chunk.actions
        is_done = answer.emitted == horizon.segments - 1
        if answer.reply == "step":
            chunk, actions = action_at(answer.frames, answer.chunks, horizon.points)
            is_done = is_done and answer.frames >= horizon.num_frames - 1
        timing = {"infer_ms": answer.ms.infer, "queue_ms": answer.ms.queue}
        if self._previous_total_ms is not None:
            timing["prev_total_ms"] = self._previous_total_ms
        result: dict[str, object] = {
            "actions": np.ascontiguousarray(actions, dtype="<f4"),
            "segment_index": -1 if chunk is None else chunk.segment,
            "num_received_frames": answer.frames,
            "prefix_latents": 0 if chunk is None else prefix_latents(chunk.segment, horizon.points),
            "done": is_done,
            "session_id": session_id,
            "need_frames": answer.need,
            "server_timing": timing,
        }
        if answer.is_late:
            result["late"] = True
        if chunk is not None and chunk.hold is not None:
            result["hold"] = chunk.hold
        return result


def action_at(
    frame: int, chunks: Mapping[int, ActionChunk], points: tuple[int, ...]
) -> tuple[ActionChunk | None, np.ndarray]:
    """The action that moves from a frame to the next one, as float32 [1, 6], and its segment; [0, 6] if there is none.

    Args:
        frame: 1-based index.
        chunks: segments so far.
        points: segment borders.
    """
    for segment, chunk in chunks.items():
        if points[segment] <= frame < points[segment + 1]:
            at = frame - points[segment]
            return chunk, chunk.actions[at : at + 1]
    return None, _NO_ACTIONS


def _call(observation: Observation, name: str) -> ImplicitCall:
    return ImplicitCall(
        session=name,
        frames=observation.images,
        wording=_WORDING,
        prompt=observation.prompt,
        negative_prompt=observation.negative_prompt,
        seed=observation.seed,
        keeps_seed=True,
        reset=observation.reset,
        first=observation.first_frame,
        rule=ReadinessRule(ahead=True),
        deadline_ms=observation.deadline_ms,
        reply=observation.reply,
    )


def _cancel_if_gone(ticket: Ticket, coming: asyncio.Task) -> None:
    is_gone = coming.cancelled() or coming.exception() is not None
    if is_gone or coming.result()["type"] == "websocket.disconnect":
        ticket.cancel()


async def _close(websocket: WebSocket) -> None:
    try:
        if websocket.application_state is WebSocketState.CONNECTED:
            await asyncio.wait_for(websocket.close(_GOING_AWAY), _CLOSE_WITHIN_S)
    except (asyncio.TimeoutError, WebSocketDisconnect, RuntimeError):
        pass  # it is gone or does not read; the server closes the socket next
