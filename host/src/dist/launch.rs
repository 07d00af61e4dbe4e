//! What a launcher tells a process about its place among the others.

use std::fmt;

use super::DistError;

/// Who has started the processes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Launcher {
    /// `torchrun`, which begins anew after a failure.
    Torchrun,
    /// `srun`.
    Srun,
    /// `RANK` and `WORLD_SIZE`, from whomever.
    Environment,
}

/// The place of this process among those that work together.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Launch {
    /// Who has started them.
    pub launcher: Launcher,
    /// Which of all that it has started: torchrun's run, SLURM's job and step.
    pub group: String,
    /// Number of this process, from 0.
    pub rank: u32,
    /// How many there are, at least 1.
    pub size: u32,
    /// Number of this process on its machine, from 0, if the launcher says so.
    pub local_rank: Option<u32>,
    /// Where they meet.
    pub host: String,
    /// Where there.
    pub port: u16,
    /// Who keeps the store where they do.
    pub keeper: Keeper,
}

/// Who keeps the store that ranks meet in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Keeper {
    /// Rank 0: it ends with that.
    First,
    /// The launcher: it outlives the ranks.
    Launcher,
}

impl Launch {
    /// Whether this process keeps the store.
    pub fn keeps_store(&self) -> bool {
        self.rank == 0 && self.keeper == Keeper::First
    }

    /// Reads this process's environment; `None` for a process of its own.
    ///
    /// # Errors
    /// [`DistError::Environment`].
    pub fn from_environment() -> Result<Option<Launch>, DistError> {
        Launch::from(|name| std::env::var(name).ok())
    }

    fn from(variable: impl Fn(&str) -> Option<String>) -> Result<Option<Launch>, DistError> {
        let has = |name: &str| variable(name).is_some();
        let launcher = match () {
            () if has("TORCHELASTIC_RUN_ID") => Launcher::Torchrun,
            () if has("RANK") => Launcher::Environment,
            // A script may export WORLD_SIZE for all steps. Of a shell that salloc has opened, the number of tasks is known
            // too, but it is none of them.
            () if has("SLURM_STEP_ID") && has("SLURM_PROCID") => Launcher::Srun,
            () if variable("WORLD_SIZE").is_some_and(|size| size.trim() != "1") => Launcher::Environment,
            () => return Ok(None),
        };
        let refuse = |problem: String| DistError::Environment { launcher, problem };
        let number = |name: &str| -> Result<Option<u32>, DistError> {
            let Some(text) = variable(name) else { return Ok(None) };
            let parsed = text.trim().parse().map(Some);
            parsed.map_err(|_| refuse(format!("{name} is `{text}`, which is no number")))
        };
        let required = |name: &str| number(name)?.ok_or_else(|| refuse(format!("{name} is not set")));
        let (rank, size, local_rank) = match launcher {
            Launcher::Srun => {
                (required("SLURM_PROCID")?, required("SLURM_STEP_NUM_TASKS")?, number("SLURM_LOCALID")?)
            }
            _ => (required("RANK")?, required("WORLD_SIZE")?, number("LOCAL_RANK")?),
        };
        if rank >= size {
            return Err(refuse(format!("this is rank {rank} of {size}: ranks count from 0")));
        }
        if size == 1 && launcher == Launcher::Srun {
            return Ok(None);
        }
        let by_slurm = || {
            let nodes = variable("SLURM_STEP_NODELIST").or_else(|| variable("SLURM_JOB_NODELIST"))?;
            Some(first_node(&nodes))
        };
        let host = variable("MASTER_ADDR")
            .or_else(|| (launcher == Launcher::Srun).then(by_slurm).flatten())
            .ok_or_else(|| {
                refuse("MASTER_ADDR is not set: the name or the address of rank 0's machine".into())
            })?;
        let port = match (number("MASTER_PORT")?, launcher) {
            (Some(port), _) => u16::try_from(port).ok().filter(|port| *port > 0),
            // The same for all of a step, and others for other steps on the machine; below those that a system hands out.
            (None, Launcher::Srun) => {
                let (job, step) = (required("SLURM_JOB_ID")?, required("SLURM_STEP_ID")?);
                Some(20_000 + (job.wrapping_mul(31).wrapping_add(step) % 12_000) as u16)
            }
            (None, _) => None,
        };
        let port = port.ok_or_else(|| refuse("MASTER_PORT is not set to a port, 1 to 65535".into()))?;
        let named = |name: &str| variable(name).unwrap_or_default();
        let group = match launcher {
            Launcher::Torchrun => named("TORCHELASTIC_RUN_ID"),
            Launcher::Srun => format!("{}.{}", named("SLURM_JOB_ID"), named("SLURM_STEP_ID")),
            Launcher::Environment => String::new(),
        };
        // As torch's own rendezvous has it.
        let keeper = match named("TORCHELASTIC_USE_AGENT_STORE").as_str() {
            "True" => Keeper::Launcher,
            _ => Keeper::First,
        };
        Ok(Some(Launch { launcher, group, rank, size, local_rank, host, port, keeper }))
    }
}

/// The first of SLURM's list of machines: `gpu[07-09,12],cpu1` begins with `gpu07`.
fn first_node(nodes: &str) -> String {
    let (mut name, mut rest) = (String::new(), nodes);
    loop {
        let end = rest.find(['[', ',']).unwrap_or(rest.len());
        name += &rest[..end];
        let Some(range) = rest[end..].strip_prefix('[') else { return name };
        name += &range[..range.find(['-', ',', ']']).unwrap_or(range.len())];
        rest = range.find(']').map_or("", |close| &range[close + 1..]);
    }
}

impl fmt::Display for Launcher {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        f.write_str(match self {
            Launcher::Torchrun => "torchrun",
            Launcher::Srun => "srun",
            Launcher::Environment => "the environment",
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn from(variables: &[(&str, &str)]) -> Result<Option<Launch>, String> {
        let value = |name: &str| {
            variables.iter().find(|(known, _)| *known == name).map(|(_, value)| (*value).to_owned())
        };
        Launch::from(value).map_err(|error| error.to_string())
    }

    const TWO: [(&str, &str); 4] =
        [("RANK", "1"), ("WORLD_SIZE", "2"), ("MASTER_ADDR", "gpu07"), ("MASTER_PORT", "29500")];

    #[test]
    fn every_launcher_is_understood() {
        assert_eq!(
            from(&[("SLURM_JOB_ID", "7"), ("SLURM_NTASKS", "4")]).unwrap(),
            None,
            "a shell within salloc"
        );
        let launch = Launch {
            launcher: Launcher::Environment,
            group: String::new(),
            rank: 1,
            size: 2,
            local_rank: None,
            host: "gpu07".into(),
            port: 29500,
            keeper: Keeper::First,
        };
        assert_eq!(from(&TWO).unwrap(), Some(launch.clone()));
        assert_eq!(from(&[("WORLD_SIZE", "1")]).unwrap(), None);

        // torchrun keeps the store, unless it says that it does not.
        for (agent, keeper) in [("True", Keeper::Launcher), ("False", Keeper::First)] {
            let elastic = [
                ("TORCHELASTIC_RUN_ID", "none"),
                ("TORCHELASTIC_USE_AGENT_STORE", agent),
                ("LOCAL_RANK", "1"),
            ];
            let of_torchrun = Launch {
                launcher: Launcher::Torchrun,
                group: "none".into(),
                rank: 0,
                local_rank: Some(1),
                keeper,
                ..launch.clone()
            };
            let first = [("RANK", "0")].iter().chain(&TWO[1..]).chain(&elastic).copied().collect::<Vec<_>>();
            assert_eq!(from(&first).unwrap(), Some(of_torchrun));
        }

        let srun = [
            ("SLURM_STEP_ID", "0"),
            ("SLURM_STEP_NUM_TASKS", "2"),
            ("SLURM_PROCID", "1"),
            ("SLURM_LOCALID", "1"),
            ("SLURM_JOB_ID", "41234"),
            ("SLURM_STEP_NODELIST", "gpu[07-09,12]"),
        ];
        let port = 20_000 + (41_234 * 31 % 12_000) as u16;
        let of_srun =
            Launch { launcher: Launcher::Srun, group: "41234.0".into(), local_rank: Some(1), port, ..launch };
        assert_eq!(from(&srun).unwrap(), Some(of_srun.clone()));
        // A script may have exported what others need.
        let exported = [&srun[..], &[("WORLD_SIZE", "2")]].concat();
        assert_eq!(from(&exported).unwrap(), Some(of_srun));
    }

    #[test]
    fn what_is_missing_is_named() {
        for (left_out, says) in [
            (0, "the environment has started several processes, but RANK is not set"),
            (1, "WORLD_SIZE is not set"),
            (2, "MASTER_ADDR is not set"),
            (3, "MASTER_PORT is not set"),
        ] {
            let mut variables = TWO.to_vec();
            variables.remove(left_out);
            let error = from(&variables).unwrap_err();
            assert!(error.contains(says), "{error}");
        }
        let with = |name: &'static str, value: &'static str| {
            let others = TWO.into_iter().filter(|(known, _)| *known != name);
            from(&others.chain([(name, value)]).collect::<Vec<_>>()).unwrap_err()
        };
        assert!(with("RANK", "2").contains("rank 2 of 2"));
        assert!(with("RANK", "one").contains("RANK is `one`"));
        assert!(with("MASTER_PORT", "70000").contains("1 to 65535"));
    }

    #[test]
    fn the_first_machine_of_a_list_is_found() {
        for (nodes, first) in [
            ("gpu07", "gpu07"),
            ("gpu07,gpu08", "gpu07"),
            ("gpu[07-09,12]", "gpu07"),
            ("gpu[3,5],cpu1", "gpu3"),
            ("rack[1-2]-node,cpu", "rack1-node"),
            ("rack[1-2]node[03-04],cpu", "rack1node03"),
        ] {
            assert_eq!(first_node(nodes), first, "{nodes}");
        }
    }
}
