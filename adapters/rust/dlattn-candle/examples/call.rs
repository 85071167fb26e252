//! What one call costs on a tiny problem, beside candle's own operations.
//!
//!     DLATTN_LIBRARY=bazel-bin/libdlattn.so.1 cargo run --release --example call [cuda]
//!
//! Prints a line for each implementation: device, type, name, kernel, median in microseconds and
//! spread in percent. On a GPU it is the host's time to enqueue.

use candle_core::{DType, Device, Result, Tensor, D};
use dlattn::{Library, TensorMut, Tensors};
use dlattn_candle::{attention, Options};
use std::time::Instant;

const SHAPE: [usize; 4] = [1, 4, 16, 64];

/// Median and spread (between the quartiles, in percent) of short runs, some of which a busy machine
/// interrupts.
fn measure(mut call: impl FnMut() -> Result<()>, device: &Device) -> Result<(f64, f64)> {
    const CALLS: u32 = 50;
    let mut runs = Vec::new();
    for _ in 0..201 {
        device.synchronize()?;
        let began = Instant::now();
        for _ in 0..CALLS {
            call()?;
        }
        runs.push(began.elapsed().as_secs_f64() * 1e6 / f64::from(CALLS));
    }
    runs.sort_by(f64::total_cmp);
    Ok((runs[100], (runs[150] - runs[50]) / runs[100] * 100.0))
}

fn candle_attention(query: &Tensor, key: &Tensor, value: &Tensor) -> Result<Tensor> {
    let logits = (query.matmul(&key.t()?)? / (SHAPE[3] as f64).sqrt())?;
    let exp = logits
        .broadcast_sub(&logits.max_keepdim(D::Minus1)?)?
        .exp()?;
    exp.broadcast_div(&exp.sum_keepdim(D::Minus1)?)?
        .matmul(value)
}

fn main() -> Result<()> {
    let on_gpu = std::env::args().any(|word| word == "cuda");
    let (device, dtype) = if on_gpu {
        (Device::new_cuda(0)?, DType::F16)
    } else {
        (Device::Cpu, DType::F32)
    };
    let name = if on_gpu { "cuda" } else { "cpu" };
    let random = || Tensor::randn(0f32, 1.0, &SHAPE, &device)?.to_dtype(dtype);
    let (query, key, value) = (random()?, random()?, random()?);
    let options = Options::default();
    let report = |what: &str, kernel: &str, (median, spread): (f64, f64)| {
        println!(
            "{name} {} {what} {kernel} {median:.3} {spread:.1}",
            dtype.as_str()
        );
    };

    let mut kernel = "-".to_string();
    if !on_gpu {
        // The crate below, without candle's tensors: what the library itself takes.
        let (q, k, v) = (flat(&query)?, flat(&key)?, flat(&value)?);
        let mut o = vec![0f32; q.len()];
        let view = |data| dlattn::Tensor::new(data, &SHAPE).map_err(candle_core::Error::wrap);
        let output = TensorMut::new(&mut o, &SHAPE).map_err(candle_core::Error::wrap)?;
        let mut tensors = Tensors::new(view(&q)?, view(&k)?, view(&v)?, output);
        let library = Library::get().map_err(candle_core::Error::wrap)?;
        let plan = library
            .plan(&options, &tensors)
            .map_err(candle_core::Error::wrap)?;
        kernel = plan
            .sku()
            .map_err(candle_core::Error::wrap)?
            .kernel
            .to_string();
        let forward = |tensors: &mut Tensors<'_>| library.forward(&options, tensors);
        report(
            "rust-forward",
            &kernel,
            measure(
                || forward(&mut tensors).map_err(candle_core::Error::wrap),
                &device,
            )?,
        );
        report(
            "rust-plan",
            &kernel,
            measure(
                || plan.run(&mut tensors).map_err(candle_core::Error::wrap),
                &device,
            )?,
        );
    }
    let ours = || attention(&query, &key, &value, &options).map(drop);
    report("candle-dlattn", &kernel, measure(ours, &device)?);
    let own = || candle_attention(&query, &key, &value).map(drop);
    report("candle-ops", "-", measure(own, &device)?);
    Ok(())
}

fn flat(tensor: &Tensor) -> Result<Vec<f32>> {
    tensor.flatten_all()?.to_vec1()
}
