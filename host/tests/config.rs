//! What a person meets when configuring a run: which layer wins, what is refused and in which words.

use std::path::{Path, PathBuf};

use jepa_host::config::{
    Config, ConfigError, Device, Layers, Precision, ResolvedConfig, validate_plugin_options,
};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

fn overrides(arguments: &[&str]) -> Layers {
    Layers {
        overrides: arguments.iter().map(|argument| (*argument).to_owned()).collect(),
        ..Layers::default()
    }
}

fn load(arguments: &[&str]) -> Result<ResolvedConfig, ConfigError> {
    overrides(arguments).load()
}

#[track_caller]
fn refusal(arguments: &[&str]) -> String {
    load(arguments).expect_err("this must be refused").to_string()
}

fn write(directory: &Path, name: &str, text: &str) -> PathBuf {
    let path = directory.join(name);
    std::fs::create_dir_all(path.parent().unwrap()).unwrap();
    std::fs::write(&path, text).unwrap();
    path
}

#[test]
fn nothing_given_is_the_documented_defaults() {
    let resolved = load(&[]).unwrap();
    assert_eq!(resolved.config, Config::default());
    assert_eq!(resolved.sources.layer("optimizer.lr"), "default");
}

#[test]
fn each_layer_wins_over_the_weaker_ones_and_is_remembered() {
    let directory = tempfile::tempdir().unwrap();
    write(directory.path(), "groups/data.toml", "[data]\nsize = 32\nthreads = 1\n[optimizer]\neps = 1e-6\n");
    let file = write(
        directory.path(),
        "x.toml",
        "groups = [\"groups/data.toml\"]\n[data]\nthreads = 2\n\n[optimizer]\nlr = 0.5\nbatch_size = 7\nweight_decay = 0\n",
    );
    let layers = Layers {
        base: None,
        file: Some(file.clone()),
        environment: vec![
            ("JEPA_OPTIMIZER__LR".to_owned(), "0.25".to_owned()),
            ("JEPA_OPTIMIZER__BATCH_SIZE".to_owned(), "8".to_owned()),
            ("JEPA_PLUGIN_PATH".to_owned(), "/elsewhere".to_owned()),
            ("HOME".to_owned(), "/root".to_owned()),
        ],
        overrides: vec!["optimizer.lr=0.125".to_owned()],
    };
    let ResolvedConfig { config, sources } = layers.load().unwrap();
    assert_eq!((config.data.size, config.data.threads), (32, 2));
    assert_eq!((config.optimizer.lr, config.optimizer.batch_size), (0.125, 8));
    assert_eq!(config.optimizer.weight_decay, 0.0);
    assert_eq!(config.optimizer.eps, 1e-6);

    assert_eq!(sources.layer("optimizer.lr"), "command line");
    assert_eq!(sources.layer("optimizer.batch_size"), "environment JEPA_OPTIMIZER__BATCH_SIZE");
    assert_eq!(sources.layer("optimizer.weight_decay"), format!("{}:8", file.display()));
    assert_eq!(sources.layer("optimizer.eps"), format!("{}/groups/data.toml:5", directory.path().display()));
    assert_eq!(sources.layer("optimizer.betas"), "default");
}

#[test]
fn values_are_typed_as_people_type_them() {
    let config = load(&[
        "run.name=2024",
        "data.train=/data/train set.h5",
        "data.on_error=replace",
        "eval.at_start=False",
        "eval.linear.enabled=false",
        "optimizer.betas=[0.9, 0.95]",
        "optimizer.lr=1",
        "optimizer.eps=.5",
        "optimizer.batch_size=64.0",
        "trainer.max_steps=1e3",
        "trainer.clip=None",
        "trainer.precision=bf16",
        "trainer.device=cuda:1",
        "checkpoint.best=none",
        "method.mask=mixed",
        "method.depth=3",
    ])
    .unwrap()
    .config;
    assert_eq!(config.run.name.as_deref(), Some("2024"));
    assert_eq!(config.data.train, Some("/data/train set.h5".into()));
    assert_eq!(config.data.on_error, jepa_host::data::OnError::Replace);
    assert!(!config.eval.at_start && !config.eval.linear.enabled);
    assert_eq!(config.optimizer.betas, [0.9, 0.95]);
    assert_eq!((config.optimizer.lr, config.optimizer.eps, config.optimizer.batch_size), (1.0, 0.5, 64));
    assert_eq!((config.trainer.max_steps, config.trainer.clip), (Some(1000), None));
    assert_eq!((config.trainer.precision, config.trainer.device), (Precision::Bf16, Device::Cuda(Some(1))));
    assert_eq!(config.checkpoint.best, None);
    assert_eq!(Value::Object(config.method.options), json!({"mask": "mixed", "depth": 3}));
}

#[test]
fn a_value_cannot_smuggle_in_another_setting() {
    let config = load(&["run.name=a\nseed = 1"]).unwrap().config;
    assert_eq!((config.seed, config.run.name.as_deref()), (42, Some("a\nseed = 1")));
}

#[test]
fn unknown_keys_are_refused_with_the_nearest_known_one() {
    assert_eq!(
        refusal(&["optimizer.lrr=1"]),
        "optimizer.lrr (command line): unknown key; did you mean optimizer.lr?"
    );
    assert_eq!(
        refusal(&["optimiser.lr=1"]),
        "optimiser.lr (command line): unknown key; did you mean optimizer.lr or eval.linear.lr?"
    );
    assert_eq!(refusal(&["sede=1"]), "sede (command line): unknown key; did you mean seed?");
    assert!(refusal(&["trainer.zebra=1"]).contains("the keys of trainer are epochs, max_steps, "));
    assert_eq!(
        refusal(&["optimizer.lr.x=1"]),
        "optimizer.lr.x (command line): unknown key; did you mean optimizer.lr?"
    );
    assert_eq!(
        refusal(&["method=cnn-jepa"]),
        "method (command line): is a section, not a value; did you mean method.name=cnn-jepa?"
    );
    let layers =
        Layers { environment: vec![("JEPA_TRAINER__EPOCH".to_owned(), "3".to_owned())], ..Layers::default() };
    assert_eq!(
        layers.load().unwrap_err().to_string(),
        "trainer.epoch (environment JEPA_TRAINER__EPOCH): unknown key; did you mean trainer.epochs?"
    );
}

#[test]
fn wrong_types_and_ranges_are_refused_in_one_form() {
    for (argument, expected) in [
        ("optimizer.lr=fast", "\"fast\" is not a number"),
        ("optimizer.lr=-1", "-1 is out of range: must be greater than 0"),
        ("optimizer.lr=nan", "\"nan\" is not a number"),
        ("optimizer.lr=None", "none is not a number"),
        ("optimizer.momentum=1", "1 is out of range: must be less than 1"),
        (
            "optimizer.lr_scale=linea",
            "\"linea\" is not one of \"none\", \"linear\", \"sqrt\"; did you mean linear?",
        ),
        ("optimizer.weight_decay_end=-0.1", "-0.1 is out of range: must be at least 0"),
        ("optimizer.batch_size=0", "0 is out of range: must be at least 1"),
        ("optimizer.batch_size=1.5", "1.5 is not a whole number"),
        ("optimizer.betas=[0.9]", "has 1 values and needs 2"),
        ("trainer.accumulate=0", "0 is out of range: must be at least 1"),
        ("trainer.clip=0", "0 is out of range: must be greater than 0"),
        ("trainer.precision=fp23", "\"fp23\" is not one of \"fp32\", \"bf16\"; did you mean fp32?"),
        ("eval.crop_ratio=1.5", "1.5 is out of range: must be at most 1"),
        ("eval.at_start=1", "1 is not true or false"),
        ("checkpoint.keep=0", "0 is out of range: must be at least 1"),
        ("seed=-1", "-1 is out of range: must be at least 0"),
        ("data=3", "3 is not a table"),
    ] {
        let key = argument.split('=').next().unwrap();
        assert_eq!(refusal(&[argument]), format!("{key} (command line): {expected}"));
    }
    assert!(
        refusal(&["optimizer.betas=[0.9, 1]"])
            .contains("optimizer.betas[1] (command line): 1 is out of range")
    );
    assert!(
        refusal(&["trainer.device=gpu"]).starts_with("trainer.device (command line): \"gpu\" is not one of")
    );
    assert!(refusal(&["run.name=a/b"]).starts_with("run.name (command line): \"a/b\" is no directory name"));
    assert_eq!(
        refusal(&["optimizer.lr"]),
        "`optimizer.lr` is neither a subcommand nor of the form key=value, such as optimizer.lr=0.02"
    );
}

#[test]
fn settings_that_do_not_go_together_are_refused_with_the_key_to_change() {
    for (arguments, expected) in [
        (
            ["optimizer.algorithm=sgd", "optimizer.nesterov=true", "optimizer.momentum=0"].as_slice(),
            "optimizer.nesterov (command line): needs a momentum: set optimizer.momentum above 0",
        ),
        (
            &["optimizer.algorithm=lars", "optimizer.weight_decay=0"],
            "optimizer.weight_decay (command line): LARS scales only what decays, so that with 0 it is SGD: set a \
             small value such as 1e-6, or optimizer.algorithm = \"sgd\"",
        ),
        (
            &["optimizer.algorithm=lars", "optimizer.weight_decay_end=0"],
            "optimizer.weight_decay_end (command line): LARS scales only what decays",
        ),
    ] {
        let refusal = refusal(arguments);
        assert!(refusal.starts_with(expected), "{refusal}");
    }
    assert!(load(&["optimizer.weight_decay=0", "optimizer.weight_decay_end=none"]).is_ok());
}

#[test]
fn settings_without_effect_are_known() {
    let without_effect = |arguments: &[&str]| load(arguments).unwrap().config.optimizer.without_effect();
    let all = [
        "optimizer.betas=[0.9, 0.95]",
        "optimizer.eps=1e-6",
        "optimizer.momentum=0.8",
        "optimizer.nesterov=true",
        "optimizer.trust_coefficient=0.02",
    ];
    let with = |algorithm| without_effect(&[&all[..], &[algorithm]].concat());
    assert_eq!(
        with("optimizer.algorithm=adamw"),
        ["optimizer.momentum", "optimizer.nesterov", "optimizer.trust_coefficient"]
    );
    assert_eq!(with("optimizer.algorithm=lars"), ["optimizer.betas"]);
    assert_eq!(
        with("optimizer.algorithm=sgd"),
        ["optimizer.betas", "optimizer.eps", "optimizer.trust_coefficient"]
    );
    assert!(without_effect(&["optimizer.momentum=0.9"]).is_empty(), "what is at its default changes nothing");
}

#[test]
fn every_mistake_is_listed_even_where_a_stronger_layer_hides_it() {
    let directory = tempfile::tempdir().unwrap();
    let file = write(directory.path(), "x.toml", "[trainer]\nepochs = 'many'\n");
    let error = Layers {
        file: Some(file.clone()),
        overrides: vec!["trainer.epochs=3".to_owned(), "trainer.clip=-1".to_owned()],
        ..Layers::default()
    }
    .load()
    .unwrap_err();
    let expected = format!(
        "2 settings cannot be used:\n  trainer.epochs ({}:2): \"many\" is not a whole number\n  \
         trainer.clip (command line): -1 is out of range: must be greater than 0",
        file.display()
    );
    assert_eq!(error.to_string(), expected);
}

#[test]
fn files_that_cannot_be_used_are_named() {
    let directory = tempfile::tempdir().unwrap();
    let load =
        |path: PathBuf| Layers { file: Some(path), ..Layers::default() }.load().unwrap_err().to_string();

    let missing = directory.path().join("missing.toml");
    assert!(
        load(missing.clone())
            .starts_with(&format!("cannot read the configuration file {}", missing.display()))
    );

    let broken = load(write(directory.path(), "broken.toml", "[data\nsize = 3\n"));
    assert!(broken.contains("broken.toml is not valid TOML") && broken.contains("line 1"), "{broken}");

    let group = load(write(directory.path(), "group.toml", "groups = [\"nowhere.toml\"]\n"));
    assert!(group.contains("cannot read") && group.contains("nowhere.toml"), "{group}");

    let list = load(write(directory.path(), "list.toml", "groups = 'a.toml'\n"));
    assert!(list.contains("list.toml:1): must be a list of files"), "{list}");

    write(directory.path(), "nested.toml", "groups = [\"x.toml\"]\n");
    let nested = load(write(directory.path(), "outer.toml", "groups = [\"nested.toml\"]\n"));
    assert!(nested.contains("a group file cannot name further groups"), "{nested}");

    let infinite = load(write(directory.path(), "inf.toml", "[optimizer]\nlr = inf\n"));
    assert!(infinite.contains("inf cannot be used as a setting"), "{infinite}");
    assert!(refusal(&["groups=[\"a.toml\"]"]).contains("in the --config file only"));
}

/// What a plugin's options look like.
#[derive(Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
struct Options {
    /// Layers of the predictor.
    #[schemars(range(min = 1, max = 12))]
    depth: usize,
    momentum: f64,
    strategy: Strategy,
    mask: Mask,
    head: Option<Mask>,
    tag: String,
    widths: Vec<u32>,
    limit: Option<u32>,
}

#[derive(Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
enum Strategy {
    /// Blocks.
    MultiBlock,
    /// Single cells.
    Random,
}

#[derive(Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
struct Mask {
    ratio: f64,
    cells: usize,
}

impl Default for Options {
    fn default() -> Self {
        Options {
            depth: 3,
            momentum: 0.996,
            strategy: Strategy::MultiBlock,
            mask: Mask { ratio: 0.6, cells: 5 },
            head: None,
            tag: "none yet".to_owned(),
            widths: vec![64, 128],
            limit: None,
        }
    }
}

fn adopt(arguments: &[&str]) -> Result<Options, ConfigError> {
    let mut resolved = load(arguments).unwrap();
    resolved.adopt_plugin_options("method", "cnn-jepa", &schemars::schema_for!(Options).to_value())?;
    Ok(serde_json::from_value(Value::Object(resolved.config.method.options)).unwrap())
}

#[test]
fn plugin_options_are_completed_with_the_plugins_defaults() {
    assert_eq!(adopt(&["method.name=cnn-jepa"]).unwrap(), Options::default());
    let options = adopt(&[
        "method.depth=4",
        "method.momentum=1",
        "method.strategy=random",
        "method.mask.ratio=0.5",
        "method.tag=2024",
        "method.widths=[8]",
        "method.limit=9",
    ])
    .unwrap();
    let expected = Options {
        depth: 4,
        momentum: 1.0,
        strategy: Strategy::Random,
        mask: Mask { ratio: 0.5, cells: 5 },
        tag: "2024".to_owned(),
        widths: vec![8],
        limit: Some(9),
        head: None,
    };
    assert_eq!(options, expected);
}

#[test]
fn plugin_options_that_do_not_fit_are_refused_with_their_layer() {
    for (argument, expected) in [
        ("method.depht=4", "method.depht (command line): unknown key; did you mean method.depth?"),
        (
            "method.ratio=4",
            "method.ratio (command line): unknown key; did you mean method.mask.ratio or method.head.ratio?",
        ),
        (
            "method.mask.ration=1",
            "method.mask.ration (command line): unknown key; did you mean method.mask.ratio?",
        ),
        ("method.depth=13", "method.depth (command line): 13 is out of range: must be at most 12"),
        ("method.mask=1", "method.mask (command line): 1 is not a table"),
        ("method.widths=[1, 'x']", "method.widths[1] (command line): \"x\" is not a whole number"),
        (
            "method.strategy=multiblock",
            "method.strategy (command line): \"multiblock\" is not one of \"multi_block\", \"random\"; \
             did you mean multi_block?",
        ),
    ] {
        assert_eq!(adopt(&[argument]).unwrap_err().to_string(), expected);
    }
    let resolved = load(&["method.depth=4"]).unwrap();
    let none = json!({"type": "object"});
    let given = Value::Object(resolved.config.method.options);
    assert_eq!(
        validate_plugin_options("method", &given, &none, &resolved.sources).unwrap_err().to_string(),
        "method.depth (command line): unknown key; there are no options here"
    );
}

#[test]
fn an_option_without_default_must_be_set() {
    let schema =
        json!({"type": "object", "required": ["classes"], "properties": {"classes": {"type": "integer"}}});
    let mut resolved = load(&[]).unwrap();
    let error = resolved.adopt_plugin_options("method", "supervised", &schema).unwrap_err();
    assert_eq!(error.to_string(), "method.classes (default): must be set");
}

#[test]
fn the_printed_configuration_names_sources_and_reads_back_the_same() {
    let mut resolved = load(&[
        "method.name=cnn-jepa",
        "method.depth=4",
        "backbone.name=resnet50",
        "optimizer.eps=1e-12",
        "checkpoint.best=none",
        "data.val=/data/val.h5",
    ])
    .unwrap();
    let mut schema = schemars::schema_for!(Options).to_value();
    resolved.adopt_plugin_options("method", "cnn-jepa", &schema).unwrap();
    let text = resolved.print();
    let has =
        |start: &str, end: &str| text.lines().any(|line| line.starts_with(start) && line.ends_with(end));
    assert!(has("eps = 1e-12 ", "# from command line"), "{text}");
    assert!(has("clip = \"none\" ", "# from default"), "{text}");
    assert!(has("momentum = 0.996 ", "# from default of cnn-jepa"), "{text}");
    assert!(has("[method.mask]", ""), "{text}");

    let directory = tempfile::tempdir().unwrap();
    let file = write(directory.path(), "config.toml", &text);
    let mut again = Layers { file: Some(file), ..Layers::default() }.load().unwrap();
    schema["properties"]["depth"]["default"] = json!(1);
    again.adopt_plugin_options("method", "cnn-jepa", &schema).unwrap();
    assert_eq!(again.config, resolved.config);
}

#[test]
fn strings_of_any_kind_survive_printing() {
    let note = "it's \"quoted\" # and\nlong \\ \u{7f}";
    let resolved = load(&[&format!("method.note={note}")]).unwrap();
    let directory = tempfile::tempdir().unwrap();
    let file = write(directory.path(), "config.toml", &resolved.print());
    let again = Layers { file: Some(file), ..Layers::default() }.load().unwrap();
    assert_eq!(again.config.method.options["note"], json!(note));
}

#[test]
fn what_a_command_needs_is_asked_for() {
    let error = Config::default().train_file().unwrap_err().to_string();
    assert!(error.starts_with("data.train is not set"), "{error}");
}

#[test]
fn settings_of_another_version_are_told_apart() {
    let mut saved = serde_json::json!(Config::default()).as_object().unwrap().clone();
    let whole = saved.clone();
    assert_eq!(Config::drop_unknown(&mut saved), [] as [String; 0]);
    saved["trainer"]["sync_batch_norm"] = true.into();
    saved["method"]["hidden"] = 5.into();
    saved.insert("gone".to_owned(), 1.into());
    assert_eq!(Config::drop_unknown(&mut saved), ["trainer.sync_batch_norm", "gone"]);
    assert_eq!(saved["method"]["hidden"], 5);
    saved["method"] = whole["method"].clone();
    assert_eq!(saved, whole);
}
