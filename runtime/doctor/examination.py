"""The whole examination, in the order in which one thing hangs on another."""

from __future__ import annotations

from pathlib import Path

from worldvln_edge.runtime.doctor.bundle_checks import check_bundle, check_precisions
from worldvln_edge.runtime.doctor.finding import Report, report_of
from worldvln_edge.runtime.doctor.gpu import find_gpu
from worldvln_edge.runtime.doctor.host_checks import check_host
from worldvln_edge.runtime.doctor.jetson_power import check_power
from worldvln_edge.runtime.doctor.machine import Machine
from worldvln_edge.runtime.doctor.network_checks import check_clock, check_port
from worldvln_edge.runtime.doctor.packages import examine_packages


def examine(
    bundle: Path | None = None,
    *,
    addresses: tuple[tuple[str, int], ...] = (("127.0.0.1", 8001),),
    machine: Machine | None = None,
) -> Report:
    """Look at everything; takes some seconds, and for a large bundle as long as reading it.

    Args:
        bundle: to be flown here; None: the computer alone.
        addresses: host and port of every door.
        machine: this one unless given.
    """
    machine = machine or Machine()
    gpu, of_gpu = find_gpu(machine)
    software, of_packages = examine_packages(machine, gpu)
    findings = [*check_host(machine), *of_gpu, *check_power(machine), *of_packages, check_precisions(gpu, software)]
    findings += [check_clock(machine), *(check_port(*address) for address in addresses)]
    if bundle is not None:
        findings += check_bundle(bundle, machine, gpu, software)
    return report_of(findings)
