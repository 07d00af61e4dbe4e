//! Every configuration that is shipped is valid: its keys, its values, and the options of method and backbone.

use std::fs;
use std::path::Path;

use jepa_tests::real::Room;

const METHODS: [&str; 5] = ["cnn_jepa", "byol", "simclr", "vicreg", "supervised"];

#[test]
fn every_shipped_configuration_is_valid_and_trains_what_its_name_says() {
    let room = Room::new();
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../configs");
    let mut seen = 0;
    for entry in fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        if !path.is_file() {
            continue;
        }
        let name = path.file_stem().unwrap().to_str().unwrap();
        let method = METHODS.iter().find(|method| name.starts_with(*method)).unwrap_or(&"cnn_jepa");
        let plugins = METHODS.iter().flat_map(|method| ["--plugin", method]);
        let arguments = plugins.chain(["--print-config", "--config", path.to_str().unwrap()]);
        // The demo's fixes no method.
        let named = (name == "demo").then_some("method.name=cnn_jepa");
        let printed = room.run(arguments.chain(named)).expect(0).stdout;
        assert!(printed.contains(&format!("[method]\nname = \"{method}\" ")), "{name}:\n{printed}");
        // As many images in a step as the published runs have.
        let published = name.contains("imagenet");
        assert_eq!(printed.contains("\naccumulate = 4 "), published, "{name}:\n{printed}");
        // And the gap in their masks.
        assert_eq!(
            printed.contains("sampling = \"reference\" "),
            published && *method == "cnn_jepa",
            "{name}"
        );
        seen += 1;
    }
    assert_eq!(seen, 26, "the demo, and five data sets for each of five methods");
}

#[test]
fn every_setting_is_listed_with_what_it_means() {
    let room = Room::new();
    let told = room.run(["settings"]).expect(0).stdout;
    let blocks: Vec<&str> = told.split("\n\n").collect();
    assert!(blocks.len() > 50, "{told}");
    for block in blocks {
        let (setting, about) =
            block.trim().split_once('\n').unwrap_or_else(|| panic!("{block} says nothing"));
        assert!(setting.contains(" = ") && about.trim().len() > 15, "{block}");
    }
    let told = room.run(["settings", "data", "optimizer.lr"]).expect(0).stdout;
    assert!(
        told.contains("data.augment = \"cpu\"")
            && told.contains("optimizer.lr = ")
            && !told.contains("lr_scale = ")
    );
    let ended = room.run(["settings", "data.thread"]).expect(2);
    assert!(ended.stderr.contains("did you mean data.threads?"), "{}", ended.stderr);
}
