//! Runs the real binary with real plugin files, each time in a folder of its own.

use std::env;
use std::ffi::OsStr;
use std::fs::{self, File};
use std::io::{self, Write as _};
use std::os::unix::process::ExitStatusExt as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus};
use std::thread;
use std::time::{Duration, Instant};

use serde_json::Value;
use tempfile::TempDir;

/// How long a process may take before a test gives up on it.
const PATIENCE: Duration = Duration::from_secs(180);

/// A setting of the smallest network that the tests train: two stages of width 4.
pub const TINY_BACKBONE: [&str; 4] =
    ["backbone.name=resnet18", "backbone.stem=small", "backbone.width=4", "backbone.depths=[1,1]"];

/// Settings of the smallest run of SimCLR, on it: every step is recorded.
pub const TINY_SIMCLR: [&str; 7] = [
    "data.size=16",
    "data.threads=1",
    "method.hidden=16",
    "method.output=8",
    "optimizer.batch_size=16",
    "trainer.device=cpu",
    "trainer.log_every_steps=1",
];

/// The folder that cargo builds programs and plugins of this profile into.
fn built() -> PathBuf {
    let test = env::current_exe().expect("a test knows its own file");
    test.ancestors().nth(2).expect("tests lie in <target>/<profile>/deps").to_owned()
}

/// A file that cargo has built.
fn require(file: PathBuf) -> PathBuf {
    assert!(
        file.is_file(),
        "{} is missing: build the workspace first, with `cargo build --workspace` and the profile of this test",
        file.display()
    );
    file
}

/// The binary `jepa-host`.
pub fn binary() -> PathBuf {
    require(built().join("jepa-host"))
}

/// The plugin file `lib{name}.so`.
pub fn plugin(name: &str) -> PathBuf {
    require(built().join(format!("lib{name}.so")))
}

/// A file of `tests/fixtures/`.
pub fn fixture(name: &str) -> PathBuf {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("fixtures").join(name);
    assert!(path.is_file(), "{} is missing", path.display());
    path
}

/// The bundled training images: 8,000 pictures of clothes.
pub fn demo_images() -> PathBuf {
    bundled("fashion_mnist_train.h5")
}

/// The bundled held-out images: 2,000 of them.
pub fn held_out_images() -> PathBuf {
    bundled("fashion_mnist_test.h5")
}

fn bundled(name: &str) -> PathBuf {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../examples/demo-data").join(name);
    path.canonicalize().unwrap_or_else(|error| panic!("{}: {error}", path.display()))
}

/// The Python that `tests/setup.sh` fetches packages for, and the folder that it fetches them into.
pub fn python() -> (PathBuf, PathBuf) {
    let python = env::var_os("PYTHON").unwrap_or_else(|| "python3".into());
    (python.into(), Path::new(env!("CARGO_MANIFEST_DIR")).join("../.deps/python"))
}

/// The lines of the `metrics.jsonl` of a run.
///
/// # Panics
/// When it is not there, or a line is no record.
pub fn records(run: &Path) -> Vec<Value> {
    let text = fs::read_to_string(run.join("metrics.jsonl")).expect("a run has records");
    text.lines().map(|line| serde_json::from_str(line).expect("a record")).collect()
}

/// Says why this test tries nothing here, past the harness, which shows no words of tests that end well.
///
/// # Panics
/// Where `$JEPA_TEST_EVERYTHING` is set.
#[track_caller]
pub fn not_tried(why: &str) {
    assert!(env::var_os("JEPA_TEST_EVERYTHING").is_none(), "not tried: {why}");
    say_not_tried(why);
}

/// The same of a test that wants a machine of its own kind, such as one with a GPU: that is never a failure.
pub fn say_not_tried(why: &str) {
    let name = thread::current().name().unwrap_or("a test").to_owned();
    // Nobody may be left to read it.
    let _ = writeln!(io::stderr(), "{name} is not tried: {why}");
}

/// Whether a clock measured this field of a record, so that no two runs have the same.
pub fn is_of_a_clock(field: &str) -> bool {
    field.starts_with("time/") || ["time", "train/images_per_s", "train/data_wait"].contains(&field)
}

/// The argument `key=path`.
pub fn setting(key: &str, path: &Path) -> String {
    format!("{key}={}", path.display())
}

/// An empty folder in which processes are started; gone at the end of the test.
pub struct Room(TempDir);

/// How variables begin that mean something to the program, or that a launcher sets.
const CONFIGURING: [&str; 10] = [
    "JEPA_",
    "RUST_",
    "WANDB_",
    "RANK",
    "WORLD_SIZE",
    "LOCAL_RANK",
    "MASTER_",
    "TORCHELASTIC_",
    "SLURM_",
    "GLOO_",
];

impl Room {
    /// A new one.
    #[expect(clippy::new_without_default, reason = "it makes a folder on the disk")]
    pub fn new() -> Self {
        Room(tempfile::tempdir().expect("a temporary folder"))
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        self.0.path()
    }

    /// The path of `name` in it.
    pub fn file(&self, name: impl AsRef<Path>) -> PathBuf {
        self.path().join(name)
    }

    /// Runs `jepa-host` with these arguments to its end.
    pub fn run<S: AsRef<OsStr>>(&self, arguments: impl IntoIterator<Item = S>) -> Ended {
        self.start(arguments).wait()
    }

    /// Runs `jepa-host` with these arguments to its end, behind `limits`: commands of the shell that change what a
    /// process inherits.
    pub fn run_behind<S: AsRef<OsStr>>(&self, limits: &str, arguments: impl IntoIterator<Item = S>) -> Ended {
        let mut command = Command::new("sh");
        command.args(["-c", &format!("{limits}; exec \"$0\" \"$@\"")]).arg(binary());
        self.launch(command, arguments).wait()
    }

    /// Starts `jepa-host` with these arguments. Nothing in the caller's environment configures it.
    pub fn start<S: AsRef<OsStr>>(&self, arguments: impl IntoIterator<Item = S>) -> Running {
        self.launch(Command::new(binary()), arguments)
    }

    /// Starts `jepa-host` with these arguments and environment variables; one without a value is not set.
    pub fn start_in<S: AsRef<OsStr>>(
        &self,
        environment: &[(&str, &str)],
        arguments: impl IntoIterator<Item = S>,
    ) -> Running {
        self.start_other_in(environment, &binary(), arguments)
    }

    /// Starts another `program` in the same way.
    pub fn start_other_in<S: AsRef<OsStr>>(
        &self,
        environment: &[(&str, &str)],
        program: &Path,
        arguments: impl IntoIterator<Item = S>,
    ) -> Running {
        let mut command = Command::new("env");
        for (name, value) in environment {
            match value.is_empty() {
                true => command.args(["-u", name]),
                false => command.arg(format!("{name}={value}")),
            };
        }
        command.arg(program);
        self.launch(command, arguments)
    }

    fn launch<S: AsRef<OsStr>>(
        &self,
        mut command: Command,
        arguments: impl IntoIterator<Item = S>,
    ) -> Running {
        let number = (0..).find(|n| !self.file(format!("out.{n}")).exists()).expect("numbers do not end");
        let (out, err) = (self.file(format!("out.{number}")), self.file(format!("err.{number}")));
        command.args(arguments).current_dir(self.path());
        for (name, _) in env::vars_os() {
            let configures = |name: &str| CONFIGURING.iter().any(|prefix| name.starts_with(prefix));
            if name.to_str().is_some_and(configures) {
                command.env_remove(name);
            }
        }
        // The program sets it and begins anew where it is not set, which takes a moment.
        command.env("GOMP_SPINCOUNT", "1000");
        let create = |path| File::create(path).expect("the room can be written to");
        let child = command.stdout(create(&out)).stderr(create(&err)).spawn().expect("jepa-host starts");
        Running { child, out, err }
    }

    /// Compiles `source`, C, into the shared library `name` in this room.
    pub fn compile(&self, name: &str, source: &str) -> PathBuf {
        self.compile_with(name, source, &[])
    }

    /// The same, with further arguments for the compiler, which runs in this room.
    pub fn compile_with(&self, name: &str, source: &str, arguments: &[&str]) -> PathBuf {
        let (c, library) = (self.file(format!("{name}.c")), self.file(name));
        fs::write(&c, source).expect("the room can be written to");
        let mut compiler = Command::new("cc");
        compiler.args(["-shared", "-fPIC", "-o"]).arg(&library).arg(&c).args(arguments);
        let output = compiler.current_dir(self.path()).output().expect("`cc` is there: rustc links with it");
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        library
    }
}

/// A process that may still be running. Killed when dropped.
pub struct Running {
    child: Child,
    out: PathBuf,
    err: PathBuf,
}

impl Running {
    /// Waits until `condition` holds.
    ///
    /// # Panics
    /// When the process ends first, or takes too long.
    pub fn until(&mut self, what: &str, condition: impl Fn() -> bool) {
        let started = Instant::now();
        while !condition() {
            if let Some(status) = self.child.try_wait().expect("a child can be asked") {
                panic!("{status} before {what}:\n{}", read(&self.err));
            }
            assert!(started.elapsed() < PATIENCE, "no {what} within {PATIENCE:?}:\n{}", read(&self.err));
            thread::sleep(Duration::from_millis(1));
        }
    }

    /// Its process number.
    pub fn id(&self) -> u32 {
        self.child.id()
    }

    /// What it has written to the standard output so far.
    pub fn stdout(&self) -> String {
        read(&self.out)
    }

    /// What it has written to the standard error so far.
    pub fn stderr(&self) -> String {
        read(&self.err)
    }

    /// Sends it a signal.
    ///
    /// # Panics
    /// When it has ended already.
    pub fn signal(&mut self, signal: i32) {
        let ended = self.child.try_wait().expect("a child can be asked");
        assert_eq!(ended, None, "it ended before signal {signal} could be sent:\n{}", read(&self.err));
        // SAFETY: the number is that of our own child, which has not been waited for, so it is nobody else's.
        let sent = unsafe { libc::kill(self.child.id() as libc::pid_t, signal) };
        assert_eq!(sent, 0, "a child can be sent signals");
    }

    /// Waits for its end.
    ///
    /// # Panics
    /// When it takes too long.
    pub fn wait(mut self) -> Ended {
        let started = Instant::now();
        let status = loop {
            if let Some(status) = self.child.try_wait().expect("a child can be asked") {
                break status;
            }
            assert!(started.elapsed() < PATIENCE, "it does not end:\n{}", read(&self.err));
            thread::sleep(Duration::from_millis(2));
        };
        Ended { status, stdout: read(&self.out), stderr: read(&self.err) }
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        // It has ended already, unless the test failed.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// A process that has ended.
#[derive(Debug)]
pub struct Ended {
    /// How.
    pub status: ExitStatus,
    /// All of its standard output.
    pub stdout: String,
    /// All of its standard error.
    pub stderr: String,
}

impl Ended {
    /// The same, once it is known that it ended with `code`; 128 and more is a signal, as in a shell.
    ///
    /// # Panics
    /// When it did not.
    #[track_caller]
    pub fn expect(self, code: i32) -> Self {
        let ended_with = self.status.code().or(self.status.signal().map(|signal| 128 + signal));
        assert_eq!(ended_with, Some(code), "{}\n{}", self.status, self.stderr);
        self
    }

    /// The error, without the word: the last line of the standard error, and the only one of its kind.
    ///
    /// # Panics
    /// When there is none, or more than one, or something comes after it.
    #[track_caller]
    pub fn error(&self) -> &str {
        assert_eq!(self.stderr.matches("error: ").count(), 1, "one error is told:\n{}", self.stderr);
        let last = self.stderr.trim_end().lines().last().unwrap_or_default();
        last.strip_prefix("error: ").unwrap_or_else(|| panic!("the error is the last line:\n{}", self.stderr))
    }

    /// Makes sure that the error says all of `parts`, in this order.
    ///
    /// # Panics
    /// When it does not.
    #[track_caller]
    pub fn error_says(&self, parts: &[&str]) {
        let mut rest = self.error();
        for part in parts {
            let Some(at) = rest.find(part) else {
                panic!("not, or not here, in the error: {part}\n{}", self.stderr)
            };
            rest = &rest[at + part.len()..];
        }
    }
}

fn read(path: &Path) -> String {
    String::from_utf8_lossy(&fs::read(path).unwrap_or_default()).into_owned()
}

/// The checkpoints below `folder` that are whole, by name, oldest first: `step_00000005`, …
pub fn checkpoints(folder: &Path) -> Vec<PathBuf> {
    let Ok(entries) = folder.read_dir() else { return Vec::new() };
    let is_checkpoint = |path: &PathBuf| {
        path.file_name().and_then(OsStr::to_str).is_some_and(|name| name.starts_with("step_"))
    };
    let mut found: Vec<PathBuf> =
        entries.filter_map(|entry| Some(entry.ok()?.path())).filter(is_checkpoint).collect();
    found.sort();
    found
}
