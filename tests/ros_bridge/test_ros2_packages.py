"""Parameters, package files and launch file of the ROS 2 packages say what the bridge does."""

import ast
import math
import runpy
import sys
import types
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import msgspec
import pytest
import yaml

from worldvln_edge import __version__
from worldvln_edge.ros_bridge.bridge_config import BridgeConfig, BridgeConfigError, read_bridge_config
from worldvln_edge.ros_bridge.ros2_parameters import NOT_PARAMETERS, PARAMETERS, config_of_parameters

_ROS2 = Path(__file__).parents[2] / "ros_bridge" / "ros2"
_NAMES = ("worldvln_edge_msgs", "worldvln_edge_ros")
_BOX = {"limits.geofence_min_m": [-9.0, -9.0, 0.0], "limits.geofence_max_m": [9.0, 9.0, 9.0]}


def _yaml_parameters() -> dict[str, object]:
    tables = yaml.safe_load((_ROS2 / "worldvln_edge_ros/config/worldvln.yaml").read_text())
    tables = tables["/worldvln_bridge"]["ros__parameters"]
    return {f"{table}.{field}": value for table, fields in tables.items() for field, value in fields.items()}


def test_every_field_of_the_configuration_is_a_parameter():
    fields = {
        f"{table.name}.{field.name}"
        for table in msgspec.structs.fields(BridgeConfig)
        for field in msgspec.structs.fields(table.type)
        if not {table.name, f"{table.name}.{field.name}"} & set(NOT_PARAMETERS)
    }
    assert {parameter.name for parameter in PARAMETERS} == fields
    assert all(parameter.description.endswith(".") for parameter in PARAMETERS)


def test_defaults_are_those_of_the_configuration():
    expected = config_of_parameters(_BOX, use_sim_time=False)
    given = {parameter.name: parameter.default for parameter in PARAMETERS} | _BOX
    assert config_of_parameters(given, use_sim_time=False) == expected
    assert config_of_parameters(_BOX, use_sim_time=True).topics.use_sim_time


def test_defaults_lie_within_their_ranges():
    for parameter in PARAMETERS:
        if parameter.range is not None:
            assert parameter.range[0] <= parameter.default <= parameter.range[1]


@pytest.mark.parametrize("end", [0, 1])
@pytest.mark.parametrize(
    "name",
    [parameter.name for parameter in PARAMETERS if parameter.range and not parameter.name.startswith("setpoint.")],
)
def test_the_ends_of_a_range_are_allowed(name, end):
    parameter = next(parameter for parameter in PARAMETERS if parameter.name == name)
    value = type(parameter.default)(parameter.range[end])
    box = _BOX | {"limits.geofence_max_m": [9.0, 9.0, 20000.0], "setpoint.stale_after_s": 1e-4}  # memory_s is more
    config_of_parameters({**box, name: value}, use_sim_time=False)


def test_numbers_outside_of_ranges_are_refused_by_the_configuration_too():
    for name, value in (("setpoint.rate_hz", 51.0), ("server.horizons", 65), ("limits.max_speed_m_s", 0.0)):
        with pytest.raises(BridgeConfigError, match=name):
            config_of_parameters({**_BOX, name: value}, use_sim_time=False)
    with pytest.raises(BridgeConfigError, match=r"parameter limits.speed is not known; see config/worldvln.yaml"):
        config_of_parameters({**_BOX, "limits.speed": 1.0}, use_sim_time=False)


def test_the_parameter_file_holds_every_parameter_with_its_default():
    written = _yaml_parameters()
    for parameter in PARAMETERS:
        value = written[parameter.name]
        assert type(value) is type(parameter.default), parameter.name
        if isinstance(value, list):
            assert all(math.isnan(part) for part in value)
        else:
            assert value == parameter.default
    assert len(written) == len(PARAMETERS)


def test_a_configuration_passes_through_a_json_file_unchanged(tmp_path):
    config = config_of_parameters({**_BOX, "server.key_file": "/etc/key", "setpoint.rate_hz": 20.0}, use_sim_time=True)
    file = tmp_path / "bridge.json"
    file.write_bytes(msgspec.json.encode(config))
    assert read_bridge_config(file) == config


@pytest.mark.parametrize("name", _NAMES)
def test_package_files_name_the_package_and_its_version(name):
    package = ElementTree.parse(_ROS2 / name / "package.xml").getroot()
    assert package.attrib == {"format": "3"}
    assert (package.findtext("name"), package.findtext("version")) == (name, __version__)
    assert package.findtext("license") == "Apache-2.0"
    order = [child.tag for child in package]
    assert order == sorted(order, key=_SCHEMA_ORDER.index), "the schema has an order"


# The order of the schema.
_SCHEMA_ORDER = [
    *("name", "version", "description", "maintainer", "license", "url", "author", "build_depend"),
    *("build_export_depend", "buildtool_depend", "depend", "exec_depend", "test_depend", "member_of_group", "export"),
]


def test_the_interface_package_builds_its_action():
    cmake = (_ROS2 / "worldvln_edge_msgs/CMakeLists.txt").read_text()
    for file in (_ROS2 / "worldvln_edge_msgs").glob("*/*.action"):
        assert f'"action/{file.name}"' in cmake
    package = ElementTree.parse(_ROS2 / "worldvln_edge_msgs/package.xml").getroot()
    assert package.findtext("member_of_group") == "rosidl_interface_packages"


def test_the_node_package_installs_what_is_there():
    folder = _ROS2 / "worldvln_edge_ros"
    text = (folder / "setup.py").read_text()
    assert f'version="{__version__}"' in text
    listed = ("package.xml", "launch/bridge.launch.py", "config/worldvln.yaml")
    for path in listed:
        assert f'"{path}"' in text
        assert (folder / path).is_file()
    assert (folder / "resource" / "worldvln_edge_ros").is_file()
    assert "script_dir=$base/lib/worldvln_edge_ros" in (folder / "setup.cfg").read_text()


def test_every_package_that_is_imported_is_a_dependency():
    package = ElementTree.parse(_ROS2 / "worldvln_edge_ros/package.xml").getroot()
    named = {element.text for element in package.findall("exec_depend")}
    here = _ROS2.parent
    files = [here / "lifecycle_node.py", *(here / "ports").glob("rclpy_*.py"), *_ROS2.glob("*/launch/*.py")]
    imported = set()
    for file in files:
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Import):
                imported |= {alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module:
                imported.add(node.module.partition(".")[0])
    ours_and_pythons = {"worldvln_edge", *sys.stdlib_module_names}
    optional = {"px4_msgs"}
    assert imported - ours_and_pythons - optional <= named


class _Launch(types.ModuleType):
    """Stands for the modules that the launch file imports: what is called is kept, with its arguments."""

    def __init__(self, calls: list[tuple[str, tuple, dict]]):
        super().__init__("launch")
        self._calls = calls

    def __getattr__(self, name: str):
        if name.startswith("_"):
            raise AttributeError(name)

        def call(*arguments: object, **options: object) -> tuple[str, tuple, dict]:
            self._calls.append((name, arguments, options))
            return self._calls[-1]

        return call


def test_the_launch_file_declares_what_it_uses_and_starts_the_installed_node(monkeypatch):
    folder, calls = _ROS2 / "worldvln_edge_ros", []
    file = folder / "launch/bridge.launch.py"
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module.startswith(("launch", "lifecycle_msgs", "ament_index")):
            parts = node.module.split(".")
            for count in range(1, len(parts) + 1):
                monkeypatch.setitem(sys.modules, ".".join(parts[:count]), _Launch(calls))
    index = sys.modules["ament_index_python.packages"]
    monkeypatch.setattr(index, "get_package_share_directory", lambda package: str(folder), raising=False)
    transition = types.SimpleNamespace(TRANSITION_CONFIGURE=1, TRANSITION_ACTIVATE=3)
    monkeypatch.setattr(sys.modules["lifecycle_msgs.msg"], "Transition", transition, raising=False)
    runpy.run_path(str(file))["generate_launch_description"]()
    declared = {arguments[0] for name, arguments, _ in calls if name == "DeclareLaunchArgument"}
    used = {arguments[0] for name, arguments, _ in calls if name == "LaunchConfiguration"}
    assert declared == used
    [node] = [options for name, _, options in calls if name == "LifecycleNode"]
    assert f'"{node["executable"]} = {{NAME}}.bridge:main"' in (folder / "setup.py").read_text()
    assert node["name"] in (folder / "config/worldvln.yaml").read_text()
    default = next(o["default_value"] for n, a, o in calls if n == "DeclareLaunchArgument" and a == ("params_file",))
    assert Path(default).is_file()
    changes = [options["transition_id"] for name, _, options in calls if name == "ChangeState"]
    assert sorted(changes) == [1, 3]  # configure, and activate once it is inactive


def test_the_executable_says_what_to_install_where_the_bridge_is_not(monkeypatch):
    monkeypatch.setitem(sys.modules, "worldvln_edge.ros_bridge.lifecycle_node", None)
    main = runpy.run_path(str(_ROS2 / "worldvln_edge_ros/worldvln_edge_ros/bridge.py"))["main"]
    with pytest.raises(SystemExit, match="install the bridge into the Python that ROS uses: pip install worldvln-edge"):
        main()
