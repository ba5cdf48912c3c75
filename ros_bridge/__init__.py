"""WorldVLN on a robot's topics: frames in, setpoints out, and a fail-safe that does not depend on inference.

Reaches the server through the client SDK of the core; needs neither PyTorch nor an inference engine.
"""
