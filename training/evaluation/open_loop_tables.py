"""Open-loop metrics as tables: what the acceptance list asks for, and where along the chain motion is lost.

Source: spec/training.md 8.4 (limits of `nano` and `mini`).
"""

from __future__ import annotations

import math

import msgspec

from worldvln_edge.runtime.bench.report_table import Part, Table
from worldvln_edge.training.stages.motion_metrics import COLUMNS

Metrics = dict[str, float]

_LN_2 = math.log(2)


class AcceptanceLine(msgspec.Struct, frozen=True, kw_only=True):
    """One line of the acceptance list."""

    metric: str
    value: float
    nano: float
    """Limit for `nano`."""
    mini: float
    is_upper: bool = True
    """The value must not be above its limit; else not below."""

    def holds(self, limit: float) -> bool:
        return self.value <= limit if self.is_upper else self.value >= limit


def acceptance_lines(
    vae: Metrics, backbone: Metrics, adapter: Metrics, action: Metrics, shuffled: Metrics
) -> list[AcceptanceLine]:
    """What of the list can be measured on a checkpoint; metrics that are missing are left out.

    Args:
        vae, backbone, adapter, action, shuffled: metrics as `open_loop.OpenLoopReport` holds them.
    """
    lines = []

    def add(metric: str, value: float | None, nano: float, mini: float, *, is_upper: bool = True) -> None:
        if value is not None:
            lines.append(AcceptanceLine(metric=metric, value=value, nano=nano, mini=mini, is_upper=is_upper))

    add("vae: reconstruction MSE / variance about the mean image", vae.get("unexplained"), 0.6, 0.15)
    majority = "majority_bit_ce"
    add("sft: bit CE / ln 2", _ratio(backbone.get("bit_ce"), _LN_2), 1.0, 1.0)
    add("sft: bit CE / majority", _ratio(backbone.get("bit_ce"), backbone.get(majority)), 1.0, 1.0)
    best = min(_LN_2, backbone.get(f"semantic_{majority}", _LN_2))
    add("sft: semantic bit CE / best of the two", _ratio(backbone.get("semantic_bit_ce"), best), 0.9, 0.75)
    effect, error = backbone.get("text_effect"), backbone.get("text_effect_error")
    add("sft: true minus shuffled instruction CE, in standard errors", _ratio(effect, error), -2.0, -2.0)
    add("adapter: cosine to the RGB head's patches, if distilled", adapter.get("cosine"), 0.6, 0.8, is_upper=False)
    for column in COLUMNS:
        add(f"action: NMSE {column}", action.get(f"nmse_{column}"), 0.6, 0.2)
    for what, name in (("endpoint_m", "endpoint distance"), ("yaw_deg", "yaw error")):
        ratio = _ratio(action.get(f"segment_{what}"), action.get(f"segment_mean_{what}"))
        add(f"action: {name} of a segment / of integrating the mean", ratio, 0.6, 0.3)
    for column in COLUMNS:
        control = shuffled.get(f"nmse_{column}")
        add(f"control: NMSE {column}, frames shuffled", control, 0.95, 0.9, is_upper=False)
    return lines


def open_loop_parts(
    vae: Metrics,
    backbone: Metrics,
    adapter: Metrics,
    action: Metrics,
    teacher_forced: Metrics,
    shuffled: Metrics,
    rgb_head: Metrics,
) -> list[Part]:
    """Sentences and tables. Metrics by the names of the stages' validation."""
    lines = acceptance_lines(vae, backbone, adapter, action, shuffled)
    asked = Table(
        ("acceptance", "value", "nano asks", "holds", "mini asks", "holds"),
        tuple((line.metric, f"{line.value:.3f}", *_asked(line, line.nano), *_asked(line, line.mini)) for line in lines),
    )
    return [
        asked,
        "Where motion is lost: the action heads over all segments, with true frames before each (NMSE: 1 is what the "
        "training mean reaches, so 1 is no skill). Latents are limited by the VAE, teacher-forced scales by what one "
        "scale can say, predicted latents by errors that scales hand on; the rest up to the closed loop is drift.",
        _chain(action, teacher_forced, rgb_head),
        "Bits, held out: cross entropy of every scale beside the best fixed answer (ln 2 = 0.693 is a coin).",
        _bits(backbone),
    ]


def _chain(action: Metrics, teacher_forced: Metrics, rgb_head: Metrics) -> Table:
    rows = [
        ("rgb head on real frames", rgb_head, "segment_"),
        ("true latents", action, "segment_"),
        ("teacher-forced scales", teacher_forced, "predicted_"),
        ("predicted latents", action, "predicted_"),
    ]
    columns = [column for column in COLUMNS if f"segment_nmse_{column}" in action]
    of_mean = (action.get("segment_mean_endpoint_m"), action.get("segment_mean_yaw_deg"))
    cells = [("training mean", *("1.000" for _ in columns), *(_number(end) for end in of_mean), "")]
    for name, metrics, prefix in rows:
        if f"{prefix}endpoint_m" in metrics:
            nmse = (_number(metrics.get(f"{prefix}nmse_{column}")) for column in columns)
            ends = (metrics.get(f"{prefix}endpoint_m"), metrics.get(f"{prefix}yaw_deg"))
            qualified = f"{metrics[f'{prefix}qualified']:.0%}"
            cells.append((name, *nmse, *(_number(end) for end in ends), qualified))
    header = ("motion from", *(f"NMSE {column}" for column in columns), "endpoint m", "yaw deg", "within 3 m, 10 deg")
    return Table(header, tuple(cells))


def _bits(backbone: Metrics) -> Table:
    scales = [name.removeprefix("bit_ce_") for name in backbone if name.startswith("bit_ce_clip")]
    rows = []
    for name in ("", "semantic", "detail"):
        prefix = f"{name}_" if name else ""
        if f"{prefix}bit_ce" in backbone:
            rows.append((name or "all", *_bit_cells(backbone, prefix, "")))
    rows += [(scale.replace("_", ", "), *_bit_cells(backbone, "", f"_{scale}")) for scale in scales]
    return Table(("bits", "CE", "majority CE", "right", "majority right"), tuple(rows))


def _bit_cells(backbone: Metrics, prefix: str, suffix: str) -> tuple[str, ...]:
    names = ("bit_ce", "majority_bit_ce", "bit_accuracy", "majority_bit_accuracy")
    return tuple(_number(backbone.get(f"{prefix}{name}{suffix}")) for name in names)


def _asked(line: AcceptanceLine, limit: float) -> tuple[str, str]:
    return f"{'<=' if line.is_upper else '>='} {limit:g}", "yes" if line.holds(limit) else "no"


def _ratio(value: float | None, of: float | None) -> float | None:
    return value / of if value is not None and of else None


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}"
