// Causal self-attention of what stands on standard input:
//
//	DLATTN_LIBRARY=bazel-bin/libdlattn.so.1 attention 2 4 9 64 <qkv.f32 >output.f32
//
// The arguments are batch, heads, length and head_dim. Standard input holds query, key and value, each
// [batch, heads, length, head_dim] of float32; standard output gets the output in the same shape, then the log-sum-exp of every
// row, [batch, heads, length].
package main

import (
	"encoding/binary"
	"fmt"
	"log"
	"os"

	"dlattn"
)

func main() {
	log.SetFlags(0)
	shape, size := make([]int, 4), 1
	for i := range shape {
		if len(os.Args) != 5 {
			log.Fatal("usage: attention BATCH HEADS LENGTH HEAD_DIM")
		}
		if _, err := fmt.Sscan(os.Args[i+1], &shape[i]); err != nil {
			log.Fatal(err)
		}
		size *= shape[i]
	}
	numbers := make([]float32, 3*size)
	if err := binary.Read(os.Stdin, binary.LittleEndian, numbers); err != nil {
		log.Fatal("the input is not 3 x B x H x L x D floats: ", err)
	}
	tensor := func(i int) dlattn.Tensor[float32] {
		return dlattn.Tensor[float32]{Data: numbers[i*size : (i+1)*size], Shape: shape}
	}
	output, lse, err := dlattn.Attention(tensor(0), tensor(1), tensor(2), dlattn.Options{Causal: true, LSE: true})
	if err != nil {
		log.Fatal(err)
	}
	for _, data := range [][]float32{output.Data, lse.Data} {
		if err := binary.Write(os.Stdout, binary.LittleEndian, data); err != nil {
			log.Fatal(err)
		}
	}
}
