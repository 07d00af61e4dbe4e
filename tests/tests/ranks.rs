//! Several processes that find each other and talk, and what they say when one is missing.

use std::panic::catch_unwind;
use std::sync::Barrier;
use std::thread;
use std::time::{Duration, Instant};

use jepa_host::device::{ProcessGroup, zero_gradients};
use jepa_host::dist::{Comm, DistError, Ending, Keeper, Launch, Launcher, Reduce};
use jepa_plugin_api::nn::BatchNorm;
use jepa_plugin_api::{Params, ranks};
use jepa_tests::ranks::{free_port, start};
use jepa_tests::real::{Room, Running};
use serde_json::Value;
use tch::{Device, Kind, Tensor};

#[test]
fn ranks_find_each_other_and_the_first_tells() {
    for size in [1, 2, 4] {
        let (room, port) = (Room::new(), free_port());
        let ranks: Vec<Running> = (0..size)
            .map(|rank| start(&room, (rank, size, port), &["doctor", "--dist", "--format", "json"]))
            .collect();
        let processes: Vec<u32> = ranks.iter().map(Running::id).collect();
        let mut ended = ranks.into_iter().map(|rank| rank.wait().expect(0));
        let report: Value = serde_json::from_str(&ended.next().unwrap().stdout).unwrap();
        let told: Vec<u64> = report["ranks"]
            .as_array()
            .unwrap()
            .iter()
            .map(|rank| rank["process"].as_u64().unwrap())
            .collect();
        assert_eq!(told, processes.iter().map(|process| u64::from(*process)).collect::<Vec<_>>());
        assert!(report["latency_s"].as_f64().unwrap() > 0.0);
        assert_eq!(report["all_reduce"].as_array().unwrap().len(), 3);
        ended.for_each(|other| assert_eq!((other.stdout.as_str(), other.stderr.as_str()), ("", "")));
    }
}

#[test]
fn who_is_missing_is_named_within_the_time() {
    let (room, port, began) = (Room::new(), free_port(), Instant::now());
    let arguments = ["doctor", "--dist", "--timeout", "8"];
    let ranks = [0, 2].map(|rank| start(&room, (rank, 4, port), &arguments));
    let says = "2 of 4 ranks have not come within 8 s: 1, 3; look at what they have printed\n";
    let [first, other] = ranks.map(|rank| rank.wait().expect(1).stderr);
    assert!(first.starts_with(" INFO waiting for ranks 1, 3, for "), "{first}");
    assert!(first.ends_with(&format!(" s at most\nerror: {says}")), "{first}");
    assert_eq!(other, format!("error: rank 2: {says}"));
    assert!(began.elapsed() < Duration::from_secs(30));

    let alone = start(&room, (1, 2, free_port()), &["doctor", "--dist", "--timeout", "2"]).wait().expect(1);
    assert!(alone.stderr.contains("is rank 0 running there"), "{}", alone.stderr);

    let port = free_port();
    let [first, other] = [(0, 2, port), (1, 3, port)].map(|place| start(&room, place, &arguments));
    let other = other.wait().expect(2).stderr;
    assert!(other.ends_with("but rank 0 is one of 2, and this is rank 1 of 3\n"), "{other}");
    assert!(first.wait().expect(1).stderr.contains("1 of 2 ranks have not come"));
}

#[test]
fn what_no_launcher_would_start_is_refused() {
    let room = Room::new();
    let ended = room.run(["doctor", "--dist"]).expect(2);
    assert!(ended.stderr.contains("torchrun --no-python"), "{}", ended.stderr);
    let variables = [("RANK", "0"), ("WORLD_SIZE", "2")];
    let ended = room.start_in(&variables, ["doctor", "--dist"]).wait().expect(2);
    assert!(ended.stderr.contains("MASTER_ADDR is not set"), "{}", ended.stderr);
}

/// Joins `size` ranks that are threads of this process, and runs `work` in each.
fn in_threads<T: Send>(size: u32, timeout: Duration, work: impl Fn(Comm) -> T + Sync) -> Vec<T> {
    let port = free_port();
    thread::scope(|scope| {
        let ranks: Vec<_> = (0..size)
            .map(|rank| {
                let launch = Launch {
                    launcher: Launcher::Environment,
                    group: String::new(),
                    rank,
                    size,
                    local_rank: None,
                    host: "127.0.0.1".to_owned(),
                    port,
                    keeper: Keeper::First,
                };
                let work = &work;
                scope.spawn(move || work(Comm::join(launch, timeout).unwrap()))
            })
            .collect();
        ranks.into_iter().map(|rank| rank.join().unwrap()).collect()
    })
}

#[test]
fn tensors_are_added_up_and_handed_on() {
    let of_ranks = in_threads(3, Duration::from_secs(30), |comm| {
        let rank = f64::from(comm.launch().rank);
        let numbers = |tensor: &Tensor| Vec::<f64>::try_from(tensor.to_kind(Kind::Double)).unwrap();
        let mut sum = Tensor::from_slice(&[rank, 10.0]);
        comm.all_reduce(&mut sum, Reduce::Sum).unwrap();
        let mut most = Tensor::from_slice(&[rank as f32, -rank as f32]);
        comm.all_reduce(&mut most, Reduce::Max).unwrap();
        let mut of_last = Tensor::from_slice(&[rank as i64]);
        comm.broadcast(&mut of_last, 2).unwrap();
        comm.wait_for_all().unwrap();
        // No launcher has said so.
        assert_eq!((comm.local_rank(), comm.cores_shared_by()), (comm.rank(), 3));
        [numbers(&sum), numbers(&most), numbers(&of_last)]
    });
    assert!(
        of_ranks.iter().all(|rank| *rank == [vec![3.0, 30.0], vec![2.0, 0.0], vec![2.0]]),
        "{of_ranks:?}"
    );
}

#[test]
fn a_rank_that_leaves_is_an_error_of_the_others_at_once() {
    let began = Instant::now();
    let ended = in_threads(3, Duration::from_secs(60), |comm| {
        comm.wait_for_all().unwrap();
        match comm.launch().rank {
            1 => None,
            _ => Some(comm.all_reduce(&mut Tensor::from_slice(&[1.0f32]), Reduce::Sum).unwrap_err()),
        }
    });
    assert!(began.elapsed() < Duration::from_secs(30), "{:?}", began.elapsed());
    for (rank, error) in ended.iter().enumerate().filter_map(|(rank, error)| Some((rank, error.as_ref()?))) {
        assert!(matches!(error, DistError::Lost { .. }), "{error}");
        assert!(
            error.to_string().contains(&format!("rank {rank} lost the others while it adds up")),
            "{error}"
        );
    }
}

/// As after a restart by torchrun, whose store outlives it.
#[test]
fn what_an_earlier_attempt_has_left_behind_confuses_nobody() {
    let port = free_port();
    let launch = |rank: u32, keeper: Keeper| Launch {
        launcher: Launcher::Torchrun,
        group: "run".to_owned(),
        rank,
        size: 2,
        local_rank: None,
        host: "127.0.0.1".to_owned(),
        port,
        keeper,
    };
    let time = Duration::from_secs(20);
    let join = |launch| {
        let comm = Comm::join(launch, time).unwrap();
        comm.wait_for_all().unwrap();
        comm
    };
    thread::scope(|scope| {
        let first = scope.spawn(|| join(launch(0, Keeper::First)));
        let second = scope.spawn(|| drop(join(launch(1, Keeper::Launcher))));
        // It keeps the store on.
        let _keeper = first.join().unwrap();
        second.join().unwrap();
        // One that misses the other, who comes too late for it and waits for the next.
        let alone = Comm::join(launch(0, Keeper::Launcher), Duration::from_secs(1)).unwrap_err();
        assert!(matches!(&alone, DistError::Missing { missing, .. } if *missing == [1]), "{alone}");
        // The one comes before the other has called.
        let again = scope.spawn(|| Comm::join(launch(1, Keeper::Launcher), time).unwrap());
        thread::sleep(Duration::from_millis(500));
        let first = Comm::join(launch(0, Keeper::Launcher), time).unwrap();
        let again = again.join().unwrap();
        let other = scope.spawn(move || again.wait_for_all().unwrap());
        first.wait_for_all().unwrap();
        other.join().unwrap();
    });
}

/// As when torchrun ends before its ranks do.
#[test]
fn the_end_of_a_launchers_store_is_no_ranks_fault() {
    let (port, time) = (free_port(), Duration::from_secs(20));
    let store = ProcessGroup::open("127.0.0.1", port, true, "launcher", time).unwrap();
    let (joined, gone) = (Barrier::new(3), Barrier::new(3));
    let (joined, gone) = (&joined, &gone);
    thread::scope(|scope| {
        let ranks = [0, 1].map(|rank| {
            let launch = Launch {
                launcher: Launcher::Torchrun,
                group: "run".to_owned(),
                rank,
                size: 2,
                local_rank: Some(rank),
                host: "127.0.0.1".to_owned(),
                port,
                keeper: Keeper::Launcher,
            };
            scope.spawn(move || {
                let comm = Comm::join(launch, time).unwrap();
                joined.wait();
                gone.wait();
                comm.announce(&Ending::Lost);
                comm.part(&Ending::Lost).unwrap()
            })
        });
        joined.wait();
        drop(store);
        gone.wait();
        for rank in ranks {
            let error = rank.join().unwrap();
            assert!(matches!(error, DistError::StoreLost { .. }), "{error}");
            assert!(error.to_string().contains("which torchrun keeps, does not answer any more"), "{error}");
        }
    });
}

/// Runs [`in_a_rank_of_its_own`] of this test file in as many processes: what plugins compute together is one thing in a
/// process.
#[test]
fn what_plugins_and_gradients_need_of_the_others_is_what_one_process_computes() {
    let room = Room::new();
    for size in [2, 4] {
        let port = free_port().to_string();
        let start = |rank: u32| {
            let (rank, size) = (rank.to_string(), size.to_string());
            let variables = [
                ("RANK", &*rank),
                ("WORLD_SIZE", &*size),
                ("MASTER_ADDR", "127.0.0.1"),
                ("MASTER_PORT", &*port),
            ];
            let arguments = ["--ignored", "--exact", "in_a_rank_of_its_own", "--nocapture"];
            room.start_other_in(&variables, &std::env::current_exe().unwrap(), arguments)
        };
        let ranks: Vec<Running> = (0..size).map(start).collect();
        for rank in ranks {
            let ended = rank.wait().expect(0);
            assert!(ended.stdout.contains("1 passed"), "{}", ended.stdout);
        }
    }
}

#[test]
#[ignore = "a part of another test"]
fn in_a_rank_of_its_own() {
    let Some(launch) = Launch::from_environment().unwrap() else { return };
    let comm = Comm::join(launch, Duration::from_secs(60)).unwrap();
    tch::manual_seed(3);
    batch_norms(&comm);
    sums_and_rows(&comm);
    // Each parameter travels by itself, then all of them together.
    for bytes in [16, 1 << 20] {
        exchanged_gradients(&comm, bytes);
    }
    assert!(!comm.is_lost());
    if comm.rank() + 1 == comm.size() {
        return;
    }
    // A collective that fails in a plugin's hands is known afterwards.
    comm.let_plugins_join(true).unwrap();
    let sum = catch_unwind(|| ranks::all_reduce(&Tensor::from_slice(&[1.0f32])));
    let words = sum.unwrap_err().downcast::<String>().unwrap();
    assert!(words.starts_with("another rank is lost"), "{words}");
    assert!(comm.is_lost());
}

#[track_caller]
fn close(a: &Tensor, b: &Tensor) {
    let off = f64::try_from((a - b).norm() / b.norm().clamp_min(1e-12)).unwrap();
    assert!(a.size() == b.size() && off < 1e-5, "{off} apart");
}

/// Of maps in different layouts, and of different numbers of rows.
fn batch_norms(comm: &Comm) {
    let (rank, size) = (i64::from(comm.rank()), i64::from(comm.size()));
    let maps = Tensor::randn([2 * size, 6, 5, 5], (Kind::Float, Device::Cpu)) * 2.0 + 1.0;
    let by = Tensor::randn_like(&maps);
    // Each rank one row more than the one before it.
    let rows = size * (size + 1) / 2;
    let vectors = Tensor::randn([rows, 6], (Kind::Float, Device::Cpu)) - 2.0;
    let by_vectors = Tensor::randn_like(&vectors);
    let of_maps = (maps, by, rank * 2, 2);
    let of_vectors = (vectors, by_vectors, rank * (rank + 1) / 2, rank + 1);
    // The first none at all, as where nothing of its share is visible.
    let vectors = Tensor::randn([size * (size - 1), 6], (Kind::Float, Device::Cpu)) * 0.5;
    let by_vectors = Tensor::randn_like(&vectors);
    let of_most = (vectors, by_vectors, rank * (rank - 1), 2 * rank);
    for (x, by, first, rows) in [of_maps, of_vectors, of_most] {
        let new = || BatchNorm::new(&Params::new(Device::Cpu), 6);
        let (alone, together) = (new(), new());
        let (whole, own) = (x.copy().set_requires_grad(true), x.narrow(0, first, rows).copy());
        // The first goes the way of libtorch's operations, the others that of the fused kernels.
        let own = if rank == 0 || own.dim() == 2 { own } else { channels_last(&own) }.set_requires_grad(true);
        let expected = alone.forward_relu(&whole, true);
        (&expected * &by).sum(Kind::Float).backward();
        comm.let_plugins_join(true).unwrap();
        let y = together.forward_relu(&own, true);
        (&y * by.narrow(0, first, rows)).sum(Kind::Float).backward();
        comm.let_plugins_join(false).unwrap();
        close(&y, &expected.narrow(0, first, rows));
        close(&own.grad(), &whole.grad().narrow(0, first, rows));
        close(&together.running_mean, &alone.running_mean);
        close(&together.running_var, &alone.running_var);
        // Whichever way each has gone.
        for running in [&together.running_mean, &together.running_var] {
            let all = comm.all_gather(&running.detach().view([1, 6])).unwrap();
            assert_eq!(all, all.narrow(0, 0, 1).expand_as(&all), "running statistics differ");
        }
        for (together, alone) in [(&together.weight, &alone.weight), (&together.bias, &alone.bias)] {
            let mut sum = together.grad();
            comm.all_reduce(&mut sum, Reduce::Sum).unwrap();
            close(&sum, &alone.grad());
        }
    }
}

fn channels_last(x: &Tensor) -> Tensor {
    x.permute([0, 2, 3, 1]).contiguous().permute([0, 3, 1, 2])
}

fn sums_and_rows(comm: &Comm) {
    let (rank, size) = (i64::from(comm.rank()), i64::from(comm.size()));
    let x = Tensor::randn([3 * size, 4], (Kind::Float, Device::Cpu));
    let (whole, own) =
        (x.copy().set_requires_grad(true), x.narrow(0, 3 * rank, 3).copy().set_requires_grad(true));
    let weight = Tensor::randn([3 * size, 3 * size], (Kind::Float, Device::Cpu));
    // The sum over ranks of each one's rows of a function of all rows.
    let expected =
        (whole.matmul(&whole.transpose(0, 1)) * &weight).sum(Kind::Float) + whole.sum(Kind::Float).square();
    expected.backward();
    comm.let_plugins_join(true).unwrap();
    assert_eq!((ranks::rank() as i64, ranks::size() as i64), (rank, size));
    let all = ranks::gather(&own);
    let of_rows = (own.matmul(&all.transpose(0, 1)) * weight.narrow(0, 3 * rank, 3)).sum(Kind::Float);
    let of_sum = ranks::all_reduce(&own.sum(Kind::Float)).square() / size as f64;
    (of_rows + of_sum).backward();
    comm.let_plugins_join(false).unwrap();
    close(&all, &x);
    close(&own.grad(), &whole.grad().narrow(0, 3 * rank, 3));
}

/// Over two backward passes, with parameters that some ranks or all of them do not use.
fn exchanged_gradients(comm: &Comm, bucket_bytes: u64) {
    let rank = f64::from(comm.rank());
    let size = f64::from(comm.size());
    let new = || Tensor::zeros([3, 2], (Kind::Float, Device::Cpu)).set_requires_grad(true);
    let (both, of_first, early, nowhere) = (new(), new(), new(), new());
    let params = [&both, &of_first, &early, &nowhere].map(Tensor::shallow_clone);
    let mut exchange = comm.exchange(&params, bucket_bytes).unwrap();
    for _ in 0..2 {
        let mut loss = both.sum(Kind::Float) * (rank + 1.0) + early.sum(Kind::Float);
        loss.backward();
        loss = both.sum(Kind::Float) * 10.0;
        if rank == 0.0 {
            loss += of_first.sum(Kind::Float) * size;
        }
        let figures = Tensor::from_slice(&[rank, 1.0]);
        exchange.begin(&figures).unwrap();
        loss.backward();
        exchange.finish().unwrap();
        let all = |value: f64| Tensor::full([3, 2], value, (Kind::Float, Device::Cpu));
        close(&both.grad(), &all((size + 1.0) / 2.0 + 10.0));
        close(&of_first.grad(), &all(1.0));
        close(&early.grad(), &all(1.0));
        assert!(!nowhere.grad().defined(), "what nobody uses has no gradient");
        assert_eq!(Vec::<f64>::try_from(&figures).unwrap(), [(size - 1.0) / 2.0, 1.0]);
        zero_gradients(&params).unwrap();
    }
}
