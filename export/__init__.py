"""From a checkpoint to a bundle of ONNX graphs, and the proof that both agree."""
