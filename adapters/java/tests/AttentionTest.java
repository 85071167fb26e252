import dlattn.Attention;
import dlattn.DlattnException;
import dlattn.Options;
import dlattn.Tensor;
import java.lang.foreign.Arena;
import java.util.Arrays;
import java.util.function.BiFunction;
import java.util.function.BiPredicate;
import java.util.stream.IntStream;

/** Runs its tests and prints how many passed and failed; the exit status is 1 if some failed. */
public final class AttentionTest {
    private static int passed, failed;

    private interface Test {
        void run(Arena arena);
    }

    private static void test(String name, Test test) {
        try (Arena arena = Arena.ofConfined()) {
            test.run(arena);
            passed++;
        } catch (Throwable error) {
            failed++;
            System.out.println("FAILED " + name + ": " + error);
        }
    }

    private static double[] numbers(int seed, long... shape) {
        int n = 1;
        for (long extent : shape)
            n *= (int) extent;
        final double[] made = new double[n];
        for (int i = 0; i < n; i++)
            made[i] = (float) Math.sin(12.9898 * (i + seed));
        return made;
    }

    private static Tensor floats(Arena arena, int seed, long... shape) {
        return narrow(arena, numbers(seed, shape), shape);
    }

    /** Output, then log-sum-exp, of query [2, 4, 5, 8], key [2, 2, 7, 8] and value [2, 2, 7, 6], in plain loops. */
    private static double[][] reference(double scale, BiPredicate<Integer, Integer> visible) {
        return reference(numbers(1, 2, 4, 5, 8), numbers(2, 2, 2, 7, 8), numbers(3, 2, 2, 7, 6), scale, visible);
    }

    private static double[][] reference(double[] q, double[] k, double[] v, double scale, BiPredicate<Integer, Integer> visible) {
        final double[] output = new double[2 * 4 * 5 * 6], lse = new double[2 * 4 * 5];
        for (int row = 0; row < lse.length; row++) {
            final int head = row / 5, kv = head / 4 * 2 + head % 4 / 2;
            final double[] weights = new double[7];
            double total = 0;
            for (int key = 0; key < 7; key++) {
                double sum = 0;
                for (int d = 0; d < 8; d++)
                    sum += q[row * 8 + d] * k[(kv * 7 + key) * 8 + d];
                weights[key] = visible.test(row % 5, key) ? Math.exp(sum * scale) : 0;
                total += weights[key];
            }
            lse[row] = Math.log(total);
            for (int d = 0; d < 6; d++)
                for (int key = 0; key < 7; key++)
                    output[row * 6 + d] += weights[key] / total * v[(kv * 7 + key) * 6 + d];
        }
        return new double[][] {output, lse};
    }

    private static void near(float[] found, double[] wanted) {
        check(found.length == wanted.length, found.length + " elements, wanted " + wanted.length);
        for (int i = 0; i < found.length; i++)
            check(Math.abs(found[i] - wanted[i]) <= 1e-5, i + ": " + found[i] + ", wanted " + wanted[i]);
    }

    private static void check(boolean holds, String message) {
        if (!holds)
            throw new AssertionError(message);
    }

    /** Bytes of float8, of either sign, between 1/8 and 2: from the first code on, so many. */
    private static byte[] codes(int first, int many, int count) {
        final byte[] made = new byte[count];
        for (int i = 0; i < count; i++)
            made[i] = (byte) (first + 7 * i % many | i % 3 % 2 << 7);
        return made;
    }

    /** What such bytes with so many bits of mantissa stand for, each of the equal parts times its own scale. */
    private static double[] widened(int mantissa, byte[] bytes, float... scales) {
        final double[] made = new double[bytes.length];
        for (int i = 0; i < bytes.length; i++) {
            final int code = bytes[i] & 0x7f, bias = (1 << 6 - mantissa) - 1;
            final double x = Math.scalb((double) (code & (1 << mantissa) - 1 | 1 << mantissa), (code >> mantissa) - bias - mantissa);
            made[i] = (bytes[i] < 0 ? -x : x) * scales[i * scales.length / bytes.length];
        }
        return made;
    }

    private static Tensor narrow(Arena arena, double[] wide, long... shape) {
        final float[] made = new float[wide.length];
        for (int i = 0; i < made.length; i++)
            made[i] = (float) wide[i];
        return Tensor.of(arena, made, shape);
    }

    private static void float8(Arena arena) {
        final double scale = 1 / Math.sqrt(8);
        final byte[] q = codes(0x20, 32, 2 * 4 * 5 * 8), k = codes(0x20, 32, 2 * 2 * 7 * 8), v = codes(0x30, 16, 2 * 2 * 7 * 6);
        final float[] keyScale = {0.5f, 2, 1, 0.25f}, valueScale = {4, 0.5f};
        final double[] wideK = widened(3, k, keyScale), wideV = widened(2, v, valueScale);
        final Tensor query = floats(arena, 1, 2, 4, 5, 8);
        final Tensor key = Tensor.of(arena, k, Tensor.Type.FLOAT8_E4M3FN, 2, 2, 7, 8);
        final Tensor value = Tensor.of(arena, v, Tensor.Type.FLOAT8_E5M2, 2, 2, 7, 6);
        final Options options = new Options().withKeyScale(Tensor.of(arena, keyScale, 2, 2)).withValueScale(Tensor.of(arena, valueScale, 2, 1));
        final var result = Attention.run(arena, query, key, value, options.withLse());
        final double[][] wanted = reference(numbers(1, 2, 4, 5, 8), wideK, wideV, scale, (row, column) -> true);
        near(result.output().floats(), wanted[0]);
        near(result.lse().floats(), wanted[1]);

        // In double, scales that are powers of two give the very bits.
        final Options exact = new Options().withKernel("cpu_fwd_ref");
        final Tensor wide = Attention.run(arena, query, narrow(arena, wideK, 2, 2, 7, 8), narrow(arena, wideV, 2, 2, 7, 6), exact).output();
        final Tensor same = Attention.run(arena, query, key, value, options.withKernel("cpu_fwd_ref")).output();
        check(Arrays.equals(same.floats(), wide.floats()), "other bits than those of the widened numbers");

        final Tensor bytes = Tensor.of(arena, q, Tensor.Type.FLOAT8_E4M3FN, 2, 4, 5, 8);
        final Tensor output = Attention.run(arena, bytes, key, value, options.withQueryScale(Tensor.of(arena, new float[] {0.5f}, 1))).output();
        near(output.floats(), reference(widened(3, q, 0.5f), wideK, wideV, scale, (row, column) -> true)[0]);
    }

    /** Pages of float8 with scales of their own, two of which hold 7 keys, beside those keys as floats. */
    private static void float8Pages(Arena arena) {
        final byte[] bytes = codes(0x20, 32, 3 * 4 * 8);
        final double[] wide = widened(3, bytes, 0.5f, 2, 3), keys = new double[7 * 8];
        for (int i = 0; i < keys.length; i++)
            keys[i] = wide[i < 32 ? 64 + i : i - 32];
        final Tensor query = floats(arena, 1, 1, 2, 1, 8), scale = Tensor.of(arena, new float[] {0.5f, 2, 3}, 3, 1);
        final Tensor pages = Tensor.of(arena, bytes, Tensor.Type.FLOAT8_E4M3FN, 3, 1, 4, 8), key = narrow(arena, keys, 1, 1, 7, 8);
        final Options options = new Options().withBlockTable(Tensor.of(arena, new int[] {2, 0}, 1, 2))
            .withKeyLengths(Tensor.of(arena, new int[] {7}, 1)).withKeyScale(scale).withValueScale(scale);
        final float[] wanted = Attention.run(arena, query, key, key, new Options()).output().floats();
        near(Attention.run(arena, query, pages, pages, options).output().floats(), IntStream.range(0, 16).mapToDouble(i -> wanted[i]).toArray());
        refused("pages without lengths", DlattnException.class, "key_lengths: is absent, block_table needs it",
                other -> Attention.run(other, query, pages, pages, options.withKeyLengths(null)));
    }

    private static void float8Refusals() {
        final float[] three = {1, 1, 1};
        refusedScale("negative", "key_scale: entry [0, 0] is -1, must be positive and finite", Options::withKeyScale, new float[] {-1}, 1);
        refusedScale("zero", "value_scale: entry [0, 1] is 0, must be positive", Options::withValueScale, new float[] {1, 0}, 1, 2);
        refusedScale("infinite", "query_scale: entry [0, 0] is inf", Options::withQueryScale, new float[] {1f / 0}, 1, 1);
        refusedScale("shape", "key_scale: axis 1 (heads) is 3", Options::withKeyScale, three, 1, 3);
        refusedScale("no axis", "key_scale: has 0 axes", Options::withKeyScale, new float[1]);
        refused("scale of double", DlattnException.class, "key_scale: dtype is float64", arena -> {
            final Tensor x = Tensor.zeros(arena, Tensor.Type.FLOAT8_E4M3FN, 1, 2, 5, 8);
            final Tensor scale = Tensor.of(arena, new double[] {1}, 1);
            Attention.run(arena, floats(arena, 1, 1, 2, 5, 8), x, x, new Options().withKeyScale(scale));
        });
        refused("bytes", IllegalArgumentException.class, "data: has 3 bytes, shape needs 4",
                arena -> Tensor.of(arena, new byte[3], Tensor.Type.FLOAT8_E5M2, 1, 1, 2, 2));
    }

    private static void refusedScale(String name, String words, BiFunction<Options, Tensor, Options> with, float[] scale, long... shape) {
        refused(name + " scale", DlattnException.class, words, arena -> {
            final Tensor x = Tensor.of(arena, codes(0x20, 32, 80), Tensor.Type.FLOAT8_E4M3FN, 1, 2, 5, 8);
            Attention.run(arena, floats(arena, 1, 1, 2, 5, 8), x, x, with.apply(new Options(), Tensor.of(arena, scale, shape)));
        });
    }

    private static void option(String name, Options options, double scale, BiPredicate<Integer, Integer> visible) {
        test(name, arena -> {
            final var result = Attention.run(arena, floats(arena, 1, 2, 4, 5, 8), floats(arena, 2, 2, 2, 7, 8),
                                             floats(arena, 3, 2, 2, 7, 6), options.withLse());
            final double[][] wanted = reference(scale, visible);
            near(result.output().floats(), wanted[0]);
            near(result.lse().floats(), wanted[1]);
        });
    }

    private static void refused(String name, Class<? extends Exception> kind, String words, Test test) {
        test(name, arena -> {
            try {
                test.run(arena);
            } catch (RuntimeException error) {
                check(kind.isInstance(error) && error.getMessage().contains(words), error.toString());
                return;
            }
            throw new AssertionError("was not refused");
        });
    }

    public static void main(String[] words) {
        final double scale = 1 / Math.sqrt(8);
        option("plain", new Options(), scale, (row, key) -> true);
        option("causal", new Options().withCausal(), scale, (row, key) -> key <= row);
        option("bottom right", new Options().withCausal().withBottomRight(), scale, (row, key) -> key <= row + 2);
        option("window", new Options().withWindow(1, 2), scale, (row, key) -> key >= row - 1 && key <= row + 2);
        option("scale", new Options().withScale(0.3), 0.3, (row, key) -> true);
        option("kernel", new Options().withKernel("cpu_fwd_ref").withNumThreads(1), scale, (row, key) -> true);
        test("double", arena -> {
            final Tensor one = Tensor.of(arena, new double[] {1, 2, 3, 4}, 1, 1, 2, 2);
            final var result = Attention.run(arena, one, one, one, new Options().withCausal());
            check(result.lse() == null && result.output().doubles()[1] == 2, "row 0 is not its value");
        });
        test("float8", AttentionTest::float8);
        test("float8 pages", AttentionTest::float8Pages);
        float8Refusals();
        test("version", arena -> check(Attention.version().matches("\\d+\\.\\d+\\.\\d+"), Attention.version()));
        refused("heads", DlattnException.class, "has 3 heads, must divide the query's 4", arena -> {
            final Tensor three = floats(arena, 2, 1, 3, 5, 8);
            Attention.run(arena, floats(arena, 1, 1, 4, 5, 8), three, three, new Options());
        });
        refused("kernel", DlattnException.class, "there is no kernel \"no_such_row\"", arena -> {
            final Tensor x = floats(arena, 1, 1, 4, 5, 8);
            Attention.run(arena, x, x, x, new Options().withKernel("no_such_row"));
        });
        refused("size", IllegalArgumentException.class, "data: has 12 bytes, shape needs 16",
                arena -> Tensor.of(arena, new float[3], 1, 1, 2, 2));
        System.out.println(passed + " passed, " + failed + " failed");
        System.exit(failed > 0 ? 1 : 0);
    }
}
