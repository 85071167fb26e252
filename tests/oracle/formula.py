"""docs/numerics.md in NumPy, in the type of its inputs.

Nothing here knows how the plugin computes.
"""

import numpy as np
from plugin import EMPTY_LSE_INF, EXACT_SCALE, WINDOW


def philox(counter, key):
    """Four words of Philox4x32-10 (Salmon et al., SC 2011) for arrays of counters and two keys."""
    c = [np.asarray(x, np.uint64) for x in counter]
    k = [np.uint64(x) for x in key]
    low = np.uint64(0xFFFFFFFF)
    for _ in range(10):
        a, b = np.uint64(0xD2511F53) * c[0], np.uint64(0xCD9E8D57) * c[2]
        c = [
            (b >> np.uint64(32)) ^ c[1] ^ k[0],
            b & low,
            (a >> np.uint64(32)) ^ c[3] ^ k[1],
            a & low,
        ]
        k = [(k[0] + np.uint64(0x9E3779B9)) & low, (k[1] + np.uint64(0xBB67AE85)) & low]
    return c


def keep(b, weights, options):
    """What dropout makes of each of the weights, [H, L, K]."""
    p = options.get("dropout_probability", 0)
    heads, length, keys = weights.shape
    if p == 0:
        return np.ones_like(weights)
    seed, offset = options.get("dropout_seed", 0), options.get("dropout_offset", 0)
    h, i, j = np.meshgrid(np.arange(heads), np.arange(length), np.arange(keys), indexing="ij")
    words = philox(
        (j // 4, i, b * heads + h, np.full(h.shape, offset & 0xFFFFFFFF)),
        (seed & 0xFFFFFFFF, (seed >> 32) ^ (offset >> 32)),
    )
    word = np.choose(j % 4, words).astype(np.float64)
    return np.where(word < p * 2.0**32, 0, 1 / (1 - p)).astype(weights.dtype)


class Sequence:
    """One entry of the batch: its tensors as [H, L, D], and where they come from."""

    def __init__(self, arrays, options, b):
        q, k, v = arrays["query"], arrays["key"], arrays["value"]
        cu_q, cu_k, table = (
            arrays.get(name) for name in ("cu_seqlens_q", "cu_seqlens_k", "block_table")
        )
        self.arrays, self.options, self.b = arrays, options, b
        self.rows = slice(cu_q[b], cu_q[b + 1]) if cu_q is not None else None
        self.keys = slice(cu_k[b], cu_k[b + 1]) if cu_k is not None else None
        self.query = q[b] if self.rows is None else q[self.rows].transpose(1, 0, 2)
        if table is not None:
            used = -(-int(arrays["key_lengths"][b]) // k.shape[2])
            self.key, self.value = (
                np.concatenate([x[0][:, :0], *(x[p] for p in table[b, :used])], axis=1)
                for x in (k, v)
            )
        elif self.keys is not None:
            self.key, self.value = (x[self.keys].transpose(1, 0, 2) for x in (k, v))
        else:
            self.key, self.value = k[b], v[b]
        self.heads, self.length = self.query.shape[:2]
        self.row_count, self.key_count = self.length, self.key.shape[1]
        if "query_lengths" in arrays:
            self.row_count = min(self.length, int(arrays["query_lengths"][b]))
        if "key_lengths" in arrays:
            self.key_count = min(self.key.shape[1], int(arrays["key_lengths"][b]))
        group = self.heads // self.key.shape[0]
        self.key, self.value = (
            np.repeat(x[:, : self.key_count], group, axis=0) for x in (self.key, self.value)
        )
        self.apply_scales(group)
        shift = self.key_count - self.row_count if options.get("alignment") else 0
        self.i = np.arange(self.length)[:, None] + shift + options.get("diagonal_offset", 0)
        self.j = np.arange(self.key_count)[None, :]

    def apply_scales(self, group):
        """Query, key and value times their scales."""

        def scale(name, heads, page_keys=None):
            s = self.arrays.get(name)
            if s is None:
                return 1
            if s.ndim == 1:
                return s[0]
            if page_keys is not None:
                s = np.broadcast_to(s, (page_keys[1], s.shape[1]))
                per_page = s[self.arrays["block_table"][self.b]]
                per_key = np.repeat(per_page, page_keys[0], axis=0)[: self.key_count]
                per_key = np.broadcast_to(per_key, (self.key_count, heads // group))
                return np.repeat(per_key.T, group, axis=0)[:, :, None]
            row = s[self.b if len(s) > 1 else 0]
            row = np.broadcast_to(row, heads if name == "query_scale" else heads // group)
            return (row if name == "query_scale" else np.repeat(row, group))[:, None, None]

        pages = None
        if "block_table" in self.arrays:
            pages = self.arrays["key"].shape[2], len(self.arrays["key"])
        self.query = self.query * scale("query_scale", self.heads)
        self.key = self.key * scale("key_scale", self.heads, pages)
        self.value = self.value * scale("value_scale", self.heads, pages)

    def extra(self, name):
        """A bias or mask as [H, L, K]."""
        x = self.arrays[name]
        x = x[self.b if len(x) > 1 else 0]
        wanted = self.heads, self.length, self.key_count
        x = np.broadcast_to(
            x, (self.heads, *(w if n == 1 else n for n, w in zip(x.shape[1:], wanted[1:])))
        )
        return x[:, : self.length, : self.key_count]

    def seen(self):
        o, a, i, j = self.options, self.arrays, self.i, self.j
        shape = self.heads, self.length, self.key_count
        seen = np.broadcast_to(np.arange(self.length)[:, None] < self.row_count, shape).copy()
        if o.get("causal"):
            seen &= j <= i
        if o.get("flags", 0) & WINDOW and o["window_left"] >= 0:
            seen &= j >= i - o["window_left"]
        if o.get("flags", 0) & WINDOW and o["window_right"] >= 0:
            seen &= j <= i + o["window_right"]
        if "query_segments" in a:
            of_rows = a["query_segments"] if self.rows is not None else a["query_segments"][self.b]
            of_keys = a["key_segments"] if self.keys is not None else a["key_segments"][self.b]
            of_rows = of_rows[self.rows] if self.rows is not None else of_rows
            of_keys = (of_keys[self.keys] if self.keys is not None else of_keys)[: self.key_count]
            seen &= of_rows[:, None] == of_keys[None, :]
        mask = self.extra("mask") != 0 if "mask" in a else True
        if "block_mask" in a:
            blocks = a["block_mask"]
            blocks = np.broadcast_to(
                blocks[self.b if len(blocks) > 1 else 0], (self.heads, *blocks.shape[2:])
            )
            state = np.repeat(np.repeat(blocks, o["block_q"], axis=1), o["block_k"], axis=2)
            state = state[:, : self.length, : self.key_count]
            mask = np.where(state == 1, mask, state != 0)
        return seen & mask

    def softmax(self):
        """Weights of the keys, before dropout, and lse; self.* keeps what backward needs."""
        o, a = self.options, self.arrays
        self.scale = o.get("scale", 0)
        if self.scale == 0 and not o.get("flags", 0) & EXACT_SCALE:
            self.scale = self.query.shape[2] ** -0.5
        score = self.scale * np.einsum("hid,hjd->hij", self.query, self.key)
        self.cap_slope = np.ones_like(score)
        if o.get("softcap"):
            t = np.tanh(score / o["softcap"])
            score, self.cap_slope = o["softcap"] * t, 1 - t**2
        if "bias" in a:
            score = score + self.extra("bias")
        self.distance = np.abs(self.i - self.j).astype(score.dtype)
        if "alibi_slopes" in a:
            slopes = a["alibi_slopes"]
            slopes = slopes[self.b] if slopes.ndim == 2 else slopes
            score = score - slopes[:, None, None] * self.distance
        score = np.where(self.seen(), score, -np.inf)
        sink = (
            a["sinks"][:, None] if "sinks" in a else np.full((self.heads, 1), -np.inf, score.dtype)
        )
        most = np.maximum(score.max(axis=2, initial=-np.inf), sink)
        safe = np.where(np.isfinite(most), most, 0)
        weight = np.exp(score - safe[:, :, None])
        total = weight.sum(axis=2) + np.exp(sink - safe)
        with np.errstate(divide="ignore"):
            lse = safe + np.log(total)
        some = np.where(total == 0, 1, total)
        self.sink_weight = np.exp(sink - safe) / some
        if o.get("flags", 0) & EMPTY_LSE_INF:
            lse = np.where(total == 0, np.inf, lse)
        return weight / some[:, :, None], lse

    def forward(self):
        weights, lse = self.softmax()
        kept = weights * keep(self.b, weights, self.options)
        return np.einsum("hij,hjd->hid", kept, self.value), lse


def batch_of(arrays):
    cu_q = arrays.get("cu_seqlens_q")
    return len(cu_q) - 1 if cu_q is not None else len(arrays["query"])


def forward(arrays, options):
    """Output and lse for every sequence: [(b, rows, output [H, L, Dv], lse [H, L])]."""
    results = []
    for b in range(batch_of(arrays)):
        s = Sequence(arrays, options, b)
        results.append((b, s.rows, *s.forward()))
    return results


def place(whole, s, side, part):
    """Adds [H, L, D] of a sequence to where its rows (or keys) stand in the whole tensor."""
    where = s.rows if side == "rows" else s.keys
    if where is None:
        whole[s.b][:, : part.shape[1]] += part
    else:
        whole[where][: part.shape[1]] += part.transpose(1, 0, 2)


def backward(arrays, d_output, d_lse, options):
    """Gradients of <d_output, output> + <d_lse, lse> by FlashAttention's formulas, float64."""
    names = ("query", "key", "value", "bias", "alibi_slopes", "sinks")
    g = {n: np.zeros(arrays[n].shape) for n in names if n in arrays}
    for b in range(batch_of(arrays)):
        s = Sequence(arrays, options, b)
        weights, _ = s.softmax()
        o = d_output[b] if s.rows is None else d_output[s.rows].transpose(1, 0, 2)
        e = d_lse[b] if s.rows is None else d_lse[:, s.rows]
        kept = keep(b, weights, options)
        d_weights = kept * np.einsum("hid,hjd->hij", o, s.value)
        delta = (weights * d_weights).sum(axis=2) - e
        d_score = weights * (d_weights - delta[:, :, None])
        groups = len(s.query) // g["key"].shape[1]

        def fold(x, n=groups):
            return x.reshape(len(x) // n, n, *x.shape[1:]).sum(axis=1)

        place(g["value"], s, "keys", fold(np.einsum("hij,hid->hjd", kept * weights, o)))
        if "bias" in g:
            target = g["bias"][b if len(g["bias"]) > 1 else 0]
            axes = tuple(n for n, extent in enumerate(target.shape) if extent == 1)
            target[
                tuple(
                    slice(n) if e > 1 else slice(None) for n, e in zip(d_score.shape, target.shape)
                )
            ] += d_score.sum(axis=axes, keepdims=True)
        if "alibi_slopes" in g:
            target = g["alibi_slopes"]
            target = target[b] if target.ndim == 2 else target
            target -= (d_score * s.distance).sum(axis=(1, 2))
        if "sinks" in g:
            g["sinks"] -= (s.sink_weight * delta).sum(axis=1)
        d_score = d_score * s.cap_slope * s.scale
        place(g["query"], s, "rows", np.einsum("hij,hjd->hid", d_score, s.key))
        place(g["key"], s, "keys", fold(np.einsum("hij,hid->hjd", d_score, s.query)))
    return g
