"""The command `worldvln-edge`: one table of subcommands, each imported only when it is used.

So `--help` answers without torch, onnxruntime or any room, and a machine needs only the extras of what it runs.
Our own typed errors are printed as one line and end with 1; wrong usage ends with 2.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import Any, NamedTuple

import click

from worldvln_edge import __version__


class Subcommand(NamedTuple):
    target: str
    """module:attribute of a click command or group."""
    extra: str
    """Optional dependencies (pyproject.toml) that it needs."""
    help: str


SUBCOMMANDS: dict[str, Subcommand] = {
    "export": Subcommand("worldvln_edge.export.cli:export_command", "export", "Export a checkpoint to an ONNX bundle."),
    "verify": Subcommand(
        "worldvln_edge.export.verify_cli:verify_command", "cpu,export", "Compare a bundle with the PyTorch checkpoint."
    ),
    "inspect": Subcommand("worldvln_edge.export.inspect_cli:inspect_command", "export", "Show what a bundle costs."),
    "make-checkpoint": Subcommand(
        "worldvln_edge.export.checkpoint_cli:make_checkpoint_command", "export", "Write a random released checkpoint."
    ),
    "calibrate": Subcommand(
        "worldvln_edge.export.calibrate_cli:calibrate_command", "export", "Measure activations, for low precisions."
    ),
    "build": Subcommand(
        "worldvln_edge.export.build_cli:build_command", "export,tensorrt-rtx", "Build TensorRT engines into a bundle."
    ),
    "bench-export": Subcommand(
        "worldvln_edge.export.bench_export:bench_export_command", "export", "Measure exports at real size."
    ),
    "serve": Subcommand("worldvln_edge.runtime.cli:serve_command", "cpu,serve", "Serve a bundle to drones."),
    "doctor": Subcommand(
        "worldvln_edge.runtime.doctor.doctor_cli:doctor_command", "serve", "Say what keeps this computer from flying."
    ),
    "record": Subcommand("worldvln_edge.cli:record", "record", "Look into recordings, show them, convert them."),
    "replay": Subcommand(
        "worldvln_edge.runtime.recording.record_cli:replay_command",
        "cpu,record",
        "Feed a recording to a bundle, and compare the actions.",
    ),
    "keygen": Subcommand("worldvln_edge.keygen_cli:keygen_command", "zmq", "Make CURVE keys for ZeroMQ."),
    "bench": Subcommand("worldvln_edge.runtime.bench.bench_cli:bench_command", "cpu", "Time a bundle, stage by stage."),
    "bench-serve": Subcommand(
        "worldvln_edge.runtime.bench.serve_load_cli:bench_serve_command", "serve", "Time the server itself, under load."
    ),
    "bench-record": Subcommand(
        "worldvln_edge.runtime.bench.recording_cost_cli:bench_record_command",
        "cpu,record",
        "Time what recording costs a flight.",
    ),
    "soak": Subcommand(
        "worldvln_edge.runtime.bench.soak_cli:soak_command", "cpu", "Fly a bundle for long, and see that nothing grows."
    ),
    "tune": Subcommand(
        "worldvln_edge.runtime.bench.tune_cli:tune_command",
        "cpu",
        "Time a bundle's profiles, so that deadlines can choose.",
    ),
    "fly": Subcommand("worldvln_edge.training.cli:fly_command", "sim", "Fly tasks in the simulator against a server."),
    "eval": Subcommand(
        "worldvln_edge.training.evaluation.eval_cli:eval_command", "sim", "Fly a set of tasks and report the metrics."
    ),
    "profiles": Subcommand(
        "worldvln_edge.training.evaluation.profiles_cli:profiles_command",
        "cpu,sim",
        "Measure what profiles save and cost.",
    ),
    "train": Subcommand("worldvln_edge.training.train_cli:train", "train", "Train the models, stage by stage."),
    "missions": Subcommand(
        "worldvln_edge.training.evaluation.missions_cli:missions_command",
        "cpu,sim",
        "Fly chains of instructions, and report.",
    ),
    "speculation": Subcommand(
        "worldvln_edge.training.evaluation.speculation_cli:speculation_command",
        "cpu,sim",
        "Measure segments that are generated ahead.",
    ),
    "data": Subcommand(
        "worldvln_edge.training.data.cli:data", "data,train", "Look into training data, check it, convert it."
    ),
    "sim": Subcommand("worldvln_edge.training.sim_cli:sim", "sim", "Run and inspect the simulator."),
    "ros": Subcommand("worldvln_edge.ros_bridge.cli:ros", "dds", "Fly a robot by its topics (DDS, ROS 2, ROS 1)."),
    "demo": Subcommand(
        "worldvln_edge.training.cli:demo_command", "sim", "Export the packaged model, serve it, and fly held-out tasks."
    ),
}
RECORD_SUBCOMMANDS: dict[str, Subcommand] = {
    "info": Subcommand("worldvln_edge.runtime.recording.record_cli:info_command", "record", "What is in it."),
    "show": Subcommand(
        "worldvln_edge.runtime.recording.record_cli:show_command", "record,rerun", "Show it in the Rerun viewer."
    ),
    "export": Subcommand(
        "worldvln_edge.training.data.recording_cli:export_command", "record,data,train", "Make training data of it."
    ),
}
# What foreign modules are called on the package index is not what they are imported as; the extra is what counts.
_EXTRA_OF_MODULE = {
    "mujoco": "sim",
    "av": "sim",
    "matplotlib": "sim",
    "pyarrow": "data",
    "tensorboardX": "train",
    "onnxruntime": "cpu",
    "tokenizers": "cpu",
    "starlette": "serve",
    "uvicorn": "serve",
    "prometheus_client": "serve",
    "zmq": "zmq",
    "cyclonedds": "dds",
    "opentelemetry": "otel",
    "mcap": "record",
    "mcap_protobuf": "record",
    "foxglove_schemas_protobuf": "record",
    "google": "record",
    "rerun": "rerun",
    "onnx": "export",
    "onnxscript": "export",
    "tensorrt": "tensorrt",
    "tensorrt_rtx": "tensorrt-rtx",
}


class OneLineError(click.ClickException):
    """An expected failure: `error: ...` on stderr, exit status 1."""

    def show(self, file=None) -> None:
        click.echo(f"error: {self.message}", err=True, file=file)


class LazyGroup(click.Group):
    """A group whose subcommands stand in a table."""

    def __init__(self, *args: Any, subcommands: Mapping[str, Subcommand], **options: Any):
        super().__init__(*args, **options)
        self._subcommands = subcommands

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(self._subcommands)

    def get_command(self, ctx: click.Context, name: str) -> click.Command | None:
        subcommand = self._subcommands.get(name)
        if subcommand is None:
            return None
        module, _, attribute = subcommand.target.partition(":")
        try:
            return getattr(importlib.import_module(module), attribute)
        except ModuleNotFoundError as error:
            raise _missing(ctx, name, subcommand, error) from error

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """List the subcommands without importing them."""
        with formatter.section("Commands"):
            formatter.write_dl([(name, subcommand.help) for name, subcommand in self._subcommands.items()])

    def invoke(self, ctx: click.Context) -> object:
        try:
            return super().invoke(ctx)
        except ModuleNotFoundError as error:
            name = ctx.invoked_subcommand or ""
            raise _missing(ctx, name, self._subcommands[name], error) from error
        except (ValueError, RuntimeError, LookupError, OSError) as error:
            if type(error).__module__.partition(".")[0] != "worldvln_edge":
                raise  # not one of our typed errors: a fault, whose traceback is wanted
            raise OneLineError(str(error)) from error


def _missing(ctx: click.Context, name: str, subcommand: Subcommand, error: ModuleNotFoundError) -> OneLineError:
    module = (error.name or "").partition(".")[0]
    command = " ".join(["worldvln-edge", *ctx.command_path.split()[1:], name])
    if module == "worldvln_edge":
        return OneLineError(f"`{command}` is not part of this installation ({error.name} is missing)")
    extra = _EXTRA_OF_MODULE.get(module) or subcommand.extra
    return OneLineError(f"`{command}` needs {module}; install it with: pip install 'worldvln-edge[{extra}]'")


@click.group(cls=LazyGroup, subcommands=SUBCOMMANDS, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="worldvln-edge")
def main() -> None:
    """Train WorldVLN, export it to ONNX, and fly it on the drone's own computer.

    Example: worldvln-edge serve bundle/ --ws 127.0.0.1:8001
    """


@click.group(cls=LazyGroup, subcommands=RECORD_SUBCOMMANDS)
def record() -> None:
    """Recordings of flights (`serve --record`): look into them, show them, make training data of them.

    Example: worldvln-edge record info runs/demo/recordings/20261121T235900.250Z-a3901555b1ae9325.000.mcap
    """
