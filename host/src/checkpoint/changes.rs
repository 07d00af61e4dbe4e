//! Whether a run may go on from a checkpoint: what has changed since, and what of it matters.

use std::collections::{BTreeMap, BTreeSet};

use serde_json::Value;

use super::state::State;
use crate::plugin::PluginRecord;

/// Settings that may differ, because the weights do not depend on them, or as `data.on_error`, because nobody gets past a corrupt
/// image otherwise. One that ends in a point is a whole section.
const FREE: [&str; 13] = [
    "run.",
    "track.",
    "checkpoint.",
    "eval.",
    "ranks.",
    "data.on_error",
    "data.threads",
    "data.train",
    "data.val",
    "data.upscale",
    "trainer.cuda_graphs",
    "trainer.log_every_steps",
    "trainer.max_steps",
];

/// Settings that may differ between the ranks of a run: nothing that they do together depends on them.
const FREE_OF_RANKS: [&str; 8] = [
    "run.",
    "track.",
    "data.threads",
    "data.train",
    "data.val",
    "data.upscale",
    "trainer.threads",
    "trainer.log_every_steps",
];

impl State {
    /// What is not as it was when this state was saved, in a few words each: a run that goes on nevertheless may
    /// differ from one that was never stopped.
    pub fn changes(&self, now: &State) -> Vec<String> {
        let mut changes =
            self.compared(now, &FREE, |what, saved, now| format!("{what} was {saved} and is {now}"));
        if self.threads != now.threads {
            changes
                .push(format!("the number of compute threads was {} and is {}", self.threads, now.threads));
        }
        changes
    }

    /// What is not the same for another rank of a run.
    pub fn differences(&self, other: &State) -> Vec<String> {
        self.compared(other, &FREE_OF_RANKS, |what, own, other| format!("{what} is {other} instead of {own}"))
    }

    fn compared(
        &self,
        now: &State,
        free: &[&str],
        sentence: impl Fn(&str, &str, &str) -> String,
    ) -> Vec<String> {
        let mut changes = Vec::new();
        let mut compare = |what: &str, saved: &str, now: &str| {
            if saved != now {
                changes.push(sentence(what, saved, now));
            }
        };
        compare("the seed", &self.seed.to_string(), &now.seed.to_string());
        compare("the method", &self.method, &now.method);
        compare("the backbone", &self.backbone, &now.backbone);
        compare("the training data's fingerprint", &self.data_fingerprint, &now.data_fingerprint);
        compare("jepa-host", &self.host, &now.host);
        compare("libtorch", &self.libtorch, &now.libtorch);
        compare("the device", &self.device, &now.device);
        compare("the number of ranks", &self.ranks.to_string(), &now.ranks.to_string());
        let short = |plugin: Option<&PluginRecord>| match plugin {
            Some(plugin) => {
                format!("{} ({})", plugin.version, plugin.sha256.get(..12).unwrap_or(&plugin.sha256))
            }
            None => "not loaded".to_owned(),
        };
        // Probes are as free as the rest of the evaluation.
        let matters = |plugin: &&PluginRecord| !plugin.only_probes;
        let (before, now_there) = (self.plugins.iter().filter(matters), now.plugins.iter().filter(matters));
        let names: BTreeSet<&str> =
            before.clone().chain(now_there.clone()).map(|plugin| plugin.name.as_str()).collect();
        for name in names {
            let saved = before.clone().find(|plugin| plugin.name == name);
            let present = now_there.clone().find(|plugin| plugin.name == name);
            compare(&format!("plugin {name}"), &short(saved), &short(present));
        }
        for (key, was, is) in changed_settings(&self.config, &now.config, free) {
            changes.push(sentence(&key, &was, &is));
        }
        changes
    }

    /// The batches of the epoch under way that are done, counted in batches of `now`.
    ///
    /// # Errors
    /// In words, when a step has another number of images now, or an epoch another number of steps: schedules count steps, so that
    /// no place in the new run is the one where this state stands.
    pub fn batches_done(&self, now: &State) -> Result<u64, String> {
        let sizes = |config: &Value| {
            let number = |pointer: &str| config.pointer(pointer).and_then(Value::as_u64).unwrap_or(1);
            (number("/optimizer/batch_size"), number("/trainer/accumulate"))
        };
        let ((batch, accumulate), (batch_now, accumulate_now)) = (sizes(&self.config), sizes(&now.config));
        if batch * accumulate != batch_now * accumulate_now {
            return Err(format!(
                "a step had {batch} × {accumulate} images (optimizer.batch_size × trainer.accumulate) and would have \
                 {batch_now} × {accumulate_now}: keep the product, or begin a new run"
            ));
        }
        if self.steps_per_epoch != now.steps_per_epoch {
            return Err(format!(
                "an epoch had {} steps, and would have {} of the images that data.train has now: go on with the images that the \
                 run began with, or begin a new run with init.from",
                self.steps_per_epoch, now.steps_per_epoch
            ));
        }
        Ok(self.batch_in_epoch * batch / batch_now)
    }
}

/// Settings that differ and on which the weights depend.
fn changed_settings(saved: &Value, now: &Value, free: &[&str]) -> Vec<(String, String, String)> {
    fn leaves(value: &Value, key: &str, out: &mut BTreeMap<String, Value>) {
        match value {
            Value::Object(map) => {
                for (name, value) in map {
                    leaves(value, &if key.is_empty() { name.clone() } else { format!("{key}.{name}") }, out);
                }
            }
            value => {
                out.insert(key.to_owned(), value.clone());
            }
        }
    }
    let (mut before, mut after) = (BTreeMap::new(), BTreeMap::new());
    leaves(saved, "", &mut before);
    leaves(now, "", &mut after);
    let keys: BTreeSet<&String> = before.keys().chain(after.keys()).collect();
    let text = |value: Option<&Value>| {
        value.filter(|value| !value.is_null()).map_or("not set".to_owned(), Value::to_string)
    };
    let free = |key: &str| free.iter().any(|f| key == *f || f.ends_with('.') && key.starts_with(f));
    let changed = |key: &String| {
        let (was, is) = (before.get(key), after.get(key));
        (was != is && !free(key)).then(|| (key.clone(), text(was), text(is)))
    };
    keys.into_iter().filter_map(changed).collect()
}
