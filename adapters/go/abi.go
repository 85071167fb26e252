package dlattn

import (
	"cmp"
	"fmt"
	"math"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"sync"
	"unsafe"

	"github.com/ebitengine/purego"
)

// The structs of abi/dlattn.h as far as they are used: a library takes shorter ones than its own, and longer ones whose end is
// zero. What they point to is pinned.

type dlTensor struct {
	data       unsafe.Pointer
	deviceType int32
	deviceID   int32
	ndim       int32
	code       uint8
	bits       uint8
	lanes      uint16
	shape      *int64
	strides    *int64 // nil: row-major without gaps
	byteOffset uint64
}

type forwardDesc struct {
	structSize              uintptr
	flags                   uint64
	scale, softcap          float64
	windowLeft, windowRight int64
	causal, alignment       int32
	maxSeqlenQ, maxSeqlenK  int64
	kernel                  *byte
	numThreads, reserved0   int32
}

type tensors struct {
	structSize                         uintptr
	query, key, value, output, lse     *dlTensor
	bias, mask, alibiSlopes, sinks     *dlTensor
	queryLengths, keyLengths           *dlTensor
	cuSeqlensQ, cuSeqlensK, blockTable *dlTensor
	querySegments, keySegments         *dlTensor // since 1.1, as those that follow
	blockMask                          *dlTensor
	queryScale, keyScale, valueScale   *dlTensor
}

type execution struct {
	structSize               uintptr
	flags                    uint64
	stream, workspace        unsafe.Pointer
	workspaceBytes           uintptr
	parallelFor, parallelCtx uintptr
}

type sku struct {
	structSize                                 uintptr
	kernel, backend, arch, math, accumulator   *byte
	features                                   uint64
	workspaceBytes, workspaceAlignment         uintptr
	contiguous, deterministic, bitStable       int32
	tileQ, tileK, numSplits, numThreads, zero0 int32
}

// The first functions of the table, which is append-only.
type table struct {
	structSize                                            uintptr
	major, minor                                          uint32
	version, lastError, statusName, forwardQuery, forward uintptr
}

const (
	cpu        = 1 // kDLCPU
	windowFlag = 1 // DLATTN_WINDOW
	soname     = "libdlattn.so.1"
)

type library struct {
	version      func() string
	lastError    func() string
	statusName   func(status int32) string
	forwardQuery func(desc *forwardDesc, slots *tensors, found *sku) int32
	forward      func(desc *forwardDesc, slots *tensors, exec *execution) int32
}

var load = sync.OnceValues(open)

// open finds the library, which is never closed: its threads outlive every caller.
func open() (*library, error) {
	var places []string
	if named, is := os.LookupEnv("DLATTN_LIBRARY"); is && named != "" {
		places = []string{named}
	} else {
		if program, err := os.Executable(); err == nil {
			places = append(places, filepath.Join(filepath.Dir(program), soname))
		}
		places = append(places, soname)
	}
	var why []string
	for _, place := range places {
		found, err := openFile(place)
		if err == nil {
			return found, nil
		}
		why = append(why, fmt.Sprintf("\n  %s: %v", place, err))
	}
	return nil, fmt.Errorf("dlattn: %s was not found:%s", soname, strings.Join(why, ""))
}

func openFile(path string) (*library, error) {
	handle, err := purego.Dlopen(path, purego.RTLD_NOW|purego.RTLD_LOCAL)
	if err != nil {
		return nil, err
	}
	symbol, err := purego.Dlsym(handle, "dlattn_get_api")
	if err != nil {
		return nil, err
	}
	var getAPI func(major uint32) *table
	purego.RegisterFunc(&getAPI, symbol)
	t := getAPI(1)
	if t == nil || t.structSize < unsafe.Sizeof(*t) {
		return nil, fmt.Errorf("does not serve ABI 1")
	}
	l := &library{}
	purego.RegisterFunc(&l.version, t.version)
	purego.RegisterFunc(&l.lastError, t.lastError)
	purego.RegisterFunc(&l.statusName, t.statusName)
	purego.RegisterFunc(&l.forwardQuery, t.forwardQuery)
	purego.RegisterFunc(&l.forward, t.forward)
	return l, nil
}

// run asks for the workspace and calls. An error is that of the thread that made the call.
func (l *library) run(pins *runtime.Pinner, desc *forwardDesc, slots *tensors) error {
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	found := &sku{}
	found.structSize = unsafe.Sizeof(*found)
	if status := l.forwardQuery(desc, slots, found); status != 0 {
		return &Error{Status(status), l.lastError()}
	}
	exec := &execution{workspaceBytes: found.workspaceBytes}
	exec.structSize = unsafe.Sizeof(*exec)
	if found.workspaceBytes > 0 {
		memory := make([]byte, found.workspaceBytes+found.workspaceAlignment)
		start := unsafe.Pointer(&memory[0])
		pins.Pin(start)
		exec.workspace = unsafe.Add(start, -uintptr(start)&(found.workspaceAlignment-1))
	}
	if status := l.forward(desc, slots, exec); status != 0 {
		return &Error{Status(status), l.lastError()}
	}
	return nil
}

func describe(pins *runtime.Pinner, o Options) (*forwardDesc, error) {
	if o.NumThreads < 0 || o.NumThreads > math.MaxInt32 {
		return nil, refused("NumThreads: is %d, must be a positive int32 or 0", o.NumThreads)
	}
	desc := &forwardDesc{scale: o.Scale, softcap: o.Softcap, numThreads: int32(o.NumThreads)}
	desc.structSize = unsafe.Sizeof(*desc)
	if o.Causal {
		desc.causal = 1
	}
	if o.BottomRight {
		desc.alignment = 1
	}
	if o.Window != nil {
		desc.flags |= windowFlag
		desc.windowLeft, desc.windowRight = int64(o.Window[0]), int64(o.Window[1])
	}
	if o.Kernel != "" {
		name := append([]byte(o.Kernel), 0)
		pins.Pin(&name[0])
		desc.kernel = &name[0]
	}
	return desc, nil
}

// setOptional fills the slots of the tensors that the options have.
func (t *tensors) setOptional(pins *runtime.Pinner, o Options) error {
	return cmp.Or(
		optional(pins, &t.keyLengths, "KeyLengths", o.KeyLengths),
		optional(pins, &t.blockTable, "BlockTable", o.BlockTable),
		optional(pins, &t.queryScale, "QueryScale", o.QueryScale),
		optional(pins, &t.keyScale, "KeyScale", o.KeyScale),
		optional(pins, &t.valueScale, "ValueScale", o.ValueScale))
}

func optional[E Number](pins *runtime.Pinner, slot **dlTensor, name string, t *Tensor[E]) error {
	if t == nil {
		return nil
	}
	if err := filled(name, *t); err != nil {
		return err
	}
	*slot = pinned(pins, *t)
	return nil
}

// pinned is a tensor for the library, which stays where it is until the pins are taken out.
func pinned[E Number](pins *runtime.Pinner, t Tensor[E]) *dlTensor {
	shape := make([]int64, 0, 4)
	for _, extent := range t.Shape {
		shape = append(shape, int64(extent))
	}
	pins.Pin(unsafe.SliceData(shape))
	d := &dlTensor{deviceType: cpu, ndim: int32(len(shape)), lanes: 1, shape: unsafe.SliceData(shape)}
	d.code, d.bits = kindOf[E]()
	if len(t.Data) > 0 {
		pins.Pin(&t.Data[0])
		d.data = unsafe.Pointer(&t.Data[0])
	}
	pins.Pin(d)
	return d
}

// kindOf is DLPack's code and the bits.
func kindOf[E Number]() (code, bits uint8) {
	var e E
	switch any(e).(type) {
	case int32:
		return 0, 32
	case Float8E4M3FN:
		return 10, 8
	case Float8E5M2:
		return 12, 8
	case BFloat16:
		return 4, 16
	case Float16:
		return 2, 16
	case float64:
		return 2, 64
	}
	return 2, 32
}
