//! The machine in words: what somebody needs to judge the numbers, and nothing that says whose machine it is.

use std::fs::read_to_string;
use std::process::Command;
use std::time::{SystemTime, UNIX_EPOCH};

/// Where and when it was measured.
pub struct Host {
    pub model: String,
    /// CPU family and model number, since some virtual machines hide the rest.
    pub family: String,
    pub cores: usize,
    /// As in `L1d 48 KiB, L2 1 MiB, L3 32 MiB`.
    pub caches: String,
    pub memory_gib: f64,
    pub date: String,
    pub compiler: String,
    pub commit: String,
    pub command: String,
}

impl Host {
    /// This machine, now. `program` is how this one was called, up to its arguments.
    pub fn look(program: &str) -> Self {
        let info = read_to_string("/proc/cpuinfo").unwrap_or_default();
        let field = |name| field(&info, name).unwrap_or_else(|| "?".into());
        let arguments: Vec<String> = std::env::args().skip(1).collect();
        let command = format!("{program} -- {}", arguments.join(" "));
        Self {
            model: field("model name"),
            family: format!("family {} model {}", field("cpu family"), field("model")),
            cores: std::thread::available_parallelism().map_or(1, usize::from),
            caches: caches(),
            memory_gib: memory_gib(),
            date: date(SystemTime::now()),
            compiler: first_line("rustc", &["--version"]),
            commit: first_line("git", &["describe", "--always", "--dirty"]),
            command: command.trim_end_matches([' ', '-']).into(),
        }
    }

    /// As a Markdown list.
    pub fn markdown(&self) -> String {
        format!(
            "* Machine: {} ({}), {} cores; {}; {:.0} GiB of memory.\n* Compiler: {}; commit {}.\n* Command: `{}`\n",
            self.model,
            self.family,
            self.cores,
            self.caches,
            self.memory_gib,
            self.compiler,
            self.commit,
            self.command
        )
    }

    /// A folder's name: the model's letters and digits, and the cores.
    pub fn slug(&self) -> String {
        let mut name = self.model.to_lowercase();
        for noise in ["(r)", "(tm)", "processor", "cpu"] {
            name = name.replace(noise, " ");
        }
        // Some virtual machines hide the model's number.
        if !name.contains(|c: char| c.is_ascii_digit()) {
            name += &format!(" {}", self.family);
        }
        name += &format!(" {}core", self.cores);
        let words = name.split(|c: char| !c.is_ascii_alphanumeric());
        words
            .filter(|w| !w.is_empty())
            .collect::<Vec<_>>()
            .join("-")
    }
}

/// The first value of a name in /proc/cpuinfo.
fn field(info: &str, name: &str) -> Option<String> {
    info.lines().find_map(|line| {
        let (key, value) = line.split_once(':')?;
        (key.trim() == name).then(|| value.trim().into())
    })
}

fn caches() -> String {
    let mut found = Vec::new();
    for index in 0..8 {
        let read = |file| {
            let path = format!("/sys/devices/system/cpu/cpu0/cache/index{index}/{file}");
            Some(read_to_string(path).ok()?.trim().to_string())
        };
        let Some(((level, kind), size)) = read("level").zip(read("type")).zip(read("size")) else {
            break;
        };
        let kind = match kind.as_str() {
            "Data" => "d",
            "Instruction" => continue,
            _ => "",
        };
        let shared = read("shared_cpu_list").unwrap_or_default();
        let by = if shared == "0" { "a core" } else { "shared" };
        found.push(format!("L{level}{kind} {} {by}", with_unit(&size)));
    }
    found.join(", ")
}

/// `1 MiB` for the kernel's `1024K`.
fn with_unit(size: &str) -> String {
    match size.strip_suffix('K').map(str::parse::<usize>) {
        Some(Ok(kib)) if kib.is_multiple_of(1024) => format!("{} MiB", kib / 1024),
        Some(Ok(kib)) => format!("{kib} KiB"),
        _ => size.into(),
    }
}

fn memory_gib() -> f64 {
    let info = read_to_string("/proc/meminfo").unwrap_or_default();
    let total = field(&info, "MemTotal").unwrap_or_default();
    let kib: f64 = total.trim_end_matches(" kB").parse().unwrap_or(0.0);
    kib / f64::from(1 << 20)
}

fn first_line(program: &str, arguments: &[&str]) -> String {
    let output = Command::new(program).args(arguments).output();
    let text = output.map(|o| String::from_utf8_lossy(&o.stdout).into_owned());
    let line = text.ok().and_then(|t| t.lines().next().map(str::to_string));
    line.unwrap_or_else(|| "?".into())
}

/// Year, month and day (UTC) by counting days in the 400-year cycle of the calendar, in years that begin in March.
pub fn date(time: SystemTime) -> String {
    let seconds = time.duration_since(UNIX_EPOCH).map_or(0, |d| d.as_secs());
    // Day 0 is 1 March of the year 0.
    let days = seconds / 86_400 + 719_468;
    let (cycle, day) = (days / 146_097, days % 146_097);
    let year = (day - day / 1460 + day / 36_524 - day / 146_096) / 365;
    let day = day - (365 * year + year / 4 - year / 100);
    let month = (5 * day + 2) / 153;
    let day = day - (153 * month + 2) / 5 + 1;
    let (month, next) = if month < 10 {
        (month + 3, 0)
    } else {
        (month - 9, 1)
    };
    format!("{:04}-{month:02}-{day:02}", cycle * 400 + year + next)
}
