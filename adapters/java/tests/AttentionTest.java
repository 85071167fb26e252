import dlattn.Attention;
import dlattn.DlattnException;
import dlattn.Options;
import dlattn.Tensor;
import java.lang.foreign.Arena;
import java.util.function.BiPredicate;

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
        final double[] wide = numbers(seed, shape);
        final float[] made = new float[wide.length];
        for (int i = 0; i < made.length; i++)
            made[i] = (float) wide[i];
        return Tensor.of(arena, made, shape);
    }

    /** Output, then log-sum-exp, of query [2, 4, 5, 8], key [2, 2, 7, 8] and value [2, 2, 7, 6], in plain loops. */
    private static double[][] reference(double scale, BiPredicate<Integer, Integer> visible) {
        final double[] q = numbers(1, 2, 4, 5, 8), k = numbers(2, 2, 2, 7, 8), v = numbers(3, 2, 2, 7, 6);
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
