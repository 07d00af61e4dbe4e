//! `jepa-host doctor --dist`: whether the processes of a launcher find each other, and how fast they talk.

use std::io::{self, Write};
use std::time::{Duration, Instant};

use jepa_plugin_api::tch::{Cuda, Device, Kind, Tensor};
use serde::Serialize;

use crate::cli::exit::Usage;
use crate::cli::output::{Format, print, print_columns};
use crate::config;
use crate::device;
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
    /// The same on GPUs, where every rank has one.
    gpus: Option<Gpus>,
}

#[derive(Debug, Serialize)]
struct Gpus {
    /// Whether NCCL is there; else they talk by way of the CPU's memory.
    nccl: bool,
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
    let (latency_s, all_reduce) = measure(&comm, Device::Cpu)?;
    let gpu = device::choose(config::Device::Auto, comm.local_rank() as usize)?;
    let all_have_one = of_slowest(&comm, f64::from(gpu == Device::Cpu))? == 0.0;
    let gpus = match all_have_one {
        true => {
            let nccl = comm.join_gpus()?;
            let (latency_s, all_reduce) = measure(&comm, gpu)?;
            Some(Gpus { nccl, latency_s, all_reduce })
        }
        false => None,
    };
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
        gpus,
    };
    print(format, &report, Report::text)
}

/// What it takes to add up one number, and tensors of each size, on `device`.
fn measure(comm: &Comm, device: Device) -> anyhow::Result<(f64, Vec<Speed>)> {
    check_sum(comm, device)?;
    let latency_s = median_of(comm, (1, device), (20, 200))?;
    let mut speeds = Vec::new();
    for bytes in SIZES {
        let seconds = median_of(comm, (bytes / 4, device), (2, 7))?;
        let size = f64::from(comm.launch().size);
        let sent = 2.0 * (size - 1.0) / size * bytes as f64;
        speeds.push(Speed { bytes, seconds, bytes_per_s: sent / seconds });
    }
    Ok((latency_s, speeds))
}

/// Whether what comes out is the sum, in every element.
fn check_sum(comm: &Comm, device: Device) -> anyhow::Result<()> {
    let (rank, size) = (f64::from(comm.launch().rank), f64::from(comm.launch().size));
    let mut sum = Tensor::arange(1000, (Kind::Float, device)) + rank;
    comm.all_reduce(&mut sum, Reduce::Sum)?;
    let expected = Tensor::arange(1000, (Kind::Float, device)) * size + size * (size - 1.0) / 2.0;
    anyhow::ensure!(sum == expected, "rank {rank}: the sum over all ranks is wrong on {device:?}");
    Ok(())
}

/// Seconds to add up so many f32: the median of `runs` behind `warmup`, of the rank where it is greatest.
fn median_of(
    comm: &Comm,
    (length, device): (i64, Device),
    (warmup, runs): (usize, usize),
) -> Result<f64, DistError> {
    let wait = || {
        if let Device::Cuda(number) = device {
            Cuda::synchronize(number as i64);
        }
    };
    let mut tensor = Tensor::zeros([length], (Kind::Float, device));
    let mut seconds = Vec::with_capacity(runs);
    for run in 0..warmup + runs {
        wait();
        let began = Instant::now();
        comm.all_reduce(&mut tensor, Reduce::Sum)?;
        wait();
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
        let Report { launcher, store, ranks, rendezvous_s, latency_s, all_reduce, gpus } = self;
        writeln!(out, "{} ranks of {launcher}, met at {store} in {rendezvous_s:.1} s", ranks.len())?;
        for Rank { rank, machine, process } in ranks {
            writeln!(out, "  rank {rank}: process {process} on {machine}")?;
        }
        let mut table = |over: &str, latency_s: f64, speeds: &[Speed]| {
            writeln!(out, "\nall-reduce over {over}; one number takes {:.0} µs\n", latency_s * 1e6)?;
            let head = ["tensor", "ms", "GB/s of each rank"].map(str::to_owned).to_vec();
            let cells = |speed: &Speed| {
                let cells = vec![
                    format!("{} MiB", speed.bytes >> 20),
                    format!("{:.2}", speed.seconds * 1e3),
                    format!("{:.2}", speed.bytes_per_s / 1e9),
                ];
                (cells, Vec::new())
            };
            print_columns(head, &speeds.iter().map(cells).collect::<Vec<_>>(), out)
        };
        table("gloo, on CPUs", *latency_s, all_reduce)?;
        match gpus {
            Some(Gpus { nccl: true, latency_s, all_reduce }) => {
                table("NCCL, on GPUs", *latency_s, all_reduce)
            }
            Some(Gpus { latency_s, all_reduce, .. }) => {
                table("gloo, on GPUs by way of the CPU", *latency_s, all_reduce)
            }
            None => Ok(()),
        }
    }
}
