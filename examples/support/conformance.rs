//! The `conformance` program as a function, so that tests can run it without a process.

use super::backend::{Runner, Stop, Unrun};
use super::case::Case;
use super::check::{Verdict, check};
pub use super::device::Backend;
use super::file::{CaseFile, Refusal};
use super::out;
use clap::Parser;
use moe_kernels::{DType, Isa};
use std::collections::HashMap;
use std::io::{self, Write};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use std::time::Instant;

/// Runs layers in the neutral case format and writes what they give.
///
/// Reads every *.safetensors file in CASES, in name order, and writes OUT/<id>.safetensors with router_logits, topk_ids, topk_weights
/// and y, or value and grad_logits for a loss. One line for each case; the counts come last. Exits with 1 if a case could not be read or run, or
/// was wrong under --check. A case that is not expressible, or that the backend does not do, is named and counted, and is no failure.
#[derive(Clone, Debug, Parser)]
#[command(name = "conformance", version)]
pub struct Args {
    /// Folder with the cases.
    #[arg(long)]
    pub cases: PathBuf,
    /// Folder for the results; made if it is missing.
    #[arg(long)]
    pub out: PathBuf,
    /// What runs the layers. cuda needs the feature of that name.
    #[arg(long, value_enum, default_value_t = Backend::Cpu)]
    pub backend: Backend,
    /// Instruction set (scalar, avx2, avx512, neon); the fastest by default, or what MOE_KERNELS_ISA says.
    #[arg(long)]
    pub isa: Option<Isa>,
    /// Format of the experts' weights; that of the file by default. With cuda, 16 bits are the format of x and of what is between the products, too.
    #[arg(long, value_parser = parse_dtype)]
    pub dtype: Option<DType>,
    /// Only cases whose id or file name contains this.
    #[arg(long)]
    pub only: Option<String>,
    /// Compare with what the files expect, and show the errors.
    #[arg(long)]
    pub check: bool,
}

fn parse_dtype(name: &str) -> Result<DType, String> {
    let known = DType::ALL.into_iter().find(|d| d.name() == name);
    known.ok_or_else(|| "expected f32, bf16 or f16".into())
}

/// How many cases ended in which way.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counts {
    pub done: usize,
    pub wrong: usize,
    pub not_expressible: usize,
    /// What only another backend does.
    pub not_on_backend: usize,
    pub failed: usize,
}

impl Counts {
    /// The program's exit status.
    pub fn status(&self) -> u8 {
        u8::from(self.failed > 0 || self.wrong > 0)
    }
}

/// How one case ended.
enum Ending {
    Done(String),
    Wrong(String),
    NotExpressible(String),
    NotOnBackend(String),
    Failed(String),
}

/// Runs every case of the folder. `lines` gets a line for each, `notes` what there is to say besides.
///
/// # Errors
/// When the folders cannot be used, or there is nothing to run.
pub fn conformance(
    args: &Args,
    lines: &mut dyn Write,
    notes: &mut dyn Write,
) -> Result<Counts, Stop> {
    let runner = Runner::new(args)?;
    let files = list(&args.cases, args.only.as_deref()).map_err(Stop::usage)?;
    std::fs::create_dir_all(&args.out)
        .map_err(|why| Stop::usage(format!("--out {}: {why}", args.out.display())))?;
    let mut counts = Counts::default();
    let mut written = HashMap::new();
    let broken = |why: io::Error| Stop::usage(format!("cannot print: {why}"));
    for path in &files {
        let name = path.file_stem().unwrap_or_default().to_string_lossy();
        let (id, ending) = one(args, &runner, path, &mut written, notes);
        let (count, word, text) = match ending {
            Ending::Done(text) => (&mut counts.done, "done", text),
            Ending::Wrong(text) => (&mut counts.wrong, "WRONG", text),
            Ending::NotExpressible(text) => (&mut counts.not_expressible, "not expressible:", text),
            Ending::NotOnBackend(text) => {
                (&mut counts.not_on_backend, "not on this backend:", text)
            }
            Ending::Failed(text) => (&mut counts.failed, "FAILED:", text),
        };
        *count += 1;
        writeln!(
            lines,
            "{:<44} {word} {text}",
            id.as_deref().unwrap_or(&name)
        )
        .map_err(broken)?;
    }
    writeln!(lines, "{}", summary(&runner, &counts, files.len())).map_err(broken)?;
    Ok(counts)
}

/// The last line.
fn summary(runner: &Runner, counts: &Counts, total: usize) -> String {
    let Counts {
        done,
        wrong,
        not_expressible,
        not_on_backend,
        failed,
    } = counts;
    let mut line = format!(
        "{total} cases on {}: {done} done, {wrong} wrong, {not_expressible} not expressible, {failed} failed",
        runner.name()
    );
    if runner.is_partial() {
        line += &format!(", {not_on_backend} not on this backend");
    }
    line
}

/// The case files of a folder, in name order.
fn list(folder: &Path, only: Option<&str>) -> Result<Vec<PathBuf>, String> {
    let say = |why: io::Error| format!("--cases {}: {why}", folder.display());
    let mut files = Vec::new();
    for entry in std::fs::read_dir(folder).map_err(say)? {
        let path = entry.map_err(say)?.path();
        let name = path.file_name().unwrap_or_default().to_string_lossy();
        let wanted = || {
            only.is_none_or(|part| {
                name.contains(part) || id_of(&path).is_some_and(|id| id.contains(part))
            })
        };
        if name.ends_with(".safetensors") && wanted() {
            files.push(path);
        }
    }
    if files.is_empty() {
        let which = only.map_or_else(String::new, |part| {
            format!(" with {part:?} in its name or id")
        });
        let folder = folder.display();
        return Err(format!("--cases {folder}: no *.safetensors file{which}"));
    }
    files.sort();
    Ok(files)
}

/// The id that a file says it has, if it can be read at all.
fn id_of(path: &Path) -> Option<String> {
    let file = CaseFile::read(path).ok()?;
    file.meta.get("id")?.as_str().map(str::to_string)
}

/// One file from reading to writing. A bug in one case must not cost the others, so a panic is caught and reported.
fn one(
    args: &Args,
    runner: &Runner,
    path: &Path,
    written: &mut HashMap<String, PathBuf>,
    notes: &mut dyn Write,
) -> (Option<String>, Ending) {
    let case = match catch_unwind(|| Case::read(path)) {
        Ok(Ok(case)) => case,
        Ok(Err(Refusal::NotExpressible(why))) => return (None, Ending::NotExpressible(why)),
        Ok(Err(why)) => return (None, Ending::Failed(why.to_string())),
        Err(_) => return (None, Ending::Failed("internal error while reading".into())),
    };
    for note in &case.notes {
        let _ = writeln!(notes, "note: {}: {note}", case.id);
    }
    let finished = catch_unwind(AssertUnwindSafe(|| {
        finish(args, runner, &case, path, written)
    }));
    let ending = match finished {
        Ok(Ok((text, true))) => Ending::Done(text),
        Ok(Ok((text, false))) => Ending::Wrong(text),
        Ok(Err(Unrun::NotOnBackend(why))) => Ending::NotOnBackend(why),
        Ok(Err(Unrun::Failed(why))) => Ending::Failed(why),
        Err(_) => Ending::Failed("internal error while running".into()),
    };
    (Some(case.id), ending)
}

/// Runs, writes and, if asked, checks; the rest of the line, and whether the check passed.
fn finish(
    args: &Args,
    runner: &Runner,
    case: &Case,
    path: &Path,
    written: &mut HashMap<String, PathBuf>,
) -> Result<(String, bool), Unrun> {
    if let Some(other) = written.insert(case.id.clone(), path.to_path_buf()) {
        return Err(format!("{} has the same id", other.display()).into());
    }
    let start = Instant::now();
    let outputs = runner.run(case)?;
    let time = start.elapsed();
    out::write(&args.out, &case.id, &outputs).map_err(|why| format!("cannot write: {why}"))?;
    let verdict = match args.check {
        true => check(case, &outputs, runner.tolerance(case)).map_err(|why| why.to_string())?,
        false => Verdict::default(),
    };
    Ok((format!("{time:.1?}{verdict}"), verdict.passed()))
}
