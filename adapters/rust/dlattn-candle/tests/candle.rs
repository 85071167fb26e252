//! The operation against candle's own matmul and softmax. `DLATTN_LIBRARY` names the library. With
//! the feature `cuda` everything runs on the first GPU too.

use candle_core::{DType, Device, IndexOp, Result, Tensor, Var, D};
use dlattn_candle::{attention, Alignment, Attention, Options};

/// Each device with a type that it is tested with and what its outputs may differ by.
fn devices() -> Vec<(Device, DType, f64)> {
    let mut devices = vec![(Device::Cpu, DType::F32, 1e-5)];
    if cfg!(feature = "cuda") {
        let gpu = Device::new_cuda(0).expect("the feature cuda is tested on a machine with a GPU");
        devices.push((gpu.clone(), DType::F32, 1e-5));
        devices.push((gpu, DType::F16, 4e-3));
    }
    devices
}

/// Query `[2, 4, 9, D]`, key and value `[2, 2, 11, D]`.
fn inputs(device: &Device, dtype: DType, head_dim: usize) -> Result<(Tensor, Tensor, Tensor)> {
    let random = |heads, length| {
        Tensor::randn(0f32, 1.0, (2, heads, length, head_dim), device)?.to_dtype(dtype)
    };
    Ok((random(4, 9)?, random(2, 11)?, random(2, 11)?))
}

/// candle's own attention in f64 on the CPU: the output and the log-sum-exp. `bias` is added to the
/// logits.
fn reference(
    q: &Tensor,
    k: &Tensor,
    v: &Tensor,
    bias: Option<&Tensor>,
) -> Result<(Tensor, Tensor)> {
    let wide = |t: &Tensor| {
        t.to_device(&Device::Cpu)?
            .to_dtype(DType::F64)?
            .contiguous()
    };
    let (q, k, v) = (wide(q)?, wide(k)?, wide(v)?);
    let group = q.dim(1)? / k.dim(1)?;
    let repeat = |t: &Tensor| {
        let (b, h, l, d) = t.dims4()?;
        t.unsqueeze(2)?
            .broadcast_as((b, h, group, l, d))?
            .reshape((b, h * group, l, d))
    };
    let mut logits = (q.matmul(&repeat(&k)?.t()?)? / (q.dim(3)? as f64).sqrt())?;
    if let Some(bias) = bias {
        logits = logits.broadcast_add(&wide(bias)?)?;
    }
    let exp = logits.exp()?;
    let sum = exp.sum_keepdim(D::Minus1)?;
    Ok((
        exp.broadcast_div(&sum)?.matmul(&repeat(&v)?)?,
        sum.log()?.squeeze(3)?,
    ))
}

/// -inf above the diagonal that `offset` shifts to the right.
fn causal_bias(rows: usize, keys: usize, offset: usize) -> Result<Tensor> {
    let bias = (0..rows * keys)
        .map(|at| {
            if at % keys <= at / keys + offset {
                0f64
            } else {
                f64::NEG_INFINITY
            }
        })
        .collect();
    Tensor::from_vec(bias, (rows, keys), &Device::Cpu)
}

fn assert_close(got: &Tensor, expected: &Tensor, tolerance: f64) -> Result<()> {
    assert_eq!(got.dims(), expected.dims());
    let got = got.to_device(&Device::Cpu)?.to_dtype(DType::F64)?;
    let worst = (got - expected)?
        .abs()?
        .flatten_all()?
        .max(0)?
        .to_scalar::<f64>()?;
    assert!(
        worst <= tolerance,
        "differs by {worst}, allowed is {tolerance}"
    );
    Ok(())
}

fn causal() -> Options {
    Options {
        causal: true,
        ..Options::default()
    }
}

#[test]
fn dense_and_causal_in_every_type() -> Result<()> {
    for (device, dtype, tolerance) in devices() {
        for (dtype, tolerance) in [(dtype, tolerance), (DType::F16, 4e-3), (DType::BF16, 3e-2)] {
            for head_dim in [16, 64, 128] {
                let (q, k, v) = inputs(&device, dtype, head_dim)?;
                let output = attention(&q, &k, &v, &Options::default())?;
                assert_eq!(output.dtype(), dtype);
                assert_close(&output, &reference(&q, &k, &v, None)?.0, tolerance)?;
                let output = attention(&q, &k, &v, &causal())?;
                let (expected, _) = reference(&q, &k, &v, Some(&causal_bias(9, 11, 0)?))?;
                assert_close(&output, &expected, tolerance)?;
            }
        }
    }
    Ok(())
}

#[test]
fn log_sum_exp() -> Result<()> {
    for (device, dtype, tolerance) in devices() {
        let (q, k, v) = inputs(&device, dtype, 32)?;
        let options = Options {
            alignment: Alignment::BottomRight,
            ..causal()
        };
        let (output, lse) = Attention::new(options).forward_with_lse(&q, &k, &v)?;
        let (expected, expected_lse) = reference(&q, &k, &v, Some(&causal_bias(9, 11, 2)?))?;
        assert_close(&output, &expected, tolerance)?;
        assert_close(&lse, &expected_lse, 1e-4)?;
        assert_eq!(lse.dtype(), DType::F32);
    }
    Ok(())
}

/// Transposed, narrowed and broadcast views, which share storage with offsets and strides.
#[test]
fn views() -> Result<()> {
    for (device, dtype, tolerance) in devices() {
        let packed = Tensor::randn(0f32, 1.0, (2, 10, 6, 48), &device)?.to_dtype(dtype)?; // [B, L, heads, D]
        let heads = packed.transpose(1, 2)?; // [B, heads, L, D]
        let q = heads.i((.., 0..4, 1..10))?;
        let k = heads.i((.., 4..5, ..))?;
        let v = heads.i((.., 5..6, ..))?.broadcast_as((2, 1, 10, 48))?;
        assert!(!q.is_contiguous() && !k.is_contiguous());
        let expected = reference(&q, &k, &v, None)?.0;
        assert_close(
            &attention(&q, &k, &v, &Options::default())?,
            &expected,
            tolerance,
        )?;

        let shared = k.broadcast_as((2, 4, 10, 48))?; // stride 0 along the heads
        assert_close(
            &attention(
                &q,
                &shared,
                &v.broadcast_as((2, 4, 10, 48))?,
                &Options::default(),
            )?,
            &expected,
            tolerance,
        )?;

        let columns = packed.i((.., .., .., 0..24))?.transpose(1, 2)?;
        let expected = reference(&columns, &columns, &columns, None)?.0;
        assert_close(
            &attention(&columns, &columns, &columns, &Options::default())?,
            &expected,
            tolerance,
        )?;
    }
    Ok(())
}

#[test]
fn bias_mask_and_lengths() -> Result<()> {
    for (device, dtype, tolerance) in devices() {
        let (q, k, v) = inputs(&device, dtype, 64)?;
        let bias = Tensor::randn(0f32, 1.0, (1, 4, 9, 11), &device)?;
        let op = Attention {
            bias: Some(bias.clone()),
            ..Attention::default()
        };
        assert_close(
            &op.forward(&q, &k, &v)?,
            &reference(&q, &k, &v, Some(&bias))?.0,
            tolerance,
        )?;

        let mask = Tensor::from_vec(
            vec![1u8, 0, 1, 1, 0, 1, 1, 1, 0, 1, 1],
            (1, 1, 1, 11),
            &device,
        )?;
        let hidden = (mask.to_dtype(DType::F32)?.affine(1e9, -1e9))?;
        let op = Attention {
            mask: Some(mask),
            ..Attention::default()
        };
        assert_close(
            &op.forward(&q, &k, &v)?,
            &reference(&q, &k, &v, Some(&hidden))?.0,
            tolerance,
        )?;

        let lengths = Tensor::new(&[7u32, 3], &device)?;
        let op = Attention {
            key_lengths: Some(lengths),
            ..Attention::default()
        };
        let output = op.forward(&q, &k, &v)?;
        for (batch, keys) in [(0, 7), (1, 3)] {
            let (k, v) = (
                k.i((batch..=batch, .., 0..keys))?,
                v.i((batch..=batch, .., 0..keys))?,
            );
            let expected = reference(&q.i(batch..=batch)?, &k, &v, None)?.0;
            assert_close(&output.i(batch..=batch)?, &expected, tolerance)?;
        }
    }
    Ok(())
}

/// What the library reads in one type alone, or with four axes, in candle's other ones.
#[test]
fn other_types_and_fewer_axes() -> Result<()> {
    for (device, dtype, _) in devices() {
        let (q, k, v) = inputs(&device, dtype, 16)?;
        let f64s = |values: &[f64]| Tensor::new(values, &device);
        let exact = Attention {
            mask: Some(Tensor::ones((1, 1, 9, 11), DType::U8, &device)?),
            bias: Some(Tensor::ones((1, 4, 1, 11), DType::F32, &device)?),
            sinks: Some(f64s(&[0.5, -1.0, 2.0, 0.0])?.to_dtype(DType::F32)?),
            alibi_slopes: Some(f64s(&[0.5, 0.25, 0.0, 1.0])?.to_dtype(DType::F32)?),
            key_lengths: Some(Tensor::new(&[7i32, 3], &device)?),
            ..Attention::default()
        };
        let expected = exact.forward(&q, &k, &v)?.to_dtype(DType::F64)?;
        let expected = expected.to_device(&Device::Cpu)?;
        for lengths in [DType::I64, DType::U32, DType::U8] {
            let other = Attention {
                mask: Some(Tensor::ones((9, 11), DType::U8, &device)?),
                bias: Some(Tensor::ones((4, 1, 11), DType::F32, &device)?),
                sinks: Some(f64s(&[0.5, -1.0, 2.0, 0.0])?),
                alibi_slopes: Some(f64s(&[0.5, 0.25, 0.0, 1.0])?.to_dtype(DType::F16)?),
                key_lengths: Some(Tensor::new(&[7u32, 3], &device)?.to_dtype(lengths)?),
                ..Attention::default()
            };
            assert_close(&other.forward(&q, &k, &v)?, &expected, 0.0)?;
        }
    }
    Ok(())
}

#[test]
fn optional_tensors_are_refused_by_name() -> Result<()> {
    let (q, k, v) = inputs(&Device::Cpu, DType::F32, 16)?;
    let ints = |values: &[i64]| Tensor::new(values, &Device::Cpu).map(Some);
    let says = |op: Attention| op.forward(&q, &k, &v).unwrap_err().to_string();
    let long = Attention {
        key_lengths: ints(&[7, (1 << 32) + 3])?,
        ..Attention::default()
    };
    assert!(says(long).contains("key_lengths: holds 4294967299, which does not fit into i32"));
    let unsigned = Attention {
        query_lengths: Some(Tensor::new(&[7u32, 1 << 31], &Device::Cpu)?),
        ..Attention::default()
    };
    assert!(says(unsigned).contains("query_lengths: holds 2147483648"));
    let mask = Attention {
        mask: ints(&[1; 11])?,
        ..Attention::default()
    };
    assert!(says(mask).contains("mask: candle's I64"));
    let sinks = Attention {
        sinks: ints(&[1; 4])?,
        ..Attention::default()
    };
    assert!(says(sinks).contains("sinks: candle's I64"));
    Ok(())
}

#[test]
fn packed_sequences() -> Result<()> {
    for (device, dtype, tolerance) in devices() {
        let random =
            |total, heads| Tensor::randn(0f32, 1.0, (total, heads, 32), &device)?.to_dtype(dtype);
        let (q, k, v) = (random(12, 4)?, random(15, 2)?, random(15, 2)?);
        let op = Attention {
            cu_seqlens_q: Some(Tensor::new(&[0u32, 5, 12], &device)?),
            cu_seqlens_k: Some(Tensor::new(&[0u32, 9, 15], &device)?),
            ..Attention::default()
        };
        let (output, lse) = op.forward_with_lse(&q, &k, &v)?;
        assert_eq!(lse.dims(), [4, 12]);
        for (rows, keys) in [(0..5, 0..9), (5..12, 9..15)] {
            let one = |t: &Tensor, r: &std::ops::Range<usize>| {
                t.i(r.clone())?.transpose(0, 1)?.unsqueeze(0)
            };
            let (expected, expected_lse) =
                reference(&one(&q, &rows)?, &one(&k, &keys)?, &one(&v, &keys)?, None)?;
            assert_close(&one(&output, &rows)?, &expected, tolerance)?;
            assert_close(&lse.i((.., rows))?.unsqueeze(0)?, &expected_lse, 1e-4)?;
        }
    }
    Ok(())
}

/// Keys and values of 8 bits, sliced too, beside what they stand for.
#[test]
fn float8_caches() -> Result<()> {
    let (q, k, v) = inputs(&Device::Cpu, DType::F32, 64)?;
    let (k, v) = (k.to_dtype(DType::F8E4M3)?, v.to_dtype(DType::F8E4M3)?);
    let options = Options::default();
    for keys in [0..11, 3..9] {
        let (k, v) = (k.i((.., .., keys.clone()))?, v.i((.., .., keys))?);
        let ours = attention(&q, &k, &v, &options)?;
        // The float8 crate's own way to f64 does not end for every number.
        let (k, v) = (k.to_dtype(DType::F32)?, v.to_dtype(DType::F32)?);
        let (wanted, _) = reference(&q, &k, &v, None)?;
        let apart = (ours.to_dtype(DType::F64)? - wanted)?.abs()?.max_all()?;
        assert!(apart.to_scalar::<f64>()? < 1e-5);
    }
    let says = attention(&k, &k, &v, &options).unwrap_err().to_string();
    assert!(says.contains("query: candle's F8E4M3"), "{says}");
    let mut scaled = Attention {
        key_scale: Some(Tensor::new(&[[0.5f32], [2.0]], &Device::Cpu)?),
        value_scale: Some(Tensor::new(&[3f64], &Device::Cpu)?),
        ..Attention::new(options.clone())
    };
    let ours = scaled.forward(&q, &k, &v)?;
    let wide = k
        .to_dtype(DType::F32)?
        .broadcast_mul(&Tensor::new(&[[[[0.5f32]]], [[[2.0]]]], &Device::Cpu)?)?;
    let (wanted, _) = reference(&q, &wide, &(v.to_dtype(DType::F32)? * 3.0)?, None)?;
    let apart = (ours.to_dtype(DType::F64)? - wanted)?.abs()?.max_all()?;
    assert!(apart.to_scalar::<f64>()? < 1e-5);
    scaled.value_scale = Some(Tensor::new(&[-1f32], &Device::Cpu)?);
    let says = scaled.forward(&q, &k, &v).unwrap_err().to_string();
    assert!(says.contains("value_scale: entry [0, 0] is -1"), "{says}");
    let loss = attention(Var::from_tensor(&q)?.as_tensor(), &k, &v, &options)?.sum_all()?;
    let says = loss.backward().unwrap_err().to_string();
    assert!(says.contains("float8"), "{says}");
    Ok(())
}

#[test]
fn refusals() -> Result<()> {
    for (device, dtype, _) in devices() {
        let (q, k, v) = inputs(&device, dtype, 16)?;
        let message = |result: Result<Tensor>| result.unwrap_err().to_string();
        let says = message(attention(&q, &k, &v.i(0..1)?, &Options::default()));
        assert!(
            says.contains("value: axis 0 (batch) is 1, must be 2 as in query"),
            "{says}"
        );
        let says = message(attention(
            &q,
            &k.to_dtype(DType::BF16)?,
            &v,
            &Options::default(),
        ));
        assert!(says.contains("key: dtype"), "{says}");
        let says = message(attention(
            &q.to_dtype(DType::U32)?,
            &k,
            &v,
            &Options::default(),
        ));
        assert!(says.contains("query: candle's U32"), "{says}");
        let options = Options {
            kernel: Some("none such".into()),
            ..Options::default()
        };
        let says = message(attention(&q, &k, &v, &options));
        assert!(says.contains("there is no kernel \"none such\""), "{says}");
    }
    Ok(())
}

/// Gradients of sum(weights * output) by candle's own operators in f64, and by ours; those that are
/// tracked alone.
#[test]
fn gradients() -> Result<()> {
    for (device, dtype, tolerance) in devices() {
        let (q, k, v) = inputs(&device, dtype, 16)?;
        let weights = Tensor::randn(0f64, 1.0, (2, 4, 9, 16), &Device::Cpu)?;
        let wide = |t: &Tensor| Var::from_tensor(&t.to_device(&Device::Cpu)?.to_dtype(DType::F64)?);
        let (q64, k64, v64) = (wide(&q)?, wide(&k)?, wide(&v)?);
        let (expected, _) = reference(&q64, &k64, &v64, None)?;
        let expected = (expected * &weights)?.sum_all()?.backward()?;

        let (q, k, v) = (
            Var::from_tensor(&q)?,
            Var::from_tensor(&k)?,
            Var::from_tensor(&v)?,
        );
        let ours = weights.to_device(&device)?.to_dtype(dtype)?;
        let loss = |q: &Tensor| (attention(q, &k, &v, &Options::default())? * &ours)?.sum_all();
        let found = match loss(&q)?.backward() {
            // Not every GPU has a backward kernel for every type.
            Err(error) if device.is_cuda() && error.to_string().contains("no kernel") => continue,
            found => found?,
        };
        for (name, var, var64) in [("query", &q, &q64), ("key", &k, &k64), ("value", &v, &v64)] {
            let (Some(found), Some(expected)) = (found.get(var), expected.get(var64)) else {
                panic!("{name} has no gradient");
            };
            assert_eq!(found.dtype(), dtype);
            assert_close(found, expected, 4.0 * tolerance)?;
        }
        let found_alone = loss(&q.detach())?.backward()?;
        assert!(found_alone.get(&q).is_none());
        let (Some(alone), Some(beside)) = (found_alone.get(&k), found.get(&k)) else {
            panic!("key has no gradient");
        };
        assert_eq!(
            alone
                .flatten_all()?
                .to_dtype(DType::F32)?
                .to_vec1::<f32>()?,
            beside
                .flatten_all()?
                .to_dtype(DType::F32)?
                .to_vec1::<f32>()?
        );
    }
    Ok(())
}

/// Views of a larger tensor, a causal mask and a bias, which is no variable.
#[test]
fn gradients_of_views() -> Result<()> {
    let (q, k, v) = inputs(&Device::Cpu, DType::F32, 16)?;
    let bias = Tensor::randn(0f32, 1.0, (9, 11), &Device::Cpu)?;
    let seen = causal_bias(9, 11, 2)?.broadcast_add(&bias.to_dtype(DType::F64)?)?;
    let wide = |t: &Tensor| Var::from_tensor(&t.to_dtype(DType::F64)?);
    let (q64, k64, v64) = (wide(&q)?, wide(&k)?, wide(&v)?);
    let expected = reference(&q64, &k64, &v64, Some(&seen))?
        .0
        .sqr()?
        .sum_all()?
        .backward()?;

    let packed = Var::from_tensor(&q.transpose(1, 2)?.contiguous()?)?; // [B, L, H, D]
    let mut ours = Attention::new(Options {
        causal: true,
        alignment: Alignment::BottomRight,
        ..Options::default()
    });
    ours.bias = Some(bias);
    let output = ours.forward(&packed.transpose(1, 2)?, &k, &v)?;
    let found = output.sqr()?.sum_all()?.backward()?;
    let (Some(found), Some(expected)) = (found.get(&packed), expected.get(&q64)) else {
        panic!("query has no gradient");
    };
    assert_close(&found.transpose(1, 2)?, expected, 4e-5)
}

/// No gradient is silently lost.
#[test]
fn gradients_of_optional_tensors_are_refused() -> Result<()> {
    let (q, k, v) = inputs(&Device::Cpu, DType::F32, 16)?;
    let q = Var::from_tensor(&q)?;
    let mut ours = Attention::new(Options::default());
    ours.sinks = Some(Var::zeros(4, DType::F32, &Device::Cpu)?.as_tensor().clone());
    let loss = ours.forward(&q, &k, &v)?.sum_all()?;
    let says = loss.backward().unwrap_err().to_string();
    assert!(says.contains("sinks: has no gradient"), "{says}");
    Ok(())
}
