package dlattn

import (
	"errors"
	"math"
	"slices"
	"strings"
	"sync"
	"testing"
)

func numbers[E float32 | float64](seed float64, shape ...int) Tensor[E] {
	t := Tensor[E]{Shape: shape, Data: make([]E, count(shape))}
	for i := range t.Data {
		t.Data[i] = E(math.Sin(12.9898 * (float64(i) + seed)))
	}
	return t
}

// reference is attention in plain loops, in double; visible says what a row sees.
func reference[E float32 | float64](q, k, v Tensor[E], scale float64, visible func(row, key int) bool) (output, lse []float64) {
	heads, rows, dim := q.Shape[1], q.Shape[2], q.Shape[3]
	headsKV, keys, dimV := k.Shape[1], k.Shape[2], v.Shape[3]
	for row := range q.Shape[0] * heads * rows {
		head := row / rows
		kv := head/heads*headsKV + head%heads/(heads/headsKV)
		weights, total := make([]float64, keys), 0.0
		for key := range keys {
			sum := 0.0
			for d := range dim {
				sum += float64(q.Data[row*dim+d]) * float64(k.Data[(kv*keys+key)*dim+d])
			}
			if visible(row%rows, key) {
				weights[key] = math.Exp(sum * scale)
			}
			total += weights[key]
		}
		lse = append(lse, math.Log(total))
		for d := range dimV {
			sum := 0.0
			for key, w := range weights {
				sum += w * float64(v.Data[(kv*keys+key)*dimV+d])
			}
			output = append(output, sum/total)
		}
	}
	return output, lse
}

func near[E float32 | float64](t *testing.T, found []E, wanted []float64, tolerance float64) {
	t.Helper()
	if len(found) != len(wanted) {
		t.Fatalf("%d elements, wanted %d", len(found), len(wanted))
	}
	for i, x := range found {
		if !(math.Abs(float64(x)-wanted[i]) <= tolerance) {
			t.Fatalf("element %d is %v, wanted %v", i, x, wanted[i])
		}
	}
}

func TestOptions(t *testing.T) {
	q, k, v := numbers[float32](1, 2, 4, 5, 8), numbers[float32](2, 2, 2, 7, 8), numbers[float32](3, 2, 2, 7, 6)
	scale := 1 / math.Sqrt(8)
	for _, c := range []struct {
		name    string
		options Options
		scale   float64
		visible func(row, key int) bool
	}{
		{"plain", Options{}, scale, func(row, key int) bool { return true }},
		{"causal", Options{Causal: true}, scale, func(row, key int) bool { return key <= row }},
		{"bottom right", Options{Causal: true, BottomRight: true}, scale, func(row, key int) bool { return key <= row+2 }},
		{"window", Options{Window: &[2]int{1, 2}}, scale, func(row, key int) bool { return key >= row-1 && key <= row+2 }},
		{"scale", Options{Scale: 0.3}, 0.3, func(row, key int) bool { return true }},
		{"kernel", Options{Kernel: "cpu_fwd_ref", NumThreads: 1}, scale, func(row, key int) bool { return true }},
	} {
		t.Run(c.name, func(t *testing.T) {
			c.options.LSE = true
			output, lse, err := Attention(q, k, v, c.options)
			if err != nil {
				t.Fatal(err)
			}
			wanted, sums := reference(q, k, v, c.scale, c.visible)
			near(t, output.Data, wanted, 1e-5)
			near(t, lse.Data, sums, 1e-5)
		})
	}
}

func TestDouble(t *testing.T) {
	q, k, v := numbers[float64](1, 1, 2, 5, 8), numbers[float64](2, 1, 2, 5, 8), numbers[float64](3, 1, 2, 5, 8)
	output, lse, err := Attention(q, k, v, Options{})
	if err != nil || lse.Data != nil {
		t.Fatal(err, lse)
	}
	wanted, _ := reference(q, k, v, 1/math.Sqrt(8), func(row, key int) bool { return true })
	near(t, output.Data, wanted, 1e-13)
}

func TestBFloat16(t *testing.T) {
	one := Tensor[BFloat16]{Shape: []int{1, 1, 2, 2}, Data: []BFloat16{0x3f80, 0x3f80, 0x3f80, 0x3f80}}
	output, _, err := Attention(one, one, one, Options{})
	if err != nil || output.Data[3] != 0x3f80 {
		t.Fatal(err, output)
	}
}

// codes are bytes of float8 between 1/8 and 2, of either sign, the first of which is given, and so many follow.
func codes(first byte, many int, shape ...int) []byte {
	made := make([]byte, count(shape))
	for i := range made {
		made[i] = first + byte(7*i%many) | byte(i%3%2)<<7
	}
	return made
}

// widened is what bytes of so many bits of mantissa stand for, each of the equal parts of the tensor times its own scale.
func widened(mantissa int, bytes []byte, scales []float32, shape ...int) Tensor[float32] {
	t := Tensor[float32]{Shape: shape, Data: make([]float32, len(bytes))}
	for i, code := range bytes {
		bias := 1<<(6-mantissa) - 1
		exponent, fraction := int(code&0x7f)>>mantissa, int(code)&(1<<mantissa-1)
		x := math.Ldexp(float64(fraction|1<<mantissa), exponent-bias-mantissa)
		if code&0x80 != 0 {
			x = -x
		}
		t.Data[i] = float32(x) * scales[i*len(scales)/len(bytes)]
	}
	return t
}

func TestFloat8(t *testing.T) {
	q := numbers[float32](1, 2, 4, 5, 8)
	k, v := codes(0x20, 32, 2, 2, 7, 8), codes(0x30, 16, 2, 2, 7, 6)
	keyScale := &Tensor[float32]{Data: []float32{0.5, 2, 1, 0.25}, Shape: []int{2, 2}}
	valueScale := &Tensor[float32]{Data: []float32{4, 0.5}, Shape: []int{2, 1}}
	wideK, wideV := widened(3, k, keyScale.Data, 2, 2, 7, 8), widened(2, v, valueScale.Data, 2, 2, 7, 6)
	key, value := Float8[Float8E4M3FN](k, 2, 2, 7, 8), Float8[Float8E5M2](v, 2, 2, 7, 6)
	options := Options{KeyScale: keyScale, ValueScale: valueScale, LSE: true}
	output, lse, err := Attention(q, key, value, options)
	if err != nil {
		t.Fatal(err)
	}
	wanted, sums := reference(q, wideK, wideV, 1/math.Sqrt(8), func(row, key int) bool { return true })
	near(t, output.Data, wanted, 1e-5)
	near(t, lse.Data, sums, 1e-5)

	// In double, scales that are powers of two give the very bits.
	options.Kernel = "cpu_fwd_ref"
	output, _, err = Attention(q, key, value, options)
	wide, _, wideErr := Attention(q, wideK, wideV, Options{Kernel: "cpu_fwd_ref"})
	if err != nil || wideErr != nil || !slices.Equal(output.Data, wide.Data) {
		t.Fatal(err, wideErr, output.Data, wide.Data)
	}

	// A query of float8 with a scale; the output is of another type.
	bytes := codes(0x20, 32, 2, 4, 5, 8)
	options = Options{QueryScale: Scale(0.5), KeyScale: keyScale, ValueScale: valueScale}
	output, _, err = AttentionAs[float32](Float8[Float8E4M3FN](bytes, q.Shape...), key, value, options)
	if err != nil {
		t.Fatal(err)
	}
	wanted, _ = reference(widened(3, bytes, []float32{0.5}, q.Shape...), wideK, wideV, 1/math.Sqrt(8), func(row, key int) bool { return true })
	near(t, output.Data, wanted, 1e-5)
}

// Pages of float8 with scales of their own; two of them hold 7 keys.
func TestFloat8Pages(t *testing.T) {
	q, bytes, scales := numbers[float32](1, 1, 2, 1, 8), codes(0x20, 32, 3, 1, 4, 8), []float32{0.5, 2, 3}
	pages, wide := Float8[Float8E4M3FN](bytes, 3, 1, 4, 8), widened(3, bytes, scales, 3, 1, 4, 8)
	keys := Tensor[float32]{Data: append(wide.Data[64:96:96], wide.Data[:32]...), Shape: []int{1, 1, 8, 8}}
	output, _, err := Attention(q, pages, pages, Options{
		BlockTable: &Tensor[int32]{Data: []int32{2, 0}, Shape: []int{1, 2}},
		KeyLengths: &Tensor[int32]{Data: []int32{7}, Shape: []int{1}},
		KeyScale:   &Tensor[float32]{Data: scales, Shape: []int{3, 1}},
		ValueScale: &Tensor[float32]{Data: scales, Shape: []int{3, 1}},
	})
	if err != nil {
		t.Fatal(err)
	}
	wanted, _ := reference(q, keys, keys, 1/math.Sqrt(8), func(row, key int) bool { return key < 7 })
	near(t, output.Data, wanted, 1e-5)
}

func TestFloat8Refusals(t *testing.T) {
	q := numbers[float32](1, 1, 4, 5, 8)
	k := Float8[Float8E4M3FN](codes(0x20, 32, 1, 2, 7, 8), 1, 2, 7, 8)
	for _, c := range []struct {
		options Options
		says    string
	}{
		{Options{KeyScale: Scale(-1)}, "key_scale: entry [0, 0] is -1, must be positive and finite"},
		{Options{ValueScale: Scale(0)}, "value_scale: entry [0, 0] is 0, must be positive and finite"},
		{Options{QueryScale: Scale(float32(math.Inf(1)))}, "query_scale: entry [0, 0] is inf"},
		{Options{KeyScale: &Tensor[float32]{Data: make([]float32, 3), Shape: []int{1, 3}}}, "key_scale: axis 1 (heads) is 3"},
		{Options{KeyScale: &Tensor[float32]{Shape: []int{1, 2}}}, "KeyScale: has 0 elements, [1 2] has 2"},
		{Options{KeyScale: &Tensor[float32]{Data: []float32{1}}}, "key_scale: has 0 axes"},
		{Options{KeyLengths: &Tensor[int32]{Data: []int32{8}, Shape: []int{1}}}, "key_lengths: entry 0 is 8"},
		{Options{BlockTable: &Tensor[int32]{Data: []int32{0}, Shape: []int{1, 1}}}, "key_lengths: is absent, block_table needs it"},
	} {
		_, _, err := Attention(q, k, k, c.options)
		if !errors.Is(err, InvalidArgument) || !strings.Contains(err.Error(), c.says) {
			t.Errorf("%v, wanted %q", err, c.says)
		}
	}
	_, _, err := Attention(q, k, numbers[float64](1, 1, 2, 7, 8), Options{})
	if !errors.Is(err, InvalidArgument) || !strings.Contains(err.Error(), "value: dtype is float64, query's is float32") {
		t.Error(err)
	}
}

func TestManyGoroutines(t *testing.T) {
	q := numbers[float32](1, 1, 2, 33, 16)
	wanted, _, err := Attention(q, q, q, Options{Causal: true})
	if err != nil {
		t.Fatal(err)
	}
	var all sync.WaitGroup
	for range 8 {
		all.Add(1)
		go func() {
			defer all.Done()
			for range 50 {
				output, _, err := Attention(q, q, q, Options{Causal: true})
				if err != nil {
					t.Error(err)
					return
				}
				for i, x := range output.Data {
					if x != wanted.Data[i] {
						t.Errorf("element %d is %v, wanted %v", i, x, wanted.Data[i])
						return
					}
				}
			}
		}()
	}
	all.Wait()
}

func TestRefusals(t *testing.T) {
	q := numbers[float32](1, 1, 4, 5, 8)
	for _, c := range []struct {
		k, v    Tensor[float32]
		options Options
		status  Status
		says    string
	}{
		{numbers[float32](1, 1, 3, 5, 8), numbers[float32](1, 1, 3, 5, 8), Options{}, InvalidArgument, "has 3 heads, must divide the query's 4"},
		{q, numbers[float32](1, 5, 8), Options{}, InvalidArgument, "value: has 2 axes, must have 4"},
		{q, Tensor[float32]{Shape: q.Shape}, Options{}, InvalidArgument, "value: has 0 elements, [1 4 5 8] has 160"},
		{q, q, Options{NumThreads: -1}, InvalidArgument, "NumThreads: is -1"},
		{q, q, Options{Kernel: "no_such_row"}, InvalidArgument, `there is no kernel "no_such_row"`},
	} {
		_, _, err := Attention(q, c.k, c.v, c.options)
		if !errors.Is(err, c.status) || !strings.Contains(err.Error(), c.says) {
			t.Errorf("%v, wanted %q of %v", err, c.says, c.status)
		}
	}
	if version, err := Version(); err != nil || strings.Count(version, ".") != 2 {
		t.Error(version, err)
	}
}

func TestNotFound(t *testing.T) {
	t.Setenv("DLATTN_LIBRARY", "/nonexistent/libdlattn.so.1")
	if _, err := open(); err == nil || !strings.Contains(err.Error(), "/nonexistent/libdlattn.so.1: ") {
		t.Error(err)
	}
}
