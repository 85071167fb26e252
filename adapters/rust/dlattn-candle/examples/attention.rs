//! Causal self-attention through candle.
//!
//!     DLATTN_LIBRARY=bazel-bin/libdlattn.so.1 attention 2 4 9 64 <qkv.f32 >output.f32
//!
//! The arguments are batch, heads, length and head_dim. Standard input holds query, key and value,
//! each `[batch, heads, length, head_dim]` of float32; standard output gets the output in the same
//! shape, then the log-sum-exp of every row, `[batch, heads, length]`.

use candle_core::{Device, Error, Result, Tensor};
use dlattn_candle::{Attention, Options};
use std::io::{Read, Write};

fn main() -> Result<()> {
    let arguments = std::env::args()
        .skip(1)
        .map(|word| word.parse().map_err(Error::wrap));
    let shape = arguments.collect::<Result<Vec<usize>>>()?;
    let mut bytes = Vec::new();
    std::io::stdin().read_to_end(&mut bytes)?;
    let numbers: Vec<f32> = bytes
        .chunks_exact(4)
        .map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]]))
        .collect();
    let qkv = Tensor::from_vec(numbers, [&[3], &shape[..]].concat(), &Device::Cpu)?;

    let causal = Attention::new(Options {
        causal: true,
        ..Options::default()
    });
    let (output, lse) = causal.forward_with_lse(&qkv.get(0)?, &qkv.get(1)?, &qkv.get(2)?)?;

    for tensor in [output, lse] {
        for number in tensor.flatten_all()?.to_vec1::<f32>()? {
            std::io::stdout().write_all(&number.to_le_bytes())?;
        }
    }
    Ok(())
}
