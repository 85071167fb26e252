// Package dlattn is attention by libdlattn.so.1, which is found and opened at run time: no cgo, no C compiler.
//
//	output, lse, err := dlattn.Attention(query, key, value, dlattn.Options{Causal: true, LSE: true})
//
// The library is searched where DLATTN_LIBRARY says and nowhere else, or beside the program, then where the system looks.
package dlattn

import (
	"cmp"
	"fmt"
	"runtime"
	"unsafe"
)

// The bits of numbers that Go has no type for.
type (
	Float16      uint16
	BFloat16     uint16
	Float8E4M3FN uint8
	Float8E5M2   uint8
)

// Element is what an output holds.
type Element interface {
	float32 | float64 | Float16 | BFloat16
}

// Stored is what a query, key or value holds.
type Stored interface {
	Element | Float8E4M3FN | Float8E5M2
}

// Number is what a tensor holds: beside those, the integers of Options.
type Number interface {
	Stored | int32
}

// Tensor is row-major without gaps; for attention its axes are [batch, heads, length, head_dim].
type Tensor[E Number] struct {
	Data  []E
	Shape []int
}

// Float8 is a tensor over bytes that hold float8: Float8[Float8E4M3FN](bytes, 1, 8, 128, 64).
func Float8[E Float8E4M3FN | Float8E5M2](bytes []byte, shape ...int) Tensor[E] {
	return Tensor[E]{Data: unsafe.Slice((*E)(unsafe.Pointer(unsafe.SliceData(bytes))), len(bytes)), Shape: shape}
}

// Scale is one scale for a whole tensor.
func Scale(scale float32) *Tensor[float32] {
	return &Tensor[float32]{Data: []float32{scale}, Shape: []int{1}}
}

// Options of a call; the zero value is softmax(query key^T / sqrt(head_dim)) value over all keys.
type Options struct {
	Causal      bool
	BottomRight bool    // causal and window: the last row meets the last key; otherwise row 0 meets key 0
	Window      *[2]int // keys to the left and to the right that a row sees; -1 is unbounded
	Scale       float64 // 0 is 1 / sqrt(head_dim)
	Softcap     float64 // 0 is none
	NumThreads  int     // 0 is as many as pay
	Kernel      string  // the row to use; "" is the best
	LSE         bool    // whether the log-sum-exp of each row is wanted, too

	KeyLengths *Tensor[int32] // [B]: keys from there on are not read; nil is all
	// [B, max_pages], with KeyLengths: which pages are each batch's, where key and value are [pages, H_kv, page_size, D].
	BlockTable *Tensor[int32]

	// What a tensor is multiplied with, positive and finite; nil is 1. [1] or [B|1, H|1]; of key and value [1] or [B|1, H_kv|1],
	// of pages [pages|1, H_kv|1].
	QueryScale, KeyScale, ValueScale *Tensor[float32]
}

// Status is what the library answers. It is an error, for errors.Is.
type Status int32

// The statuses of dlattn.h.
const (
	InvalidArgument Status = 1 + iota
	Unsupported
	BufferTooSmall
	OutOfMemory
	DeviceUnavailable
	DeviceError
	VersionMismatch
	InternalError
)

func (s Status) Error() string {
	if api, err := load(); err == nil {
		return api.statusName(int32(s))
	}
	return fmt.Sprintf("status %d", int32(s))
}

// Error is a refusal, in the library's own words.
type Error struct {
	Status  Status
	Message string
}

func (e *Error) Error() string { return "dlattn: " + e.Message }

// Unwrap gives the status.
func (e *Error) Unwrap() error { return e.Status }

// Version of the library that is in use.
func Version() (string, error) {
	api, err := load()
	if err != nil {
		return "", err
	}
	return api.version(), nil
}

// Attention is softmax(scale * query key^T) value over the keys that are visible. query is [B, H, Lq, D], key
// [B, H_kv, Lk, D], value [B, H_kv, Lk, D_v], and H a multiple of H_kv; the output is [B, H, Lq, D_v] and the log-sum-exp, if
// Options.LSE, [B, H, Lq]. Key and value are of the query's type or float8, each its own. It returns when the result is there,
// and may be called from many goroutines.
func Attention[E Element, K, V Stored](
	query Tensor[E], key Tensor[K], value Tensor[V], options Options,
) (output Tensor[E], lse Tensor[float32], err error) {
	return AttentionAs[E](query, key, value, options)
}

// AttentionAs is Attention with an output of type E, which a query of float8 needs:
// AttentionAs[float32](query, key, value, options).
func AttentionAs[E Element, Q, K, V Stored](
	query Tensor[Q], key Tensor[K], value Tensor[V], options Options,
) (output Tensor[E], lse Tensor[float32], err error) {
	api, err := load()
	if err != nil {
		return output, lse, err
	}
	if err := cmp.Or(fourAxes("query", query), fourAxes("key", key), fourAxes("value", value)); err != nil {
		return output, lse, err
	}
	made := Tensor[E]{Shape: append(append([]int{}, query.Shape[:3]...), value.Shape[3])}
	made.Data = make([]E, count(made.Shape))
	var pins runtime.Pinner
	defer pins.Unpin()
	desc, err := describe(&pins, options)
	if err != nil {
		return output, lse, err
	}
	slots := &tensors{query: pinned(&pins, query), key: pinned(&pins, key), value: pinned(&pins, value), output: pinned(&pins, made)}
	slots.structSize = unsafe.Sizeof(*slots)
	if err := slots.setOptional(&pins, options); err != nil {
		return output, lse, err
	}
	sums := Tensor[float32]{}
	if options.LSE {
		sums.Shape = made.Shape[:3:3]
		sums.Data = make([]float32, count(sums.Shape))
		slots.lse = pinned(&pins, sums)
	}
	pins.Pin(slots)
	if err := api.run(&pins, desc, slots); err != nil {
		return output, lse, err
	}
	return made, sums, nil
}

// fourAxes refuses a tensor that has others, or is not filled.
func fourAxes[E Stored](name string, t Tensor[E]) error {
	if len(t.Shape) != 4 {
		return refused("%s: has %d axes, must have 4", name, len(t.Shape))
	}
	return filled(name, t)
}

// filled refuses a tensor of more or fewer elements than its shape has.
func filled[E Number](name string, t Tensor[E]) error {
	if len(t.Data) != count(t.Shape) {
		return refused("%s: has %d elements, %v has %d", name, len(t.Data), t.Shape, count(t.Shape))
	}
	return nil
}

func refused(format string, arguments ...any) error {
	return &Error{InvalidArgument, fmt.Sprintf(format, arguments...)}
}

func count(shape []int) int {
	n := 1
	for _, extent := range shape {
		n *= extent
	}
	return n
}
