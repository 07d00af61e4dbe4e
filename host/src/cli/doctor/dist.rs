//! `jepa-host doctor --dist`: whether the processes of a launcher find each other, and how fast they talk.

use std::io::{self, Write};
use std::time::{Duration, Instant};

use jepa_plugin_api::tch::{Device, Kind, Tensor};
use serde::Serialize;

use crate::cli::exit::Usage;
use crate::cli::output::{Format, print, print_columns};
use crate::dist::{Comm, DistError, Launch, Reduce};

/// Sizes of the tensors that are added up, in bytes.
const SIZES: [i64; 3] = [1 << 20, 8 << 20, 64 << 20];

#[derive(Debug, Serialize)]
struct Report {
    launcher: String,
    store: String,
    ranks: Vec<Rank>,
    /// Of the slowest rank, from its start until all had come.
    rendezvous_s: f64,
    /// Of adding up one number: the median, of the slowest rank.
    latency_s: f64,
    all_reduce: Vec<Speed>,
}

#[derive(Debug, Serialize)]
struct Rank {
    rank: u32,
    machine: String,
    process: u32,
}

#[derive(Debug, Serialize)]
struct Speed {
    bytes: i64,
    /// The median, of the slowest rank.
    seconds: f64,
    /// What each rank sends and receives at least, 2 (n − 1) / n of the tensor, per second.
    bytes_per_s: f64,
}

/// Meets the other ranks and measures. Rank 0 prints.
pub(super) fn run(timeout: Duration, format: Format) -> anyhow::Result<()> {
    let launch = Launch::from_environment()?.ok_or_else(|| {
        Usage(
            "doctor --dist tries what a launcher starts, and none has started this process: \
             torchrun --no-python --nproc-per-node 2 jepa-host doctor --dist, or srun --ntasks 2 jepa-host doctor --dist"
                .to_owned(),
        )
    })?;
    let began = Instant::now();
    let comm = Comm::join(launch, timeout)?;
    comm.wait_for_all()?;
    let rendezvous_s = of_slowest(&comm, began.elapsed().as_secs_f64())?;
    check_sum(&comm)?;
    let latency_s = median_of(&comm, 1, (20, 200))?;
    let mut all_reduce = Vec::new();
    for bytes in SIZES {
        let seconds = median_of(&comm, bytes / 4, (2, 7))?;
        let size = f64::from(comm.launch().size);
        let sent = 2.0 * (size - 1.0) / size * bytes as f64;
        all_reduce.push(Speed { bytes, seconds, bytes_per_s: sent / seconds });
    }
    // Nobody leaves while another still measures.
    comm.wait_for_all()?;
    let launch = comm.launch();
    if launch.rank > 0 {
        return Ok(());
    }
    let ranks = comm.peers().iter().map(|peer| Rank {
        rank: peer.rank,
        machine: peer.machine.clone(),
        process: peer.process,
    });
    let report = Report {
        launcher: launch.launcher.to_string(),
        store: format!("{}:{}", launch.host, launch.port),
        ranks: ranks.collect(),
        rendezvous_s,
        latency_s,
        all_reduce,
    };
    print(format, &report, Report::text)
}

/// Whether what comes out is the sum, in every element.
fn check_sum(comm: &Comm) -> anyhow::Result<()> {
    let (rank, size) = (f64::from(comm.launch().rank), f64::from(comm.launch().size));
    let mut sum = Tensor::arange(1000, (Kind::Float, Device::Cpu)) + rank;
    comm.all_reduce(&mut sum, Reduce::Sum)?;
    let expected = Tensor::arange(1000, (Kind::Float, Device::Cpu)) * size + size * (size - 1.0) / 2.0;
    anyhow::ensure!(sum == expected, "rank {rank}: the sum over all ranks is wrong");
    Ok(())
}

/// Seconds to add up so many f32: the median of `runs` behind `warmup`, of the rank where it is greatest.
fn median_of(comm: &Comm, length: i64, (warmup, runs): (usize, usize)) -> Result<f64, DistError> {
    let mut tensor = Tensor::zeros([length], (Kind::Float, Device::Cpu));
    let mut seconds = Vec::with_capacity(runs);
    for run in 0..warmup + runs {
        let began = Instant::now();
        comm.all_reduce(&mut tensor, Reduce::Sum)?;
        if run >= warmup {
            seconds.push(began.elapsed().as_secs_f64());
        }
    }
    seconds.sort_by(f64::total_cmp);
    of_slowest(comm, seconds[runs / 2])
}

fn of_slowest(comm: &Comm, seconds: f64) -> Result<f64, DistError> {
    let mut tensor = Tensor::from_slice(&[seconds]);
    comm.all_reduce(&mut tensor, Reduce::Max)?;
    Ok(tensor.double_value(&[0]))
}

impl Report {
    fn text(&self, out: &mut dyn Write) -> io::Result<()> {
        let Report { launcher, store, ranks, rendezvous_s, latency_s, all_reduce } = self;
        writeln!(out, "{} ranks of {launcher}, met at {store} in {rendezvous_s:.1} s", ranks.len())?;
        for Rank { rank, machine, process } in ranks {
            writeln!(out, "  rank {rank}: process {process} on {machine}")?;
        }
        writeln!(out, "\nall-reduce over gloo, on CPUs; one number takes {:.0} µs\n", latency_s * 1e6)?;
        let head = ["tensor", "ms", "GB/s of each rank"].map(str::to_owned).to_vec();
        let cells = |speed: &Speed| {
            let cells = vec![
                format!("{} MiB", speed.bytes >> 20),
                format!("{:.2}", speed.seconds * 1e3),
                format!("{:.2}", speed.bytes_per_s / 1e9),
            ];
            (cells, Vec::new())
        };
        print_columns(head, &all_reduce.iter().map(cells).collect::<Vec<_>>(), out)
    }
}
