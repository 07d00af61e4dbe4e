//! What a launcher tells a process about its place among the others.

use std::fmt;

use super::DistError;

/// Who has started the processes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Launcher {
    /// `torchrun`, which keeps the store itself and begins anew after a failure.
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
    /// Number of this process, from 0.
    pub rank: u32,
    /// How many there are, at least 1.
    pub size: u32,
    /// Number of this process on its machine, from 0.
    pub local_rank: u32,
    /// Where they meet.
    pub host: String,
    /// Where there.
    pub port: u16,
    /// How often they have been started before.
    pub attempt: u32,
}

impl Launch {
    /// Reads this process's environment; `None` for a process of its own.
    ///
    /// # Errors
    /// [`DistError::Environment`].
    pub fn from_environment() -> Result<Option<Launch>, DistError> {
        Launch::from(|name| std::env::var(name).ok())
    }

    /// Whether this process keeps the store where all meet.
    pub fn keeps_store(&self) -> bool {
        self.rank == 0 && self.launcher != Launcher::Torchrun
    }

    fn from(variable: impl Fn(&str) -> Option<String>) -> Result<Option<Launch>, DistError> {
        let launcher = match () {
            () if variable("TORCHELASTIC_RUN_ID").is_some() => Launcher::Torchrun,
            () if variable("RANK").is_some() || variable("WORLD_SIZE").is_some() => Launcher::Environment,
            // Of a shell that salloc has opened, the number of tasks is known too, but it is none of them.
            () if variable("SLURM_STEP_ID").is_some() && variable("SLURM_STEP_NUM_TASKS").is_some() => {
                Launcher::Srun
            }
            () => return Ok(None),
        };
        let refuse = |problem: String| DistError::Environment { launcher, problem };
        let number = |name: &str| -> Result<Option<u32>, DistError> {
            let Some(text) = variable(name) else { return Ok(None) };
            text.trim()
                .parse()
                .map(Some)
                .map_err(|_| refuse(format!("{name} is `{text}`, which is no number")))
        };
        let required = |name: &str| number(name)?.ok_or_else(|| refuse(format!("{name} is not set")));
        let (rank, size, local_rank) = match launcher {
            Launcher::Srun => {
                (required("SLURM_PROCID")?, required("SLURM_STEP_NUM_TASKS")?, required("SLURM_LOCALID")?)
            }
            _ => (required("RANK")?, required("WORLD_SIZE")?, number("LOCAL_RANK")?.unwrap_or(0)),
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
            // The same for all of a job, and others for other jobs on the machine.
            (None, Launcher::Srun) => Some(20_000 + (required("SLURM_JOB_ID")? % 20_000) as u16),
            (None, _) => None,
        };
        let port = port.ok_or_else(|| refuse("MASTER_PORT is not set to a port, 1 to 65535".into()))?;
        let attempt = number("TORCHELASTIC_RESTART_COUNT")?.or(number("SLURM_RESTART_COUNT")?).unwrap_or(0);
        Ok(Some(Launch { launcher, rank, size, local_rank, host, port, attempt }))
    }
}

/// The first of SLURM's list of machines: `gpu[07-09,12],cpu1` begins with `gpu07`.
fn first_node(nodes: &str) -> String {
    let end = |text: &str, ends: &[char]| text.find(ends).unwrap_or(text.len());
    let name = &nodes[..end(nodes, &['[', ','])];
    let rest = &nodes[name.len()..];
    let Some(range) = rest.strip_prefix('[') else { return name.to_owned() };
    let number = &range[..end(range, &['-', ',', ']'])];
    let behind = rest.find(']').map_or("", |close| &rest[close + 1..]);
    format!("{name}{number}{}", &behind[..end(behind, &[',', '['])])
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
            rank: 1,
            size: 2,
            local_rank: 0,
            host: "gpu07".into(),
            port: 29500,
            attempt: 0,
        };
        assert_eq!(from(&TWO).unwrap(), Some(launch.clone()));
        assert!(!launch.keeps_store() && Launch { rank: 0, ..launch.clone() }.keeps_store());

        let elastic =
            [("TORCHELASTIC_RUN_ID", "none"), ("TORCHELASTIC_RESTART_COUNT", "2"), ("LOCAL_RANK", "1")];
        let of_torchrun =
            Launch { launcher: Launcher::Torchrun, local_rank: 1, attempt: 2, ..launch.clone() };
        assert_eq!(from(&[&TWO[..], &elastic].concat()).unwrap(), Some(of_torchrun.clone()));
        assert!(!Launch { rank: 0, ..of_torchrun }.keeps_store());

        let srun = [
            ("SLURM_STEP_ID", "0"),
            ("SLURM_STEP_NUM_TASKS", "2"),
            ("SLURM_PROCID", "1"),
            ("SLURM_LOCALID", "1"),
            ("SLURM_JOB_ID", "41234"),
            ("SLURM_STEP_NODELIST", "gpu[07-09,12]"),
            ("SLURM_RESTART_COUNT", "1"),
        ];
        let of_srun = Launch { launcher: Launcher::Srun, local_rank: 1, port: 21_234, attempt: 1, ..launch };
        assert_eq!(from(&srun).unwrap(), Some(of_srun));
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
        ] {
            assert_eq!(first_node(nodes), first, "{nodes}");
        }
    }
}
