"""How rows are computed: the steps of softmax, norms and reductions along the last axis, for the op table's `triton` column.

Statistics in two passes over what is held in registers: the mean first, then the centred squares, as torch does.
"""

from __future__ import annotations

from paretorch.ir.ops.table import RowText, Step

PEAK = (Step("peak", "{self}", "max"), Step("power", "tl.exp({self} - {peak})"), Step("total", "{power}", "sum"))
AFFINE = (Step("scaled", "{normed} * {weight}", only_with="weight"), Step("shifted", "{scaled} + {bias}", only_with="bias"))
CENTRED = (Step("mean", "{self}", "mean"), Step("centred", "{self} - {mean}"))


def _reduction(reduction: str) -> RowText:
    return RowText("self", "dim", (Step("result", "{self}", reduction),), per_row=True)


ROW_TEXTS: dict[str, RowText] = {
    "softmax": RowText("self", "dim", (*PEAK, Step("share", "{power} / {total}"))),
    "log_softmax": RowText("self", "dim", (*PEAK, Step("share", "{self} - {peak} - tl.log({total})"))),
    # a row in which nothing is seen gives zeros
    "safe_softmax": RowText("self", "dim", (*PEAK, Step("share", 'tl.where({peak} == float("-inf"), 0.0, {power} / {total})'))),
    "layer_norm": RowText(
        "input",
        "normalized_shape",
        (
            Step("mean", "{input}", "mean"),
            Step("centred", "{input} - {mean}"),
            Step("variance", "{centred} * {centred}", "mean"),
            Step("normed", "{centred} * tl.rsqrt({variance} + {eps})"),
            *AFFINE,
        ),
    ),
    "rms_norm": RowText(
        "input",
        "normalized_shape",
        (
            Step("square", "{input} * {input}", "mean"),
            Step("normed", "{input} * tl.rsqrt({square} + {eps})"),
            Step("scaled", "{normed} * {weight}", only_with="weight"),
        ),
    ),
    "mean": _reduction("mean"),
    "sum": _reduction("sum"),
    "amax": _reduction("max"),
    "amin": _reduction("min"),
    "logsumexp": RowText(
        "self", "dim", (*PEAK, Step("result", "tl.where(tl.abs({peak}) == float('inf'), {peak}, {peak} + tl.log({total}))")), per_row=True
    ),
    "norm": RowText(
        "self", "dim", (Step("square", "{self} * {self}", "sum"), Step("result", "tl.sqrt({square})")), fixed=(("ord", 2),), per_row=True
    ),
    "var": RowText("self", "dim", (*CENTRED, Step("result", "{centred} * {centred}", "mean")), fixed=(("correction", 0),), per_row=True),
}
