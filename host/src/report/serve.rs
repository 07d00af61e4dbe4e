//! A page that is made anew whenever a browser asks for it. No more of HTTP than that takes.

use std::io::{self, BufRead as _, BufReader, Read as _, Write as _};
use std::net::{IpAddr, SocketAddr, TcpListener, TcpStream};
use std::time::Duration;

/// A browser that says nothing for so long is gone.
const PATIENCE: Duration = Duration::from_secs(5);
/// More than any browser sends to ask for a page.
const REQUEST_BYTES: u64 = 64 * 1024;

/// Serves until the process ends: at `/` what `page` makes, and at `/stamp` what `stamp` says, which the page asks for
/// to see whether there is news.
///
/// # Errors
/// When the listener fails. One browser's trouble ends nothing.
pub fn serve(
    listener: &TcpListener,
    page: &dyn Fn() -> String,
    stamp: &dyn Fn() -> String,
) -> io::Result<()> {
    let own = listener.local_addr()?;
    loop {
        let (stream, _) = match listener.accept() {
            Ok(accepted) => accepted,
            Err(error) if error.kind() == io::ErrorKind::ConnectionAborted => continue,
            Err(error) => return Err(error),
        };
        if let Err(error) = answer(stream, own, page, stamp) {
            tracing::debug!("a browser: {error}");
        }
    }
}

fn answer(
    mut stream: TcpStream,
    own: SocketAddr,
    page: &dyn Fn() -> String,
    stamp: &dyn Fn() -> String,
) -> io::Result<()> {
    stream.set_read_timeout(Some(PATIENCE))?;
    stream.set_write_timeout(Some(PATIENCE))?;
    let mut lines = BufReader::new(stream.try_clone()?.take(REQUEST_BYTES)).lines();
    let request = lines.next().transpose()?.unwrap_or_default();
    let mut host = None;
    for line in lines {
        let line = line?;
        if line.is_empty() {
            break;
        }
        if let Some((name, value)) = line.split_once(':')
            && name.eq_ignore_ascii_case("host")
        {
            host = Some(value.trim().to_owned());
        }
    }
    let mut words = request.split(' ');
    let (method, path) = (words.next().unwrap_or_default(), words.next().unwrap_or_default());
    let (status, kind, body) = if !is_addressed(host.as_deref(), own) {
        ("403 Forbidden", "text/plain", "this page is for the machine that it runs on\n".to_owned())
    } else {
        match (method, path) {
            ("GET", "/") => ("200 OK", "text/html", page()),
            ("GET", "/stamp") => ("200 OK", "text/plain", stamp()),
            ("GET", _) => ("404 Not Found", "text/plain", "the page is at /\n".to_owned()),
            _ => ("405 Method Not Allowed", "text/plain", "only GET\n".to_owned()),
        }
    };
    write!(
        stream,
        "HTTP/1.1 {status}\r\nContent-Type: {kind}; charset=utf-8\r\nContent-Length: {}\r\nCache-Control: no-store\r\nX-Content-Type-Options: nosniff\r\nConnection: close\r\n\r\n",
        body.len()
    )?;
    stream.write_all(body.as_bytes())
}

/// Whether a browser means this server. On loopback, a page from elsewhere could otherwise ask under a name of its own
/// that leads here, and read the answer.
fn is_addressed(host: Option<&str>, own: SocketAddr) -> bool {
    if !own.ip().is_loopback() {
        return true;
    }
    let Some(host) = host else { return false };
    let name = host.strip_suffix(&format!(":{}", own.port())).unwrap_or(host);
    let address = name.trim_start_matches('[').trim_end_matches(']').parse::<IpAddr>();
    name == "localhost" || address.is_ok_and(|address| address.is_loopback())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_names_of_this_machine_are_answered_on_loopback() {
        let own: SocketAddr = "127.0.0.1:6007".parse().unwrap();
        for host in ["localhost:6007", "127.0.0.1:6007", "localhost"] {
            assert!(is_addressed(Some(host), own), "{host}");
        }
        for host in [Some("evil.example:6007"), Some("10.0.0.1:6007"), None] {
            assert!(!is_addressed(host, own), "{host:?}");
        }
        assert!(is_addressed(Some("gpu7:6007"), "0.0.0.0:6007".parse().unwrap()));
    }
}
