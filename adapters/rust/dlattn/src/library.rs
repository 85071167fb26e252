use crate::ffi::{self, Api, Api1_1, DLTensor};
use crate::{Append, Device, Error, Gradients, Options, Status, Tensor, TensorMut, Tensors};
use std::cell::RefCell;
use std::ffi::{c_char, c_int, c_void, CStr, OsStr, OsString};
use std::path::{Path, PathBuf};
use std::ptr::{null, null_mut};
use std::sync::OnceLock;

const SONAME: &str = "libdlattn.so.1";

/// An opened `libdlattn.so.1`. Every method may be called from any thread.
#[derive(Clone, Debug)]
pub struct Library {
    api: &'static Api,
    path: String,
}

/// What a kernel is and guarantees for one problem.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Sku {
    /// The name of its row in the kernel table, the same in tests, benchmarks and profilers.
    pub kernel: &'static str,
    /// "cpu" or "cuda".
    pub backend: &'static str,
    /// The least machine that it needs: "x86-64", "avx512", `sm_90` ...
    pub arch: &'static str,
    /// Precision of the products.
    pub math: &'static str,
    /// Precision of the sums.
    pub accumulator: &'static str,
    /// What the problem asks, `DLATTN_FEATURE_*`.
    pub features: u64,
    /// Bytes of workspace that a call needs.
    pub workspace_bytes: usize,
    /// The alignment that it needs.
    pub workspace_alignment: usize,
    /// No result depends on the order in which threads finish.
    pub deterministic: bool,
    /// The same bits on every run on the same device.
    pub bit_stable: bool,
    /// Parts in which the keys of a row are summed.
    pub num_splits: i32,
    /// CPU threads that it was planned for.
    pub num_threads: i32,
    /// A reference row: right and slow.
    pub reference: bool,
}

/// One row of the library's kernel table.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Kernel {
    /// Its name.
    pub name: &'static str,
    /// "cpu" or "cuda".
    pub backend: &'static str,
    /// The least machine that it needs.
    pub arch: &'static str,
    /// The element types that it takes: "f32 f16 bf16".
    pub dtypes: &'static str,
    /// Everything that it can do, `DLATTN_FEATURE_*`.
    pub features: u64,
    /// Whether this machine can run it.
    pub available: bool,
}

/// How a call on a GPU runs.
#[derive(Clone, Copy, Debug)]
pub struct Exec {
    /// The `CUstream`; null is the default stream, 1 and 2 keep CUDA's meanings.
    pub stream: *mut c_void,
    /// Memory of the tensors' device, aligned to `Sku::workspace_alignment`.
    pub workspace: *mut c_void,
    /// Its size.
    pub workspace_bytes: usize,
}

impl Default for Exec {
    fn default() -> Self {
        Self {
            stream: null_mut(),
            workspace: null_mut(),
            workspace_bytes: 0,
        }
    }
}

impl Library {
    /// The library of this process, opened at the first call.
    ///
    /// # Errors
    /// [`Error::NotFound`] with every place searched, or [`Error::Version`]; a later call searches
    /// again.
    pub fn get() -> Result<&'static Self, Error> {
        static LIBRARY: OnceLock<Library> = OnceLock::new();
        match LIBRARY.get() {
            Some(library) => Ok(library),
            None => {
                let opened = Self::search()?;
                Ok(LIBRARY.get_or_init(|| opened))
            }
        }
    }

    /// Opens one file; a name without a slash is searched for by the system.
    ///
    /// # Errors
    /// [`Error::NotFound`] or [`Error::Version`].
    pub fn open_file(path: impl AsRef<Path>) -> Result<Self, Error> {
        let path = path.as_ref();
        let name = path.display().to_string();
        let missing = |why: String| Error::NotFound {
            searched: vec![(name.clone(), why)],
        };
        // SAFETY: the library has no constructor that does work. It is never closed: kernels,
        // drivers and thread-local state may outlive every caller.
        let library = unsafe { libloading::Library::new(path) }.map_err(|e| missing(reason(&e)))?;
        let library: &'static libloading::Library = Box::leak(Box::new(library));
        // SAFETY: the type is that of abi/dlattn.h, and the table, if any, is static.
        let api = unsafe {
            let get_api = library
                .get::<ffi::GetApi>(b"dlattn_get_api\0")
                .map_err(|_| missing("has no dlattn_get_api".into()))?;
            get_api(ffi::ABI_MAJOR).as_ref()
        };
        let api = api.ok_or_else(|| Error::Version {
            path: name.clone(),
            serves: None,
        })?;
        if api.struct_size < size_of::<Api>() {
            let serves = Some((api.abi_major, api.abi_minor));
            return Err(Error::Version { path: name, serves });
        }
        Ok(Self { api, path: name })
    }

    fn search() -> Result<Self, Error> {
        let places: Vec<OsString> = match std::env::var_os("DLATTN_LIBRARY") {
            Some(named) if !named.is_empty() => vec![named],
            _ => beside()
                .into_iter()
                .map(OsString::from)
                .chain([SONAME.into()])
                .collect(),
        };
        let mut all = Vec::new();
        for place in &places {
            match Self::open_file(OsStr::new(place)) {
                Err(Error::NotFound { searched }) => all.extend(searched),
                other => return other,
            }
        }
        Err(Error::NotFound { searched: all })
    }

    /// The file that was opened, as it was asked for.
    pub fn path(&self) -> &str {
        &self.path
    }

    /// The library's version, "1.0.0".
    pub fn version(&self) -> &'static str {
        // SAFETY: returns a static string.
        unsafe { text((self.api.version)()) }
    }

    /// The ABI that it serves: major and minor.
    pub fn abi(&self) -> (u32, u32) {
        (self.api.abi_major, self.api.abi_minor)
    }

    /// The kernel table, best first.
    ///
    /// # Errors
    /// [`Error::Call`].
    pub fn kernels(&self) -> Result<Vec<Kernel>, Error> {
        // SAFETY: has no arguments.
        let count = unsafe { (self.api.kernel_count)() };
        (0..count)
            .map(|index| {
                // SAFETY: all-zero is a value of this struct of numbers and pointers, which the
                // library fills with static strings.
                unsafe {
                    let mut info: ffi::KernelInfo = std::mem::zeroed();
                    info.struct_size = size_of::<ffi::KernelInfo>();
                    self.check((self.api.kernel_info)(index, &mut info))?;
                    Ok(Kernel {
                        name: text(info.name),
                        backend: text(info.backend),
                        arch: text(info.arch),
                        dtypes: text(info.dtypes),
                        features: info.features,
                        available: info.available != 0,
                    })
                }
            })
            .collect()
    }

    /// What [`forward`](Self::forward) would run. Reads no data.
    ///
    /// # Errors
    /// [`Error::Call`], as forward would.
    pub fn sku(&self, options: &Options, tensors: &Tensors<'_>) -> Result<Sku, Error> {
        self.fill_sku(|sku| {
            options.with_raw(|desc| {
                // SAFETY: the structs and what they point to live for the call.
                Ok(tensors.with_raw(|raw| unsafe { (self.api.forward_query)(desc, raw, sku) }))
            })
        })
    }

    /// Computes on the CPU; the outputs are there on return. Memory for the workspace is kept by
    /// the thread.
    ///
    /// # Errors
    /// [`Error::Call`]; the outputs are untouched unless the status is `DeviceError` or `Internal`.
    pub fn forward(&self, options: &Options, tensors: &mut Tensors<'_>) -> Result<(), Error> {
        on_host(tensors)?;
        options.with_raw(|desc| {
            tensors.with_raw(|raw| {
                self.with_workspace(
                    // SAFETY: the structs and what they point to live for the call, which is over
                    // when the function returns; the borrows in `tensors` make the memory valid.
                    |exec| unsafe { (self.api.forward)(desc, raw, exec) },
                    // SAFETY: as above.
                    |sku| unsafe { (self.api.forward_query)(desc, raw, sku) },
                )
            })
        })
    }

    /// Enqueues on a GPU's stream, or computes on the CPU.
    ///
    /// # Safety
    /// `exec` has a stream of the tensors' device (or a special one) and a workspace that no other
    /// call uses, and the memory of both and of the tensors stays until the stream has run the call.
    ///
    /// # Errors
    /// [`Error::Call`]; with `BufferTooSmall` if the workspace is.
    pub unsafe fn forward_on(
        &self,
        options: &Options,
        tensors: &mut Tensors<'_>,
        exec: &Exec,
    ) -> Result<(), Error> {
        options.with_raw(|desc| {
            // SAFETY: the caller answers for the memory.
            let status =
                tensors.with_raw(|raw| unsafe { (self.api.forward)(desc, raw, &raw_exec(exec)) });
            self.check(status)
        })
    }

    /// What [`backward`](Self::backward) would run. Reads no data.
    ///
    /// # Errors
    /// [`Error::Call`], as backward would.
    pub fn backward_sku(
        &self,
        options: &Options,
        tensors: &Tensors<'_>,
        gradients: &Gradients<'_>,
    ) -> Result<Sku, Error> {
        let query = self.api_1_1("backward")?.backward_query;
        self.fill_sku(|sku| {
            with_backward(options, tensors, gradients, |desc, raw, given| {
                // SAFETY: the structs and what they point to live for the call.
                Ok(unsafe { query(desc, raw, given, sku) })
            })
        })
    }

    /// Gradients on the CPU, after [`forward`](Self::forward) with the same options and tensors, an
    /// lse among them; tensors are read alone.
    ///
    /// # Errors
    /// [`Error::Call`]; the gradients are untouched unless the status is `DeviceError` or `Internal`.
    pub fn backward(
        &self,
        options: &Options,
        tensors: &Tensors<'_>,
        gradients: &mut Gradients<'_>,
    ) -> Result<(), Error> {
        let api = self.api_1_1("backward")?;
        on_host(tensors)?;
        with_backward(options, tensors, gradients, |desc, raw, given| {
            self.with_workspace(
                // SAFETY: as in `forward`.
                |exec| unsafe { (api.backward)(desc, raw, given, exec) },
                // SAFETY: as in `forward`.
                |sku| unsafe { (api.backward_query)(desc, raw, given, sku) },
            )
        })
    }

    /// Enqueues gradients on a GPU's stream, or computes them on the CPU.
    ///
    /// # Safety
    /// As for [`forward_on`](Self::forward_on).
    ///
    /// # Errors
    /// [`Error::Call`]; with `BufferTooSmall` if the workspace is.
    pub unsafe fn backward_on(
        &self,
        options: &Options,
        tensors: &Tensors<'_>,
        gradients: &mut Gradients<'_>,
        exec: &Exec,
    ) -> Result<(), Error> {
        let backward = self.api_1_1("backward")?.backward;
        with_backward(options, tensors, gradients, |desc, raw, given| {
            // SAFETY: the caller answers for the memory.
            self.check(unsafe { backward(desc, raw, given, &raw_exec(exec)) })
        })
    }

    /// One result from those over disjoint parts of the keys, on the CPU: outputs and their
    /// log-sum-exps, as many, of one shape.
    ///
    /// # Errors
    /// [`Error::Call`].
    pub fn merge(
        &self,
        outputs: &[Tensor<'_>],
        lses: &[Tensor<'_>],
        output: &mut TensorMut<'_>,
        lse: Option<&mut TensorMut<'_>>,
    ) -> Result<(), Error> {
        let api = self.api_1_1("merge")?;
        if outputs.len() != lses.len() {
            return Err(invalid(format!(
                "lses: are {}, outputs are {}",
                lses.len(),
                outputs.len()
            )));
        }
        for tensor in outputs.iter().chain(lses) {
            host(tensor.device(), "merge")?;
        }
        host(output.device(), "merge")?;
        let parts: Vec<DLTensor> = outputs.iter().chain(lses).map(Tensor::dl).collect();
        let parts: Vec<*const DLTensor> = parts.iter().map(|part| part as *const _).collect();
        let (output, lse) = (output.dl(), lse.map(|lse| lse.dl()));
        let partials = ffi::Partials {
            struct_size: size_of::<ffi::Partials>(),
            count: outputs.len() as i64,
            outputs: parts.as_ptr(),
            lses: parts[outputs.len()..].as_ptr(),
            output: &output,
            lse: lse.as_ref().map_or(null(), |lse| lse as *const _),
        };
        self.with_workspace(
            // SAFETY: the structs and what they point to live for the call.
            |exec| unsafe { (api.merge)(&partials, exec) },
            // SAFETY: as above.
            |sku| unsafe { (api.merge_query)(&partials, sku) },
        )
    }

    /// Writes new keys and values into a cache on the CPU.
    ///
    /// # Errors
    /// [`Error::Call`].
    pub fn append(&self, tensors: &mut Append<'_>) -> Result<(), Error> {
        let api = self.api_1_1("append")?;
        host(tensors.key.device(), "append")?;
        tensors.with_raw(|raw| {
            self.with_workspace(
                // SAFETY: the structs and what they point to live for the call.
                |exec| unsafe { (api.append)(raw, exec) },
                // SAFETY: as above.
                |sku| unsafe { (api.append_query)(raw, sku) },
            )
        })
    }

    /// The table, if it has what came with ABI 1.1.
    fn api_1_1(&self, operation: &str) -> Result<&'static Api1_1, Error> {
        if self.api.struct_size >= size_of::<Api1_1>() {
            // SAFETY: the table is static and at least that long.
            return Ok(unsafe { &*(self.api as *const Api).cast::<Api1_1>() });
        }
        let (major, minor) = self.abi();
        Err(Error::Call {
            status: Status::Unsupported,
            message: format!("{operation}: needs ABI 1.1, the library has {major}.{minor}"),
        })
    }

    /// Chooses a kernel once for many calls with these shapes, strides, types and device.
    ///
    /// # Errors
    /// [`Error::Call`], as [`forward`](Self::forward) would.
    pub fn plan(&self, options: &Options, tensors: &Tensors<'_>) -> Result<Plan, Error> {
        let mut raw_plan = null_mut();
        let status = options.with_raw(|desc| {
            // SAFETY: the structs and what they point to live for the call.
            Ok(tensors.with_raw(|raw| unsafe { (self.api.plan_create)(desc, raw, &mut raw_plan) }))
        })?;
        self.check(status)?;
        Ok(Plan {
            library: self.clone(),
            raw: raw_plan,
        })
    }

    fn check(&self, status: i32) -> Result<(), Error> {
        if status == ffi::OK {
            return Ok(());
        }
        // SAFETY: returns this thread's message, valid until its next call.
        let message = unsafe { CStr::from_ptr((self.api.last_error)()) };
        Err(Error::Call {
            status: Status::from_code(status),
            message: message.to_string_lossy().into_owned(),
        })
    }

    fn fill_sku(
        &self,
        query: impl FnOnce(&mut ffi::Sku) -> Result<i32, Error>,
    ) -> Result<Sku, Error> {
        // SAFETY: all-zero is a value of this struct of numbers and pointers.
        let mut raw: ffi::Sku = unsafe { std::mem::zeroed() };
        raw.struct_size = size_of::<ffi::Sku>();
        self.check(query(&mut raw)?)?;
        // SAFETY: the library has filled it with static strings.
        unsafe {
            Ok(Sku {
                kernel: text(raw.kernel),
                backend: text(raw.backend),
                arch: text(raw.arch),
                math: text(raw.math),
                accumulator: text(raw.accumulator),
                features: raw.features,
                workspace_bytes: raw.workspace_bytes,
                workspace_alignment: raw.workspace_alignment,
                deterministic: raw.deterministic != 0,
                bit_stable: raw.bit_stable != 0,
                num_splits: raw.num_splits,
                num_threads: raw.num_threads,
                reference: raw.flags & ffi::KERNEL_REFERENCE != 0,
            })
        }
    }

    /// Runs with the thread's workspace, and once more with a larger one if it is too small.
    fn with_workspace(
        &self,
        mut run: impl FnMut(&ffi::Exec) -> i32,
        query: impl FnOnce(&mut ffi::Sku) -> i32,
    ) -> Result<(), Error> {
        thread_local!(static WORKSPACE: RefCell<Vec<CacheLine>> = const { RefCell::new(Vec::new()) });
        WORKSPACE.with_borrow_mut(|workspace| {
            let status = run(&host_exec(workspace));
            if status != ffi::BUFFER_TOO_SMALL {
                return self.check(status);
            }
            let sku = self.fill_sku(|sku| Ok(query(sku)))?;
            workspace.resize(
                sku.workspace_bytes.div_ceil(size_of::<CacheLine>()),
                CacheLine::ZERO,
            );
            self.check(run(&host_exec(workspace)))
        })
    }
}

/// A choice of kernel for one problem. It may be shared by threads.
#[derive(Debug)]
pub struct Plan {
    library: Library,
    raw: *mut ffi::Plan,
}

// SAFETY: a plan is immutable, and the library says that threads may share it.
unsafe impl Send for Plan {}
// SAFETY: as above.
unsafe impl Sync for Plan {}

impl Plan {
    /// The kernel that was chosen.
    ///
    /// # Errors
    /// None is known.
    pub fn sku(&self) -> Result<Sku, Error> {
        // SAFETY: the plan lives.
        self.library
            .fill_sku(|sku| Ok(unsafe { (self.library.api.plan_sku)(self.raw, sku) }))
    }

    /// [`Library::forward`] without the choosing.
    ///
    /// # Errors
    /// [`Error::Call`], also if the tensors are not like those of the plan.
    pub fn run(&self, tensors: &mut Tensors<'_>) -> Result<(), Error> {
        on_host(tensors)?;
        let api = self.library.api;
        tensors.with_raw(|raw| {
            self.library.with_workspace(
                // SAFETY: as in `Library::forward`, and the plan lives.
                |exec| unsafe { (api.plan_run)(self.raw, raw, exec) },
                // SAFETY: the plan lives.
                |sku| unsafe { (api.plan_sku)(self.raw, sku) },
            )
        })
    }

    /// [`Library::forward_on`] without the choosing.
    ///
    /// # Safety
    /// As there.
    ///
    /// # Errors
    /// As [`run`](Self::run).
    pub unsafe fn run_on(&self, tensors: &mut Tensors<'_>, exec: &Exec) -> Result<(), Error> {
        let api = self.library.api;
        // SAFETY: the caller answers for the memory, and the plan lives.
        let status =
            tensors.with_raw(|raw| unsafe { (api.plan_run)(self.raw, raw, &raw_exec(exec)) });
        self.library.check(status)
    }
}

impl Drop for Plan {
    fn drop(&mut self) {
        // SAFETY: nobody else can be using it.
        unsafe { (self.library.api.plan_destroy)(self.raw) }
    }
}

/// What a workspace is made of, aligned as every kernel on the CPU wants it.
#[derive(Clone, Copy)]
#[repr(C, align(64))]
struct CacheLine([u8; 64]);

impl CacheLine {
    const ZERO: Self = Self([0; 64]);
}

fn host_exec(workspace: &mut [CacheLine]) -> ffi::Exec {
    raw_exec(&Exec {
        stream: null_mut(),
        workspace: workspace.as_mut_ptr().cast(),
        workspace_bytes: size_of_val(workspace),
    })
}

fn raw_exec(exec: &Exec) -> ffi::Exec {
    ffi::Exec {
        struct_size: size_of::<ffi::Exec>(),
        flags: 0,
        stream: exec.stream,
        workspace: exec.workspace,
        workspace_bytes: exec.workspace_bytes,
        parallel_for: None,
        parallel_ctx: null_mut(),
    }
}

fn on_host(tensors: &Tensors<'_>) -> Result<(), Error> {
    match tensors.device() {
        Device::Cpu => Ok(()),
        Device::Cuda(_) => Err(invalid(
            "query: is on a GPU, where a call needs a stream: forward_on, run_on, backward_on"
                .into(),
        )),
    }
}

fn host(device: Device, operation: &str) -> Result<(), Error> {
    match device {
        Device::Cpu => Ok(()),
        Device::Cuda(_) => Err(invalid(format!(
            "{operation}: a tensor is on a GPU, this crate does it on the CPU"
        ))),
    }
}

fn invalid(message: String) -> Error {
    Error::Call {
        status: Status::InvalidArgument,
        message,
    }
}

/// Calls `body` with all of a backward call as the library reads it.
fn with_backward<R>(
    options: &Options,
    tensors: &Tensors<'_>,
    gradients: &Gradients<'_>,
    body: impl FnOnce(&ffi::ForwardDesc, &ffi::Tensors, &ffi::Gradients) -> Result<R, Error>,
) -> Result<R, Error> {
    options
        .with_raw(|desc| tensors.with_raw(|raw| gradients.with_raw(|given| body(desc, raw, given))))
}

/// # Safety
/// `text` is a static string.
unsafe fn text(text: *const c_char) -> &'static str {
    // SAFETY: by the caller.
    unsafe { CStr::from_ptr(text) }.to_str().unwrap_or("?")
}

/// The system's own words, without the wrapping of libloading.
fn reason(error: &libloading::Error) -> String {
    std::error::Error::source(error).map_or_else(|| error.to_string(), |e| e.to_string())
}

/// `libdlattn.so.1` in the folder of the program or shared library that this code is part of.
fn beside() -> Option<PathBuf> {
    #[repr(C)]
    struct DlInfo {
        file_name: *const c_char,
        file_base: *mut c_void,
        symbol_name: *const c_char,
        symbol_address: *mut c_void,
    }
    extern "C" {
        fn dladdr(address: *const c_void, info: *mut DlInfo) -> c_int;
    }
    static HERE: u8 = 0;
    let mut info = DlInfo {
        file_name: null(),
        file_base: null_mut(),
        symbol_name: null(),
        symbol_address: null_mut(),
    };
    // SAFETY: part of libc; the file's name, if found, is a string that lives while the code does.
    let file = unsafe {
        if dladdr((&raw const HERE).cast(), &mut info) == 0 || info.file_name.is_null() {
            return None;
        }
        CStr::from_ptr(info.file_name).to_str().ok()?
    };
    // A program started by its bare name has no folder here: Path gives "", meant is ".".
    let folder = Path::new(file).parent()?;
    Some(
        if folder.as_os_str().is_empty() {
            Path::new(".")
        } else {
            folder
        }
        .join(SONAME),
    )
}
