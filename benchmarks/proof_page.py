"""Write docs/proof.md and its picture from the stored results.

python benchmarks/proof_page.py
"""

from typing import Any

from common import IMAGES, REPOSITORY, load
from matplotlib.figure import Figure
from results_page import page

COLOURS = ("#0072b2", "#d55e00")  # of first digits 0 and 1


def draw(rows: list[dict[str, Any]]) -> None:
    """Write the picture of the boxes."""
    figure = Figure((9, 3.6), layout="constrained")
    for picture, row in zip(figure.subplots(1, 2), rows, strict=True):
        steps = range(1, len(row["bounds"]) + 1)
        for digit, colour in enumerate(COLOURS):
            for name, what, alpha, line in (
                ("bounds", "its box allows", 0.2, 0),
                ("found", "it holds", 1, 2),
            ):
                low, high = zip(*(step[digit] for step in row[name]), strict=True)
                style = {"color": colour, "alpha": alpha, "linewidth": line, "capstyle": "butt"}
                picture.fill_between(steps, low, high, label=f"first digit {digit}: what {what}", **style)
        title = "trained on palindromes and boxes" if row["boxes"] else "preset fast: palindromes alone"
        picture.set(title=f"{title}, cell {row['cell']}", xlabel="step", ylabel="c")
        picture.grid(alpha=0.3)
    handles, labels = picture.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=2, fontsize="small")
    figure.savefig(IMAGES / "proof.png", dpi=110)


if __name__ == "__main__":
    (REPOSITORY / "docs" / "proof.md").write_text(page("proof"))
    print("docs/proof.md")
    draw(load("lstm/boxes")["rows"])
