//! Attention of `libdlattn.so.1` as an operation of candle, on the CPU and, with the feature `cuda`,
//! on CUDA devices, where it is enqueued on candle's own stream.
//!
//! ```no_run
//! use candle_core::{Device, Tensor};
//! use dlattn_candle::{attention, Options};
//!
//! let q = Tensor::randn(0f32, 1.0, (1, 8, 128, 64), &Device::Cpu)?; // [B, H, L, D]
//! let kv = Tensor::randn(0f32, 1.0, (1, 2, 128, 64), &Device::Cpu)?; // two heads for eight: GQA
//! let causal = Options { causal: true, ..Options::default() };
//! let output = attention(&q, &kv, &kv, &causal)?;
//! # Ok::<(), candle_core::Error>(())
//! ```
//!
//! Tensors are f16, bf16, f32 or f64 (key and value, on the CPU, also F8E4M3), with any strides:
//! transposed, narrowed and broadcast views are read where they are. Errors are candle's, with the
//! library's message. The library is found as [`dlattn::Library::get`] says. Gradients of query, key
//! and value are the library's, too, those that candle tracks alone; where one would have to flow into
//! an optional tensor, candle's `backward` says so.

mod cpu;
#[cfg(feature = "cuda")]
mod cuda;

use candle_core::{
    CpuStorage, CustomOp3, DType, Device, Error, Layout, Result, Shape, Storage, StorageRef, Tensor,
};
pub use dlattn::{Alignment, Options};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};

/// softmax(scale · Q Kᵀ + mask) V under `options`. See [`Attention::forward`].
///
/// # Errors
/// As there.
pub fn attention(
    query: &Tensor,
    key: &Tensor,
    value: &Tensor,
    options: &Options,
) -> Result<Tensor> {
    Attention::new(options.clone()).forward(query, key, value)
}

/// Attention with everything that is not query, key or value. The default is dense attention.
#[derive(Clone, Debug, Default)]
pub struct Attention {
    /// Masks, scale and the choice of kernel.
    pub options: Options,
    /// f32 or the inputs' type `[B|1, H|1, Lq|1, Lk|1]`, axes in front may be left out: added to the
    /// logits.
    pub bias: Option<Tensor>,
    /// u8 of such a shape: non-zero is visible.
    pub mask: Option<Tensor>,
    /// f32 `[H]` or `[B, H]`; other floats are converted.
    pub alibi_slopes: Option<Tensor>,
    /// f32 `[H]`, other floats are converted: a logit in the denominator that carries no value.
    pub sinks: Option<Tensor>,
    /// Integers `[B]`: rows from there on give 0. i32, and u32 on a GPU, are read in place; others are
    /// converted on the host, which waits for a GPU. So it is for those that follow.
    pub query_lengths: Option<Tensor>,
    /// Integers `[B]`: keys from there on are never read.
    pub key_lengths: Option<Tensor>,
    /// Integers `[B + 1]`: where each sequence of a packed query begins, then their total.
    pub cu_seqlens_q: Option<Tensor>,
    /// Integers `[B + 1]`: the same for keys.
    pub cu_seqlens_k: Option<Tensor>,
    /// Integers `[B, max_pages]`: the pages of a paged key and value.
    pub block_table: Option<Tensor>,
    /// f32 `[1]` or `[B|1, H|1]`, other floats are converted: what is multiplied with the query.
    pub query_scale: Option<Tensor>,
    /// The same for the key, `[B|1, H_kv|1]`, of pages `[pages|1, H_kv|1]`.
    pub key_scale: Option<Tensor>,
    /// The same for the value.
    pub value_scale: Option<Tensor>,
}

impl Attention {
    /// Attention under `options`; the optional tensors are absent.
    pub fn new(options: Options) -> Self {
        Self {
            options,
            ..Self::default()
        }
    }

    /// Computes `[B, H, Lq, D_v]` from query `[B, H, Lq, D]`, key `[B, H_kv, Lk, D]` and value
    /// `[B, H_kv, Lk, D_v]`; packed, `[total_q, H, D_v]` from `[total_q, H, D]` and so on. H is a
    /// multiple of `H_kv`. The result is contiguous and of the query's type.
    ///
    /// # Errors
    /// What the library refuses, in its words; that it was not found, with the places searched.
    pub fn forward(&self, query: &Tensor, key: &Tensor, value: &Tensor) -> Result<Tensor> {
        if [query, key, value].iter().any(|t| t.track_op()) {
            return Ok(self.forward_with_lse(query, key, value)?.0); // the gradients need it
        }
        query.apply_op3(
            key,
            value,
            Forward {
                attention: self.prepared(query, key, value)?,
                lse: None,
                saved: SavedLse::default(),
            },
        )
    }

    /// The same, and the natural log-sum-exp of each row's logits, f32 `[B, H, Lq]` or packed
    /// `[H, total_q]`; no gradient flows through that one.
    ///
    /// # Errors
    /// As [`forward`](Self::forward).
    pub fn forward_with_lse(
        &self,
        query: &Tensor,
        key: &Tensor,
        value: &Tensor,
    ) -> Result<(Tensor, Tensor)> {
        let (slot, saved) = (LseSlot::default(), SavedLse::default());
        let op = Forward {
            attention: self.prepared(query, key, value)?,
            lse: Some(slot.clone()),
            saved: saved.clone(),
        };
        let output = query.apply_op3(key, value, op)?;
        let (storage, shape) = lock(&slot)
            .take()
            .ok_or_else(|| Error::msg("dlattn: this device gave no log-sum-exp"))?;
        let lse = constant(storage, shape);
        Ok((output, saved.get_or_init(|| lse).clone()))
    }

    /// The same with optional tensors of the types and numbers of axes that the library reads.
    fn prepared(&self, query: &Tensor, key: &Tensor, value: &Tensor) -> Result<Self> {
        let mut all = self.clone();
        for (name, tensor) in [("query", query), ("key", key), ("value", value)] {
            expect_device(name, tensor, query.device())?;
            if tensor.dtype() != DType::F8E4M3 || name == "query" || !tensor.device().is_cpu() {
                expect_float(name, tensor)?;
            }
        }
        for (name, tensor) in [("bias", &mut all.bias), ("mask", &mut all.mask)] {
            replace(tensor, |mut t| {
                expect_device(name, &t, query.device())?;
                if t.dtype() != DType::U8 {
                    expect_float(name, &t)?;
                }
                while t.rank() < 4 {
                    t = t.unsqueeze(0)?;
                }
                Ok(t)
            })?;
        }
        for (name, tensor) in [
            ("alibi_slopes", &mut all.alibi_slopes),
            ("sinks", &mut all.sinks),
            ("query_scale", &mut all.query_scale),
            ("key_scale", &mut all.key_scale),
            ("value_scale", &mut all.value_scale),
        ] {
            replace(tensor, |t| {
                expect_device(name, &t, query.device())?;
                expect_float(name, &t)?;
                t.to_dtype(DType::F32)
            })?;
        }
        for (name, tensor) in [
            ("query_lengths", &mut all.query_lengths),
            ("key_lengths", &mut all.key_lengths),
            ("cu_seqlens_q", &mut all.cu_seqlens_q),
            ("cu_seqlens_k", &mut all.cu_seqlens_k),
            ("block_table", &mut all.block_table),
        ] {
            replace(tensor, |t| {
                expect_device(name, &t, query.device())?;
                in_32_bits(name, t)
            })?;
        }
        Ok(all)
    }

    /// The optional tensors in the order of [`set_extras`].
    fn extras(&self) -> [&Option<Tensor>; EXTRAS] {
        [
            &self.bias,
            &self.mask,
            &self.alibi_slopes,
            &self.sinks,
            &self.query_lengths,
            &self.key_lengths,
            &self.cu_seqlens_q,
            &self.cu_seqlens_k,
            &self.block_table,
            &self.query_scale,
            &self.key_scale,
            &self.value_scale,
        ]
    }
}

fn replace(tensor: &mut Option<Tensor>, with: impl FnOnce(Tensor) -> Result<Tensor>) -> Result<()> {
    *tensor = tensor.take().map(with).transpose()?;
    Ok(())
}

fn expect_device(name: &str, tensor: &Tensor, device: &Device) -> Result<()> {
    if tensor.device().same_device(device) {
        return Ok(());
    }
    let (on, query_on) = (tensor.device().location(), device.location());
    Err(Error::msg(format!(
        "dlattn: {name}: is on {on:?}, query is on {query_on:?}"
    )))
}

fn expect_float(name: &str, tensor: &Tensor) -> Result<()> {
    match tensor.dtype() {
        DType::F16 | DType::BF16 | DType::F32 | DType::F64 => Ok(()),
        other => refuse_dtype(name, other),
    }
}

fn refuse_dtype<T>(name: &str, dtype: DType) -> Result<T> {
    Err(Error::msg(format!(
        "dlattn: {name}: candle's {dtype:?} is not among the types it takes"
    )))
}

/// Integers as i32, or as u32 whose values i32 has, too; on a GPU those of u32 are not looked at.
fn in_32_bits(name: &str, tensor: Tensor) -> Result<Tensor> {
    let dtype = tensor.dtype();
    if dtype == DType::I32 || (dtype == DType::U32 && !tensor.device().is_cpu()) {
        return Ok(tensor);
    }
    if !dtype.is_int() {
        return refuse_dtype(name, dtype);
    }
    let values = tensor
        .to_dtype(DType::I64)?
        .flatten_all()?
        .to_vec1::<i64>()?;
    let values = values.into_iter().map(|n| {
        i32::try_from(n).map_err(|_| {
            Error::msg(format!(
                "dlattn: {name}: holds {n}, which does not fit into i32"
            ))
        })
    });
    Tensor::from_vec(
        values.collect::<Result<Vec<i32>>>()?,
        tensor.shape(),
        tensor.device(),
    )
}

const EXTRAS: usize = 12;

fn set_extras<'a>(tensors: &mut dlattn::Tensors<'a>, extras: [Option<dlattn::Tensor<'a>>; EXTRAS]) {
    [
        tensors.bias,
        tensors.mask,
        tensors.alibi_slopes,
        tensors.sinks,
        tensors.query_lengths,
        tensors.key_lengths,
        tensors.cu_seqlens_q,
        tensors.cu_seqlens_k,
        tensors.block_table,
        tensors.query_scale,
        tensors.key_scale,
        tensors.value_scale,
    ] = extras;
}

type LseSlot = Arc<Mutex<Option<(Storage, Shape)>>>;

/// The log-sum-exp that the backward pass reads.
type SavedLse = Arc<OnceLock<Tensor>>;

/// A tensor into which no gradient flows.
fn constant(storage: Storage, shape: impl Into<Shape>) -> Tensor {
    Tensor::from_storage(storage, shape, candle_core::op::BackpropOp::none(), false)
}

fn lock(slot: &LseSlot) -> MutexGuard<'_, Option<(Storage, Shape)>> {
    slot.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The operation that candle runs. candle knows operations of one result, so the log-sum-exp leaves
/// through a slot.
struct Forward {
    attention: Attention,
    lse: Option<LseSlot>,
    saved: SavedLse,
}

/// What the backward pass reads, and which gradients it writes: those of the tensors that candle
/// tracks.
struct Backward<'a> {
    inputs: [&'a Tensor; 3],
    output: &'a Tensor,
    lse: &'a Tensor,
    d_output: Tensor,
}

impl Backward<'_> {
    /// Everything that is read, in this order.
    fn all(&self) -> [&Tensor; 6] {
        let [query, key, value] = self.inputs;
        [query, key, value, self.output, self.lse, &self.d_output]
    }

    fn is_wanted(&self, input: usize) -> bool {
        self.inputs[input].track_op()
    }

    /// What was made of the gradients, as candle's tensors.
    fn gradients<T>(&self, made: [Option<T>; 3], storage: impl Fn(T) -> Storage) -> Gradients {
        let mut inputs = self.inputs.into_iter();
        made.map(|data| {
            let shape = inputs.next()?.shape().clone();
            Some(constant(storage(data?), shape))
        })
    }
}

/// The call of backward: what it reads, in the order of `Backward::all()`, with what forward had
/// besides, and room for the gradients that are wanted.
fn backward_call<'a>(
    read: [Option<dlattn::Tensor<'a>>; 6],
    extras: [Option<dlattn::Tensor<'a>>; EXTRAS],
    d_inputs: [Option<dlattn::TensorMut<'a>>; 3],
) -> Result<(dlattn::Tensors<'a>, dlattn::Gradients<'a>)> {
    let [Some(query), Some(key), Some(value), Some(output), Some(lse), Some(d_output)] = read
    else {
        return Err(Error::msg("dlattn: a tensor of the forward pass is gone"));
    };
    // SAFETY: backward writes neither of the two.
    let (output, lse) = unsafe {
        (
            dlattn::TensorMut::for_reading(output),
            dlattn::TensorMut::for_reading(lse),
        )
    };
    let mut tensors = dlattn::Tensors::new(query, key, value, output);
    tensors.lse = Some(lse);
    set_extras(&mut tensors, extras);
    let mut gradients = dlattn::Gradients::new(d_output);
    [gradients.d_query, gradients.d_key, gradients.d_value] = d_inputs;
    Ok((tensors, gradients))
}

impl Forward {
    fn give_lse(&self, storage: Storage, shape: Shape) {
        if let Some(slot) = &self.lse {
            *lock(slot) = Some((storage, shape));
        }
    }

    /// The optional tensors, locked for reading.
    fn lock_extras(&self) -> [Option<(StorageRef<'_>, &Layout)>; EXTRAS] {
        self.attention
            .extras()
            .map(|tensor| tensor.as_ref().map(Tensor::storage_and_layout))
    }
}

type Gradients = [Option<Tensor>; 3];

impl Forward {
    fn backward(&self, call: &Backward<'_>) -> Result<Gradients> {
        let attention = &self.attention;
        for (name, tensor) in [
            ("bias", &attention.bias),
            ("alibi_slopes", &attention.alibi_slopes),
            ("sinks", &attention.sinks),
        ] {
            if tensor.as_ref().is_some_and(Tensor::track_op) {
                return Err(Error::msg(format!(
                    "dlattn: {name}: has no gradient in candle; give it detached"
                )));
            }
        }
        match call.output.device() {
            Device::Cpu => cpu::backward(self, call),
            #[cfg(feature = "cuda")]
            Device::Cuda(_) => cuda::backward(self, call),
            other => Err(Error::msg(format!(
                "dlattn: no gradients on {:?}",
                other.location()
            ))),
        }
    }
}

impl CustomOp3 for Forward {
    fn name(&self) -> &'static str {
        "dlattn"
    }

    fn cpu_fwd(
        &self,
        query: &CpuStorage,
        query_layout: &Layout,
        key: &CpuStorage,
        key_layout: &Layout,
        value: &CpuStorage,
        value_layout: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        cpu::forward(
            self,
            (query, query_layout),
            (key, key_layout),
            (value, value_layout),
        )
    }

    #[cfg(feature = "cuda")]
    fn cuda_fwd(
        &self,
        query: &candle_core::CudaStorage,
        query_layout: &Layout,
        key: &candle_core::CudaStorage,
        key_layout: &Layout,
        value: &candle_core::CudaStorage,
        value_layout: &Layout,
    ) -> Result<(candle_core::CudaStorage, Shape)> {
        cuda::forward(
            self,
            (query, query_layout),
            (key, key_layout),
            (value, value_layout),
        )
    }

    fn bwd(
        &self,
        query: &Tensor,
        key: &Tensor,
        value: &Tensor,
        output: &Tensor,
        d_output: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>, Option<Tensor>)> {
        let lse = self
            .saved
            .get()
            .ok_or_else(|| Error::msg("dlattn: the forward pass kept no log-sum-exp"))?;
        let [d_query, d_key, d_value] = self.backward(&Backward {
            inputs: [query, key, value],
            output,
            lse,
            d_output: d_output.contiguous()?,
        })?;
        Ok((d_query, d_key, d_value))
    }
}

/// The output's dimensions: the query's, with the value's head_dim.
fn output_dims(query: &Layout, value: &Layout) -> Vec<usize> {
    let mut dims = query.dims().to_vec();
    if let (Some(last), Some(&head_dim)) = (dims.last_mut(), value.dims().last()) {
        *last = head_dim;
    }
    dims
}

/// The log-sum-exp's dimensions: `[B, H, Lq]`, packed `[H, total_q]`.
fn lse_dims(query: &Layout) -> Vec<usize> {
    match query.dims() {
        [total, heads, _] => vec![*heads, *total],
        dims => dims[..dims.len().saturating_sub(1)].to_vec(),
    }
}

fn no_dtype<T>(dtype: candle_core::DType) -> Result<T> {
    Err(Error::msg(format!(
        "dlattn: candle's {dtype:?} is not among the types it takes"
    )))
}
