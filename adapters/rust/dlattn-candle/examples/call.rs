//! What one call costs on a tiny problem, beside candle's own operations.
//!
//!     DLATTN_LIBRARY=bazel-bin/libdlattn.so.1 cargo run --release --example call [cuda]
//!
//! Prints a line for each implementation: name, kernel, median in microseconds and spread (between
//! the quartiles, in percent). They take turns, 201 runs of 50 calls each. On the CPU in f32 also
//! what the crate below takes, without candle's tensors; on a GPU, in f16, it is the host's time to
//! enqueue.

use candle_core::{DType, Error, Result, Tensor, D};
use dlattn::{compact, Device, Element, Library, TensorMut, Tensors};
use dlattn_candle::{attention, Options};
use std::ptr::null_mut;
use std::time::Instant;

const SHAPE: [usize; 4] = [1, 4, 16, 64];
const RUNS: usize = 201;
const CALLS: u32 = 50;

type Call<'a> = (&'a str, Box<dyn FnMut() -> Result<()> + 'a>);

fn main() -> Result<()> {
    let on_gpu = std::env::args().any(|word| word == "cuda");
    let (device, dtype) = if on_gpu {
        (candle_core::Device::new_cuda(0)?, DType::F16)
    } else {
        (candle_core::Device::Cpu, DType::F32)
    };
    let random = || Tensor::randn(0f32, 1.0, &SHAPE, &device)?.to_dtype(dtype);
    let (query, key, value) = (random()?, random()?, random()?);
    let options = Options::default();
    let library = Library::get().map_err(Error::wrap)?;
    let kernel = kernel(library, on_gpu).map_err(Error::wrap)?;

    let (q, k, v) = (flat(&query)?, flat(&key)?, flat(&value)?);
    let (mut o, mut p) = (vec![0f32; q.len()], vec![0f32; q.len()]);
    let mut tensors = host(&q, &k, &v, &mut o).map_err(Error::wrap)?;
    let mut planned = host(&q, &k, &v, &mut p).map_err(Error::wrap)?;
    let plan = library.plan(&options, &planned).map_err(Error::wrap)?;

    let mut calls: Vec<Call<'_>> = vec![
        (
            "candle-dlattn",
            Box::new(|| attention(&query, &key, &value, &options).map(drop)),
        ),
        (
            "candle",
            Box::new(|| candle_attention(&query, &key, &value).map(drop)),
        ),
    ];
    if !on_gpu {
        calls.push((
            "rust-dlattn",
            Box::new(|| library.forward(&options, &mut tensors).map_err(Error::wrap)),
        ));
        calls.push((
            "rust-dlattn-plan",
            Box::new(|| plan.run(&mut planned).map_err(Error::wrap)),
        ));
    }
    let figures = in_turns(&mut calls, || device.synchronize())?;
    for ((name, _), (median, spread)) in calls.iter().zip(figures) {
        let kernel = if name.contains("dlattn") {
            &kernel
        } else {
            "-"
        };
        println!("{name} {kernel} {median:.3} {spread:.1}");
    }
    Ok(())
}

/// Median and spread of short runs, some of which a busy machine interrupts.
fn in_turns(calls: &mut [Call<'_>], wait: impl Fn() -> Result<()>) -> Result<Vec<(f64, f64)>> {
    let mut runs = vec![Vec::new(); calls.len()];
    for (_, call) in calls.iter_mut() {
        call()?;
        wait()?;
    }
    for _ in 0..RUNS {
        for (times, (_, call)) in runs.iter_mut().zip(calls.iter_mut()) {
            let began = Instant::now();
            for _ in 0..CALLS {
                call()?;
            }
            times.push(began.elapsed().as_secs_f64() * 1e6 / f64::from(CALLS));
            wait()?;
        }
    }
    Ok(runs
        .into_iter()
        .map(|mut times| {
            times.sort_by(f64::total_cmp);
            let (low, median, high) = (times[RUNS / 4], times[RUNS / 2], times[RUNS * 3 / 4]);
            (median, (high - low) / median * 100.0)
        })
        .collect())
}

fn candle_attention(query: &Tensor, key: &Tensor, value: &Tensor) -> Result<Tensor> {
    let logits = (query.matmul(&key.t()?)? / (SHAPE[3] as f64).sqrt())?;
    let exp = logits
        .broadcast_sub(&logits.max_keepdim(D::Minus1)?)?
        .exp()?;
    exp.broadcast_div(&exp.sum_keepdim(D::Minus1)?)?
        .matmul(value)
}

/// The name of the kernel that the calls get: tensors without data tell it.
fn kernel(library: &Library, on_gpu: bool) -> std::result::Result<String, dlattn::Error> {
    let (device, dtype) = if on_gpu {
        (Device::Cuda(0), half::f16::DTYPE)
    } else {
        (Device::Cpu, f32::DTYPE)
    };
    // SAFETY: nothing reads them.
    let (tensor, output) = unsafe {
        (
            dlattn::Tensor::from_raw(null_mut(), device, dtype, &SHAPE, &compact(&SHAPE))?,
            TensorMut::from_raw(null_mut(), device, dtype, &SHAPE, &compact(&SHAPE))?,
        )
    };
    let tensors = Tensors::new(tensor, tensor, tensor, output);
    Ok(library
        .sku(&Options::default(), &tensors)?
        .kernel
        .to_string())
}

fn host<'a>(
    query: &'a [f32],
    key: &'a [f32],
    value: &'a [f32],
    output: &'a mut [f32],
) -> std::result::Result<Tensors<'a>, dlattn::Error> {
    Ok(Tensors::new(
        dlattn::Tensor::new(query, &SHAPE)?,
        dlattn::Tensor::new(key, &SHAPE)?,
        dlattn::Tensor::new(value, &SHAPE)?,
        TensorMut::new(output, &SHAPE)?,
    ))
}

fn flat(tensor: &Tensor) -> Result<Vec<f32>> {
    tensor.to_dtype(DType::F32)?.flatten_all()?.to_vec1()
}
