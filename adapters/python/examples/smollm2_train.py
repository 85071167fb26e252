"""SmolLM2-135M-Instruct learns a text, with the attention of all its layers in libdlattn.

The model is PyTorch, in float32. All its weights are trained by AdamW, on pieces of the text in
turn. Attention and its gradients are computed by the plugin; then everything is computed a second
time from the same weights with PyTorch's own attention, and the program fails unless both see the
same losses.

    python smollm2_train.py WEIGHTS.gguf [--text FILE] [--steps N] [--length N] [--batch N]
                                         [--rate R]
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import dlattn.torch
import numpy as np
import rich.progress
import rich.table
import torch
from smollm2 import Model, console, rotation
from torch import Tensor
from torch.nn import functional

Attention = Callable[..., Tensor]

TEXT = Path(__file__).resolve().parents[3] / "docs/design.md"

# Both attentions sum in float32, over 30 layers and as many steps, losses being about 3.
LOSS_TOLERANCE = 1e-4


# ---- Attention


class Timed:
    """An attention, with the time that it and its gradients take."""

    def __init__(self, attention: Attention) -> None:
        self.attention = attention
        self.seconds = 0.0

    def __call__(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        self.start()
        output = self.attention(query, key, value, is_causal=True, enable_gqa=True)
        self.stop()
        output.grad_fn.register_prehook(self.start)
        output.grad_fn.register_hook(self.stop)
        return output

    def start(self, *_: object) -> None:
        self.began = time.perf_counter()

    def stop(self, *_: object) -> None:
        self.seconds += time.perf_counter() - self.began


# ---- The model


class Decoder:
    """The model of smollm2.py in PyTorch."""

    def __init__(self, model: Model, attention: Attention) -> None:
        self.model, self.attention = model, attention
        self.weights = {name: torch.tensor(w).requires_grad_() for name, w in model.weights.items()}

    def loss(self, tokens: Tensor) -> Tensor:
        """Mean cross-entropy of each token of [B, L + 1] but the first."""
        x = functional.embedding(tokens[:, :-1], self.weights["token_embd.weight"])
        turn = torch.from_numpy(rotation(self.model, 0, x.shape[1]))
        for layer in range(self.model.layers):
            name = f"blk.{layer}."
            x = x + self.attend(name, self.norm(x, name + "attn_norm"), turn)
            h = self.norm(x, name + "ffn_norm")
            gate = functional.silu(self.linear(h, name + "ffn_gate"))
            x = x + self.linear(gate * self.linear(h, name + "ffn_up"), name + "ffn_down")
        logits = self.linear(self.norm(x, "output_norm"), "token_embd")
        return functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())

    def attend(self, name: str, x: Tensor, turn: Tensor) -> Tensor:
        query = rotate(self.project(x, name + "attn_q"), turn)
        key = rotate(self.project(x, name + "attn_k"), turn)
        mixed = self.attention(query, key, self.project(x, name + "attn_v"))
        return self.linear(mixed.transpose(1, 2).flatten(2), name + "attn_output")

    def project(self, x: Tensor, name: str) -> Tensor:
        """[B, L, hidden] -> [B, heads, L, D], a view with strides."""
        return self.linear(x, name).unflatten(2, (-1, self.model.head_dim)).transpose(1, 2)

    def norm(self, x: Tensor, name: str) -> Tensor:
        weight = self.weights[name + ".weight"]
        return functional.rms_norm(x, weight.shape, weight, self.model.epsilon)

    def linear(self, x: Tensor, name: str) -> Tensor:
        return functional.linear(x, self.weights[name + ".weight"])


def rotate(x: Tensor, turn: Tensor) -> Tensor:
    """Rotary embedding of [..., L, D]; GGUF stores the two elements of a pair side by side."""
    pairs = torch.view_as_complex(x.unflatten(-1, (-1, 2)))
    return torch.view_as_real(pairs * turn).flatten(-2)


# ---- Training


class Run:
    """Some steps of training, and what was measured."""

    def __init__(self, model: Model, attention: Attention, rate: float) -> None:
        self.attention = Timed(attention)
        self.decoder = Decoder(model, self.attention)
        self.optimizer = torch.optim.AdamW(self.decoder.weights.values(), rate)
        self.losses: list[float] = []
        self.tokens, self.seconds = 0, 0.0

    def steps(self, batches: list[Tensor]) -> Iterator[float]:
        for tokens in batches:
            began = time.perf_counter()
            loss = self.decoder.loss(tokens)
            loss.backward()
            self.optimizer.step()
            self.optimizer.zero_grad()
            self.seconds += time.perf_counter() - began
            self.tokens += tokens[:, 1:].numel()
            self.losses.append(loss.item())
            yield self.losses[-1]

    def row(self, name: str) -> list[str]:
        attention = self.attention.seconds
        return [
            name,
            f"{self.losses[0]:.5f}",
            f"{self.losses[-1]:.5f}",
            f"{self.tokens / self.seconds:.0f}",
            f"{attention / len(self.losses):.3f} s, {attention / self.seconds:.1%}",
        ]


def train(name: str, attention: Attention, model: Model, batches: list[Tensor], rate: float) -> Run:
    """A run, its loss and progress on the way."""
    run = Run(model, attention, rate)
    with rich.progress.Progress(
        *rich.progress.Progress.get_default_columns(),
        rich.progress.TextColumn("{task.fields[loss]}"),
        console=console,
        transient=True,
    ) as progress:
        task = progress.add_task(f"training with {name}", total=len(batches), loss="")
        for loss in run.steps(batches):
            progress.update(task, advance=1, loss=f"loss {loss:.4f}")
    return run


def cut(tokens: list[int], steps: int, batch: int, length: int) -> list[Tensor]:
    """A batch [B, L + 1] for each step: pieces of the text one after the other, and again from its
    beginning."""
    places = np.arange(steps * batch * length).reshape(steps, batch, length)
    places = np.concatenate([places, places[:, :, -1:] + 1], axis=2) % len(tokens)
    return list(torch.from_numpy(np.array(tokens)[places]))


def compare(run: Run, check: Run) -> bool:
    """Prints how far the losses of the two runs are apart; true if they are the same."""
    difference = max(abs(a - b) for a, b in zip(run.losses, check.losses))
    verdict = "equal" if difference <= LOSS_TOLERANCE else "DIFFER from"
    console.print(
        f"{len(run.losses)} losses {verdict} those with PyTorch's attention: "
        f"apart by at most {difference:.1e} (allowed {LOSS_TOLERANCE:.0e})",
        soft_wrap=True,
    )
    return difference <= LOSS_TOLERANCE


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("weights", type=Path)
    parser.add_argument("--text", type=Path, default=TEXT)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--length", type=int, default=256, help="tokens of a piece")
    parser.add_argument("--batch", type=int, default=1, help="pieces of a step")
    parser.add_argument("--rate", type=float, default=1e-5, help="of learning")
    options = parser.parse_args()
    if min(options.steps, options.length, options.batch) < 1:
        parser.error("--steps, --length, --batch: must be at least 1")

    library = dlattn.library()
    console.print(
        f"[bold]SmolLM2-135M-Instruct[/] learns {options.text.name} on dlattn {library.version}, "
        f"{library.path}",
        soft_wrap=True,
    )
    model = Model(options.weights)
    tokens = model.tokenizer.encode(options.text.read_text()).ids
    batches = cut(tokens, options.steps, options.batch, options.length)
    ours = dlattn.torch.scaled_dot_product_attention
    run = train("dlattn", ours, model, batches, options.rate)
    own = functional.scaled_dot_product_attention
    check = train("PyTorch's attention", own, model, batches, options.rate)

    table = rich.table.Table(
        "attention", "first loss", "last loss", "tokens/s", "in attention, each step"
    )
    table.add_row(*run.row("dlattn"))
    table.add_row(*check.row("PyTorch"))
    console.print(table)
    return 0 if compare(run, check) else 1


if __name__ == "__main__":
    raise SystemExit(main())
