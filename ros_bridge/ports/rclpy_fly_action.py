"""ROS 2's action `fly_instruction`: an instruction as a goal, with feedback, and a cancel that makes the drone hold.

The action's type comes from the package worldvln_edge_msgs (`ros_bridge/ros2/worldvln_edge_msgs`). A newer goal, or an
instruction on the topic, ends the one that is flown.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from rclpy.action import ActionServer, CancelResponse, GoalResponse
from rclpy.action.server import ServerGoalHandle
from rclpy.callback_groups import ReentrantCallbackGroup
from rclpy.node import Node
from worldvln_edge_msgs.action import FlyInstruction

from worldvln_edge.ros_bridge.flight import Flight

ACTION = "/worldvln/fly_instruction"
_FEEDBACK_S = 0.1


class FlyActionServer:
    """
    Args:
        node: whose executor runs the callbacks; it needs a thread to spare for every goal that is flown.
        request: brings an instruction on its way.
    """

    def __init__(self, node: Node, request: Callable[[str], Flight]):
        self._request = request
        self._server = ActionServer(
            node,
            FlyInstruction,
            ACTION,
            self._fly,
            goal_callback=_accept,
            cancel_callback=_accept_cancel,
            callback_group=ReentrantCallbackGroup(),
        )

    def close(self) -> None:
        self._server.destroy()

    def _fly(self, goal: ServerGoalHandle) -> Any:
        """Runs until the flight is over."""
        flight = self._request(goal.request.instruction)
        while not flight.wait(_FEEDBACK_S):
            if goal.is_cancel_requested:
                flight.cancel()
            progress = flight.progress
            goal.publish_feedback(
                FlyInstruction.Feedback(
                    state=progress.state, chunk=progress.chunk, actions_flown=progress.actions_flown
                )
            )
        if flight.was_flown:
            goal.succeed()
        elif goal.is_cancel_requested:
            goal.canceled()
        else:
            goal.abort()
        outcome = flight.outcome
        return FlyInstruction.Result(
            was_flown=flight.was_flown,
            message=outcome.message if outcome is not None else "",
            what_to_do=outcome.what_to_do if outcome is not None else "",
            chunks=flight.progress.chunk,
        )


def _accept(goal: Any) -> GoalResponse:
    return GoalResponse.ACCEPT if goal.instruction.strip() else GoalResponse.REJECT


def _accept_cancel(goal: ServerGoalHandle) -> CancelResponse:
    return CancelResponse.ACCEPT
