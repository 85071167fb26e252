"""A Llama of random weights in transformers on a GPU: tokens per second by whose attention it runs.

    python3 bench/gpu_llama.py [--out FILE.csv] [--steps prefill,decode,train,layer]

The model has the sizes of Llama 3.2 1B (16 layers of 2048, 32 heads over 8 of keys of head_dim 64)
and 32,000 words, in bf16. prefill: a prompt of 8192; decode: one token behind 4096 in a dynamic
cache, which the host's time decides; train: forward and backward of 4096 tokens; layer: the same of
one layer of Llama 3 8B (4096, 32 heads over 8, head_dim 128) without embedding and head. sdpa is
what PyTorch chooses, sdpa_flash and sdpa_cudnn the kernel that is named; the implementations take
turns. The figures are medians; the spread is the distance between the quartiles in percent. Before
a step is timed, its results are compared. Set DLATTN_COMMIT to what the CSV shall name.
"""

import argparse
import contextlib
import csv
import datetime
import os
import statistics

import dlattn.transformers  # noqa: F401  registers "dlattn"
import torch
import transformers
from torch.nn.attention import SDPBackend, sdpa_kernel

COLUMNS = ["date", "commit", "device", "model", "step", "dtype", "B", "L", "impl"]
COLUMNS += ["median_us", "spread_pct", "tokens_per_s"]
ONE_B = {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "head_dim": 64}
LAYER = {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 1, "head_dim": 128}
HEADS = {"num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 32000}
PROMPT, CONTEXT = 8192, 4096
ROUNDS = 11
# By name: transformers' implementation, and what it runs in.
IMPLEMENTATIONS = {
    "sdpa": ("sdpa", contextlib.nullcontext),
    "sdpa_flash": ("sdpa", lambda: sdpa_kernel(SDPBackend.FLASH_ATTENTION)),
    "sdpa_cudnn": ("sdpa", lambda: sdpa_kernel(SDPBackend.CUDNN_ATTENTION)),
    "dlattn": ("dlattn", contextlib.nullcontext),
}


# ---- The steps: each makes a call, which returns what is compared


def prefill(model):
    tokens = random_tokens(PROMPT)
    return lambda: model(tokens, use_cache=False, logits_to_keep=1).logits


def decode(model):
    cache = transformers.DynamicCache()
    model(random_tokens(CONTEXT), past_key_values=cache, logits_to_keep=1)
    token = random_tokens(1)

    def step():
        logits = model(token, past_key_values=cache).logits
        cache.crop(-1)
        return logits

    return step


def train(model):
    tokens = random_tokens(CONTEXT)
    weight = model.model.layers[0].self_attn.q_proj.weight

    def step():
        model(tokens, labels=tokens, use_cache=False).loss.backward()
        return taken(model, weight)

    return step


def layer(model):
    torch.manual_seed(1)
    x = torch.randn(1, CONTEXT, LAYER["hidden_size"], device="cuda", dtype=torch.bfloat16)
    weight = model.model.layers[0].self_attn.q_proj.weight

    def step():
        output = model.model(inputs_embeds=x, use_cache=False).last_hidden_state
        output.backward(x)
        return taken(model, weight)

    return step


def taken(model, weight):
    gradient = weight.grad
    model.zero_grad()
    return gradient


def random_tokens(length):
    torch.manual_seed(1)
    return torch.randint(HEADS["vocab_size"], (1, length), device="cuda")


STEPS = {
    "prefill": (prefill, ONE_B, PROMPT),
    "decode": (decode, ONE_B, 1),
    "train": (train, ONE_B, CONTEXT),
    "layer": (layer, LAYER, CONTEXT),
}
WITH_GRADIENTS = ("train", "layer")


# ---- Times


def model_of(sizes):
    torch.manual_seed(0)
    config = transformers.LlamaConfig(**sizes, **HEADS, max_position_embeddings=PROMPT)
    with torch.device("cuda"):
        return transformers.LlamaForCausalLM._from_config(config, dtype=torch.bfloat16)


@contextlib.contextmanager
def running(model, impl, step):
    name, context = IMPLEMENTATIONS[impl]
    model.set_attn_implementation(name)
    with context(), torch.set_grad_enabled(step in WITH_GRADIENTS):
        yield


def measured(step):
    """Rows of (implementation, median, spread in percent, tokens per second)."""
    make, sizes, tokens = STEPS[step]
    model = model_of(sizes)
    calls, results = {}, {}
    for impl in IMPLEMENTATIONS:
        with running(model, impl, step):
            try:
                call = make(model)
                results[impl] = call().float()
                calls[impl] = call
            except RuntimeError as error:
                print(f"{step} {impl}: {str(error).splitlines()[0]}")
    for impl, found in results.items():
        off = (found - results["sdpa"]).norm() / results["sdpa"].norm()
        print(f"{step} {impl}: differs from sdpa by {off:.4f} of the norm", flush=True)
    for impl, times in rounds(model, step, calls).items():
        low, median, high = statistics.quantiles(times, n=4)
        yield impl, median, 100 * (high - low) / median, tokens / median * 1e6


def rounds(model, step, calls):
    """Microseconds between two events, by implementation."""
    times = {impl: [] for impl in calls}
    for number in range(ROUNDS + 2):  # the first two warm up
        for impl, call in calls.items():
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            with running(model, impl, step):
                torch.cuda.synchronize()
                start.record()
                call()
                end.record()
                end.synchronize()
            if number > 1:
                times[impl].append(start.elapsed_time(end) * 1e3)
    return times


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", default="llama.csv")
    parser.add_argument("--steps", default=",".join(STEPS))
    arguments = parser.parse_args()
    device = torch.cuda.get_device_name().replace(" ", "-")
    today, commit = datetime.date.today(), os.environ.get("DLATTN_COMMIT", "")
    with open(arguments.out, "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(COLUMNS)
        for step in arguments.steps.split(","):
            model = "8b-layer" if step == "layer" else "1b"
            for impl, median, spread, rate in measured(step):
                print(f"{step:8} {impl:11} {median:10.1f} us {spread:5.1f} % {rate:12.1f} tokens/s")
                case = (today, commit, device, model, step, "bf16", 1, STEPS[step][2], impl)
                writer.writerow((*case, f"{median:.1f}", f"{spread:.1f}", f"{rate:.1f}"))
            file.flush()


if __name__ == "__main__":
    main()
