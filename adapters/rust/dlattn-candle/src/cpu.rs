use crate::{
    backward_call, lse_dims, no_dtype, output_dims, set_extras, Backward, Forward, Gradients,
};
use candle_core::backend::BackendStorage;
use candle_core::{
    CpuStorage, DType, Error, Layout, Result, Shape, Storage, StorageRef, WithDType,
};
use dlattn::{Device, Element, Float8, Library, Tensor, TensorMut, Tensors};
use half::{bf16, f16};
use std::ffi::c_void;

type Input<'a> = (&'a CpuStorage, &'a Layout);

pub(crate) fn forward(
    op: &Forward,
    query: Input<'_>,
    key: Input<'_>,
    value: Input<'_>,
) -> Result<(CpuStorage, Shape)> {
    match query.0 {
        CpuStorage::F32(_) => forward_as::<f32>(op, query, key, value),
        CpuStorage::F16(_) => forward_as::<f16>(op, query, key, value),
        CpuStorage::BF16(_) => forward_as::<bf16>(op, query, key, value),
        CpuStorage::F64(_) => forward_as::<f64>(op, query, key, value),
        other => no_dtype(other.dtype()),
    }
}

fn forward_as<T: Element + WithDType>(
    op: &Forward,
    query: Input<'_>,
    key: Input<'_>,
    value: Input<'_>,
) -> Result<(CpuStorage, Shape)> {
    let output_dims = output_dims(query.1, value.1);
    let lse_dims = lse_dims(query.1);
    let mut output = vec![T::zero(); output_dims.iter().product()];
    let mut lse = vec![
        0f32;
        if op.lse.is_some() {
            lse_dims.iter().product()
        } else {
            0
        }
    ];

    let locks = op.lock_extras();
    let mut tensors = Tensors::new(
        view(query)?,
        view(key)?,
        view(value)?,
        TensorMut::new(&mut output, &output_dims).map_err(Error::wrap)?,
    );
    if op.lse.is_some() {
        tensors.lse = Some(TensorMut::new(&mut lse, &lse_dims).map_err(Error::wrap)?);
    }
    set_extras(&mut tensors, views(&locks)?);
    Library::get()
        .and_then(|library| library.forward(&op.attention.options, &mut tensors))
        .map_err(Error::wrap)?;
    op.give_lse(Storage::Cpu(CpuStorage::F32(lse)), lse_dims.into());
    Ok((T::to_cpu_storage_owned(output), output_dims.into()))
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

fn backward_as<T: Element + WithDType>(op: &Forward, call: &Backward<'_>) -> Result<Gradients> {
    let inputs = call.all().map(|t| Some(t.storage_and_layout()));
    let locks = op.lock_extras();
    let mut made: [Option<Vec<T>>; 3] = [0, 1, 2].map(|i| {
        call.is_wanted(i)
            .then(|| vec![T::zero(); call.inputs[i].elem_count()])
    });
    let mut d_inputs = [None, None, None];
    for ((slot, data), input) in d_inputs.iter_mut().zip(&mut made).zip(call.inputs) {
        if let Some(data) = data {
            *slot = Some(TensorMut::new(data, input.dims()).map_err(Error::wrap)?);
        }
    }
    let (tensors, mut gradients) = backward_call(views(&inputs)?, views(&locks)?, d_inputs)?;
    Library::get()
        .and_then(|library| library.backward(&op.attention.options, &tensors, &mut gradients))
        .map_err(Error::wrap)?;
    Ok(call.gradients(made, |data| Storage::Cpu(T::to_cpu_storage_owned(data))))
}

/// Tensors that are locked for reading as the library sees them.
fn views<'a, const N: usize>(
    locks: &'a [Option<(StorageRef<'_>, &Layout)>; N],
) -> Result<[Option<Tensor<'a>>; N]> {
    let mut views = [None; N];
    for (seen, lock) in views.iter_mut().zip(locks) {
        *seen = match lock {
            None => None,
            Some((storage, layout)) => match &**storage {
                Storage::Cpu(storage) => Some(view((storage, layout))?),
                _ => return Err(Error::msg("dlattn: a tensor is not on the CPU")),
            },
        };
    }
    Ok(views)
}

/// candle's storage and layout as the library sees them.
fn view<'a>((storage, layout): (&'a CpuStorage, &Layout)) -> Result<Tensor<'a>> {
    fn over<'a, T: Element>(data: &'a [T], layout: &Layout) -> Result<Tensor<'a>> {
        let data = data.get(layout.start_offset()..).unwrap_or_default();
        Tensor::with_strides(data, layout.dims(), layout.stride()).map_err(Error::wrap)
    }
    match storage {
        CpuStorage::F32(data) => over(data, layout),
        CpuStorage::F16(data) => over(data, layout),
        CpuStorage::BF16(data) => over(data, layout),
        CpuStorage::F64(data) => over(data, layout),
        CpuStorage::U8(data) => over(data, layout),
        CpuStorage::I32(data) => over(data, layout),
        CpuStorage::F8E4M3(data) => {
            let data = data.get(layout.start_offset()..).unwrap_or_default();
            float8_view(data.as_ptr().cast(), layout)
        }
        other => no_dtype(other.dtype()),
    }
}

/// Elements of one byte, of whose type this crate only knows the name.
fn float8_view<'a>(data: *const c_void, layout: &Layout) -> Result<Tensor<'a>> {
    // SAFETY: candle's layouts stay inside their storage, which is borrowed for 'a.
    unsafe {
        Tensor::from_raw(
            data,
            Device::Cpu,
            Float8::E4M3Fn.dtype(),
            layout.dims(),
            layout.stride(),
        )
    }
    .map_err(Error::wrap)
}
