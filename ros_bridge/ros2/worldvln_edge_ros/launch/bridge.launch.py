"""The bridge as a lifecycle node, taken to `active` by itself, and where the camera sits on the body.

ros2 launch worldvln_edge_ros bridge.launch.py params_file:=my_drone.yaml
"""

from pathlib import Path

from ament_index_python.packages import get_package_share_directory
from launch import LaunchDescription
from launch.actions import DeclareLaunchArgument, EmitEvent, RegisterEventHandler
from launch.conditions import IfCondition
from launch.events import matches_action
from launch.substitutions import LaunchConfiguration
from launch_ros.actions import LifecycleNode, Node
from launch_ros.event_handlers import OnStateTransition
from launch_ros.events.lifecycle import ChangeState
from lifecycle_msgs.msg import Transition

PACKAGE = "worldvln_edge_ros"


def generate_launch_description() -> LaunchDescription:
    share = Path(get_package_share_directory(PACKAGE))
    bridge = LifecycleNode(
        package=PACKAGE,
        executable="bridge",
        name="worldvln_bridge",
        namespace="",
        output="screen",
        parameters=[
            LaunchConfiguration("params_file"),
            {"use_sim_time": LaunchConfiguration("use_sim_time")},
        ],
    )
    configure = EmitEvent(
        event=ChangeState(lifecycle_node_matcher=matches_action(bridge), transition_id=Transition.TRANSITION_CONFIGURE),
        condition=IfCondition(LaunchConfiguration("autostart")),
    )
    activate = RegisterEventHandler(
        OnStateTransition(
            target_lifecycle_node=bridge,
            start_state="configuring",
            goal_state="inactive",
            entities=[
                EmitEvent(
                    event=ChangeState(
                        lifecycle_node_matcher=matches_action(bridge), transition_id=Transition.TRANSITION_ACTIVATE
                    )
                )
            ],
        ),
        condition=IfCondition(LaunchConfiguration("autostart")),
    )
    # REP-103: the optical frame has z forward, x right, y down.
    camera = Node(
        package="tf2_ros",
        executable="static_transform_publisher",
        name="worldvln_camera_mount",
        arguments=[
            *("--x", LaunchConfiguration("camera_x"), "--y", LaunchConfiguration("camera_y")),
            *("--z", LaunchConfiguration("camera_z"), "--roll", "-1.5707963", "--pitch", "0", "--yaw", "-1.5707963"),
            *("--frame-id", LaunchConfiguration("body_frame")),
            *("--child-frame-id", LaunchConfiguration("camera_frame")),
        ],
        condition=IfCondition(LaunchConfiguration("publish_camera_tf")),
    )
    return LaunchDescription(
        [
            DeclareLaunchArgument(
                "params_file",
                default_value=str(share / "config" / "worldvln.yaml"),
                description="Parameters; copy worldvln.yaml and fill in the geofence.",
            ),
            DeclareLaunchArgument(
                "autostart", default_value="true", description="Configure and activate the node by itself."
            ),
            DeclareLaunchArgument("use_sim_time", default_value="false", description="Time is what /clock says."),
            DeclareLaunchArgument(
                "publish_camera_tf", default_value="false", description="Publish where the camera sits, as below."
            ),
            DeclareLaunchArgument("camera_x", default_value="0.1", description="Camera ahead of the body's origin, m."),
            DeclareLaunchArgument("camera_y", default_value="0.0", description="Camera left of it, m."),
            DeclareLaunchArgument("camera_z", default_value="0.0", description="Camera above it, m."),
            DeclareLaunchArgument("body_frame", default_value="base_link", description="Frame of the body."),
            DeclareLaunchArgument(
                "camera_frame", default_value="camera_optical_frame", description="Frame of the camera's images."
            ),
            bridge,
            activate,
            configure,
            camera,
        ]
    )
