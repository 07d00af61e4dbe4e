//! Tells the host's executables and tests where the torch bridge lies: beside them, in a neighbouring `lib`, or
//! where `make setup` put it.

use std::env;

fn main() {
    println!("cargo::rerun-if-changed=build.rs");

    let mut places = vec!["$ORIGIN".to_owned(), "$ORIGIN/../lib".to_owned()];
    // Set by plugin-api's build script.
    places.extend(env::var("DEP_JEPA_TORCH_0_24_DEPS_LIB"));
    for place in places {
        println!("cargo::rustc-link-arg=-Wl,-rpath,{place}");
    }
}
