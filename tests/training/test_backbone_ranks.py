"""The backbone under the trainer: two processes with sharded blocks train what one process trains."""

import json
from pathlib import Path

import backbone_run
import pytest
import torch
from safetensors.torch import load_file
from torchrun_processes import torchrun

ROUGH = {"flip_strength": 0.3, "condition_drop": 0.3}
SETTINGS = {
    "side by side": {**ROUGH, "step_rows": 5, "micro_rows": 2},
    "packed": {**ROUGH, "packed_tokens": 60, "step_sequences": 3, "checkpoint_activations": True},
    "adapters": {**ROUGH, "step_rows": 4, "micro_rows": 2, "lora": {"rank": 2}},
}


@pytest.fixture(scope="module")
def two(tmp_path_factory) -> Path:
    """Runs of two processes, one folder for each of `SETTINGS`; starting the processes takes longer than they run."""
    folder = tmp_path_factory.mktemp("two")
    done = torchrun(backbone_run.__file__, folder, json.dumps(SETTINGS))
    assert done.returncode == 0, done.stderr[-3000:]
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("name", SETTINGS)
def test_two_processes_train_what_one_trains(name: str, two: Path, tmp_path: Path):
    alone = backbone_run.train(tmp_path, SETTINGS[name])
    weights = load_file(two / name / "weights.safetensors")
    assert weights.keys() == alone.weights.keys()
    for key, tensor in weights.items():
        torch.testing.assert_close(tensor, alone.weights[key], atol=1e-5, rtol=1e-4, msg=lambda m, n=key: f"{n}: {m}")
    metrics = json.loads((two / name / "metrics.json").read_text(encoding="utf-8"))
    assert metrics == pytest.approx(dict(alone.metrics), rel=1e-3, abs=1e-5)
    curves = [
        [json.loads(line) for line in (run / "loss_curve.jsonl").read_text(encoding="utf-8").splitlines()]
        for run in (tmp_path, two / name)
    ]
    losses = [[row["loss"] for row in rows if "loss" in row] for rows in curves]
    assert len(losses[0]) >= 4
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)
