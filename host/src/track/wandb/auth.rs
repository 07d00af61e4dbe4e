//! The API key: from `WANDB_API_KEY`, or from the netrc file that `wandb login` writes. It goes to wandb-core and
//! nowhere else.

use std::env;
use std::fs;
use std::path::PathBuf;

/// An API key. It has no `Debug` that shows it.
pub struct ApiKey(String);

impl ApiKey {
    /// The key for the server `base_url`, when there is one.
    pub fn find(base_url: &str) -> Option<ApiKey> {
        let given = env::var("WANDB_API_KEY").ok().filter(|key| !key.is_empty());
        given.or_else(|| in_netrc(&fs::read_to_string(netrc_file()?).ok()?, host_of(base_url))).map(ApiKey)
    }

    /// The key itself.
    pub fn reveal(&self) -> &str {
        &self.0
    }
}

fn netrc_file() -> Option<PathBuf> {
    match env::var_os("NETRC") {
        Some(file) => Some(file.into()),
        None => Some(env::home_dir()?.join(".netrc")),
    }
}

fn host_of(url: &str) -> &str {
    let rest = url.split_once("://").map_or(url, |(_, rest)| rest);
    rest.split(['/', '?']).next().unwrap_or(rest)
}

/// The password of `machine host`.
fn in_netrc(text: &str, host: &str) -> Option<String> {
    let lines = text.lines().filter(|line| !line.trim_start().starts_with('#'));
    let mut words = lines.flat_map(str::split_whitespace);
    let mut here = false;
    while let Some(word) = words.next() {
        match word {
            "machine" => here = words.next() == Some(host),
            "password" if here => return words.next().map(str::to_owned),
            "default" => here = false,
            _ => {}
        }
    }
    None
}

#[cfg(test)]
mod tests {
    use super::{host_of, in_netrc};

    #[test]
    fn the_key_is_that_of_the_server() {
        let netrc = "machine example.org login a password wrong\nmachine api.wandb.ai\n  login user\n  password right\n";
        assert_eq!(in_netrc(netrc, host_of("https://api.wandb.ai")).as_deref(), Some("right"));
        assert_eq!(in_netrc(netrc, host_of("http://localhost:8080/graphql")), None);
    }
}
