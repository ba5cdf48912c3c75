"""`worldvln-edge train`: wrong usage, wrong data, a stopped run, and a run that ends with a checkpoint."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from torchrun_processes import torchrun

from worldvln_edge.cli import main
from worldvln_edge.models.worldvln import load_checkpoint
from worldvln_edge.training.sim.flights import FlightsConfig, generate_flights
from worldvln_edge.training.stages.stage_tables import COMMANDS

QUICK = (
    "[trainer]\nlog_every = 1\ntensorboard = false\n[chain]\naction_flights = 4\n"
    "[vae_encoder]\nstep_rows = 2\nmicro_rows = 2\n[vae]\nstep_rows = 2\nmicro_rows = 2\nwindow = 5\n"
    "[rgb_head]\nstep_rows = 2\nmicro_rows = 2\n[sft]\nstep_rows = 2\nmicro_rows = 1\n"
    "[action]\nstep_rows = 2\nmicro_rows = 2\npredicted_share = 0.0\n"
) + "".join(f"[{stage}.optimiser]\nsteps = 2\n" for stage in ("vae_encoder", "vae", "rgb_head", "sft", "action"))


@pytest.fixture(scope="module")
def flights(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("flights")
    generate_flights(FlightsConfig(split="train"), 5, folder, workers=1, show_progress=False)
    return folder


@pytest.fixture(scope="module")
def quick(tmp_path_factory) -> Path:
    file = tmp_path_factory.mktemp("recipe") / "quick.toml"
    file.write_text(QUICK)
    return file


def invoke(*arguments):
    return CliRunner().invoke(main, ["train", *map(str, arguments)])


def assert_one_sentence(result, *parts: str) -> None:
    assert result.exit_code == 1, result.output
    lines = [line for line in result.output.splitlines() if line]
    assert len(lines) == 1, result.output
    assert lines[0].startswith("error: ")
    for part in parts:
        assert part in lines[0]


@pytest.mark.parametrize("command", COMMANDS)
def test_help_shows_an_example_and_one_line_in_the_list(command: str):
    result = invoke(command, "--help")
    assert result.exit_code == 0
    assert f"Example: worldvln-edge train {command}" in " ".join(result.output.split())
    (line,) = [line for line in invoke("--help").output.splitlines() if line.strip().startswith(f"{command} ")]
    assert line.endswith(".")
    assert not line.endswith("...")


def test_the_command_loads_no_torch_until_it_trains():
    program = "import sys, worldvln_edge.training.train_cli; print(' '.join(sys.modules))"
    loaded = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout.split()
    assert not {"torch", "mujoco", "matplotlib", "av", "pyarrow"} & set(loaded)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "give --data FLIGHTS and --work FOLDER"),
        (("--data", "d", "--work", "w"), "give --out CHECKPOINT"),
        (("--data", "d", "--work", "w", "--out", "o"), "give either --preset NAME or --checkpoint FOLDER"),
        (
            ("--data", "d", "--work", "w", "--out", "o", "--preset", "nano", "--checkpoint", "c"),
            "give either --preset NAME or --checkpoint FOLDER",
        ),
    ],
)
def test_wrong_usage_says_what_to_give(arguments: tuple, message: str):
    result = invoke("all", *arguments)
    assert result.exit_code == 2
    assert message in result.output


def test_an_unknown_preset_is_refused(flights: Path, tmp_path: Path):
    result = invoke("vae", "--preset", "giga", "--data", flights, "--work", tmp_path)
    assert_one_sentence(result, "unknown preset 'giga'", "nano")


def test_a_folder_that_is_no_checkpoint_is_refused(flights: Path, tmp_path: Path):
    result = invoke("vae", "--checkpoint", tmp_path, "--data", flights, "--work", tmp_path)
    assert_one_sentence(result, "is no checkpoint", "model.safetensors")


def test_data_that_are_not_there_are_named(tmp_path: Path):
    result = invoke("vae", "--preset", "nano", "--data", tmp_path / "none", "--work", tmp_path)
    assert_one_sentence(result, "none: no such file or folder")


def test_held_out_data_that_are_not_there_are_named(flights: Path, tmp_path: Path):
    options = ("--data", flights, "--held-out", tmp_path / "none", "--work", tmp_path)
    assert_one_sentence(invoke("vae", "--preset", "nano", *options), "none: no such file or folder")


def test_an_unknown_key_is_named_with_the_nearest(flights: Path, tmp_path: Path):
    options = ("--preset", "nano", "--data", flights, "--work", tmp_path)
    result = invoke("vae", *options, "--set", "vae.optimiser.learning_rat=1")
    assert_one_sentence(result, "--set vae.optimiser.learning_rat=1: unknown key", "did you mean learning_rate")
    (tmp_path / "recipe.toml").write_text("[vae]\nwindo = 3\n")
    result = invoke("vae", *options, "--config", tmp_path / "recipe.toml")
    assert_one_sentence(result, f"{tmp_path}/recipe.toml: unknown key vae.windo; did you mean window?")


def test_a_stage_that_the_recipe_lacks_is_refused(flights: Path, tmp_path: Path):
    options = ("--preset", "narrow", "--data", flights, "--work", tmp_path)
    for command, stage in (("vae", "vae"), ("rgb-head", "rgb_head")):
        assert_one_sentence(invoke(command, *options), f"the recipe has no table [{stage}]; it has none", "--config")


def test_a_stage_without_what_it_starts_from_is_refused(flights: Path, tmp_path: Path):
    result = invoke("backbone", "--preset", "nano", "--data", flights, "--work", tmp_path)
    assert_one_sentence(result, "sft needs a trained vae: run `worldvln-edge train vae` with the same --work first")


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a CUDA device")
def test_a_device_that_is_not_here_is_refused(flights: Path, tmp_path: Path):
    options = ("--preset", "nano", "--data", flights, "--work", tmp_path / "w", "--device", "cuda")
    assert_one_sentence(invoke("vae", *options), "no device 'cuda' for training here", "--device cpu")
    assert not (tmp_path / "w").exists()


def test_a_folder_that_is_not_one_run_of_flights_is_refused(flights: Path, tmp_path: Path):
    data = shutil.copytree(flights, tmp_path / "flights")
    settings = json.loads((data / "flights.json").read_text())
    (data / "flights.json").write_text(json.dumps(settings | {"count": 65}))
    result = invoke("vae", "--preset", "nano", "--data", data, "--work", tmp_path / "w")
    assert_one_sentence(result, "flights-0000000-0005.npz", "is not of the run")


def test_all_stages_end_with_a_checkpoint_and_are_not_repeated(flights: Path, quick: Path, tmp_path: Path):
    options = ("--preset", "nano", "--data", flights, "--config", quick, "--work", tmp_path / "work", "--threads", 1)
    result = invoke("all", *options, "--out", tmp_path / "out")
    assert result.exit_code == 0, result.output
    assert f"{tmp_path / 'out'}: checkpoint of nano" in result.output
    assert load_checkpoint(tmp_path / "out").config.name == "nano"
    written = (tmp_path / "work" / "sft" / "weights" / "model.safetensors").stat().st_mtime_ns
    again = invoke("backbone", *options, "--out", tmp_path / "again")
    assert again.exit_code == 0, again.output
    assert (tmp_path / "work" / "sft" / "weights" / "model.safetensors").stat().st_mtime_ns == written
    first, second = (tmp_path / name / "model.safetensors" for name in ("out", "again"))
    assert first.read_bytes() == second.read_bytes()
    other = invoke("backbone", *options, "--set", "sft.flip_strength=0.2")
    assert_one_sentence(other, "work/sft holds another run: config.flip_strength: 0.1 there, 0.2 here")


def test_dry_run_prints_the_plan_of_the_recipe():
    result = invoke("backbone", "--preset", "worldvln-8b", "--dry-run", "--gpu", "a100", "--mfu", 0.5)
    assert result.exit_code == 0, result.output
    assert "8,768,382,112 parameters; a row of 49 frames has 51,264 tokens, a micro-batch 20,479" in result.output
    assert "a100: 312 TFLOP/s bf16, 80 GB; time at 50% of the peak" in result.output
    small = invoke("backbone", "--preset", "nano", "--dry-run", "--frames", 17, "--set", "sft.micro_rows=2")
    assert "a row of 17 frames has 182 tokens, a micro-batch 364" in small.output


def test_dry_run_refuses_unknown_gpus():
    assert_one_sentence(invoke("backbone", "--preset", "nano", "--dry-run", "--gpu", "h1"), "unknown GPU 'h1'", "h100")


@pytest.mark.slow
@pytest.mark.parametrize(("precision", "bound"), [("fp32", 1e-5), ("bf16", 1e-2)])
def test_two_processes_train_the_backbone_like_one(flights, quick, precision: str, bound: float, tmp_path: Path):
    """The command under `torchrun`, on the real stage, whose blocks are sharded."""
    options = [
        "--set",
        f"trainer.precision={precision}",
        "--preset",
        "nano",
        "--data",
        flights,
        "--config",
        quick,
        "--threads",
        1,
    ]
    vae = invoke("vae", *options, "--work", tmp_path / "one")
    assert vae.exit_code == 0, vae.output
    shutil.copytree(tmp_path / "one", tmp_path / "two")
    assert invoke("backbone", *options, "--work", tmp_path / "one").exit_code == 0
    program = Path(sys.executable).with_name("worldvln-edge")
    done = torchrun(program, "train", "backbone", *options, "--work", tmp_path / "two", options=("--no-python",))
    assert done.returncode == 0, done.stderr
    one, two = (
        [row["loss"] for row in map(json.loads, (tmp_path / name / "sft/loss_curve.jsonl").read_text().splitlines())]
        for name in ("one", "two")
    )
    assert len(one) >= 2
    assert one == pytest.approx(two, abs=bound)
