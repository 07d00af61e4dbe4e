//! Starts several processes that train together, as a launcher does.

use std::io::{self, Write as _};
use std::net::TcpListener;
use std::path::{Path, PathBuf};
use std::process::Command;

use crate::author::workspace;
use crate::real::{Ended, Room, Running, binary, not_tried};

/// The real torchrun of PyTorch: what `TORCHRUN` names, else that of `make bench`. Where there is none, that is said, and no
/// failure anywhere: its wheel loads with gigabytes of CUDA's libraries alone.
pub fn torchrun() -> Option<PathBuf> {
    let named = std::env::var_os("TORCHRUN").map(PathBuf::from);
    let found = named.unwrap_or_else(|| workspace().join(".deps/bench/bin/torchrun"));
    if !found.is_file() {
        let why = "torchrun is not here: TORCHRUN names one, and make bench fetches one; other tests stand in for it";
        // Nobody may be left to read it.
        let _ = writeln!(io::stderr(), "not tried under torchrun: {why}");
        return None;
    }
    Some(found)
}

/// A port that nobody listens at.
pub fn free_port() -> u16 {
    let listener = TcpListener::bind("127.0.0.1:0").expect("there are free ports");
    listener.local_addr().expect("it has an address").port()
}

/// Starts rank `rank` of `size`, which meet at a port.
pub fn start(room: &Room, (rank, size, port): (u32, u32, u16), arguments: &[&str]) -> Running {
    let (rank, size, port) = (rank.to_string(), size.to_string(), port.to_string());
    let variables =
        [("RANK", &*rank), ("WORLD_SIZE", &*size), ("MASTER_ADDR", "127.0.0.1"), ("MASTER_PORT", &*port)];
    room.start_in(&variables, arguments)
}

/// Starts all ranks, by number.
pub fn start_all(room: &Room, size: u32, arguments: &[&str]) -> Vec<Running> {
    let port = free_port();
    (0..size).map(|rank| start(room, (rank, size, port), arguments)).collect()
}

/// Runs all ranks, which end well, or one process where `size` is 1.
#[track_caller]
pub fn run(room: &Room, size: u32, arguments: &[&str]) -> Vec<Ended> {
    match size {
        1 => vec![room.run(arguments).expect(0)],
        _ => start_all(room, size, arguments).into_iter().map(|rank| rank.wait().expect(0)).collect(),
    }
}

/// Two networks of their own with a cable between them; gone at the end of the test.
pub struct Networks {
    names: [String; 2],
}

impl Networks {
    /// None where this needs rights or a program that are not there, which is said.
    pub fn new() -> Option<Networks> {
        let process = std::process::id();
        let networks = Networks { names: ["a", "b"].map(|name| format!("jepa{process}{name}")) };
        let [a, b] = &networks.names;
        let (end_a, end_b) = (format!("ja{process}"), format!("jb{process}"));
        let mut commands = vec![
            format!("netns add {a}"),
            format!("netns add {b}"),
            format!("link add {end_a} netns {a} type veth peer name {end_b} netns {b}"),
        ];
        for (name, end, address) in [(a, &end_a, "10.77.0.1/24"), (b, &end_b, "10.77.0.2/24")] {
            commands.push(format!("-n {name} link set {end} name cable"));
            commands.push(format!("-n {name} addr add {address} dev cable"));
            commands.push(format!("-n {name} link set cable up"));
            commands.push(format!("-n {name} link set lo up"));
        }
        if !commands.iter().all(|command| ip(command)) {
            not_tried("it needs root and ip, of iproute2, for networks of its own");
            return None;
        }
        Some(networks)
    }

    /// Starts rank 0 in the one network and rank 1 in the other.
    pub fn start(&self, room: &Room, arguments: &[&str]) -> Vec<Running> {
        let variables = |rank: &'static str| {
            [
                ("RANK", rank),
                ("WORLD_SIZE", "2"),
                ("MASTER_ADDR", "10.77.0.1"),
                ("MASTER_PORT", "29400"),
                ("GLOO_SOCKET_IFNAME", "cable"),
            ]
        };
        let jepa_host = binary().display().to_string();
        let start = |(rank, name): (&'static str, &String)| {
            let all = [&["netns", "exec", name, &jepa_host], arguments].concat();
            room.start_other_in(&variables(rank), Path::new("ip"), all)
        };
        ["0", "1"].into_iter().zip(&self.names).map(start).collect()
    }

    /// Cuts the cable: nothing arrives any more, and nobody is told.
    pub fn cut(&self) {
        assert!(ip(&format!("-n {} link set cable down", self.names[1])));
    }
}

impl Drop for Networks {
    fn drop(&mut self) {
        for name in &self.names {
            let _ = ip(&format!("netns del {name}"));
        }
    }
}

fn ip(arguments: &str) -> bool {
    let output = Command::new("ip").args(arguments.split(' ')).output();
    output.is_ok_and(|output| output.status.success())
}
