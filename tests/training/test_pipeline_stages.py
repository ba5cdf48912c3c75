"""From flights to a checkpoint, stage by stage, at the size of a test."""

import json
import resource
import shutil
from pathlib import Path

import msgspec
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from small_models import STATS, random_frames, random_model, tiny_config
from tokenizers import Tokenizer

from worldvln_edge.config import ModelConfig
from worldvln_edge.export.graph_sources import graph_sources
from worldvln_edge.export.make_checkpoint import make_checkpoint
from worldvln_edge.models.action_decoder import RgbActionHead
from worldvln_edge.models.checkpoint_file import CheckpointError
from worldvln_edge.models.checkpoint_source import load_source, open_any
from worldvln_edge.models.released_action import COMBINED_FILE
from worldvln_edge.models.released_adapter import EXPORT_FILE, read_adapter_checkpoint
from worldvln_edge.models.stored_tensors import read_all
from worldvln_edge.models.worldvln import load_checkpoint
from worldvln_edge.prompts import tagged_prompt
from worldvln_edge.training.sim.instructions import instruction_vocabulary
from worldvln_edge.training.stages.flight_sources import open_training_flights
from worldvln_edge.training.stages.pipeline import ChainError, TrainingChain
from worldvln_edge.training.stages.released_output import read_released
from worldvln_edge.training.stages.stage_tables import COMMANDS, STAGES, TABLES
from worldvln_edge.training.stages.start_files import StartFiles
from worldvln_edge.training.stages.training_start import Start
from worldvln_edge.training.trainer.distributed import Ranks
from worldvln_edge.training.trainer.recipe import Layer, RecipeError, packaged_layer, read_recipe
from worldvln_edge.training.trainer.run_folder import WorkFolderError

FAST = {"steps": 2, "warmup_steps": 1}
CHANGES = {
    "trainer": {"log_every": 1, "tensorboard": False},
    "chain": {"action_flights": 6, "batch": 4},
    "vae_encoder": {"window": 5, "step_rows": 4, "micro_rows": 2, "optimiser": FAST},
    "vae": {"window": 5, "step_rows": 4, "micro_rows": 2, "optimiser": FAST},
    "rgb_head": {"step_rows": 4, "micro_rows": 4, "optimiser": FAST},
    "adapter": {"step_rows": 2, "optimiser": {"learning_rate": 1e-3, **FAST}},
    "sft": {"step_rows": 4, "micro_rows": 2, "optimiser": FAST},
    "action": {"step_rows": 4, "micro_rows": 4, "optimiser": FAST},
}
ALL = COMMANDS["all"]


def _config() -> ModelConfig:
    """Words of the simulator fit, and the adapter's tokens are those of the patch embedding that it learns from."""
    tiny = tiny_config()
    decoder = tiny.action_decoder
    return msgspec.structs.replace(
        tiny,
        text_encoder=msgspec.structs.replace(tiny.text_encoder, vocabulary=256),
        action_decoder=msgspec.structs.replace(decoder, rgb_head=decoder.latent_head),
    )


CONFIG = _config()


def _flights(folder: Path, count: int, seed: int) -> Path:
    folder.mkdir(parents=True)
    rng = np.random.default_rng(seed)
    words = instruction_vocabulary()
    np.savez(
        folder / "flights-0.npz",
        frames=np.stack([np.stack(random_frames(CONFIG, 13, seed=seed * 100 + i)) for i in range(count)]),
        actions=rng.normal(size=(count, 12, 6)).astype(np.float32) * 10,
        poses=np.zeros((count, 13, 6)),
        instructions=np.array([" ".join(rng.choice(words, 4)) for _ in range(count)]),
        kinds=np.array(["forward"] * count),
    )
    return folder


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return _flights(tmp_path_factory.mktemp("data") / "train", 8, seed=0)


@pytest.fixture(scope="module")
def held_out(tmp_path_factory) -> Path:
    return _flights(tmp_path_factory.mktemp("data") / "held-out", 2, seed=1)


def _chain(data: Path, work: Path, *, held_out=None, start=None, seed=1, changes=None, drop=()) -> TrainingChain:
    layers = [packaged_layer("nano"), Layer("test", CHANGES), Layer("case", changes or {})]
    recipe = read_recipe(
        [Layer(at.source, {k: v for k, v in at.values.items() if k not in drop}) for at in layers if at is not None],
        {name: stage.config for name, stage in STAGES.items()},
        TABLES,
    )
    flights = open_training_flights(data, CONFIG, recipe.tables["data"])
    other = None if held_out is None else open_training_flights(held_out, CONFIG, recipe.tables["data"])
    return TrainingChain(
        start or Start(config=CONFIG),
        recipe,
        flights.source,
        work,
        data_fingerprint=flights.fingerprint,
        seed=seed,
        ranks=Ranks(),
        held_out=None if other is None else other.source,
        held_out_fingerprint=None if other is None else other.fingerprint,
        show_progress=False,
    )


@pytest.fixture(scope="module")
def trained(data: Path, held_out: Path, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    chain = _chain(data, folder / "work", held_out=held_out)
    chain.check(ALL, out=folder / "checkpoint")
    chain.run(ALL)
    chain.write_checkpoint(folder / "checkpoint")
    return folder


def _curve(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "loss_curve.jsonl").read_text(encoding="utf-8").splitlines()]


def test_the_checkpoint_loads_and_traces(trained: Path):
    checkpoint = load_checkpoint(trained / "checkpoint")
    assert checkpoint.config == CONFIG
    assert set(checkpoint.stats.latent_head.std_t) != {1.0}
    assert len(list(graph_sources(checkpoint.model))) == 13
    assert {"loss_curve.jsonl", "run.json"} <= {path.name for path in (trained / "checkpoint").iterdir()}
    assert list(json.loads((trained / "checkpoint" / "run.json").read_bytes())) == list(ALL)


@pytest.mark.parametrize("stage", ALL)
def test_every_stage_leaves_its_run_and_its_weights(trained: Path, stage: str):
    folder = trained / "work" / stage
    rows = _curve(folder)
    assert [row["step"] for row in rows if "loss" in row] == [1, 2]
    assert all(np.isfinite(row["loss"]) for row in rows if "loss" in row)
    assert (stage == "vae_encoder") == all("loss" in row for row in rows)  # the others have held-out metrics
    assert json.loads((folder / "weights" / "config.json").read_bytes())["name"] == CONFIG.name
    weights = load_file(folder / "weights" / "model.safetensors")
    final = load_file(trained / "checkpoint" / "model.safetensors")
    kept = {name: tensor for name, tensor in weights.items() if not name.startswith("readouts.")}
    assert kept
    assert kept.keys() <= final.keys()
    replaced = {"vae_encoder": "vae.", "adapter": "latent_head."}.get(stage)  # by a later stage
    if replaced is None:
        assert all(torch.equal(final[name], tensor.half()) for name, tensor in kept.items())


def test_finished_stages_are_not_repeated_and_the_rest_gives_the_same_weights(
    data: Path, held_out: Path, trained: Path, tmp_path: Path
):
    shutil.copytree(trained, tmp_path, dirs_exist_ok=True)
    shutil.rmtree(tmp_path / "checkpoint")
    shutil.rmtree(tmp_path / "work" / "action")
    before = (tmp_path / "work" / "sft" / "loss_curve.jsonl").stat().st_mtime_ns
    chain = _chain(data, tmp_path / "work", held_out=held_out)
    chain.run(ALL)
    chain.write_checkpoint(tmp_path / "checkpoint")
    assert (tmp_path / "work" / "sft" / "loss_curve.jsonl").stat().st_mtime_ns == before
    old = load_file(trained / "checkpoint" / "model.safetensors")
    new = load_file(tmp_path / "checkpoint" / "model.safetensors")
    assert all(torch.equal(old[name], new[name]) for name in old)


def test_a_full_disk_leaves_no_half_checkpoint(data: Path, held_out: Path, trained: Path, tmp_path: Path):
    """No file may grow beyond 200 kB: the weights of the model cannot be written."""
    chain = _chain(data, trained / "work", held_out=held_out)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, hard))
    try:
        with pytest.raises(ChainError, match=r"out cannot be written \(.*\); make room and give the same command"):
            chain.write_checkpoint(tmp_path / "out")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert not list(tmp_path.iterdir())


def test_one_stage_is_trained_from_a_checkpoint(data: Path, trained: Path, tmp_path: Path):
    start = Start(config=CONFIG, source=open_any(trained / "checkpoint"))
    chain = _chain(data, tmp_path / "work", start=start)
    chain.check(["sft"], out=tmp_path / "tuned")
    chain.run(["sft"])
    chain.write_checkpoint(tmp_path / "tuned")
    old = load_file(trained / "checkpoint" / "model.safetensors")
    new = load_file(tmp_path / "tuned" / "model.safetensors")
    changed = {name.partition(".")[0] for name in old if not torch.equal(old[name], new[name])}
    assert changed == {"world_model", "text_encoder"}
    assert load_checkpoint(tmp_path / "tuned").stats == load_checkpoint(trained / "checkpoint").stats


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"seed": 2}, "seed: 1 there, 2 here"),
        ({"changes": {"chain": {"limit": 7}}}, "flights: 8 there, 7 here"),
        ({"changes": {"vae_encoder": {"window": 9}}}, "config.window: 5 there, 9 here"),
        ({"changes": {"vae_encoder": {"optimiser": {"learning_rate": 1.0}}}}, "optimiser.learning_rate: 0.0004 there"),
    ],
)
def test_work_of_another_run_is_refused_with_what_differs(data, held_out, trained, options: dict, message: str):
    with pytest.raises(WorkFolderError, match=rf"vae_encoder holds another run: .*{message}"):
        _chain(data, trained / "work", held_out=held_out, **options).check(ALL, out=None)


def test_work_of_other_flights_is_refused_although_they_are_as_many(data, held_out, trained, tmp_path: Path):
    arrays = dict(np.load(data / "flights-0.npz"))
    arrays["actions"][0, 0, 0] += 1
    np.savez(tmp_path / "flights-0.npz", **arrays)
    with pytest.raises(WorkFolderError, match="holds another run: data: "):
        _chain(tmp_path, trained / "work", held_out=held_out).check(ALL, out=None)


@pytest.mark.parametrize(
    ("stages", "part", "command"),
    [
        (["sft"], "sft needs a trained vae", "vae"),
        (["adapter"], "adapter needs a trained rgb_head", "rgb-head"),
        (["vae", "action"], "action needs a trained world_model", "backbone"),
    ],
)
def test_a_stage_says_what_it_starts_from(data: Path, tmp_path: Path, stages: list, part: str, command: str):
    message = rf"{part}: run `worldvln-edge train {command}` with the same --work first, or give --checkpoint"
    with pytest.raises(ChainError, match=message):
        _chain(data, tmp_path).check(stages, out=None)


def test_a_checkpoint_without_a_part_is_refused_before_anything_is_trained(data: Path, tmp_path: Path):
    with pytest.raises(ChainError, match=r"latent_head, rgb_head, world_model is not trained: run .*action, backbone"):
        _chain(data, tmp_path).check(["vae_encoder", "vae"], out=tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_a_stage_that_the_recipe_lacks_is_refused(data: Path, tmp_path: Path):
    with pytest.raises(RecipeError, match=r"the recipe has no table \[adapter\]"):
        _chain(data, tmp_path, drop=("adapter",)).check(["adapter"], out=None)


def test_released_presets_need_their_text_encoder(data: Path, tmp_path: Path):
    with pytest.raises(ChainError, match="has a text encoder that is not trained here; give --checkpoint"):
        _chain(data, tmp_path, changes={"sft": {"train_text_encoder": False}}).check(["sft"], out=None)


@pytest.mark.parametrize("preset", ["nano", "mini", "worldvln-8b"])
def test_packaged_recipes_are_read(preset: str):
    layer = packaged_layer(preset)
    assert layer is not None
    recipe = read_recipe([layer], {name: stage.config for name, stage in STAGES.items()}, TABLES)
    assert {"sft", "action"} <= recipe.stages.keys()


def test_published_values_are_those_of_the_paper():
    layer = packaged_layer("worldvln-8b")
    assert layer is not None
    recipe = read_recipe([layer], {name: stage.config for name, stage in STAGES.items()}, TABLES)
    sft, adapter, action = (recipe.stage(name) for name in ("sft", "adapter", "action"))
    assert (sft.optimiser.learning_rate, sft.optimiser.betas, sft.optimiser.clip_norm) == (1e-5, (0.9, 0.97), 5.0)
    assert (sft.optimiser.epochs, sft.optimiser.weight_decay, sft.config.packed_tokens) == (10, 0.0, 20480)
    assert (adapter.optimiser.learning_rate, adapter.optimiser.epochs, adapter.config.step_rows) == (5e-5, 100, 32)
    assert (action.optimiser.learning_rate, action.config.head_rate, action.config.adapter_rate) == (1e-5, 10.0, 2.0)
    assert (action.config.freeze_adapter_epochs, action.config.windows_chunk) == (6, 24)
    # The published code keeps two frames of the adapter in memory, and so little of a flight on disk.
    assert (adapter.config.frames_chunk, action.config.frames_chunk) == (2, 2)
    assert recipe.tables["chain"].keep == "codes"


def test_released_files_are_tuned_and_named_again(data: Path, tmp_path: Path):
    """Backbone and action decoder are written, the VAE and the text encoder stay where they are."""
    released = tmp_path / "released"
    start = _released(released, has_rgb_head=False)
    chain = _chain(data, tmp_path / "work", start=start, changes=RELEASED_CHANGES)
    chain.check(["sft", "action"], out=tmp_path / "tuned")
    chain.run(["sft", "action"])
    chain.write_checkpoint(tmp_path / "tuned")
    assert {path.name for path in (tmp_path / "tuned").iterdir()} == {
        "released.json",
        "backbone.safetensors",
        "stage2_latent2action_combined.pt",
    }
    moved = tmp_path / "elsewhere"
    moved.mkdir()
    for name in ("released", "tuned"):  # paths are relative
        shutil.move(tmp_path / name, moved / name)
    old, new = (load_source(open_any(moved / name)) for name in ("released", "tuned"))
    changed = {
        name.partition(".")[0]
        for name, tensor in new.model.state_dict().items()
        if not torch.allclose(tensor, old.model.state_dict()[name], atol=1e-6)
    }
    assert changed == {"world_model", "latent_head"}
    torch.testing.assert_close(new.stats.latent_head.std, old.stats.latent_head.std)


RELEASED_CHANGES = {
    "chain": {"keep": "codes"},
    "sft": {"train_text_encoder": False},
    "action": {"predicted_share": 0.0},
}


def _released(folder: Path, *, has_rgb_head: bool) -> Start:
    """A start of released files, of which the RGB head is one where it is asked for."""
    make_checkpoint(CONFIG, folder, seed=3)
    if has_rgb_head:
        torch.manual_seed(4)
        head = RgbActionHead(CONFIG.action_decoder)
        torch.save({"model_state_dict": head.tsformer.state_dict()}, folder / "rgb.pth")
        (folder / "rgb.json").write_bytes(msgspec.json.encode({"label_stats": STATS.rgb_head}))
        parts = json.loads((folder / "released.json").read_bytes())
        parts |= {"rgb_head": "rgb.pth", "rgb_run_config": "rgb.json"}
        (folder / "released.json").write_text(json.dumps(parts))
    return Start(config=CONFIG, source=open_any(folder), released=read_released(folder))


def test_a_distilled_adapter_is_written_in_the_released_layout(data: Path, tmp_path: Path):
    start = _released(tmp_path / "released", has_rgb_head=True)
    chain = _chain(data, tmp_path / "work", start=start, changes=RELEASED_CHANGES)
    out = tmp_path / "out"
    chain.check(["adapter"], out=out)
    chain.run(["adapter"])
    chain.write_checkpoint(out)
    assert {path.name for path in out.iterdir()} == {"released.json", COMBINED_FILE, EXPORT_FILE}
    trained = load_file(tmp_path / "work" / "adapter" / "weights" / "model.safetensors")
    exported = read_all(read_adapter_checkpoint(out / EXPORT_FILE).adapter)
    assert {f"latent_head.adapter.{name}" for name in exported} == trained.keys()
    assert all(torch.equal(trained[f"latent_head.adapter.{name}"], tensor) for name, tensor in exported.items())
    again = Start(config=CONFIG, source=open_any(out), files=StartFiles(adapter=out / EXPORT_FILE)).model(0)
    assert all(torch.equal(again.get_parameter(name), tensor) for name, tensor in trained.items())


def test_an_output_that_would_replace_the_start_is_refused(data: Path, tmp_path: Path):
    start = _released(tmp_path / "released", has_rgb_head=False)
    chain = _chain(data, tmp_path / "work", start=start, changes=RELEASED_CHANGES)
    with pytest.raises(ChainError, match=r"--out .*released would replace .*released\.json, which the training starts"):
        chain.check(["sft"], out=tmp_path / "released")


@pytest.mark.parametrize(
    ("stages", "changes"),
    [(["vae_encoder", "vae"], {}), (["sft"], {"sft": {"train_text_encoder": True}})],
)
def test_what_the_released_layout_has_no_place_for_is_not_lost(data: Path, tmp_path: Path, stages: list, changes: dict):
    start = _released(tmp_path / "released", has_rgb_head=False)
    chain = _chain(data, tmp_path / "work", start=start, changes=RELEASED_CHANGES | changes)
    with pytest.raises(ChainError, match="--out writes a whole checkpoint, and rgb_head is not trained"):
        chain.check(stages, out=tmp_path / "out")


@pytest.mark.parametrize("stage", STAGES)
def test_a_stage_holds_what_it_starts_from_and_what_it_makes(stage: str):
    table = STAGES[stage]
    assert {*table.needs, table.makes} <= {*table.uses}
    assert table.sharded in (None, table.makes)


def test_parts_that_are_not_asked_for_take_no_memory(tmp_path: Path):
    start = _released(tmp_path / "released", has_rgb_head=False)
    whole = start.model(0)
    for model in (start.model(0, {"vae", "latent_head"}), Start(config=CONFIG).model(0, {"vae", "latent_head"})):
        found = {name.partition(".")[0]: parameter.is_meta for name, parameter in model.named_parameters()}
        assert found == {part: part not in ("vae", "latent_head") for part, _ in whole.named_children()}
    partial = start.model(0, {"vae"}).vae.state_dict()
    assert all(torch.equal(tensor, partial[name]) for name, tensor in whole.vae.state_dict().items())


def test_a_released_list_that_is_none_is_refused(tmp_path: Path):
    (tmp_path / "released.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"released.json: not a list of released parts"):
        read_released(tmp_path)
    assert read_released(tmp_path / "none") is None


def test_files_of_the_start_are_in_the_model_and_in_its_fingerprint(data: Path, tmp_path: Path):
    other = random_model(CONFIG, seed=3)
    path = tmp_path / "base.safetensors"
    save_file({**other.world_model.state_dict(), "extra": torch.zeros(1)}, path)
    start = Start(config=CONFIG, files=StartFiles(base_model=path))
    with pytest.warns(UserWarning, match=r"base\.safetensors: is in the file only: extra"):
        model = start.model(0)
    assert torch.equal(model.world_model.head.weight, other.world_model.head.weight)
    assert all(parameter.requires_grad for parameter in model.parameters())
    before = start.fingerprint()
    assert before is not None
    save_file(other.world_model.state_dict(), path)
    assert start.fingerprint() != before
    assert Start(config=CONFIG).fingerprint() is None


def test_tags_of_all_lengths_are_known_to_a_small_preset():
    horizon = CONFIG.horizon
    counts = (5, horizon.num_frames, 10 * horizon.fps + 1)
    inner = Tokenizer.from_str(Start(config=CONFIG).tokenizer_json(["climb"], counts))
    unknown = inner.token_to_id("<unk>")
    for frames in counts:
        assert unknown not in inner.encode(tagged_prompt("climb", horizon, frames)).ids


def test_words_of_the_flights_are_known_to_a_small_preset():
    inner = Tokenizer.from_str(Start(config=CONFIG).tokenizer_json(["inspect the pylon"]))
    assert inner.token_to_id("<unk>") not in inner.encode("inspect the pylon").ids
