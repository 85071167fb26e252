//! Causal self-attention through candle.
//!
//!     DLATTN_LIBRARY=bazel-bin/libdlattn.so.1 attention 2 4 9 64 [cuda] <qkv.f32 >output.f32
//!
//! The arguments are batch, heads, length and head_dim. Standard input holds query, key and value,
//! each `[batch, heads, length, head_dim]` of float32; standard output gets the output in the same
//! shape, then the log-sum-exp of every row, `[batch, heads, length]`. With `cuda` it is computed on
//! the first GPU, in float16.

use candle_core::{DType, Device, Error, Result, Tensor};
use dlattn_candle::{Attention, Options};
use std::io::{Read, Write};

fn main() -> Result<()> {
    let mut words: Vec<String> = std::env::args().skip(1).collect();
    let (device, dtype) = match words.iter().position(|word| word == "cuda") {
        None => (Device::Cpu, DType::F32),
        Some(at) => {
            words.remove(at);
            (Device::new_cuda(0)?, DType::F16)
        }
    };
    let shape = words.iter().map(|word| word.parse().map_err(Error::wrap));
    let shape = shape.collect::<Result<Vec<usize>>>()?;
    let mut bytes = Vec::new();
    std::io::stdin().read_to_end(&mut bytes)?;
    let numbers: Vec<f32> = bytes
        .chunks_exact(4)
        .map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]]))
        .collect();
    let qkv = Tensor::from_vec(numbers, [&[3], &shape[..]].concat(), &device)?.to_dtype(dtype)?;

    let causal = Attention::new(Options {
        causal: true,
        ..Options::default()
    });
    let (output, lse) = causal.forward_with_lse(&qkv.get(0)?, &qkv.get(1)?, &qkv.get(2)?)?;

    for tensor in [output, lse] {
        let tensor = tensor.to_dtype(DType::F32)?;
        for number in tensor.flatten_all()?.to_vec1::<f32>()? {
            std::io::stdout().write_all(&number.to_le_bytes())?;
        }
    }
    Ok(())
}
