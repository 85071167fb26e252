use std::fmt;

/// Why the library refused or could not finish a call, `DLATTN_*` of `abi/dlattn.h`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Status {
    /// The call contradicts itself or the ABI.
    InvalidArgument,
    /// A legal call that no kernel of the library covers on that device.
    Unsupported,
    /// The workspace is absent or too small.
    BufferTooSmall,
    /// There was no memory.
    OutOfMemory,
    /// There is no driver or no such device.
    DeviceUnavailable,
    /// The driver refused.
    DeviceError,
    /// A managed tensor of another DLPack major version.
    VersionMismatch,
    /// A fault of the library, or a status that this crate does not know.
    Internal,
}

impl Status {
    pub(crate) fn from_code(code: i32) -> Self {
        match code {
            1 => Self::InvalidArgument,
            2 => Self::Unsupported,
            3 => Self::BufferTooSmall,
            4 => Self::OutOfMemory,
            5 => Self::DeviceUnavailable,
            6 => Self::DeviceError,
            7 => Self::VersionMismatch,
            _ => Self::Internal,
        }
    }
}

/// Everything that can go wrong.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Error {
    /// The library could not be opened.
    NotFound {
        /// The places searched, each with the reason why it failed.
        searched: Vec<(String, String)>,
    },
    /// A library was found, but of another ABI.
    Version {
        /// The file.
        path: String,
        /// What that library serves: major and minor, or nothing if it does not say.
        serves: Option<(u32, u32)>,
    },
    /// A slice is too short for a shape and its strides, or the ranks differ.
    Shape(String),
    /// The library refused or failed.
    Call {
        /// The kind of failure.
        status: Status,
        /// What was wrong and what would be right, in the library's words.
        message: String,
    },
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::NotFound { searched } => {
                write!(f, "libdlattn was not found:")?;
                searched
                    .iter()
                    .try_for_each(|(path, why)| write!(f, "\n  {path}: {why}"))
            }
            Self::Version { path, serves } => {
                let wanted = crate::ffi::ABI_MAJOR;
                match serves {
                    Some((major, minor)) => write!(
                        f,
                        "{path}: serves ABI {major}.{minor}, this program needs {wanted}.0"
                    ),
                    None => write!(f, "{path}: does not serve ABI {wanted}"),
                }
            }
            Self::Shape(message) | Self::Call { message, .. } => f.write_str(message),
        }
    }
}

impl std::error::Error for Error {}
