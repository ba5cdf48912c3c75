"""Engines: how a graph of a bundle runs, on a CPU, a CUDA device or TensorRT, and the memory it binds."""
