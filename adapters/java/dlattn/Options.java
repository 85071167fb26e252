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
 * @param tensors     lengths, pages and scales
 */
public record Options(boolean causal, boolean bottomRight, long[] window, double scale, double softcap, int numThreads,
                      String kernel, boolean lse, Tensors tensors) {
    /**
     * Tensors that a call may have; null is absent. Their memory has to be there as long as the options are in use.
     *
     * @param keyLengths INT32 [B]: keys from there on are not read
     * @param blockTable INT32 [B, max_pages], with keyLengths: which pages are each batch's, where key and value are
     *                   [pages, H_kv, page_size, D]
     * @param queryScale FLOAT32 [1] or [B|1, H|1], positive and finite: what the query is multiplied with
     * @param keyScale   FLOAT32 [1] or [B|1, H_kv|1], of pages [pages|1, H_kv|1]: the same for the key
     * @param valueScale the same for the value
     */
    public record Tensors(Tensor keyLengths, Tensor blockTable, Tensor queryScale, Tensor keyScale, Tensor valueScale) {}

    public Options() { this(false, false, null, 0, 0, 0, null, false, new Tensors(null, null, null, null, null)); }

    public Options withCausal() { return new Options(true, bottomRight, window, scale, softcap, numThreads, kernel, lse, tensors); }

    public Options withBottomRight() { return new Options(causal, true, window, scale, softcap, numThreads, kernel, lse, tensors); }

    public Options withWindow(long left, long right) {
        return new Options(causal, bottomRight, new long[] {left, right}, scale, softcap, numThreads, kernel, lse, tensors);
    }

    public Options withScale(double scale) { return new Options(causal, bottomRight, window, scale, softcap, numThreads, kernel, lse, tensors); }

    public Options withSoftcap(double softcap) { return new Options(causal, bottomRight, window, scale, softcap, numThreads, kernel, lse, tensors); }

    public Options withNumThreads(int numThreads) { return new Options(causal, bottomRight, window, scale, softcap, numThreads, kernel, lse, tensors); }

    public Options withKernel(String kernel) { return new Options(causal, bottomRight, window, scale, softcap, numThreads, kernel, lse, tensors); }

    public Options withLse() { return new Options(causal, bottomRight, window, scale, softcap, numThreads, kernel, true, tensors); }

    public Options withKeyLengths(Tensor lengths) {
        return with(new Tensors(lengths, tensors.blockTable, tensors.queryScale, tensors.keyScale, tensors.valueScale));
    }

    public Options withBlockTable(Tensor pages) {
        return with(new Tensors(tensors.keyLengths, pages, tensors.queryScale, tensors.keyScale, tensors.valueScale));
    }

    public Options withQueryScale(Tensor factor) {
        return with(new Tensors(tensors.keyLengths, tensors.blockTable, factor, tensors.keyScale, tensors.valueScale));
    }

    public Options withKeyScale(Tensor factor) {
        return with(new Tensors(tensors.keyLengths, tensors.blockTable, tensors.queryScale, factor, tensors.valueScale));
    }

    public Options withValueScale(Tensor factor) {
        return with(new Tensors(tensors.keyLengths, tensors.blockTable, tensors.queryScale, tensors.keyScale, factor));
    }

    private Options with(Tensors tensors) {
        return new Options(causal, bottomRight, window, scale, softcap, numThreads, kernel, lse, tensors);
    }
}
