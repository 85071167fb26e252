"""A plot of what gpu_bench.py measured: TFLOP/s over the sequence length by head dim and mask.

./dev gpu-plot bench/results/FILE.csv [--dtype bf16] [--out plot.svg]
"""

import argparse
import csv
from collections import defaultdict
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot


def curves(path, dtype):
    """(D, causal) -> name -> [(L, TFLOP/s)]"""
    panels = defaultdict(lambda: defaultdict(list))
    with open(path, newline="") as file:
        for row in csv.DictReader(file):
            if row["op"] == "fwd" and row["dtype"] == dtype:
                name = row["kernel"] or row["impl"]
                panels[int(row["D"]), int(row["causal"])][name].append(
                    (int(row["Lq"]), float(row["tflops"]))
                )
    return panels


def main():
    options = argparse.ArgumentParser()
    options.add_argument("csv", type=Path)
    options.add_argument("--dtype", default="bf16")
    options.add_argument("--out", type=Path)
    options = options.parse_args()
    panels = curves(options.csv, options.dtype)
    dims = sorted({dim for dim, _ in panels})
    figure, axes = pyplot.subplots(
        2, len(dims), figsize=(4 * len(dims), 7), sharex=True, squeeze=False
    )
    for (dim, causal), lines in panels.items():
        panel = axes[causal][dims.index(dim)]
        for name, points in lines.items():
            panel.plot(*zip(*sorted(points)), marker="o", label=name)
        panel.set(
            title=f"D = {dim}, {'causal' if causal else 'full'}",
            xscale="log",
            xlabel="L",
            ylabel="TFLOP/s",
        )
        panel.set_ylim(bottom=0)
        panel.grid(alpha=0.3)
    figure.legend(*axes[0][0].get_legend_handles_labels(), loc="lower center", ncols=8)
    figure.suptitle(f"{options.csv.stem}, {options.dtype}, 16k tokens, H * D = 2048")
    figure.tight_layout(rect=(0, 0.04, 1, 1))
    figure.savefig(options.out or options.csv.with_suffix(".svg"))


if __name__ == "__main__":
    main()
