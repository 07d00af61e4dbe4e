//! Drives Chromium without a window over its debugging pipe: messages in JSON, each ended by a zero byte.

use std::env;
use std::fs::{File, OpenOptions};
use std::io::{BufRead as _, BufReader, Write as _};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::mpsc::{Receiver, channel};
use std::thread;
use std::time::Duration;

use serde_json::{Value, json};
use tempfile::TempDir;

const PATIENCE: Duration = Duration::from_secs(60);
const NAMES: [&str; 3] = ["chromium", "chromium-browser", "google-chrome"];
const FLAGS: &str = "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run \
                     --disable-background-networking --disable-component-update --disable-sync \
                     --remote-debugging-pipe";

/// A browser with one page. Killed when dropped.
pub struct Browser {
    child: Child,
    to: File,
    from: Receiver<Value>,
    session: Option<String>,
    messages: u64,
    /// What the console, the log and exceptions of the page have said.
    pub complaints: Vec<Value>,
    _folder: TempDir,
}

impl Browser {
    /// Starts one; none where Chromium is not installed.
    ///
    /// # Panics
    /// When it does not start.
    pub fn start() -> Option<Self> {
        let path = env::var_os("PATH")?;
        let program = env::split_paths(&path).flat_map(|folder| NAMES.map(|name| folder.join(name)));
        let program: PathBuf = program.into_iter().find(|file| file.is_file())?;
        let folder = tempfile::tempdir().expect("a temporary folder");
        let pipes = ["in", "out"].map(|name| folder.path().join(name));
        let made = Command::new("mkfifo").args(&pipes).status().expect("mkfifo is there");
        assert!(made.success());
        let profile = folder.path().join("profile");
        let script = format!("exec \"$0\" {FLAGS} --user-data-dir=\"$1\" about:blank 3<\"$2\" 4>\"$3\"");
        let child = Command::new("sh")
            .args(["-c", &script])
            .arg(program)
            .arg(profile)
            .args(&pipes)
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .expect("sh is there");
        // Opening a pipe waits for its other end: in the order in which the shell opens them.
        let to = OpenOptions::new().write(true).open(&pipes[0]).expect("the browser's input");
        let out = BufReader::new(File::open(&pipes[1]).expect("the browser's output"));
        let (send, from) = channel();
        thread::spawn(move || {
            for message in out.split(0) {
                let Ok(message) = message else { return };
                let message = serde_json::from_slice(&message).expect("the browser speaks JSON");
                if send.send(message).is_err() {
                    return;
                }
            }
        });
        let mut browser =
            Browser { child, to, from, session: None, messages: 0, complaints: Vec::new(), _folder: folder };
        let targets = browser.call("Target.getTargets", json!({}));
        let targets = targets["targetInfos"].as_array().expect("a list of targets").clone();
        let page = targets.iter().find(|target| target["type"] == "page").expect("a page");
        let attached =
            browser.call("Target.attachToTarget", json!({ "targetId": page["targetId"], "flatten": true }));
        browser.session = attached["sessionId"].as_str().map(str::to_owned);
        for domain in ["Page", "Runtime", "Log"] {
            browser.call(&format!("{domain}.enable"), json!({}));
        }
        Some(browser)
    }

    /// Opens the file `page` in a window of this width.
    pub fn open(&mut self, page: &Path, width: u32) {
        let size = json!({ "width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 500 });
        self.call("Emulation.setDeviceMetricsOverride", size);
        self.call("Page.navigate", json!({ "url": format!("file://{}", page.display()) }));
        self.wait_for("document.readyState === 'complete' && location.protocol === 'file:'");
    }

    /// The value of `script` in the page.
    ///
    /// # Panics
    /// When it throws.
    pub fn evaluate(&mut self, script: &str) -> Value {
        let answer = self.call("Runtime.evaluate", json!({ "expression": script, "returnByValue": true }));
        assert!(answer.get("exceptionDetails").is_none(), "{script}: {answer}");
        answer["result"]["value"].clone()
    }

    /// Waits until `script` is true in the page.
    ///
    /// # Panics
    /// When it takes too long.
    pub fn wait_for(&mut self, script: &str) {
        for _ in 0..600 {
            if self.evaluate(script) == json!(true) {
                return;
            }
            thread::sleep(Duration::from_millis(50));
        }
        panic!("never true: {script}");
    }

    /// Moves the mouse to the middle of what `selector` finds, scrolled into view.
    pub fn point_at(&mut self, selector: &str) {
        let place = self.evaluate(&format!(
            "(() => {{ const e = document.querySelector({selector:?}); e.scrollIntoView({{ block: 'center', \
             behavior: 'instant' }}); const b = e.getBoundingClientRect(); return [b.x + b.width / 2, b.y + b.height \
             / 2]; }})()"
        ));
        let moved = json!({ "type": "mouseMoved", "x": place[0], "y": place[1] });
        self.call("Input.dispatchMouseEvent", moved);
    }

    /// Presses `key`, such as `ArrowRight`, where the focus is.
    pub fn press(&mut self, key: &str) {
        for kind in ["keyDown", "keyUp"] {
            self.call("Input.dispatchKeyEvent", json!({ "type": kind, "key": key, "code": key }));
        }
    }

    fn call(&mut self, method: &str, parameters: Value) -> Value {
        self.messages += 1;
        let id = self.messages;
        let mut message = json!({ "id": id, "method": method, "params": parameters });
        if let Some(session) = &self.session {
            message["sessionId"] = json!(session);
        }
        self.to.write_all(format!("{message}\0").as_bytes()).expect("the browser listens");
        loop {
            let answer = self.from.recv_timeout(PATIENCE).expect("the browser answers");
            if answer["id"] == json!(id) {
                assert!(answer.get("error").is_none(), "{method}: {answer}");
                return answer["result"].clone();
            }
            let told = ["Runtime.exceptionThrown", "Runtime.consoleAPICalled", "Log.entryAdded"];
            if answer["method"].as_str().is_some_and(|method| told.contains(&method)) {
                self.complaints.push(answer);
            }
        }
    }
}

impl Drop for Browser {
    fn drop(&mut self) {
        // It may have crashed, which the test then says.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
