"""PyTorch modules of WorldVLN, as specified, and the checkpoint loaders."""
