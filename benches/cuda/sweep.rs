//! What a tuner can choose without a rebuild, by turns on the same operands: tiles and blocks on a multiprocessor, Hopper's clusters, how many rows the kernels for few rows are good
//! for, the two ways to sort, the format of the experts' rows. Answers are checked for each.

use super::catalog::{Entry, Spec, Target};
use super::gpu::Gpu;
use super::report::{Ceilings, Report};
use super::subjects::{LayerShape, ProductShape, Sort, Subject, Work};
use super::{Options, Result, Settings, Variant, rows};
use moe_kernels::cuda::grouped_gemm::params::GroupedGemmParams;
use moe_kernels::cuda::grouped_gemm::{decode, sm80, sm90};
use moe_kernels::cuda::permute::PermutePath;
use moe_kernels::cuda::{DeviceInfo, Launch, Module};

/// Another plan for each grouped product of a call; an error where there is none for the device.
type Change = Box<dyn Fn(&GroupedGemmParams, Launch, &DeviceInfo) -> Result<Launch>>;

/// A subject with its grouped products planned otherwise.
struct Changed<'a> {
    base: &'a dyn Subject,
    change: Change,
}

impl Subject for Changed<'_> {
    fn sets(&self) -> usize {
        self.base.sets()
    }

    fn work(&self) -> Work {
        self.base.work()
    }

    fn plan(&self, device: &DeviceInfo, set: usize) -> Result<Vec<Launch>> {
        let plan = self.base.plan(device, set)?;
        let changed = plan.into_iter().map(|launch| match launch.module {
            Module::GroupedGemmSm80 | Module::GroupedGemmSm90 | Module::GroupedGemmDecode => {
                let params = bytemuck::pod_read_unaligned(launch.params());
                (self.change)(&params, launch, device)
            }
            _ => Ok(launch),
        });
        changed.collect()
    }

    fn poison(&self, gpu: &Gpu, set: usize) -> Result<()> {
        self.base.poison(gpu, set)
    }

    fn check(&self, gpu: &Gpu, set: usize) -> Result<()> {
        self.base.check(gpu, set)
    }
}

/// The changes that make sense for a product, by name.
fn changes(gpu: &Gpu, smoke: bool) -> Vec<(String, Change)> {
    let mut all: Vec<(String, Change)> = vec![("as planned".into(), Box::new(|_, l, _| Ok(l)))];
    if gpu.info().compute_capability == (9, 0) {
        for cluster in [1, 2] {
            let change: Change =
                Box::new(move |p, _, d| Ok(sm90::plan_with_cluster(p, cluster, d)?));
            all.push((format!("sm_90, clusters of {cluster}"), change));
        }
    }
    for rows in sm80::TILE_ROWS {
        for blocks in if smoke { 2..=2 } else { 1..=4 } {
            let change: Change = Box::new(move |p, _, d| {
                let mut launch = sm80::plan_with_tile(p, rows, d)?;
                // Blocks are persistent: any number does all the work.
                launch.grid[0] = launch.grid[0].min(blocks * d.sm_count);
                Ok(launch)
            });
            all.push((
                format!("sm_80, {rows} rows, {blocks} a multiprocessor"),
                change,
            ));
        }
    }
    for blocks in (2..=8).step_by(if smoke { 7 } else { 2 }) {
        let change: Change = Box::new(move |p, _, d| {
            let mut launch = decode::plan_decode(p, d)?;
            let planned = launch.grid[0];
            launch.grid[0] = match planned < 6 * d.sm_count {
                true => planned,
                false => blocks * d.sm_count,
            };
            Ok(launch)
        });
        all.push((format!("few rows, {blocks} a multiprocessor"), change));
    }
    all
}

/// Products and layers whose plans are changed.
fn specs() -> Vec<(String, Spec)> {
    let mut all = Vec::new();
    for (experts, rows, n, k) in [
        (1, 8192, 8192, 8192),
        (8, 4096, 4096, 4096),
        (128, 2048, 1536, 2048),
    ] {
        let shape = ProductShape {
            experts,
            rows,
            n,
            k,
        };
        all.push((
            format!("product/{experts}x{rows}/{n}x{k}"),
            Spec::Product(shape),
        ));
    }
    for tokens in [1, 8, 16, 32, 64, 96, 128, 192, 256, 512, 2048] {
        let shape = LayerShape {
            tokens,
            hidden: 2816,
            intermediate: 704,
            experts: 128,
            top_k: 8,
            ys_f32: false,
        };
        all.push((format!("layer/{tokens}"), Spec::Layer(shape)));
    }
    all
}

/// Whether everything was measured.
pub fn sweep(gpu: &Gpu, options: &Options, settings: &Settings) -> Result<bool> {
    let mut report = Report::begin(options.out.as_deref(), "sweep", gpu)?;
    let wanted =
        |name: &str| options.only.is_empty() || options.only.iter().any(|o| name.contains(o));
    let sized = |spec: Spec| if options.smoke { spec.smoke() } else { spec };
    let mut complete = true;
    let specs = specs().into_iter();
    // A smoke test sees each kind once.
    let few = |name: &str| {
        !options.smoke || ["product/1x8192/8192x8192", "layer/1", "layer/512"].contains(&name)
    };
    for (name, spec) in specs.filter(|(name, _)| wanted(name) && few(name)) {
        let spec = sized(spec);
        let base = spec.make(gpu)?;
        let mut changed = Vec::new();
        for (label, change) in changes(gpu, options.smoke) {
            let base = &*base;
            changed.push((label, Changed { base, change }));
        }
        let variants: Vec<Variant<'_>> = changed
            .iter()
            .filter(|(label, _)| options.smoke || !hopeless(&spec, label))
            .map(|(label, changed)| (label.as_str(), *gpu.info(), changed as &dyn Subject))
            .collect();
        complete &= show(gpu, &name, spec, &variants, settings, &mut report)?;
    }
    complete &= formats(gpu, settings, &sized, &wanted, &mut report)?;
    complete &= sorts(gpu, settings, options.smoke, &wanted, &mut report)?;
    Ok(complete)
}

/// Kernels for few rows on thousands of them would take the whole time.
fn hopeless(spec: &Spec, label: &str) -> bool {
    let many = match spec {
        Spec::Product(_) => true,
        Spec::Layer(shape) => shape.tokens > 512,
        _ => false,
    };
    many && (label.starts_with("few rows") || label.contains(" 16 rows"))
}

fn show(
    gpu: &Gpu,
    name: &str,
    spec: Spec,
    variants: &[Variant<'_>],
    settings: &Settings,
    report: &mut Report,
) -> Result<bool> {
    let entry = Entry {
        id: "",
        name: name.into(),
        spec,
        target: Target::None,
    };
    let rows = rows(gpu, &entry, variants, settings, report)?;
    for row in &rows {
        report.row(row, Target::None, &Ceilings::default())?;
    }
    Ok(rows.len() == variants.len())
}

/// Experts' rows in bf16 and in f32 until they are summed.
fn formats(
    gpu: &Gpu,
    settings: &Settings,
    sized: &dyn Fn(Spec) -> Spec,
    wanted: &dyn Fn(&str) -> bool,
    report: &mut Report,
) -> Result<bool> {
    let name = "rows of experts";
    if !wanted(name) {
        return Ok(true);
    }
    let spec = |ys_f32| {
        sized(Spec::Layer(LayerShape {
            tokens: 32768,
            hidden: 2048,
            intermediate: 768,
            experts: 128,
            top_k: 8,
            ys_f32,
        }))
    };
    let (half, full) = (spec(false).make(gpu)?, spec(true).make(gpu)?);
    let variants = [("bf16", *gpu.info(), &*half), ("f32", *gpu.info(), &*full)];
    show(gpu, name, spec(false), &variants, settings, report)
}

/// The two ways to sort, below and above the number of pairs at which plans change from one to the other.
fn sorts(
    gpu: &Gpu,
    settings: &Settings,
    smoke: bool,
    wanted: &dyn Fn(&str) -> bool,
    report: &mut Report,
) -> Result<bool> {
    let (experts, top_k, mut complete) = (256, 8, true);
    let sizes: &[usize] = match smoke {
        true => &[40],
        false => &[64, 1024, 4096, 8192, 16384, 32768],
    };
    for &tokens in sizes {
        let name = format!("sort/{tokens}");
        if !wanted(&name) {
            continue;
        }
        let by = |path| Sort::new(gpu, tokens, experts, top_k, Some(path));
        let (one, three) = (by(PermutePath::OneLaunch)?, by(PermutePath::ThreeLaunches)?);
        let variants: [Variant<'_>; 2] = [
            ("one launch", *gpu.info(), &one),
            ("three launches", *gpu.info(), &three),
        ];
        let spec = Spec::Sort {
            tokens,
            experts,
            top_k,
        };
        complete &= show(gpu, &name, spec, &variants, settings, report)?;
    }
    Ok(complete)
}
