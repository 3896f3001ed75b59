//! Random tensors under the names of a checkpoint.

use super::{Family, Sizes};
use candle_core::{DType, Device, Result, Shape, Tensor};
use candle_nn::var_builder::SimpleBackend;
use candle_nn::{Init, VarBuilder};
use rayon::prelude::*;
use std::collections::HashMap;
use std::sync::Arc;

/// Where a model looks for its block.
pub fn block_prefix(family: Family) -> &'static str {
    match family {
        Family::Mixtral => "model.layers.0.block_sparse_moe",
        _ => "model.layers.0.mlp",
    }
}

/// Every tensor that a model asks for.
#[derive(Clone)]
pub struct Source {
    tensors: Arc<HashMap<String, Tensor>>,
    pub dtype: DType,
}

/// Uniform numbers with mean 0 and the given standard deviation: the same for the same name.
pub fn noise(name: &str, shape: (usize, usize), deviation: f64, dtype: DType) -> Result<Tensor> {
    let seed = name.bytes().fold(0xcbf2_9ce4_8422_2325u64, |h, b| {
        (h ^ u64::from(b)).wrapping_mul(0x100_0000_01b3)
    });
    let scale = (deviation * 3f64.sqrt()) as f32;
    let mut data = vec![0f32; shape.0 * shape.1];
    data.par_chunks_mut(1 << 14)
        .enumerate()
        .for_each(|(chunk, out)| {
            // SplitMix64, from a state of its own in each chunk.
            let mut state = seed.wrapping_add((chunk as u64) << 40);
            for v in out {
                state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
                let mut z = (state ^ (state >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
                z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
                let unit = ((z >> 40) as f32) / (1u32 << 23) as f32 - 1.0;
                *v = unit * scale;
            }
        });
    Tensor::from_vec(data, shape, &Device::Cpu)?.to_dtype(dtype)
}

impl Source {
    /// The block of a family, with weights that keep activations near 1.
    pub fn new(family: Family, sizes: Sizes, dtype: DType) -> Result<Self> {
        let mut tensors = HashMap::new();
        let root = block_prefix(family);
        let (h, i) = (sizes.hidden, sizes.intermediate);
        let mut add = |name: String, shape: (usize, usize), gain: f64| -> Result<()> {
            let deviation = gain / (shape.1 as f64).sqrt();
            tensors.insert(name.clone(), noise(&name, shape, deviation, dtype)?);
            Ok(())
        };
        let mut mlp = |prefix: &str, [gate, up, down]: [&str; 3], width: usize| -> Result<()> {
            add(format!("{prefix}.{gate}.weight"), (width, h), 1.0)?;
            add(format!("{prefix}.{up}.weight"), (width, h), 1.0)?;
            add(format!("{prefix}.{down}.weight"), (h, width), 2.0)
        };
        let names = match family {
            Family::Mixtral => ["w1", "w3", "w2"],
            _ => ["gate_proj", "up_proj", "down_proj"],
        };
        for e in 0..sizes.experts {
            mlp(&format!("{root}.experts.{e}"), names, i)?;
        }
        match family {
            Family::Qwen2 => mlp(&format!("{root}.shared_expert"), names, sizes.shared)?,
            Family::DeepSeek2 => mlp(&format!("{root}.shared_experts"), names, sizes.shared)?,
            _ => {}
        }
        if family == Family::Qwen2 {
            add(format!("{root}.shared_expert_gate.weight"), (1, h), 1.0)?;
        }
        add(format!("{root}.gate.weight"), (sizes.experts, h), 1.5)?;
        let embedding = noise("x", (sizes.vocab, h), 1.0 / 64.0, dtype)?;
        tensors.insert("model.embed_tokens.weight".into(), embedding);
        Ok(Self {
            tensors: Arc::new(tensors),
            dtype,
        })
    }

    /// The same experts under the names that another family has for them.
    pub fn renamed(&self, from: Family, to: Family) -> Self {
        let pairs = [("w1", "gate_proj"), ("w3", "up_proj"), ("w2", "down_proj")];
        let rename = |name: &String| {
            let name = name.replace(block_prefix(from), block_prefix(to));
            pairs.iter().fold(name, |n, (a, b)| {
                n.replace(&format!(".{a}."), &format!(".{b}."))
            })
        };
        let tensors = self
            .tensors
            .iter()
            .map(|(name, t)| (rename(name), t.clone()));
        Self {
            tensors: Arc::new(tensors.collect()),
            dtype: self.dtype,
        }
    }

    /// The same with one tensor replaced.
    pub fn with(&self, name: &str, tensor: Tensor) -> Self {
        let mut tensors = (*self.tensors).clone();
        tensors.insert(name.into(), tensor);
        Self {
            tensors: Arc::new(tensors),
            dtype: self.dtype,
        }
    }

    pub fn tensor(&self, name: &str) -> Result<Tensor> {
        match self.tensors.get(name) {
            Some(tensor) => Ok(tensor.clone()),
            None => candle_core::bail!("no tensor {name}"),
        }
    }

    pub fn var_builder(&self) -> VarBuilder<'static> {
        VarBuilder::from_backend(Box::new(self.clone()), self.dtype, Device::Cpu)
    }
}

impl SimpleBackend for Source {
    fn get(
        &self,
        shape: Shape,
        name: &str,
        _: Init,
        dtype: DType,
        device: &Device,
    ) -> Result<Tensor> {
        match self.tensors.get(name) {
            Some(tensor) if *tensor.shape() == shape => return tensor.to_dtype(dtype),
            _ => {}
        }
        if name == "lm_head.weight" {
            let (rows, cols) = shape.dims2()?;
            let ones = |i: usize| (0..cols).map(move |j| f32::from(u8::from(i == j)));
            let data = (0..rows).flat_map(ones).collect::<Vec<_>>();
            return Tensor::from_vec(data, shape, device)?.to_dtype(dtype);
        }
        let value = match name.rsplit('.').nth(1) {
            Some("post_attention_layernorm") => 32768f32,
            Some("norm") => 512.0,
            _ => 0.0,
        };
        Tensor::full(value, shape, device)?.to_dtype(dtype)
    }

    fn get_unchecked(&self, name: &str, dtype: DType, _: &Device) -> Result<Tensor> {
        self.tensor(name)?.to_dtype(dtype)
    }

    fn contains_tensor(&self, name: &str) -> bool {
        self.tensors.contains_key(name)
    }
}
