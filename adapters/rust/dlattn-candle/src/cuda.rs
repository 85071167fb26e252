use crate::{lse_dims, no_dtype, output_dims, set_extras, Forward};
use candle_core::backend::{BackendDevice, BackendStorage};
use candle_core::cuda_backend::cudarc::driver::{CudaStream, DevicePtr, DevicePtrMut, SyncOnDrop};
use candle_core::cuda_backend::{CudaDType, CudaDevice, CudaStorageSlice};
use candle_core::{CudaStorage, DeviceLocation, Error, Layout, Result, Shape, Storage};
use dlattn::{compact, Device, Element, Exec, Library, Status, Tensor, TensorMut, Tensors};
use half::{bf16, f16};
use std::ffi::c_void;

type Input<'a> = (&'a CudaStorage, &'a Layout);

pub(crate) fn forward(
    op: &Forward,
    query: Input<'_>,
    key: Input<'_>,
    value: Input<'_>,
) -> Result<(CudaStorage, Shape)> {
    match query.0.slice {
        CudaStorageSlice::F32(_) => forward_as::<f32>(op, query, key, value),
        CudaStorageSlice::F16(_) => forward_as::<f16>(op, query, key, value),
        CudaStorageSlice::BF16(_) => forward_as::<bf16>(op, query, key, value),
        CudaStorageSlice::F64(_) => forward_as::<f64>(op, query, key, value),
        _ => no_dtype(query.0.dtype()),
    }
}

fn forward_as<T: Element + CudaDType + candle_core::cuda_backend::cudarc::driver::DeviceRepr>(
    op: &Forward,
    query: Input<'_>,
    key: Input<'_>,
    value: Input<'_>,
) -> Result<(CudaStorage, Shape)> {
    let device = query.0.device().clone();
    let stream = device.cuda_stream();
    let output_dims = output_dims(query.1, value.1);
    let lse_dims = lse_dims(query.1);
    // SAFETY: a call that succeeds writes both whole; one that does not drops them.
    let (mut output, mut lse) = unsafe {
        let lse_count = if op.lse.is_some() {
            lse_dims.iter().product()
        } else {
            0
        };
        (
            device.alloc::<T>(output_dims.iter().product::<usize>().max(1))?,
            device.alloc::<f32>(lse_count.max(1))?,
        )
    };
    {
        let locks = op.lock_extras();
        // The guards tell cudarc, when they are dropped, that the stream has got its work.
        let mut guards = Vec::new();
        let (output_data, guard) = output.device_ptr_mut(&stream);
        guards.push(guard);
        let (lse_data, guard) = lse.device_ptr_mut(&stream);
        guards.push(guard);
        let mut tensors = Tensors::new(
            view(query, &stream, &mut guards)?,
            view(key, &stream, &mut guards)?,
            view(value, &stream, &mut guards)?,
            fresh::<T>(output_data, &device, &output_dims)?,
        );
        if op.lse.is_some() {
            tensors.lse = Some(fresh::<f32>(lse_data, &device, &lse_dims)?);
        }
        let mut extras = [None; crate::EXTRAS];
        for (extra, lock) in extras.iter_mut().zip(&locks) {
            *extra = match lock {
                None => None,
                Some((storage, layout)) => match &**storage {
                    Storage::Cuda(storage) => Some(view((storage, layout), &stream, &mut guards)?),
                    _ => return Err(Error::msg("dlattn: an optional tensor is not on the GPU")),
                },
            };
        }
        set_extras(&mut tensors, extras);
        run(op, &mut tensors, &device, &stream)?;
    }
    op.give_lse(
        Storage::Cuda(CudaStorage::wrap_cuda_slice(lse, device.clone())),
        lse_dims.into(),
    );
    Ok((
        CudaStorage::wrap_cuda_slice(output, device),
        output_dims.into(),
    ))
}

/// Enqueues the call; with a workspace, which is freed in the stream's order, if the kernel asks.
fn run(
    op: &Forward,
    tensors: &mut Tensors<'_>,
    device: &CudaDevice,
    stream: &CudaStream,
) -> Result<()> {
    let library = Library::get().map_err(Error::wrap)?;
    let options = &op.attention.options;
    let mut exec = Exec {
        stream: stream.cu_stream().cast(),
        ..Exec::default()
    };
    // SAFETY: candle's tensors live on the stream's device and are freed in the order of its stream.
    let first = unsafe { library.forward_on(options, tensors, &exec) };
    match first {
        Err(dlattn::Error::Call {
            status: Status::BufferTooSmall,
            ..
        }) => {}
        result => return result.map_err(Error::wrap),
    }
    let sku = library.sku(options, tensors).map_err(Error::wrap)?;
    let alignment = sku.workspace_alignment;
    // SAFETY: the library takes a workspace with any contents.
    let mut memory = unsafe { device.alloc::<u8>(sku.workspace_bytes + alignment)? };
    let (data, _guard) = memory.device_ptr_mut(stream);
    exec.workspace = (data as usize).next_multiple_of(alignment) as *mut c_void;
    exec.workspace_bytes = sku.workspace_bytes;
    // SAFETY: as above.
    unsafe { library.forward_on(options, tensors, &exec) }.map_err(Error::wrap)
}

fn ordinal(device: &CudaDevice) -> i32 {
    match device.location() {
        DeviceLocation::Cuda { gpu_id } => gpu_id as i32,
        _ => 0,
    }
}

/// candle's storage and layout as the library sees them.
fn view<'a>(
    (storage, layout): (&'a CudaStorage, &Layout),
    stream: &'a CudaStream,
    guards: &mut Vec<SyncOnDrop<'a>>,
) -> Result<Tensor<'a>> {
    macro_rules! over {
        ($slice:expr, $as:ty) => {{
            let (data, guard) = $slice.device_ptr(stream);
            guards.push(guard);
            (data, <$as as Element>::DTYPE)
        }};
    }
    let (data, dtype) = match &storage.slice {
        CudaStorageSlice::F32(slice) => over!(slice, f32),
        CudaStorageSlice::F16(slice) => over!(slice, f16),
        CudaStorageSlice::BF16(slice) => over!(slice, bf16),
        CudaStorageSlice::F64(slice) => over!(slice, f64),
        CudaStorageSlice::U8(slice) => over!(slice, u8),
        CudaStorageSlice::I32(slice) => over!(slice, i32),
        CudaStorageSlice::U32(slice) => over!(slice, i32),
        _ => return no_dtype(storage.dtype()),
    };
    let first = data as usize + layout.start_offset() * usize::from(dtype.bits) / 8;
    let device = Device::Cuda(ordinal(storage.device()));
    // SAFETY: candle's layouts stay inside their storage, which the guards keep until the call is
    // enqueued and candle frees in the order of its stream.
    unsafe {
        Tensor::from_raw(
            first as *const c_void,
            device,
            dtype,
            layout.dims(),
            layout.stride(),
        )
    }
    .map_err(Error::wrap)
}

/// A new compact tensor to be written.
fn fresh<'a, T: Element>(data: u64, device: &CudaDevice, dims: &[usize]) -> Result<TensorMut<'a>> {
    let device = Device::Cuda(ordinal(device));
    // SAFETY: the allocation has that many elements and nobody else knows it yet.
    unsafe { TensorMut::from_raw(data as *mut c_void, device, T::DTYPE, dims, &compact(dims)) }
        .map_err(Error::wrap)
}
