//! Starts several processes that train together, as a launcher does.

use std::net::TcpListener;

use crate::real::{Ended, Room, Running};

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
