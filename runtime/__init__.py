"""Inference without PyTorch: engines, KV cache, sessions, policies and servers."""
