"""Released files that a run starts from: each goes where it belongs, and what does not fit is told."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from small_models import random_model, tiny_config
from torch import Tensor

from worldvln_edge.models.checkpoint_file import CheckpointError
from worldvln_edge.models.worldvln import WorldVLN
from worldvln_edge.training.stages.start_files import StartFiles

CONFIG = tiny_config()
OTHER = random_model(CONFIG, seed=1)


@pytest.fixture
def model() -> WorldVLN:
    return random_model(CONFIG, seed=0)


def written(path: Path, state: dict[str, Tensor]) -> Path:
    torch.save(state, path)
    return path


def changed_parts(model: WorldVLN) -> set[str]:
    """Parts of the model that hold other weights than at the start."""
    before = random_model(CONFIG, seed=0).state_dict()
    names = [name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])]
    return {".".join(name.split(".")[: 2 if name.startswith("latent_head") else 1]) for name in names}


def test_every_file_goes_into_its_part(tmp_path: Path, model: WorldVLN):
    save_file(OTHER.world_model.state_dict(), tmp_path / "base.safetensors")
    head = OTHER.latent_head
    files = StartFiles(
        base_model=tmp_path / "base.safetensors",
        adapter=written(tmp_path / "adapter.pt", {"adapter_state_dict": head.adapter.state_dict()}),
        timesformer=written(tmp_path / "tsformer.pth", {"model_state_dict": head.tsformer.state_dict()}),
    )
    assert files.load_into(model) == []
    assert changed_parts(model) == {"world_model", "latent_head.adapter", "latent_head.tsformer"}
    for ours, theirs in ((model.world_model, OTHER.world_model), (model.latent_head, OTHER.latent_head)):
        assert all(torch.equal(tensor, theirs.state_dict()[name]) for name, tensor in ours.state_dict().items())
    assert [name for name, _ in files.paths()] == ["base_model", "adapter", "timesformer"]


def test_parts_without_memory_are_left_alone(tmp_path: Path, model: WorldVLN):
    """A rank that is given its share of the world model by another one does not read it."""
    save_file(OTHER.world_model.state_dict(), tmp_path / "base.safetensors")
    files = StartFiles(base_model=tmp_path / "base.safetensors", adapter=tmp_path / "none.pt")
    assert files.load_into(model, {"vae", "text_encoder"}) == []
    assert changed_parts(model) == set()


def test_no_file_changes_nothing(model: WorldVLN):
    assert StartFiles().load_into(model) == []
    assert StartFiles().paths() == []
    assert changed_parts(model) == set()


def test_what_a_base_model_leaves_out_is_told(tmp_path: Path, model: WorldVLN):
    state = {**OTHER.world_model.state_dict(), "extra": torch.zeros(1)}
    state["head.weight"] = torch.zeros(3, 3)
    del state["sos_token"]
    save_file(state, tmp_path / "base.safetensors")
    left = StartFiles(base_model=tmp_path / "base.safetensors").load_into(model)
    assert [line.partition(": ")[2] for line in left] == [
        "has another shape: head.weight (1 tensors)",
        "is not in the file: sos_token (1 tensors)",
        "is in the file only: extra (1 tensors)",
    ]


@pytest.mark.parametrize("part", ["base_model", "adapter", "timesformer"])
def test_a_file_that_is_missing_or_of_another_part_is_named(tmp_path: Path, model: WorldVLN, part: str):
    with pytest.raises(CheckpointError, match=r"none\.pt"):
        StartFiles(**{part: tmp_path / "none.pt"}).load_into(model)
    path = written(tmp_path / "wrong.pt", {"other.weight": torch.zeros(2)})
    with pytest.raises(CheckpointError, match=r"wrong\.pt"):
        StartFiles(**{part: path}).load_into(model)
