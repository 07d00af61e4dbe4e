//! What may not depend on the number of threads.

use jepa_plugin_api::tch::{self, Tensor};

/// Fails unless `compute` makes the same bytes with one of libtorch's threads and with several.
#[track_caller]
pub fn assert_same_for_any_number(compute: impl Fn() -> Vec<Tensor>) {
    let with = |threads: i32| {
        tch::set_num_threads(threads);
        compute()
    };
    let before = tch::get_num_threads();
    let one = with(1);
    for threads in [2, 3, 8] {
        let several = with(threads);
        assert_eq!(several.len(), one.len());
        assert!(several.iter().zip(&one).all(|(ours, one)| ours.equal(one)), "{threads} threads");
    }
    tch::set_num_threads(before);
}
