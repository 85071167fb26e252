use crate::{
    backward_call, lse_dims, no_dtype, output_dims, set_extras, Backward, Forward, Gradients,
};
use candle_core::backend::{BackendDevice, BackendStorage};
use candle_core::cuda_backend::cudarc::driver::{CudaStream, DevicePtr, DevicePtrMut, SyncOnDrop};
use candle_core::cuda_backend::{CudaDType, CudaDevice, CudaStorageSlice};
use candle_core::{
    CudaStorage, DType, DeviceLocation, Error, Layout, Result, Shape, Storage, StorageRef,
};
use dlattn::{compact, Device, Element, Exec, Library, Sku, Status, Tensor, TensorMut, Tensors};
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
        set_extras(&mut tensors, views(&locks, &stream, &mut guards)?);
        run_forward(op, &mut tensors, &device, &stream)?;
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

pub(crate) fn backward(op: &Forward, call: &Backward<'_>) -> Result<Gradients> {
    match call.output.dtype() {
        DType::F32 => backward_as::<f32>(op, call),
        DType::F16 => backward_as::<f16>(op, call),
        DType::BF16 => backward_as::<bf16>(op, call),
        DType::F64 => backward_as::<f64>(op, call),
        other => no_dtype(other),
    }
}

fn backward_as<T: Element + CudaDType + candle_core::cuda_backend::cudarc::driver::DeviceRepr>(
    op: &Forward,
    call: &Backward<'_>,
) -> Result<Gradients> {
    let device = call.output.device().as_cuda_device()?.clone();
    let stream = device.cuda_stream();
    let mut made = [None, None, None];
    for (i, data) in made.iter_mut().enumerate() {
        if call.is_wanted(i) {
            let count = call.inputs[i].elem_count().max(1);
            // SAFETY: a call that succeeds writes it whole; one that does not drops it.
            *data = Some(unsafe { device.alloc::<T>(count)? });
        }
    }
    {
        let inputs = call.all().map(|t| Some(t.storage_and_layout()));
        let locks = op.lock_extras();
        let mut guards = Vec::new();
        let mut d_inputs = [None, None, None];
        for ((slot, data), input) in d_inputs.iter_mut().zip(&mut made).zip(call.inputs) {
            if let Some(data) = data {
                let (data, guard) = data.device_ptr_mut(&stream);
                guards.push(guard);
                *slot = Some(fresh::<T>(data, &device, input.dims())?);
            }
        }
        let read = views(&inputs, &stream, &mut guards)?;
        let extras = views(&locks, &stream, &mut guards)?;
        let (tensors, mut gradients) = backward_call(read, extras, d_inputs)?;
        let library = Library::get().map_err(Error::wrap)?;
        let options = &op.attention.options;
        let sku = library.backward_sku(options, &tensors, &gradients);
        run(&device, &stream, sku, |exec| {
            // SAFETY: candle's tensors live on the stream's device and are freed in the order of its
            // stream.
            unsafe { library.backward_on(options, &tensors, &mut gradients, exec) }
        })?;
    }
    Ok(call.gradients(made, |data| {
        Storage::Cuda(CudaStorage::wrap_cuda_slice(data, device.clone()))
    }))
}

/// Enqueues the forward call; its kernel is asked for only if it needs a workspace.
fn run_forward(
    op: &Forward,
    tensors: &mut Tensors<'_>,
    device: &CudaDevice,
    stream: &CudaStream,
) -> Result<()> {
    let library = Library::get().map_err(Error::wrap)?;
    let options = &op.attention.options;
    let exec = Exec {
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
    let sku = library.sku(options, tensors);
    run(device, stream, sku, |exec| {
        // SAFETY: as above.
        unsafe { library.forward_on(options, tensors, exec) }
    })
}

/// Enqueues a call with the workspace that its kernel asks for, freed in the stream's order.
fn run(
    device: &CudaDevice,
    stream: &CudaStream,
    sku: std::result::Result<Sku, dlattn::Error>,
    mut call: impl FnMut(&Exec) -> std::result::Result<(), dlattn::Error>,
) -> Result<()> {
    let sku = sku.map_err(Error::wrap)?;
    let alignment = sku.workspace_alignment;
    // SAFETY: the library takes a workspace with any contents.
    let mut memory = unsafe { device.alloc::<u8>(sku.workspace_bytes + alignment)? };
    let (data, _guard) = memory.device_ptr_mut(stream);
    call(&Exec {
        stream: stream.cu_stream().cast(),
        workspace: (data as usize).next_multiple_of(alignment) as *mut c_void,
        workspace_bytes: sku.workspace_bytes,
    })
    .map_err(Error::wrap)
}

/// Tensors that are locked for reading as the library sees them.
fn views<'a, const N: usize>(
    locks: &'a [Option<(StorageRef<'_>, &Layout)>; N],
    stream: &'a CudaStream,
    guards: &mut Vec<SyncOnDrop<'a>>,
) -> Result<[Option<Tensor<'a>>; N]> {
    let mut views = [None; N];
    for (seen, lock) in views.iter_mut().zip(locks) {
        *seen = match lock {
            None => None,
            Some((storage, layout)) => match &**storage {
                Storage::Cuda(storage) => Some(view((storage, layout), stream, guards)?),
                _ => return Err(Error::msg("dlattn: a tensor is not on the GPU")),
            },
        };
    }
    Ok(views)
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
