use crate::{lse_dims, no_dtype, output_dims, set_extras, Forward};
use candle_core::backend::BackendStorage;
use candle_core::{CpuStorage, Error, Layout, Result, Shape, Storage, WithDType};
use dlattn::{Element, Library, Tensor, TensorMut, Tensors};
use half::{bf16, f16};

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
    let mut extras = [None; crate::EXTRAS];
    for (extra, lock) in extras.iter_mut().zip(&locks) {
        *extra = match lock {
            None => None,
            Some((storage, layout)) => match &**storage {
                Storage::Cpu(storage) => Some(view((storage, layout))?),
                _ => return Err(Error::msg("dlattn: an optional tensor is not on the CPU")),
            },
        };
    }
    set_extras(&mut tensors, extras);
    Library::get()
        .and_then(|library| library.forward(&op.attention.options, &mut tensors))
        .map_err(Error::wrap)?;
    op.give_lse(Storage::Cpu(CpuStorage::F32(lse)), lse_dims.into());
    Ok((T::to_cpu_storage_owned(output), output_dims.into()))
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
        other => no_dtype(other.dtype()),
    }
}
