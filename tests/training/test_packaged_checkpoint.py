"""The checkpoint that comes with the package: it loads, and its sizes are the preset's."""

from worldvln_edge.models.worldvln import load_checkpoint
from worldvln_edge.presets import preset
from worldvln_edge.training.demo import packaged_checkpoint


def test_packaged_checkpoint_loads_strictly_and_is_small():
    with packaged_checkpoint() as folder:
        checkpoint = load_checkpoint(folder)
        assert checkpoint.config == preset("nano")
        assert checkpoint.tensor_file.stat().st_size < 64e6
