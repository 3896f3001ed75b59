//! Checkpoints in the making.

use super::*;

pub const H: usize = 20;
pub const I: usize = 12;
pub const E: usize = 6;

/// A directory that goes when the test ends.
pub struct Dir(PathBuf);

impl Dir {
    pub fn new(name: &str) -> Self {
        let path = std::env::temp_dir().join(format!(
            "moe-kernels-checkpoint-{name}-{}",
            std::process::id()
        ));
        let _ = std::fs::remove_dir_all(&path);
        std::fs::create_dir_all(&path).expect("a temporary directory");
        Self(path)
    }

    pub fn file(&self, name: &str) -> PathBuf {
        self.0.join(name)
    }
}

impl Drop for Dir {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

/// A checkpoint in the making.
#[derive(Clone)]
pub struct Model {
    pub dtype: Dtype,
    pub tensors: BTreeMap<String, (Dtype, Vec<usize>, Vec<u8>)>,
}

impl Model {
    pub fn new(dtype: Dtype) -> Self {
        let model = Self {
            dtype,
            tensors: BTreeMap::new(),
        };
        // Other layers and tensors are there and are none of the layer's business.
        model
            .with("model.embed_tokens.weight", &[4, H])
            .with("model.layers.0.mlp.gate_proj.weight", &[I, H])
            .with("model.layers.11.mlp.experts.0.up_proj.weight", &[I, H])
    }

    /// A tensor of numbers in −0.5..0.5 that depend on its name.
    pub fn with(mut self, name: &str, shape: &[usize]) -> Self {
        let mut state = name
            .bytes()
            .fold(7u64, |s, b| s.wrapping_mul(1_000_003) ^ u64::from(b));
        let mut next = || {
            state = state
                .wrapping_mul(6_364_136_223_846_793_005)
                .wrapping_add(1_442_695_040_888_963_407);
            (state >> 40) as f32 / (1u32 << 24) as f32 - 0.5
        };
        let n: usize = shape.iter().product();
        let mut bytes = Vec::new();
        for _ in 0..n {
            match self.dtype {
                Dtype::F16 => bytes.extend(f16::from_f32(next()).to_le_bytes()),
                Dtype::BF16 => bytes.extend(bf16::from_f32(next()).to_le_bytes()),
                _ => bytes.extend(next().to_le_bytes()),
            }
        }
        self.tensors
            .insert(name.into(), (self.dtype, shape.to_vec(), bytes));
        self
    }

    pub fn with_separate(mut self, prefix: &str, names: [&str; 3]) -> Self {
        for e in 0..E {
            for (name, shape) in names.iter().zip([[I, H], [I, H], [H, I]]) {
                self = self.with(&format!("{prefix}.{e}.{name}.weight"), &shape);
            }
        }
        self
    }

    pub fn without(mut self, name: &str) -> Self {
        self.tensors
            .remove(name)
            .unwrap_or_else(|| panic!("{name} is not there"));
        self
    }

    pub fn write(&self, path: &Path) {
        let views = self.tensors.iter().map(|(name, (dtype, shape, bytes))| {
            (
                name,
                TensorView::new(*dtype, shape.clone(), bytes).expect("a tensor"),
            )
        });
        serialize_to_file(views, None, path).expect("a file");
    }
}

pub fn mixtral(dtype: Dtype) -> Model {
    Model::new(dtype)
        .with("model.layers.1.block_sparse_moe.gate.weight", &[E, H])
        .with_separate(
            "model.layers.1.block_sparse_moe.experts",
            ["w1", "w3", "w2"],
        )
}

pub fn qwen3(dtype: Dtype) -> Model {
    Model::new(dtype)
        .with("model.layers.1.mlp.gate.weight", &[E, H])
        .with_separate(
            "model.layers.1.mlp.experts",
            ["gate_proj", "up_proj", "down_proj"],
        )
}

pub fn with_shared(model: Model, prefix: &str, inner: usize) -> Model {
    model
        .with(&format!("{prefix}.gate_proj.weight"), &[inner, H])
        .with(&format!("{prefix}.up_proj.weight"), &[inner, H])
        .with(&format!("{prefix}.down_proj.weight"), &[H, inner])
}

pub fn gpt_oss(dtype: Dtype) -> Model {
    Model::new(dtype)
        .with("model.layers.1.mlp.router.weight", &[E, H])
        .with("model.layers.1.mlp.router.bias", &[E])
        .with("model.layers.1.mlp.experts.gate_up_proj", &[E, H, 2 * I])
        .with("model.layers.1.mlp.experts.gate_up_proj_bias", &[E, 2 * I])
        .with("model.layers.1.mlp.experts.down_proj", &[E, I, H])
        .with("model.layers.1.mlp.experts.down_proj_bias", &[E, H])
}
