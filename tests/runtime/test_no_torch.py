"""The runtime flies where PyTorch is not installed."""

import subprocess
import sys
from pathlib import Path

_FLIGHT = """
import sys

class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("torch", "transformers", "onnx", "onnxscript", "safetensors"):
            raise ImportError(f"{name} is not installed on the drone")

sys.meta_path.insert(0, Refuse())
import numpy as np
from pathlib import Path
from worldvln_edge.runtime.worldvln.worldvln_policy import load_policy

policy = load_policy(Path(sys.argv[1]), threads=1)
session = policy.new_session("fly forward 5 m", seed=1)
chunk = session.observe([np.full((40, 40, 3), 100, np.uint8)])
assert chunk.actions.shape == (policy.config.horizon.step, 6)
assert np.isfinite(chunk.actions).all()
print(sorted(name for name in ("torch", "transformers", "onnx", "safetensors") if name in sys.modules))
"""


def test_a_segment_is_flown_without_torch_transformers_or_onnx(tiny_bundle: Path):
    result = subprocess.run(
        [sys.executable, "-c", _FLIGHT, str(tiny_bundle)], capture_output=True, text=True, timeout=120, check=False
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == "[]"
