//! The crate against plain loops in f64. `DLATTN_LIBRARY` names the library.

use dlattn::{
    compact, Alignment, Append, Error, Float8, Gradients, Library, Options, Status, Tensor,
    TensorMut, Tensors,
};
use half::{bf16, f16};

/// Numbers in [-2, 2) that differ by `seed`.
fn numbers(seed: u64, count: usize) -> Vec<f32> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut next = move || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        (state >> 40) as f32 / (1u64 << 22) as f32 - 2.0
    };
    (0..count).map(|_| next()).collect()
}

/// The output and the log-sum-exp of compact `[B, H, L, D]` tensors in f64.
fn reference(
    [b, h, lq, d]: [usize; 4],
    [h_kv, lk, d_v]: [usize; 3],
    (q, k, v): (&[f32], &[f32], &[f32]),
    causal: bool,
) -> (Vec<f64>, Vec<f64>) {
    let (mut output, mut lse) = (Vec::new(), Vec::new());
    for row in 0..b * h * lq {
        let (batch, head, i) = (row / (h * lq), row / lq % h, row % lq);
        let kv = batch * h_kv + head / (h / h_kv);
        let keys = if causal { lk.min(i + 1) } else { lk };
        let weights: Vec<f64> = (0..keys)
            .map(|j| {
                let key = &k[(kv * lk + j) * d..][..d];
                let dot: f64 = q[row * d..][..d]
                    .iter()
                    .zip(key)
                    .map(|(a, b)| f64::from(a * b))
                    .sum();
                (dot / (d as f64).sqrt()).exp()
            })
            .collect();
        let sum: f64 = weights.iter().sum();
        lse.push(sum.ln());
        output.extend((0..d_v).map(|c| {
            let dot: f64 = weights
                .iter()
                .enumerate()
                .map(|(j, w)| w * f64::from(v[(kv * lk + j) * d_v + c]))
                .sum();
            dot / sum
        }));
    }
    (output, lse)
}

fn assert_close(got: impl IntoIterator<Item = f64>, expected: &[f64], tolerance: f64) {
    let got: Vec<f64> = got.into_iter().collect();
    assert_eq!(got.len(), expected.len());
    for (i, (a, b)) in got.iter().zip(expected).enumerate() {
        assert!(
            (a - b).abs() <= tolerance,
            "element {i} is {a}, expected {b}"
        );
    }
}

const QUERY: [usize; 4] = [2, 4, 7, 16];
const KEY: [usize; 4] = [2, 2, 9, 16];
const VALUE: [usize; 4] = [2, 2, 9, 12];
const OUTPUT: [usize; 4] = [2, 4, 7, 12];

fn inputs() -> (Vec<f32>, Vec<f32>, Vec<f32>) {
    let count = |shape: [usize; 4]| shape.iter().product();
    (
        numbers(1, count(QUERY)),
        numbers(2, count(KEY)),
        numbers(3, count(VALUE)),
    )
}

fn library() -> &'static Library {
    Library::get().expect("DLATTN_LIBRARY must name libdlattn.so.1")
}

fn causal() -> Options {
    Options {
        causal: true,
        ..Options::default()
    }
}

#[test]
fn forward_and_lse() {
    let (q, k, v) = inputs();
    let (mut o, mut lse) = (vec![f32::NAN; 2 * 4 * 7 * 12], vec![f32::NAN; 2 * 4 * 7]);
    let mut tensors = Tensors::new(
        Tensor::new(&q, &QUERY).unwrap(),
        Tensor::new(&k, &KEY).unwrap(),
        Tensor::new(&v, &VALUE).unwrap(),
        TensorMut::new(&mut o, &OUTPUT).unwrap(),
    );
    tensors.lse = Some(TensorMut::new(&mut lse, &OUTPUT[..3]).unwrap());
    library().forward(&causal(), &mut tensors).unwrap();
    let (expected, expected_lse) = reference(QUERY, [2, 9, 12], (&q, &k, &v), true);
    assert_close(o.iter().map(|&x| x.into()), &expected, 1e-5);
    assert_close(lse.iter().map(|&x| x.into()), &expected_lse, 1e-5);
}

#[test]
fn half_precision() {
    let (q, k, v) = inputs();
    macro_rules! check {
        ($type:ty, $tolerance:expr) => {{
            let round = |x: &[f32]| x.iter().map(|&x| <$type>::from_f32(x)).collect::<Vec<_>>();
            let widen = |x: &[$type]| x.iter().map(|&x| x.to_f32()).collect::<Vec<_>>();
            let (q, k, v) = (round(&q), round(&k), round(&v));
            let mut o = vec![<$type>::NAN; 2 * 4 * 7 * 12];
            let mut tensors = Tensors::new(
                Tensor::new(&q, &QUERY).unwrap(),
                Tensor::new(&k, &KEY).unwrap(),
                Tensor::new(&v, &VALUE).unwrap(),
                TensorMut::new(&mut o, &OUTPUT).unwrap(),
            );
            library().forward(&causal(), &mut tensors).unwrap();
            let (q, k, v) = (widen(&q), widen(&k), widen(&v));
            let (expected, _) = reference(QUERY, [2, 9, 12], (&q, &k, &v), true);
            assert_close(o.iter().map(|x| x.to_f64()), &expected, $tolerance);
        }};
    }
    check!(f16, 2e-3);
    check!(bf16, 2e-2);
}

#[test]
fn strides_plan_and_sku() {
    let (q, k, v) = inputs();
    let mut wide = vec![7f32; 2 * 4 * 7 * 24];
    let shape = OUTPUT;
    let strides: Vec<usize> = compact(&[2, 4, 7, 24]);
    let mut tensors = Tensors::new(
        Tensor::new(&q, &QUERY).unwrap(),
        Tensor::new(&k, &KEY).unwrap(),
        Tensor::new(&v, &VALUE).unwrap(),
        TensorMut::with_strides(&mut wide, &shape, &strides).unwrap(),
    );
    let plan = library().plan(&Options::default(), &tensors).unwrap();
    let sku = plan.sku().unwrap();
    assert_eq!(sku, library().sku(&Options::default(), &tensors).unwrap());
    assert_eq!(sku.backend, "cpu");
    assert!(library()
        .kernels()
        .unwrap()
        .iter()
        .any(|k| k.name == sku.kernel && k.available));
    plan.run(&mut tensors).unwrap();
    tensors.key = Tensor::new(&k, &[2, 2, 8, 16]).unwrap();
    assert!(
        plan.run(&mut tensors).is_err(),
        "a plan takes the tensors that it was made for"
    );
    let (expected, _) = reference(QUERY, [2, 9, 12], (&q, &k, &v), false);
    let got = wide
        .chunks(24)
        .flat_map(|row| row[..12].iter().map(|&x| x.into()));
    assert_close(got, &expected, 1e-5);
    assert!(wide
        .chunks(24)
        .all(|row| row[12..].iter().all(|&x| x == 7.0)));
}

#[test]
fn strides_that_run_backwards() {
    let (q, k, v) = inputs();
    let reversed = |x: &[f32]| x.iter().rev().copied().collect::<Vec<_>>();
    let (q_back, k_back) = (reversed(&q), reversed(&k));
    let mut o = vec![f32::NAN; 2 * 4 * 7 * 12];
    let backwards =
        |shape: &[usize]| -> Vec<isize> { compact(shape).iter().map(|&n| -(n as isize)).collect() };
    let mut tensors = Tensors::new(
        Tensor::strided(&q_back, q.len() - 1, &QUERY, &backwards(&QUERY)).unwrap(),
        Tensor::strided(&k_back, k.len() - 1, &KEY, &backwards(&KEY)).unwrap(),
        Tensor::new(&v, &VALUE).unwrap(),
        TensorMut::new(&mut o, &OUTPUT).unwrap(),
    );
    library().forward(&causal(), &mut tensors).unwrap();
    let (expected, _) = reference(QUERY, [2, 9, 12], (&q, &k, &v), true);
    assert_close(o.iter().map(|&x| x.into()), &expected, 1e-5);

    let data = [0f32; 12];
    for (first, strides, fits) in [
        (8, [-4, 1], true),
        (7, [-4, 1], false), // reaches -1
        (9, [-4, 1], false), // reaches 12
        (11, [-4, -1], true),
        (0, [isize::MIN, 1], false),
        (usize::MAX, [4, 1], false),
    ] {
        let tensor = Tensor::strided(&data, first, &[3, 4], &strides);
        assert_eq!(tensor.is_ok(), fits, "{first} {strides:?}: {tensor:?}");
    }
}

/// Of `inputs()`.
fn output_of(options: &Options) -> Vec<f32> {
    let (q, k, v) = inputs();
    let mut o = vec![f32::NAN; 2 * 4 * 7 * 12];
    let mut tensors = Tensors::new(
        Tensor::new(&q, &QUERY).unwrap(),
        Tensor::new(&k, &KEY).unwrap(),
        Tensor::new(&v, &VALUE).unwrap(),
        TensorMut::new(&mut o, &OUTPUT).unwrap(),
    );
    library().forward(options, &mut tensors).unwrap();
    o
}

#[test]
fn counts_beyond_their_fields() {
    let (q, k, v) = inputs();
    let options = Options {
        num_threads: u32::MAX,
        max_seqlen_q: usize::MAX,
        max_seqlen_k: usize::MAX,
        ..causal()
    };
    let o = output_of(&options);
    let (expected, _) = reference(QUERY, [2, 9, 12], (&q, &k, &v), true);
    assert_close(o.iter().map(|&x| x.into()), &expected, 1e-5);
}

#[test]
fn a_window_of_one_key_gives_its_value() {
    let (_, _, v) = inputs();
    let options = Options {
        window_left: Some(0),
        window_right: Some(0),
        alignment: Alignment::BottomRight,
        ..Options::default()
    };
    let o = output_of(&options);
    let expected: Vec<f64> = (0..2 * 4 * 7)
        .flat_map(|row| {
            let kv = row / (4 * 7) * 2 + row / 7 % 4 / 2;
            v[(kv * 9 + row % 7 + 2) * 12..][..12]
                .iter()
                .map(|&x| x.into())
        })
        .collect();
    assert_close(o.iter().map(|&x| x.into()), &expected, 1e-6);
}

#[test]
fn refusals() {
    let (q, k, v) = inputs();
    let mut o = vec![5f32; 2 * 4 * 7 * 12];
    assert!(matches!(
        Tensor::new(&q, &[2, 4, 8, 16]),
        Err(Error::Shape(_))
    ));
    assert!(matches!(
        Tensor::with_strides(&q, &QUERY, &[1, 1]),
        Err(Error::Shape(_))
    ));
    assert!(matches!(
        Tensor::new(&q, &[1, 1, 1, 1, 1]),
        Err(Error::Shape(_))
    ));
    assert!(matches!(
        Tensor::with_strides(&q, &[2, usize::MAX], &[1, 2]),
        Err(Error::Shape(_))
    ));
    let mut tensors = Tensors::new(
        Tensor::new(&q, &QUERY).unwrap(),
        Tensor::new(&k, &KEY).unwrap(),
        Tensor::new(&v, &[1, 2, 9, 12]).unwrap(),
        TensorMut::new(&mut o, &OUTPUT).unwrap(),
    );
    let error = library()
        .forward(&Options::default(), &mut tensors)
        .unwrap_err();
    let Error::Call { status, message } = &error else {
        panic!("{error:?}")
    };
    assert_eq!(*status, Status::InvalidArgument);
    assert!(message.starts_with("value: axis 0"), "{message}");
    assert_eq!(error.to_string(), *message);

    tensors.value = Tensor::new(&v, &VALUE).unwrap();
    for kernel in ["none such", "a\0b"] {
        let options = Options {
            kernel: Some(kernel.into()),
            ..Options::default()
        };
        let error = library().forward(&options, &mut tensors).unwrap_err();
        assert!(
            error.to_string().starts_with("kernel: there is no kernel"),
            "{error}"
        );
    }
    assert!(o.iter().all(|&x| x == 5.0), "a refused call writes nothing");
}

#[test]
fn files_that_are_not_the_library() {
    let error = Library::open_file("/no/such/file").unwrap_err();
    assert!(matches!(&error, Error::NotFound { searched } if searched[0].0 == "/no/such/file"));
    assert!(error.to_string().contains("/no/such/file"), "{error}");
    let error = Library::open_file("libc.so.6").unwrap_err();
    assert!(
        error
            .to_string()
            .contains("libc.so.6: has no dlattn_get_api"),
        "{error}"
    );
    let error = Error::Version {
        path: "x.so".into(),
        serves: Some((2, 1)),
    };
    assert_eq!(
        error.to_string(),
        "x.so: serves ABI 2.1, this program needs 1.0"
    );
}

/// Beside central differences of the reference, along one direction in each tensor.
#[test]
fn backward() {
    let (q, k, v) = inputs();
    let (mut o, mut lse) = (vec![0f32; 2 * 4 * 7 * 12], vec![0f32; 2 * 4 * 7]);
    let (d_o, d_lse) = (numbers(4, o.len()), numbers(5, lse.len()));
    let mut made = [&q, &k, &v].map(|x| vec![f32::NAN; x.len()]);
    let mut tensors = Tensors::new(
        Tensor::new(&q, &QUERY).unwrap(),
        Tensor::new(&k, &KEY).unwrap(),
        Tensor::new(&v, &VALUE).unwrap(),
        TensorMut::new(&mut o, &OUTPUT).unwrap(),
    );
    tensors.lse = Some(TensorMut::new(&mut lse, &OUTPUT[..3]).unwrap());
    library().forward(&causal(), &mut tensors).unwrap();
    let [d_q, d_k, d_v] = &mut made;
    let mut gradients = Gradients::new(Tensor::new(&d_o, &OUTPUT).unwrap());
    gradients.d_lse = Some(Tensor::new(&d_lse, &OUTPUT[..3]).unwrap());
    gradients.d_query = Some(TensorMut::new(d_q, &QUERY).unwrap());
    gradients.d_key = Some(TensorMut::new(d_k, &KEY).unwrap());
    gradients.d_value = Some(TensorMut::new(d_v, &VALUE).unwrap());
    let sku = library()
        .backward_sku(&causal(), &tensors, &gradients)
        .unwrap();
    assert!(sku.kernel.starts_with("cpu_bwd_"), "{}", sku.kernel);
    assert_eq!(sku.reference, sku.kernel == "cpu_bwd_ref");
    library()
        .backward(&causal(), &tensors, &mut gradients)
        .unwrap();

    let loss = |q: &[f32], k: &[f32], v: &[f32]| -> f64 {
        let (o, lse) = reference(QUERY, [2, 9, 12], (q, k, v), true);
        let dot =
            |a: &[f64], b: &[f32]| -> f64 { a.iter().zip(b).map(|(a, b)| a * f64::from(*b)).sum() };
        dot(&o, &d_o) + dot(&lse, &d_lse)
    };
    for (n, gradient) in made.iter().enumerate() {
        let step = 1.0 / 64.0; // a power of 2, as numbers() are, so that the ends are exact
        let direction: Vec<f32> = numbers(6, gradient.len())
            .iter()
            .map(|x| x.signum())
            .collect();
        let end = |sign: f32| {
            let mut moved = [q.clone(), k.clone(), v.clone()];
            for (x, d) in moved[n].iter_mut().zip(&direction) {
                *x += sign * step * d;
            }
            loss(&moved[0], &moved[1], &moved[2])
        };
        // Without the error of the second order: from two steps, as Richardson has it.
        let slope = |h: f32| (end(h) - end(-h)) / f64::from(2.0 * h * step);
        let expected = (4.0 * slope(0.5) - slope(1.0)) / 3.0;
        let found: f64 = gradient
            .iter()
            .zip(&direction)
            .map(|(g, d)| f64::from(g * d))
            .sum();
        assert!(
            (found - expected).abs() < 1e-3 * expected.abs().max(1.0),
            "tensor {n}: {found}, expected {expected}"
        );
    }
}

#[test]
fn backward_says_what_is_wrong() {
    let (q, k, v) = inputs();
    let mut o = vec![0f32; 2 * 4 * 7 * 12];
    let d_o = o.clone();
    let tensors = Tensors::new(
        Tensor::new(&q, &QUERY).unwrap(),
        Tensor::new(&k, &KEY).unwrap(),
        Tensor::new(&v, &VALUE).unwrap(),
        TensorMut::new(&mut o, &OUTPUT).unwrap(),
    );
    let mut d_q = vec![f32::NAN; q.len()];
    let mut gradients = Gradients::new(Tensor::new(&d_o, &OUTPUT).unwrap());
    gradients.d_query = Some(TensorMut::new(&mut d_q, &QUERY).unwrap());
    let error = library()
        .backward(&causal(), &tensors, &mut gradients)
        .unwrap_err();
    assert!(error.to_string().contains("lse"), "{error}");
    assert!(d_q.iter().all(|x| x.is_nan()));
}

/// Keys in two parts, merged, are as all keys at once.
#[test]
fn merge_of_two_parts() {
    let (q, k, v) = inputs();
    let run = |first: usize, keys: usize| {
        let (mut o, mut lse) = (vec![0f32; 2 * 4 * 7 * 12], vec![0f32; 2 * 4 * 7]);
        let strides = |shape: [usize; 4]| compact(&shape);
        let mut tensors = Tensors::new(
            Tensor::new(&q, &QUERY).unwrap(),
            Tensor::with_strides(&k[first * 16..], &[2, 2, keys, 16], &strides(KEY)).unwrap(),
            Tensor::with_strides(&v[first * 12..], &[2, 2, keys, 12], &strides(VALUE)).unwrap(),
            TensorMut::new(&mut o, &OUTPUT).unwrap(),
        );
        tensors.lse = Some(TensorMut::new(&mut lse, &OUTPUT[..3]).unwrap());
        library()
            .forward(&Options::default(), &mut tensors)
            .unwrap();
        (o, lse)
    };
    let (parts, whole) = ([run(0, 4), run(4, 5)], run(0, 9));
    let outputs = [0, 1].map(|n| Tensor::new(&parts[n].0, &OUTPUT).unwrap());
    let lses = [0, 1].map(|n| Tensor::new(&parts[n].1, &OUTPUT[..3]).unwrap());
    let (mut o, mut lse) = (vec![0f32; whole.0.len()], vec![0f32; whole.1.len()]);
    let mut output = TensorMut::new(&mut o, &OUTPUT).unwrap();
    let mut sums = TensorMut::new(&mut lse, &OUTPUT[..3]).unwrap();
    library()
        .merge(&outputs, &lses, &mut output, Some(&mut sums))
        .unwrap();
    let error = library()
        .merge(&outputs, &lses[..1], &mut output, None)
        .unwrap_err();
    assert!(
        error.to_string().contains("lses: are 1, outputs are 2"),
        "{error}"
    );
    let wide = |x: &[f32]| x.iter().map(|&x| f64::from(x)).collect::<Vec<_>>();
    assert_close(wide(&o), &wide(&whole.0), 1e-5);
    assert_close(wide(&lse), &wide(&whole.1), 1e-5);
}

/// Two rows behind the one that is there; nothing else of the cache changes.
#[test]
fn append_to_a_cache() {
    let (key, value) = (numbers(1, 2 * 4), numbers(2, 2 * 4));
    let (mut key_cache, mut value_cache) = (vec![7f32; 5 * 4], vec![7f32; 5 * 4]);
    let lengths = [1i32];
    let mut tensors = Append {
        key: Tensor::new(&key, &[1, 1, 2, 4]).unwrap(),
        value: Tensor::new(&value, &[1, 1, 2, 4]).unwrap(),
        key_cache: TensorMut::new(&mut key_cache, &[1, 1, 5, 4]).unwrap(),
        value_cache: TensorMut::new(&mut value_cache, &[1, 1, 5, 4]).unwrap(),
        cache_lengths: Tensor::new(&lengths, &[1]).unwrap(),
        new_lengths: None,
        cu_seqlens: None,
        block_table: None,
        key_scale: None,
        value_scale: None,
    };
    library().append(&mut tensors).unwrap();
    for (cache, rows) in [(&key_cache, &key), (&value_cache, &value)] {
        assert_eq!(cache[4..12], rows[..]);
        assert!(cache[..4].iter().chain(&cache[12..]).all(|&x| x == 7.0));
    }
}

/// What the bytes of a cache stand for.
fn widened(codes: &[u8], float8: Float8) -> Vec<f32> {
    let wide = |&code: &u8| match float8 {
        Float8::E5M2 => f16::from_bits(u16::from(code) << 8).to_f32(),
        // An f16 of 2^-8 the size.
        Float8::E4M3Fn => {
            let sign = u16::from(code & 0x80) << 8;
            f16::from_bits(sign | u16::from(code & 0x7f) << 7).to_f32() * 256.0
        }
    };
    codes.iter().map(wide).collect()
}

/// Bytes of float8 between 1/8 and 2, of either sign.
fn codes(seed: u64, count: usize, float8: Float8) -> Vec<u8> {
    let (first, values) = match float8 {
        Float8::E4M3Fn => (0x20, 32.0),
        Float8::E5M2 => (0x30, 16.0),
    };
    let code = |x: f32| (first + (x.abs() / 2.0 * values) as u8) | if x < 0.0 { 0x80 } else { 0 };
    // numbers() may be -2, whose code would be one too far.
    numbers(seed, count)
        .iter()
        .map(|&x| code(x * 0.99))
        .collect()
}

fn float8_tensor<'a>(codes: &'a [u8], shape: &[usize], float8: Float8) -> Tensor<'a> {
    let bytes = Tensor::new(codes, shape).unwrap();
    bytes.holding(float8).unwrap()
}

/// Each of so many groups of elements times its own scale.
fn scaled(x: &[f32], scales: &[f32]) -> Vec<f32> {
    let group = x.len() / scales.len();
    x.iter()
        .enumerate()
        .map(|(i, x)| x * scales[i / group])
        .collect()
}

/// Keys of e4m3 and values of e5m2 with scales: beside loops over what they stand for, and, in double,
/// the bits that those numbers give as f32.
#[test]
fn float8_with_scales() {
    let q = numbers(1, QUERY.iter().product());
    let k = codes(2, KEY.iter().product(), Float8::E4M3Fn);
    let v = codes(3, VALUE.iter().product(), Float8::E5M2);
    let (key_scale, value_scale, query_scale) = ([0.5f32, 2.0, 1.0, 0.25], [4f32, 0.5], [2f32]);
    let wide_q = scaled(&q, &query_scale);
    let wide_k = scaled(&widened(&k, Float8::E4M3Fn), &key_scale);
    let wide_v = scaled(&widened(&v, Float8::E5M2), &value_scale);
    let run = |float8: bool, kernel: Option<&str>| {
        let mut o = vec![f32::NAN; OUTPUT.iter().product()];
        let mut tensors = Tensors::new(
            Tensor::new(if float8 { &q } else { &wide_q }, &QUERY).unwrap(),
            Tensor::new(&wide_k, &KEY).unwrap(),
            Tensor::new(&wide_v, &VALUE).unwrap(),
            TensorMut::new(&mut o, &OUTPUT).unwrap(),
        );
        if float8 {
            tensors.key = float8_tensor(&k, &KEY, Float8::E4M3Fn);
            tensors.value = float8_tensor(&v, &VALUE, Float8::E5M2);
            tensors.query_scale = Some(Tensor::new(&query_scale, &[1]).unwrap());
            tensors.key_scale = Some(Tensor::new(&key_scale, &[2, 2]).unwrap());
            tensors.value_scale = Some(Tensor::new(&value_scale, &[2, 1]).unwrap());
        }
        let kernel = kernel.map(str::to_owned);
        let options = Options { kernel, ..causal() };
        library().forward(&options, &mut tensors).unwrap();
        o
    };
    let (expected, _) = reference(QUERY, [2, 9, 12], (&wide_q, &wide_k, &wide_v), true);
    assert_close(run(true, None).iter().map(|&x| x.into()), &expected, 1e-5);
    assert_eq!(
        run(true, Some("cpu_fwd_ref")),
        run(false, Some("cpu_fwd_ref"))
    );
}

/// Pages of float8, each with scales of its own, beside pages of what they stand for.
#[test]
fn float8_pages_with_scales() {
    let (pages, query) = ([3, 2, 4, 16], [2, 4, 1, 16]); // of 4 keys; one row for each batch
    let q = numbers(1, query.iter().product());
    let k = codes(2, pages.iter().product(), Float8::E4M3Fn);
    let v = codes(3, pages.iter().product(), Float8::E4M3Fn);
    let (key_scale, value_scale) = ([0.5f32, 2.0, 1.0, 0.25, 4.0, 1.0], [2f32, 1.0, 0.5]);
    let wide_k = scaled(&widened(&k, Float8::E4M3Fn), &key_scale);
    let wide_v = scaled(&widened(&v, Float8::E4M3Fn), &value_scale);
    let (table, lengths) = ([2i32, 0, 1, 1], [7i32, 3]);
    let run = |float8: bool| {
        let mut o = vec![f32::NAN; query.iter().product()];
        let mut tensors = Tensors::new(
            Tensor::new(&q, &query).unwrap(),
            Tensor::new(&wide_k, &pages).unwrap(),
            Tensor::new(&wide_v, &pages).unwrap(),
            TensorMut::new(&mut o, &query).unwrap(),
        );
        tensors.block_table = Some(Tensor::new(&table, &[2, 2]).unwrap());
        tensors.key_lengths = Some(Tensor::new(&lengths, &[2]).unwrap());
        if float8 {
            tensors.key = float8_tensor(&k, &pages, Float8::E4M3Fn);
            tensors.value = float8_tensor(&v, &pages, Float8::E4M3Fn);
            tensors.key_scale = Some(Tensor::new(&key_scale, &[3, 2]).unwrap());
            tensors.value_scale = Some(Tensor::new(&value_scale, &[3, 1]).unwrap());
        }
        library()
            .forward(&Options::default(), &mut tensors)
            .unwrap();
        o
    };
    let wide: Vec<f64> = run(false).iter().map(|&x| x.into()).collect();
    assert_close(run(true).iter().map(|&x| x.into()), &wide, 1e-5);
}

#[test]
fn float8_refusals() {
    let (q, bytes) = (numbers(1, 2 * 4 * 7 * 16), vec![0x38u8; 2 * 2 * 9 * 16]);
    let mut o = vec![5f32; 2 * 4 * 7 * 16];
    let error = Tensor::new(&q, &QUERY).unwrap().holding(Float8::E5M2);
    assert!(
        error.is_err_and(|e| e.to_string().starts_with("E5M2: is held by tensors of u8")),
        "f32 is not float8"
    );
    let negative = [1f32, -1.0];
    let three = [1f32; 3];
    for (float8, scale, says) in [
        (false, None, "key: dtype is uint8"),
        (
            true,
            Some((&negative[1..], [1, 1])),
            "key_scale: entry [0, 0] is -1, must be positive",
        ),
        (
            true,
            Some((&negative[..], [2, 1])),
            "key_scale: entry [1, 0] is -1, must be positive",
        ),
        (
            true,
            Some((&three[..], [1, 3])),
            "key_scale: axis 1 (heads) is 3",
        ),
    ] {
        let cache = || match float8 {
            true => float8_tensor(&bytes, &KEY, Float8::E4M3Fn),
            false => Tensor::new(&bytes, &KEY).unwrap(),
        };
        let mut tensors = Tensors::new(
            Tensor::new(&q, &QUERY).unwrap(),
            cache(),
            cache(),
            TensorMut::new(&mut o, &QUERY).unwrap(),
        );
        tensors.key_scale = scale.map(|(data, shape)| Tensor::new(data, &shape).unwrap());
        let error = library().forward(&causal(), &mut tensors).unwrap_err();
        assert!(error.to_string().starts_with(says), "{error}, not {says}");
    }
    assert!(o.iter().all(|&x| x == 5.0), "a refused call writes nothing");
}

/// Rows are divided by their scale and rounded, beyond 448 to 448; a refused call writes nothing.
#[test]
fn append_to_a_cache_of_float8() {
    let rows = [1f32, -1.0, 1.0625, 1e6];
    let (mut key_cache, mut value_cache) = ([7u8; 3 * 4], [7u8; 3 * 4]);
    let lengths = [1i32];
    for (scale, says) in [(-1f32, "value_scale: entry [0, 0] is -1"), (0.5, "")] {
        let scales = [scale];
        let mut tensors = Append {
            key: Tensor::new(&rows, &[1, 1, 1, 4]).unwrap(),
            value: Tensor::new(&rows, &[1, 1, 1, 4]).unwrap(),
            key_cache: TensorMut::new(&mut key_cache, &[1, 1, 3, 4])
                .and_then(|cache| cache.holding(Float8::E4M3Fn))
                .unwrap(),
            value_cache: TensorMut::new(&mut value_cache, &[1, 1, 3, 4])
                .and_then(|cache| cache.holding(Float8::E5M2))
                .unwrap(),
            cache_lengths: Tensor::new(&lengths, &[1]).unwrap(),
            new_lengths: None,
            cu_seqlens: None,
            block_table: None,
            key_scale: None,
            value_scale: Some(Tensor::new(&scales, &[1, 1]).unwrap()),
        };
        match library().append(&mut tensors) {
            Ok(()) => assert_eq!(says, ""),
            Err(error) => {
                assert!(
                    !says.is_empty() && error.to_string().starts_with(says),
                    "{error}"
                );
                assert!(key_cache.iter().chain(&value_cache).all(|&code| code == 7));
            }
        }
    }
    assert_eq!(
        widened(&key_cache[4..8], Float8::E4M3Fn),
        [1.0, -1.0, 1.0, 448.0]
    );
    assert_eq!(
        widened(&value_cache[4..8], Float8::E5M2),
        [2.0, -2.0, 2.0, 57344.0]
    );
    for cache in [key_cache, value_cache] {
        assert!(cache[..4].iter().chain(&cache[8..]).all(|&code| code == 7));
    }
}
