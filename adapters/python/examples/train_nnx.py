"""A small transformer of flax's nnx learns to sort, all its attention computed by the plugin.

    pip install dlattn flax optax && python train_nnx.py [STEPS]

It reads 8 digits and writes them in order, one behind the other. Prints the loss and, at the end,
which share of sequences that it has not seen comes out right.
"""

import sys

import dlattn.flax
import jax
import jax.numpy as jnp
import optax
from flax import nnx

DIGITS, LENGTH, DIM, HEADS = 10, 8, 64, 4


class Block(nnx.Module):
    def __init__(self, rngs):
        attention_fn = dlattn.flax.dot_product_attention
        self.attention = nnx.MultiHeadAttention(
            HEADS, DIM, decode=False, attention_fn=attention_fn, rngs=rngs
        )
        self.norms = nnx.List([nnx.LayerNorm(DIM, rngs=rngs) for _ in range(2)])
        self.up, self.down = (nnx.Linear(DIM, DIM, rngs=rngs) for _ in range(2))

    def __call__(self, x):
        x = x + self.attention(self.norms[0](x), is_causal=True)
        return x + self.down(nnx.gelu(self.up(self.norms[1](x))))


class Model(nnx.Module):
    def __init__(self, rngs):
        self.words = nnx.Embed(DIGITS, DIM, rngs=rngs)
        self.places = nnx.Embed(2 * LENGTH, DIM, rngs=rngs)
        self.blocks = nnx.List([Block(rngs) for _ in range(2)])
        self.head = nnx.Linear(DIM, DIGITS, rngs=rngs)

    def __call__(self, tokens):
        x = self.words(tokens) + self.places(jnp.arange(tokens.shape[1]))
        for block in self.blocks:
            x = block(x)
        return self.head(x)


def sequences(key, count):
    digits = jax.random.randint(key, (count, LENGTH), 0, DIGITS)
    return jnp.concatenate([digits, jnp.sort(digits)], 1)


def loss_of(model, tokens):
    """Of the sorted half, each digit from those before it."""
    logits = model(tokens[:, :-1])[:, LENGTH - 1 :]
    return optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, LENGTH:]).mean()


@nnx.jit
def train(model, optimizer, tokens):
    loss, gradients = nnx.value_and_grad(loss_of)(model, tokens)
    optimizer.update(model, gradients)
    return loss


def main(steps=300):
    model = Model(nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, optax.adam(3e-3), wrt=nnx.Param)
    keys = jax.random.split(jax.random.key(0), steps + 1)
    for step in range(steps):
        loss = train(model, optimizer, sequences(keys[step], 64))
        if step % 50 == 0 or step == steps - 1:
            print(f"step {step:4} loss {loss:.3f}", flush=True)
    unseen = sequences(keys[-1], 256)
    guesses = nnx.jit(lambda model, x: model(x))(model, unseen[:, :-1]).argmax(-1)
    right = (guesses[:, LENGTH - 1 :] == unseen[:, LENGTH:]).all(1).mean()
    print(f"{100 * right:.0f} % of unseen sequences are sorted")


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
