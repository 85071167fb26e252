use crate::ffi::{self, DLDataType, DLTensor};
use crate::{Error, Status};
use std::ffi::c_void;
use std::fmt::Debug;
use std::marker::PhantomData;

/// The most axes that a tensor of a call has.
pub const MAX_AXES: usize = 4;

/// A type of elements that tensors can have.
///
/// # Safety
/// `DTYPE` describes exactly the type's representation, and every bit pattern that the library
/// writes (floating point only) is a value of the type.
pub unsafe trait Element: Copy {
    /// The DLPack type.
    const DTYPE: DLDataType;
}

macro_rules! element {
    ($($type:ty: $code:expr),*) => {$(
        // SAFETY: the code and the size are those of the type.
        unsafe impl Element for $type {
            const DTYPE: DLDataType =
                DLDataType { code: $code, bits: 8 * size_of::<$type>() as u8, lanes: 1 };
        }
    )*};
}
element!(
    half::f16: ffi::DL_FLOAT,
    half::bf16: ffi::DL_BFLOAT,
    f32: ffi::DL_FLOAT,
    f64: ffi::DL_FLOAT,
    i32: ffi::DL_INT,
    u8: ffi::DL_UINT,
    bool: ffi::DL_BOOL
);

/// A type of numbers that strides are given in: `usize`, `isize`, `i64`.
pub trait Stride: Copy + Debug + TryInto<i64> {}

impl<T: Copy + Debug + TryInto<i64>> Stride for T {}

/// Where a tensor lives.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Device {
    /// Host memory.
    Cpu,
    /// The memory of one NVIDIA GPU, by its ordinal.
    Cuda(i32),
}

/// What the bytes of a u8 tensor may hold, see [`Tensor::holding`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Float8 {
    /// `float8_e4m3fn`: 4 bits of exponent and 3 of mantissa, no infinity.
    E4M3Fn,
    /// `float8_e5m2`: the upper half of an f16.
    E5M2,
}

impl Float8 {
    /// The DLPack type.
    pub const fn dtype(self) -> DLDataType {
        let code = match self {
            Self::E4M3Fn => ffi::DL_FLOAT8_E4M3FN,
            Self::E5M2 => ffi::DL_FLOAT8_E5M2,
        };
        DLDataType {
            code,
            bits: 8,
            lanes: 1,
        }
    }
}

/// A tensor that a call reads: up to four axes, any strides, borrowed for `'a`.
#[derive(Clone, Copy, Debug)]
pub struct Tensor<'a> {
    raw: Raw,
    borrow: PhantomData<&'a ()>,
}

/// A tensor that a call writes.
#[derive(Debug)]
pub struct TensorMut<'a> {
    raw: Raw,
    borrow: PhantomData<&'a mut ()>,
}

// SAFETY: a Tensor is a shared borrow of plain numbers, a TensorMut an exclusive one.
unsafe impl Send for Tensor<'_> {}
// SAFETY: as above.
unsafe impl Sync for Tensor<'_> {}
// SAFETY: as above.
unsafe impl Send for TensorMut<'_> {}

impl<'a> Tensor<'a> {
    /// A compact row-major tensor over a slice of host memory.
    ///
    /// # Errors
    /// [`Error::Shape`] if the slice has fewer elements than the shape.
    pub fn new<T: Element>(data: &'a [T], shape: &[usize]) -> Result<Self, Error> {
        Self::with_strides(data, shape, &compact(shape))
    }

    /// A tensor over a slice of host memory, with strides in elements; stride 0 repeats an axis.
    ///
    /// # Errors
    /// [`Error::Shape`] if an element would lie outside the slice, or the ranks differ.
    pub fn with_strides<T: Element>(
        data: &'a [T],
        shape: &[usize],
        strides: &[usize],
    ) -> Result<Self, Error> {
        let raw = Raw::over(data.as_ptr(), data.len(), 0, shape, strides)?;
        Ok(Self {
            raw,
            borrow: PhantomData,
        })
    }

    /// A tensor over a slice of host memory whose element 0, on every axis, is `data[first]`.
    /// Strides are in elements; stride 0 repeats an axis, a negative one runs backwards.
    ///
    /// # Errors
    /// [`Error::Shape`] if an element would lie outside the slice, or the ranks differ.
    pub fn strided<T: Element>(
        data: &'a [T],
        first: usize,
        shape: &[usize],
        strides: &[isize],
    ) -> Result<Self, Error> {
        let raw = Raw::over(data.as_ptr(), data.len(), first, shape, strides)?;
        Ok(Self {
            raw,
            borrow: PhantomData,
        })
    }

    /// A tensor anywhere; its strides are `usize`, or `isize` where an axis may run backwards.
    ///
    /// # Safety
    /// Every element that shape and strides (in elements) reach from `data` is memory of `device`
    /// that holds a `dtype` and stays so for `'a`; on a GPU until the stream of the call has run it.
    ///
    /// # Errors
    /// [`Error::Shape`] if there are more than four axes, or the ranks differ.
    pub unsafe fn from_raw<S: Stride>(
        data: *const c_void,
        device: Device,
        dtype: DLDataType,
        shape: &[usize],
        strides: &[S],
    ) -> Result<Self, Error> {
        let raw = Raw::new(data.cast_mut(), device, dtype, shape, strides)?;
        Ok(Self {
            raw,
            borrow: PhantomData,
        })
    }

    /// The same bytes as float8: `Tensor::new(&bytes, &shape)?.holding(Float8::E4M3Fn)?`.
    ///
    /// # Errors
    /// [`Error::Call`] if it is not a tensor of u8.
    pub fn holding(self, float8: Float8) -> Result<Self, Error> {
        Ok(Self {
            raw: self.raw.holding(float8)?,
            ..self
        })
    }

    /// Where it lives.
    pub fn device(&self) -> Device {
        self.raw.device
    }

    pub(crate) fn dl(&self) -> DLTensor {
        self.raw.dl()
    }
}

impl<'a> TensorMut<'a> {
    /// A compact row-major tensor over a slice of host memory.
    ///
    /// # Errors
    /// [`Error::Shape`] if the slice has fewer elements than the shape.
    pub fn new<T: Element>(data: &'a mut [T], shape: &[usize]) -> Result<Self, Error> {
        Self::with_strides(data, shape, &compact(shape))
    }

    /// A tensor over a slice of host memory, with strides in elements. The library refuses strides
    /// by which elements would overlap.
    ///
    /// # Errors
    /// [`Error::Shape`] if an element would lie outside the slice, or the ranks differ.
    pub fn with_strides<T: Element>(
        data: &'a mut [T],
        shape: &[usize],
        strides: &[usize],
    ) -> Result<Self, Error> {
        let raw = Raw::over(data.as_mut_ptr(), data.len(), 0, shape, strides)?;
        Ok(Self {
            raw,
            borrow: PhantomData,
        })
    }

    /// A tensor anywhere.
    ///
    /// # Safety
    /// As for [`Tensor::from_raw`], and nothing else reads or writes that memory meanwhile. The
    /// memory need not be initialised.
    ///
    /// # Errors
    /// [`Error::Shape`] if there are more than four axes, or the ranks differ.
    pub unsafe fn from_raw(
        data: *mut c_void,
        device: Device,
        dtype: DLDataType,
        shape: &[usize],
        strides: &[usize],
    ) -> Result<Self, Error> {
        let raw = Raw::new(data, device, dtype, shape, strides)?;
        Ok(Self {
            raw,
            borrow: PhantomData,
        })
    }

    /// The same bytes as float8, as [`Tensor::holding`].
    ///
    /// # Errors
    /// As there.
    pub fn holding(self, float8: Float8) -> Result<Self, Error> {
        Ok(Self {
            raw: self.raw.holding(float8)?,
            ..self
        })
    }

    /// Where it lives.
    pub fn device(&self) -> Device {
        self.raw.device
    }

    /// A tensor that has been written, where a call wants it that only reads it:
    /// [`Library::backward`](crate::Library::backward) does so with the output.
    ///
    /// # Safety
    /// No call that writes it is made with it.
    pub unsafe fn for_reading(tensor: Tensor<'a>) -> Self {
        Self {
            raw: tensor.raw,
            borrow: PhantomData,
        }
    }

    pub(crate) fn dl(&self) -> DLTensor {
        self.raw.dl()
    }
}

#[derive(Clone, Copy, Debug)]
struct Raw {
    data: *mut c_void,
    device: Device,
    dtype: DLDataType,
    axes: usize,
    shape: [i64; MAX_AXES],
    strides: [i64; MAX_AXES],
}

impl Raw {
    fn new<S: Stride>(
        data: *mut c_void,
        device: Device,
        dtype: DLDataType,
        shape: &[usize],
        strides: &[S],
    ) -> Result<Self, Error> {
        if shape.len() > MAX_AXES || strides.len() != shape.len() {
            return Err(Error::Shape(format!(
                "shape {shape:?} and strides {strides:?} must have the same number of axes, at most {MAX_AXES}"
            )));
        }
        let mut raw = Self {
            data,
            device,
            dtype,
            axes: shape.len(),
            shape: [1; MAX_AXES],
            strides: [1; MAX_AXES],
        };
        for axis in 0..shape.len() {
            raw.shape[axis] = signed(shape[axis])?;
            raw.strides[axis] = signed(strides[axis])?;
        }
        Ok(raw)
    }

    fn over<T: Element, S: Stride>(
        data: *const T,
        len: usize,
        first: usize,
        shape: &[usize],
        strides: &[S],
    ) -> Result<Self, Error> {
        let first_data = data.wrapping_add(first).cast_mut().cast();
        let raw = Self::new(first_data, Device::Cpu, T::DTYPE, shape, strides)?;
        // The lowest and the highest index that is reached; four products of 64 bits fit into 128.
        let (mut low, mut high) = (first as i128, first as i128);
        for (&extent, &stride) in raw.shape.iter().zip(&raw.strides) {
            let reach = (i128::from(extent) - 1) * i128::from(stride);
            low += reach.min(0);
            high += reach.max(0);
        }
        if shape.contains(&0) || (low >= 0 && high < len as i128) {
            return Ok(raw);
        }
        Err(Error::Shape(format!(
            "shape {shape:?} with strides {strides:?} from element {first} reaches beyond a slice of {len} elements"
        )))
    }

    fn holding(self, float8: Float8) -> Result<Self, Error> {
        if self.dtype != u8::DTYPE {
            let DLDataType { code, bits, .. } = self.dtype;
            return Err(Error::Call {
                status: Status::InvalidArgument,
                message: format!(
                    "{float8:?}: is held by tensors of u8; this one has DLPack's type {code} of {bits} bits"
                ),
            });
        }
        Ok(Self {
            dtype: float8.dtype(),
            ..self
        })
    }

    /// Points into `self`, so it is valid as long as `self` stays where it is.
    fn dl(&self) -> DLTensor {
        let (device_type, device_id) = match self.device {
            Device::Cpu => (ffi::DL_CPU, 0),
            Device::Cuda(ordinal) => (ffi::DL_CUDA, ordinal),
        };
        DLTensor {
            data: self.data,
            device_type,
            device_id,
            ndim: self.axes as i32,
            dtype: self.dtype,
            shape: self.shape.as_ptr(),
            strides: self.strides.as_ptr(),
            byte_offset: 0,
        }
    }
}

fn signed(n: impl Stride) -> Result<i64, Error> {
    n.try_into()
        .map_err(|_| Error::Shape(format!("{n:?} in a shape or stride is too large")))
}

/// The strides of a compact row-major tensor, in elements.
pub fn compact(shape: &[usize]) -> Vec<usize> {
    let mut strides = vec![1usize; shape.len()];
    for axis in (1..shape.len()).rev() {
        strides[axis - 1] = strides[axis].saturating_mul(shape[axis]);
    }
    strides
}
