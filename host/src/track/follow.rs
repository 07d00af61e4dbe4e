//! Trackers outside this process follow `metrics.jsonl`, each in a thread of its own: the file is the queue. A tracker
//! that stalls or fails costs the run nothing; it takes up again with the first record that it does not have yet.

use std::fs::File;
use std::io::{BufRead as _, BufReader, Seek as _, SeekFrom};
use std::path::{Path, PathBuf};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use anyhow::Context as _;
use crossbeam_channel::{Receiver, RecvTimeoutError, Sender, bounded};

use serde::Serialize;

use super::Record;

/// The first pause after a failure; each further one is twice as long, up to the longest.
const FIRST_PAUSE: Duration = Duration::from_secs(1);
const LONGEST_PAUSE: Duration = Duration::from_secs(60);
/// New console output is passed on at least so often.
const TICK: Duration = Duration::from_secs(5);

/// A place that a run's records go to.
pub trait Tracker: Send {
    /// Its name for people.
    fn name(&self) -> &'static str;

    /// Gets ready, also again after a failure. Returns the index of the first record that it does not have yet.
    ///
    /// # Errors
    /// When the place cannot be reached; it is tried again later.
    fn open(&mut self) -> anyhow::Result<u64>;

    /// Takes the record with this index, the line of `metrics.jsonl` from 0.
    ///
    /// # Errors
    /// When the place does not take it: [`open`](Tracker::open) comes next.
    fn log(&mut self, index: u64, record: &Record) -> anyhow::Result<()>;

    /// Called when all records so far are logged, and from time to time.
    ///
    /// # Errors
    /// As [`log`](Tracker::log).
    fn rest(&mut self) -> anyhow::Result<()> {
        Ok(())
    }

    /// Where the records are, for people.
    fn place(&self) -> String;

    /// What is left to do for people, once it is closed.
    fn advice(&self) -> Option<String> {
        None
    }

    /// The run has ended with this exit code, and every record is logged.
    ///
    /// # Errors
    /// As [`log`](Tracker::log).
    fn close(&mut self, exit_code: i32) -> anyhow::Result<()>;
}

/// What a follower is told.
enum Message {
    /// There are new records.
    News,
    /// The run has ended.
    End { exit_code: i32 },
}

/// A thread that feeds one tracker from `metrics.jsonl`.
pub(super) struct Follower {
    name: &'static str,
    messages: Sender<Message>,
    ended: Receiver<anyhow::Result<Option<String>>>,
    _thread: JoinHandle<()>,
}

impl Follower {
    pub fn start(metrics: PathBuf, tracker: Box<dyn Tracker>) -> anyhow::Result<Self> {
        // One message waits at most: whoever wakes up reads all that is new.
        let (messages, inbox) = bounded(1);
        let (report, ended) = bounded(1);
        let name = tracker.name();
        let thread = thread::Builder::new()
            .name(format!("tracker {name}"))
            .spawn(move || {
                let _ = report.send(Feed::new(metrics, tracker).until_end(&inbox));
            })
            .context("cannot start a thread for a tracker")?;
        Ok(Follower { name, messages, ended, _thread: thread })
    }

    /// Its tracker's name for people.
    pub fn name(&self) -> &'static str {
        self.name
    }

    /// Says that there are new records. Never waits.
    pub fn news(&self) {
        let _ = self.messages.try_send(Message::News);
    }

    /// Says that the run has ended, and gives the tracker until `deadline` to take what it lacks. Returns what is left to
    /// do then.
    ///
    /// # Errors
    /// When it does not, or has failed.
    pub fn finish(self, exit_code: i32, deadline: Instant) -> anyhow::Result<Option<String>> {
        let late = || format!("{} did not take all records in time", self.name);
        self.messages.send_deadline(Message::End { exit_code }, deadline).ok().with_context(late)?;
        match self.ended.recv_deadline(deadline) {
            Ok(end) => end,
            Err(crossbeam_channel::RecvTimeoutError::Timeout) => anyhow::bail!(late()),
            Err(crossbeam_channel::RecvTimeoutError::Disconnected) => {
                anyhow::bail!("the thread of {} has panicked", self.name)
            }
        }
    }
}

/// What became of the records of a run.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Replayed {
    /// So many were sent.
    pub records: u64,
    /// So many were there already.
    pub known: u64,
    /// Where they are.
    pub place: String,
    /// What is left to do.
    pub advice: Option<String>,
}

/// Feeds `tracker` those records of `metrics` that it does not have.
///
/// # Errors
/// The first failure of the tracker, or of reading the file.
pub fn replay(metrics: &Path, tracker: Box<dyn Tracker>, exit_code: i32) -> anyhow::Result<Replayed> {
    let mut feed = Feed::new(metrics.to_owned(), tracker);
    feed.catch_up()?;
    let place = feed.tracker.place();
    feed.tracker.close(exit_code)?;
    let (records, advice) = (feed.logged, feed.tracker.advice());
    Ok(Replayed { records, known: feed.lines.index - records, place, advice })
}

/// A tracker, and how far it is.
struct Feed {
    lines: Lines,
    tracker: Box<dyn Tracker>,
    /// The next record, when the tracker is open.
    next: Option<u64>,
    logged: u64,
    failed: bool,
}

impl Feed {
    fn new(metrics: PathBuf, tracker: Box<dyn Tracker>) -> Self {
        Feed { lines: Lines::of(metrics), tracker, next: None, logged: 0, failed: false }
    }

    fn until_end(mut self, inbox: &Receiver<Message>) -> anyhow::Result<Option<String>> {
        let mut pause = FIRST_PAUSE;
        // Until then it rests after a failure, whatever is new.
        let mut resting_until = Instant::now();
        loop {
            let message = match inbox.recv_timeout(TICK.min(pause)) {
                Ok(message) => message,
                Err(RecvTimeoutError::Timeout) => Message::News,
                // The run is gone without a word, as in a panic.
                Err(RecvTimeoutError::Disconnected) => Message::End { exit_code: 1 },
            };
            if let Message::End { exit_code } = message {
                self.catch_up()?;
                self.tracker.close(exit_code)?;
                return Ok(self.tracker.advice());
            }
            if Instant::now() < resting_until {
                continue;
            }
            let name = self.tracker.name();
            match self.catch_up() {
                Ok(()) => {
                    pause = FIRST_PAUSE;
                    if std::mem::take(&mut self.failed) {
                        tracing::info!("{name} is there again, and has all records");
                    }
                }
                Err(error) => {
                    self.next = None;
                    if !std::mem::replace(&mut self.failed, true) {
                        tracing::warn!("{name}: {error:#}; the run goes on, and it is tried again");
                    }
                    resting_until = Instant::now() + pause;
                    pause = (2 * pause).min(LONGEST_PAUSE);
                }
            }
        }
    }

    /// Logs every record that the tracker does not have.
    fn catch_up(&mut self) -> anyhow::Result<()> {
        let next = match self.next {
            Some(next) => next,
            None => {
                let next = self.tracker.open()?;
                self.lines.rewind()?;
                *self.next.insert(next)
            }
        };
        while let Some((index, line)) = self.lines.next()? {
            // After a resume, the tracker may have records that the run is about to make again, equal.
            if index < next {
                continue;
            }
            let record = serde_json::from_str(&line)
                .with_context(|| format!("{}:{} is no record", self.lines.path.display(), index + 1))?;
            self.tracker.log(index, &record)?;
            self.logged += 1;
            self.next = Some(index + 1);
        }
        self.tracker.rest()
    }
}

/// The whole lines of a file that grows.
struct Lines {
    path: PathBuf,
    file: Option<BufReader<File>>,
    /// The line that comes next, and where it begins.
    index: u64,
    offset: u64,
}

impl Lines {
    fn of(path: PathBuf) -> Self {
        Lines { path, file: None, index: 0, offset: 0 }
    }

    /// Begins again with the first line.
    fn rewind(&mut self) -> anyhow::Result<()> {
        let file = File::open(&self.path).with_context(|| format!("cannot read {}", self.path.display()))?;
        *self = Lines { file: Some(BufReader::new(file)), ..Lines::of(std::mem::take(&mut self.path)) };
        Ok(())
    }

    /// The next line with its index, when it is there as a whole.
    fn next(&mut self) -> anyhow::Result<Option<(u64, String)>> {
        let Some(file) = &mut self.file else { return Ok(None) };
        let failed = || format!("cannot read {}", self.path.display());
        let mut line = String::new();
        let length = file.read_line(&mut line).with_context(failed)?;
        if !line.ends_with('\n') {
            file.seek(SeekFrom::Start(self.offset)).with_context(failed)?;
            return Ok(None);
        }
        self.index += 1;
        self.offset += length as u64;
        Ok(Some((self.index - 1, line)))
    }
}
