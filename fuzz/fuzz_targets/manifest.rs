//! A template's manifest and a recipe: any text. Nothing may panic.
#![no_main]

use libfuzzer_sys::fuzz_target;
use zeroboot_template::{Manifest, Recipe};

fuzz_target!(|text: &str| {
    if let Ok(manifest) = Manifest::from_toml(text) {
        let again = manifest.to_toml().expect("what was read can be written");
        Manifest::from_toml(&again).expect("what was written can be read");
    }
    let _recipe = Recipe::from_toml(text);
});
