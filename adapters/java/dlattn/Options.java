package dlattn;

/**
 * Options of a call. {@code new Options()} is softmax(query key^T / sqrt(head_dim)) value over all keys; each method gives the same
 * with one more.
 *
 * @param causal      keys after a row are not visible
 * @param bottomRight causal and window: the last row meets the last key; otherwise row 0 meets key 0
 * @param window      keys to the left and to the right that a row sees, -1 being unbounded; null is all
 * @param scale       0 is 1 / sqrt(head_dim)
 * @param softcap     0 is none
 * @param numThreads  0 is as many as pay
 * @param kernel      the row to use; null is the best
 * @param lse         whether the log-sum-exp of each row is wanted, too
 * @param scales      what query, key and value are multiplied with
 */
public record Options(boolean causal, boolean bottomRight, long[] window, double scale, double softcap, int numThreads,
                      String kernel, boolean lse, Scales scales) {
    /**
     * FLOAT32 [1], or [B|1, H|1] and, of key and value, [B|1, H_kv|1]; positive and finite; null is 1. Their memory has to be there
     * as long as the options are in use.
     */
    public record Scales(Tensor query, Tensor key, Tensor value) {}

    public Options() { this(false, false, null, 0, 0, 0, null, false, new Scales(null, null, null)); }

    public Options withCausal() { return new Options(true, bottomRight, window, scale, softcap, numThreads, kernel, lse, scales); }

    public Options withBottomRight() { return new Options(causal, true, window, scale, softcap, numThreads, kernel, lse, scales); }

    public Options withWindow(long left, long right) {
        return new Options(causal, bottomRight, new long[] {left, right}, scale, softcap, numThreads, kernel, lse, scales);
    }

    public Options withScale(double scale) { return new Options(causal, bottomRight, window, scale, softcap, numThreads, kernel, lse, scales); }

    public Options withSoftcap(double softcap) { return new Options(causal, bottomRight, window, scale, softcap, numThreads, kernel, lse, scales); }

    public Options withNumThreads(int numThreads) { return new Options(causal, bottomRight, window, scale, softcap, numThreads, kernel, lse, scales); }

    public Options withKernel(String kernel) { return new Options(causal, bottomRight, window, scale, softcap, numThreads, kernel, lse, scales); }

    public Options withLse() { return new Options(causal, bottomRight, window, scale, softcap, numThreads, kernel, true, scales); }

    public Options withQueryScale(Tensor scale) { return withScales(new Scales(scale, scales.key, scales.value)); }

    public Options withKeyScale(Tensor scale) { return withScales(new Scales(scales.query, scale, scales.value)); }

    public Options withValueScale(Tensor scale) { return withScales(new Scales(scales.query, scales.key, scale)); }

    private Options withScales(Scales scales) {
        return new Options(causal, bottomRight, window, scale, softcap, numThreads, kernel, lse, scales);
    }
}
