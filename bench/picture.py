"""Draws docs/speed.svg, the picture of the README, from bench/results: `./dev picture` [--check].

Each bar is one line of a CSV, told by its columns; bars of one case share a scale. --check changes
nothing and fails if the picture is not that of the results.
"""

import csv
import sys
from pathlib import Path
from xml.sax.saxutils import escape

ROOT = Path(__file__).resolve().parents[1]
PICTURE = ROOT / "docs/speed.svg"
FORWARD = "2026-11-28-NVIDIA-H100-80GB-HBM3-forward.csv"
DECODE = "2026-11-28-NVIDIA-H100-80GB-HBM3-decode.csv"
BACKWARD = "2026-11-28-NVIDIA-H100-80GB-HBM3-backward.csv"
CPU = "2026-11-23-x86_64-16-cpu-torch.csv"
OURS = "dlattn"
NAMES = {
    "cudnn": "cuDNN 9.19",
    "fa2": "FlashAttention 2",
    "fa4": "FlashAttention 4",
    "mem_efficient": "PyTorch, mem. efficient",
    "torch": "PyTorch 2.11",
}
H100 = {"dtype": "bf16"}
XEON = {"threads": "16", "dtype": "bf16"}
# Title of a group, then what a case is called, its CSV, what its lines have in common, and the
# column that is drawn, with its unit.
GROUPS = [
    (
        "One H100, bf16, forward",
        "TFLOP/s",
        "tflops",
        [
            ("head_dim 128, 16k", FORWARD, {"op": "fwd", "D": "128", "Lq": "16384", "causal": "0"}),
            (
                "head_dim 64, 4k, causal",
                FORWARD,
                {"op": "fwd", "D": "64", "Lq": "4096", "causal": "1"},
            ),
            ("with a bias, head_dim 128, 2k", FORWARD, {"op": "fwd+bias", "D": "128"}),
        ],
        H100,
    ),
    (
        "One H100, bf16, gradients (the same bits on every run)",
        "TFLOP/s",
        "tflops",
        [
            ("head_dim 128, 4k", BACKWARD, {"op": "bwd", "D": "128", "Lq": "4096", "causal": "0"}),
            (
                "head_dim 128, 16k, causal",
                BACKWARD,
                {"op": "bwd", "D": "128", "Lq": "16384", "causal": "1"},
            ),
        ],
        H100,
    ),
    (
        "One H100, bf16, one new token, 32 heads over 8",
        "GB/s of keys and values",
        "gbs",
        [
            (
                "8 x 4k keys",
                DECODE,
                {"op": "decode", "B": "8", "Lk": "4096", "Hkv": "8", "D": "128"},
            )
        ],
        H100,
    ),
    (
        "AMX Xeon, 16 threads, bf16",
        "TFLOP/s",
        "tflops",
        [
            ("head_dim 64, 2k", CPU, {"op": "fwd", "D": "64", "Lq": "2048", "causal": "0"}),
            (
                "head_dim 128, 2k, causal",
                CPU,
                {"op": "fwd", "D": "128", "Lq": "2048", "causal": "1"},
            ),
        ],
        XEON,
    ),
]
WIDTH, LABEL, BAR, GAP = 860, 230, 15, 9
SCALE = WIDTH - LABEL - 260  # the longest bar; behind it stand a number and a name
INK, PALE, ACCENT, QUIET = "#24292f", "#57606a", "#0a7d5a", "#c4ccd4"


def bars(file, where, column):
    """[(implementation, value)], the fastest line of each, ours first."""
    best = {}
    with (ROOT / "bench/results" / file).open(newline="") as lines:
        for line in csv.DictReader(lines):
            if all(line[name] == value for name, value in where.items()) and line[column]:
                impl, value = line["impl"], float(line[column])
                if impl == OURS or impl in NAMES:
                    best[impl] = max(value, best.get(impl, 0))
    if OURS not in best or len(best) < 2:
        raise SystemExit(f"bench/picture.py: {file} has no line for {where}")
    return sorted(best.items(), key=lambda item: (item[0] != OURS, -item[1]))


def text(x, y, words, size=12, color=INK, weight="normal", anchor="start"):
    return (
        f'<text x="{x}" y="{y}" font-size="{size}" fill="{color}" font-weight="{weight}" '
        f'text-anchor="{anchor}">{escape(words)}</text>'
    )


def drawn():
    y, parts = 8, []
    for title, unit, column, cases, common in GROUPS:
        y += 18
        parts.append(text(0, y, title, 14, weight="bold"))
        parts.append(text(WIDTH, y, unit, 12, PALE, anchor="end"))
        y += 10
        for name, file, where in cases:
            found = bars(file, where | common, column)
            longest = max(value for _, value in found)
            parts.append(text(LABEL - 12, y + BAR - 3, name, anchor="end"))
            for impl, value in found:
                width = round(SCALE * value / longest, 1)
                is_ours = impl == OURS
                color, weight = (ACCENT, "bold") if is_ours else (QUIET, "normal")
                parts.append(
                    f'<rect x="{LABEL}" y="{y}" width="{width}" height="{BAR - 2}" fill="{color}"/>'
                )
                number = f"{value:.0f}" if value >= 20 else f"{value:.1f}"
                words = f"{number}  {NAMES.get(impl, impl)}"
                parts.append(text(LABEL + width + 6, y + BAR - 4, words, weight=weight))
                y += BAR
            y += GAP
    font = "-apple-system, Segoe UI, Helvetica, Arial, sans-serif"
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{y}" '
        f'viewBox="-8 0 {WIDTH + 16} {y}" font-family="{font}">'
    )
    ground = f'<rect x="-8" width="{WIDTH + 16}" height="{y}" fill="#ffffff"/>'
    return "\n".join([head, ground, *parts, "</svg>", ""])


def main():
    picture = drawn()
    if sys.argv[1:] != ["--check"]:
        PICTURE.write_text(picture)
    elif PICTURE.read_text() != picture:
        raise SystemExit("docs/speed.svg is not that of bench/results: ./dev picture")


if __name__ == "__main__":
    main()
