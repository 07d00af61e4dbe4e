//! The values of a metric in a run's records.

use std::collections::BTreeSet;
use std::fs::{self, File};
use std::io::{self, Read as _, Seek as _, SeekFrom};
use std::path::{Path, PathBuf};

use serde::Serialize;

use super::definition::Goal;
use crate::checkpoint::{RunDir, find_run};
use crate::track::{METRICS_FILE, Record};

/// A value of the metric.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Point {
    /// The value.
    pub value: f64,
    /// Optimizer steps that were done.
    pub step: u64,
}

/// The best of `points` that training has come to; the earliest of equal ones.
pub(super) fn best(points: &[Point], goal: Goal) -> Option<Point> {
    let better =
        |best: Point, next: Point| if goal.cost(next.value) < goal.cost(best.value) { next } else { best };
    points.iter().copied().filter(|point| point.step > 0).reduce(better)
}

/// All values of a metric, as far as a file has been read.
#[derive(Debug, Default)]
pub(super) struct Series {
    points: Vec<Point>,
    file: PathBuf,
    /// So many bytes of it.
    read: u64,
    /// The last line of those.
    last: Vec<u8>,
}

impl Series {
    pub fn points(&self) -> &[Point] {
        &self.points
    }

    /// Reads what the newest version of the run in `folder` has recorded of `metric` since the last time. A run that is
    /// not there yet has nothing, and a line that is being written comes the next time.
    pub fn read_on(&mut self, folder: &Path, metric: &str) {
        let Ok(run) = find_run(folder) else { return };
        let file = run.join(METRICS_FILE);
        if file != self.file {
            *self = Series { file, ..Series::default() };
        }
        let Ok(mut news) = self.unread() else { return };
        if !news.starts_with(&self.last) {
            // A run that is resumed goes back to its checkpoint.
            *self = Series { file: std::mem::take(&mut self.file), ..Series::default() };
            news = self.unread().unwrap_or_default();
        }
        let whole = news.iter().rposition(|byte| *byte == b'\n').map_or(0, |end| end + 1);
        for line in news[..whole].split_inclusive(|byte| *byte == b'\n').skip(usize::from(self.read > 0)) {
            self.read += line.len() as u64;
            self.last = line.to_vec();
            let record = serde_json::from_slice::<Record>(line).ok();
            let point = record.and_then(|r| Some(Point { value: *r.figures.get(metric)?, step: r.step }));
            self.points.extend(point);
        }
    }

    /// The last line that was read, and what comes behind it.
    fn unread(&self) -> io::Result<Vec<u8>> {
        let mut file = File::open(&self.file)?;
        file.seek(SeekFrom::Start(self.read - self.last.len() as u64))?;
        let mut bytes = Vec::new();
        file.read_to_end(&mut bytes)?;
        Ok(bytes)
    }
}

/// The names of all metrics that the newest version of the run in `folder` has recorded.
pub(super) fn names_in(folder: &Path) -> BTreeSet<String> {
    let Ok(run) = find_run(folder) else { return BTreeSet::new() };
    let bytes = fs::read(run.join(METRICS_FILE)).unwrap_or_default();
    let records =
        bytes.split(|byte| *byte == b'\n').filter_map(|line| serde_json::from_slice::<Record>(line).ok());
    records.flat_map(|record| record.figures.into_keys()).collect()
}

/// Whether a process trains the run in `folder`.
pub(super) fn is_held(folder: &Path) -> bool {
    find_run(folder).is_ok_and(|run| RunDir::is_held(&run))
}
