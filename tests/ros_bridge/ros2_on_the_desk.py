"""ROS 2's Python packages for a computer that has none: rclpy within one process, and messages by their definitions.

`install` puts them where imports find them. Messages are those of ROS 2 Jazzy: a class with keyword arguments only,
defaults for all fields, and a refusal of fields that the definition does not have.
"""

from __future__ import annotations

import array
import enum
import sys
import threading
import time
import types
from collections import defaultdict
from typing import Any

from rosbags.interfaces import Nodetype
from rosbags.typesys import Stores, get_types_from_msg, get_typestore

_ZERO = {"string": "", "bool": False, "float32": 0.0, "float64": 0.0, "octet": b"\0", "byte": b"\0"}


def _default(node: Any, classes: dict[str, type]) -> Any:
    kind, value = node
    if kind == Nodetype.BASE:
        return _ZERO.get(value[0], 0)
    if kind == Nodetype.NAME:
        return classes[value]()
    element, count = value
    if kind == Nodetype.SEQUENCE:
        return array.array("B") if element[1][0] == "uint8" else []
    return [_default(element, classes) for _ in range(count)]


def _message_class(name: str, fields: list[tuple[str, Any]], classes: dict[str, type]) -> type:
    def __init__(self, **values: Any) -> None:
        for field, node in fields:
            setattr(self, field, values.pop(field) if field in values else _default(node, classes))
        assert not values, f"{name} has no field {', '.join(values)}"

    return type(name.rpartition("/")[2], (), {"__init__": __init__, "ros_type": name})


class Graph:
    """What all nodes of the process share: subscriptions by topic, and how many publish."""

    def __init__(self) -> None:
        self.subscriptions: dict[str, list[tuple[type, Any]]] = defaultdict(list)
        self.publishers: dict[str, int] = defaultdict(int)
        self.sent: dict[str, list[Any]] = defaultdict(list)
        self.actions: dict[str, Any] = {}
        self.reliability: dict[str, str] = {}


def install(monkeypatch: Any) -> Graph:
    """Make rclpy and the message packages importable for one test."""
    graph = Graph()
    store = get_typestore(Stores.ROS2_JAZZY)
    definitions = dict(store.fielddefs)
    from worldvln_edge.ros_bridge.recording.message_definitions import MESSAGES, message_definition

    for name in MESSAGES:
        if name.startswith("px4_msgs"):
            definitions.update(get_types_from_msg(message_definition(name), name))
    classes: dict[str, type] = {}
    for name, (_, fields) in definitions.items():
        classes[name] = _message_class(name, fields, classes)
    modules: dict[str, types.ModuleType] = {}
    for name, kind in classes.items():
        package, _, message = name.split("/")
        module = modules.setdefault(f"{package}.msg", types.ModuleType(f"{package}.msg"))
        modules.setdefault(package, types.ModuleType(package))
        setattr(module, message, kind)
    for name, module in {**modules, **_rclpy(graph), **_own_action()}.items():
        monkeypatch.setitem(sys.modules, name, module)
    for name in ("ports.rclpy_types", "ports.rclpy_wire", "ports.rclpy_fly_action", "lifecycle_node"):
        forget_module(monkeypatch, f"worldvln_edge.ros_bridge.{name}")
    return graph


def forget_module(monkeypatch: Any, name: str) -> None:
    """Have a module imported anew in this test; what it imports is forgotten behind it, so that no other test meets
    it. To delete the name alone would not do that, where the module was not imported before."""
    monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    monkeypatch.delitem(sys.modules, name)


class _Publisher:
    def __init__(self, graph: Graph, kind: type, topic: str):
        self._graph, self._kind, self._topic = graph, kind, topic
        graph.publishers[topic] += 1

    def publish(self, message: Any) -> None:
        assert type(message) is self._kind
        self._graph.sent[self._topic].append(message)
        for kind, callback in self._graph.subscriptions[self._topic]:
            assert kind is self._kind, "one type for a topic"
            callback(message)

    def get_subscription_count(self) -> int:
        return len(self._graph.subscriptions[self._topic])


class Node:
    graph: Graph

    def __init__(self, node_name: str, *, context: Any = None, namespace: str | None = None):
        self.name = node_name
        self.timers: list[tuple[float, Any]] = []
        self.parameters: dict[str, Any] = {"use_sim_time": False}
        self.descriptors: dict[str, Any] = {}
        self.logged: list[str] = []

    def create_publisher(self, msg_type: type, topic: str, qos_profile: Any) -> _Publisher:
        return _Publisher(self.graph, msg_type, topic)

    def create_subscription(self, msg_type: type, topic: str, callback: Any, qos_profile: Any) -> None:
        self.graph.subscriptions[topic].append((msg_type, callback))
        self.graph.reliability[topic] = qos_profile.reliability.name

    def create_timer(self, timer_period_sec: float, callback: Any) -> None:
        self.timers.append((timer_period_sec, callback))

    def get_publishers_info_by_topic(self, topic: str) -> list[str]:
        return ["publisher"] * self.graph.publishers[topic]

    def declare_parameter(self, name: str, value: Any, descriptor: Any = None) -> None:
        self.parameters.setdefault(name, value)
        self.descriptors[name] = descriptor

    def get_parameter(self, name: str) -> Any:
        return types.SimpleNamespace(name=name, value=self.parameters[name])

    def get_logger(self) -> Any:
        return types.SimpleNamespace(info=self.logged.append, error=self.logged.append, warning=self.logged.append)

    def destroy_node(self) -> None:
        self.timers.clear()


class Transition(enum.Enum):
    SUCCESS = 0
    FAILURE = 1
    ERROR = 2


class LifecycleNode(Node):
    def _allow(self, state: Any) -> Transition:
        return Transition.SUCCESS

    on_configure = on_activate = on_deactivate = on_cleanup = on_shutdown = on_error = _allow

    def trigger_deactivate(self) -> Transition:
        return self.on_deactivate(None)


class _Executor:
    def __init__(self, num_threads: int | None = None, *, context: Any = None):
        self._last_s: dict[int, float] = {}
        self._nodes: list[Node] = []

    def add_node(self, node: Node) -> bool:
        self._nodes.append(node)
        return True

    def spin_once(self, timeout_sec: float | None = None) -> None:
        time.sleep(0.005)
        for node in self._nodes:
            for number, (period_s, callback) in enumerate(list(node.timers)):
                if time.monotonic() - self._last_s.get(number, 0.0) >= period_s:
                    self._last_s[number] = time.monotonic()
                    callback()

    def shutdown(self, timeout_sec: float | None = None) -> bool:
        return True


class GoalHandle:
    """What a client of an action sees of its goal."""

    def __init__(self, server: Any, **request: Any):
        self.request = types.SimpleNamespace(**request)
        self.is_cancel_requested = False
        self.feedback: list[Any] = []
        self.status, self.result = "executing", None
        self._thread = threading.Thread(target=self._run, args=(server,))
        self._thread.start()

    def cancel(self) -> None:
        self.is_cancel_requested = True

    def wait(self) -> Any:
        self._thread.join(10)
        return self.result

    def publish_feedback(self, feedback: Any) -> None:
        self.feedback.append(feedback)

    def succeed(self) -> None:
        self.status = "succeeded"

    def abort(self) -> None:
        self.status = "aborted"

    def canceled(self) -> None:
        self.status = "canceled"

    def _run(self, server: Any) -> None:
        self.result = server.execute(self)


def _rclpy(graph: Graph) -> dict[str, types.ModuleType]:
    def module(name: str, **members: Any) -> types.ModuleType:
        made = types.ModuleType(name)
        vars(made).update(members)
        return made

    class ActionServer:
        def __init__(self, node, action_type, name, execute, *, goal_callback, cancel_callback, callback_group):
            self.execute, self.goal_callback, self.cancel_callback = execute, goal_callback, cancel_callback
            graph.actions[name] = self

        def destroy(self) -> None:
            graph.actions.clear()

    Node.graph = graph
    policy = enum.Enum("Policy", ["KEEP_LAST", "RELIABLE", "BEST_EFFORT", "VOLATILE"])
    answer = enum.Enum("Answer", ["ACCEPT", "REJECT"])

    class Fields(types.SimpleNamespace):
        pass

    parts = {
        "rclpy": {"init": lambda **_: None, "shutdown": lambda **_: None, "spin": lambda node: None},
        "rclpy.context": {"Context": type("Context", (), {})},
        "rclpy.executors": {
            "MultiThreadedExecutor": _Executor,
            "ExternalShutdownException": type("ExternalShutdownException", (Exception,), {}),
        },
        "rclpy.node": {"Node": Node},
        "rclpy.publisher": {"Publisher": _Publisher},
        "rclpy.qos": {
            "QoSProfile": Fields,
            "HistoryPolicy": policy,
            "ReliabilityPolicy": policy,
            "DurabilityPolicy": policy,
        },
        "rclpy.callback_groups": {"ReentrantCallbackGroup": type("ReentrantCallbackGroup", (), {})},
        "rclpy.action": {"ActionServer": ActionServer, "GoalResponse": answer, "CancelResponse": answer},
        "rclpy.action.server": {"ServerGoalHandle": GoalHandle},
        "rclpy.lifecycle": {
            "LifecycleNode": LifecycleNode,
            "LifecycleState": tuple,
            "TransitionCallbackReturn": Transition,
        },
        "rcl_interfaces": {},
        "rcl_interfaces.msg": {"ParameterDescriptor": Fields, "FloatingPointRange": Fields, "IntegerRange": Fields},
    }
    return {name: module(name, **members) for name, members in parts.items()}


def _own_action() -> dict[str, types.ModuleType]:
    """worldvln_edge_msgs, by the fields of its .action file."""
    from pathlib import Path

    file = Path(__file__).parents[2] / "ros_bridge/ros2/worldvln_edge_msgs/action/FlyInstruction.action"
    parts = []
    for part in file.read_text().split("\n---\n"):
        lines = [line for line in part.splitlines() if line and not line.startswith("#")]
        definition = get_types_from_msg("\n".join(lines) + "\n", "worldvln_edge_msgs/msg/Part")
        parts.append(_message_class("worldvln_edge_msgs/action/Part", definition["worldvln_edge_msgs/msg/Part"][1], {}))
    action = types.SimpleNamespace(Goal=parts[0], Result=parts[1], Feedback=parts[2])
    package, module = types.ModuleType("worldvln_edge_msgs"), types.ModuleType("worldvln_edge_msgs.action")
    module.FlyInstruction = action  # type: ignore[attr-defined]
    return {"worldvln_edge_msgs": package, "worldvln_edge_msgs.action": module}
