"""Who finds whom: accuracy of every query model in every older model's gallery."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from gradmatch.core.picture import png, subplots


def picture(matrices: Mapping[tuple[str, str], Tensor], titles: Mapping[tuple[str, str], str]) -> bytes:
    """A heat map of C for each arm (columns) and setting (rows)."""
    columns, rows = (list(dict.fromkeys(key[k] for key in matrices)) for k in (0, 1))
    figure, axes = subplots(
        len(rows),
        len(columns),
        figsize=(2.7 * len(columns), 2.75 * len(rows)),
        squeeze=False,
    )
    shown = None
    for (arm, setting), matrix in matrices.items():
        i, j = rows.index(setting), columns.index(arm)
        axis = axes[i, j]
        shown = axis.imshow(matrix, vmin=0, vmax=1, cmap="viridis")
        for a in range(len(matrix)):
            for b in range(a + 1):
                value = float(matrix[a, b])
                better = a != b and value > float(matrix[b, b])
                axis.text(b, a, f"{100 * value:.0f}", ha="center", va="center", fontsize=9,
                          color="black" if value > 0.6 else "white", weight="bold" if better else "normal")  # fmt: skip
        axis.set_xticks(range(len(matrix)), [str(k + 1) for k in range(len(matrix))])
        axis.set_yticks(range(len(matrix)), [str(k + 1) for k in range(len(matrix))])
        axis.tick_params(length=0, labelsize=8)
        axis.spines[:].set_visible(False)
        axis.set_title(f"{arm}\n{titles[arm, setting]}" if i == 0 else titles[arm, setting], fontsize=10)
        if j == 0:
            axis.set_ylabel(f"{setting}\nquery model", fontsize=9)
        if i == len(rows) - 1:
            axis.set_xlabel("gallery model", fontsize=9)
    assert shown is not None
    figure.colorbar(
        shown, ax=axes, shrink=0.5, label="queries found (bold: better than the gallery's own model)"
    )
    return png(figure)
