//! Attention for the CPU and NVIDIA GPUs, from `libdlattn.so.1`, which is found and opened at run
//! time: building this crate needs no C compiler, no CUDA and not the library.
//!
//! ```no_run
//! use dlattn::{Library, Options, Tensor, TensorMut, Tensors};
//!
//! let shape = [1, 8, 128, 64]; // [B, H, L, D]
//! let (q, k, v) = (vec![0.1f32; 65536], vec![0.2f32; 65536], vec![0.3f32; 65536]);
//! let mut o = vec![0f32; 65536];
//! let mut tensors = Tensors::new(
//!     Tensor::new(&q, &shape)?,
//!     Tensor::new(&k, &shape)?,
//!     Tensor::new(&v, &shape)?,
//!     TensorMut::new(&mut o, &shape)?,
//! );
//! let options = Options { causal: true, ..Options::default() };
//! Library::get()?.forward(&options, &mut tensors)?;
//! # Ok::<(), dlattn::Error>(())
//! ```
//!
//! The search order is that of `abi/dlattn_loader.h`: the file that the environment variable
//! `DLATTN_LIBRARY` names and no other; `libdlattn.so.1` beside the program (or library) that this
//! crate is compiled into; the system's search. The library is never closed.

mod error;
pub mod ffi;
mod library;
mod options;
mod tensor;

pub use error::{Error, Status};
pub use library::{Exec, Kernel, Library, Plan, Sku};
pub use options::{Alignment, Append, Gradients, Options, Tensors};
pub use tensor::{compact, Device, Element, Float8, Stride, Tensor, TensorMut, MAX_AXES};
