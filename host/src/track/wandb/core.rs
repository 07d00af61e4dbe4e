//! wandb-core, W&B's own engine: where it is, its process, and its socket.
//!
//! A frame on the socket is the byte `W`, the length of a message as u32 in little endian, and the message. The engine
//! ends when this process does, whatever way that happens, and then closes the runs that it has.

use std::env;
use std::fs;
use std::io::{self, Read as _, Write as _};
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::thread::sleep;
use std::time::{Duration, Instant};

use anyhow::{Context as _, bail, ensure};
use prost::Message as _;

use super::proto::{RequestKind, ResponseKind, ServerRequest, ServerResponse};

/// The versions that this client has been tried with.
pub const TESTED: [&str; 1] = ["0.31.0"];
/// The variable that names the program.
pub const VARIABLE: &str = "JEPA_WANDB_CORE";

/// How long the engine may take to say where its socket is.
const START: Duration = Duration::from_secs(30);
/// The largest message that is believed.
const LARGEST: u32 = 64 << 20;

/// The program, where it is installed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Program {
    /// Its file.
    pub file: PathBuf,
    /// Its version, as it says itself.
    pub version: Option<String>,
}

impl Program {
    /// Looks where [`VARIABLE`] says; else in `beside`, the folder that `make setup WANDB=1` fills; else in the `wandb`
    /// package of the Python on the path.
    ///
    /// # Errors
    /// Where it was looked for, and what to do.
    pub fn find(beside: Option<&Path>) -> anyhow::Result<Self> {
        if let Some(named) = env::var_os(VARIABLE) {
            let file = PathBuf::from(named);
            ensure!(file.is_file(), "{VARIABLE} names {}, and there is no such file", file.display());
            return Ok(Program::at(file));
        }
        let fetched = beside.map(|folder| folder.join("wandb-core")).filter(|file| file.is_file());
        let file = fetched.or_else(in_python).with_context(|| {
            format!(
                "wandb-core is not there: fetch it with `make setup WANDB=1`, or `pip install wandb=={}`, or name it \
                 in {VARIABLE}",
                TESTED[0]
            )
        })?;
        Ok(Program::at(file))
    }

    fn at(file: PathBuf) -> Self {
        let help = Command::new(&file).arg("--help").stdin(Stdio::null()).output().ok();
        let version = help.and_then(|help| {
            let text = [help.stdout, help.stderr].concat();
            let text = String::from_utf8_lossy(&text).into_owned();
            Some(text.lines().find_map(|line| line.trim().strip_prefix("Version:"))?.trim().to_owned())
        });
        Program { file, version }
    }

    /// Whether this client has been tried with it.
    pub fn is_tested(&self) -> bool {
        self.version.as_deref().is_some_and(|version| TESTED.contains(&version))
    }
}

/// The program inside the `wandb` package of `python3`. The current folder, which may hold a folder `wandb` of results,
/// is taken off Python's path before anything is imported.
fn in_python() -> Option<PathBuf> {
    const CODE: &str = "import sys; sys.path = [p for p in sys.path if p]; import importlib.util as u; \
                        s = u.find_spec('wandb'); print(s.submodule_search_locations[0] if s else '')";
    let output = Command::new("python3").args(["-c", CODE]).stdin(Stdio::null()).output().ok()?;
    let folder = String::from_utf8(output.stdout).ok()?;
    Some(Path::new(folder.trim()).join("bin/wandb-core")).filter(|file| file.is_file())
}

/// A running engine.
pub struct Core {
    process: Child,
    socket: UnixStream,
    requests: u64,
}

impl Core {
    /// Starts the engine in a process group of its own, so that Ctrl-C at the terminal does not end it before its runs
    /// are closed. `logs` takes what it prints, and for a moment the file that names its socket.
    ///
    /// # Errors
    /// When it does not start.
    pub fn start(program: &Program, logs: &Path) -> anyhow::Result<Self> {
        let port_file = logs.join(format!("port-{}.txt", std::process::id()));
        let _ = fs::remove_file(&port_file);
        let words = fs::File::create(logs.join("wandb-core.txt"))
            .with_context(|| format!("cannot write to {}", logs.display()))?;
        let mut command = Command::new(&program.file);
        command.arg("--port-filename").arg(&port_file);
        command.args(["--pid", &std::process::id().to_string(), "--no-observability"]);
        command.stdin(Stdio::null()).stdout(words.try_clone()?).stderr(words).process_group(0);
        let mut process =
            command.spawn().with_context(|| format!("cannot start {}", program.file.display()))?;
        let socket = connect(&mut process, &port_file);
        let _ = fs::remove_file(&port_file);
        match socket {
            Ok(socket) => Ok(Core { process, socket, requests: 0 }),
            Err(error) => {
                let _ = process.kill();
                let _ = process.wait();
                Err(error.context(format!("{} does not work", program.file.display())))
            }
        }
    }

    /// Sends a request that has no response.
    ///
    /// # Errors
    /// When the engine is gone, or takes nothing for `patience`.
    pub fn publish(&mut self, kind: RequestKind, patience: Duration) -> anyhow::Result<()> {
        self.send(ServerRequest { request_id: String::new(), kind: Some(kind) }, patience)
    }

    /// A name for the next request.
    pub fn next_id(&mut self) -> String {
        self.requests += 1;
        format!("jepa-{}", self.requests)
    }

    /// Sends a request with the name `id`, and waits for its response; none when it says no more than that it has come.
    ///
    /// # Errors
    /// What the engine answers, when it is an error; and when it is gone, or silent for `patience`.
    pub fn communicate(
        &mut self,
        id: &str,
        kind: RequestKind,
        patience: Duration,
    ) -> anyhow::Result<Option<ResponseKind>> {
        let deadline = Instant::now() + patience;
        self.send(ServerRequest { request_id: id.to_owned(), kind: Some(kind) }, patience)?;
        loop {
            let response = self.receive(deadline)?;
            // Answers to what was given up are of no interest.
            if response.request_id != id {
                continue;
            }
            return match response.kind {
                Some(ResponseKind::Error(error)) => bail!("wandb-core: {}", error.message),
                kind => Ok(kind),
            };
        }
    }

    fn send(&mut self, request: ServerRequest, patience: Duration) -> anyhow::Result<()> {
        let message = request.encode_to_vec();
        let mut frame = vec![b'W'];
        frame.extend(u32::try_from(message.len()).context("a message of 4 GiB")?.to_le_bytes());
        frame.extend(message);
        self.socket.set_write_timeout(Some(patience.max(Duration::from_millis(1))))?;
        self.socket.write_all(&frame).context("wandb-core takes nothing")
    }

    fn receive(&mut self, deadline: Instant) -> anyhow::Result<ServerResponse> {
        let mut header = [0; 5];
        self.read(&mut header, deadline)?;
        let [magic, length @ ..] = header;
        let length = u32::from_le_bytes(length);
        ensure!(magic == b'W' && length <= LARGEST, "wandb-core sends what is no frame");
        let mut message = vec![0; length as usize];
        self.read(&mut message, deadline)?;
        ServerResponse::decode(&*message).context("wandb-core sends what is no response")
    }

    fn read(&mut self, bytes: &mut [u8], deadline: Instant) -> anyhow::Result<()> {
        let left = deadline.saturating_duration_since(Instant::now()).max(Duration::from_millis(1));
        self.socket.set_read_timeout(Some(left))?;
        self.socket.read_exact(bytes).map_err(|error| match error.kind() {
            io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut => anyhow::anyhow!("wandb-core does not answer"),
            io::ErrorKind::UnexpectedEof => anyhow::anyhow!("wandb-core has ended"),
            _ => anyhow::Error::new(error).context("cannot read from wandb-core"),
        })
    }

    /// Waits until the engine has ended, for `patience` at most.
    pub fn wait(mut self, patience: Duration) {
        let _ = self.socket.shutdown(std::net::Shutdown::Both);
        let deadline = Instant::now() + patience;
        while Instant::now() < deadline {
            if !matches!(self.process.try_wait(), Ok(None)) {
                return;
            }
            sleep(Duration::from_millis(10));
        }
    }
}

impl Drop for Core {
    /// An engine that was not waited for has failed.
    fn drop(&mut self) {
        if matches!(self.process.try_wait(), Ok(None)) {
            let _ = self.process.kill();
            let _ = self.process.wait();
        }
    }
}

/// The engine writes where its socket is, and `EOF` on the last line.
fn connect(process: &mut Child, port_file: &Path) -> anyhow::Result<UnixStream> {
    let deadline = Instant::now() + START;
    loop {
        if let Some(status) = process.try_wait()? {
            bail!("it ended at once, with {status}");
        }
        let text = fs::read_to_string(port_file).unwrap_or_default();
        if text.lines().last() == Some("EOF") {
            let path = text.lines().find_map(|line| line.strip_prefix("unix="));
            let path = path.context("it has no Unix socket")?;
            return UnixStream::connect(path).with_context(|| format!("cannot connect to {path}"));
        }
        ensure!(Instant::now() < deadline, "it does not say where its socket is");
        sleep(Duration::from_millis(10));
    }
}
