"""Every stored weight against its checkpoint tensor: one wrong weight is found even where activations hide it.

Tensors that were only cast must be equal bit by bit. Quantised ones must be roundings of the checkpoint's, within the
format's own bound. AWQ moves channel scales between neighbours, which changes nothing before rounding:

| scales of the inputs of | are taken from                                   | and must explain     |
|-------------------------|--------------------------------------------------|----------------------|
| q, k, v; gate, up       | the stored norm in front, against the checkpoint | the columns          |
| down; o                 | the rows of up; of v                             | the columns as well  |

So a single wrong norm, row, column, code or step leaves no scale that explains all of them.
Memory: one tensor at a time. Source: export/channel_scales.py, export/low_bits.py.
"""

from __future__ import annotations

from collections import defaultdict

import torch
from torch import Tensor

from worldvln_edge.bundle import Bundle
from worldvln_edge.export.channel_scales import ChannelScales
from worldvln_edge.export.parity_bounds import ParityRow
from worldvln_edge.export.rounding_bounds import CodeFormat, Factors, explain_codes
from worldvln_edge.export.stored_weights import StoredWeight, StoredWeightError, stored_weights
from worldvln_edge.models.checkpoint_source import CheckpointSource

_LISTED = 5
_LARGEST_SCALE = 64.0  # of a channel; the search of AWQ is limited to 1/64 to 64
_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_STEP_EPSILON = {torch.float32: 2.0**-23, torch.float16: 2.0**-10, torch.bfloat16: 2.0**-7}
_SCALED_ROWS = {"up_proj": "down_proj", "v_proj": "o_proj"}
_SCALED_COLUMNS = ("down_proj", "o_proj")


def compare_weights(bundle: Bundle, source: CheckpointSource) -> ParityRow:
    """The row `weights`: number of stored tensors and values, and how many tensors are wrong."""
    comparison = _Comparison(source)
    try:
        stored = list(stored_weights(bundle))
        comparison.run(stored)
    except StoredWeightError as error:
        return ParityRow("weights", failures=[str(error)])
    wrong = comparison.wrong
    failures = [f"{key}: {reason}" for key, reason in list(wrong.items())[:_LISTED]]
    if len(wrong) > _LISTED:
        failures.append(f"{len(wrong) - _LISTED} more tensors are wrong")
    values = {
        "tensors": float(len(stored)),
        "values": float(sum(torch.Size(weight.shape).numel() for weight in stored)),
        "wrong_tensors": float(len(wrong)),
        "unread_tensors": float(len(set(source.infos) - {weight.key for weight in stored})),
    }
    return ParityRow("weights", values, failures)


class _Comparison:
    def __init__(self, source: CheckpointSource):
        self.source = source
        self.wrong: dict[str, str] = {}
        self.columns: dict[str, Tensor] = {}  # linear -> scales of its inputs, taken from the norm in front
        self.rows: dict[str, Factors] = {}  # up, v -> what its rows were multiplied by
        self.unknown_columns: dict[str, Factors] = {}  # down, o -> what its columns were multiplied by

    def run(self, stored: list[StoredWeight]) -> None:
        pairs: dict[tuple[str, str], dict[str, StoredWeight]] = defaultdict(dict)
        biases: list[StoredWeight] = []
        for weight in stored:
            if weight.key not in self.source.infos:
                self._fail(weight.key, "the checkpoint has no such tensor")
            elif weight.role == "cast":
                self._cast(weight)
            elif weight.role == "folded" and ChannelScales.linear_behind(weight.key) is None:
                biases.append(weight)
            elif weight.role == "folded":
                self._norm(weight)
            else:
                pairs[weight.key, weight.label][weight.role] = weight
        for (key, label), pair in pairs.items():  # behind the norms, whose scales they need
            if set(pair) != {"codes", "scales"}:
                raise StoredWeightError(f"{key} has {' and '.join(pair)} only, codes and scales are needed")
            self._codes(key, label, pair["codes"], pair["scales"])
        self._meet()
        for weight in biases:
            self._bias(weight)

    def _fail(self, key: str, reason: str) -> None:
        self.wrong.setdefault(key, reason)

    def _cast(self, weight: StoredWeight) -> None:
        found, expected = weight.read(), self.source.tensor(weight.key)
        expected = (expected.t() if weight.how.endswith("|transposed") else expected).to(found.dtype).contiguous()
        if found.shape != expected.shape:
            self._fail(weight.key, f"shape {list(found.shape)}, the checkpoint gives {list(expected.shape)}")
            return
        bits = _INTEGERS[found.element_size()]
        different = int((found.view(bits) != expected.view(bits)).sum())
        if different:
            self._fail(weight.key, f"{different} of {found.numel()} values are not the checkpoint's in {weight.how}")

    def _norm(self, weight: StoredWeight) -> None:
        found, expected = weight.read().float(), self.source.tensor(weight.key).float()
        scales = torch.where((found == 0) & (expected == 0), torch.ones_like(found), expected / found)
        if not ((scales >= 0.99 / _LARGEST_SCALE) & (scales <= 1.01 * _LARGEST_SCALE)).all():
            self._fail(weight.key, f"divided by {float(scales.min()):.3g} to {float(scales.max()):.3g}, not by scales")
        stem, _, norm = weight.key.removesuffix(".weight").rpartition(".")
        parts = ("attn.q_proj", "attn.k_proj", "attn.v_proj")
        for part in parts if norm == "input_layernorm" else ("mlp.gate_proj", "mlp.up_proj"):
            self.columns[f"{stem}.{part}.weight"] = scales

    def _codes(self, key: str, label: str, codes: StoredWeight, scales: StoredWeight) -> None:
        weight, codes_KN, steps = self.source.tensor(key), codes.read(), scales.read()
        outputs, inputs = weight.shape
        steps_GN = steps.reshape(-1, outputs) if steps.numel() % outputs == 0 else steps[None]
        if codes_KN.shape != (inputs, outputs) or steps_GN.shape[1] != outputs or inputs % len(steps_GN):
            self._fail(
                key, f"codes {list(codes_KN.shape)} and scales {list(steps.shape)} do not fit {[outputs, inputs]}"
            )
            return
        if not (steps_GN.float() > 0).all():
            self._fail(key, "a scale is not above zero")
            return
        is_awq = ".awq" in label
        part = key.removesuffix(".weight").rpartition(".")[2]
        by_column = is_awq and part in _SCALED_COLUMNS
        code_format = CodeFormat(label.partition(".")[0], is_awq, _STEP_EPSILON[steps.dtype])
        columns = self.columns.get(key, torch.ones(inputs))
        factors, wide = explain_codes(weight, codes_KN, steps_GN, columns, code_format, by_column=by_column)
        if wide:
            self._fail(key, f"{wide} blocks have wider ranges than their weights need")
        if by_column:
            self.unknown_columns[key] = factors
        elif is_awq and part in _SCALED_ROWS:
            self.rows[key] = factors
        else:
            factors = factors.meet(Factors.one(len(factors.low)))
        if factors.empty:
            kind = "columns" if by_column else "rows"
            self._fail(key, f"codes of {factors.empty} {kind} are not roundings of the checkpoint's weights")

    def _meet(self) -> None:
        """Rows of up and columns of down, rows of v and columns of o: one scale must explain both."""
        for key, rows in self.rows.items():
            stem, _, part = key.removesuffix(".weight").rpartition(".")
            partner = f"{stem}.{_SCALED_ROWS[part]}.weight"
            columns = self.unknown_columns.pop(partner, None)
            if columns is None:
                raise StoredWeightError(f"{key} is scaled and {partner} is not stored; export the bundle again")
            if part == "v_proj":  # query heads that read one value head share its scales
                head_dim = self.source.infos[f"{stem}.k_norm.weight"].shape[0]
                low, high = (t.view(len(rows.low) // head_dim, -1, head_dim) for t in (columns.low, columns.high))
                columns = Factors(low.amax(1).flatten(), high.amin(1).flatten())
            both = rows.meet(columns.inverse())
            if both.empty:
                self._fail(partner, f"{both.empty} channel scales of {key} do not explain its columns")
            self.rows[key] = both
        for partner in self.unknown_columns:
            raise StoredWeightError(f"{partner} is scaled and what feeds it is not; export the bundle again")

    def _bias(self, weight: StoredWeight) -> None:
        found, expected = weight.read(), self.source.tensor(weight.key).float()
        rows = self.rows.get(weight.key.removesuffix("bias") + "weight")
        if rows is None:
            raise StoredWeightError(f"{weight.key} is scaled and its weight is not; export the bundle again")
        rounding = expected.abs() * rows.high * _STEP_EPSILON[found.dtype] + 2.0**-24
        ends = torch.stack((expected * rows.low, expected * rows.high))
        low, high = ends.amin(0), ends.amax(0)
        outside = int(((found.float() < low - rounding) | (found.float() > high + rounding)).sum())
        if outside:
            self._fail(weight.key, f"{outside} values do not fit the scales of its weight")
