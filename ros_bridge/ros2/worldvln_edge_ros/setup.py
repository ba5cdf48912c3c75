"""What colcon installs. The node's code is the Python package worldvln-edge, which pip installs before."""

from setuptools import setup

NAME = "worldvln_edge_ros"

setup(
    name=NAME,
    version="0.1.0",
    description="Lifecycle node, parameters and launch file of the WorldVLN bridge",
    license="Apache-2.0",
    packages=[NAME],
    data_files=[
        ("share/ament_index/resource_index/packages", [f"resource/{NAME}"]),
        (f"share/{NAME}", ["package.xml"]),
        (f"share/{NAME}/launch", ["launch/bridge.launch.py"]),
        (f"share/{NAME}/config", ["config/worldvln.yaml"]),
    ],
    install_requires=["setuptools"],
    zip_safe=True,
    entry_points={"console_scripts": [f"bridge = {NAME}.bridge:main"]},
)
