//! The jepa-host executable.

use std::process::ExitCode;

fn main() -> ExitCode {
    jepa_host::cli::main()
}
