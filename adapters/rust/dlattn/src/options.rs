use crate::ffi::{self, DLTensor};
use crate::{Device, Error, Status, Tensor, TensorMut};
use std::ffi::CString;
use std::ptr::null;

/// Where the diagonal lies when there are fewer or more queries than keys. It places the causal
/// mask, the window and ALiBi alike.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Alignment {
    /// Row 0 meets key 0, as in PyTorch and JAX.
    #[default]
    TopLeft,
    /// The last row meets the last key, as in FlashAttention and in decoding.
    BottomRight,
}

/// What to compute. The default is softmax(Q Kᵀ / √D) V over every key.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Options {
    /// Factor of the products of queries and keys; `None` is 1 / √D.
    pub scale: Option<f64>,
    /// c > 0 caps the logits at c · tanh(s / c); 0 is none.
    pub softcap: f64,
    /// Row i sees keys up to i (plus the offset of `alignment`).
    pub causal: bool,
    /// Row i sees keys from i minus this one on.
    pub window_left: Option<u32>,
    /// Row i sees keys up to i plus this one.
    pub window_right: Option<u32>,
    /// What i is compared with.
    pub alignment: Alignment,
    /// A row that sees no key gets a log-sum-exp of +∞, as in FlashAttention 2, instead of −∞.
    pub empty_lse_inf: bool,
    /// With `cu_seqlens_q`: the longest sequence of queries; 0 is the total.
    pub max_seqlen_q: usize,
    /// With `cu_seqlens_k`: the longest sequence of keys; 0 is the total.
    pub max_seqlen_k: usize,
    /// Run this kernel or refuse; `None` is the first that accepts.
    pub kernel: Option<String>,
    /// CPU threads; 0 is as many as pay, of `DLATTN_NUM_THREADS` or the process's cores.
    pub num_threads: u32,
}

impl Options {
    /// Calls `body` with the options as the library reads them.
    pub(crate) fn with_raw<R>(
        &self,
        body: impl FnOnce(&ffi::ForwardDesc) -> Result<R, Error>,
    ) -> Result<R, Error> {
        let kernel = match &self.kernel {
            Some(name) => Some(CString::new(name.as_str()).map_err(|_| Error::Call {
                status: Status::InvalidArgument,
                message: format!("kernel: there is no kernel {name:?}"),
            })?),
            None => None,
        };
        let window = |bound: Option<u32>| bound.map_or(-1, i64::from);
        let mut flags = 0;
        if self.window_left.is_some() || self.window_right.is_some() {
            flags |= ffi::WINDOW;
        }
        if self.scale.is_some() {
            flags |= ffi::EXACT_SCALE;
        }
        if self.empty_lse_inf {
            flags |= ffi::EMPTY_LSE_INF;
        }
        body(&ffi::ForwardDesc {
            struct_size: size_of::<ffi::ForwardDesc>(),
            flags,
            scale: self.scale.unwrap_or(0.0),
            softcap: self.softcap,
            window_left: if flags & ffi::WINDOW == 0 {
                0
            } else {
                window(self.window_left)
            },
            window_right: if flags & ffi::WINDOW == 0 {
                0
            } else {
                window(self.window_right)
            },
            causal: i32::from(self.causal),
            alignment: self.alignment as i32,
            max_seqlen_q: i64::try_from(self.max_seqlen_q).unwrap_or(i64::MAX),
            max_seqlen_k: i64::try_from(self.max_seqlen_k).unwrap_or(i64::MAX),
            kernel: kernel.as_ref().map_or(null(), |name| name.as_ptr()),
            num_threads: i32::try_from(self.num_threads).unwrap_or(i32::MAX),
            reserved0: 0,
        })
    }
}

/// The tensors of one call, all on one device. E is f16, bf16, f32 or f64, the same for query, key,
/// value and output; query, key and value may also hold float8, each its own
/// ([`Tensor::holding`]).
#[derive(Debug)]
pub struct Tensors<'a> {
    /// E `[B, H, Lq, D]`, or packed `[total_q, H, D]` with `cu_seqlens_q`.
    pub query: Tensor<'a>,
    /// E `[B, H_kv, Lk, D]`, packed `[total_k, H_kv, D]`, or pages `[pages, H_kv, page_size, D]`
    /// with `block_table`; H is a multiple of `H_kv`.
    pub key: Tensor<'a>,
    /// E `[B, H_kv, Lk, D_v]`, or as `key`.
    pub value: Tensor<'a>,
    /// E `[B, H, Lq, D_v]`, or packed `[total_q, H, D_v]`; written whole.
    pub output: TensorMut<'a>,
    /// f32 or E `[B, H, Lq]`, or packed `[H, total_q]`: the natural logarithm of each row's sum.
    pub lse: Option<TensorMut<'a>>,
    /// f32 or E `[B|1, H|1, Lq|1, Lk|1]`: added to the (capped) logits.
    pub bias: Option<Tensor<'a>>,
    /// bool or u8 `[B|1, H|1, Lq|1, Lk|1]`: non-zero is visible.
    pub mask: Option<Tensor<'a>>,
    /// f32 `[H]` or `[B, H]`.
    pub alibi_slopes: Option<Tensor<'a>>,
    /// f32 `[H]`: a logit in the denominator that carries no value.
    pub sinks: Option<Tensor<'a>>,
    /// i32 `[B]`: rows from there on give 0.
    pub query_lengths: Option<Tensor<'a>>,
    /// i32 `[B]`: keys from there on are never read.
    pub key_lengths: Option<Tensor<'a>>,
    /// i32 `[B + 1]`, ascending from 0 to `total_q`.
    pub cu_seqlens_q: Option<Tensor<'a>>,
    /// i32 `[B + 1]`, ascending from 0 to `total_k`.
    pub cu_seqlens_k: Option<Tensor<'a>>,
    /// i32 `[B, max_pages]`: the page of each `page_size` keys of a batch.
    pub block_table: Option<Tensor<'a>>,
    /// f32 `[1]` or `[B|1, H|1]`, positive and finite: what is multiplied with the query.
    pub query_scale: Option<Tensor<'a>>,
    /// f32 `[1]` or `[B|1, H_kv|1]`, of pages `[pages|1, H_kv|1]`: the same for the key.
    pub key_scale: Option<Tensor<'a>>,
    /// As `key_scale`, for the value.
    pub value_scale: Option<Tensor<'a>>,
}

impl<'a> Tensors<'a> {
    /// The four tensors that every call has; the rest is absent.
    pub fn new(
        query: Tensor<'a>,
        key: Tensor<'a>,
        value: Tensor<'a>,
        output: TensorMut<'a>,
    ) -> Self {
        Self {
            query,
            key,
            value,
            output,
            lse: None,
            bias: None,
            mask: None,
            alibi_slopes: None,
            sinks: None,
            query_lengths: None,
            key_lengths: None,
            cu_seqlens_q: None,
            cu_seqlens_k: None,
            block_table: None,
            query_scale: None,
            key_scale: None,
            value_scale: None,
        }
    }

    pub(crate) fn device(&self) -> Device {
        self.query.device()
    }

    /// Calls `body` with the tensors as the library reads them.
    pub(crate) fn with_raw<R>(&self, body: impl FnOnce(&ffi::Tensors) -> R) -> R {
        let (query, key, value) = (self.query.dl(), self.key.dl(), self.value.dl());
        let output = self.output.dl();
        let lse = self.lse.as_ref().map(TensorMut::dl);
        let inputs = [
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
        .map(|tensor| tensor.as_ref().map(Tensor::dl));
        body(&ffi::Tensors {
            struct_size: size_of::<ffi::Tensors>(),
            query: &query,
            key: &key,
            value: &value,
            output: &output,
            lse: at(&lse),
            bias: at(&inputs[0]),
            mask: at(&inputs[1]),
            alibi_slopes: at(&inputs[2]),
            sinks: at(&inputs[3]),
            query_lengths: at(&inputs[4]),
            key_lengths: at(&inputs[5]),
            cu_seqlens_q: at(&inputs[6]),
            cu_seqlens_k: at(&inputs[7]),
            block_table: at(&inputs[8]),
            query_segments: null(),
            key_segments: null(),
            block_mask: null(),
            query_scale: at(&inputs[9]),
            key_scale: at(&inputs[10]),
            value_scale: at(&inputs[11]),
        })
    }
}

fn at(tensor: &Option<DLTensor>) -> *const DLTensor {
    tensor.as_ref().map_or(null(), |t| t as *const _)
}

/// What a backward call takes beside the tensors of its forward call. The gradients that are absent
/// are not computed; at least one is there. Each has the shape of its tensor, the tensor's type or
/// f32, and is written whole.
#[derive(Debug)]
pub struct Gradients<'a> {
    /// As the output, of its type or f32.
    pub d_output: Tensor<'a>,
    /// As the log-sum-exp, of its type or f32; absent is 0.
    pub d_lse: Option<Tensor<'a>>,
    /// As the query.
    pub d_query: Option<TensorMut<'a>>,
    /// As the key.
    pub d_key: Option<TensorMut<'a>>,
    /// As the value.
    pub d_value: Option<TensorMut<'a>>,
    /// As the bias: the sum over what an axis of 1 stands for.
    pub d_bias: Option<TensorMut<'a>>,
    /// As `alibi_slopes`, f32.
    pub d_alibi_slopes: Option<TensorMut<'a>>,
    /// As `sinks`, f32.
    pub d_sinks: Option<TensorMut<'a>>,
}

impl<'a> Gradients<'a> {
    /// None is wanted yet.
    pub fn new(d_output: Tensor<'a>) -> Self {
        Self {
            d_output,
            d_lse: None,
            d_query: None,
            d_key: None,
            d_value: None,
            d_bias: None,
            d_alibi_slopes: None,
            d_sinks: None,
        }
    }

    /// Calls `body` with the tensors as the library reads them.
    pub(crate) fn with_raw<R>(&self, body: impl FnOnce(&ffi::Gradients) -> R) -> R {
        let d_output = self.d_output.dl();
        let d_lse = self.d_lse.as_ref().map(Tensor::dl);
        let written = [
            &self.d_query,
            &self.d_key,
            &self.d_value,
            &self.d_bias,
            &self.d_alibi_slopes,
            &self.d_sinks,
        ]
        .map(|tensor| tensor.as_ref().map(TensorMut::dl));
        body(&ffi::Gradients {
            struct_size: size_of::<ffi::Gradients>(),
            d_output: &d_output,
            d_lse: at(&d_lse),
            d_query: at(&written[0]),
            d_key: at(&written[1]),
            d_value: at(&written[2]),
            d_bias: at(&written[3]),
            d_alibi_slopes: at(&written[4]),
            d_sinks: at(&written[5]),
        })
    }
}

/// New keys and values, and the cache behind whose rows they go, all in host memory. E is f16, bf16,
/// f32 or f64; the caches may be of another of them or hold float8 ([`TensorMut::holding`]).
#[derive(Debug)]
pub struct Append<'a> {
    /// E `[B, H_kv, Ln, D]`, or packed `[total, H_kv, D]` with `cu_seqlens`.
    pub key: Tensor<'a>,
    /// E `[B, H_kv, Ln, D_v]`, or as `key`.
    pub value: Tensor<'a>,
    /// `[B, H_kv, capacity, D]`, or pages `[pages, H_kv, page_size, D]` with `block_table`.
    pub key_cache: TensorMut<'a>,
    /// The same with `D_v`.
    pub value_cache: TensorMut<'a>,
    /// i32 `[B]`: rows that are there; it stays as it is.
    pub cache_lengths: Tensor<'a>,
    /// i32 `[B]`: rows of key and value from there on are left out.
    pub new_lengths: Option<Tensor<'a>>,
    /// i32 `[B + 1]`, ascending from 0 to `total`.
    pub cu_seqlens: Option<Tensor<'a>>,
    /// i32 `[B, max_pages]`.
    pub block_table: Option<Tensor<'a>>,
    /// f32 `[1]` or `[B|1, H_kv|1]`, of pages `[pages|1, H_kv|1]`, positive and finite: what keys are
    /// divided by.
    pub key_scale: Option<Tensor<'a>>,
    /// The same for values.
    pub value_scale: Option<Tensor<'a>>,
}

impl Append<'_> {
    /// Calls `body` with the tensors as the library reads them.
    pub(crate) fn with_raw<R>(&self, body: impl FnOnce(&ffi::AppendTensors) -> R) -> R {
        let (key, value) = (self.key.dl(), self.value.dl());
        let (key_cache, value_cache) = (self.key_cache.dl(), self.value_cache.dl());
        let cache_lengths = self.cache_lengths.dl();
        let optional = [
            &self.new_lengths,
            &self.cu_seqlens,
            &self.block_table,
            &self.key_scale,
            &self.value_scale,
        ]
        .map(|tensor| tensor.as_ref().map(Tensor::dl));
        let own = ffi::DLDataType {
            code: 0,
            bits: 0,
            lanes: 0,
        };
        body(&ffi::AppendTensors {
            struct_size: size_of::<ffi::AppendTensors>(),
            key: &key,
            value: &value,
            key_cache: &key_cache,
            value_cache: &value_cache,
            cache_lengths: &cache_lengths,
            new_lengths: at(&optional[0]),
            cu_seqlens: at(&optional[1]),
            block_table: at(&optional[2]),
            key_scale: at(&optional[3]),
            value_scale: at(&optional[4]),
            key_cache_dtype: own,
            value_cache_dtype: own,
        })
    }
}
