//! `jepa-host report` and `jepa-host ls` on real runs, whole, damaged and malicious.

use std::collections::BTreeMap;
use std::fs;
use std::io::{Read as _, Write as _};
use std::net::TcpStream;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::OnceLock;

use jepa_tests::browser::Browser;
use jepa_tests::real::{Room, TINY_BACKBONE, checkpoints, demo_images, held_out_images, setting};
use serde_json::{Value, json};

const RUN: &str = "runs/cnn_jepa/version_0";

/// Six steps of CNN-JEPA, judged before and after.
fn arguments(settings: &[&str]) -> Vec<String> {
    let fixed = [
        "data.size=16",
        "method.mask.min_keep=1",
        "optimizer.batch_size=64",
        "optimizer.warmup_epochs=0",
        "trainer.max_steps=6",
        "trainer.threads=1",
        "trainer.device=cpu",
        "trainer.log_every_steps=1",
        "eval.train_limit=500",
        "eval.linear.epochs=2",
    ];
    let images = [setting("data.train", &demo_images()), setting("data.val", &held_out_images())];
    let arguments = ["--plugin", "cnn_jepa"].into_iter().chain(TINY_BACKBONE).chain(fixed);
    let arguments = arguments.map(str::to_owned).chain(images);
    arguments.chain(settings.iter().map(|setting| (*setting).to_owned())).collect()
}

/// A room with a copy of one run, which is trained once for all tests.
fn trained() -> Room {
    static FIRST: OnceLock<Room> = OnceLock::new();
    let first = FIRST.get_or_init(|| {
        let room = Room::new();
        room.run(arguments(&[])).expect(0);
        room
    });
    let room = Room::new();
    copy(&first.file("runs"), &room.file("runs"));
    room
}

fn copy(from: &Path, to: &Path) {
    let copied = Command::new("cp").arg("-r").args([from, to]).status().expect("cp is there");
    assert!(copied.success());
}

fn read(path: PathBuf) -> String {
    fs::read_to_string(path).unwrap()
}

/// Replaces text in a file of a run.
fn change(path: PathBuf, from: &str, to: &str) {
    let text = read(path.clone());
    assert!(text.contains(from), "{from} in {text}");
    fs::write(path, text.replace(from, to)).unwrap();
}

/// What the page's script draws.
fn data(page: &str) -> Value {
    let (_, rest) = page.split_once("<script type=\"application/json\" id=\"data\">").unwrap();
    serde_json::from_str(rest.split_once("</script>").unwrap().0).unwrap()
}

fn says(page: &str, parts: &[&str]) {
    for part in parts {
        assert!(page.contains(part), "the page does not say {part}");
    }
}

#[test]
fn a_page_tells_of_a_run_and_stands_alone() {
    let room = trained();
    let ended = room.run(["report", "runs/cnn_jepa", "--features", "200"]).expect(0);
    assert_eq!(ended.stdout, format!("{RUN}/report.html\n"));
    let page = read(room.file(RUN).join("report.html"));

    let provenance: Value = serde_json::from_str(&read(room.file(RUN).join("provenance.json"))).unwrap();
    let hash = provenance[0]["plugins"][0]["sha256"].as_str().unwrap();
    says(
        &page,
        &["kNN top-1", "RankMe", "<caption>", "scope=\"col\"", "optimizer.batch_size", hash, "Verdict"],
    );
    for outside in [" src=\"http", " href=\"http", "url(http", "@import"] {
        assert!(!page.contains(outside), "{outside}");
    }

    let data = data(&page);
    let run = &data["charts"]["runs"][0];
    assert_eq!(run["lines"]["train/loss"]["value"].as_array().unwrap().len(), 6);
    let map = &data["maps"][0];
    assert_eq!(map["points"].as_array().unwrap().len(), 200);
    assert_eq!(map["neighbours"][0][1].as_array().unwrap().len(), 6);
    assert!(data["sheets"][0].as_str().unwrap().starts_with("data:image/jpeg;base64,"));

    let again = room.run(["report", RUN, "--features", "200", "--out", "again.html"]).expect(0);
    assert_eq!(again.stdout, "again.html\n");
    assert_eq!(self::data(&read(room.file("again.html"))), data, "equal runs give equal pages");
}

#[test]
fn a_page_tells_where_the_time_of_a_step_goes() {
    let room = trained();
    let metrics = room.file(RUN).join("metrics.jsonl");
    let rewrite = |change: &dyn Fn(&mut serde_json::Map<String, Value>)| {
        let mut records: Vec<Value> =
            read(metrics.clone()).lines().map(|line| serde_json::from_str(line).unwrap()).collect();
        records.iter_mut().for_each(|record| change(record.as_object_mut().unwrap()));
        let lines: String = records.iter().map(|record| format!("{record}\n")).collect();
        fs::write(&metrics, lines).unwrap();
        room.run(["report", RUN, "--features", "0"]).expect(0);
        read(room.file(RUN).join("report.html"))
    };
    let page = rewrite(&|record| {
        record.iter_mut().filter(|(name, _)| name.starts_with("time/")).for_each(|(_, s)| *s = json!(0.0));
        if record.contains_key("time/wait") {
            record
                .extend([("time/wait", 0.01), ("time/forward", 0.03)].map(|(k, s)| (k.to_owned(), json!(s))));
            record["train/data_wait"] = json!(0.25);
        }
    });
    let share = "25.00\u{a0}%";
    says(&page, &["style=\"width:100.00%\""]);
    says(&page, &["Time of a step", &format!("of a step&#39;s 40.0 ms, wait for data {share}")]);
    says(
        &page,
        &[
            "flex-grow:0.25000",
            &format!("</i>wait for data</th><td class=\"n\">10.0</td><td class=\"n\">{share}"),
        ],
    );
    let warning = format!("<strong>Training waits for data.</strong> {share} of the time.");
    assert_eq!(page.matches(&warning).count(), 2, "in the verdict, and by the bar");

    let page = rewrite(&|record| record.retain(|name, _| !name.starts_with("time/")));
    assert!(!page.contains("Time of a step"), "a run that has not measured it");
}

#[test]
fn without_its_data_a_run_has_a_page_that_says_so() {
    let room = trained();
    let held_out = held_out_images();
    let checkpoint = checkpoints(&room.file(RUN).join("checkpoints")).pop().unwrap();
    change(checkpoint.join("state.json"), held_out.to_str().unwrap(), "moved.h5");
    room.run(["report", RUN]).expect(0);
    let page = read(room.file(RUN).join("report.html"));
    says(&page, &["There is no map of features: data.val", "moved.h5"]);
    assert_eq!(data(&page)["maps"][0], Value::Null);
}

#[test]
fn several_runs_are_compared_by_what_differs() {
    let room = trained();
    copy(&room.file(RUN), &room.file("runs/cnn_jepa/version_1"));
    change(room.file("runs/cnn_jepa/version_1/config.toml"), "seed = 42", "seed = 43");
    let second = "runs/cnn_jepa/version_1";
    let ended = room.run(["report", RUN, second, "--features", "0", "--format", "json"]).expect(0);
    let told: Value = serde_json::from_str(&ended.stdout).unwrap();
    assert_eq!(told["runs"], json!(["cnn_jepa/version_0", "cnn_jepa/version_1"]));
    let page = read(room.file("report.html"));
    says(
        &page,
        &[
            "<caption>Settings that differ between the runs</caption>",
            "<th scope=\"row\">seed</th><td><code>42</code></td><td><code>43</code></td>",
            "--features 0",
        ],
    );
    assert_eq!(data(&page)["charts"]["runs"].as_array().unwrap().len(), 2);
}

#[test]
fn text_in_files_is_never_markup() {
    let room = trained();
    let evil = "</script><script>alert(1)</script><img src=x onerror=alert(2)>";
    let file = |name: &str| room.file(RUN).join(name);
    change(file("config.toml"), "name = \"resnet18\"", &format!("name = '{evil}'"));
    change(file("provenance.json"), "\"cnn-jepa\"", &json!(evil).to_string());
    change(file("metrics.jsonl"), "train/grad_norm", &format!("train/{evil}"));
    let mut lines = read(file("metrics.jsonl"));
    lines.push_str("<b onclick=alert(3)>\n");
    let images = json!({ "step": 6, "epoch": 0.1, "images": { evil: "../../../secret.png", "no": evil, "view": "media/view.png" } });
    lines.push_str(&format!("{images}\n"));
    fs::write(file("metrics.jsonl"), lines).unwrap();
    fs::copy(file("media/image_00000000.png"), room.file("secret.png")).unwrap();
    fs::copy(file("media/image_00000000.png"), file("media/view.png")).unwrap();

    room.run(["report", RUN]).expect(0);
    let page = read(file("report.html"));
    for markup in ["<script>alert", "<img src=x", "<b onclick"] {
        assert!(!page.contains(markup), "{markup}");
    }
    says(&page, &["&lt;img src=x onerror=alert(2)&gt;", "lies outside the run"]);
    says(&page, &["alt=\"view at step 6: 8 images in a row\""]);
    assert_eq!(page.matches("</script>").count(), 2, "the data and the script, and no more");
    assert!(data(&page)["charts"]["runs"][0]["lines"].get(format!("train/{evil}")).is_some());
}

#[test]
fn a_page_has_the_first_and_the_latest_views_inside() {
    let room = trained();
    let file = |name: &str| room.file(RUN).join(name);
    let record =
        |step: u64, images: Value| format!("{}\n", json!({ "step": step, "epoch": 0.1, "images": images }));
    let whole = fs::read(file("media/target_00000000.png")).unwrap();
    fs::write(file("media/cut.png"), &whole[..whole.len() / 2]).unwrap();
    fs::write(file("media/huge.png"), vec![0; 2_000_001]).unwrap();
    let between = record(5, json!({ "examples/between": "media/target_00000000.png" }));
    let names = ["target_00000000", "cut", "huge", "gone"];
    let last = names.map(|name| (format!("examples/{name}"), format!("media/{name}.png")));
    let last = record(6, json!(BTreeMap::from(last)));
    fs::write(file("metrics.jsonl"), read(file("metrics.jsonl")) + &between + &last).unwrap();

    room.run(["report", RUN, "--features", "0"]).expect(0);
    let page = read(file("report.html"));
    let shown = page.matches("src=\"data:image/png;base64,").count();
    assert_eq!(shown, 4, "three at the first step, and the target at the latest");
    says(
        &page,
        &[
            "show different images",
            "First, step 0",
            "Latest, step 6",
            "context, step 0",
            "target at step 0: 8 images in a row",
        ],
    );
    says(
        &page,
        &["media/cut.png is no whole PNG image: ", "media/huge.png is no file of at most 2,000,000 bytes"],
    );
    says(&page, &["gone, step 6, is not shown: media/gone.png: No such file"]);
    assert!(!page.contains("between, step 5"));
}

#[test]
fn damage_is_named_and_the_rest_is_shown() {
    let room = trained();
    let metrics = room.file(RUN).join("metrics.jsonl");
    let mut lines: Vec<String> = read(metrics.clone()).lines().map(str::to_owned).collect();
    lines[2] = "{\"step\":1,\"epoch\":0.1,\"train/loss\":NaN}".to_owned();
    fs::write(&metrics, format!("{}\n{{\"step\":", lines.join("\n"))).unwrap();
    let ended = room.run(["report", RUN, "--features", "0"]).expect(0);
    let cut = format!("metrics.jsonl, line {}, is cut off", lines.len() + 1);
    for sentence in ["metrics.jsonl, line 3, is no record and left out", &cut] {
        assert!(ended.stderr.contains(sentence), "{sentence} in {}", ended.stderr);
        says(&read(room.file(RUN).join("report.html")), &[sentence]);
    }
    let page = read(room.file(RUN).join("report.html"));
    assert_eq!(data(&page)["charts"]["runs"][0]["lines"]["train/loss"]["of"], 5);

    fs::write(&metrics, "").unwrap();
    room.run(["report", RUN, "--features", "0"]).expect(0);
    says(
        &read(room.file(RUN).join("report.html")),
        &["There are no records to draw", "metrics.jsonl has no records"],
    );

    room.run(["report", "runs/nothing"]).expect(2).error_says(&["runs/nothing is no run", "does not exist"]);
    room.run(["report", "runs/cnn_jepa", "runs"]).expect(2).error_says(&["runs is no run", "version_"]);
    room.run(["report", RUN, "--serve", "nowhere"]).expect(2).error_says(&["nowhere is no address"]);
}

#[test]
fn a_listing_has_a_line_for_every_run() {
    let room = trained();
    let ended = room.run(arguments(&["run.name=wild", "optimizer.lr=1e30", "eval.every_epochs=0"]));
    ended.expect(5);
    fs::create_dir_all(room.file("runs/broken/version_0")).unwrap();
    fs::write(room.file("runs/broken/version_0/metrics.jsonl"), "no JSON\n").unwrap();
    copy(&room.file(RUN), &room.file("runs/cnn_jepa/version_1"));
    change(room.file("runs/cnn_jepa/version_1/provenance.json"), "\"exit_code\": 0", "\"exit_code\": 143");

    let text = room.run(["ls"]).expect(0).stdout;
    let line = |start: &str| {
        let line = text.lines().find(|line| line.starts_with(start));
        line.unwrap_or_else(|| panic!("no {start} in\n{text}"))
    };
    assert!(line("cnn_jepa/version_0").contains("done") && line("cnn_jepa/version_0").contains("6/6"));
    assert!(line("cnn_jepa/version_1").contains("interrupted, resumable"));
    assert!(line("wild/version_0").contains("diverged"));
    assert!(line("broken/version_0").contains("damaged"));
    assert!(
        text.contains("metrics.jsonl, line 1, is no record") && text.contains("diverged at step"),
        "{text}"
    );

    let listed = room.run(["ls", "--format", "json", "--sort", "knn"]).expect(0).stdout;
    let listed: Vec<Value> = serde_json::from_str(&listed).unwrap();
    assert_eq!(listed.len(), 4);
    assert!(listed[0]["best"]["eval/knn_top1"]["value"].is_f64());
    assert_eq!(listed[0]["status"], "done");
    assert_eq!(listed[0]["total_steps"], 6);

    let ended = room.run(["ls", "--sort", "eval/knn_top2"]).expect(2);
    ended.error_says(&["no run has a metric eval/knn_top2", "did you mean eval/knn_top"]);
    room.run(["ls", "nowhere"]).expect(2).error_says(&["there is no directory nowhere"]);
    fs::create_dir(room.file("empty")).unwrap();
    let text = room.run(["ls", "empty"]).expect(0).stdout;
    assert!(text.starts_with("There are no runs in empty."), "{text}");
}

#[test]
fn a_served_page_is_always_new_and_for_this_machine() {
    let room = trained();
    let mut server = room.start(["report", RUN, "--serve", "127.0.0.1:0"]);
    let announced = room.file("out.0");
    server.until("an address", || fs::read_to_string(&announced).is_ok_and(|text| text.contains('/')));
    let text = server.stdout();
    let address = text.strip_prefix("http://").unwrap().split('/').next().unwrap().to_owned();
    let get = |path: &str, host: &str| {
        let mut stream = TcpStream::connect(&address).unwrap();
        write!(stream, "GET {path} HTTP/1.1\r\nHost: {host}\r\n\r\n").unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).unwrap();
        answer
    };
    let (page, stamp) = (get("/", &address), get("/stamp", &address));
    assert!(page.starts_with("HTTP/1.1 200 OK") && page.contains("data-live"), "{page}");
    assert!(get("/", "elsewhere.example").starts_with("HTTP/1.1 403"));
    assert!(get("/etc/passwd", &address).starts_with("HTTP/1.1 404"));

    let metrics = room.file(RUN).join("metrics.jsonl");
    let more = format!("{}{}\n", read(metrics.clone()), json!({ "step": 7, "epoch": 0.2, "train/new": 1.0 }));
    fs::write(metrics, more).unwrap();
    assert_ne!(get("/stamp", &address), stamp);
    assert!(get("/", &address).contains("train/new"));
}

#[test]
fn a_browser_draws_curves_that_tell_their_values() {
    let Some(mut browser) = Browser::start() else {
        eprintln!("skipped: no chromium, chromium-browser or google-chrome in PATH draws the page");
        return;
    };
    let room = trained();
    copy(&room.file(RUN), &room.file("runs/cnn_jepa/version_1"));
    room.run(["report", RUN, "runs/cnn_jepa/version_1", "--features", "100"]).expect(0);
    for width in [360, 1440] {
        browser.open(&room.file("report.html"), width);
        let count = |browser: &mut Browser, what: &str| {
            browser.evaluate(&format!("document.querySelectorAll({what:?}).length")).as_u64().unwrap()
        };
        let wide = browser.evaluate("document.documentElement.scrollWidth").as_u64().unwrap();
        assert!(wide <= u64::from(width), "{wide} pixels do not fit");
        assert!(count(&mut browser, ".chart svg[role=img][aria-label]") > 10);
        // Two runs, each with a training loss and a held-out loss.
        assert_eq!(count(&mut browser, ".chart:first-child path.line") % 2, 0);
        let lines = count(&mut browser, ".chart path.line.r0");
        assert!(lines > 10 && lines == count(&mut browser, ".chart path.line.r1"));
        assert_eq!(count(&mut browser, ".map circle"), 200);
        let views = browser.evaluate("[...document.querySelectorAll('.views img')].map(view => view.naturalWidth > 0 && view.alt.includes('8 images'))");
        assert_eq!(views, json!(vec![true; 6]), "three views of each run");
        let bars = browser.evaluate("[...document.querySelectorAll('.parts')].map(bar => [bar.clientWidth, [...bar.children].reduce((all, part) => all + part.getBoundingClientRect().width, 0)])");
        for bar in bars.as_array().filter(|bars| bars.len() == 2).expect("a bar for each run") {
            let [wide, parts] = [&bar[0], &bar[1]].map(|side| side.as_f64().unwrap());
            assert!(wide > 300.0 && (parts - wide).abs() < 1.0, "{parts} of {wide} pixels are filled");
        }

        browser.point_at(".chart svg");
        browser.wait_for("[...document.querySelectorAll('.chart .tip')].some(tip => !tip.hidden)");
        let tip = browser.evaluate("document.querySelector('.chart .tip').textContent");
        assert!(tip.as_str().is_some_and(|tip| tip.contains("step ") && tip.contains("training")), "{tip}");

        browser.evaluate("document.querySelector('button.run').click()");
        assert_eq!(count(&mut browser, ".chart path.line.r0"), 0);
        assert_eq!(count(&mut browser, ".chart path.line.r1"), lines);
        browser.evaluate("document.querySelector('button.run').click()");
        assert_eq!(count(&mut browser, ".chart path.line.r0"), lines);

        browser.evaluate("document.querySelector('.chart svg').focus()");
        browser.press("Home");
        let tip = browser.evaluate("document.querySelector('.chart .tip').textContent");
        assert!(tip.as_str().is_some_and(|tip| tip.contains("step 1 ")), "the first value: {tip}");

        let ticks = "[...document.querySelectorAll('.chart svg')[0].querySelectorAll('text')].map(t => t.textContent)";
        let linear = browser.evaluate(ticks);
        browser.evaluate("document.querySelector('.chart figcaption button').click()");
        assert_ne!(browser.evaluate(ticks), linear, "another scale");

        browser.evaluate("(() => { const s = document.querySelector('input[type=search]'); s.value = 'knn'; s.dispatchEvent(new Event('input')); })()");
        let shown = "[...document.querySelectorAll('.chart')].filter(c => !c.hidden).every(c => c.textContent.includes('kNN'))";
        assert_eq!(browser.evaluate(shown), json!(true));
    }
    assert_eq!(browser.complaints, Vec::<Value>::new());
}
