"""Which tests run in the same process, when `pytest -n 2` runs them in two.

A process takes a whole group at a time: what shares a module's fixtures or traced graphs is made once. A group is a
file, except for the two that trace most. Long groups come first, so that the processes end together; the order costs
time when it is wrong, nothing else.
"""

import re
from pathlib import PurePath

import pytest
from xdist.remote import Producer
from xdist.scheduler import LoadScopeScheduling

LONG_FILES = (
    "test_exported_bundle",
    "test_bench_export",
    "test_shipped_model",
    "test_verify",
    "test_quantise",
    "test_tensorrt_build",
)
"""Started first, in this order. The first one makes the bundle that many others read."""
_TRACING_THE_TINY_MODEL = ("test_exported_bundle", "test_bench_export")
_TRACED_IN = {"fp32": "fp32", "bf16": "bf16", "fp16": "fp16", "int8": "fp16", "int4": "fp16", "fp8": "fp16"}
"""Precision -> dtype that its graphs are traced in."""


def group_of(nodeid: str) -> str:
    """Group of a test, from its full name as pytest prints it."""
    file, _, test = nodeid.partition("::")
    stem = PurePath(file).stem
    if stem in _TRACING_THE_TINY_MODEL:
        return _TRACING_THE_TINY_MODEL[0]
    if stem == "test_shipped_model":
        dtypes = [_TRACED_IN[word] for word in re.split(r"[\[\]-]", test) if word in _TRACED_IN]
        return f"{stem} {(*dtypes, 'fp16')[0]}"
    return file


def long_ones_first(items: list[pytest.Item]) -> None:
    """Sort tests by file: the long ones, then all others as they were."""
    items.sort(key=lambda item: LONG_FILES.index(item.path.stem) if item.path.stem in LONG_FILES else len(LONG_FILES))


class GroupScheduling(LoadScopeScheduling):
    """Hands out groups in the order of their first test."""

    def __init__(self, config: pytest.Config, log: Producer):
        config.option.loadscopereorder = False
        super().__init__(config, log)

    def _split_scope(self, nodeid: str) -> str:
        return group_of(nodeid)
