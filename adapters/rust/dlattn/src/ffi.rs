//! `abi/dlattn.h` and the part of DLPack that it uses, field by field.
//!
//! Every struct but [`DLTensor`] begins with `struct_size`, which the caller sets to its own size;
//! zero in any other field means "default" or "absent". The header has the meaning of each field.
#![allow(missing_docs)]

use std::ffi::{c_char, c_void};

/// The major version of the ABI that this crate speaks.
pub const ABI_MAJOR: u32 = 1;

pub const DL_CPU: i32 = 1;
pub const DL_CUDA: i32 = 2;

pub const DL_INT: u8 = 0;
pub const DL_UINT: u8 = 1;
pub const DL_FLOAT: u8 = 2;
pub const DL_BFLOAT: u8 = 4;
pub const DL_BOOL: u8 = 6;
pub const DL_FLOAT8_E4M3FN: u8 = 10;
pub const DL_FLOAT8_E5M2: u8 = 12;

/// `dlattn_sku.flags`
pub const KERNEL_REFERENCE: u64 = 1;

pub const WINDOW: u64 = 1;
pub const EXACT_SCALE: u64 = 2;
pub const EMPTY_LSE_INF: u64 = 4;

pub const OK: i32 = 0;
pub const BUFFER_TOO_SMALL: i32 = 3;

#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DLDataType {
    pub code: u8,
    pub bits: u8,
    pub lanes: u16,
}

#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct DLTensor {
    pub data: *mut c_void,
    pub device_type: i32,
    pub device_id: i32,
    pub ndim: i32,
    pub dtype: DLDataType,
    pub shape: *const i64,
    pub strides: *const i64,
    pub byte_offset: u64,
}

#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct ForwardDesc {
    pub struct_size: usize,
    pub flags: u64,
    pub scale: f64,
    pub softcap: f64,
    pub window_left: i64,
    pub window_right: i64,
    pub causal: i32,
    pub alignment: i32,
    pub max_seqlen_q: i64,
    pub max_seqlen_k: i64,
    pub kernel: *const c_char,
    pub num_threads: i32,
    pub reserved0: i32,
}

#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct Tensors {
    pub struct_size: usize,
    pub query: *const DLTensor,
    pub key: *const DLTensor,
    pub value: *const DLTensor,
    pub output: *const DLTensor,
    pub lse: *const DLTensor,
    pub bias: *const DLTensor,
    pub mask: *const DLTensor,
    pub alibi_slopes: *const DLTensor,
    pub sinks: *const DLTensor,
    pub query_lengths: *const DLTensor,
    pub key_lengths: *const DLTensor,
    pub cu_seqlens_q: *const DLTensor,
    pub cu_seqlens_k: *const DLTensor,
    pub block_table: *const DLTensor,
    // ABI 1.1
    pub query_segments: *const DLTensor,
    pub key_segments: *const DLTensor,
    pub block_mask: *const DLTensor,
    pub query_scale: *const DLTensor,
    pub key_scale: *const DLTensor,
    pub value_scale: *const DLTensor,
}

/// ABI 1.1.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct Gradients {
    pub struct_size: usize,
    pub d_output: *const DLTensor,
    pub d_lse: *const DLTensor,
    pub d_query: *const DLTensor,
    pub d_key: *const DLTensor,
    pub d_value: *const DLTensor,
    pub d_bias: *const DLTensor,
    pub d_alibi_slopes: *const DLTensor,
    pub d_sinks: *const DLTensor,
}

/// ABI 1.1.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct Partials {
    pub struct_size: usize,
    pub count: i64,
    pub outputs: *const *const DLTensor,
    pub lses: *const *const DLTensor,
    pub output: *const DLTensor,
    pub lse: *const DLTensor,
}

/// ABI 1.1.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct AppendTensors {
    pub struct_size: usize,
    pub key: *const DLTensor,
    pub value: *const DLTensor,
    pub key_cache: *const DLTensor,
    pub value_cache: *const DLTensor,
    pub cache_lengths: *const DLTensor,
    pub new_lengths: *const DLTensor,
    pub cu_seqlens: *const DLTensor,
    pub block_table: *const DLTensor,
    pub key_scale: *const DLTensor,
    pub value_scale: *const DLTensor,
    pub key_cache_dtype: DLDataType,
    pub value_cache_dtype: DLDataType,
}

pub type ParallelBody = unsafe extern "C" fn(body_ctx: *mut c_void, index: i64);
pub type ParallelFor =
    unsafe extern "C" fn(ctx: *mut c_void, count: i64, body: ParallelBody, body_ctx: *mut c_void);

#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct Exec {
    pub struct_size: usize,
    pub flags: u64,
    pub stream: *mut c_void,
    pub workspace: *mut c_void,
    pub workspace_bytes: usize,
    pub parallel_for: Option<ParallelFor>,
    pub parallel_ctx: *mut c_void,
}

#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct Sku {
    pub struct_size: usize,
    pub kernel: *const c_char,
    pub backend: *const c_char,
    pub arch: *const c_char,
    pub math: *const c_char,
    pub accumulator: *const c_char,
    pub features: u64,
    pub workspace_bytes: usize,
    pub workspace_alignment: usize,
    pub contiguous: i32,
    pub deterministic: i32,
    pub bit_stable: i32,
    pub tile_q: i32,
    pub tile_k: i32,
    pub num_splits: i32,
    pub num_threads: i32,
    pub reserved0: i32,
    pub operation: *const c_char,
    pub flags: u64,
}

#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct KernelInfo {
    pub struct_size: usize,
    pub name: *const c_char,
    pub operation: *const c_char,
    pub backend: *const c_char,
    pub arch: *const c_char,
    pub dtypes: *const c_char,
    pub features: u64,
    pub max_head_dim: i32,
    pub max_head_dim_v: i32,
    pub tile_q: i32,
    pub tile_k: i32,
    pub available: i32,
    pub reserved0: i32,
}

#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct DeviceInfo {
    pub struct_size: usize,
    pub device_type: i32,
    pub device_id: i32,
    pub name: [c_char; 128],
    pub arch: [c_char; 128],
    pub multiprocessors: i32,
    pub reserved0: i32,
    pub shared_memory_bytes: i64,
}

/// A plan, which only the library looks into.
#[repr(C)]
#[derive(Debug)]
pub struct Plan {
    _private: [u8; 0],
}

/// The table of functions; slots are only ever appended.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct Api {
    pub struct_size: usize,
    pub abi_major: u32,
    pub abi_minor: u32,
    pub version: unsafe extern "C" fn() -> *const c_char,
    pub last_error: unsafe extern "C" fn() -> *const c_char,
    pub status_name: unsafe extern "C" fn(i32) -> *const c_char,
    pub forward_query: unsafe extern "C" fn(*const ForwardDesc, *const Tensors, *mut Sku) -> i32,
    pub forward: unsafe extern "C" fn(*const ForwardDesc, *const Tensors, *const Exec) -> i32,
    pub forward_managed:
        unsafe extern "C" fn(*const ForwardDesc, *const c_void, *const Exec) -> i32,
    pub forward_versioned:
        unsafe extern "C" fn(*const ForwardDesc, *const c_void, *const Exec) -> i32,
    pub plan_create:
        unsafe extern "C" fn(*const ForwardDesc, *const Tensors, *mut *mut Plan) -> i32,
    pub plan_destroy: unsafe extern "C" fn(*mut Plan),
    pub plan_can_run: unsafe extern "C" fn(*const Plan, *const Tensors) -> i32,
    pub plan_sku: unsafe extern "C" fn(*const Plan, *mut Sku) -> i32,
    pub plan_run: unsafe extern "C" fn(*const Plan, *const Tensors, *const Exec) -> i32,
    pub kernel_count: unsafe extern "C" fn() -> i32,
    pub kernel_info: unsafe extern "C" fn(i32, *mut KernelInfo) -> i32,
    pub device_count: unsafe extern "C" fn() -> i32,
    pub device_info: unsafe extern "C" fn(i32, *mut DeviceInfo) -> i32,
}

/// The table of ABI 1.1, which a library has if its `struct_size` covers it.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct Api1_1 {
    pub api: Api,
    pub backward_query:
        unsafe extern "C" fn(*const ForwardDesc, *const Tensors, *const Gradients, *mut Sku) -> i32,
    pub backward: unsafe extern "C" fn(
        *const ForwardDesc,
        *const Tensors,
        *const Gradients,
        *const Exec,
    ) -> i32,
    pub backward_plan_create: unsafe extern "C" fn(
        *const ForwardDesc,
        *const Tensors,
        *const Gradients,
        *mut *mut Plan,
    ) -> i32,
    pub backward_plan_can_run:
        unsafe extern "C" fn(*const Plan, *const Tensors, *const Gradients) -> i32,
    pub backward_plan_run:
        unsafe extern "C" fn(*const Plan, *const Tensors, *const Gradients, *const Exec) -> i32,
    pub merge_query: unsafe extern "C" fn(*const Partials, *mut Sku) -> i32,
    pub merge: unsafe extern "C" fn(*const Partials, *const Exec) -> i32,
    pub append_query: unsafe extern "C" fn(*const AppendTensors, *mut Sku) -> i32,
    pub append: unsafe extern "C" fn(*const AppendTensors, *const Exec) -> i32,
}

/// `dlattn_get_api`, the one symbol that the library exports.
pub type GetApi = unsafe extern "C" fn(major: u32) -> *const Api;

// The layout of abi/dlattn.h on a 64-bit machine.
#[cfg(target_pointer_width = "64")]
const _: () = {
    use std::mem::{offset_of, size_of};
    assert!(size_of::<DLTensor>() == 48 && offset_of!(DLTensor, byte_offset) == 40);
    assert!(size_of::<ForwardDesc>() == 88 && offset_of!(ForwardDesc, kernel) == 72);
    assert!(size_of::<Tensors>() == 168 && offset_of!(Tensors, value_scale) == 160);
    assert!(size_of::<Exec>() == 56 && offset_of!(Exec, parallel_ctx) == 48);
    assert!(size_of::<Sku>() == 120 && offset_of!(Sku, contiguous) == 72);
    assert!(size_of::<Gradients>() == 72 && size_of::<Partials>() == 48);
    assert!(size_of::<AppendTensors>() == 96 && offset_of!(AppendTensors, key_scale) == 72);
    assert!(size_of::<KernelInfo>() == 80 && offset_of!(KernelInfo, max_head_dim) == 56);
    assert!(size_of::<DeviceInfo>() == 288 && offset_of!(DeviceInfo, multiprocessors) == 272);
    assert!(size_of::<Api>() == 144 && offset_of!(Api, device_info) == 136);
    assert!(size_of::<Api1_1>() == 216 && offset_of!(Api1_1, append) == 208);
};
