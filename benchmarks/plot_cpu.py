"""Draws the newest CPU result as benchmarks/results/cpu.png: speed over transformers, and nearness to the limits."""

import json

import matplotlib
from matplotlib import pyplot
from update_tables import RESULTS, newest

from moe_ext.storage.files import replace_file

matplotlib.use("Agg")

FEW = 16  # tokens up to which reading the weights is what bounds a layer, and from which multiplying is


def main() -> None:
    result = json.loads(newest("cpu").read_text(encoding="utf-8"))
    shapes = list(dict.fromkeys(row["H, I, E, K"] for row in result["rows"]))
    dtypes = list(dict.fromkeys(row["dtype"] for row in result["rows"]))
    figure, panels = pyplot.subplots(2, len(dtypes), figsize=(9, 6), sharex=True, sharey="row", squeeze=False)
    for column, dtype in enumerate(dtypes):
        gain, limit = panels[0][column], panels[1][column]
        for shape in shapes:
            rows = [row for row in result["rows"] if (row["H, I, E, K"], row["dtype"]) == (shape, dtype)]
            tokens = [str(row["T"]) for row in rows]
            gain.plot(tokens, [row["fastest peer / ours"] for row in rows], marker="o", label=shape)
            line = gain.lines[-1]
            few = [row for row in rows if row["T"] <= FEW]
            many = [row for row in rows if row["T"] >= FEW]
            for part, share, style in ((few, "weights read / bandwidth", "-"), (many, "FLOP/s / linear", "--")):
                shown = [str(row["T"]) for row in part]
                limit.plot(shown, [row[share] for row in part], style, marker="o", color=line.get_color())
        gain.set_title(dtype)
        limit.set_xlabel("tokens")
        for panel in (gain, limit):
            panel.axhline(1.0, color="0.6", linewidth=1)
            panel.grid(axis="y", color="0.9")
            panel.set_axisbelow(True)
    for panel in panels.flat:
        panel.set_ylim(bottom=0)  # after everything is drawn: the panels of a row share their scale
    panels[0][0].set_ylabel("fastest of transformers / moe_ext")
    panels[1][0].set_ylabel("of read bandwidth (—), of linear (- -)")
    panels[0][0].legend(title="H, I, E, K", fontsize="small")
    figure.suptitle(f"One layer's experts, {result['machine']}, {result['date']}")
    figure.tight_layout()
    with replace_file(RESULTS / "cpu.png") as temporary:
        figure.savefig(temporary, format="png", dpi=110)


if __name__ == "__main__":
    main()
