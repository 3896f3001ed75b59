//! Ours alone, for processes that time something else in between. One command a line on standard input, one line of answer on standard output:
//!
//! ```text
//! weights PATH                   writes PATH.gate_up [E, 2I, H] and PATH.down [E, H, I], raw little-endian numbers of the format   ok
//! batch LOAD NUMBER T PATH       computes a batch; writes PATH.x [T, H], PATH.logits [T, E], PATH.y [T, H], raw f32                ok
//! time LOAD NUMBER T             sweeps the caches, computes the batch                                                             seconds
//! ceilings                       those seen since it was last asked                               FLOP/s of the format, bytes/s
//! ```
//!
//! It begins with one line: `H I E K isa`. Each batch is checked against the f64 reference when it is first written.

use crate::options::Options;
use crate::support::layer::measure::Machine;
use crate::support::layer::seeded::Seeded;
use crate::support::layer::source::{self, Source};
use crate::support::layer::tensor::{Expert, GateUp, Values};
use crate::support::layer::{Failure, Result, fail};
use crate::support::load::Load;
use crate::support::subject::{Batch, Subject};
use crate::support::{check_memory, on_threads, progress, shapes};
use moe_kernels::Cpu;
use std::collections::HashMap;
use std::fs::File;
use std::io::{BufRead, BufWriter, Write};
use std::time::Instant;

/// Answers until standard input ends.
///
/// # Errors
/// More than one shape or format; a command that cannot be read; an answer that is not within rounding.
pub fn run(options: &Options) -> Result<()> {
    let options = options.clone().or_smoke();
    let ([name], [dtype], [threads]) = (
        &options.shapes[..],
        &options.dtypes[..],
        &options.threads()?[..],
    ) else {
        return fail("--serve: expected one of --shapes, --dtypes and --threads each");
    };
    let cpu = options.cpu()?;
    let architecture = shapes::named(name)?;
    let mut seeded = Seeded {
        architecture: architecture.clone(),
        seed: options.seed,
        dtype: *dtype,
    };
    check_memory(name, shapes::weight_bytes(&architecture, *dtype))?;
    on_threads(*threads, || {
        let mut progress = progress();
        let built = source::build(&cpu, &architecture, &mut seeded, *dtype, progress.as_mut())?;
        let most = options.tokens.iter().copied().max().unwrap_or(1);
        let mut server = Server {
            subject: Subject::new(&cpu, &built, &architecture, *dtype, most)?,
            machine: Machine::measure(&cpu),
            cpu: &cpu,
            seeded: &mut seeded,
            options: &options,
            batches: HashMap::new(),
        };
        let (h, i, e) = (
            architecture.hidden,
            architecture.intermediate,
            architecture.experts(),
        );
        answer(&format!(
            "{h} {i} {e} {} {}",
            architecture.router.top_k,
            cpu.isa()
        ))?;
        for line in std::io::stdin().lock().lines() {
            let reply = server.command(&line?)?;
            answer(&reply)?;
        }
        Ok(())
    })
}

fn answer(line: &str) -> Result<()> {
    println!("{line}");
    Ok(std::io::stdout().flush()?)
}

struct Server<'a> {
    cpu: &'a Cpu,
    subject: Subject<'a>,
    machine: Machine,
    seeded: &'a mut Seeded,
    options: &'a Options,
    batches: HashMap<(String, usize, usize), Batch>,
}

impl Server<'_> {
    fn command(&mut self, line: &str) -> Result<String> {
        let words: Vec<&str> = line.split_whitespace().collect();
        match words[..] {
            ["weights", path] => self.weights(path),
            ["batch", load, number, tokens, path] => {
                let batch = self.batch(load, number, tokens)?;
                let checked = self.options.check;
                self.subject.check(&batch, self.seeded, checked)?;
                for (name, numbers) in [
                    ("x", batch.x.f32s()),
                    ("logits", batch.logits.clone()),
                    ("y", self.subject.output(&batch)),
                ] {
                    write(&mut file(&format!("{path}.{name}"))?, &Values::F32(numbers))?;
                }
                Ok("ok".into())
            }
            ["time", load, number, tokens] => {
                let batch = self.batch(load, number, tokens)?;
                self.machine.sweep_caches(self.cpu);
                let start = Instant::now();
                self.subject.forward(&batch)?;
                Ok(start.elapsed().as_secs_f64().to_string())
            }
            ["ceilings"] => {
                self.machine.look_again(self.cpu);
                let seen = self.machine.ceilings;
                self.machine.begin(self.cpu);
                let peak = seen.flop_peak(self.seeded.dtype);
                Ok(format!("{peak} {}", seen.read_bandwidth))
            }
            _ => fail(format!("--serve: cannot read {line:?}")),
        }
    }

    /// A batch, kept for its next turn.
    fn batch(&mut self, load: &str, number: &str, tokens: &str) -> Result<Batch> {
        let count = |word: &str| word.parse::<usize>().map_err(|why| unreadable(word, &why));
        let (number, tokens) = (count(number)?, count(tokens)?);
        let kind: Load = load.parse().map_err(|why| unreadable(load, &why))?;
        let (architecture, dtype) = (&self.seeded.architecture, self.seeded.dtype);
        let seed = self.options.seed;
        let key = (load.to_string(), number, tokens);
        let batch = self.batches.entry(key);
        let make = || Batch::new(architecture, dtype, kind, seed, number, tokens);
        Ok(batch.or_insert_with(make).clone())
    }

    /// All experts into two files.
    fn weights(&mut self, path: &str) -> Result<String> {
        let mut gate_up = file(&format!("{path}.gate_up"))?;
        let mut down = file(&format!("{path}.down"))?;
        for e in 0..self.seeded.architecture.experts() {
            let Expert {
                gate_up: GateUp::Separate(gate, up),
                down: out,
                ..
            } = self.seeded.expert(e)?
            else {
                return fail("seeded experts have separate gate and up projections");
            };
            write(&mut gate_up, &gate.values)?;
            write(&mut gate_up, &up.values)?;
            write(&mut down, &out.values)?;
        }
        gate_up.flush()?;
        down.flush()?;
        Ok("ok".into())
    }
}

fn unreadable(word: &str, why: &dyn std::fmt::Display) -> Failure {
    Failure(format!("--serve: {word:?}: {why}"))
}

fn file(path: &str) -> Result<BufWriter<File>> {
    Ok(BufWriter::with_capacity(1 << 20, File::create(path)?))
}

/// Raw little-endian numbers.
fn write(out: &mut impl Write, values: &Values) -> Result<()> {
    match values {
        Values::F32(v) => v.iter().try_for_each(|v| out.write_all(&v.to_le_bytes())),
        Values::F16(v) => v.iter().try_for_each(|v| out.write_all(&v.to_le_bytes())),
        Values::BF16(v) => v.iter().try_for_each(|v| out.write_all(&v.to_le_bytes())),
    }?;
    Ok(out.flush()?)
}
