//! A timeline of a run for <https://ui.perfetto.dev> or `chrome://tracing`: what each thread did when, in the trace-event
//! format.

use std::fs::File;
use std::io::{self, BufWriter, Write};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use serde_json::json;

/// Spans in a file at most, some 100 MB: viewers open no more, and a long run fills no disk.
const MOST: u64 = 1_000_000;

/// A file that spans are written to, from any thread. A copy writes to the same file.
#[derive(Clone, Debug)]
pub struct Trace(Arc<Shared>);

#[derive(Debug)]
struct Shared {
    path: PathBuf,
    begin: Instant,
    /// None when nothing more is written.
    open: Mutex<Option<Open>>,
}

#[derive(Debug)]
struct Open {
    file: BufWriter<File>,
    /// Names of threads, in the order of their numbers. One that ends leaves its name to the next of that name.
    threads: Vec<String>,
    spans: u64,
}

impl Trace {
    /// Begins the file `path`, which is replaced.
    ///
    /// # Errors
    /// When it cannot be written.
    pub fn create(path: &Path) -> io::Result<Trace> {
        let mut file = BufWriter::new(File::create(path)?);
        file.write_all(b"[\n")?;
        let open = Open { file, threads: Vec::new(), spans: 0 };
        let shared = Shared { path: path.to_owned(), begin: Instant::now(), open: Mutex::new(Some(open)) };
        Ok(Trace(Arc::new(shared)))
    }

    /// This thread was busy with `name` from `start` to `end`. A file that cannot be written is said once, and left.
    pub fn span(&self, name: &str, start: Instant, end: Instant) {
        self.write(name, None, start, end);
    }

    /// The whole of a training step, over the spans of its parts.
    pub fn step(&self, number: u64, start: Instant, end: Instant) {
        self.write("step", Some(number), start, end);
    }

    fn write(&self, name: &str, step: Option<u64>, start: Instant, end: Instant) {
        let mut open = self.0.open.lock().unwrap_or_else(PoisonError::into_inner);
        let Some(file) = open.as_mut() else { return };
        let ended = match file.write_span(name, step, start.duration_since(self.0.begin), end - start) {
            Ok(()) if file.spans < MOST => return,
            Ok(()) => file.close().inspect(|()| {
                tracing::info!("{} has {MOST} spans, and gets no more", self.0.path.display());
            }),
            Err(error) => Err(error),
        };
        if let Err(error) = ended {
            tracing::warn!("{}: the timeline ends here: {error}", self.0.path.display());
        }
        *open = None;
    }

    /// Completes the file; later spans are left out.
    ///
    /// # Errors
    /// When it cannot be written.
    pub fn finish(&self) -> io::Result<()> {
        match self.0.open.lock().unwrap_or_else(PoisonError::into_inner).take() {
            Some(mut open) => open.close(),
            None => Ok(()),
        }
    }
}

impl Open {
    fn write_span(
        &mut self,
        name: &str,
        step: Option<u64>,
        since: Duration,
        lasted: Duration,
    ) -> io::Result<()> {
        let thread = thread::current();
        let thread = thread.name().unwrap_or("unnamed");
        let number = match self.threads.iter().position(|known| known == thread) {
            Some(number) => number,
            None => {
                self.threads.push(thread.to_owned());
                let number = self.threads.len() - 1;
                let named = json!({
                    "name": "thread_name", "ph": "M", "pid": 1, "tid": number, "args": { "name": thread },
                });
                self.write_event(&named)?;
                number
            }
        };
        let micros = |duration: Duration| duration.as_nanos() as f64 / 1e3;
        self.spans += 1;
        let (ts, dur) = (micros(since), micros(lasted));
        let mut span = json!({ "name": name, "ph": "X", "pid": 1, "tid": number, "ts": ts, "dur": dur });
        if let Some(step) = step {
            span["args"] = json!({ "step": step });
        }
        self.write_event(&span)
    }

    fn write_event(&mut self, event: &serde_json::Value) -> io::Result<()> {
        serde_json::to_writer(&mut self.file, event)?;
        self.file.write_all(b",\n")
    }

    fn close(&mut self) -> io::Result<()> {
        // An event of its own, as every other has a comma behind it.
        let process = json!({ "name": "process_name", "ph": "M", "pid": 1, "args": { "name": "jepa-host" } });
        serde_json::to_writer(&mut self.file, &process)?;
        self.file.write_all(b"\n]\n")?;
        self.file.flush()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_trace_is_json_with_the_spans_of_every_thread() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("trace.json");
        let trace = Trace::create(&path).unwrap();
        let start = Instant::now();
        trace.span("forward", start, start + Duration::from_millis(3));
        let other = trace.clone();
        thread::Builder::new()
            .name("data-0".to_owned())
            .spawn(move || other.span("decode", start, start + Duration::from_micros(5)))
            .unwrap()
            .join()
            .unwrap();
        trace.finish().unwrap();
        trace.span("late", start, start);

        let events: Vec<serde_json::Value> = serde_json::from_slice(&std::fs::read(&path).unwrap()).unwrap();
        let spans: Vec<_> = events.iter().filter(|event| event["ph"] == "X").collect();
        assert_eq!(spans.len(), 2, "{events:?}");
        assert_eq!((&spans[0]["name"], &spans[0]["dur"]), (&json!("forward"), &json!(3000.0)));
        assert_ne!(spans[0]["tid"], spans[1]["tid"]);
        let name = events.iter().find(|event| event["ph"] == "M" && event["tid"] == spans[1]["tid"]).unwrap();
        assert_eq!(name["args"]["name"], "data-0");
    }

    #[test]
    fn a_full_disk_ends_the_trace_and_nothing_else() {
        let trace = Trace::create(Path::new("/dev/full")).unwrap();
        let start = Instant::now();
        (0..1000).for_each(|_| trace.span("forward", start, start));
        assert!(trace.finish().is_ok(), "what was written had failed before");
    }
}
