"""Sessions of any policy: frames in, actions out, in order, in time, and back after a crash."""
