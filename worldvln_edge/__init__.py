"""worldvln-edge: train WorldVLN in PyTorch, export it to a bundle, fly it onboard without PyTorch."""

__version__ = "0.1.0"
