"""A server refuses a session that would not fit into its memory, and says so, instead of running out of it."""

import asyncio
from pathlib import Path

import numpy as np
import pytest
from fake_gpu import FakeMemory

from worldvln_edge.protocol import Limits, Observe, ProtocolError, Start
from worldvln_edge.runtime.engines.backends import Backend
from worldvln_edge.runtime.engines.device_pool import PooledMemory
from worldvln_edge.runtime.sessions.available_memory import available_bytes
from worldvln_edge.runtime.sessions.memory_budget import MemoryBudgetError, plan_budget
from worldvln_edge.runtime.sessions.null_policy import NullPolicy, NullSession
from worldvln_edge.runtime.sessions.session_manager import SessionManager
from worldvln_edge.runtime.worldvln.kv_cache import HostKVMemory, KVShape

MB = 10**6
PIXELS = np.zeros((4, 4, 3), np.uint8).tobytes()


class HoldingSession(NullSession):
    @property
    def held_bytes(self) -> int:
        return 1 * MB if self.done else 4 * MB


class HoldingPolicy(NullPolicy):
    """Its sessions hold up to 4 MB, and 1 MB when they are done; 100 MB are there."""

    session_bytes = 4 * MB

    def available_bytes(self) -> int | None:
        return 100 * MB

    def new_session(self, prompt, *, seed=0, negative_prompt="", emit="ahead"):
        return HoldingSession(self, prompt, seed=seed, emit=emit)


class Clock:
    def __init__(self):
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


async def start(manager: SessionManager, name: str, peer: str = "") -> None:
    await manager.start(peer, Start(id=1, session=name, prompt="go"))


async def finish(manager: SessionManager, name: str) -> None:
    for first, count in ((1, 17), (18, 16), (34, 0)):
        request = Observe(id=first, session=name, first=first, frames=[PIXELS] * count, fmt="rgb8", w=4, h=4)
        await manager.observe("", request)


def is_open(manager: SessionManager, name: str) -> bool:
    return manager._table.find(("", name)) is not None


def test_session_that_does_not_fit_is_refused_with_what_it_needs_what_is_there_and_what_to_do():
    async def scenario() -> None:
        manager = SessionManager(HoldingPolicy(), session_memory_bytes=10 * MB)
        await start(manager, "a")
        await start(manager, "b")
        with pytest.raises(ProtocolError) as refusal:
            await start(manager, "c")
        assert refusal.value.code == "overloaded"
        assert refusal.value.retry_ms == 60_000
        assert refusal.value.msg == (
            "another session may need 4.00 MB, and 2.00 MB of the 10.00 MB for sessions are free, with 2 sessions "
            "there; end one, or try again when one was idle for 60 s (the server's operator may allow more with "
            "--session-memory-mb)"
        )
        assert manager.sessions == 2
        await manager.end("", "a", 2)
        await start(manager, "c")
        manager.close()

    asyncio.run(scenario())


def test_sessions_of_all_peers_share_the_memory():
    async def scenario() -> None:
        manager = SessionManager(HoldingPolicy(), session_memory_bytes=8 * MB)
        await start(manager, "a", peer="key-1")
        await start(manager, "a", peer="key-2")
        with pytest.raises(ProtocolError, match=r"another session may need 4\.00 MB, and 0\.0 kB"):
            await start(manager, "b", peer="key-1")
        manager.close()

    asyncio.run(scenario())


def test_session_that_replaces_another_one_needs_no_memory_besides_it():
    async def scenario() -> None:
        manager = SessionManager(HoldingPolicy(), session_memory_bytes=8 * MB)
        await start(manager, "a")
        await start(manager, "b")
        await start(manager, "b")
        assert manager.sessions == 2
        manager.close()

    asyncio.run(scenario())


def test_sessions_that_are_started_at_once_do_not_get_past_the_bound():
    async def scenario() -> None:
        manager = SessionManager(HoldingPolicy(), session_memory_bytes=8 * MB)
        results = await asyncio.gather(*(start(manager, f"s{index}") for index in range(6)), return_exceptions=True)
        assert [type(result) for result in results].count(ProtocolError) == 4
        assert manager.sessions == 2
        manager.close()

    asyncio.run(scenario())


def test_done_session_counts_what_it_still_holds():
    async def scenario() -> None:
        manager = SessionManager(HoldingPolicy(), session_memory_bytes=9 * MB)
        await start(manager, "done")
        await start(manager, "open")
        with pytest.raises(ProtocolError, match="another session"):
            await start(manager, "third")
        await finish(manager, "done")
        await start(manager, "third")  # 1 + 4 + 4
        with pytest.raises(ProtocolError, match=r"and 0\.0 kB of the 9\.00 MB .* with 3 sessions there"):
            await start(manager, "fourth")
        assert is_open(manager, "done")
        manager.close()

    asyncio.run(scenario())


@pytest.mark.parametrize(
    ("allowed_mb", "kept"),
    [
        (12, ["oldest", "active"]),  # the done one is younger than the oldest and goes first; its 1 MB is enough
        (11, ["active"]),
    ],
)
def test_idle_sessions_make_room_done_ones_first_and_no_more_of_them_than_needed(allowed_mb: int, kept: list[str]):
    clock = Clock()

    async def scenario() -> list[str]:
        manager = SessionManager(HoldingPolicy(), session_memory_bytes=allowed_mb * MB + 1, clock=clock)
        await start(manager, "oldest")
        clock.now += 1
        await start(manager, "done")
        await finish(manager, "done")
        clock.now += 30
        await start(manager, "active")
        clock.now += 40
        await start(manager, "new")
        manager_keeps = [name for name in ("oldest", "done", "active") if is_open(manager, name)]
        manager.close()
        return manager_keeps

    assert asyncio.run(scenario()) == kept


def test_refused_start_drops_nobody():
    clock = Clock()

    async def scenario() -> None:
        manager = SessionManager(HoldingPolicy(), session_memory_bytes=11 * MB, clock=clock)
        await start(manager, "done")
        await finish(manager, "done")
        clock.now += 61  # the done one may go, which would not be enough
        for name in ("a", "b"):
            await start(manager, name)
        with pytest.raises(ProtocolError, match="another session"):
            await start(manager, "c")
        assert is_open(manager, "done")
        manager.close()

    asyncio.run(scenario())


def test_memory_of_a_session_that_expired_is_free_again():
    clock = Clock()

    async def scenario() -> None:
        manager = SessionManager(HoldingPolicy(), session_memory_bytes=4 * MB, clock=clock)
        await start(manager, "a")
        clock.now += 601
        assert manager.expire() == 1
        await start(manager, "b")
        manager.close()

    asyncio.run(scenario())


def test_server_that_is_not_told_gives_sessions_half_of_the_available_memory():
    manager = SessionManager(HoldingPolicy())
    assert (manager.budget.session_bytes, manager.budget.sessions_bytes) == (4 * MB, 50 * MB)
    assert manager.limits.max_stored_bytes == manager.budget.frames_bytes == 100 * MB // 8
    manager.close()


def test_frames_get_no_more_than_the_limit_says_however_much_memory_there_is():
    assert plan_budget(0, Limits(), available_bytes=64 * 2**30).frames_bytes == Limits().max_stored_bytes
    assert plan_budget(0, Limits(max_stored_bytes=1000), available_bytes=64 * 2**30).frames_bytes == 1000


def test_one_session_may_take_more_than_half_of_the_memory_but_not_more_than_all():
    assert plan_budget(70 * MB, Limits(), available_bytes=100 * MB).sessions_bytes == 70 * MB
    with pytest.raises(
        MemoryBudgetError, match=r"holds up to 170\.00 MB, and 100\.00 MB are available here; free memory"
    ):
        plan_budget(170 * MB, Limits(), available_bytes=100 * MB)


def test_operator_may_allow_more_than_there_seems_to_be_but_not_less_than_a_session():
    assert plan_budget(70 * MB, Limits(), available_bytes=10 * MB, asked_bytes=80 * MB).sessions_bytes == 80 * MB
    with pytest.raises(MemoryBudgetError, match=r"up to 70\.00 MB, and sessions may use 60\.00 MB; allow more"):
        SessionManager(HeavyPolicy(), session_memory_bytes=60 * MB)


class HeavyPolicy(HoldingPolicy):
    session_bytes = 70 * MB


def test_where_nothing_tells_what_is_available_sessions_are_not_bounded():
    budget = plan_budget(70 * MB, Limits(), available_bytes=None)
    assert (budget.sessions_bytes, budget.frames_bytes) == (None, Limits().max_stored_bytes)


def test_policy_that_holds_nothing_is_not_bounded_by_memory():
    async def scenario() -> None:
        manager = SessionManager(NullPolicy(), session_memory_bytes=0)
        for index in range(10):
            await start(manager, f"s{index}")
        manager.close()

    asyncio.run(scenario())


MEMINFO = "MemTotal:  8000000 kB\nMemFree:  100 kB\nMemAvailable:  4000000 kB\n"
MACHINE = 4_000_000 * 1024


def tree(root: Path, files: dict[str, str]) -> Path:
    for name, text in {"proc/meminfo": MEMINFO, **files}.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


V2, V1 = "sys/fs/cgroup", "sys/fs/cgroup/memory"


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({}, MACHINE),
        ({"proc/self/cgroup": "0::/\n", f"{V2}/memory.max": "max\n", f"{V2}/memory.current": "5\n"}, MACHINE),
        ({"proc/self/cgroup": "0::/\n", f"{V2}/memory.max": "1000\n", f"{V2}/memory.current": "300\n"}, 700),
        (
            {  # file pages can be given up
                "proc/self/cgroup": "0::/a/b\n",
                f"{V2}/a/b/memory.max": "1000\n",
                f"{V2}/a/b/memory.current": "900\n",
                f"{V2}/a/b/memory.stat": "anon 300\ninactive_file 500\nactive_file 7\n",
            },
            600,
        ),
        (
            {  # a group above may be tighter
                "proc/self/cgroup": "0::/a/b\n",
                f"{V2}/a/b/memory.max": "max\n",
                f"{V2}/a/b/memory.current": "200\n",
                f"{V2}/a/memory.max": "1000\n",
                f"{V2}/a/memory.current": "1200\n",
            },
            0,
        ),
        (
            {  # in a container the path is the host's, and the mount is the group itself
                "proc/self/cgroup": "12:pids:/docker/1\n4:cpu,memory:/docker/1\n",
                f"{V1}/memory.limit_in_bytes": "5000\n",
                f"{V1}/memory.usage_in_bytes": "1500\n",
                f"{V1}/memory.stat": "inactive_file 3\ntotal_inactive_file 500\n",
            },
            4000,
        ),
    ],
)
def test_available_memory_is_the_smallest_of_the_machine_and_its_control_groups(tmp_path, files, expected):
    assert available_bytes(tree(tmp_path, files)) == expected


def test_system_that_tells_nothing_has_unknown_memory(tmp_path):
    assert available_bytes(tmp_path) is None


def test_policy_on_a_device_has_what_is_free_there_or_on_the_host_whichever_is_less():
    memory = FakeMemory()
    kv_memory = HostKVMemory(KVShape(layers=1, rows=1, kv_heads=1, capacity=1, head_dim=1, dtype=np.dtype(np.float32)))
    memory.free_bytes = 1000
    assert Backend(kv_memory=kv_memory, device_memory=memory).available_bytes() == 1000
    memory.free_bytes = 1 << 60
    on_host = Backend(kv_memory=kv_memory).available_bytes()
    found = Backend(kv_memory=kv_memory, device_memory=memory).available_bytes()
    assert found < 1 << 50 if on_host is not None else found == 1 << 60


def test_free_buffers_that_a_pool_keeps_are_free_memory():
    memory = FakeMemory()
    memory.free_bytes = 1000
    pool = PooledMemory(memory)
    buffer = pool.allocate(100)
    assert pool.free_bytes == 1000
    buffer.free()
    assert pool.free_bytes == 1000 + 512
    pool.close()


def test_this_machine_tells_what_it_has():
    available = available_bytes()
    assert available is None or 0 < available < 2**50
