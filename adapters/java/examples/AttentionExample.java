import dlattn.Attention;
import dlattn.Options;
import dlattn.Tensor;
import java.io.FileDescriptor;
import java.io.FileOutputStream;
import java.io.IOException;
import java.lang.foreign.Arena;
import java.lang.foreign.ValueLayout;
import java.nio.ByteBuffer;
import java.nio.ByteOrder;
import java.util.Arrays;

/**
 * Causal self-attention of what stands on standard input. The arguments are batch, heads, length and head_dim. Standard input holds
 * query, key and value, each [batch, heads, length, head_dim] of float32; standard output gets the output in the same shape, then the
 * log-sum-exp of every row, [batch, heads, length].
 */
public final class AttentionExample {
    public static void main(String[] words) throws IOException {
        final long[] shape = Arrays.stream(words).mapToLong(Long::parseLong).toArray();
        final int count = (int) Arrays.stream(shape).reduce(1, (a, b) -> a * b);
        final byte[] bytes = System.in.readAllBytes();
        if (shape.length != 4 || bytes.length != 3 * 4 * count)
            throw new IllegalArgumentException("the input is not 3 x B x H x L x D floats");
        final float[] numbers = new float[3 * count];
        ByteBuffer.wrap(bytes).order(ByteOrder.LITTLE_ENDIAN).asFloatBuffer().get(numbers);
        try (Arena arena = Arena.ofConfined()) {
            final Tensor[] x = new Tensor[3];
            for (int i = 0; i < 3; i++)
                x[i] = Tensor.of(arena, Arrays.copyOfRange(numbers, i * count, (i + 1) * count), shape);
            final var result = Attention.run(arena, x[0], x[1], x[2], new Options().withCausal().withLse());
            // System.out keeps its errors to itself.
            try (var out = new FileOutputStream(FileDescriptor.out)) {
                for (Tensor t : new Tensor[] {result.output(), result.lse()})
                    out.write(t.data().toArray(ValueLayout.JAVA_BYTE));
            }
        }
    }
}
