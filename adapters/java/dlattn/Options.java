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
 */
public record Options(boolean causal, boolean bottomRight, long[] window, double scale, double softcap, int numThreads,
                      String kernel, boolean lse) {
    public Options() { this(false, false, null, 0, 0, 0, null, false); }

    public Options withCausal() { return new Options(true, bottomRight, window, scale, softcap, numThreads, kernel, lse); }

    public Options withBottomRight() { return new Options(causal, true, window, scale, softcap, numThreads, kernel, lse); }

    public Options withWindow(long left, long right) {
        return new Options(causal, bottomRight, new long[] {left, right}, scale, softcap, numThreads, kernel, lse);
    }

    public Options withScale(double scale) { return new Options(causal, bottomRight, window, scale, softcap, numThreads, kernel, lse); }

    public Options withSoftcap(double softcap) { return new Options(causal, bottomRight, window, scale, softcap, numThreads, kernel, lse); }

    public Options withNumThreads(int numThreads) { return new Options(causal, bottomRight, window, scale, softcap, numThreads, kernel, lse); }

    public Options withKernel(String kernel) { return new Options(causal, bottomRight, window, scale, softcap, numThreads, kernel, lse); }

    public Options withLse() { return new Options(causal, bottomRight, window, scale, softcap, numThreads, kernel, true); }
}
