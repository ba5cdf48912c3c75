"""The configuration file is checked in full before anything starts."""

from pathlib import Path

import pytest

from worldvln_edge.client import ServerAddressError
from worldvln_edge.ros_bridge.bridge_config import BridgeConfigError, ServerConfig, read_bridge_config
from worldvln_edge.ros_bridge.server_connection import server_client

_LIMITS = "[limits]\ngeofence_min_m = [-20, -20, 0]\ngeofence_max_m = [20, 20, 10]\n"
_PAGE = Path(__file__).parents[2] / "docs" / "ros.md"
_HOVER = _PAGE.with_name("hover.md")


def _read(tmp_path: Path, text: str):
    path = tmp_path / "drone.toml"
    path.write_text(text)
    return read_bridge_config(path)


def test_only_the_limits_have_to_be_given(tmp_path):
    config = _read(tmp_path, _LIMITS)
    assert config.limits.geofence_max_m == (20, 20, 10)
    assert config.setpoint.rate_hz == 40


def test_the_example_of_the_page_is_a_configuration(tmp_path):
    example = _PAGE.read_text().partition("```toml\n")[2].partition("```")[0]
    assert _read(tmp_path, example).limits.min_height_m == 1.5


def test_the_examples_of_the_way_to_hover_are_configurations(tmp_path):
    examples = [part.partition("```")[0] for part in _HOVER.read_text().split("```toml\n")[1:]]
    configs = [_read(tmp_path, example if "[limits]" in example else _LIMITS + example) for example in examples]
    assert configs[0].limits.max_speed_m_s == 1.0
    assert [config.topics.setpoint for config in configs[1:]] == [
        "/mavros/setpoint_velocity/cmd_vel",
        "/fmu/in/trajectory_setpoint",
    ]
    assert configs[2].topics.odometry == "/fmu/out/vehicle_odometry"


@pytest.mark.parametrize(
    ("topics", "setpoint", "odometry"),
    [
        ("", "/mavros/setpoint_velocity/cmd_vel", "/odom"),
        ('setpoint_kind = "pose"', "/mavros/setpoint_position/local", "/odom"),
        ('setpoint_kind = "pose"\nsetpoint = "/goal"\nodometry = "/vio"', "/goal", "/vio"),
    ],
)
def test_topics_that_are_not_named_have_the_usual_name_of_their_kind(tmp_path, topics, setpoint, odometry):
    config = _read(tmp_path, f"{_LIMITS}[topics]\n{topics}\n").topics
    assert (config.setpoint, config.odometry) == (setpoint, odometry)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "Object missing required field `limits`"),
        ("[limits", "drone.toml: "),
        (_LIMITS + "[camera]\nfps = 3\n", "Object contains unknown field `fps` - at `$.camera`"),
        (_LIMITS + "max_speed_m_s = 0\n", "limits.max_speed_m_s must be over 0 and below 100, found 0"),
        (_LIMITS + '[topics]\nimage = "camera"\n', "topics.image: 'camera' is no topic; give a full name such as"),
        (_LIMITS + '[topics]\nimage = "/odom"\n', "topics.odometry and topics.image are both /odom; give each its own"),
        (_LIMITS + '[topics]\nchunk = "/worldvln/path"\n', "topics.chunk and topics.path are both /worldvln/path"),
        (_LIMITS + '[topics]\nsetpoint_kind = "thrust"\n', "Invalid enum value 'thrust' - at `$.topics.setpoint_kind`"),
        (
            _LIMITS + '[topics]\nbody_frame = ""\n',
            "topics.body_frame is empty; give the name of a frame such as base_link",
        ),
        (_LIMITS + "[dds]\ndomain_id = 233\n", "dds.domain_id must be 0 to 232, found 233"),
        (_LIMITS + "[server]\nanswer_timeout_s = 0\n", "server.answer_timeout_s must be more than 0, found 0"),
        (_LIMITS + "[server]\nhorizons = 0\n", "server.horizons must be 1 to 64, found 0"),
        (_LIMITS + "[setpoint]\nrate_hz = 10\n", "setpoint.rate_hz must be 20 to 50, found 10"),
        (_LIMITS + "[odometry]\nstale_after_s = 0\n", "odometry.stale_after_s must be over 0 and below 60, found 0"),
        (
            _LIMITS + "[setpoint]\nstale_after_s = 9\n",
            "odometry.memory_s (5) must be more than setpoint.stale_after_s (9): a chunk starts where the drone was",
        ),
        (_LIMITS + "[topics]\nlockstep = true\n", "topics.lockstep needs use_sim_time = true and setpoint_kind"),
    ],
)
def test_a_file_that_cannot_be_used_says_where_and_why(tmp_path, text, message):
    with pytest.raises(BridgeConfigError) as refusal:
        _read(tmp_path, text)
    assert message in str(refusal.value)
    assert str(refusal.value).startswith(str(tmp_path / "drone.toml"))


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(BridgeConfigError, match=r"none.toml: cannot be read \(No such file or directory\)"):
        read_bridge_config(tmp_path / "none.toml")


def test_a_key_file_is_read_when_the_bridge_starts(tmp_path):
    key_file = tmp_path / "key"
    with pytest.raises(BridgeConfigError, match=r"server.key_file .*key: cannot be read"):
        server_client(ServerConfig(key_file=str(key_file)))
    key_file.write_text("\n")
    with pytest.raises(BridgeConfigError, match=r"server.key_file .*key is empty; write the API key into it"):
        server_client(ServerConfig(key_file=str(key_file)))
    key_file.write_text("secret\n")
    assert server_client(ServerConfig(key_file=str(key_file)))().url == "ws://127.0.0.1:8001/v1/session"
    with pytest.raises(ServerAddressError):
        server_client(ServerConfig(url="ftp://127.0.0.1"))
